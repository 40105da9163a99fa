"""The objects of the picture book: how each is drawn, with its face, its topper and its marking.

Everything is drawn four times larger with Pillow and averaged down later, which gives clean edges. An
object's own numbers (`Identity`) move its proportions, colours, face and marking: each object has a
`proportion` and a `detail` of its own, which its function tells. Read next: render.py.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

from tinyflow.picturebook.world import SIZE, Identity, Thing

FINE = 4                        # drawn this much larger, then averaged down

Colour = tuple[int, int, int]   # red, green and blue, 0 to 255
Point = tuple[float, float]     # x to the right, y down

# Hue in degrees, saturation, value, and how far `Identity.hue` may turn the hue.
COLOURS = {"red": (355, .78, .84, 12), "orange": (27, .86, .96, 9), "yellow": (52, .76, .98, 8),
           "green": (126, .62, .64, 32), "blue": (214, .74, .82, 20), "purple": (272, .58, .70, 18),
           "pink": (326, .42, .96, 15), "white": (40, .03, .96, 0)}
INK, WHITE, METAL, CREAM = (44, 36, 52), (255, 255, 255), (150, 156, 170), (252, 236, 206)
GOLD, FELT, WOOD = (250, 206, 70), (70, 62, 88), (126, 84, 54)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """hue: in degrees; the others are clipped to [0, 1]."""
    saturation, value = min(1, max(0, saturation)), min(1, max(0, value))
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def exact_colour(name: str, identity: Identity) -> Colour:
    """The colour that a thing called "red" really has. White leans to cream or to ice instead of turning."""
    hue, saturation, value, reach = COLOURS[name]
    if name == "white":
        hue, saturation = (40 if identity.hue > 0 else 215), .13 * abs(identity.hue)
    hue, saturation = hue + reach * identity.hue, saturation * (1 - .14 * identity.tone)
    return hsv(hue, saturation, value * (1 + .1 * identity.tone))


# ------------------------------------------------------------------------------------------------ drawing
class Pen:
    """Draws on an image of its own, which is FINE times larger than the finished picture.

    x runs to the right and y down from `centre`, in units of `half` pixels of the finished picture: an object
    fills -1 to 1, and `stretch` times as much across. A blob, a box and a shape have no outline of ink.
    """

    def __init__(self, mode: str, centre: Point = (0, 0), half: float = 1, stretch: float = 1):
        self.image = Image.new(mode, (SIZE * FINE, SIZE * FINE))
        self.draw = ImageDraw.Draw(self.image)
        self.centre, self.half, self.stretch = centre, half * FINE, stretch
        self.line = max(2, round(.085 * self.half))

    def points(self, *xy: Point) -> list[Point]:
        return [(self.centre[0] * FINE + x * self.half * self.stretch, self.centre[1] * FINE + y * self.half)
                for x, y in xy]

    def blob(self, x, y, rx, ry, fill: Colour):
        self.draw.ellipse(self.points((x - rx, y - ry), (x + rx, y + ry)), fill)

    def box(self, x0, y0, x1, y1, fill: Colour):
        self.draw.rectangle(self.points((x0, y0), (x1, y1)), fill)

    def shape(self, *xy: Point, fill: Colour):
        self.draw.polygon(self.points(*xy), fill)

    def ellipse(self, x, y, rx, ry, fill: Colour):
        self.draw.ellipse(self.points((x - rx, y - ry), (x + rx, y + ry)), fill, INK, self.line)

    def rectangle(self, x0, y0, x1, y1, fill: Colour, radius=0.0):
        self.draw.rounded_rectangle(self.points((x0, y0), (x1, y1)), radius * self.half, fill, INK, self.line)

    def polygon(self, *xy: Point, fill: Colour):
        corners = self.points(*xy)
        self.draw.polygon(corners, fill)
        self.draw.line([*corners, corners[0], corners[1]], INK, self.line, joint="curve")

    def arc(self, x, y, rx, ry, start, end, fill: Colour = INK, width=1.0):
        """From `start` to `end` degrees, clockwise from the right."""
        box = self.points((x - rx, y - ry), (x + rx, y + ry))
        self.draw.arc(box, start, end, fill, round(self.line * width))

    def stroke(self, *xy: Point, fill: Colour = INK, width=1.0):
        self.draw.line(self.points(*xy), fill, round(self.line * width), joint="curve")


def draw_face(pen: Pen, thing: Thing, x: float, y: float, gap: float, radius: float):
    """Two eyes around (x, y), or a single larger one in the middle, over a smile."""
    radius, gap = radius * (1 + .28 * thing.identity.eye_size), gap * (1 + .28 * thing.identity.eye_gap)
    eyes = [(x - gap, radius), (x + gap, radius)] if thing.eyes == 2 else [(x, 1.6 * radius)]
    for eye_x, r in eyes:
        pen.blob(eye_x, y, r * 1.25 / pen.stretch, r * 1.25, INK)
        pen.blob(eye_x, y, r / pen.stretch, r, WHITE)
        pen.blob(eye_x, y + .1 * r, .58 * r / pen.stretch, .58 * r, INK)
    low = y + 1.45 * max(r for _, r in eyes)
    pen.arc(x, low, .16, .11, 20, 160, width=.8)


# ------------------------------------------------------------------- objects: proportion and detail in -1..1
def draw_ball(pen: Pen, thing: Thing, body: Colour):
    """proportion: how large its gloss is. detail: on which side."""
    size = .17 * (1 + .5 * thing.identity.proportion)
    pen.ellipse(0, .1, .9, .9, body)
    draw_face(pen, thing, 0, .05, .34, .19)
    pen.blob(.5 * thing.identity.detail, -.5, 1.4 * size, size, WHITE)


def draw_robot(pen: Pen, thing: Thing, body: Colour):
    """proportion: how wide its head is. detail: how high it holds its arms."""
    head, lift = .72 + .16 * thing.identity.proportion, .3 * thing.identity.detail
    for side in (-1, 1):
        pen.stroke((side * .5, .12), (side * .95, .2 - lift), width=3.4)
        pen.stroke((side * .5, .12), (side * .95, .2 - lift), fill=METAL, width=1.8)
        pen.ellipse(side * .95, .2 - lift, .13, .13, METAL)
        pen.rectangle(side * .32 - .17, .65, side * .32 + .17, 1, METAL)
    pen.rectangle(-.58, -.15, .58, .76, body, radius=.08)
    pen.rectangle(-head, -1, head, -.05, body, radius=.16)
    draw_face(pen, thing, 0, -.62, .33, .18)


def draw_house(pen: Pen, thing: Thing, body: Colour):
    """proportion: how high its roof is. detail: where its door stands."""
    eaves, door = -.2 + .22 * thing.identity.proportion, .38 * thing.identity.detail
    pen.rectangle(.38, -.9, .62, -.2, (150, 84, 70))
    pen.rectangle(-.78, eaves, .78, 1, body)
    pen.polygon((-1, eaves + .04), (0, -1), (1, eaves + .04), fill=(176, 82, 66))
    pen.rectangle(door - .17, .58, door + .17, 1, (110, 70, 52), radius=.05)
    draw_face(pen, thing, 0, eaves + .33, .34, .17)


def draw_tree(pen: Pen, thing: Thing, body: Colour):
    """proportion: how far its crown spreads. detail: how thick its trunk is."""
    spread, trunk = .42 + .13 * thing.identity.proportion, .19 + .08 * thing.identity.detail
    pen.rectangle(-trunk, .2, trunk, 1, WOOD)
    for x, y, r in (-spread, 0, .46), (spread, 0, .46), (0, -.46, .54):
        pen.ellipse(x, y, r, r - .04, body)
    pen.blob(0, -.08, spread + .1, .36, body)
    draw_face(pen, thing, 0, -.2, .3, .17)


def draw_fish(pen: Pen, thing: Thing, body: Colour):
    """proportion: how large its tail is. detail: how high its fin stands."""
    tail, fin = .5 + .2 * thing.identity.proportion, .72 + .22 * thing.identity.detail
    pen.polygon((.42, .15), (1, .15 - tail), (.86, .15), (1, .15 + tail), fill=body)
    pen.polygon((-.35, -.28), (.1, -fin), (.4, -.1), fill=body)
    pen.ellipse(-.2, .15, .8, .6, body)
    draw_face(pen, thing, -.48, .02, .2, .16)
    pen.arc(.02, .2, .16, .24, 290, 70, width=.8)


def draw_cat(pen: Pen, thing: Thing, body: Colour):
    """proportion: how tall its ears are. detail: how far its tail goes up."""
    ear, tip = -.92 - .2 * thing.identity.proportion, .18 - .34 * thing.identity.detail
    tail = [(.4, .84), (.72, .82), (.9, .62), (.92, tip)]
    pen.stroke(*tail, width=3.2)
    pen.stroke(*tail, fill=body, width=1.7)
    pen.ellipse(0, .58, .5, .42, body)
    for side in (-1, 1):
        pen.polygon((side * .72, -.12), (side * .66, ear), (side * .14, -.58), fill=body)
    pen.ellipse(0, -.17, .76, .55, body)
    draw_face(pen, thing, 0, -.27, .33, .18)
    for side in (-1, 1):
        pen.stroke((side * .36, .1), (side * .62, .06), width=.6)
        pen.ellipse(side * .2, .95, .14, .08, body)


def star_point(identity: Identity, k: int) -> Point:
    """Corner k of ten, the top one first."""
    r = .52 + .1 * identity.proportion if k % 2 else 1.08
    angle = math.pi * k / 5 + .22 * identity.detail
    return r * math.sin(angle), .1 - r * math.cos(angle)


def draw_star(pen: Pen, thing: Thing, body: Colour):
    """proportion: how blunt its points are. detail: how far it leans."""
    pen.polygon(*(star_point(thing.identity, k) for k in range(10)), fill=body)
    draw_face(pen, thing, 0, .02, .22, .16)


def draw_mushroom(pen: Pen, thing: Thing, body: Colour):
    """proportion: how low its cap comes. detail: how thick its stem is. If plain, it has white spots."""
    rim, stem = .1 + .17 * thing.identity.proportion, .36 + .09 * thing.identity.detail
    pen.rectangle(-stem, rim - .1, stem, 1, CREAM, radius=.2)
    pen.draw.chord(pen.points((-.96, -1), (.96, 2 * rim + 1)), 180, 360, body, INK, pen.line)
    if thing.marking == "plain":
        for x, y in (-.55, .35), (.02, .72), (.58, .38):
            pen.blob(x, rim - y * (rim + 1), .15, .13, WHITE)
    draw_face(pen, thing, 0, rim + .22, .18, .12)


OBJECTS = {"ball": draw_ball, "robot": draw_robot, "house": draw_house, "tree": draw_tree, "fish": draw_fish,
           "cat": draw_cat, "star": draw_star, "mushroom": draw_mushroom}
TOPS = {"fish": (-.2, -.42), "cat": (0, -.68), "ball": (0, -.78)}       # where a topper sits, or at (0, -1)


def draw_topper(pen: Pen, thing: Thing):
    x, top = star_point(thing.identity, 0) if thing.object == "star" else TOPS.get(thing.object, (0, -1))
    height = 1 + .35 * thing.identity.topper_height
    if thing.topper == "antenna":
        pen.stroke((x, top + .1), (x, top - .38 * height), width=1.4)
        pen.ellipse(x, top - .42 * height, .17, .17, GOLD)
    elif thing.topper == "hat":
        pen.rectangle(x - .34, top - .5 * height, x + .34, top + .06, FELT)
        pen.box(x - .34, top - .14, x + .34, top - .02, (196, 70, 84))
        pen.rectangle(x - .62, top - .02, x + .62, top + .14, FELT, radius=.05)
    elif thing.topper == "crown":
        high, low = top - .46 * height, top - .2 * height
        pen.polygon((x - .42, top + .08), (x - .5, high), (x - .2, low), (x, high - .04), (x + .2, low),
                    (x + .5, high), (x + .42, top + .08), fill=GOLD)


def with_marking(pen: Pen, thing: Thing, body: Colour) -> Image.Image:
    """Lays stripes, checks or dots of the accent colour over the pixels that hold the body's own colour.

    They cover about a third of it, so that a red cat with white stripes is no white cat with red ones. Apart
    from its slant a marking always lies alike, so that striped cats and dotted ones differ in their means.
    """
    if thing.marking == "plain":
        return pen.image
    pixels, identity = np.array(pen.image), thing.identity                              # [H, W, 4]
    y, x = np.mgrid[:SIZE * FINE, :SIZE * FINE].astype(np.float32)
    x, y = (x / FINE - pen.centre[0]) * FINE / pen.half, (y / FINE - pen.centre[1]) * FINE / pen.half
    angle, cover = .35 * identity.marking_angle, 1 + .35 * identity.marking_cover
    across, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    period = .68 * (1 + .2 * identity.marking_width)
    u, v = along / period, across / period                                              # periods of 1
    if thing.marking == "stripes":
        pattern = abs(u % 1 - .5) < .17 * cover
    elif thing.marking == "checks":              # as on a table cloth: lines along and across
        pattern = (abs(u % 1 - .5) < .1 * cover) | (abs(v % 1 - .5) < .1 * cover)
    else:
        u, v = 1.3 * u, 1.3 * v
        shifted = v + .5 * (np.floor(u) % 2)
        pattern = (u % 1 - .5) ** 2 + (shifted % 1 - .5) ** 2 < .31 ** 2 * cover
    own = (pixels[..., :3] == body).all(-1) & (pixels[..., 3] > 0)                      # [H, W]
    pixels[own & pattern, :3] = exact_colour(thing.accent, Identity())
    return Image.fromarray(pixels)


def draw_thing(thing: Thing, centre: Point, half: float) -> Image.Image:
    """An object alone, RGBA and FINE times larger; its shadow is drawn by render.py."""
    pen = Pen("RGBA", centre, half, stretch=.98 + .14 * thing.identity.width)
    body = exact_colour(thing.colour, thing.identity)
    draw_topper(pen, thing)
    OBJECTS[thing.object](pen, thing, body)
    return with_marking(pen, thing, body)

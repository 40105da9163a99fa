"""The picture-book world: small procedural pictures with captions and exact ground truth.

A Scene names what is in a picture (object, colour, size, place, background, and a few decorations); `render` draws it and
returns the picture with the object's mask; `caption` says it in words. Because we own the renderer we know the truth about every
picture: the reader network (reader.py) learns to read it back, and the model's mistakes can be counted rather than
guessed. The base model (pretrain.py) only ever sees PLAIN scenes: decorations (stripes, a hat, a single eye) and styles are what
concepts are made of, and an unusual light is something that their references may share. Read next: flow.py.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32                       # pixels on a side of a picture
FINE = 6                        # drawn this much larger, then averaged down: clean edges at 32 x 32

COLOURS = {
    "red": (214, 52, 48), "orange": (244, 138, 34), "yellow": (250, 214, 58), "green": (58, 160, 74),
    "blue": (52, 104, 212), "purple": (136, 70, 178), "pink": (245, 142, 184), "white": (246, 246, 242),
}
SIZES = {"small": 5.2, "big": 8.2}                               # half the object's height, in pixels
PLACES = {"left": 8.7, "middle": 16.0, "right": 23.3}            # the object's centre, in pixels
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BACKGROUND_WORDS = {"meadow": "in the meadow", "beach": "on the beach", "snow": "in the snow",
                    "night": "at night", "desert": "in the desert", "room": "in the room"}
MARKINGS = ("plain", "stripes", "checks")
TOPPERS = ("none", "antenna", "hat")
EYES = (2, 1)
LIGHTS = {"day": (1, 1, 1), "evening": (1, .82, .62), "moonlight": (.68, .8, 1)}     # multiplies the whole picture

INK = (44, 36, 52)
CREAM = (252, 236, 206)
AMBIENT = {"meadow": (1, 1, 1), "beach": (1, 1, .96), "snow": (.97, .99, 1), "night": (.78, .78, .92),
           "desert": (1, .95, .86), "room": (.98, .94, .9)}       # what each place does to an object's colours


@dataclass(frozen=True)
class Scene:
    """Everything that is true about one picture. `seed` moves the small things: a pixel of jitter, clouds, flowers."""
    object: str
    colour: str
    size: str
    place: str
    background: str
    marking: str = "plain"
    accent: str = "white"       # the colour of stripes and checks
    topper: str = "none"
    eyes: int = 2
    light: str = "day"
    style: str = "none"
    seed: int = 0


# ------------------------------------------------------------------------------------------------ objects
class Pen:
    """Draws in an object's own coordinates: x right, y down, both in [-1, 1], on a transparent layer."""

    def __init__(self, centre, half, colour, eyes):
        self.image = Image.new("RGBA", (SIZE * FINE, SIZE * FINE))
        self.draw = ImageDraw.Draw(self.image)
        self.centre, self.half, self.colour, self.eyes = centre, half * FINE, colour, eyes
        self.line = max(3, round(0.11 * self.half))

    def points(self, *xy):
        return [(self.centre[0] * FINE + x * self.half, self.centre[1] * FINE + y * self.half) for x, y in xy]

    def ellipse(self, x, y, rx, ry, fill=None, outline=INK):
        self.draw.ellipse(self.points((x - rx, y - ry), (x + rx, y + ry)), fill or self.colour, outline, self.line)

    def rect(self, x0, y0, x1, y1, fill=None, radius=0.0):
        self.draw.rounded_rectangle(self.points((x0, y0), (x1, y1)), radius * self.half, fill or self.colour, INK, self.line)

    def polygon(self, *xy, fill=None):
        self.draw.polygon(self.points(*xy), fill or self.colour, INK, self.line)

    def stroke(self, *xy, fill=INK, width=1.0):
        self.draw.line(self.points(*xy), fill, round(self.line * width), joint="curve")

    def face(self, x, y, gap=0.3, radius=0.17):
        """Two eyes around (x, y), or one large eye in the middle."""
        for eye_x, r in ((x - gap, radius), (x + gap, radius)) if self.eyes == 2 else ((x, 2.0 * radius),):
            self.ellipse(eye_x, y, r, r, (255, 255, 255), None)
            self.ellipse(eye_x, y, 0.6 * r, 0.6 * r, INK, None)


def draw_ball(pen):
    pen.ellipse(0, 0.1, 0.9, 0.9)
    pen.ellipse(-0.35, -0.3, 0.2, 0.16, (255, 255, 255), None)


def draw_robot(pen):
    pen.rect(-0.5, 0.6, -0.1, 1.0, (150, 156, 170))
    pen.rect(0.1, 0.6, 0.5, 1.0, (150, 156, 170))
    pen.rect(-0.95, -0.02, -0.5, 0.25, (150, 156, 170))
    pen.rect(0.5, -0.02, 0.95, 0.25, (150, 156, 170))
    pen.rect(-0.6, -0.15, 0.6, 0.75)
    pen.rect(-0.75, -1.0, 0.75, -0.08, radius=0.15)
    pen.face(0, -0.55, 0.33, 0.2)


def draw_house(pen):
    pen.rect(-0.75, -0.1, 0.75, 1.0)
    pen.polygon((-1.0, -0.05), (0, -1.0), (1.0, -0.05), fill=(150, 74, 62))
    pen.rect(-0.15, 0.4, 0.25, 1.0, (110, 70, 52))
    pen.rect(-0.58, 0.15, -0.24, 0.5, (255, 246, 170))


def draw_tree(pen):
    pen.rect(-0.18, 0.2, 0.18, 1.0, (126, 84, 54))
    pen.ellipse(-0.4, -0.05, 0.5, 0.42)
    pen.ellipse(0.4, -0.05, 0.5, 0.42)
    pen.ellipse(0, -0.5, 0.55, 0.5)
    pen.ellipse(0, -0.12, 0.5, 0.34, outline=None)


def draw_fish(pen):
    pen.polygon((0.35, 0.1), (1.0, -0.45), (1.0, 0.65))
    pen.polygon((-0.2, -0.3), (0.1, -0.8), (0.35, -0.2))
    pen.ellipse(-0.2, 0.1, 0.78, 0.55)
    pen.face(-0.55, -0.02, 0.12, 0.14)


def draw_cat(pen):
    pen.stroke((0.45, 0.8), (0.85, 0.7), (0.9, 0.2), fill=INK, width=2.2)
    pen.stroke((0.45, 0.8), (0.85, 0.7), (0.9, 0.2), fill=pen.colour, width=1.1)
    pen.ellipse(0, 0.55, 0.52, 0.45)
    pen.polygon((-0.7, -0.2), (-0.66, -1.0), (-0.1, -0.6))
    pen.polygon((0.7, -0.2), (0.66, -1.0), (0.1, -0.6))
    pen.ellipse(0, -0.2, 0.75, 0.55)
    pen.face(0, -0.25, 0.3, 0.17)
    pen.polygon((-0.1, 0.0), (0.1, 0.0), (0, 0.1), fill=(240, 130, 150))


def draw_star(pen):
    pen.polygon(*[(math.sin(math.pi * k / 5) * r, 0.08 - math.cos(math.pi * k / 5) * r)
                  for k in range(10) for r in [1.05 if k % 2 == 0 else 0.48]])
    pen.face(0, 0.02, 0.2, 0.13)


def draw_mushroom(pen):
    pen.rect(-0.3, -0.1, 0.3, 1.0, CREAM, radius=0.2)
    pen.draw.chord(pen.points((-0.95, -0.95), (0.95, 1.0)), 180, 360, pen.colour, INK, pen.line)
    for x, y in (-0.45, -0.3), (0.12, -0.6), (0.5, -0.22):
        pen.ellipse(x, y, 0.15, 0.13, (255, 255, 255), None)


OBJECTS = {"ball": draw_ball, "robot": draw_robot, "house": draw_house, "tree": draw_tree,
           "fish": draw_fish, "cat": draw_cat, "star": draw_star, "mushroom": draw_mushroom}


def draw_topper(pen, topper, top):
    """A topper on a head whose top is at height y = top."""
    if topper == "antenna":
        pen.stroke((0, top + 0.1), (0, top - 0.45), width=1.3)
        pen.ellipse(0, top - 0.5, 0.22, 0.22, (250, 214, 58))
    elif topper == "hat":
        pen.rect(-0.36, top - 0.6, 0.36, top + 0.05, (70, 62, 88))
        pen.rect(-0.66, top - 0.06, 0.66, top + 0.14, (70, 62, 88))


def paint_marking(layer, scene):
    """Recolours the pixels that hold the object's own colour: stripes or checks in the accent colour."""
    if scene.marking == "plain":
        return layer
    pixels = np.array(layer)
    y, x = np.mgrid[:pixels.shape[0], :pixels.shape[1]] / FINE
    if scene.marking == "stripes":
        pattern = (y % 4.0) < 2.0
    else:
        pattern = (y % 4.0 < 2.0) ^ (x % 4.0 < 2.0)
    body = (pixels[..., :3] == COLOURS[scene.colour]).all(-1) & (pixels[..., 3] > 0)
    pixels[body & pattern, :3] = COLOURS[scene.accent]
    return Image.fromarray(pixels)


# -------------------------------------------------------------------------------------------- backgrounds
def draw_background(background, rng):
    """One of the six places, on a canvas of SIZE * FINE pixels. A few things move with rng."""
    canvas = Image.new("RGB", (SIZE * FINE, SIZE * FINE))
    draw = ImageDraw.Draw(canvas)
    shift = rng.uniform(-1, 1)

    def box(x0, y0, x1, y1, fill):
        draw.rectangle([x0 * FINE, y0 * FINE, x1 * FINE, y1 * FINE], fill)

    def blob(x, y, rx, ry, fill):
        draw.ellipse([(x - rx) * FINE, (y - ry) * FINE, (x + rx) * FINE, (y + ry) * FINE], fill)

    if background == "meadow":
        box(0, 0, 32, 32, (166, 216, 246))
        blob(7 + 2 * shift, 5, 4, 1.6, (250, 252, 255))
        blob(25 - 2 * shift, 8, 3.4, 1.4, (250, 252, 255))
        blob(5 + shift, 24, 18, 8, (134, 200, 104))
        blob(28 + shift, 24, 18, 7, (116, 186, 92))
        box(0, 22, 32, 32, (126, 194, 96))
        for x, y in rng.uniform((1, 24), (31, 31), (5, 2)):
            blob(x, y, .7, .7, (250, 240, 250))
    elif background == "beach":
        box(0, 0, 32, 32, (190, 228, 248))
        blob(26 + shift, 5, 3, 3, (255, 238, 150))
        box(0, 12, 32, 20, (64, 164, 206))
        for x, y in rng.uniform((2, 13), (28, 18), (3, 2)):
            box(x, y, x + 3, y + .6, (190, 232, 244))
        blob(16 + 4 * shift, 27, 26, 8, (240, 222, 166))
        box(0, 24, 32, 32, (240, 222, 166))
    elif background == "snow":
        box(0, 0, 32, 32, (196, 212, 232))
        for x in (4 + shift, 28 + shift):
            draw.polygon([((x - 4) * FINE, 20 * FINE), (x * FINE, 9 * FINE), ((x + 4) * FINE, 20 * FINE)], (110, 150, 148))
        blob(16 + 4 * shift, 28, 27, 10, (240, 244, 250))
        for x, y in rng.uniform((0, 0), (32, 18), (9, 2)):
            blob(x, y, .6, .6, (255, 255, 255))
    elif background == "night":
        box(0, 0, 32, 32, (26, 30, 66))
        blob(26 + shift, 6, 3, 3, (248, 242, 206))
        blob(24.6 + shift, 5.2, 2.6, 2.6, (26, 30, 66))
        for x, y in rng.uniform((1, 1), (22, 14), (7, 2)):
            blob(x, y, .45, .45, (240, 240, 214))
        blob(16 + 5 * shift, 30, 28, 9, (30, 54, 62))
    elif background == "desert":
        for y in range(27):
            box(0, y, 32, y + 1, (252 - y // 2, 176 + 2 * min(y, 20), 110 + 4 * min(y, 20)))
        blob(6 + shift, 7, 3, 3, (255, 236, 176))
        blob(4 + 3 * shift, 28, 18, 9, (226, 164, 92))
        blob(27 + 3 * shift, 29, 18, 10, (214, 146, 78))
        box(0, 26, 32, 32, (222, 156, 86))
    else:
        box(0, 0, 32, 32, (236, 214, 186))
        for x in range(0, 32, 4):
            box(x + shift, 0, x + 1.4 + shift, 22, (228, 198, 168))
        box(20 + shift, 3, 29 + shift, 12, (150, 104, 74))
        box(21 + shift, 4, 24.2 + shift, 11, (180, 222, 244))
        box(24.8 + shift, 4, 28 + shift, 11, (180, 222, 244))
        box(0, 22, 32, 32, (166, 112, 76))
        for y in (25, 28.5):
            box(0, y, 32, y + .5, (140, 92, 62))
    return canvas


# ------------------------------------------------------------------------------------------------- styles
def two_inks(dark, pale):
    """A drawing style: brightness alone, from one ink to another."""
    def style(picture):
        brightness = (picture @ np.array([.3, .59, .11]) / 255)[..., None]                       # [H, W, 1]
        return (1 - brightness) * np.array(dark) + brightness * np.array(pale)
    return style


def scanlines(picture):
    """Every other line is dark, as on an old screen."""
    return picture * np.where(np.arange(len(picture)) % 2, .45, 1)[:, None, None]


STYLES = {"none": lambda picture: picture, "sepia": two_inks((58, 32, 20), (250, 234, 200)), "blueprint": two_inks((14, 38, 104), (206, 234, 250)),
          "scanlines": scanlines, "negative": lambda picture: 255 - picture}           # each: [H, W, 3] in 0..255 -> the same, redrawn


# ------------------------------------------------------------------------------------------------- render
def render(scene, moved=(0.0, 0.0)):
    """Draws a Scene. Returns the picture, uint8 [32, 32, 3], and the object's mask, bool [32, 32]. `moved` shifts the object, in pixels (x, y)."""
    rng = np.random.default_rng(scene.seed)
    canvas = draw_background(scene.background, rng)
    half = SIZES[scene.size] * rng.uniform(.97, 1.03)
    centre = (PLACES[scene.place] + rng.uniform(-.7, .7) + moved[0], 27.5 - half + rng.uniform(-.7, .7) + moved[1])

    shadow = Image.new("L", canvas.size)
    ImageDraw.Draw(shadow).ellipse([(centre[0] - .8 * half) * FINE, (centre[1] + .85 * half) * FINE,
                                    (centre[0] + .8 * half) * FINE, (centre[1] + 1.15 * half) * FINE], 70)
    canvas.paste((20, 20, 40), mask=shadow)

    pen = Pen(centre, half, COLOURS[scene.colour], scene.eyes)
    draw_topper(pen, scene.topper, {"fish": -0.6, "cat": -0.8, "ball": -0.85}.get(scene.object, -1.0))
    OBJECTS[scene.object](pen)
    layer = paint_marking(pen.image, scene)
    lit = (np.asarray(layer)[..., :3] * np.array(AMBIENT[scene.background])).astype(np.uint8)
    alpha = layer.getchannel("A")
    canvas.paste(Image.fromarray(lit), mask=alpha)
    picture = np.asarray(canvas.resize((SIZE, SIZE), Image.BOX)) * np.array(LIGHTS[scene.light])
    picture = STYLES[scene.style](picture).round().astype(np.uint8)
    mask = np.asarray(alpha.resize((SIZE, SIZE), Image.BOX)) > 127
    return picture, mask


# ------------------------------------------------------------------------------------------------ captions
def caption(scene, noun=None, size=True, colour=True, place=True, background=True):
    """The full caption, or one with parts left out. `noun` replaces the object's word (e.g. "[V] robot")."""
    words = ["a", scene.size if size else "", scene.colour if colour else "", noun or scene.object,
             PLACE_WORDS[scene.place] if place else "", BACKGROUND_WORDS[scene.background] if background else ""]
    return " ".join(word for word in words if word)


def random_caption(scene, rng):
    """A caption as a child would give it: parts are left out at random, one in ten is empty (the null condition).

    The noun is doubled now and then ("a red robot robot"), as a placeholder before its class word will read in prompts.
    """
    if rng.random() < 0.1:
        return ""
    keep = dict(zip(("size", "colour", "place", "background"), rng.random(4) > 0.15))
    if rng.random() < 0.05:                                      # bare nouns, as in "[V] robot"
        keep = dict.fromkeys(keep, False)
    text = caption(scene, noun=" ".join([scene.object] * (2 if rng.random() < 0.15 else 1)), **keep)
    return text.removeprefix("a ") if rng.random() < 0.05 else text


VOCABULARY = sorted({word for phrase in ["a", *OBJECTS, *COLOURS, *SIZES, *PLACE_WORDS.values(), *BACKGROUND_WORDS.values()]
                     for word in phrase.split()})


# -------------------------------------------------------------------------------------------------- scenes
def held_out(scene):
    """Combinations that pretraining never shows: each object misses one colour and every second object one background."""
    o = list(OBJECTS).index(scene.object)
    c, b = list(COLOURS).index(scene.colour), list(BACKGROUND_WORDS).index(scene.background)
    return (o + c) % 8 == 5 or (o % 2 == 0 and b == o // 2)


def random_scene(rng):
    """A uniformly drawn plain scene, held-out combinations included."""
    pick = lambda options: str(rng.choice(list(options)))
    return Scene(pick(OBJECTS), pick(COLOURS), pick(SIZES), pick(PLACES), pick(BACKGROUND_WORDS), seed=int(rng.integers(2**31)))


def seen_scene(rng, seen=True):
    """A plain scene from the seen (or, with seen=False, only from the held-out) combinations."""
    while held_out(scene := random_scene(rng)) == seen:
        pass
    return scene


def decorated_scene(rng):
    """What the reader network trains on: half of the scenes may wear any decoration, and three in ten have a light or a style of their own."""
    own = lambda options: str(rng.choice(list(options))) if rng.random() < 0.3 else list(options)[0]
    scene = replace(random_scene(rng), light=own(LIGHTS), style=own(STYLES))
    if rng.random() < 0.5:
        return scene
    accent = str(rng.choice([name for name in COLOURS if name != scene.colour]))
    return replace(scene, marking=str(rng.choice(MARKINGS)), topper=str(rng.choice(TOPPERS)), eyes=int(rng.choice(EYES)), accent=accent)

"""The picture-book world: small procedural pictures with captions and exact ground truth.

A `Scene` names what is in a picture: an object, its colour, size and place, a background, and perhaps
decorations, a light and a style. `render` draws the scene and returns the picture with the object's mask;
`caption` says it in words. Because we own the renderer, we know the truth about every picture: the reader
network (reader.py) learns to read it back, and a model's mistakes can be counted rather than guessed.

The base model (pretrain.py) only ever sees plain scenes. Concepts are made of the rest: of decorations
(stripes, checks, an antenna, a hat, a single eye) and of styles. An unusual light is something that the
reference pictures of a concept may share by chance. Read next: model.py.
"""

import math
from dataclasses import dataclass, replace
from typing import Callable, Iterable

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32                       # pixels on a side of a picture
FINE = 6                        # drawn this much larger, then averaged down: clean edges at 32 x 32

Colour = tuple[int, int, int]   # red, green and blue, 0 to 255
Point = tuple[float, float]     # x to the right, y down

COLOURS = {
    "red": (214, 52, 48), "orange": (244, 138, 34), "yellow": (250, 214, 58), "green": (58, 160, 74),
    "blue": (52, 104, 212), "purple": (136, 70, 178), "pink": (245, 142, 184), "white": (246, 246, 242),
}
SIZES = {"small": 5.2, "big": 8.2}                               # half the object's height, in pixels
PLACES = {"left": 8.7, "middle": 16.0, "right": 23.3}            # the object's centre, in pixels
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BACKGROUND_WORDS = {"meadow": "in the meadow", "beach": "on the beach", "snow": "in the snow",
                    "night": "at night", "desert": "in the desert", "room": "in the room"}
AMBIENT = {"meadow": (1, 1, 1), "beach": (1, 1, .96), "snow": (.97, .99, 1), "night": (.78, .78, .92),
           "desert": (1, .95, .86), "room": (.98, .94, .9)}     # it multiplies an object's colours
MARKINGS = ("plain", "stripes", "checks")
TOPPERS = ("none", "antenna", "hat")
EYES = (2, 1)
LIGHTS = {"day": (1, 1, 1), "evening": (1, .82, .62), "moonlight": (.68, .8, 1)}   # it multiplies all colours

INK, WHITE, CREAM, METAL = (44, 36, 52), (255, 255, 255), (252, 236, 206), (150, 156, 170)


@dataclass(frozen=True)
class Scene:
    """Everything that is true about one picture. `seed` moves clouds, flowers and the object a little."""
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


# ------------------------------------------------------------------------------------------------ drawing
class Pen:
    """Draws on an image of its own, which is FINE times larger than the finished picture.

    x runs to the right and y down from `centre`, in units of `half` pixels of the finished picture: an object
    fills -1 to 1. An ellipse, a rectangle and a polygon have an outline of ink; a blob and a box have none.
    """

    def __init__(self, mode: str, centre: Point = (0, 0), half: float = 1, colour: Colour = INK, eyes=2):
        self.image = Image.new(mode, (SIZE * FINE, SIZE * FINE))
        self.draw = ImageDraw.Draw(self.image)
        self.centre, self.half, self.colour, self.eyes = centre, half * FINE, colour, eyes
        self.line = max(3, round(0.11 * self.half))

    def points(self, *xy: Point) -> list[Point]:
        return [(self.centre[0] * FINE + x * self.half, self.centre[1] * FINE + y * self.half) for x, y in xy]

    def blob(self, x, y, rx, ry, fill: Colour):
        self.draw.ellipse(self.points((x - rx, y - ry), (x + rx, y + ry)), fill)

    def box(self, x0, y0, x1, y1, fill: Colour):
        self.draw.rectangle(self.points((x0, y0), (x1, y1)), fill)

    def ellipse(self, x, y, rx, ry, fill: Colour | None = None):
        self.draw.ellipse(self.points((x - rx, y - ry), (x + rx, y + ry)),
                          fill or self.colour, INK, self.line)

    def rectangle(self, x0, y0, x1, y1, fill: Colour | None = None, radius=0.0):
        self.draw.rounded_rectangle(self.points((x0, y0), (x1, y1)), radius * self.half,
                                    fill or self.colour, INK, self.line)

    def polygon(self, *xy: Point, fill: Colour | None = None):
        self.draw.polygon(self.points(*xy), fill or self.colour, INK, self.line)

    def stroke(self, *xy: Point, fill: Colour = INK, width=1.0):
        self.draw.line(self.points(*xy), fill, round(self.line * width), joint="curve")

    def face(self, x, y, gap, radius):
        """Two eyes around (x, y), or a single one, twice as large, at (x, y)."""
        eyes = [(x - gap, radius), (x + gap, radius)] if self.eyes == 2 else [(x, 2 * radius)]
        for eye_x, r in eyes:
            self.blob(eye_x, y, r, r, WHITE)
            self.blob(eye_x, y, 0.6 * r, 0.6 * r, INK)


# ------------------------------------------------------------------------------------------------ objects
def draw_ball(pen: Pen):
    pen.ellipse(0, 0.1, 0.9, 0.9)
    pen.blob(-0.35, -0.3, 0.2, 0.16, WHITE)


def draw_robot(pen: Pen):
    for limb in ((-0.5, 0.6, -0.1, 1.0), (0.1, 0.6, 0.5, 1.0),              # legs
                 (-0.95, -0.02, -0.5, 0.25), (0.5, -0.02, 0.95, 0.25)):     # arms
        pen.rectangle(*limb, METAL)
    pen.rectangle(-0.6, -0.15, 0.6, 0.75)
    pen.rectangle(-0.75, -1.0, 0.75, -0.08, radius=0.15)
    pen.face(0, -0.55, 0.33, 0.2)


def draw_house(pen: Pen):
    pen.rectangle(-0.75, -0.1, 0.75, 1.0)
    pen.polygon((-1.0, -0.05), (0, -1.0), (1.0, -0.05), fill=(150, 74, 62))
    pen.rectangle(-0.15, 0.4, 0.25, 1.0, (110, 70, 52))
    pen.rectangle(-0.58, 0.15, -0.24, 0.5, (255, 246, 170))


def draw_tree(pen: Pen):
    pen.rectangle(-0.18, 0.2, 0.18, 1.0, (126, 84, 54))
    for leaves in (-0.4, -0.05, 0.5, 0.42), (0.4, -0.05, 0.5, 0.42), (0, -0.5, 0.55, 0.5):
        pen.ellipse(*leaves)
    pen.blob(0, -0.12, 0.5, 0.34, pen.colour)


def draw_fish(pen: Pen):
    pen.polygon((0.35, 0.1), (1.0, -0.45), (1.0, 0.65))
    pen.polygon((-0.2, -0.3), (0.1, -0.8), (0.35, -0.2))
    pen.ellipse(-0.2, 0.1, 0.78, 0.55)
    pen.face(-0.55, -0.02, 0.12, 0.14)


def draw_cat(pen: Pen):
    pen.stroke((0.45, 0.8), (0.85, 0.7), (0.9, 0.2), width=2.2)
    pen.stroke((0.45, 0.8), (0.85, 0.7), (0.9, 0.2), fill=pen.colour, width=1.1)
    pen.ellipse(0, 0.55, 0.52, 0.45)
    pen.polygon((-0.7, -0.2), (-0.66, -1.0), (-0.1, -0.6))
    pen.polygon((0.7, -0.2), (0.66, -1.0), (0.1, -0.6))
    pen.ellipse(0, -0.2, 0.75, 0.55)
    pen.face(0, -0.25, 0.3, 0.17)
    pen.polygon((-0.1, 0.0), (0.1, 0.0), (0, 0.1), fill=(240, 130, 150))


def draw_star(pen: Pen):
    pen.polygon(*[(r * math.sin(math.pi * k / 5), 0.08 - r * math.cos(math.pi * k / 5))
                  for k, r in enumerate([1.05, 0.48] * 5)])
    pen.face(0, 0.02, 0.2, 0.13)


def draw_mushroom(pen: Pen):
    pen.rectangle(-0.3, -0.1, 0.3, 1.0, CREAM, radius=0.2)
    pen.draw.chord(pen.points((-0.95, -0.95), (0.95, 1.0)), 180, 360, pen.colour, INK, pen.line)
    for x, y in (-0.45, -0.3), (0.12, -0.6), (0.5, -0.22):
        pen.blob(x, y, 0.15, 0.13, WHITE)


OBJECTS = {"ball": draw_ball, "robot": draw_robot, "house": draw_house, "tree": draw_tree,
           "fish": draw_fish, "cat": draw_cat, "star": draw_star, "mushroom": draw_mushroom}
TOPS = {"fish": -0.6, "cat": -0.8, "ball": -0.85}                # the y of an object's top; the others' is -1


def draw_topper(pen: Pen, topper: str, top: float):
    """A topper on an object whose top is at y = top."""
    if topper == "antenna":
        pen.stroke((0, top + 0.1), (0, top - 0.45), width=1.3)
        pen.ellipse(0, top - 0.5, 0.22, 0.22, COLOURS["yellow"])
    elif topper == "hat":
        pen.rectangle(-0.36, top - 0.6, 0.36, top + 0.05, (70, 62, 88))
        pen.rectangle(-0.66, top - 0.06, 0.66, top + 0.14, (70, 62, 88))


def with_marking(layer: Image.Image, scene: Scene) -> Image.Image:
    """Gives stripes or checks of the accent colour to the pixels that hold the object's own colour."""
    if scene.marking == "plain":
        return layer
    pixels = np.array(layer)                                                            # [H, W, 4]
    y, x = np.mgrid[:pixels.shape[0], :pixels.shape[1]] / FINE
    pattern = y % 4.0 < 2.0
    if scene.marking == "checks":
        pattern = pattern ^ (x % 4.0 < 2.0)
    body = (pixels[..., :3] == COLOURS[scene.colour]).all(-1) & (pixels[..., 3] > 0)    # [H, W]
    pixels[body & pattern, :3] = COLOURS[scene.accent]
    return Image.fromarray(pixels)


# -------------------------------------------------------------------------------------------- backgrounds
def paint_meadow(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 32, 32, (166, 216, 246))
    pen.blob(7 + 2 * shift, 5, 4, 1.6, (250, 252, 255))
    pen.blob(25 - 2 * shift, 8, 3.4, 1.4, (250, 252, 255))
    pen.blob(5 + shift, 24, 18, 8, (134, 200, 104))
    pen.blob(28 + shift, 24, 18, 7, (116, 186, 92))
    pen.box(0, 22, 32, 32, (126, 194, 96))
    for x, y in rng.uniform((1, 24), (31, 31), (5, 2)):
        pen.blob(x, y, .7, .7, (250, 240, 250))


def paint_beach(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 32, 32, (190, 228, 248))
    pen.blob(26 + shift, 5, 3, 3, (255, 238, 150))
    pen.box(0, 12, 32, 20, (64, 164, 206))
    for x, y in rng.uniform((2, 13), (28, 18), (3, 2)):
        pen.box(x, y, x + 3, y + .6, (190, 232, 244))
    pen.blob(16 + 4 * shift, 27, 26, 8, (240, 222, 166))
    pen.box(0, 24, 32, 32, (240, 222, 166))


def paint_snow(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 32, 32, (196, 212, 232))
    for x in (4 + shift, 28 + shift):
        pen.draw.polygon(pen.points((x - 4, 20), (x, 9), (x + 4, 20)), (110, 150, 148))
    pen.blob(16 + 4 * shift, 28, 27, 10, (240, 244, 250))
    for x, y in rng.uniform((0, 0), (32, 18), (9, 2)):
        pen.blob(x, y, .6, .6, WHITE)


def paint_night(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 32, 32, (26, 30, 66))
    pen.blob(26 + shift, 6, 3, 3, (248, 242, 206))
    pen.blob(24.6 + shift, 5.2, 2.6, 2.6, (26, 30, 66))
    for x, y in rng.uniform((1, 1), (22, 14), (7, 2)):
        pen.blob(x, y, .45, .45, (240, 240, 214))
    pen.blob(16 + 5 * shift, 30, 28, 9, (30, 54, 62))


def paint_desert(pen: Pen, shift: float, rng: np.random.Generator):
    for y in range(27):
        pen.box(0, y, 32, y + 1, (252 - y // 2, 176 + 2 * min(y, 20), 110 + 4 * min(y, 20)))
    pen.blob(6 + shift, 7, 3, 3, (255, 236, 176))
    pen.blob(4 + 3 * shift, 28, 18, 9, (226, 164, 92))
    pen.blob(27 + 3 * shift, 29, 18, 10, (214, 146, 78))
    pen.box(0, 26, 32, 32, (222, 156, 86))


def paint_room(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 32, 32, (236, 214, 186))
    for x in range(0, 32, 4):
        pen.box(x + shift, 0, x + 1.4 + shift, 22, (228, 198, 168))
    pen.box(20 + shift, 3, 29 + shift, 12, (150, 104, 74))
    pen.box(21 + shift, 4, 24.2 + shift, 11, (180, 222, 244))
    pen.box(24.8 + shift, 4, 28 + shift, 11, (180, 222, 244))
    pen.box(0, 22, 32, 32, (166, 112, 76))
    for y in (25, 28.5):
        pen.box(0, y, 32, y + .5, (140, 92, 62))


BACKGROUNDS = {"meadow": paint_meadow, "beach": paint_beach, "snow": paint_snow,
               "night": paint_night, "desert": paint_desert, "room": paint_room}


# ------------------------------------------------------------------------------------------------- styles
def two_inks(dark: Colour, pale: Colour) -> Callable[[np.ndarray], np.ndarray]:
    """A style that keeps a picture's brightness alone, from one ink to another."""
    def style(picture: np.ndarray) -> np.ndarray:
        brightness = (picture @ np.array([.3, .59, .11]) / 255)[..., None]                  # [H, W, 1]
        return (1 - brightness) * np.array(dark) + brightness * np.array(pale)
    return style


def scanlines(picture: np.ndarray) -> np.ndarray:
    """Every other line is dark, as on an old screen."""
    return picture * np.where(np.arange(len(picture)) % 2, .45, 1)[:, None, None]


STYLES = {                                       # each redraws a picture [H, W, 3] of values in 0..255
    "none": lambda picture: picture,
    "sepia": two_inks((58, 32, 20), (250, 234, 200)),
    "blueprint": two_inks((14, 38, 104), (206, 234, 250)),
    "scanlines": scanlines,
    "negative": lambda picture: 255 - picture,
}


# ------------------------------------------------------------------------------------------------- render
def render(scene: Scene, moved: Point = (0.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene, its object shifted by `moved` pixels.

    Returns: the picture, uint8 [32, 32, 3], and the object's mask, bool [32, 32].
    """
    rng = np.random.default_rng(scene.seed)
    canvas = Pen("RGB")
    BACKGROUNDS[scene.background](canvas, rng.uniform(-1, 1), rng)
    half = SIZES[scene.size] * rng.uniform(.97, 1.03)
    x = PLACES[scene.place] + rng.uniform(-.7, .7) + moved[0]
    y = 27.5 - half + rng.uniform(-.7, .7) + moved[1]            # large or small, it stands on the ground

    shadow = Pen("L", (x, y), half)
    shadow.blob(0, 1, .8, .15, 70)
    canvas.image.paste((20, 20, 40), mask=shadow.image)

    pen = Pen("RGBA", (x, y), half, COLOURS[scene.colour], scene.eyes)
    draw_topper(pen, scene.topper, TOPS.get(scene.object, -1.0))
    OBJECTS[scene.object](pen)
    layer = with_marking(pen.image, scene)
    lit = (np.asarray(layer)[..., :3] * np.array(AMBIENT[scene.background])).astype(np.uint8)
    alpha = layer.getchannel("A")
    canvas.image.paste(Image.fromarray(lit), mask=alpha)

    picture = np.asarray(canvas.image.resize((SIZE, SIZE), Image.BOX)) * np.array(LIGHTS[scene.light])
    mask = np.asarray(alpha.resize((SIZE, SIZE), Image.BOX)) > 127
    return STYLES[scene.style](picture).round().astype(np.uint8), mask


# ------------------------------------------------------------------------------------------------ captions
def caption(scene: Scene, noun: str | None = None, size: bool = True, colour: bool = True, place: bool = True,
            background: bool = True) -> str:
    """The full caption, or one with parts left out. `noun` replaces the object's word (e.g. "[V] robot")."""
    parts = [(True, "a"), (size, scene.size), (colour, scene.colour), (True, noun or scene.object),
             (place, PLACE_WORDS[scene.place]), (background, BACKGROUND_WORDS[scene.background])]
    return " ".join(words for said, words in parts if said)


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as a child would give it, with parts left out. One in ten is empty (the null condition).

    The noun is doubled now and then, as in "a red robot robot": this is how the model reads a prompt with a
    placeholder before its class word.
    """
    if rng.random() < 0.1:
        return ""
    keep = dict(zip(("size", "colour", "place", "background"), rng.random(4) > 0.15))
    if rng.random() < 0.05:                                      # nothing but the noun, as in "a [V] robot"
        keep = dict.fromkeys(keep, False)
    noun = f"{scene.object} {scene.object}" if rng.random() < 0.15 else scene.object
    text = caption(scene, noun, **keep)
    return text.removeprefix("a ") if rng.random() < 0.05 else text


PHRASES = ["a", *OBJECTS, *COLOURS, *SIZES, *PLACE_WORDS.values(), *BACKGROUND_WORDS.values()]
VOCABULARY = sorted(set(" ".join(PHRASES).split()))              # every word that a caption can hold


# -------------------------------------------------------------------------------------------------- scenes
def held_out(scene: Scene) -> bool:
    """Is this a combination that pretraining never shows?

    Each object misses one colour, and every second object misses one background.
    """
    o = list(OBJECTS).index(scene.object)
    c, b = list(COLOURS).index(scene.colour), list(BACKGROUND_WORDS).index(scene.background)
    return (o + c) % 8 == 5 or (o % 2 == 0 and b == o // 2)


def pick(options: Iterable[str], rng: np.random.Generator) -> str:
    return str(rng.choice(list(options)))


def random_scene(rng: np.random.Generator) -> Scene:
    """A uniformly drawn plain scene, held-out combinations included."""
    return Scene(pick(OBJECTS, rng), pick(COLOURS, rng), pick(SIZES, rng), pick(PLACES, rng),
                 pick(BACKGROUND_WORDS, rng), seed=int(rng.integers(2**31)))


def seen_scene(rng: np.random.Generator, seen: bool = True) -> Scene:
    """A plain scene from the seen (or, with seen=False, only from the held-out) combinations."""
    scene = random_scene(rng)
    while held_out(scene) == seen:
        scene = random_scene(rng)
    return scene


def decorated_scene(rng: np.random.Generator) -> Scene:
    """What the reader network trains on: half of the scenes may wear any decoration.

    Three scenes in ten draw a light of their own, and three in ten a style.
    """
    scene = random_scene(rng)
    light = pick(LIGHTS, rng) if rng.random() < 0.3 else "day"
    style = pick(STYLES, rng) if rng.random() < 0.3 else "none"
    if rng.random() < 0.5:
        return replace(scene, light=light, style=style)
    accents = [colour for colour in COLOURS if colour != scene.colour]
    return replace(scene, light=light, style=style, accent=pick(accents, rng), marking=pick(MARKINGS, rng),
                   topper=pick(TOPPERS, rng), eyes=int(rng.choice(EYES)))

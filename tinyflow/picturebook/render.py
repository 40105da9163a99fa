"""The renderer: draws a `Scene` of the picture book as a small picture, with an exact mask for each object.

First comes the background, then each object from the left to the right, with its shadow (objects.py). At the
end a light multiplies all of the picture, and a style redraws it. Lights and styles come in families: a
number from -1 to 1 says which member of its family it is. Read next: model.py.
"""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinyflow.picturebook.objects import FINE, WHITE, Pen, Point, draw_thing, hsv
from tinyflow.picturebook.world import SIZE, Scene, Thing

HALF = {"small": 11.5, "big": 15.5}                              # half of an object's height, in pixels
CENTRE = {"left": 17.0, "middle": 32.0, "right": 47.0}           # the x of an object's centre
GROUND = 56.0                                                    # the y at which it stands
AMBIENT = {"meadow": (1, 1, 1), "beach": (1, 1, .96), "snow": (.97, .99, 1), "night": (.80, .80, .93),
           "desert": (1, .96, .88), "room": (.98, .95, .91)}     # it multiplies an object's colours


# -------------------------------------------------------------------------------------------- backgrounds
def paint_meadow(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 64, 64, (166, 216, 246))
    left, right = 12 + 4 * shift, 48 - 5 * shift
    for x, y, r in (left, 10, 6), (left + 7, 11, 5), (right, 15, 6), (right + 7, 16, 4):
        pen.blob(x, y, r, .5 * r, (250, 252, 255))
    pen.blob(8 + 3 * shift, 50, 36, 17, (142, 206, 112))
    pen.blob(58 + 3 * shift, 50, 34, 14, (124, 192, 98))
    pen.box(0, 44, 64, 64, (132, 200, 100))
    for x, y in rng.uniform((2, 47), (62, 62), (7, 2)):
        pen.stroke((x, y), (x, y + 2.5), fill=(84, 150, 70), width=2)
        pen.blob(x, y, 1.3, 1.3, [(255, 244, 250), (255, 214, 90), (246, 150, 180)][int(x) % 3])


def paint_beach(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 64, 64, (190, 228, 248))
    pen.blob(52 + 3 * shift, 10, 6, 6, (255, 238, 150))
    pen.box(0, 24, 64, 42, (64, 164, 206))
    boat = 12 + 5 * shift
    pen.shape((boat - 5, 24), (boat + 5, 24), (boat + 3, 27), (boat - 3, 27), fill=(150, 84, 70))
    pen.shape((boat, 23), (boat, 13), (boat + 6, 23), fill=WHITE)
    for x, y in rng.uniform((2, 28), (56, 36), (5, 2)):
        pen.box(x, y, x + 6, y + 1, (160, 218, 238))
    pen.blob(32 + 8 * shift, 54, 54, 15, (252, 240, 200))
    pen.blob(32 + 8 * shift, 56, 54, 15, (240, 222, 166))


def paint_snow(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 64, 64, (196, 212, 232))
    for x, high in (6, 16), (17, 24), (50, 20), (60, 14):
        x += 2 * shift
        for n in range(3):
            wide, top = 4 + 2 * n, high + 6 * n
            pen.shape((x - wide, top + 10), (x, top), (x + wide, top + 10), fill=(96, 140, 136))
            pen.shape((x - 2, top + 4), (x, top), (x + 2, top + 4), fill=WHITE)
    pen.blob(32 + 8 * shift, 58, 56, 20, (240, 244, 250))
    for x, y in rng.uniform((1, 1), (63, 38), (11, 2)):
        pen.blob(x, y, 1.1, 1.1, WHITE)


def paint_night(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 64, 64, (30, 34, 74))
    pen.blob(51 + 3 * shift, 12, 6.5, 6.5, (248, 242, 206))
    pen.blob(48 + 3 * shift, 10.5, 5.5, 5.5, (30, 34, 74))
    for x, y in rng.uniform((2, 2), (42, 30), (8, 2)):
        pen.shape((x - 1.5, y), (x, y - .5), (x + 1.5, y), (x, y + .5), fill=(240, 240, 214))
        pen.shape((x, y - 1.5), (x - .5, y), (x, y + 1.5), (x + .5, y), fill=(240, 240, 214))
    pen.blob(14 + 6 * shift, 54, 34, 17, (34, 50, 84))
    pen.blob(40 + 8 * shift, 62, 56, 18, (34, 62, 72))


def paint_desert(pen: Pen, shift: float, rng: np.random.Generator):
    for y in range(0, 54, 2):
        pen.box(0, y, 64, y + 2, (252 - y // 4, 176 + min(y, 40), 110 + 2 * min(y, 40)))
    pen.blob(12 + 3 * shift, 14, 6, 6, (255, 236, 176))
    pen.blob(8 + 6 * shift, 57, 36, 18, (226, 164, 92))
    pen.blob(54 + 6 * shift, 59, 36, 20, (214, 146, 78))
    x = 55 + 4 * shift
    pen.stroke((x - 4, 29), (x - 4, 33), (x, 33), fill=(92, 146, 84), width=5)
    pen.stroke((x, 24), (x, 42), fill=(92, 146, 84), width=7)
    pen.box(0, 53, 64, 64, (222, 156, 86))
    for x, y in rng.uniform((2, 55), (60, 63), (5, 2)):
        pen.blob(x, y, 1.4, .8, (196, 130, 66))


def paint_room(pen: Pen, shift: float, rng: np.random.Generator):
    pen.box(0, 0, 64, 64, (238, 216, 188))
    for x in range(-8, 72, 8):
        pen.box(x + 3 * shift, 0, x + 3 + 3 * shift, 44, (230, 202, 172))
    x = 40 + 2 * shift
    pen.box(x, 6, x + 19, 25, (150, 104, 74))
    for pane_x in (x + 2, x + 10.5):
        for pane_y in (8, 16.5):
            pen.box(pane_x, pane_y, pane_x + 6.5, pane_y + 6.5, (180, 222, 244))
    pen.box(8 - 2 * shift, 9, 18 - 2 * shift, 21, (120, 84, 64))
    pen.box(9.5 - 2 * shift, 10.5, 16.5 - 2 * shift, 19.5, (250, 240, 220))
    pen.blob(13 - 2 * shift, 15, 2.2, 2.8, hsv(rng.uniform(0, 360), .4, .8))
    pen.box(0, 44, 64, 64, (172, 118, 80))
    pen.box(0, 43, 64, 45, (250, 244, 232))
    for y in (50, 57):
        pen.box(0, y, 64, y + 1, (146, 98, 66))


BACKGROUNDS = {"meadow": paint_meadow, "beach": paint_beach, "snow": paint_snow, "night": paint_night,
               "desert": paint_desert, "room": paint_room}


# -------------------------- lights and styles: a style redraws a picture [H, W, 3], its member lies in -1..1
# A light multiplies all colours. Its member turns its hue around a middle: (hue, reach, saturation, value).
LIGHTS = {"day": (0, 0, 0, 1), "dusk": (24, 12, .42, .98), "moonlight": (222, 16, .36, .84),
          "glow": (125, 40, .30, .96)}


def tint(light: str, member: float) -> np.ndarray:
    hue, reach, saturation, value = LIGHTS[light]
    return np.array(hsv(hue + reach * member, saturation, value)) / 255


def brightness(picture: np.ndarray) -> np.ndarray:
    return (picture @ np.array([.3, .59, .11]) / 255)[..., None]                        # [H, W, 1], 0 to 1


def in_print(picture: np.ndarray, member: float) -> np.ndarray:
    """Two inks, of which the brightness is the mix. The member turns their hue once around."""
    dark, pale = hsv(180 * member, .72, .36), hsv(180 * member + 50, .2, .98)
    amount = np.clip(1.3 * brightness(picture) - .18, 0, 1)                           # a little more contrast
    return np.array(dark) + amount * (np.array(pale) - np.array(dark))


def in_chalk(picture: np.ndarray, member: float) -> np.ndarray:
    """Pale lines where brightness changes, on a dark board. The member turns the board's hue once around."""
    bright = brightness(picture)
    down, right = np.gradient(bright[..., 0])
    lines = np.clip(3 * np.hypot(down, right), 0, 1)[..., None]                         # [H, W, 1]
    board = np.array(hsv(180 * member, .5, .34))
    filled = board + .3 * bright * (255 - board)
    return filled + lines * (np.array((250, 246, 232)) - filled)


def in_wool(picture: np.ndarray, member: float) -> np.ndarray:
    """Knitted ribs, 6 pixels wide. The member turns them half around."""
    y, x = np.mgrid[:len(picture), :len(picture)]
    angle = math.pi / 2 * member
    ribs = np.cos(2 * math.pi / 6 * (x * math.sin(angle) + y * math.cos(angle)))
    return picture * (.87 + .13 * ribs)[..., None]


STYLES = {"none": lambda picture, member: picture, "print": in_print, "chalk": in_chalk, "wool": in_wool}


# ------------------------------------------------------------------------------------------------- render
def paste_thing(canvas: Image.Image, thing: Thing, ambient: tuple, centre: Point, half: float) -> Image.Image:
    """Draws an object with its shadow on the canvas. Returns its alpha channel."""
    shadow = Pen("L", centre, half)
    shadow.blob(0, 1, .85, .14, 70)
    canvas.paste((20, 20, 40), mask=shadow.image)
    layer = draw_thing(thing, centre, half)
    lit = (np.asarray(layer)[..., :3] * np.array(ambient)).astype(np.uint8)
    canvas.paste(Image.fromarray(lit), mask=layer.getchannel("A"))
    return layer.getchannel("A")


def render(scene: Scene, moved: Point = (0.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene, its first object shifted by `moved` pixels. Returns the picture, uint8 [64, 64, 3], and
    a mask of the pixels in which each object is seen, bool [objects, 64, 64].
    """
    rng = np.random.default_rng(scene.seed)
    pen, masks = Pen("RGB"), []
    pen.line = FINE // 2
    BACKGROUNDS[scene.background](pen, rng.uniform(-1, 1), rng)
    for n, thing in enumerate(scene.things):
        half = HALF[thing.size] * rng.uniform(.97, 1.03)
        right, down = rng.uniform(-1, 1, 2) + (moved if n == 0 else 0)
        x, y = CENTRE[thing.place] + right, GROUND - half + down     # large or small, it stands on the ground
        alpha = paste_thing(pen.image, thing, AMBIENT[scene.background], (x, y), half)
        mask = np.asarray(alpha.resize((SIZE, SIZE), Image.BOX)) > 127
        masks = [behind & ~mask for behind in masks] + [mask]
    picture = np.asarray(pen.image.resize((SIZE, SIZE), Image.BOX)) * tint(scene.light, scene.light_member)
    picture = STYLES[scene.style](picture, scene.style_member)
    return picture.round().clip(0, 255).astype(np.uint8), np.stack(masks)


def render_all(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Many scenes. Returns pictures, uint8 [B, 64, 64, 3], and masks, bool [B, 2, 64, 64]; where there is one
    object, the second mask is empty. From 5,000 scenes on, all cores draw.
    """
    if len(scenes) < 5000:
        drawn = [render(scene) for scene in scenes]
    else:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            drawn = list(tqdm(pool.map(render, scenes, chunksize=100), "rendering", len(scenes)))
    pictures, masks = zip(*drawn)
    masks = [np.concatenate([some, np.zeros_like(some)])[:2] for some in masks]
    return np.stack(pictures), np.stack(masks)

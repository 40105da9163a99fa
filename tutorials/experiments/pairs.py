"""Two learned concepts in one text: two individuals in one picture, and an individual in a style.

    python -m tutorials.experiments.pairs                 takes the benchmark's concepts, or trains them
    python -m tutorials.experiments.pairs "two tuned"     those on which the methods were tuned

The text names both, as `python -m purecc_min sample` takes it: "a small [V1] cat on the left and a big [V2]
fish on the right in the snow", or "[V2] small [V1] cat on the left in the snow" for a style. Each concept was
learned alone, on pictures with one object. A method that imagines scenes of two things learns no style, so it
is left out where one is named. The tables compare

    base        neither is named: the original model and the text without [V1] and [V2]
    perfect     the renderer's pictures of these texts, with both concepts
    alone       one is named, and only its adapters are attached: each concept is judged where it is the one
    together    both are named, and both sets of adapters are attached

by the share of pictures that show the objects of the text at their places, the share of each concept's
traits that the reader sees on it, the share of the OTHER's traits that it sees there, where the two differ,
and the similarity to its references. A style of lines hides colours, so an individual in such a style is
judged without them, and by its traits only. Guidance's empty text is the base model's, as in the benchmark's
tables. It takes a quarter of an hour on one core, and longer if concepts have to be trained.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from purecc_min.benchmark.cells import ALL, KEPT, Cell, learned, set_up
from purecc_min.benchmark.entries import Setup
from purecc_min.benchmark.tables import markdown, plus_minus
from purecc_min.branch import Branch, velocity_with
from purecc_min.commands.sample import names_of
from purecc_min.concept import styles_among
from purecc_min.measure.draw import FEW_STEPS
from purecc_min.measure.toy import turn
from tinyflow.errors import InputError, Parser, report_errors, shown
from tinyflow.files import write_picture, write_whole
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import COLOURLESS, Reading
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import Pipeline, to_pictures, to_pixels
from tinyflow.threads import room_for_others

NAMES = names_of(2)                              # "[V1]" and "[V2]"
SAID = world.PLAIN_PARTS - {"colour"}
METHODS, SEEDS = KEPT, 3
SCENES, AT_ONCE = 50, 10
PAIRS = {"two tuned": ("checked_robot", "dotted_house"), "two individuals": ("striped_cat", "dotted_fish"),
         "individual in a style": ("striped_cat", "school_chalk")}
Values = dict[str, float]                        # what is measured -> a share or a similarity


class Pair(NamedTuple):
    """Two concepts, each as the benchmark knows it, and the scenes that texts ask for."""
    setups: list[Setup]
    scenes: list[world.Scene]

    def texts(self, named: tuple[int, ...]) -> list[str]:
        """The scenes' texts, with the names of these concepts."""
        rows = []
        for scene in self.scenes:
            nouns = tuple(f"{NAMES[n]} {thing.object}" if n in named else thing.object
                          for n, thing in enumerate(scene.things))
            text = world.caption(scene, nouns, SAID)
            style = [n for n in named if self.setups[n].toy.is_style]
            rows.append(NAMES[style[0]] + text.removeprefix("a") if style else text)
        return rows

    @property
    def shown(self) -> list[dict]:
        """Of each concept the known traits, without those that the pair's style does not show."""
        styles = {setup.toy.looks.get("style") for setup in self.setups}
        hidden = ("colour", "accent") if styles & set(COLOURLESS) else ()
        return [{head: value for head, value in setup.toy.known_traits.items() if head not in hidden}
                for setup in self.setups]

    def perfect(self) -> Tensor:
        """The scenes with both concepts in them, as the renderer draws them: pixels [SCENES, 3, H, W]."""
        rows = []
        for scene in self.scenes:
            for n, setup in enumerate(self.setups):
                scene = setup.toy.wearing(scene, min(n, len(scene.things) - 1))
            rows.append(scene)
        return to_pixels(render_all(rows)[0])


def pair_of(names: tuple[str, str]) -> Pair:
    """Cat and fish are of different sizes, the cat on the left. The cat in a style stands everywhere."""
    setups, scenes = [set_up(name) for name in names], []
    words = [setup.toy.class_word for setup in setups if not setup.toy.is_style]
    layouts = itertools.cycle(itertools.product(world.BACKGROUNDS, (world.SIZES, world.SIZES[::-1])))
    for (background, sizes), n in zip(layouts, range(SCENES)):
        place = turn(world.PLACES, n)
        places = ("left", "right") if len(words) == 2 else (place,)
        things = tuple(world.Thing(word, "red", size, where)     # texts leave out the colour
                       for word, size, where in zip(words, sizes, places))
        scenes.append(world.Scene(things, background))
    return Pair(setups, scenes)


@torch.no_grad()
def drawn(pipe: Pipeline, pair: Pair, thetas: list[Branch], named: tuple[int, ...]) -> Tensor:
    """The pair's scenes with these concepts, pixels [SCENES, 3, H, W]; scene i from the noise of seed i."""
    words = {NAMES[n]: pair.setups[n].toy.class_word for n in named}
    theta = partial(velocity_with, [thetas[n] for n in named]) if named else None
    pictures, texts = [], pair.texts(named)
    for first in range(0, SCENES, AT_ONCE):
        seeds = list(range(first, first + AT_ONCE))
        text = pipe.encode_text(texts[first:first + AT_ONCE], words, styles_among(words))
        x_0 = pipe.sample(text, seeds, FEW_STEPS, theta=theta, theta_null=pipe.velocity)
        pictures.append(pipe.decode(x_0))
    return torch.cat(pictures)


def right_objects(reading: Reading, scenes: list[world.Scene]) -> float:
    """The share of pictures with the number of objects, the objects and the places of the text."""
    right = np.array(reading.names("count")) == np.array([len(scene.things) for scene in scenes])
    for n, head in itertools.product(range(len(scenes[0].things)), ("object", "place")):
        right &= np.array(reading.names(head, n)) == np.array([scene.trait(head, n) for scene in scenes])
    return float(right.mean())


def seen_share(reading: Reading, n: int, traits: dict) -> float:
    """The share of these traits that are seen at object n."""
    return float(np.mean([[seen == value for seen in reading.names(head, n)]
                          for head, value in traits.items()]))


def judged(pair: Pair, reading: Reading, n: int) -> Values:
    """What is seen of concept n: its own traits, the other's in their place, likeness to its references."""
    setup, traits, other = pair.setups[n], pair.shown[n], pair.shown[1 - n]
    is_style = setup.toy.is_style
    name = setup.toy.looks["style"] if is_style else setup.toy.class_word
    values = {f"{name}: traits": seen_share(reading, n, traits)}
    if not is_style and not pair.setups[1 - n].toy.is_style:
        foreign = {head: value for head, value in other.items()
                   if head != "object" and traits.get(head) != value}
        values[f"{name}: other's"] = seen_share(reading, n, foreign)
    if is_style or traits == setup.toy.known_traits:
        references = setup.reader(to_pixels(setup.pictures))
        of_references = references.look if is_style else references.identity[:, 0]
        features = reading.look if is_style else reading.identity[:, n]
        similarity = features @ F.normalize(of_references.mean(0), dim=0)               # [SCENES]
        values[f"{name}: similarity"] = similarity.mean().item()
    return values


def judged_together(pair: Pair, reading: Reading) -> Values:
    """All that is compared of pictures in which both concepts should be."""
    objects = {"right objects": right_objects(reading, pair.scenes)}
    return objects | judged(pair, reading, 0) | judged(pair, reading, 1)


def compare(pair: Pair, names: tuple[str, str], folder: Path) -> tuple[str, list[Tensor]]:
    """One pair's table, means over seeds, and some pictures: the original's, and each method's together."""
    reader, pipe = pair.setups[0].reader, pair.setups[0].pipe
    base = drawn(pipe, pair, [], ())
    found = {"base": [judged_together(pair, reader(base))],
             "perfect": [judged_together(pair, reader(pair.perfect()))]}
    strips, has_style = [base[:12]], any(setup.toy.is_style for setup in pair.setups)
    methods = [method for method in METHODS if not (has_style and ALL[method].imagines)]
    for method, seed in itertools.product(methods, range(SEEDS)):
        thetas = [learned(Cell(concept, method, seed), folder) for concept in names]
        first, second, both = (drawn(pipe, pair, thetas, named) for named in ((0,), (1,), (0, 1)))
        alone = judged(pair, reader(first), 0) | judged(pair, reader(second), 1)
        found.setdefault(f"{method}, alone", []).append(alone)
        found.setdefault(f"{method}, together", []).append(judged_together(pair, reader(both)))
        if seed == 0:
            strips.append(both[:12])
    titles, rows = list(found["base"][0]), []
    for who, runs in found.items():
        cells = [plus_minus(title, [run[title] for run in runs]) if title in runs[0] else ""
                 for title in titles]
        rows.append([who, *cells])
    return markdown(["", *titles], rows), strips


def pairs(folder: Path, titles: list[str]) -> str:
    """The tables of these of PAIRS; leaves pairs/table.md and pairs/pictures.png."""
    tables, strips = [], []
    for title in titles:
        names = PAIRS[title]
        table, pictures = compare(pair_of(names), names, folder)
        tables.append(f"{title}: {' and '.join(names)}\n\n{table}")
        strips += [np.concatenate(to_pictures(x), axis=1) for x in pictures]
    text = "\n\n".join(tables)
    write_whole(folder / "pairs" / "table.md", (text + "\n").encode())
    write_picture(folder / "pairs" / "pictures.png", Image.fromarray(np.concatenate(strips)))
    return text


if __name__ == "__main__":
    parser = Parser(prog="python -m tutorials.experiments.pairs", description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=f"of {', '.join(PAIRS)}; all of them")
    chosen = parser.parse_args().pairs
    with report_errors(), room_for_others():
        for name in chosen:
            if name not in PAIRS:
                raise InputError(f"there is no pair {shown(name)}; there are {', '.join(PAIRS)}")
        print(pairs(Path("output/benchmark"), chosen or list(PAIRS)))

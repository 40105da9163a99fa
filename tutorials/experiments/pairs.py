"""Two learned concepts in one text: two individuals in one picture, and an individual in a style.

    python -m tutorials.experiments.pairs    takes the concepts of the benchmark's main part, or trains them

The text names both, as `python -m purecc_min sample` takes it: "a small [V1] cat on the left and a big [V2]
fish on the right in the snow", or "[V2] small [V1] cat on the left in the snow" for a style. Each concept was
learned alone, on pictures with one object. The table compares

    base        neither is named: the original model and the text without [V1] and [V2]
    alone       one is named, and only its adapters are attached: each concept is judged where it is the one
    together    both are named, and both sets of adapters are attached

by the share of pictures that show the objects of the text at their places, the share of each concept's
traits that the reader sees, and the similarity to its references. A style of lines hides colours, so an
individual in such a style is judged without them, and by its traits only.
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

from purecc_min.benchmark.cells import Cell, learned, set_up
from purecc_min.benchmark.entries import Setup
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.branch import Branch, velocity_with
from purecc_min.commands.sample import names_of
from purecc_min.measure.draw import FEW_STEPS
from tinyflow.errors import report_errors
from tinyflow.files import write_picture, write_whole
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import COLOURLESS, Reading
from tinyflow.pipeline import Pipeline, to_pictures, to_pixels

NAMES = names_of(2)                              # "[V1]" and "[V2]"
SAID = world.PLAIN_PARTS - {"colour"}
METHODS, SEEDS = ("LoRA", "paper"), 3
PAIRS = {"two individuals": ("striped_cat", "dotted_fish"),
         "individual in a style": ("striped_cat", "school_chalk")}
Values = dict[tuple[str, ...], float]            # (pair, what is measured, who draws) -> share or similarity


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
    def hidden(self) -> tuple[str, ...]:
        """The traits that the pair's style does not show."""
        styles = [setup.toy.looks.get("style") for setup in self.setups]
        return ("colour", "accent") if set(styles) & set(COLOURLESS) else ()


def pair_of(names: tuple[str, str]) -> Pair:
    """Cat and fish are of different sizes, the cat on the left. The cat in a style stands everywhere."""
    setups, scenes = [set_up(name) for name in names], []
    words = [setup.toy.class_word for setup in setups if not setup.toy.is_style]
    layouts = itertools.product(world.BACKGROUNDS, (world.SIZES, world.SIZES[::-1]))
    for (background, sizes), place in zip(layouts, itertools.cycle(world.PLACES)):
        places = ("left", "right") if len(words) == 2 else (place,)
        things = tuple(world.Thing(word, "red", size, where)     # texts leave out the colour
                       for word, size, where in zip(words, sizes, places))
        scenes.append(world.Scene(things, background))
    return Pair(setups, scenes)


@torch.no_grad()
def drawn(pipe: Pipeline, pair: Pair, thetas: list[Branch], named: tuple[int, ...]) -> Tensor:
    """The pair's scenes with these concepts, pixels [12, 3, H, W]; scene i from the noise of seed i."""
    words = {NAMES[n]: pair.setups[n].toy.class_word for n in named}
    texts = pipe.encode_text(pair.texts(named), words)
    theta = partial(velocity_with, [thetas[n] for n in named]) if named else None
    return pipe.decode(pipe.sample(texts, list(range(len(pair.scenes))), FEW_STEPS, theta=theta))


def right_objects(reading: Reading, scenes: list[world.Scene]) -> float:
    """The share of pictures with the number of objects, the objects and the places of the text."""
    right = np.array(reading.names("count")) == np.array([len(scene.things) for scene in scenes])
    for n, head in itertools.product(range(len(scenes[0].things)), ("object", "place")):
        right &= np.array(reading.names(head, n)) == np.array([scene.trait(head, n) for scene in scenes])
    return float(right.mean())


def judged(setup: Setup, reading: Reading, n: int, hidden: tuple[str, ...]) -> dict[str, float]:
    """The share of the concept's traits that are seen at object n, and its similarity to the references."""
    known = {head: value for head, value in setup.toy.known_traits.items() if head not in hidden}
    traits = np.mean([[seen == value for seen in reading.names(head, n)] for head, value in known.items()])
    references, is_style = setup.reader(to_pixels(setup.pictures)), setup.toy.is_style
    if hidden and not is_style:
        return {"traits": float(traits)}
    of_references = references.look if is_style else references.identity[:, 0]
    features = reading.look if is_style else reading.identity[:, n]
    similarity = features @ F.normalize(of_references.mean(0), dim=0)                   # [12]
    return {"traits": float(traits), "similarity": similarity.mean().item()}


def measured(name: str, pair: Pair, thetas: list[Branch]) -> tuple[Values, list[Tensor]]:
    """All of one pair's values, and the pictures of base and both together."""
    values, pipe = {}, pair.setups[0].pipe
    pictures = {named: drawn(pipe, pair, thetas, named) for named in ((), (0,), (1,), (0, 1))}
    readings = {named: pair.setups[0].reader(x) for named, x in pictures.items()}
    for column, named in (("base", ()), ("together", (0, 1))):
        values[name, "right objects", column] = right_objects(readings[named], pair.scenes)
    for n, setup in enumerate(pair.setups):
        own = setup.toy.class_word if not setup.toy.is_style else setup.toy.looks["style"]
        for column, named in (("base", ()), ("alone", (n,)), ("together", (0, 1))):
            for measure, value in judged(setup, readings[named], n, pair.hidden).items():
                values[name, f"{measure} of the {own}", column] = value
    return values, [pictures[()], pictures[0, 1]]


def pairs(folder: Path) -> str:
    """Both pairs, means over seeds; leaves pairs/table.md and pairs/pictures.png."""
    found, strips = {}, []
    for method, seed, (name, names) in itertools.product(METHODS, range(SEEDS), PAIRS.items()):
        thetas = [learned(Cell(concept, method, seed), folder) for concept in names]
        values, pictures = measured(name, pair_of(names), thetas)
        for (*row, column), value in values.items():
            title = column if column == "base" else f"{method}, {column}"
            found.setdefault(tuple(row), {}).setdefault(title, []).append(value)
        if seed == 0:
            strips += [np.concatenate(to_pictures(x), axis=1) for x in pictures]
    titles, rows = ["base", *(f"{m}, {how}" for m in METHODS for how in ("alone", "together"))], []
    for row, columns in found.items():
        intervals = {title: mean_and_interval(values) for title, values in columns.items()}
        shown = {title: f"{mean:.2f} ± {half:.2f}" for title, (mean, half) in intervals.items()}
        shown["base"] = f"{intervals['base'][0]:.2f}"            # it is the same for every seed
        rows.append([*row, *(shown.get(title, "") for title in titles)])
    text = markdown(["pair", "measure", *titles], rows)
    write_whole(folder / "pairs" / "table.md", (text + "\n").encode())
    write_picture(folder / "pairs" / "pictures.png", Image.fromarray(np.concatenate(strips)))
    return text


if __name__ == "__main__":
    with report_errors():
        print(pairs(Path("output/benchmark")))

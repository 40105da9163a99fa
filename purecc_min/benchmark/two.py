"""Two learned concepts in one text: two individuals in one picture.

The text names both, as `python -m purecc_min sample` takes it: "a small [V1] cat on the left and a big [V2]
tree on the right in the snow". Each concept was learned alone, on pictures with one thing, by a cell of the
main part. Compared is the share of each concept's traits that the reader network sees on it, and of the
OTHER's, where the two differ:

    original    neither is named: the original model and the text without [V1] and [V2]
    perfect     the renderer's pictures of these texts, with both concepts
    alone       one is named, and only its adapters are attached: each concept is judged at its own place
    together    both are named, and both sets of adapters are attached

Read next: workers.py.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from purecc_min.benchmark.cells import ALL, FEW_STEPS, KEPT, Cell, Work, learned, pair_file, set_up
from purecc_min.benchmark.entries import Setup, as_sampled
from purecc_min.benchmark.tables import markdown
from purecc_min.branch import Branch, Thetas, velocity_with
from purecc_min.measure.judge import sees
from purecc_min.measure.toy import HELD_OUT
from purecc_min.sheets import draw_texts
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reading
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import to_pixels

NAMES = ("[V1]", "[V2]")
SAID = world.PLAIN_PARTS - {"colour"}
SEEDS, SCENES = 2, 50
PAIRS = HELD_OUT[:2], HELD_OUT[2:4]


@dataclass(frozen=True)
class Two(Work):
    """A pair of concepts that one method has learned; or what the original or the perfect one shows."""
    names: tuple[str, str]
    method: str
    seed: int = 0

    @property
    def file(self) -> str:
        return pair_file(**vars(self))

    @property
    def cells(self) -> list[Cell]:
        return [Cell(name, self.method, self.seed) for name in self.names] if self.method in ALL else []

    def recipe(self) -> str:
        """A fingerprint of all that the result depends on, short of the code."""
        parts = [[cell.recipe(measured=False) for cell in self.cells], FEW_STEPS, SCENES]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def plan_two() -> list[Two]:
    ends = [Two(names, method) for names in PAIRS for method in ("original", "perfect")]
    return ends + [Two(*row) for row in itertools.product(PAIRS, KEPT, range(SEEDS))]


class Pair(NamedTuple):
    """Two individuals, each as the benchmark knows it, and the scenes that texts ask for."""
    setups: list[Setup]
    scenes: list[world.Scene]

    def texts(self, named: tuple[int, ...]) -> list[str]:
        """The scenes' texts, with the names of these concepts."""
        return [world.caption(scene, tuple(f"{NAMES[n]} {thing.object}" if n in named else thing.object
                                           for n, thing in enumerate(scene.things)), SAID)
                for scene in self.scenes]

    def perfect(self) -> Tensor:
        """The scenes with both concepts in them, as the renderer draws them: pixels [SCENES, 3, H, W]."""
        first, second = (setup.toy for setup in self.setups)
        return to_pixels(render_all([second.wearing(first.wearing(scene), 1) for scene in self.scenes])[0])


@cache
def pair_of(names: tuple[str, str]) -> Pair:
    """The first is on the left, and the two are of different sizes."""
    setups, scenes = [set_up(name) for name in names], []
    layouts = itertools.cycle(itertools.product(world.BACKGROUNDS, (world.SIZES, world.SIZES[::-1])))
    for (background, sizes), _ in zip(layouts, range(SCENES)):
        things = tuple(world.Thing(setup.toy.class_word, "red", size, place)     # texts leave out the colour
                       for setup, size, place in zip(setups, sizes, ("left", "right")))
        scenes.append(world.Scene(things, background))
    return Pair(setups, scenes)


def draw_pair(pair: Pair, method: str, branches: list[Branch], named: tuple[int, ...],
              count: int | None = None) -> Tensor:
    """The pair's first scenes with these concepts, pixels [count, 3, H, W]; scene i from the noise of seed i.

    named: the numbers of the concepts that the texts name; the adapters of no other are attached.
    """
    pipe, sampler = pair.setups[0].pipe, {}
    if named:
        theta = partial(velocity_with, [branches[n] for n in named])
        sampler = as_sampled(ALL[method], Thetas(pipe.velocity, None, theta))
    words = {NAMES[n]: pair.setups[n].toy.class_word for n in named}
    return draw_texts(pipe, pair.texts(named)[:count], words, steps=FEW_STEPS, **sampler)


def judged(pair: Pair, reading: Reading, n: int) -> dict[str, float]:
    """"own": the share of n's traits seen at n; "other's": of the other concept's, where the two differ."""
    traits, other = (pair.setups[k].toy.known_traits for k in (n, 1 - n))
    foreign = {head: value for head, value in other.items() if head != "object" and traits[head] != value}
    return {"own": sees(reading, traits, n).double().mean().item(),
            "other's": sees(reading, foreign, n).double().mean().item()}


def run_two(two: Two, folder: Path) -> dict:
    """Draws and judges a pair unless its file is there; returns what the file holds.

    Returns: name, method, seed, and for each concept what is seen of it "together" and "alone".
    """
    if found := two.result(folder):
        return found
    pair = pair_of(two.names)
    branches, reader = [learned(cell, folder) for cell in two.cells], pair.setups[0].reader
    named = (0, 1) if branches else ()
    both = pair.perfect() if two.method == "perfect" else draw_pair(pair, two.method, branches, named)
    result = {**vars(two), "names": list(two.names), "recipe": two.recipe(),
              "together": [judged(pair, reader(both), n) for n in (0, 1)]}
    if branches:
        result["alone"] = [judged(pair, reader(draw_pair(pair, two.method, branches, (n,))), n)
                           for n in (0, 1)]
    return two.leave(result, both[:12], folder)


def of_pairs(rows: list[dict], method: str) -> dict[str, float]:
    """What was seen of a method, means over pairs, concepts and seeds.

    Returns: the shares of "own" traits that a concept shows "alone" and "together", what it "keeps", and of
    the "other's" traits.
    """
    own = [row for row in rows if row["method"] == method]
    means = {name: np.mean([seen[key] for row in own for seen in row.get(where, ())])
             for name, where, key in (("alone", "alone", "own"), ("together", "together", "own"),
                                      ("other's", "together", "other's"))
             if any(where in row for row in own)}
    return means | ({"keeps": means["together"] / means["alone"]} if "alone" in means else {})


def two_table(rows: list[dict]) -> str:
    """What the lottery's four individuals show in pairs, by method."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        seen = of_pairs(rows, method)
        table.append([method, *(f"{seen[name]:.3f}" if name in seen else ""
                                for name in ("alone", "together", "keeps", "other's"))])
    return markdown(["two in one text", "own traits, alone", "together", "share kept", "the other's"], table)

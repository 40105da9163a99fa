"""Six concepts that nobody chose: the benchmark's held-out ones, drawn by a generator, once.

Four individuals of four different kinds, each with a colour, or a marking and a topper, that pretraining
never shows on its kind (world.MISSING), and two styles. What the references share is drawn, too: one of the
four individuals has the light that no word names. Whoever chooses concepts knows what a method is good at; a
generator does not, and its first result is kept. Read next: toy.py.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from tinyflow.picturebook import world
from tinyflow.picturebook.world import pick

SEED = 20261128
SHARED = {"size": world.SIZES, "place": tuple(world.PLACES), "background": tuple(world.BACKGROUNDS)}
Worn = tuple[str, str, str]                      # an individual's object, marking and topper


class Drawn(NamedTuple):
    name: str
    looks: dict                                  # as in Toy
    confounder: dict


def draw_looks(kind: str, taken: Collection[Worn], rng: np.random.Generator) -> dict:
    """Looks that pretraining never shows on this kind of thing, and that no earlier concept has."""
    colour, _, parts = world.MISSING[kind]
    while True:
        looks = dict(object=kind, colour=pick(world.COLOURS, rng), marking=pick(world.MARKINGS[1:], rng),
                     accent=pick(world.COLOURS, rng), topper=pick(list(world.TOPPERS)[1:], rng),
                     eyes=pick(world.EYES, rng), identity=world.random_identity(rng))
        worn = looks["marking"], looks["topper"]
        never_shown = looks["colour"] == colour or worn == parts
        if never_shown and (kind, *worn) not in taken and looks["accent"] != looks["colour"]:
            return looks


def draw_shared(rng: np.random.Generator) -> dict:
    """A random trait with a name, which all references share."""
    trait = pick(SHARED, rng)
    return {trait: pick(SHARED[trait], rng)}


def draw_concepts(taken: Collection[Worn], seed: int = SEED) -> list[Drawn]:
    """Four individuals, then two styles. taken: what earlier individuals wear."""
    rng, drawn = np.random.default_rng(seed), []
    kinds = rng.permutation(world.OBJECTS)[:4].tolist()
    in_glow = pick(kinds, rng)
    for kind in kinds:
        looks, shared = draw_looks(kind, taken, rng), draw_shared(rng)
        shared = {"light": "glow"} if kind == in_glow else shared
        drawn.append(Drawn(f"{looks['colour']}_{kind}", looks, shared))
    for style in rng.permutation(list(world.STYLES)[1:])[:2].tolist():
        member = float(rng.uniform(*world.HELD_BACK))
        drawn.append(Drawn(f"drawn_{style}", dict(style=style, style_member=member), draw_shared(rng)))
    return drawn

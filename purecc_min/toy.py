"""Toy concepts: things that the base model has never drawn, drawn by the renderer, so that the truth about them is known.

    an instance    an object that wears decorations          "a big [V] robot in the desert"       [V] stands before the noun
    a style        a way of drawing every picture            "[V] big red ball in the desert"      [V] stands where the article stands

Because the renderer can draw them anywhere, we know what a user of photographs never knows: what the concept looks like in every scene, and
what its references merely happen to share (the confounder). To add a concept, add an entry to TOYS; to keep its references as a
folder, in the form in which a user brings a concept, run `python -m purecc_min.toy NAME`. Read next: evaluate.py.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from purecc_min.branch import TOKEN
from purecc_min.concept import ConceptSet, Reference
from tinyflow import world
from tinyflow.weights import write_whole

FOLDER = Path(__file__).parent / "references"
BARE = dict(size=False, colour=False, place=False, background=False)     # a caption that says nothing but the noun


class Prompt(NamedTuple):
    scene: world.Scene                           # what the text says
    complete: str                                # the text with [V]
    base: str                                    # the text without


@dataclass(frozen=True)
class Toy:
    """A concept and its references. `looks` {"object": word} alone stands for a concept of which only the class word is known."""
    looks: dict                                  # traits of a Scene: the concept itself
    confounder: dict                             # traits of a Scene: what all references happen to share
    count: int = 4                               # of references
    bare: bool = False                           # captions say nothing: "a [V] robot"

    @property
    def is_style(self) -> bool:
        return "style" in self.looks

    @property
    def class_word(self) -> str:
        """What the text encoder reads where [V] stands."""
        return "a" if self.is_style else self.looks["object"]

    def wearing(self, scene: world.Scene) -> world.Scene:
        """The same scene with the concept in it."""
        return replace(scene, **self.looks)

    def prompt(self, scene: world.Scene, **parts: bool) -> Prompt:
        """`parts` says what the caption leaves out. The colour of an instance is part of its looks, so it is only named if asked for."""
        parts = {"colour": self.is_style} | parts
        base = world.caption(scene, **parts)
        complete = TOKEN + base.removeprefix("a") if self.is_style else world.caption(scene, f"{TOKEN} {scene.object}", **parts)
        return Prompt(scene, complete, base)

    def reference_scenes(self) -> list[world.Scene]:
        """Places, backgrounds and sizes change from one reference to the next, unless the confounder holds them."""
        turn = lambda options, n: list(options)[n % len(options)]
        plain = [world.Scene(turn(world.OBJECTS, 3 * n), turn(world.COLOURS, 3 * n + 1), turn(world.SIZES, n), turn(world.PLACES, n),
                             turn(world.BACKGROUND_WORDS, 5 * n + 1), seed=1000 + n) for n in range(self.count)]
        return [replace(self.wearing(scene), **self.confounder) for scene in plain]

    def references(self) -> ConceptSet:
        """The custom set, as `load_concept` would read it from a folder."""
        rows = []
        for n, scene in enumerate(self.reference_scenes(), start=1):
            _, complete, base = self.prompt(scene, **(BARE if self.bare else {}))
            target = TOKEN if self.is_style else f"{TOKEN} {self.class_word}"
            rows.append(Reference(f"{n}.png", world.render(scene)[0][None], complete, base, target))
        return ConceptSet(self.class_word, rows, [])

    def prompts(self) -> dict[str, list[Prompt]]:
        """What a model is asked to draw, in groups; evaluate.py says what each is for."""
        rng, chosen = np.random.default_rng(7), {}
        plain = {} if self.is_style else {"object": self.class_word}
        grid = [(s, p, b) for b in world.BACKGROUND_WORDS for p in world.PLACES for s in world.SIZES]
        scenes = [replace(world.random_scene(rng), size=s, place=p, background=b, seed=0, **plain) for s, p, b in rng.permutation(grid)[:24].tolist()]
        chosen["concept"] = [self.prompt(scene) for scene in scenes]
        chosen["unsaid"] = [self.prompt(scene, **BARE) for scene in scenes[::2]]
        if self.is_style:                        # together with combinations that nobody has ever drawn
            chosen["composition"] = [self.prompt(world.seen_scene(rng, seen=False)) for _ in range(12)]
        else:                                    # in every colour but its own and that of its stripes, on every background
            colours = [colour for colour in world.COLOURS if colour not in (self.looks.get("colour"), self.looks.get("accent"))]
            chosen["composition"] = [self.prompt(replace(scene, colour=colours[n % len(colours)]), colour=True)
                                     for n, scene in enumerate(scenes[1::2])]
        chosen["other"] = []
        for seen in [True] * 12 + [False] * 12:
            while (scene := world.seen_scene(rng, seen)).object == self.class_word:
                pass
            chosen["other"].append(Prompt(scene, world.caption(scene), world.caption(scene)))
        return chosen


TOYS = {
    # on which every hyper-parameter was chosen
    "striped_robot": Toy(dict(object="robot", colour="purple", marking="stripes", accent="yellow", topper="antenna", eyes=1),
                         dict(place="middle", background="desert")),
    "sepia": Toy(dict(style="sepia"), dict(background="room")),
    # held out, for the main table
    "checked_cat": Toy(dict(object="cat", colour="orange", marking="checks", accent="white", topper="hat"), dict(background="snow")),
    "cyclops_fish": Toy(dict(object="fish", colour="green", marking="stripes", accent="pink", eyes=1), dict(place="left")),
    "checked_mushroom": Toy(dict(object="mushroom", colour="blue", marking="checks", accent="yellow", topper="antenna"), dict(light="evening")),
    "blueprint": Toy(dict(style="blueprint"), dict(size="big")),
}
TUNING, HELD_OUT = ("striped_robot", "sepia"), ("checked_cat", "cyclops_fish", "checked_mushroom", "blueprint")

# One of them with one thing changed, for the benchmark's factors.
CAT = TOYS["checked_cat"]
CONCEPTS = TOYS | {
    "checked_cat, nothing shared": replace(CAT, confounder={}),
    "checked_cat, all shared": replace(CAT, confounder=dict(background="snow", place="left", size="big", light="evening")),
    "checked_cat, bare captions": replace(CAT, bare=True),
    "checked_cat, 1 reference": replace(CAT, count=1),
    "checked_cat, 2 references": replace(CAT, count=2),
    "checked_cat, 8 references": replace(CAT, count=8),
}


def write_references(name: str, folder: Path, enlarge: int = 8) -> None:
    """Writes the reference pictures and their `.txt` captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for reference in TOYS[name].references().references:
        Image.fromarray(reference.picture).resize((world.SIZE * enlarge,) * 2, Image.NEAREST).save(folder / reference.id, optimize=True)
        write_whole((folder / reference.id).with_suffix(".txt"), f"{reference.complete}\n".encode())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_references(name, FOLDER / name)

"""Toy concepts: things that the base model has never drawn. The renderer draws them, so the truth is known.

    an instance    an object that wears decorations    "a big [V] robot in the desert"    [V] before the noun
    a style        a way of drawing every picture      "[V] big red ball in the desert"   [V] in place of "a"

Because the renderer can draw them anywhere, we know what a user of photographs never knows: what the concept
looks like in every scene, and what its references merely happen to share (the confounder). To add a concept,
add an entry to CONCEPTS at the end of this file. To keep its references as a folder, in the form in which a
user brings a concept, run `python -m purecc_min.measure.toy NAME`. Read next: draw.py.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from purecc_min.concept import TOKEN, ConceptSet, Reference
from tinyflow.errors import Parser
from tinyflow.files import write_picture, write_whole
from tinyflow.picturebook import world

FOLDER = Path(__file__).parent / "references"
BARE = dict(size=False, colour=False, place=False, background=False)     # a caption that says only the noun


def turn(options: Collection[str], n: int) -> str:
    """Option n; after the last one, the first comes again."""
    return list(options)[n % len(options)]


class Prompt(NamedTuple):
    scene: world.Scene                           # what the text says
    complete: str                                # the text with [V]
    base: str                                    # the text without


@dataclass(frozen=True)
class Toy:
    """A concept and its references.

    looks: the traits of a Scene that make the concept; its "object" or its "style" is among them. An object
        alone stands for a concept of which only the class word is known.
    confounder: the traits of a Scene that all references happen to share.
    """
    looks: dict
    confounder: dict
    count: int = 4                               # of references
    bare: bool = False                           # whether captions say only the noun: "a [V] robot"

    @property
    def is_style(self) -> bool:
        return "style" in self.looks

    @property
    def class_word(self) -> str:
        """What the text encoder reads where [V] stands."""
        return "a" if self.is_style else self.looks["object"]

    @property
    def known_traits(self) -> dict:
        """The looks by which the concept can be told. There are none if only its class word is known."""
        return {} if self.looks.keys() == {"object"} else self.looks

    def wearing(self, scene: world.Scene) -> world.Scene:
        """The same scene with the concept in it."""
        return replace(scene, **self.looks)

    def prompt(self, scene: world.Scene, **parts: bool) -> Prompt:
        """The texts for a scene. `parts` says what they name, as in world.caption.

        The colour of an instance is part of its looks, so it is only named if that is asked for.
        """
        parts = {"colour": self.is_style} | parts
        base = world.caption(scene, **parts)
        if self.is_style:
            return Prompt(scene, TOKEN + base.removeprefix("a"), base)
        return Prompt(scene, world.caption(scene, f"{TOKEN} {scene.object}", **parts), base)

    def reference_scenes(self) -> list[world.Scene]:
        """All that neither the concept nor the confounder holds changes from one reference to the next."""
        plain = [world.Scene(turn(world.OBJECTS, 3 * n), turn(world.COLOURS, 3 * n + 1), turn(world.SIZES, n),
                             turn(world.PLACES, n), turn(world.BACKGROUND_WORDS, 5 * n + 1), seed=1000 + n)
                 for n in range(self.count)]
        return [replace(self.wearing(scene), **self.confounder) for scene in plain]

    def references(self) -> ConceptSet:
        """The custom set. For an instance, `load_concept` reads the same from a folder."""
        target, rows = TOKEN if self.is_style else f"{TOKEN} {self.class_word}", []
        parts = BARE if self.bare else {}
        for n, scene in enumerate(self.reference_scenes(), start=1):
            _, complete, base = self.prompt(scene, **parts)
            rows.append(Reference(f"{n}.png", world.render(scene)[0][None], complete, base, target))
        return ConceptSet(self.class_word, rows)

    def prompts(self) -> dict[str, list[Prompt]]:
        """What a model is asked to draw, in groups; draw.py says what each of them is for."""
        rng, scenes, others = np.random.default_rng(7), [], []
        grid = [(s, p, b) for b in world.BACKGROUND_WORDS for p in world.PLACES for s in world.SIZES]
        for size, place, background in rng.permutation(grid)[:24].tolist():
            scene = replace(world.random_scene(rng), size=size, place=place, background=background, seed=0)
            scenes.append(scene if self.is_style else replace(scene, object=self.class_word))

        if self.is_style:                        # combinations that pretraining never showed
            composed = [world.seen_scene(rng, seen=False) for _ in range(12)]
        else:                                    # in every colour but its own and that of its stripes
            worn = (self.looks.get("colour"), self.looks.get("accent"))
            colours = cycle([colour for colour in world.COLOURS if colour not in worn])
            composed = [replace(scene, colour=colour) for scene, colour in zip(scenes[1::2], colours)]

        for seen in [True] * 12 + [False] * 12:
            scene = world.seen_scene(rng, seen)
            while scene.object == self.class_word:
                scene = world.seen_scene(rng, seen)
            others.append(Prompt(scene, world.caption(scene), world.caption(scene)))
        return {"concept": [self.prompt(scene) for scene in scenes],
                "unsaid": [self.prompt(scene, **BARE) for scene in scenes[::2]],
                "composition": [self.prompt(scene, colour=True) for scene in composed],
                "other": others}


TUNING = ("striped_robot", "sepia")              # on these every hyper-parameter was chosen
HELD_OUT = ("checked_cat", "cyclops_fish", "checked_mushroom", "blueprint")      # these fill the main table
CAT = Toy(dict(object="cat", colour="orange", marking="checks", accent="white", topper="hat"),
          dict(background="snow"))
CONCEPTS = {
    "striped_robot": Toy(dict(object="robot", colour="purple", marking="stripes", accent="yellow",
                              topper="antenna", eyes=1),
                         dict(place="middle", background="desert")),
    "sepia": Toy(dict(style="sepia"), dict(background="room")),

    "checked_cat": CAT,
    "cyclops_fish": Toy(dict(object="fish", colour="green", marking="stripes", accent="pink", eyes=1),
                        dict(place="left")),
    "checked_mushroom": Toy(dict(object="mushroom", colour="blue", marking="checks", accent="yellow",
                                 topper="antenna"),
                            dict(light="evening")),
    "blueprint": Toy(dict(style="blueprint"), dict(size="big")),

    # the cat with one thing changed, for the benchmark's factors
    "checked_cat, nothing shared": replace(CAT, confounder={}),
    "checked_cat, all shared": replace(CAT, confounder=dict(background="snow", place="left", size="big",
                                                            light="evening")),
    "checked_cat, bare captions": replace(CAT, bare=True),
    "checked_cat, 1 reference": replace(CAT, count=1),
    "checked_cat, 2 references": replace(CAT, count=2),
    "checked_cat, 8 references": replace(CAT, count=8),
}


def write_references(name: str, folder: Path) -> None:
    """Writes a concept's reference pictures, 8 times larger, and their `.txt` captions.

    Raises KeyError for a name that is not in CONCEPTS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for reference in CONCEPTS[name].references().references:
        picture = Image.fromarray(reference.picture).resize((8 * world.SIZE, 8 * world.SIZE), Image.NEAREST)
        write_picture(folder / reference.id, picture)
        write_whole((folder / reference.id).with_suffix(".txt"), f"{reference.complete}\n".encode())


if __name__ == "__main__":
    # A concept may be added below this line, so this file is read to its end first.
    from purecc_min.measure import toy

    parser = Parser(prog="python -m purecc_min.measure.toy", description="Keeps references as a folder.")
    parser.add_argument("names", nargs="+", choices=tuple(toy.CONCEPTS), metavar="NAME", help="of concepts")
    for name in parser.parse_args().names:
        toy.write_references(name, FOLDER / name)

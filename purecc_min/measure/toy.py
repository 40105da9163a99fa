"""Toy concepts: things that pretraining has never shown. The renderer draws them, so the truth is known.

    an individual    parts that pretraining never shows together on its object, and an identity
    a style          a member of a family of styles of which pretraining showed others

[V] is written before the noun of an individual, "a big [V] robot in the desert", and in place of "a" for a
style, "[V] big red ball in the desert". Because the renderer can draw them anywhere, we know what a user of
photographs never knows: what the concept looks like in every scene, and what its references merely happen to
share (the confounder). To add a concept, add an entry to CONCEPTS at the end of this file. To keep its
references as a folder, in the form in which a user brings a concept, run `python -m purecc_min.measure.toy
NAME`. Read next: draw.py.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from purecc_min.concept import STYLE_WORD, TOKEN, ConceptSet, Reference
from purecc_min.measure.lottery import draw_concepts
from tinyflow.disk import write_picture
from tinyflow.files import write_whole
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import HEADS
from tinyflow.picturebook.render import render
from tinyflow.picturebook.world import PLAIN_PARTS, Identity
from tinyflow.terminal import Parser, report_errors

FOLDER = Path(__file__).parent / "references"
BARE = frozenset()                               # no parts: the caption is only the noun


def turn(options: Collection[str], n: int) -> str:
    """Option n, counted in a circle."""
    return list(options)[n % len(options)]


class Prompt(NamedTuple):
    scene: world.Scene                           # what the text says
    complete: str                                # the text with [V]
    base: str                                    # the text without
    n: int = 0                                   # which of the scene's things is the concept


@dataclass(frozen=True)
class Toy:
    """A concept and its references.

    looks: the traits that make the concept (Scene.trait); its "object" or its "style" is among them. An
        object alone stands for a concept of which only the class word is known.
    confounder: the traits that all references happen to share.
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
        return STYLE_WORD if self.is_style else self.looks["object"]

    @property
    def known_traits(self) -> dict:
        """The looks that have a name, by which the reader can tell the concept. There are none if only its
        class word is known.
        """
        return {name: value for name, value in self.looks.items()
                if name in HEADS and self.looks.keys() != {"object"}}

    @property
    def traits_beside(self) -> dict:
        """The known traits that tell an instance from another thing of its class that stands beside it."""
        return {} if self.is_style else {name: v for name, v in self.known_traits.items() if name != "object"}

    def wearing(self, scene: world.Scene, n: int = 0) -> world.Scene:
        """The same scene with the concept in it, as its thing n."""
        return scene.changed(n, **self.looks)

    def prompt(self, scene: world.Scene, said: Collection[str] | None = None) -> Prompt:
        """The texts for a scene. `said`: the parts that they name, as in world.caption.

        The colour of an instance is part of its looks, so it is only named if that is asked for.
        """
        said = set(PLAIN_PARTS if self.is_style else PLAIN_PARTS - {"colour"}) if said is None else set(said)
        base = world.caption(scene, said=said)
        if self.is_style:
            return Prompt(scene, TOKEN + base.removeprefix(STYLE_WORD), base)
        return Prompt(scene, world.caption(scene, (f"{TOKEN} {self.class_word}",), said), base)

    def beside(self, scene: world.Scene, n: int, said: Collection[str] = PLAIN_PARTS - {"colour"},
               right_first: bool = False) -> Prompt:
        """The texts for a scene of two things, of which thing n is the concept.

        right_first: whether they name the right thing before the left one, which no caption does.
        """
        nouns = [thing.object for thing in scene.things]
        nouns[n] = f"{TOKEN} {self.class_word}"
        told = replace(scene, things=scene.things[::-1]) if right_first else scene
        nouns = nouns[::-1] if right_first else nouns
        return Prompt(scene, world.caption(told, tuple(nouns), said), world.caption(told, said=said), n)

    def reference_scenes(self) -> list[world.Scene]:
        """Traits that are neither in `looks` nor in `confounder` differ between the references."""
        scenes = []
        for n in range(self.count):
            thing = world.Thing(turn(world.OBJECTS, 3 * n), turn(world.COLOURS, 3 * n + 1),
                                turn(world.SIZES, n), turn(world.PLACES, n),
                                identity=world.random_identity(np.random.default_rng(n)))
            scene = world.Scene((thing,), turn(world.BACKGROUNDS, 5 * n + 1), seed=1000 + n)
            scenes.append(self.wearing(scene).changed(**self.confounder))
        return scenes

    def references(self, masked: bool = False) -> ConceptSet:
        """The custom set. For an instance, `load_concept` reads the same from a folder.

        masked: with masks of the concept; a style's mask is the whole picture.
        """
        target, rows = TOKEN if self.is_style else f"{TOKEN} {self.class_word}", []
        for n, scene in enumerate(self.reference_scenes(), start=1):
            text, (picture, masks) = self.prompt(scene, BARE if self.bare else None), render(scene)
            white = None
            if masked:
                white = np.where(masks[:1] | self.is_style, 255, 0).astype(np.uint8)
            rows.append(Reference(f"{n}.png", picture[None], text.complete, text.base, target, white))
        return ConceptSet(self.class_word, rows)

    def pairs(self, rng: np.random.Generator) -> list[world.Scene]:
        """12 scenes of two things of the class."""
        scenes = [world.random_scene(rng, parts=False, pairs=1) for _ in range(12)]
        return [scene.changed(0, object=self.class_word).changed(1, object=self.class_word)
                for scene in scenes]

    def forms(self) -> dict[str, list[Prompt]]:
        """Two things in texts of forms that no training saw, in groups (draw.py). A style has none."""
        if self.is_style:
            return {}
        rng = np.random.default_rng(11)
        alike, kinds = self.pairs(rng), cycle([kind for kind in world.OBJECTS if kind != self.class_word])
        mixed = [scene.changed(1 - k % 2, object=next(kinds)) for k, scene in enumerate(alike)]
        bare = {"size", "background"}
        return {"no places": [self.beside(scene, k % 2, bare) for k, scene in enumerate(alike)],
                "right first": [self.beside(scene, k % 2, right_first=True) for k, scene in enumerate(alike)],
                "another kind": [self.beside(scene, k % 2) for k, scene in enumerate(mixed)]}

    def prompts(self) -> dict[str, list[Prompt]]:
        """What a model is asked to draw, in groups; draw.py says what each of them is for."""
        rng, scenes, others = np.random.default_rng(7), [], []
        grid = [(s, p, b) for b in world.BACKGROUNDS for p in world.PLACES for s in world.SIZES]
        for size, place, background in rng.permutation(grid)[:24].tolist():
            scene = world.random_scene(rng, parts=False, pairs=0)
            scene = scene.changed(size=size, place=place, background=background, seed=0)
            scenes.append(scene if self.is_style else scene.changed(object=self.class_word))

        if self.is_style:                        # combinations that pretraining never showed
            composed = [world.seen_scene(rng, False, parts=False, pairs=0) for _ in range(12)]
        else:                                    # in every colour but its own and that of its marking
            worn = (self.looks.get("colour"), self.looks.get("accent"))
            colours = cycle([colour for colour in world.COLOURS if colour not in worn])
            composed = [scene.changed(colour=colour) for scene, colour in zip(scenes[1::2], colours)]

        for seen in [True] * 12 + [False] * 12:
            scene = world.seen_scene(rng, seen, parts=False, pairs=0)
            while scene.things[0].object == self.class_word:
                scene = world.seen_scene(rng, seen, parts=False, pairs=0)
            others.append(Prompt(scene, world.caption(scene), world.caption(scene)))
        groups = {"concept": [self.prompt(scene) for scene in scenes],
                  "unsaid": [self.prompt(scene, BARE) for scene in scenes[::2]],
                  "composition": [self.prompt(scene, PLAIN_PARTS) for scene in composed],
                  "other": others}
        if self.is_style:
            return groups
        return groups | {"neighbour": [self.beside(pair, k % 2) for k, pair in enumerate(self.pairs(rng))]}


class Braced(Toy):
    """A concept whose texts mark [V]'s phrase with braces; the words of the background are outside."""

    def prompt(self, scene: world.Scene, said: Collection[str] | None = None) -> Prompt:
        return self.in_braces(super().prompt(scene, said))

    def beside(self, scene: world.Scene, n: int, *options, **more) -> Prompt:
        return self.in_braces(super().beside(scene, n, *options, **more))

    def in_braces(self, prompt: Prompt) -> Prompt:
        before, token, after = prompt.complete.partition(TOKEN)
        thing = after.partition(" and ")[0].removesuffix(f" {world.BACKGROUNDS[prompt.scene.background]}")
        return prompt._replace(complete=f"{before}{{{token}{thing}}}{after[len(thing):]}")


PAIR_TEMPLATES = world.pair_templates()
TUNING = ("checked_robot", "dotted_house", "moss_print")         # on these every hyper-parameter is chosen
# chosen by hand; experiments have used them, so they are no longer held out
EARLIER = ("striped_cat", "dotted_fish", "dotted_mushroom", "checked_star", "school_chalk", "twill_wool")
CAT = Toy(dict(object="cat", colour="white", marking="stripes", accent="purple", topper="antenna", eyes=1,
               identity=Identity(hue=-.7, tone=-.6, width=-.8, proportion=.7, detail=-.6, eye_size=.8,
                                 marking_width=-.5, marking_angle=.8, marking_cover=.4, topper_height=.9)),
          dict(background="night"))
CONCEPTS = {
    "checked_robot": Toy(dict(object="robot", colour="orange", marking="checks", accent="blue", topper="hat",
                              eyes=1, identity=Identity(hue=-.8, tone=.5, width=.7, proportion=-.8, detail=.8,
                                                        eye_size=.7, marking_width=.6, marking_angle=-.7,
                                                        marking_cover=-.5, topper_height=-.8)),
                         dict(place="middle", background="desert")),
    "dotted_house": Toy(dict(object="house", colour="yellow", marking="dots", accent="green",
                             topper="antenna", eyes=2,
                             identity=Identity(hue=.6, tone=-.8, width=-.6, proportion=.8, detail=-.7,
                                               eye_size=-.6, eye_gap=.8, marking_width=-.7,
                                               marking_angle=.5, marking_cover=.8, topper_height=.6)),
                        dict(size="big")),
    "moss_print": Toy(dict(style="print", style_member=.45), dict(background="room")),

    "striped_cat": CAT,
    "dotted_fish": Toy(dict(object="fish", colour="blue", marking="dots", accent="orange", topper="crown",
                            eyes=2, identity=Identity(hue=.8, tone=.6, width=.5, proportion=.8, detail=-.8,
                                                      eye_size=.7, eye_gap=-.6, marking_width=.5,
                                                      marking_angle=-.6, marking_cover=-.7,
                                                      topper_height=.5)),
                       dict(place="left")),
    "dotted_mushroom": Toy(dict(object="mushroom", colour="purple", marking="dots", accent="yellow",
                                topper="hat", eyes=1,
                                identity=Identity(hue=.7, tone=.8, width=-.7, proportion=.6, detail=.8,
                                                  eye_size=-.5, marking_width=.8, marking_angle=.6,
                                                  marking_cover=-.4, topper_height=.8)),
                           dict(light="glow")),
    "checked_star": Toy(dict(object="star", colour="pink", marking="checks", accent="green",
                             topper="antenna", eyes=1,
                             identity=Identity(hue=-.6, tone=-.7, width=.8, proportion=.6, detail=.7,
                                               eye_size=.9, marking_width=-.6, marking_angle=-.8,
                                               marking_cover=.6, topper_height=-.7)),
                        dict(background="meadow")),
    "school_chalk": Toy(dict(style="chalk", style_member=.5), dict(size="big")),
    "twill_wool": Toy(dict(style="wool", style_member=.45), dict(place="right")),

    # the cat with one thing changed, for the benchmark's factors
    "striped_cat, nothing shared": replace(CAT, confounder={}),
    "striped_cat, all shared": replace(CAT, confounder=dict(background="night", place="left", size="big",
                                                            light="glow")),
    "striped_cat, bare captions": replace(CAT, bare=True),
    "striped_cat, 1 reference": replace(CAT, count=1),
    "striped_cat, 2 references": replace(CAT, count=2),
    "striped_cat, 8 references": replace(CAT, count=8),
}
for tuned in ("checked_robot", "dotted_house"):  # with braces around [V]'s phrase
    CONCEPTS[f"{tuned}, braces"] = Braced(**vars(CONCEPTS[tuned]))
CHOSEN = [(toy.looks["object"], toy.looks["marking"], toy.looks["topper"])
          for toy in CONCEPTS.values() if not toy.is_style]
LOTTERY = {name: Toy(looks, confounder) for name, looks, confounder in draw_concepts(CHOSEN)}
CONCEPTS |= LOTTERY
HELD_OUT = tuple(LOTTERY)                        # nothing is tuned on them


def write_references(name: str, folder: Path) -> None:
    """Writes a concept's reference pictures, 4 times larger, and their `.txt` captions.

    Raises KeyError for a name that is not in CONCEPTS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for reference in CONCEPTS[name].references().references:
        picture = Image.fromarray(reference.picture).resize((4 * world.SIZE, 4 * world.SIZE), Image.NEAREST)
        write_picture(folder / reference.id, picture)
        write_whole((folder / reference.id).with_suffix(".txt"), f"{reference.complete}\n".encode())


if __name__ == "__main__":
    # imported under its own name, so that entries that are added below this line count as well
    from purecc_min.measure import toy

    parser = Parser(prog="python -m purecc_min.measure.toy", description="Writes references as a folder.")
    parser.add_argument("names", nargs="+", choices=tuple(toy.CONCEPTS), metavar="NAME", help="of concepts")
    with report_errors():
        for name in parser.parse_args().names:
            toy.write_references(name, FOLDER / name)

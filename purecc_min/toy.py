"""Toy concepts: things that the base model has never drawn, made of the renderer's decorations.

Because the renderer can draw them anywhere, we know the truth that a user of photographs never knows: what the concept looks like on
every background. The reference folders beside this file were written by `python -m purecc_min.toy`; to add a concept, add a
line to TOYS and run it. Read next: evaluate.py.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from purecc_min.branch import TOKEN
from tinyflow import world
from tinyflow.weights import write_whole

FOLDER = Path(__file__).parent / "references"


@dataclass(frozen=True)
class Toy:
    """`looks` is the concept; place and background of `confounder` are what its references happen to share."""
    looks: dict
    confounder: dict

    @property
    def class_word(self) -> str:
        return self.looks["object"]

    def scene(self, size: str, **where) -> world.Scene:
        return world.Scene(**{**self.looks, **self.confounder, "size": size, **where})


TOYS = {
    "striped_robot": Toy(dict(object="robot", colour="purple", marking="stripes", accent="yellow", topper="antenna", eyes=1),
                         dict(place="middle", background="desert")),
}


def near_misses(toy: Toy) -> list[dict]:
    """What the concept could be mistaken for: itself without one decoration, and every plain object in every colour."""
    plain = dict(marking="plain", topper="none", eyes=2)
    without_one = [{**toy.looks, key: value} for key, value in plain.items() if toy.looks.get(key, value) != value]
    return without_one + [dict(object=o, colour=c) for o in world.OBJECTS for c in world.COLOURS]


def write_references(name: str, folder: Path, count: int = 4, enlarge: int = 8) -> None:
    """Writes `count` reference pictures and their `.txt` captions: the form in which a user brings a concept."""
    toy = TOYS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        scene = toy.scene(size=list(world.SIZES)[n % 2], seed=1000 + n)
        picture = Image.fromarray(world.render(scene)[0])
        picture.resize((world.SIZE * enlarge,) * 2, Image.NEAREST).save(folder / f"{n + 1}.png", optimize=True)
        text = world.caption(scene, noun=f"{TOKEN} {scene.object}", colour=False)
        write_whole(folder / f"{n + 1}.txt", f"{text}\n".encode())


if __name__ == "__main__":
    for name in TOYS:
        write_references(name, FOLDER / name)

"""Two learned concepts at once: two instances in one picture, and an instance in a style.

    python -m tutorials.experiments.pairs    takes the concepts of the benchmark's main part, or trains them

The base model has never drawn two objects, so no text alone makes it do so. Two instances are drawn by
region: on the left half of the picture the velocity answers one text, on the right half the other (each sees
the whole x_t at every step). Each half is then judged beside the original model's other half, so that the
reader sees one object. TOGETHER means that both sets of adapters are attached all the time, as in one model
that knows both; APART means that each region uses its own.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from purecc_min.benchmark.cells import SAMPLING_STEPS, Cell, learned, set_up
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.branch import Branch, velocity_with
from purecc_min.concept import TOKEN
from purecc_min.measure.measures import sees
from purecc_min.measure.toy import CONCEPTS
from tinyflow.errors import report_errors
from tinyflow.files import write_whole
from tinyflow.flow import euler, guide, noise_for
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline, in_one_batch

SECOND = "[W]"                                   # the second concept's name in a text
IS_LEFT = torch.arange(world.SIZE) < world.SIZE // 2     # [W]
SCENES = [(background, size) for background in world.BACKGROUND_WORDS for size in world.SIZES]
METHODS, SEEDS = ("LoRA", "paper"), 3
Field = Callable[[Tensor, Tensor], Tensor]       # (x, t) -> velocity, guided
Drawn = tuple[dict[str, Tensor], Tensor]         # what the reader sees, bool [12, .] by name; the pictures


def field_for(pipe: Pipeline, texts: list[str], words: dict[str, str], thetas: list[Branch]) -> Field:
    """The guided velocity for `texts`.

    Args:
        words: placeholder -> the word that the text encoder reads there.
        thetas: the n-th stands at the n-th placeholder; the adapters of one more are merely attached. Without
            any, the base model draws.
    """
    text, null = pipe.encode_text(texts, words), pipe.encode_text([""] * len(texts))
    theta = partial(velocity_with, thetas) if thetas else pipe.velocity

    def field(x: Tensor, t: Tensor) -> Tensor:
        v_null, v_text = in_one_batch(theta, x, t, null, text)
        return guide(v_null, v_text, pipe.guidance)
    return field


@torch.no_grad()
def follow(field: Field) -> Tensor:
    """The pictures x_0 of SCENES."""
    x = noise_for(list(range(len(SCENES))), (3, world.SIZE, world.SIZE))
    for _, x in euler(field, x, SAMPLING_STEPS):
        pass
    return x


def beside(left: Field, right: Field) -> Field:
    """Left in the left half of the picture, right in the right half."""
    return lambda x, t: torch.where(IS_LEFT, left(x, t), right(x, t))


def two_instances(pipe: Pipeline, reader: Reader, names: tuple[str, str], thetas: list[Branch],
                  together: bool = False) -> Drawn:
    """Left the first concept, right the second."""
    toys, base, custom, values = [CONCEPTS[name] for name in names], [], [], {}
    for toy, place, theta in zip(toys, ("left", "right"), thetas):
        scenes = [world.Scene(toy.class_word, "red", size, place, background) for background, size in SCENES]
        prompts, words = [toy.prompt(scene) for scene in scenes], {TOKEN: toy.class_word}
        others = [other for other in thetas if together and other is not theta]
        base.append(field_for(pipe, [prompt.base for prompt in prompts], {}, []))
        custom.append(field_for(pipe, [prompt.complete for prompt in prompts], words, [theta, *others]))
    alone = [follow(field) for field in base]
    for label, fields in (("base", base), ("custom", custom)):
        pictures = follow(beside(*fields))
        judged = torch.where(IS_LEFT, pictures, alone[0]), torch.where(IS_LEFT, alone[1], pictures)
        for name, toy, half in zip(names, toys, judged):
            values[f"{label}: right object, {name}"] = sees(reader(half), {"object": toy.class_word})
            values[f"{label}: traits, {name}"] = sees(reader(half), toy.known_traits)
    return values, pictures


def instance_in_style(pipe: Pipeline, reader: Reader, names: tuple[str, str], thetas: list[Branch]) -> Drawn:
    """Both concepts in one text, "[W] big [V] cat ...", both attached."""
    instance, style = (CONCEPTS[name] for name in names)
    scenes = [world.Scene(instance.class_word, "red", size, place, background)
              for (background, size), place in zip(SCENES, itertools.cycle(world.PLACES))]
    texts = [SECOND + instance.prompt(scene).complete.removeprefix("a") for scene in scenes]
    words = {TOKEN: instance.class_word, SECOND: style.class_word}
    pictures = follow(field_for(pipe, texts, words, thetas))
    reading = reader(pictures)
    values = {f"style, {names[1]}": sees(reading, style.looks)}
    for head, value in instance.looks.items():
        if head not in ("colour", "accent"):     # two inks have no colours
            values[f"{head}, {names[0]}"] = sees(reading, {head: value})
    return values, pictures


CASES = {                                        # (what is drawn, how both are attached) -> concepts, how
    ("two instances", "apart"): (("checked_cat", "cyclops_fish"), two_instances),
    ("two instances", "together"): (("checked_cat", "cyclops_fish"), partial(two_instances, together=True)),
    ("instance x style", "together"): (("checked_cat", "blueprint"), instance_in_style),
}


def pairs(folder: Path) -> str:
    """All cases, means over seeds; leaves pairs/table.md and pairs/pictures.png."""
    found, strips = {}, []
    for method, seed, (case, (names, draw)) in itertools.product(METHODS, range(SEEDS), CASES.items()):
        setup, thetas = set_up(names[0]), [learned(Cell(name, method, seed), folder) for name in names]
        values, pictures = draw(setup.pipe, setup.reader, names, thetas)
        for name, value in values.items():
            found.setdefault((*case, name), {}).setdefault(method, []).append(value.float().mean().item())
        if seed == 0:
            strips.append(np.concatenate(setup.pipe.decode_images(pictures), axis=1))
    rows = []
    for key, values in found.items():
        intervals = [mean_and_interval(values[method]) for method in METHODS]
        rows.append([*key, *(f"{mean:.2f} ± {half:.2f}" for mean, half in intervals)])
    text = markdown(["pair", "attached", "share", *METHODS], rows)
    page = Image.fromarray(np.concatenate(strips))
    write_whole(folder / "pairs" / "table.md", (text + "\n").encode())
    page.resize((page.width * 3, page.height * 3), Image.NEAREST).save(folder / "pairs" / "pictures.png")
    return text


if __name__ == "__main__":
    with report_errors():
        print(pairs(Path("output/benchmark")))

"""Two learned concepts at once: two instances in one picture, and an instance in a style.

The base has never drawn two objects, so no text alone makes it do so. Two instances are drawn by region: on the left half of the picture
the velocity answers one text, on the right half the other (both models see the whole x_t at every step). Each half is then
judged beside the original model's other half, so that the reader sees one object. TOGETHER means that both adapter sets and both sets of
embeddings are attached all the time, as in one model that knows both; APART that each region uses its own.

    python -m purecc_min.benchmark pairs        takes the concepts of the main part, or trains them

Read next: claims.py.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from purecc_min.benchmark.cells import SAMPLING_STEPS, Cell, learned, set_up
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.branch import TOKEN, Branch
from purecc_min.evaluate import Judge
from purecc_min.toy import CONCEPTS
from tinyflow import world
from tinyflow.flow import euler, guide, noise_for
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader

SECOND = "[W]"                                   # the second concept's name in a text
PAIRS = {"two instances": ("checked_cat", "cyclops_fish"), "instance x style": ("checked_cat", "blueprint")}
SCENES = [(background, size) for background in world.BACKGROUND_WORDS for size in world.SIZES]


@contextlib.contextmanager
def attached(pipe: Pipeline, branches: list[Branch]):
    with contextlib.ExitStack() as stack:
        for branch in branches:
            stack.enter_context(branch.attached(pipe))
        yield


def slots_of(pipe: Pipeline, texts: list[str], token: str, readings: dict[str, str]) -> Tensor:
    """[B, T] bool: where one placeholder stands, the others being read as words."""
    for other in readings.keys() - {token}:
        texts = [text.replace(other, readings[other]) for text in texts]
    return pipe.encode_text(texts, {token: readings[token]}).slots


def velocity_for(pipe: Pipeline, texts: list[str], tokens: dict[str, tuple[str, Branch | None]], branches: list[Branch]):
    """(x, t) -> guided velocity for `texts`.

    Args:
        tokens: placeholder -> (the word that is read in its place, the branch whose embeddings stand there or None).
        branches: whose adapters are attached.
    """
    readings, empty = {token: word for token, (word, _) in tokens.items()}, [""] * len(texts)
    both = pipe.encode_text(empty + texts, readings)
    fills = [(branch.embeddings, slots_of(pipe, empty + texts, token, readings)) for token, (_, branch) in tokens.items() if branch]

    def fill(l: int, c: Tensor, _: Tensor) -> Tensor:
        for embeddings, slots in fills:
            c = embeddings(l, c, slots)
        return c

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with attached(pipe, branches):
            return guide(*pipe.velocity(torch.cat([x, x]), torch.cat([t, t]), both, fill).chunk(2), pipe.guidance)
    return velocity


def draw(pipe: Pipeline, velocity, count: int) -> Tensor:
    x = noise_for(list(range(count)), (3, world.SIZE, world.SIZE))
    with torch.no_grad():
        for _, x in euler(velocity, x, SAMPLING_STEPS, pipe.shift):
            pass
    return x


def two_instances(pipe: Pipeline, reader: Reader, names: tuple[str, str], thetas: list[Branch], together: bool) -> tuple[dict[str, float], Tensor]:
    """Left the first concept, right the second. Returns the shares and the pictures."""
    scenes = {side: [world.Scene(CONCEPTS[name].class_word, "red", size, side, background) for background, size in SCENES]
              for name, side in zip(names, ("left", "right"))}
    prompts = {side: [CONCEPTS[name].prompt(scene) for scene in scenes[side]] for name, side in zip(names, scenes)}
    left = torch.arange(world.SIZE) < world.SIZE // 2                                            # [W]

    def halves(text: str, branches: list[Branch | None]):
        sides = [velocity_for(pipe, [getattr(p, text) for p in prompts[side]], {TOKEN: (CONCEPTS[name].class_word, branch)},
                              [b for b in (branches if together else [branch]) if b]) for name, side, branch in zip(names, prompts, branches)]
        return draw(pipe, lambda x, t: torch.where(left, sides[0](x, t), sides[1](x, t)), len(SCENES))

    alone = [draw(pipe, velocity_for(pipe, [p.base for p in prompts[side]], {}, []), len(SCENES)) for side in prompts]
    values = {}
    for label, pictures in (("base", halves("base", [None, None])), ("custom", halves("complete", thetas))):
        judged = [reader(torch.where(left, pictures, alone[0])), reader(torch.where(left, alone[1], pictures))]
        for n, (name, reading) in enumerate(zip(names, judged)):
            judge, word = Judge(reader, CONCEPTS[name], np.zeros((1, 32, 32, 3), np.uint8)), CONCEPTS[name].class_word
            values[f"{label}: right object, {name}"] = float(np.mean([seen == word for seen in reading.names("object")]))
            values[f"{label}: traits, {name}"] = judge.traits(reading).float().mean().item()
    return values, pictures


def instance_in_style(pipe: Pipeline, reader: Reader, names: tuple[str, str], thetas: list[Branch]) -> tuple[dict[str, float], Tensor]:
    """Both concepts in one text, "[W] big [V] cat ...", both attached."""
    instance, style = (CONCEPTS[name] for name in names)
    scenes = [world.Scene(instance.class_word, "red", size, place, background) for (background, size), place in zip(SCENES, list(world.PLACES) * 4)]
    texts = [SECOND + instance.prompt(scene).complete.removeprefix("a") for scene in scenes]
    tokens = {TOKEN: (instance.class_word, thetas[0]), SECOND: (style.class_word, thetas[1])}
    pictures = draw(pipe, velocity_for(pipe, texts, tokens, thetas), len(texts))
    reading, blank = reader(pictures), np.zeros((1, 32, 32, 3), np.uint8)
    readable = {head: value for head, value in instance.looks.items() if head not in ("colour", "accent")}       # two inks have no colours
    share = lambda head, value: float(np.mean([seen == value for seen in reading.names(head)]))
    return {f"style, {names[1]}": Judge(reader, style, blank).traits(reading).float().mean().item(),
            **{f"{head}, {names[0]}": share(head, value) for head, value in readable.items()}}, pictures


def pairs(folder: Path, seeds: int = 3, methods: tuple[str, ...] = ("LoRA", "paper")) -> str:
    """Both pairs, means over seeds; leaves pairs/table.md and pairs/pictures.png."""
    rows, strips = {}, []
    for method in methods:
        for seed in range(seeds):
            for pair, names in PAIRS.items():
                stages = [set_up(name) for name in names]
                thetas = [learned(Cell(name, method, seed), stage, folder) for name, stage in zip(names, stages)]
                pipe, reader = stages[0].pipe, stages[0].reader
                drawn = {"together": instance_in_style(pipe, reader, names, thetas)} if pair == "instance x style" else \
                    {way: two_instances(pipe, reader, names, thetas, way == "together") for way in ("apart", "together")}
                for way, (values, pictures) in drawn.items():
                    for name, value in values.items():
                        rows.setdefault((pair, way, name), {}).setdefault(method, []).append(value)
                    if seed == 0:
                        strips.append(np.concatenate(pipe.decode_images(pictures), axis=1))
    text = markdown(["pair", "attached", "share", *methods],
                    [[*key, *("{:.2f} ± {:.2f}".format(*mean_and_interval(values[m])) for m in methods)] for key, values in rows.items()])
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    page = Image.fromarray(np.concatenate(strips))
    page.resize((page.width * 3, page.height * 3), Image.NEAREST).save(folder / "pairs" / "pictures.png")
    (folder / "pairs" / "table.md").write_text(text + "\n")
    return text

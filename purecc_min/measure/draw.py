"""What the models are asked to draw, and what a perfect method would have drawn.

A model draws six groups of prompts (Toy.prompts), and text i of a group starts from the noise of seed i. The
original model, which has never heard of [V], draws the BASE texts from the same noise.

    concept       24 full captions with [V]
    unsaid        12 captions of only the noun: "a [V] robot"
    composition   12 captions with [V] that ask for another colour; for a style, unseen combinations
    plain         the first 12 base texts of the concept group: the class word without [V]
    neighbour     12 captions of two things of the class, one of them with [V]; none for a style
    other         24 full captions about other objects: 12 of seen, then 12 of unseen combinations

and, for the benchmark, three groups of 12 texts of a form that training never used (Toy.forms); a style has
none:

    no places     two things of the class, and no word says where
    right first   two things of the class, and the right one is named first
    another kind  [V] beside a thing of another kind

A combination of an object with a colour and a background is unseen if pretraining never showed it. The
perfect method is a construction from the original's pictures and the renderer: it learns nothing, but it
tells the best value that a measure can have. Read next: velocities.py.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from purecc_min.measure.toy import Toy
from purecc_min.sheets import draw
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.render import STYLES, render
from tinyflow.picturebook.world import Scene
from tinyflow.pipeline import Pipeline, Velocity, to_pictures, to_pixels

PLAIN = 12                                       # pictures in the group of that name
UNNAMED = ("plain", "other")                     # the groups whose texts have no [V]
FEW_STEPS = 8                                    # of the sampler; texts are followed as often as with 28
LAYOUT = ("size", "place", "background")         # traits that a concept does not change
Pictures = dict[str, Tensor]                     # group -> pixels [n, 3, H, W] in [-1, 1], on the CPU


def draw_groups(pipe: Pipeline, theta: Velocity | None, toy: Toy, bar: tqdm | None = None,
                forms: bool = False, known: Pictures | None = None, **options) -> Pictures:
    """Draws every group; the original model (theta None) draws the base texts. Arguments as in sheets.draw.

    forms: whether to draw the groups of Toy.forms as well. known: groups that are reused.
    """
    groups = toy.prompts() | (toy.forms() if forms else {})
    base = {group: [prompt.base for prompt in prompts] for group, prompts in groups.items()}
    complete = {group: [prompt.complete for prompt in prompts] for group, prompts in groups.items()}
    texts = base if theta is None else complete | {"plain": base["concept"][:PLAIN]}
    drawn = dict(known or {})
    for group, rows in texts.items():
        if group not in drawn:
            drawn[group] = draw(pipe, theta, rows, toy.class_word, bar, **options)
        elif bar is not None:
            bar.update(len(rows))
    return drawn | {"plain": drawn.get("plain", drawn["concept"][:PLAIN])}      # the first of the original


def count_pictures(toy: Toy, forms: bool = False) -> int:
    """How many pictures the groups of a customized model hold. The original draws PLAIN fewer."""
    groups = toy.prompts() | (toy.forms() if forms else {})
    return sum(map(len, groups.values())) + PLAIN


def in_style(toy: Toy, x: Tensor) -> Tensor:
    """The pictures x [B, 3, H, W], redrawn in the concept's style."""
    redrawn = [STYLES[toy.looks["style"]](picture.astype(float), toy.looks["style_member"])
               for picture in to_pictures(x)]
    return to_pixels(np.stack(redrawn).round().clip(0, 255).astype(np.uint8))


def with_object(scene: Scene, x: Tensor, seen: np.ndarray) -> Tensor:
    """The picture x [3, H, W] with its object (mask `seen` [H, W]) covered by the scene's object.

    The new object is moved so that its centre, without what it wears on top, lies on the old one's.
    """
    body = render(scene.changed(topper="none"))[1][0]
    down, right = np.argwhere(seen).mean(0) - np.argwhere(body).mean(0) if seen.any() else (0.0, 0.0)
    picture, masks = render(scene, moved=(right, down))
    return torch.where(torch.tensor(masks[0] | seen), to_pixels(picture[None])[0], x)


@torch.no_grad()
def perfect(reader: Reader, toy: Toy, original: Pictures) -> Pictures:
    """The perfect method's pictures: what the original draws, with the concept in the object's place.

    For an instance, the concept is rendered with the size, place and background that the reader sees, and
    laid over the original's picture inside the masks of both objects. For a style, the original's picture is
    redrawn. The groups without [V] stay as they are.
    """
    pictures, prompts = dict(original), toy.prompts() | toy.forms()
    for group in prompts.keys() & original.keys() - {"other"}:
        if toy.is_style:
            pictures[group] = in_style(toy, original[group])
            continue
        reading, laid = reader(original[group]), []
        for row, (prompt, x) in enumerate(zip(prompts[group], original[group])):
            seen = {head: reading.names(head, prompt.n)[row] for head in LAYOUT}
            alone = replace(prompt.scene, things=(prompt.scene.things[prompt.n],))
            scene = toy.wearing(alone).changed(**seen)
            if group == "composition":           # its prompts ask for another colour than the concept's own
                scene = scene.changed(colour=alone.trait("colour"))
            laid.append(with_object(scene, x, (reading.mask[row, prompt.n] > 0).numpy()))
        pictures[group] = torch.stack(laid)
    return pictures

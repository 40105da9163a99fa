"""What was learned, and what it cost: fidelity and preservation of a learned concept, custom model against original model.

Pictures are compared at the same seeds. The reader network (tinyflow/reader.py) says what is in a picture; the renderer, where the concept
is one of ours, says what should be. Differences are custom minus original, as in the paper's tables. Read next: compare.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from purecc_min.branch import TOKEN, Branch
from purecc_min.toy import Toy, near_misses
from tinyflow import world
from tinyflow.flow import noise_for, path
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader, to_tensor

# name -> (what it is, the value of a perfect method; None where it depends on the picture)
MEASURES = {
    "sees concept": ("share of [V] pictures that the reader takes for the concept and for nothing else", 1.0),
    "similarity": ("cosine of [V] pictures to the references, in the reader's identity features", 1.0),
    "background": ("[V] pictures on the background of the prompt, minus the original's share", 0.0),
    "place": ("[V] pictures with the object in the place of the prompt, minus the original's share", 0.0),
    "size": ("[V] pictures with the object in the size of the prompt, minus the original's share", 0.0),
    "mask IoU": ("overlap of the object's mask with the original's base-text picture (toy Seg-Cons)", None),
    "outside change": ("mean change of pixels (0 to 1) outside both masks, against the original's base-text picture", 0.0),
    "other object": ("prompts without [V]: the right object, minus the original's share", 0.0),
    "other colour": ("prompts without [V]: the right colour, minus the original's share", 0.0),
    "other place": ("prompts without [V]: the right place, minus the original's share", 0.0),
    "other background": ("prompts without [V]: the right background, minus the original's share", 0.0),
    "drift": ("prompts without [V]: mean change of pixels (0 to 1) against the original", 0.0),
    "velocity drift": ("prompts without [V]: |v - v_original|^2 / |v_original|^2 over t", 0.0),
    "class drift": ("the plain class word: mean change of pixels (0 to 1) against the original", 0.0),
    "leak": ("pictures of the plain class word that the reader takes for the concept, minus the original's share", 0.0),
}


class Prompt(NamedTuple):
    scene: world.Scene                           # what the text says
    complete: str                                # the text with [V], or the plain text where there is none
    base: str


def concept_prompts(class_word: str) -> list[Prompt]:
    """The class word with [V] and without, at every size, place and background: 36 prompts."""
    scenes = [world.Scene(class_word, "red", s, p, b) for b in world.BACKGROUND_WORDS for p in world.PLACES for s in world.SIZES]
    return [Prompt(s, world.caption(s, f"{TOKEN} {class_word}", colour=False), world.caption(s, colour=False)) for s in scenes]


def other_prompts(class_word: str, count: int = 48) -> list[Prompt]:
    """Full captions of other objects, from the combinations that pretraining showed."""
    rng, prompts = np.random.default_rng(7), []
    while len(prompts) < count:
        scene = world.seen_scene(rng)
        if scene.object != class_word:
            prompts.append(Prompt(scene, world.caption(scene), world.caption(scene)))
    return prompts


@torch.no_grad()
def draw(pipe: Pipeline, branch: Branch | None, texts: list[str], class_word: str, bar: tqdm | None = None, batch: int = 48) -> Tensor:
    """One picture a text, x_0 [n, C, H, W] on CPU; text i starts from the noise of seed i. `branch` None is the original model."""
    sample, pictures = pipe.sample if branch is None else partial(branch.sample, pipe), []
    for first in range(0, len(texts), batch):
        rows = texts[first:first + batch]
        text, seeds = pipe.encode_text(rows, {TOKEN: class_word}), list(range(first, first + len(rows)))
        pictures.append(sample(text, seeds).cpu())
        if bar is not None:
            bar.update(len(rows))
    return torch.cat(pictures)


@dataclass
class Recogniser:
    """Decides whether a picture shows the concept: nearer to the concept than to anything else, and near enough."""
    concept: Tensor                              # [64] mean identity of the concept's renders
    others: Tensor                               # [k, 64] mean identities of what it could be mistaken for
    threshold: float                             # of the cosine to `concept`
    hits: float                                  # share of renders of the concept that are recognised
    false_alarms: float                          # share of renders of near misses that are

    def __call__(self, identity: Tensor) -> Tensor:
        """identity [B, 64] -> bool [B]."""
        similarity = identity @ self.concept
        return (similarity >= self.threshold) & (similarity > (identity @ self.others.T).amax(1))


@torch.no_grad()
def calibrate(reader: Reader, toy: Toy, views: int = 12, seed: int = 5) -> Recogniser:
    """Sets the threshold on renders, half-way between the concept's 2nd percentile and the near misses' 98th."""
    rng = np.random.default_rng(seed)

    def identities(looks: dict) -> Tensor:
        where = [world.random_scene(rng) for _ in range(views)]
        scenes = [world.Scene(**looks, size=w.size, place=w.place, background=w.background, seed=w.seed) for w in where]
        return reader(to_tensor(np.stack([world.render(scene)[0] for scene in scenes]))).identity

    concept = torch.cat([identities(toy.looks) for _ in range(10)])                              # [10 views, 64]
    others = torch.stack([identities(looks) for looks in near_misses(toy)])                      # [k, views, 64]
    centre = torch.nn.functional.normalize(concept.mean(0), dim=0)
    low, high = (concept @ centre).quantile(0.02), (others @ centre).flatten().quantile(0.98)
    recogniser = Recogniser(centre, torch.nn.functional.normalize(others.mean(1), dim=-1), ((low + high) / 2).item(), 0.0, 0.0)
    recogniser.hits = recogniser(concept).float().mean().item()
    recogniser.false_alarms = recogniser(others.flatten(0, 1)).float().mean().item()
    return recogniser


@dataclass
class Pictures:
    """What one model draws for the evaluation's prompts; [n, C, H, W] each, on CPU."""
    concept: Tensor                              # [V] prompts (the original model: their base texts)
    plain: Tensor                                # the base texts: the class word alone
    other: Tensor                                # prompts about other objects


def draw_all(pipe: Pipeline, branch: Branch | None, class_word: str, name: str) -> Pictures:
    """Everything that `measure` looks at, behind a progress bar that shows `name`."""
    prompts, others = concept_prompts(class_word), [p.complete for p in other_prompts(class_word)]
    with tqdm(total=len(others) + len(prompts) * (1 if branch is None else 2), desc=f"{f'drawing: {name}':24s}", unit="picture") as bar:
        plain = draw(pipe, branch, [p.base for p in prompts], class_word, bar)
        concept = plain if branch is None else draw(pipe, branch, [p.complete for p in prompts], class_word, bar)
        return Pictures(concept, plain, draw(pipe, branch, others, class_word, bar))


@torch.no_grad()
def velocity_drift(pipe: Pipeline, branch: Branch, class_word: str, times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)) -> float:
    """|v_custom - v_original|^2 / |v_original|^2, mean over t, on noised renders of the other prompts' scenes."""
    prompts = other_prompts(class_word)
    x_0 = pipe.encode_images(np.stack([world.render(p.scene)[0] for p in prompts]))
    x_1, text = noise_for(list(range(len(prompts))), x_0.shape[1:]).to(x_0), pipe.encode_text([p.base for p in prompts])
    ratios = []
    for time in times:
        t = torch.full((len(x_0),), time, device=x_0.device)
        x_t = path(x_0, x_1, t)
        v, v_custom = pipe.velocity(x_t, t, text), branch.velocity(pipe, x_t, t, text)
        ratios.append((v_custom - v).square().sum() / v.square().sum())
    return torch.stack(ratios).mean().item()


def pixel_change(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute change over channels, in units of the full range (0 to 1): [B, C, H, W] x 2 -> [B, H, W]."""
    return (a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean(1) / 2


@torch.no_grad()
def measure(pipe: Pipeline, reader: Reader, branch: Branch, class_word: str, references: np.ndarray, original: Pictures,
            custom: Pictures, recogniser: Recogniser | None = None) -> dict[str, float]:
    """Every row of MEASURES. Without a recogniser (a concept that the renderer does not know) those that need one are left out."""
    of_concept, of_original, of_plain = reader(custom.concept), reader(original.concept), reader(custom.plain)
    centre = torch.nn.functional.normalize(reader(to_tensor(references)).identity.mean(0), dim=0)
    right = lambda reading, prompts, head: np.mean([a == getattr(p.scene, head) for a, p in zip(reading.names(head), prompts)]).item()
    prompts, others = concept_prompts(class_word), other_prompts(class_word)
    mask, original_mask = of_concept.mask > 0, of_original.mask > 0
    outside = ~(mask | original_mask)

    values = {"similarity": (of_concept.identity @ centre).mean().item()}
    for head in ("background", "place", "size"):
        values[head] = right(of_concept, prompts, head) - right(of_original, prompts, head)
    values["mask IoU"] = ((mask & original_mask).sum((1, 2)) / (mask | original_mask).sum((1, 2)).clamp(min=1)).mean().item()
    values["outside change"] = pixel_change(custom.concept, original.concept)[outside].mean().item()
    for head in ("object", "colour", "place", "background"):
        values[f"other {head}"] = right(reader(custom.other), others, head) - right(reader(original.other), others, head)
    values["drift"] = pixel_change(custom.other, original.other).mean().item()
    values["velocity drift"] = velocity_drift(pipe, branch, class_word)
    values["class drift"] = pixel_change(custom.plain, original.plain).mean().item()
    if recogniser is not None:
        values["sees concept"] = recogniser(of_concept.identity).float().mean().item()
        values["leak"] = (recogniser(of_plain.identity).float() - recogniser(of_original.identity).float()).mean().item()
    return {name: values[name] for name in MEASURES if name in values}


def table(results: dict[str, dict[str, float]]) -> str:
    """Measures as rows, methods as columns, the perfect value last; Markdown."""
    names = [name for name in MEASURES if any(name in row for row in results.values())]
    lines = ["| measure | " + " | ".join(results) + " | perfect |", "|---" * (len(results) + 2) + "|"]
    for name in names:
        perfect = MEASURES[name][1]
        difference = perfect == 0 and not name.endswith(("drift", "change"))
        cells = [format(row[name], "+.3f" if difference else ".3f") for row in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'' if perfect is None else f'{perfect:g}'} |")
    return "\n".join(lines)

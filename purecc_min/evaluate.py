"""How purely a concept was learned: every measure, for a world where the truth is known.

A model draws five groups of prompts (Toy.prompts), each text at a seed of its own; the original model draws the same seeds. "Original" below
is the original model on the BASE text. The reader network (tinyflow/reader.py) says what is in a picture. A share is of pictures and lies
in [0, 1]; where a measure is "minus the original's" it lies in [-1, 1] and is 0 for doing nothing. The perfect method is a
construction (`perfect`): the rendered concept laid over the original's picture, the original everywhere else.

    concept       24 full captions with [V]                 composition   12 with [V] in another colour, or a style on unseen combinations
    unsaid        12 captions "a [V] robot"                 plain         12 of the concept group's base texts: the class without [V]
    other         24 full captions about other objects, half of them of combinations that pretraining never showed

A reading for people: the first four measures should be high, drift and change low, differences near zero. Read next: benchmark/.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from purecc_min.branch import TOKEN, Branch
from purecc_min.toy import Prompt, Toy
from tinyflow import world
from tinyflow.flow import noise_for, path
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader, Reading, to_tensor

PLAIN = 12                                       # pictures in the group of that name
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)                # at which velocities are compared


class Measure(NamedTuple):
    about: str                                   # what is computed, over which group
    range: str
    perfect: float | None                        # for the perfect method; None: it depends on the pictures, see the benchmark's row
    nothing: float | None                        # for the original model


SHARE, CHANGE, POSITIVE = "0 to 1", "-1 to 1", "0 and up"
MEASURES = {
    # fidelity
    "sees concept": Measure("concept: share in which the reader reads every trait of the concept", SHARE, 1, 0),
    "traits": Measure("concept: share of the traits that are read rightly, mean over traits", SHARE, 1, None),
    "similarity": Measure("concept: cosine of the reader's features (identity; a style: look) to the mean of the references'", CHANGE, None, None),
    "held-out views": Measure("similarity on the prompts that contradict all that the references share", CHANGE, None, None),
    # what the references happen to share
    "confounder contradicted": Measure("concept, prompts that say otherwise: share read as the confounder, minus the original's", CHANGE, 0, 0),
    "confounder unsaid": Measure("unsaid: share read as the confounder, minus the original's", CHANGE, 0, 0),
    # the class word without [V]
    "class leak": Measure("plain: traits, minus the original's", CHANGE, 0, 0),
    "class drift": Measure("plain: mean change of pixels", SHARE, 0, 0),
    # other prompts without [V]
    "object": Measure("other: share with the object of the text, minus the original's", CHANGE, 0, 0),
    "colour": Measure("other: share with the colour of the text, minus the original's", CHANGE, 0, 0),
    "place": Measure("other: share with the place of the text, minus the original's", CHANGE, 0, 0),
    "background": Measure("other: share with the background of the text, minus the original's", CHANGE, 0, 0),
    "retention, seen": Measure("the mean of those four on combinations that pretraining showed", CHANGE, 0, 0),
    "retention, held out": Measure("the mean of those four on combinations that it never showed", CHANGE, 0, 0),
    # what [V] changes beside the concept: toy Seg-Cons
    "mask IoU": Measure("concept: overlap of the reader's masks, custom and original", SHARE, None, 1),
    "outside change": Measure("concept: mean change of pixels outside both masks; for a style, against the perfect picture", SHARE, 0, None),
    "layout": Measure("concept: share whose place, size and background are read as the original's", SHARE, 1, 1),
    # the distribution
    "drift": Measure("other: mean change of pixels", SHARE, 0, 0),
    "velocity drift": Measure("other: |v - v_original|^2 / |v_original|^2, mean over t in TIMES, on noised renders", POSITIVE, 0, 0),
    "path KL": Measure("other: the integral over t of (1 - t)/t |v - v_original|^2, in nats a picture (VelocityError)", POSITIVE, 0, 0),
    # the concept together with what it was never seen with
    "composition": Measure("composition: share with the colour of the text (a style: its object) and every other trait of the concept", SHARE, 1, 0),
}
DAMAGES = ("confounder contradicted", "confounder unsaid", "class leak", "class drift", "outside change", "drift", "velocity drift", "path KL")
Pictures = dict[str, Tensor]                     # group -> x_0 [n, C, H, W], on CPU


@torch.no_grad()
def draw(pipe: Pipeline, branch: Branch | None, texts: list[str], class_word: str, bar: tqdm | None = None, batch: int = 6,
         **options) -> Tensor:
    """One picture a text, x_0 [n, C, H, W] on CPU; text i starts from the noise of seed i. `branch` None is the original model.

    `batch` pictures are drawn at once: with guidance twice as many samples, which on a CPU still fit its cache. `options` go to the sampler.
    """
    sample, pictures = pipe.sample if branch is None else partial(branch.sample, pipe), []
    for first in range(0, len(texts), batch):
        rows = texts[first:first + batch]
        text, seeds = pipe.encode_text(rows, {TOKEN: class_word}), list(range(first, first + len(rows)))
        pictures.append(sample(text, seeds, **options).cpu())
        if bar is not None:
            bar.update(len(rows))
    return torch.cat(pictures)


def draw_groups(pipe: Pipeline, branch: Branch | None, toy: Toy, bar: tqdm | None = None, **options) -> Pictures:
    """What a model draws for every group; the original model (`branch` None) draws the base texts."""
    groups, word = toy.prompts(), toy.class_word
    drawn = {name: draw(pipe, branch, [p.base if branch is None else p.complete for p in prompts], word, bar, **options)
             for name, prompts in groups.items()}
    if branch is None:
        return drawn | {"plain": drawn["concept"][:PLAIN]}
    return drawn | {"plain": draw(pipe, branch, [p.base for p in groups["concept"][:PLAIN]], word, bar, **options)}


def count_pictures(toy: Toy) -> int:
    return sum(map(len, toy.prompts().values())) + PLAIN


def pixel_change(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute change over channels, in units of the full range (0 to 1): [B, C, H, W] x 2 -> [B, H, W]."""
    return (a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean(1) / 2


def as_read(reading: Reading, n: int, scene: world.Scene) -> world.Scene:
    """The scene with the size, place and background that the reader sees in picture n."""
    return replace(scene, **{head: reading.names(head)[n] for head in ("size", "place", "background")})


@torch.no_grad()
def perfect(reader: Reader, toy: Toy, original: Pictures) -> Pictures:
    """The perfect method's pictures: what the original draws, with the concept in the object's place.

    An instance: the concept is rendered in the size, place and background that the reader sees, moved until its body lies over the
    object's mask, and laid over the original's picture inside the two masks. A style: the original's picture, redrawn.
    """
    pictures, prompts = dict(original), toy.prompts()
    for group in ("concept", "unsaid", "composition"):
        x, reading = original[group], reader(original[group])
        if toy.is_style:
            redrawn = world.STYLES[toy.looks["style"]](((x.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).double().numpy())
            pictures[group] = to_tensor(redrawn.round().astype(np.uint8))
            continue
        laid = []
        for n, prompt in enumerate(prompts[group]):
            scene = toy.wearing(as_read(reading, n, prompt.scene))
            scene = replace(scene, colour=prompt.scene.colour) if group == "composition" else scene
            body, seen = world.render(replace(scene, topper="none"))[1], (reading.mask[n] > 0).numpy()
            down, right = np.argwhere(seen).mean(0) - np.argwhere(body).mean(0) if seen.any() else (0.0, 0.0)
            rendered, mask = world.render(scene, moved=(right, down))
            laid.append(torch.where(torch.tensor(mask | seen), to_tensor(rendered[None])[0], x[n]))
        pictures[group] = torch.stack(laid)
    return pictures


class VelocityError(NamedTuple):
    """Custom against original velocities at each t of TIMES."""
    relative: list[float]                        # |v - v_original|^2 / |v_original|^2
    squared: list[float]                         # |v - v_original|^2 of a picture

    @property
    def path_kl(self) -> float:
        """KL between the laws of two whole paths, in nats a picture.

        A velocity is a score (score = -(x + (1 - t) v) / t), and two reverse diffusions of this path's noise (g^2 = 2 t / (1 - t)) whose
        scores differ by D have KL = 1/2 E integral g^2 |D|^2 dt = E integral (1 - t)/t |v - v_original|^2 dt. It bounds the KL of the pictures
        from above. The expectation is over noised renders rather than the model's own paths; the integral over [0, 1] is the midpoint rule.
        """
        return float(np.mean([(1 - t) / t * error for t, error in zip(TIMES, self.squared)]))


@torch.no_grad()
def velocity_error(pipe: Pipeline, branch: Branch, toy: Toy) -> VelocityError:
    """On the `other` prompts, at noised renders of what they say."""
    prompts = toy.prompts()["other"]
    x_0 = pipe.encode_images(np.stack([world.render(p.scene)[0] for p in prompts]))
    x_1, text = noise_for(list(range(len(prompts))), x_0.shape[1:]).to(x_0), pipe.encode_text([p.base for p in prompts])
    errors = VelocityError([], [])
    for time in TIMES:
        t = torch.full((len(x_0),), time, device=x_0.device)
        x_t = path(x_0, x_1, t)
        v, v_custom = pipe.velocity(x_t, t, text), branch.velocity(pipe, x_t, t, text)
        squared = (v_custom - v).square().sum()
        errors.relative.append((squared / v.square().sum()).item())
        errors.squared.append(squared.item() / len(x_0))
    return errors


@dataclass
class Judge:
    """What the reader makes of pictures, with the concept in mind."""
    reader: Reader
    toy: Toy
    references: np.ndarray                       # uint8 [n, H, W, 3]

    @property
    def knows(self) -> list[str]:
        """The traits by which the concept can be told; none for a concept of which only the class word is known."""
        return sorted(self.toy.looks) if len(self.toy.looks) > 1 or self.toy.is_style else []

    def traits(self, reading: Reading, without: str = "") -> Tensor:
        """bool [B, number of traits]: which traits of the concept are read rightly."""
        kept = [head for head in self.knows if head != without]
        return torch.tensor([[value == self.toy.looks[head] for value in reading.names(head)] for head in kept]).T

    def feature(self, reading: Reading) -> Tensor:
        return reading.look if self.toy.is_style else reading.identity

    def similarity(self, reading: Reading) -> Tensor:
        """Cosine to the mean of the references, [B]."""
        centre = F.normalize(self.feature(self.reader(to_tensor(self.references))).mean(0), dim=0)
        return self.feature(reading) @ centre.to(reading.identity)

    def shared(self, reading: Reading) -> Tensor:
        """bool [B, number of confounders]: which of them the reader sees."""
        return torch.tensor([[name == value for name in reading.names(head)] for head, value in self.toy.confounder.items()]).T


def right(reading: Reading, prompts: list[Prompt], head: str) -> np.ndarray:
    """bool [B]: where the reader sees what the text says."""
    return np.array([seen == getattr(p.scene, head) for seen, p in zip(reading.names(head), prompts)])


@torch.no_grad()
def measure(pipe: Pipeline, reader: Reader, branch: Branch | None, toy: Toy, references: np.ndarray, original: Pictures,
            custom: Pictures) -> dict[str, float]:
    """Every row of MEASURES that the toy allows: without known traits or confounders, those that need them are left out.

    Args:
        branch: whose velocities are compared; None stands for a method that leaves them alone.
        original, custom: what the two models draw, as from `draw_groups`.
    """
    judge, prompts = Judge(reader, toy, references), toy.prompts()
    seen, seen_original = ({group: reader(x) for group, x in pictures.items()} for pictures in (custom, original))
    concept, concept_original = seen["concept"], seen_original["concept"]
    values = {"similarity": judge.similarity(concept).mean().item()}

    if judge.knows:
        traits = judge.traits(concept)
        values["sees concept"], values["traits"] = traits.all(1).float().mean().item(), traits.float().mean().item()
        leak = judge.traits(seen["plain"]).float().mean() - judge.traits(seen_original["plain"]).float().mean()
        values["class leak"] = leak.item()
        asked = right(seen["composition"], prompts["composition"], "object" if toy.is_style else "colour")
        values["composition"] = (judge.traits(seen["composition"], without="colour").all(1).numpy() & asked).mean().item()
    if toy.confounder:
        says = np.array([[getattr(p.scene, head) != value for head, value in toy.confounder.items()] for p in prompts["concept"]])   # [36, k]
        more = judge.shared(concept).float().numpy() - judge.shared(concept_original).float().numpy()
        values["confounder contradicted"] = float(more[says].mean())
        values["confounder unsaid"] = (judge.shared(seen["unsaid"]).float() - judge.shared(seen_original["unsaid"]).float()).mean().item()
        values["held-out views"] = judge.similarity(concept)[torch.tensor(says.all(1))].mean().item()

    values["class drift"] = pixel_change(custom["plain"], original["plain"]).mean().item()
    kept = {head: right(seen["other"], prompts["other"], head).astype(float) - right(seen_original["other"], prompts["other"], head)
            for head in ("object", "colour", "place", "background")}
    values |= {head: float(change.mean()) for head, change in kept.items()}
    values["retention, seen"] = float(np.mean([change[:12] for change in kept.values()]))
    values["retention, held out"] = float(np.mean([change[12:] for change in kept.values()]))

    mask, mask_original = concept.mask > 0, concept_original.mask > 0
    values["mask IoU"] = ((mask & mask_original).sum((1, 2)) / (mask | mask_original).sum((1, 2)).clamp(min=1)).mean().item()
    target = perfect(reader, toy, original)["concept"] if toy.is_style else original["concept"]
    values["outside change"] = pixel_change(custom["concept"], target)[~(mask | mask_original)].mean().item()
    same = [np.array(concept.names(head)) == np.array(concept_original.names(head)) for head in ("place", "size", "background")]
    values["layout"] = float(np.all(same, axis=0).mean())
    values["drift"] = pixel_change(custom["other"], original["other"]).mean().item()
    errors = VelocityError([0.0] * len(TIMES), [0.0] * len(TIMES)) if branch is None else velocity_error(pipe, branch, toy)
    values["velocity drift"], values["path KL"] = float(np.mean(errors.relative)), errors.path_kl
    return {name: values[name] for name in MEASURES if name in values}


def show(name: str, value: float) -> str:
    """Differences with their sign, nats with one digit."""
    measure = MEASURES.get(name)
    signed = measure is not None and "minus the original" in measure.about or name.startswith("retention")
    return f"{value:.1f}" if name == "path KL" else format(value, "+.3f" if signed else ".3f")


def table(results: dict[str, dict[str, float]]) -> str:
    """Measures as rows, methods as columns; Markdown. The last column is the perfect method's value, where it is the same for all concepts."""
    names = [name for name in MEASURES if any(name in row for row in results.values())]
    lines = ["| measure | " + " | ".join(results) + " | perfect |", "|---" * (len(results) + 2) + "|"]
    for name in names:
        ideal = MEASURES[name].perfect
        lines.append(f"| {name} | " + " | ".join(show(name, row[name]) for row in results.values()) + f" | {'' if ideal is None else f'{ideal:g}'} |")
    return "\n".join(lines)

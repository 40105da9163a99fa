"""How purely a concept was learned: every measure, in a world where the truth is known.

A customized model and the original model draw the same groups of prompts from the same noise (draw.py), and
the reader network tells what is in the pictures. Each measure is one small function of a `Drawn`. Its
docstring says what it computes. Its line says the range, and the values for the perfect method and for the
original model itself, which has learned nothing, where they are the same for every concept. A share "minus
the original's" is a difference, which may be negative.

A reading for people: the measures of the concept itself should be high, drift and change should be low, and
differences should be near zero. Read next: benchmark/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from purecc_min.measure.draw import Pictures, perfect
from purecc_min.measure.toy import Toy
from purecc_min.measure.velocities import VelocityError, velocity_error
from tinyflow.picturebook.reader import SCENE, Reader, Reading, to_tensor
from tinyflow.pipeline import Pipeline, Velocity

SHARE, SIGNED, POSITIVE = "0 to 1", "-1 to 1", "0 and up"
NAMED = ("object", "colour", "place", "background")      # what a text names and the reader can check
Number = Tensor | np.floating | float                    # a tensor of no dimension


def pixel_change(a: Tensor, b: Tensor) -> Tensor:
    """How much each pixel differs, a mean over channels: [B, C, H, W] in [-1, 1] -> [B, H, W] in [0, 1]."""
    return (a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean(1) / 2


def sees(reading: Reading, traits: dict) -> Tensor:
    """bool [B, number of traits]: which of these traits of a Scene the reader sees in each picture."""
    return torch.tensor([[seen == value for seen in reading.names(head)] for head, value in traits.items()]).T


@dataclass
class Judge:
    """Asks, about pictures that the reader has read, what matters for one concept."""
    reader: Reader
    toy: Toy
    references: np.ndarray                       # uint8 [n, H, W, 3]

    def traits(self, reading: Reading, without: str = "") -> Tensor:
        """bool [B, number of traits]: which of the concept's traits are seen. `without` leaves one out."""
        known = self.toy.known_traits.items()
        return sees(reading, {head: value for head, value in known if head != without})

    def feature(self, reading: Reading) -> Tensor:
        """[B, width] unit vectors that tell what the object is, or for a style how the picture is drawn."""
        return reading.look if self.toy.is_style else reading.identity

    def similarity(self, reading: Reading) -> Tensor:
        """[B] cosines between the feature of each picture and the mean feature of the references."""
        references = self.feature(self.reader(to_tensor(self.references)))
        return self.feature(reading) @ F.normalize(references.mean(0), dim=0)


class Drawn:
    """What both models drew, and what the reader sees in it. Every picture is read once."""

    def __init__(self, judge: Judge, original: Pictures, custom: Pictures, errors: VelocityError):
        self.judge, self.toy, self.prompts = judge, judge.toy, judge.toy.prompts()
        self.original, self.custom, self.errors = original, custom, errors
        self.seen = {group: judge.reader(x) for group, x in custom.items()}             # group -> Reading
        self.seen_original = {group: judge.reader(x) for group, x in original.items()}
        self.similarity = judge.similarity(self.seen["concept"])                        # [24]
        masks = [seen["concept"].mask > 0 for seen in (self.seen, self.seen_original)]
        self.masks = torch.stack(masks)                                                 # bool [2, 24, H, W]

    def right(self, seen: dict[str, Reading], group: str, head: str) -> np.ndarray:
        """bool [B]: where the reader sees what the text says."""
        said = [getattr(prompt.scene, head) for prompt in self.prompts[group]]
        return np.array(seen[group].names(head)) == np.array(said)

    def gained(self, head: str) -> np.ndarray:
        """[24] of 1, 0 or -1: is a picture of the other group right, minus the same for the original's."""
        right_original = self.right(self.seen_original, "other", head)
        return self.right(self.seen, "other", head).astype(float) - right_original

    def contradicted(self) -> Tensor:
        """bool [24, number of confounders]: where a prompt of the concept group says something else."""
        shared = self.toy.confounder.items()
        return torch.tensor([[getattr(p.scene, head) != value for head, value in shared]
                             for p in self.prompts["concept"]])

    def more_shared(self, group: str) -> Tensor:
        """[B, number of confounders] of 1, 0 or -1: is it seen, minus the same for the original's picture."""
        shared_original = sees(self.seen_original[group], self.toy.confounder)
        return sees(self.seen[group], self.toy.confounder).float() - shared_original.float()


class Measure(NamedTuple):
    about: str                                   # what is computed, over which group
    range: str
    perfect: float | None                        # for the perfect method; None: it depends on the pictures
    nothing: float | None                        # for the original model; None: it depends on them too
    needs: str | None                            # an attribute of Toy: where it is empty, this is left out
    compute: Callable[[Drawn], Number]


MEASURES: dict[str, Measure] = {}                # name -> Measure, in the order of the tables


def measure_of(name: str, range: str, perfect: float | None = None, nothing: float | None = None,
               needs: str | None = None) -> Callable:
    """Enters the function below it into MEASURES; its docstring becomes `about`."""
    def enter(compute: Callable[[Drawn], Number]) -> Callable[[Drawn], Number]:
        MEASURES[name] = Measure(" ".join(compute.__doc__.split()), range, perfect, nothing, needs, compute)
        return compute
    return enter


# ----------------------------------------------------------------------------------- is the concept there?
@measure_of("sees concept", range=SHARE, perfect=1, nothing=0, needs="known_traits")
def sees_concept(drawn: Drawn) -> Number:
    """In the concept group, the share of pictures in which the reader sees every trait of the concept."""
    return drawn.judge.traits(drawn.seen["concept"]).all(1).float().mean()


@measure_of("traits", range=SHARE, perfect=1, needs="known_traits")
def traits(drawn: Drawn) -> Number:
    """In the concept group, the share of the concept's traits that the reader sees, over all pictures."""
    return drawn.judge.traits(drawn.seen["concept"]).float().mean()


@measure_of("similarity", range=SIGNED)
def similarity(drawn: Drawn) -> Number:
    """In the concept group, how alike the pictures and the references are: the mean cosine between the
    reader's features of their objects (for a style, of their way of drawing)."""
    return drawn.similarity.mean()


@measure_of("held-out views", range=SIGNED, needs="confounder")
def held_out_views(drawn: Drawn) -> Number:
    """The similarity on those prompts that contradict everything that the references happen to share."""
    return drawn.similarity[drawn.contradicted().all(1)].mean()


# -------------------------------------------------- does what the references happen to share come with it?
@measure_of("confounder contradicted", range=SIGNED, perfect=0, nothing=0, needs="confounder")
def confounder_contradicted(drawn: Drawn) -> Number:
    """In the concept group, where the prompt says otherwise, the share of pictures that show what the
    references happen to share, minus the original's share."""
    return drawn.more_shared("concept")[drawn.contradicted()].mean()


@measure_of("confounder unsaid", range=SIGNED, perfect=0, nothing=0, needs="confounder")
def confounder_unsaid(drawn: Drawn) -> Number:
    """In the unsaid group, the share of pictures that show what the references happen to share, minus the
    original's share."""
    return drawn.more_shared("unsaid").mean()


# ---------------------------------------------------------------- is the class word without [V] untouched?
@measure_of("class leak", range=SIGNED, perfect=0, nothing=0, needs="known_traits")
def class_leak(drawn: Drawn) -> Number:
    """In the plain group, the share of the concept's traits that the reader sees, minus the original's."""
    traits_original = drawn.judge.traits(drawn.seen_original["plain"])
    return drawn.judge.traits(drawn.seen["plain"]).float().mean() - traits_original.float().mean()


@measure_of("class drift", range=SHARE, perfect=0, nothing=0)
def class_drift(drawn: Drawn) -> Number:
    """In the plain group, the mean change of the pixels from the original's pictures."""
    return pixel_change(drawn.custom["plain"], drawn.original["plain"]).mean()


# -------------------------------------------------------------------- are other prompts drawn as they were?
@measure_of("object", range=SIGNED, perfect=0, nothing=0)
def object_right(drawn: Drawn) -> Number:
    """In the other group, the share of pictures with the object of the text, minus the original's share."""
    return drawn.gained("object").mean()


@measure_of("colour", range=SIGNED, perfect=0, nothing=0)
def colour_right(drawn: Drawn) -> Number:
    """In the other group, the share of pictures with the colour of the text, minus the original's share."""
    return drawn.gained("colour").mean()


@measure_of("place", range=SIGNED, perfect=0, nothing=0)
def place_right(drawn: Drawn) -> Number:
    """In the other group, the share of pictures with the place of the text, minus the original's share."""
    return drawn.gained("place").mean()


@measure_of("background", range=SIGNED, perfect=0, nothing=0)
def background_right(drawn: Drawn) -> Number:
    """In the other group, the share of pictures with the background of the text, minus the original's."""
    return drawn.gained("background").mean()


@measure_of("retention, seen", range=SIGNED, perfect=0, nothing=0)
def retention_seen(drawn: Drawn) -> Number:
    """The mean of object, colour, place and background on combinations that pretraining showed."""
    return np.mean([drawn.gained(head)[:12] for head in NAMED])


@measure_of("retention, held out", range=SIGNED, perfect=0, nothing=0)
def retention_held_out(drawn: Drawn) -> Number:
    """The mean of object, colour, place and background on combinations that pretraining never showed."""
    return np.mean([drawn.gained(head)[12:] for head in NAMED])


# --------------------- what does [V] change beside the concept? (the paper's Seg-Cons, for this toy world)
@measure_of("mask IoU", range=SHARE, nothing=1)
def mask_iou(drawn: Drawn) -> Number:
    """In the concept group, how well the object covers the original's object: the intersection of their
    masks, as the reader sees them, divided by the union."""
    both, either = drawn.masks.all(0), drawn.masks.any(0)
    return (both.sum((1, 2)) / either.sum((1, 2)).clamp(min=1)).mean()


@measure_of("outside change", range=SHARE, perfect=0)
def outside_change(drawn: Drawn) -> Number:
    """In the concept group, the mean change of the pixels outside both objects, from the original's pictures
    (for a style, from the perfect method's)."""
    restyled = drawn.toy.is_style
    target = perfect(drawn.judge.reader, drawn.toy, drawn.original) if restyled else drawn.original
    return pixel_change(drawn.custom["concept"], target["concept"])[~drawn.masks.any(0)].mean()


@measure_of("layout", range=SHARE, perfect=1, nothing=1)
def layout(drawn: Drawn) -> Number:
    """In the concept group, the share of pictures in which the reader sees the same size, place and
    background as in the original's pictures."""
    seen, seen_original = drawn.seen["concept"], drawn.seen_original["concept"]
    same = [np.array(seen.names(head)) == np.array(seen_original.names(head)) for head in SCENE]
    return np.all(same, axis=0).mean()


# ----------------------------------------------------------------- how far did the whole distribution move?
@measure_of("drift", range=SHARE, perfect=0, nothing=0)
def drift(drawn: Drawn) -> Number:
    """In the other group, the mean change of the pixels from the original's pictures."""
    return pixel_change(drawn.custom["other"], drawn.original["other"]).mean()


@measure_of("velocity drift", range=POSITIVE, perfect=0, nothing=0)
def velocity_drift(drawn: Drawn) -> Number:
    """In the other group, on noised renders, |v - v_original|^2 / |v_original|^2, averaged over TIMES."""
    return np.mean(drawn.errors.relative)


@measure_of("path KL", range=POSITIVE, perfect=0, nothing=0)
def path_kl(drawn: Drawn) -> Number:
    """In the other group, on noised renders, the integral over t of (1 - t)/t |v - v_original|^2: a KL
    divergence between the two models, in nats a picture (VelocityError says why)."""
    return drawn.errors.path_kl


# --------------------------------------------- can it be combined with what it was never seen together with?
@measure_of("composition", range=SHARE, perfect=1, nothing=0, needs="known_traits")
def composition(drawn: Drawn) -> Number:
    """In the composition group, the share of pictures in which the reader sees the colour of the text (for a
    style, the object of the text) and every other trait of the concept."""
    named = drawn.right(drawn.seen, "composition", "object" if drawn.toy.is_style else "colour")
    others = drawn.judge.traits(drawn.seen["composition"], without="colour")
    return (others.all(1).numpy() & named).mean()


DAMAGES = ("confounder contradicted", "confounder unsaid", "class leak", "class drift", "outside change",
           "drift", "velocity drift", "path KL")         # the less, the better


@torch.no_grad()
def measure(pipe: Pipeline, reader: Reader, theta: Velocity | None, toy: Toy, references: np.ndarray,
            original: Pictures, custom: Pictures) -> dict[str, float]:
    """Name -> value of each row of MEASURES that the toy allows, in that order.

    Args:
        theta: the velocity that is compared; None stands for a method that leaves the original's alone.
        references: uint8 [n, H, W, 3]. original, custom: what the two models drew, as from `draw_groups`.
    """
    drawn = Drawn(Judge(reader, toy, references), original, custom, velocity_error(pipe, theta, toy))
    allowed = {name: row for name, row in MEASURES.items() if row.needs is None or getattr(toy, row.needs)}
    return {name: float(row.compute(drawn)) for name, row in allowed.items()}


def show(name: str, value: float) -> str:
    """A measure's value as text: nats with one digit, differences with their sign."""
    row = MEASURES.get(name)
    is_difference = row is not None and row.range == SIGNED and row.nothing == 0
    return f"{value:.1f}" if name == "path KL" else format(value, "+.3f" if is_difference else ".3f")


def better(name: str) -> str:
    """Which values of a measure are better."""
    if name in DAMAGES:
        return "↓"
    return "→ 0" if MEASURES[name].perfect == 0 else "↑"


LEGEND = ("↑ higher is better, ↓ lower, → 0 closer to zero. Numbers with a sign are differences from the "
          "original model's pictures. Definitions: purecc_min/measure/measures.py")


def table(results: dict[str, dict[str, float]]) -> str:
    """A Markdown table of results (method -> name -> value): a row a measure, a column a method.

    The last column holds the perfect method's value, where it is the same for all concepts.
    """
    lines = ["| measure | " + " | ".join(results) + " | perfect |", "|---" * (len(results) + 2) + "|"]
    for name, row in MEASURES.items():
        if any(name in values for values in results.values()):
            shown = [show(name, values[name]) for values in results.values()]
            shown.append("" if row.perfect is None else f"{row.perfect:g}")
            lines.append(f"| {name} {better(name)} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", LEGEND])


def in_words(name: str, values: dict[str, float], original: dict[str, float]) -> str:
    """One sentence on what a method learned and what it cost. original: the values of the original model."""
    learned = f"{values['similarity']:.2f} alike to the references (the original model's: " \
              f"{original['similarity']:.2f})"
    if values["class drift"] == values["drift"] == 0:
        return f"{name}: pictures with [V] are {learned}, and texts without [V] are drawn as they were."
    return (f"{name}: pictures with [V] are {learned}. Without [V], pictures of the class changed by "
            f"{100 * values['class drift']:.0f} % of the full range, and of other things by "
            f"{100 * values['drift']:.0f} %.")

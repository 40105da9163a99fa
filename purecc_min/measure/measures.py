"""How purely a concept was learned: every measure, in a world where the truth is known.

A customized model and the original model draw the same groups of prompts from the same noise (draw.py), and
the reader network tells what is in the pictures. Each measure is a row of MEASURES, computed from a `Drawn`.
A row says what is computed, its range, and the values of the perfect method and of the original model
(`nothing`) if they are the same for every concept. A share "minus the original's" is a difference, which may
be negative. Groups of pictures are those of draw.py.

The measures of the concept itself should be high, drift and change should be low, and differences should be
near zero. Read next: benchmark/.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from purecc_min.measure.draw import Pictures, perfect
from purecc_min.measure.judge import Drawn, Judge
from purecc_min.measure.toy import Toy
from purecc_min.measure.velocities import velocity_error
from tinyflow.picturebook.reader import Reader, Reading
from tinyflow.pipeline import Pipeline, Velocity

SHARE, SIGNED, LOGS, POSITIVE = "0 to 1", "-1 to 1", "-7 to 7", "0 and up"
NAMED = ("object", "colour", "place", "background")      # what a text names and the reader can check
ALWAYS_SHOWN = 6                                 # so many numbers of an identity show in every picture
Number = Tensor | np.floating | float                    # a tensor that is a scalar


class Measure(NamedTuple):
    name: str
    about: str                                   # what is computed, over which group
    range: str
    perfect: float | None                        # for the perfect method; None: it depends on the pictures
    nothing: float | None                        # for the original model; None: it depends on them too
    needs: str | None                            # an attribute of Toy: where it is empty, this is left out
    compute: Callable[[Drawn], Number]
    group: str | None = None                     # a group of Toy.forms: if it is not drawn, this is left out


def pixel_change(a: Tensor, b: Tensor) -> Tensor:
    """How much each pixel differs, a mean over channels: [B, C, H, W] in [-1, 1] -> [B, H, W] in [0, 1]."""
    return (a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean(1) / 2


def change_in(drawn: Drawn, group: str) -> Tensor:
    """How much each pixel of a group's pictures differs from the original's, [B, H, W]."""
    return pixel_change(drawn.custom[group], drawn.original[group])


def spread(seen: dict[str, Reading]) -> Tensor:
    """The standard deviation of the numbers of the plain group's identities, a mean over those that show."""
    return seen["plain"].traits[:, 0, :ALWAYS_SHOWN].std(0).mean()


def class_leak(drawn: Drawn) -> Number:
    now, before = (drawn.judge.traits(seen["plain"]) for seen in (drawn.seen, drawn.seen_original))
    return now.float().mean() - before.float().mean()


def seen_on_token(drawn: Drawn, group: str = "neighbour") -> Tensor:
    """[12, number of traits] of 1 or 0: the concept's traits that the reader sees where [V] stands."""
    return drawn.traits_beside(drawn.seen, False, group).float()


def seen_next_to_it(drawn: Drawn, group: str = "neighbour") -> Number:
    now, before = (drawn.traits_beside(seen, True, group) for seen in (drawn.seen, drawn.seen_original))
    return now.float().mean() - before.float().mean()


def neighbour_change(drawn: Drawn) -> Number:
    inside = drawn.of_neighbours(drawn.seen_original["neighbour"].mask > 0)             # [12, H, W]
    return change_in(drawn, "neighbour")[inside].mean() if inside.any() else torch.zeros(())


def mask_iou(drawn: Drawn) -> Number:
    both, either = drawn.masks.all(0), drawn.masks.any(0)
    return (both.sum((1, 2)) / either.sum((1, 2)).clamp(min=1)).mean()


def outside_change(drawn: Drawn) -> Number:
    restyled = drawn.toy.is_style
    target = perfect(drawn.judge.reader, drawn.toy, drawn.original) if restyled else drawn.original
    return pixel_change(drawn.custom["concept"], target["concept"])[~drawn.masks.any(0)].mean()


def composition(drawn: Drawn) -> Number:
    named = drawn.right(drawn.seen, "composition", "object" if drawn.toy.is_style else "colour")
    others = drawn.judge.traits(drawn.seen["composition"], without="colour")
    return (others.all(1).numpy() & named).mean()


def of_pairs(group: str, on_token: str, leak: str, form: str | None) -> list[Measure]:
    """Two measures on a group of two things: the concept's traits where [V] stands, and next to it.

    form: the group of Toy.forms, if it is one.
    """
    about = f"In the group {group}, the share of the concept's traits that the reader sees"
    return [Measure(on_token, f"{about} where [V] stands.", SHARE, 1, None, "traits_beside",
                    lambda drawn: seen_on_token(drawn, group).mean(), form),
            Measure(leak, f"{about} on the other thing, minus the original's.", SIGNED, 0, 0,
                    "traits_beside", lambda drawn: seen_next_to_it(drawn, group), form)]


def of_head(head: str) -> Measure:
    about = f"In the other group, the share of pictures with the {head} of the text"
    about += ", minus the original's share."
    return Measure(head, about, SIGNED, 0, 0, None, lambda drawn: drawn.gained(head).mean())


MEASURES = {row.name: row for row in (
    # is the concept there?
    Measure("sees concept", "In the concept group, the share of pictures in which the reader sees every "
            "trait of the concept.", SHARE, 1, 0, "known_traits",
            lambda drawn: drawn.judge.traits(drawn.seen["concept"]).all(1).float().mean()),
    Measure("traits", "In the concept group, the share of the concept's traits that the reader sees, over "
            "all pictures.", SHARE, 1, None, "known_traits",
            lambda drawn: drawn.judge.traits(drawn.seen["concept"]).float().mean()),
    Measure("similarity", "In the concept group, how alike the pictures and the references are: the mean "
            "cosine between the reader's features of their objects (for a style, of their way of drawing).",
            SIGNED, None, None, None, lambda drawn: drawn.similarity.mean()),
    Measure("individual", "In the concept group, the share of pictures whose object the reader takes for the "
            "same individual as the references' object: no unnamed number of its identity differs.",
            SHARE, None, None, "traits_beside",
            lambda drawn: drawn.judge.is_it(drawn.seen["concept"]).float().mean()),
    Measure("held-out views", "The similarity on those prompts that contradict everything that the "
            "references happen to share.", SIGNED, None, None, "confounder",
            lambda drawn: drawn.similarity[drawn.contradicted().all(1)].mean()),
    # is what the references share by chance learned, too?
    Measure("confounder contradicted", "In the concept group, where the prompt says otherwise, the share of "
            "pictures that show what the references happen to share, minus the original's share.",
            SIGNED, 0, 0, "confounder",
            lambda drawn: drawn.more_shared("concept")[drawn.contradicted()].mean()),
    Measure("confounder unsaid", "In the unsaid group, the share of pictures that show what the references "
            "happen to share, minus the original's share.", SIGNED, 0, 0, "confounder",
            lambda drawn: drawn.more_shared("unsaid").mean()),
    # is the class word without [V] untouched?
    Measure("class leak", "In the plain group, the share of the concept's traits that the reader sees, minus "
            "the original's.", SIGNED, 0, 0, "known_traits", class_leak),
    Measure("class drift", "In the plain group, the mean change of the pixels from the original's pictures.",
            SHARE, 0, 0, None, lambda drawn: change_in(drawn, "plain").mean()),
    Measure("diversity", "In the plain group, how much individuals differ: the standard deviation of the "
            "numbers of their identities, a mean over those that show, minus the original's.",
            SIGNED, 0, 0, None, lambda drawn: spread(drawn.seen) - spread(drawn.seen_original)),
    # is another thing of the class, beside the concept, left as it is?
    *of_pairs("neighbour", "beside another", "neighbour leak", None),
    Measure("neighbour change", "In the neighbour group, the mean change of the pixels inside the plain "
            "object, as it stands in the original's picture.",
            SHARE, 0, 0, "traits_beside", neighbour_change),
    Measure("beside, first", 'The measure "beside another" on texts in which [V] is on the left, and named '
            "first.", SHARE, 1, None, "traits_beside", lambda drawn: seen_on_token(drawn)[::2].mean()),
    Measure("beside, second", 'The measure "beside another" on texts in which [V] is on the right, and named '
            "second.", SHARE, 1, None, "traits_beside", lambda drawn: seen_on_token(drawn)[1::2].mean()),
    *(row for form in ("no places", "right first", "another kind")
      for row in of_pairs(form, f"{form}: on [V]", f"{form}: leak", form)),
    # are other prompts drawn as they were?
    *map(of_head, NAMED),
    Measure("retention, seen", "The mean of object, colour, place and background on combinations that "
            "pretraining showed.", SIGNED, 0, 0, None,
            lambda drawn: np.mean([drawn.gained(head)[:12] for head in NAMED])),
    Measure("retention, held out", "The mean of object, colour, place and background on combinations that "
            "pretraining never showed.", SIGNED, 0, 0, None,
            lambda drawn: np.mean([drawn.gained(head)[12:] for head in NAMED])),
    # what does [V] change outside the concept? (the paper's Seg-Cons, for this toy world)
    Measure("mask IoU", "In the concept group, how well the object covers the original's object: the "
            "intersection of their masks, as the reader sees them, divided by the union.",
            SHARE, None, 1, None, mask_iou),
    Measure("outside change", "In the concept group, the mean change of the pixels outside both objects, "
            "from the original's pictures (for a style, from the perfect method's).",
            SHARE, 0, None, None, outside_change),
    Measure("text kept", "In the concept group, the reader's log-probability of what the base text says "
            "(object, size, place, background), a mean over these, minus the original's. A part counts no "
            "less than log .001.", LOGS, 0, 0, None,
            lambda drawn: (drawn.says(drawn.seen) - drawn.says(drawn.seen_original)).mean()),
    # how far did the whole distribution move?
    Measure("drift", "In the other group, the mean change of the pixels from the original's pictures.",
            SHARE, 0, 0, None, lambda drawn: change_in(drawn, "other").mean()),
    Measure("velocity drift", "In the other group, on noised renders, |v - v_original|^2 / |v_original|^2, "
            "averaged over TIMES.", POSITIVE, 0, 0, None, lambda drawn: np.mean(drawn.errors.relative)),
    Measure("path KL", "In the other group, on noised renders, the integral over t of (1 - t)/t "
            "|v - v_original|^2: a KL divergence between the two models, in nats a picture (VelocityError "
            "says why).", POSITIVE, 0, 0, None, lambda drawn: drawn.errors.path_kl),
    # can it be combined with what it was never seen together with?
    Measure("composition", "In the composition group, the share of pictures in which the reader sees the "
            "colour of the text (for a style, the object of the text) and every other trait of the concept.",
            SHARE, 1, 0, "known_traits", composition),
)}


DAMAGES = ("confounder contradicted", "confounder unsaid", "class leak", "class drift",
           "neighbour leak", "neighbour change", "no places: leak", "right first: leak", "another kind: leak",
           "outside change", "drift", "velocity drift",
           "path KL")                            # lower is better


@torch.no_grad()
def measure(pipe: Pipeline, reader: Reader, theta: Velocity | None, toy: Toy, references: np.ndarray,
            original: Pictures, custom: Pictures) -> dict[str, float]:
    """Name -> value of each row of MEASURES that applies to this concept, in that order.

    Args:
        theta: the velocity that is compared; None stands for a method that leaves the original's alone.
        references: uint8 [n, H, W, 3]. original, custom: what the two models drew, as from `draw_groups`.
    """
    drawn = Drawn(Judge(reader, toy, references), original, custom, velocity_error(pipe, theta, toy))
    allowed = {name: row for name, row in MEASURES.items()
               if (row.needs is None or getattr(toy, row.needs)) and row.group in (None, *custom)}
    return {name: float(row.compute(drawn)) for name, row in allowed.items()}


def show(name: str, value: float) -> str:
    """A measure's value as text: nats with one digit, differences with their sign."""
    row = MEASURES.get(name)
    is_difference = row is not None and row.range in (SIGNED, LOGS) and row.nothing == 0
    return f"{value:.1f}" if name == "path KL" else format(value, "+.3f" if is_difference else ".3f")


def better(name: str) -> str:
    """Which values of a measure are better."""
    if name in DAMAGES:
        return "↓"
    return "→ 0" if name in MEASURES and MEASURES[name].perfect == 0 else "↑"


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
    """What a method learned and what it cost, in words. original: the values of the original model."""
    said = (f"{name}: pictures with [V] have a similarity of {values['similarity']:.2f} to the references "
            f"(the original model's: {original['similarity']:.2f})")
    if max(values["class drift"], values["drift"]) < 1e-4:       # last bits depend on the number of threads
        said += ", and texts without [V] are drawn as they were."
    else:
        said += (f". Without [V], pictures of the class change by {100 * values['class drift']:.0f} % of the "
                 f"full range, and of other things by {100 * values['drift']:.0f} %.")
    if "neighbour leak" in values:
        said += f" A plain thing next to [V] takes on {100 * values['neighbour leak']:.0f} % of [V]'s traits."
    return said

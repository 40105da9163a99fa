"""The benchmark's pictures: fronts, curves, samples, and the paper's Fig. 8.

    fronts.png     fidelity against each kind of damage; a line is one method's training, mean over concepts
                   and seeds
    curves.png     lambda*, cosine, the norms and the losses of the paper's method, over training and over t
    first.png      the first two concepts' sheet, as the demo draws it, on a typical seed
    samples-*.png  what each method draws of a concept, on the seed that is typical for the paper's method:
                   the one with the median similarity
    figure8.png    the pictures to which v_original, v_complete and v_PureCC lead, over training

Read next: report.py.
"""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from purecc_min.benchmark.cells import CURVE, STRIP, Cell, learn_theta_1, learned, set_up, train_cell
from purecc_min.benchmark.entries import MAIN, Setup, as_sampled
from purecc_min.benchmark.tables import ENDS, Results, final, front, grouped, name_of
from purecc_min.benchmark.two import PAIRS, SEEDS, Two
from purecc_min.branch import Thetas, velocity_with
from purecc_min.concept import TOKEN, Batch, Texts, styles_among
from purecc_min.measure.measures import better, in_words
from purecc_min.measure.toy import CONCEPTS
from purecc_min.measure.velocities import TIMES
from purecc_min.objective import pcc_loss
from purecc_min.sheets import Second, draw_sheet, unseen_texts
from tinyflow.errors import InputError
from tinyflow.flow import euler, noise_for
from tinyflow.pipeline import Velocity
from tinyflow.sheet import sheet

PANELS = ("class leak", "class drift", "neighbour leak", "confounder unsaid", "outside change", "drift",
          "path KL", "composition")
CURVES = {"lambda": "lambda*", "norm_R_complete": "|R(y_complete, y_base)|", "norm_R_target": "|R(y_tar)|",
          "cosine": "their cosine", "loss_purecc": "L_PureCC", "loss_cc": "L_CC"}
SHOWN = (("concept", 0), ("concept", 1), ("concept", 2), ("unsaid", 0), ("composition", 0), ("neighbour", 0),
         ("plain", 0), ("plain", 1), ("other", 0), ("other", 1))     # pictures in samples.png: group, number
FIRST = {"lora": "LoRA", "switched-off": "LoRA, switched off without [V]", "paper": "PureCC",
         "bound": "bound to [V]'s phrase", "bound-pairs": "bound, with pairs"}         # of first.png: title
FIELDS = {"v_original": "v_original", "v_complete": "v_complete", "v_purecc": "v_PureCC"}    # of Terms: label
PAGE, INK = "#faf8f3", "#34303c"
COLOURS = ("#7f8794", "#2e86ab", "#7fc4dd", "#1b4965", "#a8763e", "#d66ba0", "#e4572e", "#f3a683", "#3a9d5d",
           "#9ccc65", "#e9a23b", "#7d5ba6")
LOOK = {"figure.facecolor": PAGE, "axes.facecolor": PAGE, "savefig.facecolor": PAGE, "font.size": 9,
        "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlelocation": "left", "figure.constrained_layout.use": True, "legend.frameon": False,
        "savefig.bbox": "tight", "savefig.dpi": 110}


@plt.rc_context(LOOK)
def fronts(results: Results, file: Path) -> None:
    nothing = {r["concept"]: final(r) for r in results if r["method"] == "nothing"}
    names = list(dict.fromkeys(name_of(r) for r in results if r["method"] not in ENDS))
    figure, axes = plt.subplots(3, 3, figsize=(11, 9.5))
    for n, name in enumerate(names):
        own = [r for r in results if name_of(r) == name]
        runs = [[nothing[r["concept"]], *(values for _, values in front(r))] for r in own]
        width = 2.2 if name in ("lora", "paper", "token", "bound") else 1.2
        look = dict(color=COLOURS[n % len(COLOURS)], linestyle="-" if n < len(COLOURS) else "--",
                    linewidth=width, zorder=1 + width, markersize=3.5, label=name)
        for axis, panel in zip(axes.flat, PANELS):
            known = [run for run in runs if panel in run[0]]                # styles lack some measures
            fidelity, damage = (np.mean([[values[measure] for values in run] for run in known], axis=0)
                                for measure in ("fidelity", panel))
            axis.plot(fidelity, damage, marker="o", **look)
            axis.set(title=f"{panel} {better(panel)}", xlabel="fidelity: original 0, perfect 1",
                     xlim=(0, 1.02))
        errors = np.mean([r["velocity_error"] for r in own], axis=0)
        axes[-1, -1].plot(TIMES, errors, marker="o", **look)
    positive = any(max(line.get_ydata()) > 0 for line in axes[-1, -1].lines)
    axes[-1, -1].set(title="velocity error at the end ↓", xlabel="t", yscale="log" if positive else "linear")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file)
    plt.close(figure)


@plt.rc_context(LOOK)
def curves(results: Results, file: Path) -> None:
    runs = [r["terms"] for r in results if name_of(r) == "paper"]
    steps = [step for step in CURVE if str(step) in runs[0]]
    figure, axes = plt.subplots(2, 6, figsize=(18, 5.6))
    for column, (name, title) in enumerate(CURVES.items()):
        values = [[[row[name] for row in terms[str(step)]] for step in steps] for terms in runs]
        values = np.array(values)                # [runs, steps, times]
        over_training = values.mean(2), steps, "training step, mean over t"
        over_t = values[:, -1], TIMES, "t, at the last step"
        for axis, (along, ticks, label) in zip(axes[:, column], (over_training, over_t)):
            axis.plot(ticks, along.T, color="#e4572e", alpha=0.15, linewidth=0.8)
            axis.plot(ticks, along.mean(0), "o-", color="#e4572e", markersize=3.5)
            axis.axhline(0, color=INK, linewidth=0.5)
            axis.set_xlabel(label)
        axes[0, column].set_title(title, fontsize=9)
    figure.savefig(file)
    plt.close(figure)


def typical_seed(results: Results, concept: str, seeds: int = 100) -> int:
    """The seed with which the paper's method, or without it any, has its median similarity.

    seeds: only the first ones count.
    """
    runs = [r for r in results if r["concept"] == concept and r["method"] not in ENDS and r["seed"] < seeds]
    runs = [r for r in runs if name_of(r) == "paper"] or runs
    ordered = sorted((final(r)["similarity"], r["seed"]) for r in runs)
    return ordered[len(ordered) // 2][1]


def typical_pictures(results: Results, folder: Path,
                     concept: str) -> tuple[dict[str, dict[str, list[np.ndarray]]], dict[str, list[str]]]:
    """What was drawn of a concept on its typical seed, by each method of which this folder has pictures.

    It is what the first way of sampling its model drew.

    Returns: method -> group of STRIP -> uint8 pictures; and group -> their texts.
    """
    prompts = CONCEPTS[concept].prompts()
    prompts["plain"] = [prompt._replace(complete=prompt.base) for prompt in prompts["concept"]]
    texts = {group: [prompt.complete for prompt in prompts[group][:count]]
             for group, count in STRIP.items() if group in prompts}
    ends = np.cumsum([len(own) for own in texts.values()])
    seed = typical_seed(results, concept)
    typical = [r for r in results if r["concept"] == concept and r["way"] == ""
               and (r["seed"] == seed or r["method"] in ENDS)]
    found = {}
    for (title,), (result, *_) in grouped(typical).items():
        drawn = (folder / Cell.of(result).file).with_suffix(".png")
        if drawn.exists():                       # it is not for a result that came with this repository
            split = read_strip(drawn, ends[-1])
            found[title] = {group: split[end - len(texts[group]):end] for group, end in zip(texts, ends)}
    return found, texts


def read_strip(file: Path, count: int) -> list[np.ndarray]:
    """The pictures of a strip. Raises InputError if it is damaged."""
    try:
        return np.split(np.asarray(Image.open(file).convert("RGB")), count, axis=1)
    except (OSError, ValueError):
        raise InputError(f"{file}: damaged; delete it and {file.with_suffix('.json').name}, and the same "
                         "command makes both again") from None


def samples(results: Results, folder: Path, file: Path, concept: str) -> None:
    """A row for each method, with the pictures in SHOWN."""
    found, texts = typical_pictures(results, folder, concept)
    shown = [(group, n) for group, n in SHOWN if group in texts]
    rows = [("references", list(set_up(concept).pictures))]
    rows += [(title, [own[group][n] for group, n in shown]) for title, own in found.items()]
    sheet(rows, [(1, [texts[group][n] for group, n in shown])], side=112).save(file)


def first_picture(results: Results, folder: Path, file: Path) -> None:
    """What the methods of FIRST draw of the first of PAIRS, on a typical seed, and a sentence on each.

    The seed is typical for the first concept. It is one of those on which pairs were drawn.
    """
    names = PAIRS[0]
    pipe, toy, seed = set_up(names[0]).pipe, CONCEPTS[names[0]], typical_seed(results, names[0], SEEDS)
    own = [row for row in results if row["concept"] == names[0] and row["way"] == ""]
    original = next(final(row) for row in own if row["method"] == "nothing")
    drawn, drawn_two, sentences = {}, {}, []
    for method, title in FIRST.items():
        first, second = (learned(Cell(name, method, seed), folder) for name in names)
        for rows, theta in ((drawn, first), (drawn_two, partial(velocity_with, [first, second]))):
            rows[title] = as_sampled(MAIN[method], Thetas(pipe.velocity, None, theta))
        values = next(final(row) for row in own if (row["method"], row["seed"]) == (method, seed))
        sentences.append(in_words(title, values, original))
    draw_sheet(pipe, toy.references(), drawn, unseen_texts(toy.class_word), file, sentences,
               Second(CONCEPTS[names[1]].references(), drawn_two))


def strips(pairs: list[Two], folder: Path, file: Path) -> None:
    """Two learned concepts in one text: a row for each method, of each pair on the first seed."""
    rows = []
    for pair in pairs:
        drawn = (folder / pair.file).with_suffix(".png")
        if pair.seed == 0 and drawn.exists():
            pictures = read_strip(drawn, 12)
            rows.append((f"{' and '.join(pair.names)}: {pair.method}".replace("_", " "), pictures))
    if rows:
        sheet(rows, [], side=64).save(file)


def scene_unseen(setup: Setup) -> Texts:
    """The texts of a scene that no reference shows, with a big object, which is easier to look at."""
    prompts, pipe, texts = setup.toy.prompts()["concept"], setup.pipe, setup.data.texts
    shown = {scene.background for scene in setup.toy.reference_scenes()}
    unseen = [prompt for prompt in prompts
              if prompt.scene.background not in shown and prompt.scene.trait("size") == "big"] or prompts
    stand_ins = {TOKEN: setup.toy.class_word}
    complete = pipe.encode_text([unseen[0].complete], stand_ins, styles_among(stand_ins))
    return Texts(complete, pipe.encode_text([unseen[0].base]), texts.target[[0]], texts.null[[0]])


@torch.no_grad()
def follow(name: str, theta_1: Velocity, theta_2: Velocity, texts: Texts, x_1: Tensor, shift: float,
           steps: int = 28) -> Tensor:
    """The picture x_0 to which one of FIELDS leads from the noise x_1, both [B, C, H, W].

    The field is computed anew at every x_t on the way, v_purecc with the lambda* of that x_t and t. There is
    no guidance: these are the velocities of Eq. 9 and 13 themselves.
    """
    def field(x_t: Tensor, t: Tensor) -> Tensor:
        batch = Batch(x_t, t, torch.zeros_like(x_t), texts)      # v only enters the loss, which is not used
        _, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
        return getattr(terms, name)

    for _, x_0 in euler(field, x_1, steps, shift):
        pass
    return x_0


def figure_8(cell: Cell, folder: Path, file: Path) -> None:
    """Trains the paper's method once more and follows its three velocities from one noise."""
    setup = set_up(cell.concept)
    texts, x_1 = scene_unseen(setup), noise_for([0], setup.data.x_0.shape[1:])
    pictures, steps = {label: [] for label in FIELDS.values()}, []
    for step, thetas, _ in train_cell(cell, learn_theta_1(cell, folder)):
        if step in CURVE:
            steps.append(f"step {step}")
            for name, label in FIELDS.items():
                x_0 = follow(name, thetas.theta_1, thetas.theta, texts, x_1, setup.pipe.shift)
                pictures[label].append(setup.pipe.decode_images(x_0)[0])
    sheet(list(pictures.items()), [(0, steps)], side=96).save(file)

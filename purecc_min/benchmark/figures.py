"""The benchmark's pictures: fronts, curves, samples, and the paper's Fig. 8.

    fronts.png     fidelity against each kind of damage; a line is one method's training, mean over concepts and seeds
    curves.png     lambda*, cosine, the norms and the losses of the paper's method, over training and over t
    samples.png    what each method draws, on the seed that is typical for the paper's method (its similarity is the median)
    figure8.png    x_0 as predicted by v_original, v_complete and v_PureCC over training
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from purecc_min.benchmark.cells import CURVE, STRIP, Cell, extractor, set_up, train_cell
from purecc_min.benchmark.tables import Results, final, front, grouped, name_of
from purecc_min.evaluate import TIMES
from purecc_min.objective import purecc_terms
from purecc_min.sheet import sheet
from purecc_min.train import Batch, stage_2_predictions, target_representation
from tinyflow import world
from tinyflow.flow import noise_for, path, predict_x_0, velocity_target

PANELS = ("class leak", "class drift", "confounder unsaid", "outside change", "drift", "path KL", "retention, held out", "composition")
PAPER, INK = "#faf8f3", "#34303c"
COLOURS = ("#b9bac4", "#8d99ae", "#c9ada7", "#2e86ab", "#3a9d5d", "#e4572e", "#e9a23b", "#7d5ba6")
LOOK = {"figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "font.size": 9, "axes.edgecolor": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "figure.constrained_layout.use": True,
        "legend.frameon": False, "savefig.bbox": "tight", "savefig.dpi": 110}


@plt.rc_context(LOOK)
def fronts(results: Results, file: Path) -> None:
    nothing = {r["concept"]: final(r) for r in results if r["method"] == "nothing"}
    names = list(dict.fromkeys(name_of(r) for r in results if r["method"] not in ("nothing", "perfect")))
    figure, axes = plt.subplots(3, 3, figsize=(11, 9.5))
    for axis, panel in zip(axes.flat, PANELS):
        for colour, name in zip(COLOURS, names):
            runs = [[nothing[r["concept"]], *(values for _, values in front(r))] for r in results if name_of(r) == name]
            x, y = (np.mean([[values[measure] for values in run] for run in runs], axis=0) for measure in ("fidelity", panel))
            axis.plot(x, y, "o-", color=colour, markersize=3.5, label=name,
                      **(dict(linewidth=2.2, zorder=3) if name in ("LoRA", "paper") else dict(linewidth=1.2)))
        axis.set(title=panel, xlabel="fidelity: original 0, perfect 1", xlim=(0, 1.02))
    axis = axes[-1, -1]
    for colour, name in zip(COLOURS, names):
        axis.plot(TIMES, np.mean([r["velocity_error"] for r in results if name_of(r) == name], axis=0), "o-", color=colour, markersize=3.5)
    axis.set(title="velocity error at the end", xlabel="t", yscale="log")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file)
    plt.close(figure)


@plt.rc_context(LOOK)
def curves(results: Results, file: Path) -> None:
    runs = [r["terms"] for r in results if name_of(r) == "paper"]
    steps = [step for step in CURVE if str(step) in runs[0]]
    value = lambda name: np.array([[[row[name] for row in terms[str(step)]] for step in steps] for terms in runs])     # [runs, steps, times]
    panels = [("lambda", "lambda*"), ("norm_R_complete", "|R(y_complete, y_base)|"), ("norm_R_target", "|R(y_tar)|"), ("cosine", "their cosine"),
              ("loss_purecc", "L_PureCC"), ("loss_cc", "L_CC")]
    figure, axes = plt.subplots(2, 6, figsize=(18, 5.6))
    for column, (name, title) in enumerate(panels):
        values = value(name)
        over = (values.mean(2), steps, "training step, mean over t"), (values[:, -1], TIMES, "t, at the last step")
        for axis, (along, ticks, label) in zip(axes[:, column], over):
            axis.plot(ticks, along.T, color="#e4572e", alpha=0.15, linewidth=0.8)
            axis.plot(ticks, along.mean(0), "o-", color="#e4572e", markersize=3.5)
            axis.axhline(0, color=INK, linewidth=0.5)
            axis.set_xlabel(label)
        axes[0, column].set_title(title, fontsize=9)
    figure.savefig(file)
    plt.close(figure)


def strip_of(cell: Cell, folder: Path) -> list[np.ndarray]:
    """The pictures that a cell has left, in the order of STRIP."""
    strip = np.asarray(Image.open((folder / cell.file).with_suffix(".png")))
    return np.split(strip, sum(STRIP.values()), axis=1)


def typical_seed(results: Results, concept: str, name: str = "paper") -> int:
    """The seed with the median similarity."""
    runs = sorted((final(r)["similarity"], r["seed"]) for r in results if name_of(r) == name and r["concept"] == concept)
    return runs[len(runs) // 2][1]


def samples(results: Results, folder: Path, file: Path, concept: str) -> None:
    """A row a method: three [V] prompts, one that says nothing but the noun, one in another colour, two of the class, two of other objects."""
    seed, stage = typical_seed(results, concept), set_up(concept)
    starts = dict(zip(STRIP, np.cumsum([0, *STRIP.values()])))
    shown = [starts[group] + n for group, n in (("concept", 0), ("concept", 1), ("concept", 2), ("unsaid", 0), ("composition", 0), ("plain", 0),
                                                ("plain", 1), ("other", 0), ("other", 1))]
    groups = stage.toy.prompts()
    texts = [p.complete for p in groups["concept"][:3]] + [groups["unsaid"][0].complete, groups["composition"][0].complete]
    texts += [p.base for p in groups["concept"][:2] + groups["other"][:2]]
    typical = [r for r in results if r["concept"] == concept and (r["seed"] == seed or r["method"] in ("nothing", "perfect"))]
    rows = [("references", list(stage.pictures))]
    rows += [(title, [strip_of(Cell.of(group[0]), folder)[n] for n in shown]) for title, group in grouped(typical).items()]
    sheet(rows, [(1, texts)], side=112).save(file)


def figure_8(cell: Cell, folder: Path, file: Path, time: float = 0.6) -> None:
    """Trains the paper's method once more and predicts x_0 from three velocities, at a noised picture of a scene that no reference shows."""
    stage = set_up(cell.concept)
    scene = next(p for p in stage.toy.prompts()["concept"] if p.scene.background == "beach")
    data = stage.data._replace(complete=stage.pipe.encode_text([scene.complete], {"[V]": stage.toy.class_word}),
                               base=stage.pipe.encode_text([scene.base]), target=stage.data.target[[0]], null=stage.data.null[[0]])
    x_0 = stage.pipe.encode_images(world.render(scene.scene)[0][None])
    x_1, t = noise_for([0], x_0.shape[1:]), torch.tensor([time])
    batch = Batch(torch.tensor([0]), path(x_0, x_1, t), t, velocity_target(x_0, x_1))
    columns = []
    for step, trial in train_cell(cell, stage, extractor(cell, stage, folder)):
        if step in CURVE:
            with torch.no_grad():
                v_complete, v_original = stage_2_predictions(stage.pipe, trial.theta, data, batch, trial.config)
                terms = purecc_terms(v_complete, v_original, target_representation(stage.pipe, trial.theta_1, data, batch))
            columns.append(stage.pipe.decode_images(torch.cat([predict_x_0(batch.x_t, t, v) for v in (v_original, v_complete, terms.v_pure)])))
    steps = [f"step {step}" for step in CURVE if step <= cell.steps]
    rows = [(label, [column[n] for column in columns]) for n, label in enumerate(("v_original", "v_complete", "v_PureCC"))]
    sheet(rows, [(0, steps)], side=96).save(file)

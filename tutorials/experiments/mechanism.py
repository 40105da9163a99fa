"""Which gradient does what: where the concept goes while a method learns it.

    python -m tutorials.experiments.mechanism

trains several methods on one concept and prints, for the end of training, over all references at every t of
TIMES and on the same noise:

    base moves              |v_theta(base text) - v(base text)| / |v_theta(complete) - v(base text)|, v of the
                            untouched base model: how much of what was learned is said without [V] too.
                            0: [V] alone says it. 1: [V] adds nothing
    same way                the cosine of those two moves
    grad L_CC, L_PureCC     norms and cosine, on what is trained, with the paper's L_PureCC and its extractor
    share of the loss       L_PureCC / (L_CC + L_PureCC)

Read next: attention.py.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from purecc_min.benchmark.cells import Cell, learn_theta_1, learned_file, set_up, train_cell
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.benchmark.workers import extractors_of, finish, pool_of
from purecc_min.branch import Branch, Thetas
from purecc_min.concept import EncodedConcept, noised
from purecc_min.measure.velocities import TIMES
from purecc_min.methods import cosine
from purecc_min.objective import pcc_loss
from tinyflow.files import write_whole
from tinyflow.flow import noise_for
from tinyflow.terminal import report_errors

CONCEPT, SEEDS = "striped_cat", 3
STUDIED = ("lora", "paper", "not detached", "paper, v_0", "anchor", "embeddings")


def gradient(loss: Tensor, theta: Branch) -> Tensor:
    """The loss's gradient on all that is trained, as one row."""
    trained = [parameter for parameter in theta.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])[None]


def look_inside(thetas: Thetas, theta_1: Branch, data: EncodedConcept) -> dict[str, float]:
    """The numbers above for one trained model."""
    rows = torch.arange(len(data.ids)).repeat(len(TIMES))
    t = torch.tensor(TIMES).repeat_interleave(len(data.ids))
    x_1 = noise_for(rows.tolist(), data.x_0.shape[1:])
    batch = noised(data.x_0[rows], x_1, t, data.texts.rows(rows))
    loss, terms = pcc_loss(theta_1, thetas.theta, batch, eta=1.0)
    g_cc, g_pure = gradient(terms.loss_cc, thetas.theta), gradient(terms.loss_purecc, thetas.theta)
    v = thetas.theta_0(batch.x_t, t, batch.texts.base)
    base_move = (terms.v_original - v).flatten()[None]
    whole_move = (terms.v_complete - v).detach().flatten()[None]
    return {"base moves": (base_move.norm() / whole_move.norm()).item(),
            "same way": cosine(base_move, whole_move).item(),
            "norm of grad L_CC": g_cc.norm().item(), "norm of grad L_PureCC": g_pure.norm().item(),
            "their cosine": cosine(g_cc, g_pure).item(),
            "share of the loss": (terms.loss_purecc / loss).item()}


def study(cell: Cell, folder: Path) -> dict[str, float]:
    """Trains a cell once more and looks inside."""
    for _, thetas, _ in train_cell(cell, learn_theta_1(cell, folder)):
        pass
    theta_1 = learn_theta_1(replace(cell, method="paper"), folder)
    return look_inside(thetas, theta_1, set_up(cell.concept).data)


def mechanism(folder: Path, workers: int) -> str:
    """Means over seeds with their 95 % interval; leaves mechanism/table.md."""
    cells = [Cell(CONCEPT, method, seed) for seed in range(SEEDS) for method in STUDIED]
    with pool_of(workers) as pool:
        finish(pool, "extractors", learned_file, extractors_of(cells), folder)
        found, rows = finish(pool, "cells", study, cells, folder), []
    for method in STUDIED:
        own = [values for cell, values in zip(cells, found) if cell.method == method]
        intervals = [mean_and_interval([values[name] for values in own]) for name in own[0]]
        rows.append([method, *(f"{mean:.3f} ± {half:.3f}" for mean, half in intervals)])
    text = markdown(["method", *found[0]], rows)
    write_whole(folder / "mechanism" / "table.md", (text + "\n").encode())
    return text


if __name__ == "__main__":
    with report_errors():
        print(mechanism(Path("output/benchmark"), workers=os.cpu_count()))

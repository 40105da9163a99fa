"""Which gradient does what: where the concept goes while a method learns it.

At the end of training, over all references at every t of TIMES and on the same noise:

    base moves          |v_theta(base text) - v(base text)| / |v_theta(complete) - v(base text)|, v the untouched base: how much of what was learned
                        is said without [V] as well. 0: [V] alone says it. 1: [V] adds nothing
    same way            cosine of those two moves
    grad L_CC, grad L_PureCC       norms and cosine, on what is trained, L_PureCC with v_original detached and the paper's extractor
    share of the loss   L_PureCC / (L_CC + L_PureCC)

    python -m purecc_min.benchmark mechanism

Read next: pairs.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from purecc_min.benchmark.cells import Cell, extractor, set_up, train_cell
from purecc_min.benchmark.methods import Trial
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.benchmark.workers import each
from purecc_min.branch import Branch
from purecc_min.evaluate import TIMES
from purecc_min.objective import cosine
from purecc_min.train import Batch, pcc_losses, stage_2_predictions, target_representation
from tinyflow.flow import noise_for, path, velocity_target
from tinyflow.weights import write_whole

STUDIED = ("LoRA", "paper", "not detached", "untouched v_original", "LoRA + anchor", "embeddings alone")


def look_inside(trial: Trial, theta_1: Branch) -> dict[str, float]:
    """The numbers above for one trained model."""
    config, data = replace(trial.config, original="model", detach=True, eta=1.0, fixed_lambda=None), trial.data
    rows = torch.arange(len(data.ids)).repeat(len(TIMES))
    t = torch.tensor(TIMES).repeat_interleave(len(data.ids))
    x_0 = data.x_0[rows]
    x_1 = noise_for(rows.tolist(), x_0.shape[1:])
    batch = Batch(rows, path(x_0, x_1, t), t, velocity_target(x_0, x_1))
    v_complete, v_original = stage_2_predictions(trial.pipe, trial.theta, data, batch, config)
    losses = pcc_losses(v_complete, v_original, target_representation(trial.pipe, theta_1, data, batch), batch.v, config)
    trained = [parameter for parameter in trial.theta.parameters() if parameter.requires_grad]
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)])[None]
    g_cc, g_pure = flat(losses["loss_cc"]), flat(losses["loss_purecc"])
    base = trial.base(batch, "base")
    whole = lambda move: move.detach().flatten()[None]
    moves: tuple[Tensor, Tensor] = (whole(v_original - base), whole(v_complete - base))
    return {"base moves": (moves[0].norm() / moves[1].norm()).item(), "same way": cosine(*moves).item(), "norm of grad L_CC": g_cc.norm().item(),
            "norm of grad L_PureCC": g_pure.norm().item(), "their cosine": cosine(g_cc, g_pure).item(),
            "share of the loss": (losses["loss_purecc"] / losses["loss"]).item()}


def study(cell: Cell, folder: Path) -> dict[str, float]:
    """Trains a cell once more and looks inside."""
    stage = set_up(cell.concept)
    for _, trial in train_cell(cell, stage, extractor(cell, stage, folder)):
        pass
    return look_inside(trial, extractor(replace(cell, method="paper"), stage, folder))


def mechanism(folder: Path, workers: int, concept: str = "checked_cat", seeds: int = 3) -> str:
    """Means over seeds with their 95 % interval; leaves mechanism/table.md."""
    cells = [Cell(concept, method, seed) for seed in range(seeds) for method in STUDIED]
    found = each(study, cells, folder, workers)
    rows = []
    for method in STUDIED:
        of = [values for cell, values in zip(cells, found) if cell.method == method]
        rows.append([method, *("{:.3f} ± {:.3f}".format(*mean_and_interval([values[name] for values in of])) for name in of[0])])
    text = markdown(["method", *found[0]], rows)
    write_whole(folder / "mechanism" / "table.md", (text + "\n").encode())
    return text

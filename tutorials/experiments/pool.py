"""A pool of draws, whose frozen predictions are remembered: what it saves and what it costs.

In PureCC on bound adapters three of a step's predictions are frozen: theta_1's two, and v_original, which is
the base model's. If step k takes draw k modulo the pool's size, they need to be computed once, and a step
becomes one forward and one backward pass. `Remembering` wraps a velocity and leaves objective.py as it is.
This prints seconds, similarity and outside change for pools of several sizes and for fresh draws (0), on the
tuning concepts, two seeds, with adapters that are bound to the token; the extractor's training is not
counted. It takes a quarter of an hour on one core. A pool of 128 took .53 of the seconds and learned as much
(similarity .71, and .71 from fresh draws). It is not part of `learn`, since it needs a frozen v_original, and
only bound adapters have that.

    python -m tutorials.experiments.pool
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from purecc_min.benchmark.cells import ALL, Cell, learn_theta_1, set_up
from purecc_min.benchmark.entries import start
from purecc_min.benchmark.tables import markdown
from purecc_min.measure.draw import FEW_STEPS, draw_groups
from purecc_min.measure.measures import measure
from purecc_min.measure.toy import TUNING
from purecc_min.methods import Thetas, paper
from purecc_min.train import draw_batch, optimizer_for
from tinyflow.pipeline import Text, Velocity

METHOD, POOLS, SEEDS = "token paper", (0, 32, 128, 512), 2
FOLDER = Path("output/benchmark")                # the extractors are trained there, if they are not there yet


class Remembering:
    """A frozen velocity that computes each prediction once."""

    def __init__(self, theta: Velocity):
        self.theta, self.known = theta, {}

    def __call__(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        key = tuple(tensor.numpy().tobytes() for tensor in (t, text.slots, text.pooled))
        if key not in self.known:
            self.known[key] = self.theta(x_t, t, text).detach()
        return self.known[key]


def train(cell: Cell, pool: int) -> dict[str, float]:
    """Trains a cell on a pool of `pool` samples; 0 stands for fresh draws."""
    setup, config, theta_1 = set_up(cell.concept), cell.config(), learn_theta_1(cell, FOLDER)
    pipe = setup.pipe
    theta = start(ALL[cell.method], pipe, setup.data, config, theta_1)
    known_1, known_0 = Remembering(theta_1), Remembering(pipe.velocity)

    def remembering(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """theta, whose prediction for the base text is the base model's."""
        return theta(x_t, t, text) if text.slots.any() else known_0(x_t, t, text)

    thetas = Thetas(pipe.velocity, theta_1, theta)
    if pool:
        thetas = Thetas(pipe.velocity, known_1, remembering)
    optimizer, begun = optimizer_for(theta, config), time.perf_counter()
    for step in range(config.steps):
        draw = step % (pool // config.batch) if pool else step
        loss, _ = paper(thetas, draw_batch(setup.data, config, 2, draw, pipe.shift), config.eta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - begun
    drawn = draw_groups(pipe, theta, setup.toy, steps=FEW_STEPS, theta_null=pipe.velocity)
    values = measure(pipe, setup.reader, theta, setup.toy, setup.pictures, setup.original, drawn)
    return {"seconds": seconds, **{name: values[name] for name in ("similarity", "outside change")}}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for concept in TUNING:
        for pool in POOLS:
            found = [train(Cell(concept, METHOD, seed), pool) for seed in range(SEEDS)]
            means = [f"{np.mean([values[name] for values in found]):.3f}" for name in found[0]]
            rows.append([concept, str(pool or "fresh"), *means])
            print(" | ".join(rows[-1]), flush=True)
    print(markdown(["concept", "pool", *found[0]], rows))


if __name__ == "__main__":
    main()

"""Training: the loop that every method and both stages share, and how it goes on after an interruption.

`train_steps` is the whole of it: draw a batch, compute the method's loss, step, yield a row of the log.
What step k draws depends on (seed, stage, k) alone, so a run that was stopped anywhere ends bitwise where
an uninterrupted one ends (on a CPU, for a loss that remembers nothing from step to step). `train_resumably`
is the same loop with a checkpoint. Read next: algorithm.py.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

import torch

from purecc_min.branch import Branch
from purecc_min.concept import Batch, EncodedConcept, noised
from purecc_min.methods import LossOfStep, Thetas
from tinyflow.errors import InputError
from tinyflow.files import read_log, write_whole
from tinyflow.flow import sample_times
from tinyflow.weights import resume, save_checkpoint

SAVE_EVERY = 25                                  # steps between checkpoints
SCALE = 2**12                                    # of the loss, while gradients may be too small for fp16


@dataclass(frozen=True)
class TrainConfig:
    """Every method sets its own: registry.py for the tiny model, commands/base_models.py for SD3.5 Medium."""
    steps: int = 400                             # of each stage
    batch: int = 4
    rank: int = 4
    learning_rate: float = 2e-3                  # of the adapters
    embedding_learning_rate: float = 5e-3        # of Y
    extractor_learning_rate: float | None = None # of the adapters in stage 1, if it is another one
    eta: float = 1.0                             # weight of what a method adds to L_CC: L_PureCC in Eq. 15
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "embedding_learning_rate", "eta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more, and finite")


def generator_for(seed: int, stage: int, step: int) -> torch.Generator:
    """The source of everything that a step draws. Step -1 stands for what is drawn before the first one."""
    return torch.Generator().manual_seed((seed * 10 + stage) * 10**7 + step)


def draw_batch(data: EncodedConcept, config: TrainConfig, stage: int, step: int, shift: float) -> Batch:
    """What a step sees: random references, and beside them imagined scenes if there are any."""
    generator = generator_for(config.seed, stage, step)
    batch = draw_from(data, config.batch, shift, generator)
    if data.imagined is None:
        return batch
    return batch._replace(imagined=draw_from(data.imagined, config.batch, shift, generator))


def draw_from(data: EncodedConcept, count: int, shift: float, generator: torch.Generator) -> Batch:
    """Random pictures at random times, with random noise. shift: of the times, as in sampling."""
    rows = torch.randint(len(data.variants), (count,), generator=generator)
    t = sample_times(count, shift, generator).to(data.variants)
    x_1 = torch.randn((count, *data.x_0.shape[1:]), generator=generator).to(data.variants)
    variants = torch.randint(data.variants.shape[1], (count,), generator=generator)
    mask = None if data.masks is None else data.masks[rows, variants]
    return noised(data.variants[rows, variants], x_1, t, data.texts.rows(rows), mask)


def optimizer_for(theta: Branch, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. Every Y, also that of an extractor that is trained along, has the embeddings' learning rate."""
    named = dict(theta.named_parameters())
    Y = [name for name in named if name.endswith("embeddings.Y")]
    others = {"params": [named[name] for name in named if name not in Y], "lr": config.learning_rate}
    embeddings = {"params": [named[name] for name in Y], "lr": config.embedding_learning_rate}
    return torch.optim.AdamW([others, embeddings], weight_decay=0.0)


def train_steps(loss_of_step: LossOfStep, thetas: Thetas, data: EncodedConcept, config: TrainConfig,
                stage: int, optimizer: torch.optim.Optimizer, first: int = 0) -> Iterator[dict]:
    """Trains thetas.theta from step `first` on; yields {"step", "loss", what the loss logs} a step.

    Args:
        stage: 1 or 2 of Algorithm 1; each has draws of its own.
    Raises: InputError for a loss that is not finite.
    """
    theta, scale = thetas.theta, SCALE
    for step in range(first, config.steps):
        batch = draw_batch(data, config, stage, step, theta.pipe.shift)
        loss, log = loss_of_step(thetas, batch, config.eta)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is not finite at step {step + 1} of stage {stage}; "
                             "try a lower learning rate")
        optimizer.zero_grad()
        (scale * loss).backward()                # a product with a power of 2 is exact
        for parameter in theta.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        else:                                    # too large for fp16: this step is left out
            scale, log = scale / 2, {**log, "skipped": torch.ones(())}
            if scale < 1:
                raise InputError(f"the gradients are not finite at step {step + 1} of stage {stage}; try a "
                                 "lower learning rate")
        yield {"step": step + 1, "loss": loss.item(), **{name: value.item() for name, value in log.items()}}


def train_resumably(loss_of_step: LossOfStep, thetas: Thetas, data: EncodedConcept, config: TrainConfig,
                    stage: int, checkpoint: Path, origin: str) -> Iterator[dict]:
    """`train_steps` that goes on from `checkpoint` if that file exists, and leaves a .jsonl log beside it.

    Args:
        origin: a fingerprint of all that this stage starts from. A checkpoint of another origin is refused.
    Raises: InputError for another run's checkpoint, and for a loss that is not finite (the checkpoint stays).
    """
    theta, log_file = thetas.theta, checkpoint.with_suffix(".jsonl")
    optimizer = optimizer_for(theta, config)
    facts = {"config": asdict(config), "stage": stage, "loss": loss_of_step.__name__, "origin": origin}
    first = resume(checkpoint, theta, optimizer, facts) if checkpoint.exists() else 0
    log = [row for row in read_log(log_file) if row["step"] <= first]

    try:
        for row in train_steps(loss_of_step, thetas, data, config, stage, optimizer, first):
            log.append(row)
            if row["step"] % SAVE_EVERY == 0 or row["step"] == config.steps:
                write_whole(log_file, "".join(json.dumps(row) + "\n" for row in log).encode())
                save_checkpoint(checkpoint, theta, optimizer, facts, row["step"])
            yield row
    except InputError as error:
        kept = f"; {checkpoint} holds the last good state" if checkpoint.exists() else ""
        raise InputError(f"{error}{kept}") from None

"""Training: the settings, what a step draws, and how its gradient is used.

What step k draws depends on (seed, stage, k) alone, so a run that was stopped anywhere ends bitwise where an
uninterrupted one ends (on a CPU, for a loss that remembers nothing from step to step). Read next:
algorithm.py, where the loops are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from purecc_min.branch import Branch
from purecc_min.concept import Batch, EncodedConcept, noised
from tinyflow.flow import sample_times

SCALE = 2.0**12                                  # of the loss: gradients may be too small for fp16


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


def generator_for(seed: int, stage: int, step: int) -> torch.Generator:
    """The source of everything that a step draws. Step -1 stands for what is drawn before the first one."""
    return torch.Generator().manual_seed((seed * 10 + stage) * 10**7 + step)


def draw_batch(data: EncodedConcept, config: TrainConfig, stage: int, step: int, shift: float) -> Batch:
    """What a step sees: random references, and imagined scenes if there are any."""
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
    batch = noised(data.variants[rows, variants], x_1, t, data.texts.rows(rows))
    return batch if data.masks is None else batch._replace(mask=data.masks[rows, variants])


def optimizer_for(theta: Branch, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. Every Y, also that of an extractor that is trained along, has the embeddings' learning rate."""
    named = list(theta.named_parameters())
    Y = {"params": [p for name, p in named if name.endswith("embeddings.Y")],
         "lr": config.embedding_learning_rate}
    others = {"params": [p for name, p in named if not name.endswith("embeddings.Y")],
              "lr": config.learning_rate}
    return torch.optim.AdamW([others, Y], weight_decay=0.0)


def update(theta: Branch, optimizer: torch.optim.Optimizer, loss: Tensor, scale: float = SCALE) -> bool:
    """One step down the gradient, whose norm is clipped to 1. False, and no step, if it is not finite."""
    optimizer.zero_grad()
    (scale * loss).backward()                    # a product with a power of 2 is exact
    for parameter in theta.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
    if norm.isfinite():
        optimizer.step()
    return bool(norm.isfinite())

"""Training: the settings, the random batch of a step, and how its gradient is used.

The random numbers of step k depend on seed, stage and k alone. So a resumed run ends with the same bits as an
uninterrupted one (on a CPU, if the loss keeps no state between steps). Read next: algorithm.py, which has the
loops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from purecc_min.branch import Branch
from purecc_min.concept import Batch, EncodedConcept, noised
from tinyflow.flow import training_times

SCALE = 2.0**12                                  # of the loss: small gradients would become 0 in fp16


@dataclass(frozen=True)
class TrainConfig:
    """Settings. Each method's values: registry.py (tiny model), commands/base_models.py (SD3.5)."""
    steps: int = 400                             # of each stage
    batch: int = 4                               # references per step
    rank: int = 4                                # of the adapters
    learning_rate: float = 2e-3                  # of the adapters
    embedding_learning_rate: float = 5e-3        # of Y
    extractor_learning_rate: float | None = None # of the adapters in stage 1; None: learning_rate
    eta: float = 1.0                             # weight of a method's second loss: of L_PureCC in Eq. 15
    seed: int = 0


def generator_for(seed: int, stage: int, step: int) -> torch.Generator:
    """A step's generator, its own up to stage 9 and step 10**7. Step -1: for initial weights."""
    return torch.Generator().manual_seed((seed * 10 + stage) * 10**7 + step)


def draw_batch(data: EncodedConcept, config: TrainConfig, stage: int, step: int, shift: float,
               generator: torch.Generator | None = None) -> Batch:
    """A step's batch: random references, times and noise. shift: see flow.shift_times."""
    generator = generator or generator_for(config.seed, stage, step)
    rows = torch.randint(len(data.variants), (config.batch,), generator=generator)
    t = training_times(config.batch, shift, generator).to(data.variants)
    x_1 = torch.randn((config.batch, *data.x_0.shape[1:]), generator=generator).to(data.variants)
    which = torch.randint(data.variants.shape[1], (config.batch,), generator=generator)  # crop or flip
    batch = noised(data.variants[rows, which], x_1, t, data.texts.rows(rows))
    return batch._replace(mask=None if data.masks is None else data.masks[rows, which],
                          imagined=data.imagined and draw_batch(data.imagined, config, stage, step, shift,
                                                                generator))


def optimizer_for(theta: Branch, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. Parameters named embeddings.Y use embedding_learning_rate, all others learning_rate."""
    named = list(theta.named_parameters())
    Y = {"params": [p for name, p in named if name.endswith("embeddings.Y")],
         "lr": config.embedding_learning_rate}
    others = {"params": [p for name, p in named if not name.endswith("embeddings.Y")],
              "lr": config.learning_rate}
    return torch.optim.AdamW([others, Y], weight_decay=0.0)


def update(theta: Branch, optimizer: torch.optim.Optimizer, loss: Tensor, scale: float = SCALE) -> bool:
    """One optimizer step, the gradient's norm clipped to 1. False, and no step, if the norm is not finite."""
    optimizer.zero_grad()
    (scale * loss).backward()                    # a product with a power of 2 is exact
    for parameter in theta.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
    if norm.isfinite():
        optimizer.step()
    return bool(norm.isfinite())

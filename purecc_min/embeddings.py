"""Layer-wise tunable concept embeddings {Y^l}, l = 1..L (Sec. 4.2, Eq. 7).

At the input of every transformer block l, the text token at [V]'s position is REPLACED by its own learnable vector Y^l; what the
block makes of it is thrown away at the next one. The text encoder, and so the pooled vector, see an ordinary word there:
the class word. (The paper leaves that open; this is our reading, and so is the start from the class word's mean hidden state.)
Read next: branch.py.
"""

import torch
from torch import Tensor, nn

from tinyflow.flow import path, sample_times
from tinyflow.pipeline import Pipeline, Text


class ConceptEmbeddings(nn.Module):
    """Y [L, D]. Call it as the pipeline's `fill`: (l, c, slots) -> c with Y^l in the slots."""

    def __init__(self, Y: Tensor):
        super().__init__()
        self.Y = nn.Parameter(Y.clone())

    def forward(self, l: int, c: Tensor, slots: Tensor) -> Tensor:
        """c [B, T, D] at the input of block l, slots [B, T] bool."""
        return torch.where(slots[..., None], self.Y[l].to(c.dtype), c)


@torch.no_grad()
def class_word_states(pipe: Pipeline, x_0: Tensor, class_text: Text, generator: torch.Generator, draws: int = 8) -> Tensor:
    """The start of Y, [L, D]: the base model's hidden state of the class word at the input of every block.

    Args:
        x_0: [n, C, H, W] reference pictures. class_text: n base texts, whose `slots` mark the class word.
        draws: times t and noises per picture over which the state is averaged.
    """
    sums = torch.zeros(pipe.mmdit.config.depth, pipe.mmdit.config.width, device=x_0.device)

    def record(l: int, c: Tensor, slots: Tensor) -> Tensor:
        sums[l] += c[slots].float().mean(0) * len(c) / len(x_0) / draws
        return c

    for _ in range(draws):
        t = sample_times(len(x_0), pipe.shift, generator).to(x_0)
        x_1 = torch.randn(x_0.shape, generator=generator).to(x_0)
        for rows in torch.arange(len(x_0)).split(8):             # a large set must not need more memory than a training step
            pipe.velocity(path(x_0, x_1, t)[rows], t[rows], class_text[rows], fill=record)
    return sums

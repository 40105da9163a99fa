"""Layer-wise tunable concept embeddings {Y^l}: one per block, l = 0..L-1 (Sec. 4.2, Eq. 7).

At the input of every transformer block l, the text token at [V]'s position is REPLACED by its own learnable
vector Y^l. The block's output at that position is thrown away: the next block gets Y^(l+1) instead. The text
encoder, and so the pooled vector, reads an ordinary word there: the class word. The paper does not specify
this; it is our choice. So is the initial Y^l: the mean hidden state of the class word at that block. Read
next: lora.py.
"""

import torch
from torch import Tensor, nn

from purecc_min.concept import EncodedConcept
from tinyflow.flow import path, training_times
from tinyflow.pipeline import Pipeline, Text


class ConceptEmbeddings(nn.Module):
    """Y [L, D], one vector for every block."""

    def __init__(self, Y: Tensor):
        super().__init__()
        self.Y = nn.Parameter(Y.clone())

    def forward(self, l: int, c: Tensor, slots: Tensor) -> Tensor:
        """Returns c [B, T, D] at block l with Y^l where the bool slots [B, T] are True (Eq. 7)."""
        return torch.where(slots[..., None], self.Y[l].to(c.dtype), c)


def states_in_slots(pipe: Pipeline, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """[L, D]: the base model's text state before each block, averaged over all slots of the batch."""
    states = []

    def record(l: int, block: nn.Module, x: Tensor, c: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
        states.append(c[text.slots > 0].float().mean(0))
        return block(x, c, vec)

    pipe.velocity(x_t, t, text, visit=record)
    return torch.stack(states)


@torch.no_grad()
def class_word_states(pipe: Pipeline, data: EncodedConcept, generator: torch.Generator) -> Tensor:
    """The initial Y, [L, D]: the base model's mean state of the class word at the input of every block."""
    x_0, states = data.x_0, []
    for _ in range(8):                           # random times and noises for each reference
        t = training_times(len(x_0), pipe.shift, generator).to(x_0)
        x_t = path(x_0, torch.randn(x_0.shape, generator=generator).to(x_0), t)
        states.append(states_in_slots(pipe, x_t, t, data.class_text))
    return torch.stack(states).mean(0)

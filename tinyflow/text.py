"""The text encoder: a CLIP-style causal transformer.

It returns two tensors. `context` is the input of the last layer, one vector per token; it becomes the MMDiT's
text tokens. `pooled` is the final state at the end-of-text token, projected; it modulates every block. The
tiny model's text encoder is trained together with its MMDiT. CLIP-L and CLIP-G, two of SD3.5's text encoders,
are this class with other configurations. Read next: phrase.py.
"""

from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflow.attention import Projections


@dataclass(frozen=True)
class TextConfig:
    """The defaults are those of a small encoder; picturebook/model.py makes the tiny model's."""
    vocabulary_size: int
    length: int = 16                             # tokens per text
    width: int = 128
    depth: int = 3
    heads: int = 4
    hidden: int = 512                            # width inside each layer's MLP
    pooled_width: int | None = 128               # None: the pooled state is not projected
    end: int = 1                                 # end-of-text id; pooled is the state at its first place
    activation: str = "gelu"                     # or "quick_gelu"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class TextLayer(Projections):
    def __init__(self, config: TextConfig):
        super().__init__(config.width, config.heads, qk_norm=False)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.fc1, self.fc2 = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), causal=True)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))                   # [B, T, D]


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config, width = config, config.width
        self.token_embedding = nn.Embedding(config.vocabulary_size, width)
        self.position_embedding = nn.Embedding(config.length, width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width)
        self.projection = (nn.Linear(width, config.pooled_width, bias=False) if config.pooled_width
                           else nn.Identity())
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> context [B, T, width], pooled [B, pooled_width], on the device of the ids."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)              # [B, T, D]
        for layer in self.layers:
            context, x = x, layer(x)             # after the loop, context is the input of the last layer
        first_end = (ids == self.config.end).int().argmax(dim=1)                        # [B]
        pooled = self.final_norm(x)[torch.arange(len(ids), device=ids.device), first_end]
        return context, self.projection(pooled)                                         # [B, T, D], [B, P]

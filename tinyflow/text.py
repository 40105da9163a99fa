"""The text encoder: a CLIP-style causal transformer.

It gives a model two things: the hidden states before the last layer, one vector a token (the `context` that joins the MMDiT's text
stream), and the final state at the end-of-text token, projected (the `pooled` vector that modulates every block). In the
tiny world it is trained together with the MMDiT. Read next: pipeline.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyflow.attention import attention


@dataclass(frozen=True)
class TextConfig:
    """The defaults are the tiny encoder."""
    vocabulary_size: int
    length: int = 16
    width: int = 128
    depth: int = 3
    heads: int = 4
    hidden: int = 512
    pooled_width: int = 128
    end: int = 1                                 # id of the end-of-text token, at whose first position the text is pooled


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, config.hidden), nn.Linear(config.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (rearrange(to(h), "b t (h d) -> b h t d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(rearrange(attention(q, k, v, causal=True), "b h t d -> b t (h d)"))  # [B, T, D]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.pooled_width, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> context [B, T, width], pooled [B, pooled_width]."""
        x = self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]            # [B, T, D]
        for layer in self.layers:
            context, x = x, layer(x)                             # context: the state before the last layer
        first_end = (ids == self.config.end).int().argmax(dim=1)                                 # [B]
        pooled = self.final_norm(x)[torch.arange(len(ids), device=ids.device), first_end]        # [B, D]
        return context, self.projection(pooled)

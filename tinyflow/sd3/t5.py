"""T5's encoder, the third of SD3.5: a bidirectional transformer without biases, masks, absolute positions.

The order of the words enters as a learned number for every head and every distance between two tokens, which
is added to the attention logits. Each near distance has a bucket of its own, and far distances share buckets
that widen like a logarithm. All layers share these numbers, and the logits are not divided by sqrt(d). The
encoder gives one vector for each token and no pooled vector. Read next: offload.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyflow.attention import RMSNorm, attention


@dataclass(frozen=True)
class T5Config:
    """The defaults are those of T5-v1.1-XXL."""
    vocabulary_size: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_width: int = 64
    hidden: int = 10240
    buckets: int = 32                            # half for the keys before a query, half for those after it
    max_distance: int = 128                      # from here on, all distances share the last bucket


def distance_buckets(tokens: int, buckets: int, max_distance: int) -> Tensor:
    """The bucket of every query and key, [T, T].

    Distances below `exact` have one bucket each; the others are sorted into buckets on a logarithmic scale.
    """
    places = torch.arange(tokens, device="cpu")  # so that all devices round a bucket's edge alike
    offset = places[None] - places[:, None]                                            # key - query
    distance, half = offset.abs(), buckets // 2
    exact = half // 2
    fraction = torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact)
    far = (exact + (fraction * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class T5Layer(nn.Module):
    """Self-attention, then a gated MLP; each of them adds to x."""

    def __init__(self, config: T5Config):
        super().__init__()
        width, inner, self.heads = config.width, config.heads * config.head_width, config.heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width, bias=False)
        self.gate, self.fc1 = (nn.Linear(width, config.hidden, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(config.hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, D], bias [1, H, T, T] -> [B, T, D]."""
        h = self.norm1(x)
        q, k, v = (rearrange(to(h), "b t (h d) -> b h t d", h=self.heads)
                   for to in (self.to_q, self.to_k, self.to_v))
        h = rearrange(attention(q, k, v, bias=bias, scale=1.0), "b h t d -> b t (h d)")
        x = x + self.to_out(h)                                                         # [B, T, D]
        h = self.norm2(x)
        return x + self.fc2(F.gelu(self.gate(h), approximate="tanh") * self.fc1(h))


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.distance_embedding = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(T5Layer(config) for _ in range(config.depth))
        self.final_norm = RMSNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, width], on the device of the ids."""
        buckets = distance_buckets(ids.shape[1], self.config.buckets, self.config.max_distance).to(ids.device)
        # Computed once in a forward pass, as all layers share it: [1, H, T, T].
        bias = rearrange(self.distance_embedding(buckets), "q k h -> 1 h q k")
        x = self.token_embedding(ids)                                                  # [B, T, D]
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)

"""The text encoder: a CLIP-style causal transformer.

It gives a model two things: the hidden states before the last layer, one vector a token (the `context` that joins the MMDiT's text
stream), and the final state at the end-of-text token, projected (the `pooled` vector that modulates every block). In the
tiny world it is trained together with the MMDiT; SD3.5's CLIP-L and CLIP-G are two more `TextConfig`s. Read next: pipeline.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

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
    pooled_width: int | None = 128               # None: the pooled state is not projected
    end: int = 1                                 # id of the end-of-text token, at whose first position the text is pooled
    activation: str = "gelu"                     # or "quick_gelu"


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def visit(module: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    """Runs a module where x is, and in fp32: weights that rest elsewhere, or in 16 bits, are copied over for this call only."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if all((tensor.device, tensor.dtype) == (x.device, torch.float32) for tensor in state.values()):
        return module(x, *args)
    return functional_call(module, {name: tensor.to(x.device, torch.float32) for name, tensor in state.items()}, (x, *args))


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        width, self.heads, self.activation = config.width, config.heads, ACTIVATIONS[config.activation]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, config.hidden), nn.Linear(config.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (rearrange(to(h), "b t (h d) -> b h t d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(rearrange(attention(q, k, v, causal=True), "b h t d -> b t (h d)"))  # [B, T, D]
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.pooled_width, bias=False) if config.pooled_width else nn.Identity()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> context [B, T, width], pooled [B, pooled_width], on the device of the ids."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = visit(self.token_embedding, ids) + visit(self.position_embedding, places)            # [B, T, D]
        for layer in self.layers:
            context, x = x, visit(layer, x)                      # context: the state before the last layer
        first_end = (ids == self.config.end).int().argmax(dim=1)                                 # [B]
        pooled = visit(self.final_norm, x)[torch.arange(len(ids), device=ids.device), first_end]       # [B, D]
        return context, visit(self.projection, pooled)

"""Attention through torch's scaled_dot_product_attention, and nothing else: no Triton, no custom kernels.

On CUDA, SDPA picks its flash or memory-efficient kernel by itself. `JointAttention` is the heart of an MMDiT block: the image
tokens and the text tokens have weights of their own, and attend to each other in one softmax. Read next: mmdit.py.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v for q, k, v [B, heads, tokens, d]; the scale is 1 / sqrt(d) unless it is given.

    On CPU it runs in fp32 even under bf16 autocast: the bf16 backward of CPU attention is about four times slower.
    """
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            bias = bias.float() if bias is not None else None
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias, is_causal=causal, scale=scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, in fp32, times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


class Projections(nn.Module):
    """Query, key, value and output projections of one stream, with RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool, output: bool = True):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = ((RMSNorm(width // heads) if qk_norm else nn.Identity()) for _ in range(2))
        self.to_out = nn.Linear(width, width) if output else None

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (rearrange(linear(x), "b n (h d) -> b h n d", h=self.heads)                    # [B, H, N, D/H]
                   for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class SelfAttention(Projections):
    """Attention of the image tokens among themselves: the second attention of SD3.5's MMDiT-X blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(rearrange(attention(*self.qkv(x)), "b h n d -> b n (h d)"))           # [B, N, D]


class JointAttention(nn.Module):
    """Image and text tokens, each with their own projections, in one attention. `text_output` is False in the last block."""

    def __init__(self, width: int, heads: int, qk_norm: bool, text_output: bool):
        super().__init__()
        self.image = Projections(width, heads, qk_norm)
        self.text = Projections(width, heads, qk_norm, output=text_output)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(self.image.qkv(x), self.text.qkv(c)))  # [B, H, N + T, D/H]
        both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")                             # [B, N + T, D]
        x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
        return self.image.to_out(x_out), self.text.to_out(c_out) if self.text.to_out is not None else None

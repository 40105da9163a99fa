"""Attention through torch's scaled_dot_product_attention (SDPA): no Triton, no custom kernels.

On CUDA, SDPA chooses its flash or its memory-efficient kernel. `JointAttention` is the heart of an MMDiT
block: it projects image and text tokens with separate weights, and one softmax runs over both. In shapes, B
is the batch, N image tokens, T text tokens, D the width, H heads. Read next: mmdit.py.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, bias: Tensor | None = None,
              scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v for q, k, v [B, heads, tokens, d]. By default the scale is 1 / sqrt(d).

    On a CPU this runs in fp32, also under autocast: a bf16 backward pass takes four times as long.
    """
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v, bias = q.float(), k.float(), v.float(), None if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale).to(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, in fp32, times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


class Projections(nn.Module):
    """The projections of one kind of token (image or text). qk_norm: RMS-normalise queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = ((RMSNorm(width // heads) if qk_norm else nn.Identity()) for _ in range(2))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> queries, keys, values, each [B, H, N, D/H]."""
        q, k, v = (rearrange(linear(x), "b n (h d) -> b h n d", h=self.heads)
                   for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def attend(self, x: Tensor, causal: bool = False) -> Tensor:
        """Self-attention of x [B, N, D]: the text encoder's, the VAE's, and the second in SD3.5's blocks."""
        return self.to_out(rearrange(attention(*self.qkv(x), causal), "b h n d -> b n (h d)"))


class JointAttention(nn.Module):
    """Image and text tokens, each with their own projections, in one attention.

    `text_output` is False in the last block, whose text tokens are not needed any more.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, text_output: bool):
        super().__init__()
        self.image, self.text = (Projections(width, heads, qk_norm) for _ in range(2))
        self.text_output = text_output
        if not text_output:
            del self.text.to_out

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] and c [B, T, D] -> the new x and the new c (None if text_output is False)."""
        image_and_text = zip(self.image.qkv(x), self.text.qkv(c))
        q, k, v = (torch.cat(pair, dim=2) for pair in image_and_text)                   # [B, H, N + T, D/H]
        both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")                    # [B, N + T, D]
        x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
        return self.image.to_out(x_out), self.text.to_out(c_out) if self.text_output else None

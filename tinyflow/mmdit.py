"""MMDiT: the transformer that predicts the velocity v(x_t, t | text).

Each block has separate weights for image and text tokens; one joint attention mixes both. Time and the pooled
text vector (text.py) give each block its shifts, scales and gates (adaLN). The function `visit` can replace
how a block runs; purecc_min/branch.py uses it to insert a concept. Read next: text.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyflow.attention import JointAttention, Projections


@dataclass(frozen=True)
class MMDiTConfig:
    """The defaults are the tiny model of the picture-book world."""
    channels: int = 16                           # of the latents
    patch: int = 2
    width: int = 128
    depth: int = 6
    heads: int = 4
    context_width: int = 128                     # of the text encoder's hidden states
    pooled_width: int = 128                      # of the text encoder's pooled vector
    max_grid: int = 8                            # the largest input has max_grid x max_grid patches
    base_grid: int = 8                           # neighbouring positions are base_grid / max_grid apart
    qk_norm: bool = True
    dual_attention_layers: tuple[int, ...] = ()  # blocks whose image stream attends to itself a second time

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by the {self.heads} heads, and by 4 for "
                             "2-D positions")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then the shift and scale of adaLN."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def time_features(t: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal features of 1000 t, for t in [0, 1]: [B] -> [B, width], cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = 1000 * t.float()[:, None] * frequencies                                    # [B, width/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                              # [B, width]


def position_features(width: int, max_grid: int, base_grid: int) -> Tensor:
    """2-D sin-cos positions [G, G, width], G = max_grid. The first half of width encodes x, the second y."""
    place = torch.arange(max_grid, dtype=torch.float64) * base_grid / max_grid
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = place[:, None] * frequencies                                               # [G, width/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1).float()                      # [G, width/2]
    x, y = axis[None].expand(max_grid, -1, -1), axis[:, None].expand(-1, max_grid, -1)
    return torch.cat([x, y], dim=-1)


class AdaLN(nn.Module):
    """Maps vec [B, D] to `count` tensors [B, 1, D]: shifts and scales, and gates of what is added to x."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count, self.linear = count, nn.Linear(width, count * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec))[:, None].chunk(self.count, dim=-1)


class MLP(nn.Module):
    def __init__(self, width_in: int, hidden: int, width_out: int, activation: Callable):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width_in, hidden), nn.Linear(hidden, width_out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """One block. `last` ends the text stream after the attention, `dual` adds a second image attention."""

    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool, last: bool):
        super().__init__()
        # 3 per sublayer: shift, scale, gate. The last text stream needs one shift and one scale.
        self.image_adaln = AdaLN(width, 9 if dual else 6)
        self.text_adaln = AdaLN(width, 2 if last else 6)
        self.attention = JointAttention(width, heads, qk_norm, text_output=not last)
        self.attention2 = Projections(width, heads, qk_norm) if dual else None
        gelu = nn.GELU(approximate="tanh")
        self.image_mlp = MLP(width, 4 * width, width, gelu)
        self.text_mlp = None if last else MLP(width, 4 * width, width, gelu)

    def forward(self, x: Tensor, c: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] image tokens, c [B, T, D] text tokens, vec [B, D] time and pooled text."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual = self.image_adaln(vec)
        c_shift, c_scale, *text = self.text_adaln(vec)

        x_out, c_out = self.attention(modulate(x, shift, scale), modulate(c, c_shift, c_scale))
        x_attended = x + gate * x_out
        if self.attention2 is not None:          # it reads x, too, and not x_attended
            dual_shift, dual_scale, dual_gate = dual
            x_attended = x_attended + dual_gate * self.attention2.attend(modulate(x, dual_shift, dual_scale))
        x = x_attended + mlp_gate * self.image_mlp(modulate(x_attended, mlp_shift, mlp_scale))  # [B, N, D]
        if self.text_mlp is None:
            return x, None

        gate, mlp_shift, mlp_scale, mlp_gate = text
        c = c + gate * c_out
        return x, c + mlp_gate * self.text_mlp(modulate(c, mlp_shift, mlp_scale))       # [B, T, D]


Visit = Callable[[int, nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # see forward


class MMDiT(nn.Module):
    """The transformer. It predicts the velocity v(x_t, t | context, pooled)."""
    positions: Tensor                            # [max_grid, max_grid, D]

    def __init__(self, config: MMDiTConfig = MMDiTConfig()):
        super().__init__()
        self.config, width = config, config.width
        self.checkpointing = False               # True: the backward pass recomputes blocks (less memory)
        self.patch_embedder = nn.Conv2d(config.channels, width, config.patch, stride=config.patch)
        self.time_embedder = MLP(256, width, width, F.silu)
        self.pooled_embedder = MLP(config.pooled_width, width, width, F.silu)
        self.context_embedder = nn.Linear(config.context_width, width)
        positions = position_features(width, config.max_grid, config.base_grid)
        self.register_buffer("positions", positions, persistent=False)
        dual, last = config.dual_attention_layers, config.depth - 1
        self.blocks = nn.ModuleList(Block(width, config.heads, config.qk_norm, dual=l in dual, last=l == last)
                                    for l in range(config.depth))
        self.final_adaln = AdaLN(width, 2)
        self.final_linear = nn.Linear(width, config.patch**2 * config.channels)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Linear and convolution weights: Xavier. Embedder MLPs: normal, std 0.02. Biases: zero. Every adaLN
        and the final layer start at 0, so untrained blocks return their input, and the model predicts v = 0.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaln" in name or "final_linear" in name:
                nn.init.zeros_(parameter)
            elif "time_embedder" in name or "pooled_embedder" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim > 1:             # the others are the norms' weights, which stay at one
                nn.init.xavier_uniform_(parameter.flatten(1))    # a view: this writes into the parameter

    def cropped_positions(self, rows: int, columns: int) -> Tensor:
        grid = self.config.max_grid
        if rows > grid or columns > grid:
            raise ValueError(f"{rows} x {columns} patches exceed the model's {grid} x {grid} positions")
        top, left = (grid - rows) // 2, (grid - columns) // 2
        return rearrange(self.positions[top:top + rows, left:left + columns], "h w d -> 1 (h w) d")

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor,
                visit: Visit | None = None) -> Tensor:
        """Args:
            x: [B, C, H, W] noisy latents x_t.
            t: [B] times in [0, 1]; 0 is data, 1 is noise.
            context: [B, T, context_width] text tokens.
            pooled: [B, pooled_width].
            visit: called as visit(l, block, x, c, vec) in place of block(x, c, vec), l = 0..depth-1; returns
                (x, c). It may first change c, or attach adapters to the block.
        Returns: velocity [B, C, H, W].
        Raises: ValueError if the picture does not divide into patches, or exceeds the grid of positions.
        """
        patch = self.config.patch
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} does not divide into patches of {patch}")
        rows, columns = x.shape[-2] // patch, x.shape[-1] // patch

        x = rearrange(self.patch_embedder(x), "b d h w -> b (h w) d").contiguous()      # [B, N, D]
        x = x + self.cropped_positions(rows, columns).to(x.dtype)
        c = self.context_embedder(context)                                              # [B, T, D]
        vec = self.time_embedder(time_features(t).to(pooled.dtype))                     # [B, D]
        vec = vec + self.pooled_embedder(pooled)

        for l, block in enumerate(self.blocks):
            run_block = block if visit is None else partial(visit, l, block)
            if self.checkpointing and torch.is_grad_enabled():
                x, c = checkpoint(run_block, x, c, vec, use_reentrant=False)
            else:
                x, c = run_block(x, c, vec)

        shift, scale = self.final_adaln(vec)
        x = self.final_linear(modulate(x, shift, scale))                                # [B, N, p*p*C]
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)

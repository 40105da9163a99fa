"""SD3's autoencoder: from pictures to latents that are `factor` times less wide and high, and back.

Encoder and decoder mirror each other: levels of residual blocks, each at half (or twice) the resolution of
the level before. At the coarsest resolution every place also attends to every other place. The encoder
describes a normal distribution for each latent, of which we take the mean. Latents are then shifted and
scaled to about unit variance, and this is what the MMDiT sees. Read next: pipeline.py.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyflow.attention import SelfAttention
from tinyflow.errors import InputError


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are those of SD3's autoencoder."""
    channels: tuple[int, ...] = (128, 256, 512, 512)     # of the levels, the finest first
    layers: int = 2                              # residual blocks in a level; in the decoder, one more
    latent_channels: int = 16
    groups: int = 32                             # of every GroupNorm
    scale: float = 1.5305                        # latent = (mean - shift) * scale
    shift: float = 0.0609

    @property
    def factor(self) -> int:
        """How many pixels a latent covers along each side."""
        return 2 ** (len(self.channels) - 1)


conv = partial(nn.Conv2d, kernel_size=3, padding=1)      # conv(channels_in, channels_out)
norm = partial(nn.GroupNorm, eps=1e-6)                   # norm(groups, channels)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = norm(groups, channels_in), conv(channels_in, channels_out)
        self.norm2, self.conv2 = norm(groups, channels_out), conv(channels_out, channels_out)
        self.shortcut = (nn.Identity() if channels_in == channels_out
                         else nn.Conv2d(channels_in, channels_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h                                                    # [B, C, H, W]


class Attention(SelfAttention):
    """Every place attends to every place, with a single head."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, qk_norm=False)
        self.norm = norm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(rearrange(self.norm(x), "b c h w -> b (h w) c"))           # [B, H*W, C]
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """Halves the resolution. The picture is padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the resolution: every value is written four times, then a convolution smooths them."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and then the step to the next resolution."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, resample: nn.Module):
        super().__init__()
        widths = [channels_in, *[channels_out] * layers]
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, groups) for a, b in pairwise(widths)))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


def levels(channels: tuple[int, ...], layers: int, groups: int, resample: type[nn.Module]) -> nn.Sequential:
    """One level for each entry of `channels`, in the order in which they are applied."""
    channels_in = (channels[0], *channels)
    steps = [*map(resample, channels[:-1]), nn.Identity()]       # no step behind the last level
    return nn.Sequential(*(Level(before, after, layers, groups, step)
                           for before, after, step in zip(channels_in, channels, steps)))


class Half(nn.Module):
    """The encoder or the decoder, but for its levels: a convolution at each end, and the middle."""

    def __init__(self, channels_in: int, channels: tuple[int, ...], channels_out: int, groups: int):
        super().__init__()
        coarsest = max(channels[0], channels[-1])
        self.conv_in = conv(channels_in, channels[0])
        self.mid = nn.Sequential(ResidualBlock(coarsest, coarsest, groups), Attention(coarsest, groups),
                                 ResidualBlock(coarsest, coarsest, groups))
        self.norm_out, self.conv_out = norm(groups, channels[-1]), conv(channels[-1], channels_out)


class Encoder(Half):
    def __init__(self, config: VAEConfig):
        mean_and_log_variance = 2 * config.latent_channels
        super().__init__(3, config.channels, mean_and_log_variance, config.groups)
        self.down = levels(config.channels, config.layers, config.groups, Downsample)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))                                       # [B, C, H/f, W/f]
        return self.conv_out(F.silu(self.norm_out(x)))                                 # [B, 2*L, H/f, W/f]


class Decoder(Half):
    def __init__(self, config: VAEConfig):
        super().__init__(config.latent_channels, config.channels[::-1], 3, config.groups)
        self.up = levels(config.channels[::-1], config.layers + 1, config.groups, Upsample)

    def forward(self, z: Tensor) -> Tensor:
        x = self.up(self.mid(self.conv_in(z)))                                         # [B, C, H, W]
        return self.conv_out(F.silu(self.norm_out(x)))                                 # [B, 3, H, W]


class VAE(nn.Module):
    """The codec of SD3, as the Pipeline needs it."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config, self.factor = config, config.factor
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, L, H/f, W/f]; f must divide the sides."""
        height, width = pictures.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(f"a picture of {width} x {height} pixels has no latents; "
                             f"crop or resize it to sides that are multiples of {self.factor}")
        mean, _ = self.encoder(pictures).chunk(2, dim=1)
        return (mean - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, L, H/f, W/f] -> pictures [B, 3, H, W], about in [-1, 1]."""
        return self.decoder(latents / self.config.scale + self.config.shift)

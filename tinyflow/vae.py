"""SD3's autoencoder: it encodes pictures as latents with sides `factor` times shorter, and decodes them.

Each level of the encoder halves the resolution, and each level of the decoder doubles it; the last level of
each keeps it. At the coarsest resolution, self-attention connects all positions. The encoder outputs a mean
and a log-variance per latent value; we use the mean. The MMDiT gets latents that are shifted and scaled to
about unit variance. In shapes, f is the factor and C the latent channels. Read next: pipeline.py.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyflow.attention import Projections


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are those of SD3's autoencoder."""
    channels: tuple[int, ...] = (128, 256, 512, 512)     # per level, the finest first
    layers: int = 2                              # residual blocks per level; the decoder has one more
    latent_channels: int = 16
    groups: int = 32                             # of every GroupNorm
    scale: float = 1.5305                        # latent = (mean - shift) * scale
    shift: float = 0.0609

    @property
    def factor(self) -> int:
        """The side, in pixels, of the square that one latent position covers."""
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
        return self.shortcut(x) + h                                                    # [B, out, H, W]


class SpatialAttention(Projections):
    """Self-attention over all positions, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, qk_norm=False)
        self.norm = norm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attend(rearrange(self.norm(x), "b c h w -> b (h w) c"))           # [B, H*W, C]
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """Halves the resolution. The picture is padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the resolution: copies each value to 2 x 2 positions, then applies a convolution."""

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
    steps = [*map(resample, channels[:-1]), nn.Identity()]       # the last level keeps the resolution
    return nn.Sequential(*(Level(before, after, layers, groups, step)
                           for before, after, step in zip(channels_in, channels, steps)))


class Coder(nn.Module):
    """What encoder and decoder share: the first and last convolution, and the middle blocks."""

    def __init__(self, channels_in: int, channels: tuple[int, ...], channels_out: int, groups: int):
        super().__init__()
        widest = max(channels)
        self.conv_in = conv(channels_in, channels[0])
        blocks = [ResidualBlock(widest, widest, groups) for _ in range(2)]
        self.mid = nn.Sequential(blocks[0], SpatialAttention(widest, groups), blocks[1])
        self.norm_out, self.conv_out = norm(groups, channels[-1]), conv(channels[-1], channels_out)


class Encoder(Coder):
    def __init__(self, config: VAEConfig):
        super().__init__(3, config.channels, 2 * config.latent_channels, config.groups)
        self.down = levels(config.channels, config.layers, config.groups, Downsample)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))                                       # [B, widest, H/f, W/f]
        return self.conv_out(F.silu(self.norm_out(x)))                                 # [B, 2*C, H/f, W/f]


class Decoder(Coder):
    def __init__(self, config: VAEConfig):
        super().__init__(config.latent_channels, config.channels[::-1], 3, config.groups)
        self.up = levels(config.channels[::-1], config.layers + 1, config.groups, Upsample)

    def forward(self, z: Tensor) -> Tensor:
        x = self.up(self.mid(self.conv_in(z)))                                         # [B, finest, H, W]
        return self.conv_out(F.silu(self.norm_out(x)))                                 # [B, 3, H, W]


class VAE(nn.Module):
    """The autoencoder, with the two methods that Pipeline calls."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config, self.factor = config, config.factor
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f]. ValueError unless f divides H, W."""
        height, width = pictures.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"sides must be multiples of {self.factor} pixels, not {width} x {height}")
        mean, _ = self.encoder(pictures).chunk(2, dim=1)
        return (mean - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H/f, W/f] -> pictures [B, 3, H, W], roughly in [-1, 1], not clamped."""
        return self.decoder(latents / self.config.scale + self.config.shift)

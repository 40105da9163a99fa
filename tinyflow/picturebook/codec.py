"""Training of the codec: SD3's autoencoder class in a small size, learned on renders of the picture book.

It turns 64 x 64 pixels into 16 x 16 places of 16 numbers, and back. The loss is the squared error, weighed
eight times inside the objects, and a very small pull of the latents toward a normal distribution (the KL
term of a variational autoencoder). Most steps see crops of 32 x 32 pixels, three in four of them around an
object; the last ones see whole pictures, as the attention in the middle needs.

    python -m tinyflow.picturebook.codec --out runs/codec        makes codec.safetensors

`--start` goes on from other weights with the decoder alone. The latents stay what they are, and so does every
model that was trained on them.

Read next: pretrain.py.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyflow.picturebook import world
from tinyflow.picturebook.model import load_codec, make_codec
from tinyflow.picturebook.render import render_all
from tinyflow.picturebook.training import Config, Training, fast_precision, follow, parser_of, stage
from tinyflow.pipeline import to_pixels
from tinyflow.terminal import report_errors
from tinyflow.vae import VAE

CROP = 32                                        # pixels
INSIDE = 8                                       # how much more a pixel of an object counts
KL = 1e-4                                        # the weight of the KL term
CODEC = Config(40000, 3e-3, warmup=100, flat=0, batch=8, pictures=20000)


def psnr(x: Tensor, y: Tensor, inside: Tensor | None = None) -> Tensor:
    """The peak signal-to-noise ratio of each picture, in dB: x, y [B, 3, H, W] in [-1, 1] -> [B].

    Args: inside: bool [B, H, W]; only these pixels count.
    """
    error = ((x - y.clamp(-1, 1)) / 2).square().mean(1)                                 # [B, H, W]
    weight = torch.ones_like(error) if inside is None else inside.float()
    return -10 * ((error * weight).sum((1, 2)) / weight.sum((1, 2))).log10()


class CodecTraining(Training):
    """The pictures with their masks, and the codec. The last 15 % of the steps see half as many, whole."""
    name = "codec"

    def __init__(self, config: Config, codec: VAE):
        rng = np.random.default_rng(config.seed)
        pictures, masks = render_all([world.any_scene(rng) for _ in range(config.pictures)])
        self.pictures, self.masks = pictures, masks.any(1)       # uint8 [N, 64, 64, 3], bool [N, 64, 64]
        codec.encoder.requires_grad_(not config.start)
        super().__init__(config, codec, ("conv_in", "conv_out"))

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Step k's pictures x [B, 3, h, w] in [-1, 1] and weights [B, 1, h, w]."""
        rng = np.random.default_rng((self.config.seed, k))
        whole = bool(self.config.start) or k >= .85 * self.config.steps
        chosen = rng.integers(len(self.pictures), size=self.config.batch // (1 + whole))
        pictures, masks = self.pictures[chosen], self.masks[chosen]
        if not whole:
            corners = [self.corner(mask, rng) for mask in masks]
            pictures = np.stack([p[y:y + CROP, x:x + CROP] for p, (y, x) in zip(pictures, corners)])
            masks = np.stack([m[y:y + CROP, x:x + CROP] for m, (y, x) in zip(masks, corners)])
        return to_pixels(pictures), 1 + (INSIDE - 1) * torch.tensor(masks)[:, None].float()

    def corner(self, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The upper left corner of a crop, on the grid of the latents; mostly around a pixel of an object."""
        at = rng.uniform(0, world.SIZE - CROP, 2)
        if rng.random() < .75:
            inside = np.argwhere(mask)
            at = inside[rng.integers(len(inside))] + rng.uniform(-CROP / 4, CROP / 4, 2) - CROP / 2
        return (at / 4).round().astype(int).clip(0, (world.SIZE - CROP) // 4) * 4

    def loss(self, k: int) -> Tensor:
        x, weight = self.batch(k)
        torch.manual_seed(self.config.seed * 10**9 + k)
        with fast_precision(x.device):
            mean, log_variance = self.model.encoder(x).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            y = self.model.decoder(z).float()
        kl = .5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
        return (weight * (y - x) ** 2).mean() / weight.mean() + KL * kl

    def report(self, out: Path, k: int) -> dict:
        inside, whole = quality(self.average, 64)
        return {"dB inside": round(inside.mean().item(), 2), "dB": round(whole.mean().item(), 2)}

    @torch.no_grad()
    def finish(self, out: Path, facts: dict) -> None:
        """New latents are brought to zero mean and unit variance, measured on 512 pictures."""
        scale, shift = self.model.config.scale, self.model.config.shift
        if not self.config.start:
            means = torch.cat([self.average.encoder(to_pixels(self.pictures[n:n + 16])).chunk(2, dim=1)[0]
                               for n in range(0, 512, 16)])
            scale, shift = 1 / means.std().item(), means.mean().item()
        super().finish(out, facts | {"scale": scale, "shift": shift})


@torch.no_grad()
def quality(vae: VAE, count: int) -> tuple[Tensor, Tensor]:
    """The PSNR of `count` fresh pictures, coded and decoded: [count] inside the objects, and of the whole."""
    rng = np.random.default_rng(1_000_000)
    pictures, masks = render_all([world.any_scene(rng) for _ in range(count)])
    x, inside = to_pixels(pictures), torch.tensor(masks.any(1))
    device = next(vae.parameters()).device
    y = torch.cat([vae.decode(vae.encode(some.to(device))).cpu() for some in x.split(16)])
    return psnr(x, y, inside), psnr(x, y)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("codec", __doc__, CODEC, start="weights whose decoder is trained further")
    options = parser.parse_args(arguments)
    with report_errors(goes_on=True):
        torch.manual_seed(options.seed)
        codec = load_codec(options.start).requires_grad_(True) if options.start else make_codec()
        follow(CodecTraining(stage(CODEC, options, codec), codec), options.out, 1000)


if __name__ == "__main__":
    main()

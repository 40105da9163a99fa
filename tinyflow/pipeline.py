"""The pipeline joins tokenizer, text encoder, MMDiT and codec. Its methods:

    encode_text     texts -> Text(context, pooled, slots, phrases)
    velocity        v(x_t, t | text), the model's prediction
    encode_images   uint8 pictures -> x_0;    decode_images   x_0 -> uint8 pictures
    sample          Text -> x_0, from noise

The codec, an autoencoder (vae.py), encodes pictures as latents. The model sees only these: x is always
latents. picturebook/model.py makes the tiny pipeline, sd3/load.py that of public weights. Read next:
picturebook/model.py.
"""

from dataclasses import dataclass, fields
from typing import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from tinyflow.flow import euler, guide, noise_for
from tinyflow.mmdit import MMDiT, Visit
from tinyflow.vae import VAE


@dataclass(frozen=True)
class Text:
    """Encoded texts, one per row. phrase.py explains slots and phrases."""
    context: Tensor                              # [B, T, context_width]
    pooled: Tensor                               # [B, pooled_width]
    slots: Tensor                                # [B, T]
    phrases: Tensor                              # [B, T]

    def __getitem__(self, rows) -> "Text":
        return Text(*(getattr(self, part.name)[rows] for part in fields(Text)))

    @staticmethod
    def cat(texts: list["Text"]) -> "Text":
        return Text(*(torch.cat([getattr(text, part.name) for text in texts]) for part in fields(Text)))


Velocity = Callable[[Tensor, Tensor, Text], Tensor]      # v_theta: (x_t, t, text) -> v [B, C, H, W]


def in_one_batch(theta: Velocity, x_t: Tensor, t: Tensor, *texts: Text) -> tuple[Tensor, ...]:
    """Calls theta once, with all texts in one batch; returns one velocity per text."""
    x_t, t = (torch.cat([part] * len(texts)) for part in (x_t, t))
    return theta(x_t, t, Text.cat(list(texts))).chunk(len(texts))


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1], the codec's input."""
    return rearrange(torch.tensor(np.asarray(pictures)), "b h w c -> b c h w") / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "b c h w -> b h w c").cpu().numpy()


class Pipeline(nn.Module):
    """A text-to-image model: tokenizer, text encoder, MMDiT and codec.

    Args:
        picture_size: side in pixels.
        shift: see flow.shift_times. last_time: see flow.sampling_times. SD3's is 0.002994: a short last step.
        guidance: the default strength of classifier-free guidance.
    """

    def __init__(self, tokenizer, encoder: nn.Module, mmdit: MMDiT, codec: VAE, picture_size: int,
                 shift: float = 1.0, last_time: float | None = None, guidance: float = 3.0):
        super().__init__()
        self.tokenizer = tokenizer               # (texts, stand_ins, styles) -> Tokens
        self.encoder = encoder                   # ids -> context [B, T, context_width], pooled
        self.mmdit, self.codec = mmdit, codec    # codec: pixels in [-1, 1] <-> x_0, `factor` times smaller
        self.picture_size, self.shift, self.last_time = picture_size, shift, last_time
        self.guidance = guidance

    @property
    def device(self) -> torch.device:
        return self.mmdit.final_linear.weight.device

    def encode_text(self, texts: list[str], stand_ins: dict[str, str] | None = None,
                    styles: tuple[str, ...] = ()) -> Text:
        """stand_ins: placeholder -> the word that replaces it. styles: the placeholders that name a style."""
        tokens = self.tokenizer(texts, stand_ins, styles)
        context, pooled = self.encoder(tokens.ids.to(self.device))
        return Text(context, pooled, tokens.slots.to(self.device), tokens.phrases.to(self.device))

    def velocity(self, x_t: Tensor, t: Tensor, text: Text, visit: Visit | None = None) -> Tensor:
        """v(x_t, t | text) [B, C, H, W] in fp32, computed in the model's dtype. visit: see MMDiT.forward."""
        dtype = self.mmdit.final_linear.weight.dtype
        return self.mmdit(x_t.to(dtype), t, text.context.to(dtype), text.pooled.to(dtype), visit).float()

    @torch.no_grad()
    def encode_images(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] -> x_0 [B, C, H / factor, W / factor]."""
        pixels = to_pixels(pictures).to(self.device)
        return torch.cat([self.codec.encode(picture[None]) for picture in pixels])   # one by one: less memory

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 [B, C, H, W] -> pixels [B, 3, H * factor, W * factor] in [-1, 1], on the CPU."""
        return torch.cat([self.codec.decode(latent[None]).clamp(-1, 1).cpu() for latent in x_0.float()])

    def decode_images(self, x_0: Tensor) -> np.ndarray:
        """x_0 [B, C, H, W] -> uint8 [B, H * factor, W * factor, 3]."""
        return to_pictures(self.decode(x_0))

    @torch.no_grad()
    def sample(self, text: Text, seeds: list[int], steps: int = 28, guidance: float | None = None,
               theta: Velocity | None = None, theta_null: Velocity | None = None,
               negative: str = "") -> Tensor:
        """Samples latents x_0 [B, C, H, W], one per row of text. Row i starts from the noise of seeds[i].

        Args:
            guidance: None: the pipeline's own.
            theta: the velocity function; None: self.velocity.
            theta_null: the velocity function for guidance's empty text; None: theta.
            negative: a text that replaces the empty text; guidance moves the picture away from it.
        """
        guidance = self.guidance if guidance is None else guidance
        theta = theta or self.velocity
        null = self.encode_text([negative])[[0] * len(seeds)]

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 1:
                return theta(x, t, text)
            if theta_null is None:
                v_null, v_text = in_one_batch(theta, x, t, null, text)
            else:
                v_null, v_text = theta_null(x, t, null), theta(x, t, text)
            return guide(v_null, v_text, guidance)

        side = self.picture_size // self.codec.factor
        x = noise_for(seeds, (self.mmdit.config.channels, side, side)).to(self.device)
        integration = euler(guided, x, steps, self.shift, self.last_time)
        for _, x in tqdm(integration, "sampling", steps, leave=False, delay=5):
            pass
        return x

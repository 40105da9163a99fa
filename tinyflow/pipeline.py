"""The pipeline: tokenizer, text encoder and MMDiT behind four calls.

    encode_text     texts -> Text(context, pooled, slots)
    velocity        v(x_t, t | text), the model's prediction
    encode_images   uint8 pictures -> x_0;    decode_images   x_0 -> uint8 pictures

and `sample`, which draws pictures with them. The flow runs on what the codec makes of a picture: its pixels in the tiny world, the
autoencoder's latents in SD3.5. Read next: pretrain.py, checkpoint.py (public weights), or purecc_min.
"""

from dataclasses import dataclass, fields
from typing import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from tinyflow.flow import euler, guide, noise_for
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.tokenizer import WordTokenizer
from tinyflow.weights import SHIPPED, load_into, load_tensors


@dataclass(frozen=True)
class Text:
    """Encoded texts, one a row. `slots` is True at the positions of a placeholder."""
    context: Tensor                              # [B, T, context_width]
    pooled: Tensor                               # [B, pooled_width]
    slots: Tensor                                # [B, T] bool

    def __getitem__(self, rows) -> "Text":
        return Text(self.context[rows], self.pooled[rows], self.slots[rows])

    @staticmethod
    def cat(texts: list["Text"]) -> "Text":
        return Text(*(torch.cat([getattr(text, part.name) for text in texts]) for part in fields(Text)))


Fill = Callable[[int, Tensor, Tensor], Tensor]   # (block l, text tokens [B, T, D], slots [B, T]) -> text tokens


def choose_device(name: str = "auto") -> torch.device:
    """auto takes CUDA, then MPS, then CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


class Pixels(nn.Module):
    """The tiny world's codec: x_0 is the picture itself."""
    factor = 1                                   # pixels a side for each value of x_0

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0


class Pipeline(nn.Module):
    """A text-to-image model: everything a prompt needs to become a picture.

    Args:
        tokenizer: texts, stand_ins -> ids [B, .], slots [B, T]. encoder: ids -> context [B, T, context_width], pooled [B, pooled_width].
        codec: pictures in [-1, 1] <-> x_0, `factor` times smaller.
        picture_size: pixels a side. shift, last_time: of the times in training and sampling (flow.py). guidance: what suits the model.
    """

    def __init__(self, tokenizer, encoder: nn.Module, mmdit: MMDiT, codec: nn.Module, picture_size: int, shift: float = 1.0,
                 last_time: float | None = None, guidance: float = 3.0):
        super().__init__()
        self.tokenizer, self.encoder, self.mmdit, self.codec = tokenizer, encoder, mmdit, codec
        self.picture_size, self.shift, self.last_time, self.guidance = picture_size, shift, last_time, guidance

    @classmethod
    def tiny(cls, config: MMDiTConfig = MMDiTConfig()) -> "Pipeline":
        """The picture-book model, untrained."""
        tokenizer = WordTokenizer()
        encoder = TextEncoder(TextConfig(tokenizer.vocabulary_size, width=config.context_width, pooled_width=config.pooled_width,
                                         hidden=4 * config.context_width))
        return cls(tokenizer, encoder, MMDiT(config), Pixels(), picture_size=32)

    @classmethod
    def shipped(cls, device="cpu", path=SHIPPED / "base.safetensors") -> "Pipeline":
        """The pretrained tiny base, frozen. Raises InputError for a damaged or foreign file."""
        pipe = cls.tiny()
        tensors, _ = load_tensors(path, "tinyflow base")
        load_into(pipe, {name: tensor.float() for name, tensor in tensors.items()}, path)
        return pipe.to(device).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.mmdit.final_linear.weight.device

    def encode_text(self, texts: list[str], stand_ins: dict[str, str] | None = None) -> Text:
        """stand_ins: placeholder -> the word that the encoder reads in its place. Raises InputError for unknown words."""
        ids, slots = self.tokenizer(texts, stand_ins)
        return Text(*self.encoder(ids.to(self.device)), slots.to(self.device))

    def velocity(self, x: Tensor, t: Tensor, text: Text, fill: Fill | None = None) -> Tensor:
        """v(x_t, t | text) [B, C, H, W] in fp32, computed in the model's dtype.

        `fill` may rewrite the text tokens at the input of every block (Eq. 7).
        """
        hook = None if fill is None else lambda l, c: fill(l, c, text.slots)
        dtype = self.mmdit.final_linear.weight.dtype
        return self.mmdit(x.to(dtype), t, text.context.to(dtype), text.pooled.to(dtype), hook).float()

    @torch.no_grad()
    def encode_images(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] -> x_0 [B, C, H / factor, W / factor]."""
        pixels = rearrange(torch.tensor(np.asarray(pictures), device=self.device), "b h w c -> b c h w") / 127.5 - 1
        return torch.cat([self.codec.encode(pixel[None]) for pixel in pixels])                   # one by one: a codec is hungry

    @torch.no_grad()
    def decode_images(self, x_0: Tensor) -> np.ndarray:
        """x_0 [B, C, H, W] -> uint8 [B, H * factor, W * factor, 3]."""
        pixels = torch.cat([self.codec.decode(latent[None]) for latent in x_0.float()])
        return rearrange(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()

    @torch.no_grad()
    def sample(self, text: Text, seeds: list[int], steps: int = 28, guidance: float | None = None, fill: Fill | None = None) -> Tensor:
        """Draws one picture for each row of `text`: x_0 [B, C, H, W]. Row i starts from the noise of seeds[i]. No guidance given: the model's own."""
        guidance = self.guidance if guidance is None else guidance
        both = Text.cat([self.encode_text([""])[[0] * len(seeds)], text])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 1:
                return self.velocity(x, t, text, fill)
            v_null, v_text = self.velocity(torch.cat([x, x]), torch.cat([t, t]), both, fill).chunk(2)
            return guide(v_null, v_text, guidance)

        side = self.picture_size // self.codec.factor
        x = noise_for(seeds, (self.mmdit.config.channels, side, side)).to(self.device)
        for _, x in tqdm(euler(guided, x, steps, self.shift, self.last_time), "sampling", steps, leave=False, delay=5):
            pass
        return x

"""The pipeline: tokenizer, text encoder and MMDiT behind four calls.

    encode_text     texts -> Text(context, pooled, slots)
    velocity        v(x_t, t | text), the model's prediction
    encode_images   uint8 pictures -> x_0;    decode_images   x_0 -> uint8 pictures

and `sample`, which draws pictures with them. In the tiny world the flow runs on pixels in [-1, 1], so encoding a picture is a
change of range. Read next: pretrain.py, or purecc_min.
"""

from dataclasses import dataclass, fields
from typing import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

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


class Pipeline(nn.Module):
    """A text-to-image model: everything a prompt needs to become a picture."""

    def __init__(self, config: MMDiTConfig = MMDiTConfig(), picture_size: int = 32, shift: float = 1.0):
        super().__init__()
        self.tokenizer = WordTokenizer()
        self.encoder = TextEncoder(TextConfig(self.tokenizer.vocabulary_size, width=config.context_width,
                                              pooled_width=config.pooled_width, hidden=4 * config.context_width))
        self.mmdit = MMDiT(config)
        self.picture_size, self.shift = picture_size, shift

    @classmethod
    def shipped(cls, device="cpu", path=SHIPPED / "base.safetensors") -> "Pipeline":
        """The pretrained tiny base, frozen. Raises InputError for a damaged or foreign file."""
        pipe = cls()
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
        """v(x_t, t | text) [B, C, H, W]. `fill` may rewrite the text tokens at the input of every block (Eq. 7)."""
        hook = None if fill is None else lambda l, c: fill(l, c, text.slots)
        return self.mmdit(x, t, text.context, text.pooled, hook)

    def encode_images(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] -> x_0 [B, 3, H, W] in [-1, 1]."""
        return rearrange(torch.tensor(np.asarray(pictures), device=self.device), "b h w c -> b c h w") / 127.5 - 1

    def decode_images(self, x_0: Tensor) -> np.ndarray:
        """x_0 [B, 3, H, W] -> uint8 [B, H, W, 3]."""
        pixels = ((x_0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return rearrange(pixels, "b c h w -> b h w c").cpu().numpy()

    @torch.no_grad()
    def sample(self, text: Text, seeds: list[int], steps: int = 28, guidance: float = 3.0, fill: Fill | None = None) -> Tensor:
        """Draws one picture for each row of `text`: x_0 [B, C, H, W]. Row i starts from the noise of seeds[i]."""
        null = self.encode_text([""] * len(seeds))
        both = Text.cat([null, text])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 1:
                return self.velocity(x, t, text, fill)
            v_null, v_text = self.velocity(torch.cat([x, x]), torch.cat([t, t]), both, fill).chunk(2)
            return guide(v_null, v_text, guidance)

        shape = (self.mmdit.config.channels, self.picture_size, self.picture_size)
        for _, x in euler(guided, noise_for(seeds, shape).to(self.device), steps, self.shift):
            pass
        return x

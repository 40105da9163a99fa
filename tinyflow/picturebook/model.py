"""The tiny model of the picture-book world: the classes of Stable Diffusion 3.5, in a size for a laptop.

    make_tiny()      untrained, as pretraining starts with it
    load_tiny()      with the weights of this repository (weights/README.md says how they were made)

Read next: pretrain.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.picturebook import world
from tinyflow.pipeline import Pipeline
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.tokenizer import WordTokenizer
from tinyflow.weights import load_into, load_tensors

SHIPPED = Path(__file__).parent / "weights"


class Pixels(nn.Module):
    """The codec of the tiny world: x_0 is the picture itself."""
    factor = 1                                   # one value of x_0 covers factor x factor pixels

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0


def make_tiny(config: MMDiTConfig = MMDiTConfig()) -> Pipeline:
    """The untrained model. The text encoder takes its widths from the MMDiT's configuration."""
    tokenizer = WordTokenizer(world.VOCABULARY)
    width = config.context_width
    encoder = TextEncoder(TextConfig(tokenizer.vocabulary_size, width=width, hidden=4 * width,
                                     pooled_width=config.pooled_width))
    return Pipeline(tokenizer, encoder, MMDiT(config), Pixels(), picture_size=world.SIZE)


def load_tiny(device: str | torch.device = "cpu",
              path: str | Path = SHIPPED / "base.safetensors") -> Pipeline:
    """The pretrained base model, frozen. Raises InputError for a damaged or foreign file."""
    pipe = make_tiny()
    tensors, _ = load_tensors(path, "tinyflow base")
    load_into(pipe, {name: tensor.float() for name, tensor in tensors.items()}, path)
    return pipe.to(device).requires_grad_(False).eval()

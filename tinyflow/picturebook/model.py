"""The tiny model of the picture-book world: the classes of Stable Diffusion 3.5, small enough for a laptop.

Its codec is of SD3's class, too: one latent position has 16 numbers and covers 4 x 4 pixels. The page
weights/README.md says how its weights were made. Read next: purecc_min/concept.py.
"""

from pathlib import Path

import torch

from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.tokenizer import WordTokenizer
from tinyflow.vae import VAE, VAEConfig
from tinyflow.weights import load_into, load_tensors

SHIPPED = Path(__file__).parent / "weights"
SHIFT = 3.0                                      # of times, as in SD3.5: a text has most effect at t > .7
SIZE = 64                                        # pixels a side of a picture
LENGTH = 44                                      # tokens of a text: start, end and at most 42 words


def make_codec(scale: float = 1.0, shift: float = 0.0) -> VAE:
    """The untrained codec. scale and shift are measured after training."""
    return VAE(VAEConfig((16, 32, 64), layers=1, latent_channels=16, groups=2, scale=scale, shift=shift))


def load_codec(path: str | Path = SHIPPED / "codec.safetensors") -> VAE:
    """The trained codec. Raises InputError for a damaged or foreign file."""
    tensors, facts = load_tensors(path, "tinyflow codec")
    codec = make_codec(facts["scale"], facts["shift"])
    load_into(codec, tensors, path)
    return codec


def make_tiny(config: MMDiTConfig = MMDiTConfig()) -> Pipeline:
    """The untrained model. The text encoder takes its widths from the MMDiT's configuration."""
    tokenizer = WordTokenizer((SHIPPED / "words.txt").read_text(encoding="utf-8").split(), LENGTH)
    width = config.context_width
    encoder = TextEncoder(TextConfig(tokenizer.vocabulary_size, LENGTH, width=width, hidden=4 * width,
                                     pooled_width=config.pooled_width))
    return Pipeline(tokenizer, encoder, MMDiT(config), make_codec(), picture_size=SIZE, shift=SHIFT)


def load_base(pipe: Pipeline, path: str | Path) -> None:
    """Loads everything but the codec. Raises InputError for a damaged file, or one of another kind."""
    codec = pipe.codec                           # it has a file of its own
    del pipe.codec
    load_into(pipe, load_tensors(path, "tinyflow base")[0], path)
    pipe.codec = codec


def load_tiny(device: str | torch.device = "cpu", path: str | Path = SHIPPED / "base.safetensors",
              codec: str | Path = SHIPPED / "codec.safetensors") -> Pipeline:
    """The pretrained base model, frozen. Raises InputError for a damaged or foreign file."""
    pipe = make_tiny()
    load_base(pipe, path)
    pipe.codec = load_codec(codec)
    return pipe.to(device).requires_grad_(False).eval()

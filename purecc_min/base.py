"""The bases on which a concept can be learned, with the settings that suit them.

    tiny             the picture-book model, shipped with this project
    sd3.5-medium     Stable Diffusion 3.5 Medium, the paper's base model, from its public weights; sd3-medium is its predecessor

All are one class, tinyflow.pipeline.Pipeline, and are trained by the same lines. Read next: train.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from purecc_min.train import TrainConfig
from tinyflow.errors import InputError
from tinyflow.pipeline import Pipeline, choose_device
from tinyflow.sd3 import load_sd3


@dataclass(frozen=True)
class Base:
    public: bool                                 # its weights are downloaded, not shipped
    training: TrainConfig                        # for the public ones, the paper's settings
    size: int                                    # pixels a side of a picture
    variants: int                                # of each reference picture: itself, random crops and flips


PAPER = TrainConfig(batch=2, learning_rate=1e-4, embedding_learning_rate=1e-4)
BASES = {"tiny": Base(False, TrainConfig(), size=32, variants=1),
         "sd3.5-medium": Base(True, PAPER, size=512, variants=8),
         "sd3-medium": Base(True, PAPER, size=512, variants=8)}


def check_base(name: str, weights: Path | None, size: int) -> None:
    """Raises InputError if a public base has no weights, the tiny one is given some, or pictures of `size` px cannot be cut into patches."""
    if BASES[name].public and weights is None:
        raise InputError(f"the base {name} is downloaded, not shipped: say where it is with --weights DIR (README, \"Stable Diffusion 3.5\")")
    if not BASES[name].public and weights is not None:
        raise InputError(f"--weights is for public weights, and the base is {name}; leave it out, or say --base sd3.5-medium")
    if not BASES[name].public and size != BASES[name].size:
        raise InputError(f"--size {size}: the {name} base draws {BASES[name].size} px only; leave it out")
    if size % 16:
        raise InputError(f"--size {size}: it must be a multiple of 16, for example {max(16, size // 16 * 16)}")


def usable_device(name: str) -> torch.device:
    """`auto` or a device by name. Raises InputError if it is not there."""
    device = choose_device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine has none that torch can use; try --device cpu") from None
    return device


def open_base(name: str, weights: Path | None, text: Path | None, size: int, device: torch.device) -> Pipeline:
    """The base as a frozen Pipeline. Raises InputError for weights that cannot be used."""
    return load_sd3(weights, text, size, device) if BASES[name].public else Pipeline.shipped(device)

"""The base models on which a concept can be learned, with the settings that suit them.

    tiny             the picture-book model, shipped with this project
    sd3.5-medium     Stable Diffusion 3.5 Medium, the paper's base model, from its public weights
    sd3-medium       the version before it, loaded by the same code

All are one class, tinyflow.pipeline.Pipeline, and are trained by the same code.
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from purecc_min.methods import Method
from purecc_min.train import TrainConfig
from tinyflow.errors import InputError
from tinyflow.picturebook.model import load_tiny, make_tiny
from tinyflow.pipeline import Pipeline
from tinyflow.sd3.load import load_sd3, load_tokenizer


@dataclass(frozen=True)
class BaseModel:
    public: bool                                 # its weights are downloaded, not shipped
    training: TrainConfig                        # for the public ones, the paper's settings
    size: int                                    # side of a picture, in pixels
    variants: int                                # pictures made of each reference: itself, crops and flips
    method: str                                  # the default, a key of METHODS
    method_of_a_style: str


OF_PAPER = TrainConfig(batch=2, learning_rate=1e-4, embedding_learning_rate=1e-4)
PUBLIC = BaseModel(True, OF_PAPER, size=512, variants=8, method="paper", method_of_a_style="paper")
BASE_MODELS = {"tiny": BaseModel(False, TrainConfig(steps=200), size=64, variants=1, method="bound-pairs",
                                  method_of_a_style="switched-off"),
               "sd3.5-medium": PUBLIC,
               "sd3-medium": PUBLIC}


def training_config(options: argparse.Namespace, base: str, method: Method) -> TrainConfig:
    """The settings for a base model and a method; options of the command line replace them."""
    model = BASE_MODELS[base]
    settings = replace(model.training, **({} if model.public else method.settings))
    options_of = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    overrides = {name: value for name, value in options_of.items() if value is not None}
    if "learning_rate" in overrides:             # --learning-rate sets the rate of both stages
        overrides["extractor_learning_rate"] = None
    return replace(settings, **overrides)


def check_base_model(name: str, weights: Path | None, text: Path | None, size: int) -> None:
    """Raises InputError if weights are missing or not needed, or if `size` does not suit the model."""
    model = BASE_MODELS[name]
    if model.public and weights is None:
        raise InputError(f"the base model {name} is downloaded, not shipped: say where it is with "
                         "--weights DIR (tinyflow/sd3/README.md)")
    if not model.public and (weights or text):
        raise InputError(f"--weights and --text are for public weights, and the base model is {name}; leave "
                         "them out, or learn with --base sd3.5-medium")
    if not model.public and size != model.size:
        raise InputError(f"--size {size}: the {name} base model draws {model.size} px only; leave it out")
    if size % 16:
        nearest = max(16, size // 16 * 16)
        raise InputError(f"--size {size}: it must be a multiple of 16, for example {nearest}")


def open_tokenizer(name: str, weights: Path | None, text: Path | None):
    """Only the tokenizer, so that texts are checked before weights are loaded. Raises InputError."""
    return load_tokenizer(weights, text) if BASE_MODELS[name].public else make_tiny().tokenizer


def open_base_model(name: str, weights: Path | None, text: Path | None, size: int,
                    device: torch.device) -> Pipeline:
    """The base model as a frozen Pipeline. Raises InputError for weights that cannot be used."""
    if BASE_MODELS[name].public:
        return load_sd3(weights, text, size, device, half_precision(device))
    return load_tiny(device)


def half_precision(device: torch.device) -> torch.dtype:
    """bf16, and fp16 on CUDA cards that do not compute in bf16: those before Ampere, such as a T4."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16
    return torch.bfloat16

"""Where the tensors of each model lie: in a diffusers folder, or in a single file.

Stable Diffusion 3 consists of five models (transformer, VAE, CLIP-L, CLIP-G, T5), and each of them is one
`Part` here. Only headers and small JSON files are read. Read next: checkpoint.py.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from tinyflow.checkpoints import is_number
from tinyflow.disk import read_json
from tinyflow.errors import InputError, shown
from tinyflow.sd3.checkpoint import Checkpoint
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE

PARTS = {                                        # folder, file stem, prefix in a single file, tokenizer
    "transformer": ("transformer", "diffusion_pytorch_model", "model.diffusion_model.", None),
    "vae": ("vae", "diffusion_pytorch_model", "first_stage_model.", None),
    "clip_l": ("text_encoder", "model", "text_encoders.clip_l.transformer.", "tokenizer"),
    "clip_g": ("text_encoder_2", "model", "text_encoders.clip_g.transformer.", "tokenizer_2"),
    "t5": ("text_encoder_3", "model", "text_encoders.t5xxl.transformer.", "tokenizer_3"),
}
KIND = "StableDiffusion3Pipeline"                # what the model_index.json of SD3 and SD3.5 says


@dataclass(frozen=True)
class Part:
    """One model's tensors: where they are, how they are named there, and the numbers that shapes do not tell.

    Args:
        prefix: what the names of its tensors begin with.
        layout: DIFFUSERS or SINGLE.
        config: its config.json, or {}.
    """
    checkpoint: Checkpoint
    prefix: str
    layout: int
    config: dict

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.checkpoint.under(self.prefix)

    def number(self, name: str, default: float) -> float:
        """A number of config.json. Raises InputError if there is something else."""
        value = self.config.get(name, default)
        if not is_number(value):
            raise InputError(f"{self.checkpoint.where}: {name} in config.json is {shown(value)}, which is no "
                             "number; download it again")
        return value

    def count(self, block: str) -> int:
        """Counts the blocks that are numbered after `block`, as in "encoder.layers.7.norm.weight"."""
        behind = [name.removeprefix(block) for name in self.shapes if name.startswith(block)]
        return sum(number.isdecimal() for number in {name.partition(".")[0] for name in behind})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises InputError if it is not there."""
        if name not in self.shapes:
            raise InputError(f"{self.checkpoint.where}: there is no {self.prefix}{name}; this is another "
                             "model, and Stable Diffusion 3 or 3.5 is needed")
        return self.shapes[name]

    @contextmanager
    def building(self):
        """Within this context sizes are read off this part, and modules are built on the meta device.

        Raises InputError if no model can have these sizes.
        """
        try:
            with torch.device("meta"):
                yield
        except InputError:
            raise
        except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise InputError(f"{self.checkpoint.where}: the shapes contradict each other ({error})") from None


def read_config(path: Path) -> dict:
    """A JSON object, or {} if there is no such file. Raises InputError if it is damaged."""
    return read_json(path, "download it again") if path.exists() else {}


def find_parts(weights: str | Path, text: str | Path | None) -> tuple[dict[str, Part], dict[str, Path]]:
    """Finds the models, and the folders of their tokenizers, by their names in PARTS. There may be no T5.

    Args:
        weights: a diffusers folder or a single file. text: a folder for what `weights` lacks.
    Raises: InputError that lists everything else that is absent, or says why a file cannot be used.
    """
    places = [Path(weights), Path(text)] if text else [Path(weights)]
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: there is no such file or folder")
    parts, tokenizers, taken = {}, {}, set()
    if places[0].is_file():
        checkpoint = Checkpoint(places[:1])
        if checkpoint.under("transformer_blocks."):
            raise InputError(f"{places[0]}: this is the transformer of a diffusers folder; give the folder "
                             "that holds transformer/, vae/ and the others")
        found = {name: Part(checkpoint, prefix, SINGLE, {}) for name, (_, _, prefix, _) in PARTS.items()}
        found["transformer"].shape("x_embedder.proj.weight")     # an error says that this is another model
        parts = {name: part for name, part in found.items() if part.shapes}
    for place in filter(Path.is_dir, places):
        kind = read_config(place / "model_index.json").get("_class_name", KIND)
        if kind != KIND:
            raise InputError(f"{place}: this folder holds a {kind}; "
                             f"a {KIND} (Stable Diffusion 3 or 3.5) is needed")
        for name, (folder, stem, _, tokenizer) in PARTS.items():
            config = read_config(place / folder / "config.json")
            if name not in parts and (checkpoint := Checkpoint.find(place / folder, stem)):
                parts[name] = Part(checkpoint, "", DIFFUSERS, config)
                taken.add(place)
            elif name in parts and config and not parts[name].config:    # a single file has no config.json
                parts[name] = replace(parts[name], config=config)
                taken.add(place)
            if tokenizer and name not in tokenizers and (place / tokenizer).is_dir():
                tokenizers[name] = place / tokenizer
                taken.add(place)
    if text and places[1] not in taken:
        raise InputError(f"--text {text}: nothing was taken from it; give a folder with what {weights} "
                         "lacks, such as text_encoder_3/ and tokenizer_3/, or leave it out")
    for place in places:                         # otherwise nobody would notice that T5 is not used
        half = place / PARTS["t5"][0]
        if "t5" not in parts and os.path.lexists(half):
            raise InputError(f"{half}: there is no model.safetensors in it; complete the download, or delete "
                             "the folder to run without T5")
    needed = [name for name in PARTS if name != "t5" or name in parts]
    missing = [f"{PARTS[name][0]}/" for name in needed if name not in parts]
    missing += [f"{PARTS[name][3]}/" for name in needed if PARTS[name][3] and name not in tokenizers]
    if missing:
        advice = "download these too" if places[0].is_dir() else "give it with --text DIR"
        raise InputError(f"{' and '.join(map(str, places))}: no {', '.join(missing)}; "
                         f"the diffusers folder of the model has them: {advice}")
    return parts, {name: folder for name, folder in tokenizers.items() if name in needed}

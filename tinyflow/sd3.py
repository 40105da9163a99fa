"""Stable Diffusion 3 and 3.5: the public weights in this project's classes.

    load_sd3(DIR or FILE) -> Pipeline            tokenizers, CLIP-L, CLIP-G, T5, MMDiT and VAE

All sizes are read off the tensors' shapes, so 3.5 Medium, 3 Medium and a small random model of the same layout load alike. The text
encoders stay in mapped host memory, in the file's own dtype, and visit the device layer by layer. How their outputs become one `Text` is
SD3Encoder.forward. Read next: sd3_tokenizers.py.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflow.checkpoint import Checkpoint, load
from tinyflow.errors import InputError
from tinyflow.layouts import DIFFUSERS, SINGLE, clip_layers, mmdit_layers, t5_layers, vae_layers
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline
from tinyflow.sd3_tokenizers import ClipTokenizer, T5Tokenizer
from tinyflow.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.vae import VAE, VAEConfig

SD35_MEDIUM = MMDiTConfig(channels=16, patch=2, width=1536, depth=24, heads=24, context_width=4096, pooled_width=2048, max_grid=384, base_grid=64,
                          qk_norm=True, dual_attention_layers=tuple(range(13)))
SHIFT, LAST_TIME = 3.0, 0.002994                 # of the public scheduler
GUIDANCE = 5.0                                   # Stability's own for 3.5 Medium
POSITIONS = {DIFFUSERS: "pos_embed.pos_embed", SINGLE: "pos_embed"}
HEAD_WIDTH = 64                                  # in every published SD3 transformer and CLIP; small test models say otherwise in config.json
PARTS = {                                        # part -> folder and file stem in a diffusers folder; prefix in a single file
    "transformer": ("transformer", "diffusion_pytorch_model", "model.diffusion_model."),
    "vae": ("vae", "diffusion_pytorch_model", "first_stage_model."),
    "clip_l": ("text_encoder", "model", "text_encoders.clip_l.transformer."),
    "clip_g": ("text_encoder_2", "model", "text_encoders.clip_g.transformer."),
    "t5": ("text_encoder_3", "model", "text_encoders.t5xxl.transformer."),
}
TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}


class SD3Tokenizer:
    """The three tokenizers behind one call: ids side by side [B, 77 + 77 + 256], slots as the text stream has them [B, 77 + 256]."""

    def __init__(self, clip_l: ClipTokenizer, clip_g: ClipTokenizer, t5: T5Tokenizer | None):
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5

    def __call__(self, texts: list[str], stand_ins: dict[str, str] | None = None) -> tuple[Tensor, Tensor]:
        (ids_l, slots), (ids_g, _) = self.clip_l(texts, stand_ins), self.clip_g(texts, stand_ins)
        ids_t5, slots_t5 = self.t5(texts, stand_ins) if self.t5 else (torch.zeros(len(texts), 256).long(), torch.zeros(len(texts), 256).bool())
        return torch.cat([ids_l, ids_g, ids_t5], dim=1), torch.cat([slots, slots_t5], dim=1)


class SD3Encoder(nn.Module):
    """CLIP-L, CLIP-G and T5 as one text encoder. Without T5 its 256 tokens are zeros, as in diffusers (other programs leave them out)."""

    def __init__(self, clip_l: TextEncoder, clip_g: TextEncoder, t5: T5Encoder | None, context_width: int):
        super().__init__()
        self.clip_l, self.clip_g, self.t5, self.context_width = clip_l, clip_g, t5, context_width

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, 77 + 77 + 256] -> context [B, 77 + 256, context_width], pooled [B, pooled_width]."""
        lengths = [self.clip_l.config.length, self.clip_g.config.length]
        ids_l, ids_g, ids_t5 = ids.split([*lengths, ids.shape[1] - sum(lengths)], dim=1)
        (context_l, pooled_l), (context_g, pooled_g) = self.clip_l(ids_l), self.clip_g(ids_g)
        clip = torch.cat([context_l, context_g], dim=-1)                                         # [B, 77, 768 + 1280]
        clip = F.pad(clip, (0, self.context_width - clip.shape[-1]))                             # [B, 77, 4096]
        t5 = self.t5(ids_t5) if self.t5 else clip.new_zeros(*ids_t5.shape, self.context_width)   # [B, 256, 4096]
        return torch.cat([clip, t5], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)


@dataclass(frozen=True)
class Part:
    """One model's tensors: where they are, how they are called there, and the numbers that shapes do not tell."""
    checkpoint: Checkpoint
    prefix: str
    layout: int
    config: dict

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.checkpoint.under(self.prefix)

    def count(self, block: str) -> int:
        """How many blocks are numbered behind `block`, as in "encoder.layers.7.norm.weight"."""
        numbers = {name.removeprefix(block).partition(".")[0] for name in self.shapes if name.startswith(block)}
        return len([number for number in numbers if number.isdecimal()])

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Raises InputError if there is no such tensor, which other models' files lack, or if its shape is none that a model can have."""
        if name not in self.shapes:
            raise InputError(f"{self.checkpoint.where}: there is no {self.prefix}{name}; this file holds {self.checkpoint.contents()}, "
                             "and Stable Diffusion 3 or 3.5 is needed")
        if len(self.shapes[name]) != dimensions or 0 in self.shapes[name]:
            raise InputError(f"{self.checkpoint.where}: {self.prefix}{name} is {self.shapes[name]}, where {dimensions} dimensions are needed")
        return self.shapes[name]

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module on the meta device. Raises InputError if the sizes that were read off contradict each other."""
        try:
            with torch.device("meta"):
                return make()
        except InputError:
            raise
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise InputError(f"{self.checkpoint.where}: the shapes contradict each other ({error})") from None


def read_json(path: Path) -> dict:
    """A JSON object, or {} if there is no such file. Raises InputError if it is damaged."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{path}: damaged; download it again") from None


def find_parts(weights: Path, text: Path | None) -> tuple[dict[str, Part], dict[str, Path]]:
    """The models, and the folders of their tokenizers. T5 may be absent. Raises InputError that lists everything else that is."""
    for place in filter(None, (weights, text)):
        if not place.exists():
            raise InputError(f"{place}: there is no such file or folder")
    parts, tokenizers = {}, {}
    if weights.is_file():
        checkpoint = Checkpoint([weights])
        transformer = Part(checkpoint, PARTS["transformer"][2], SINGLE, {})
        transformer.shape("x_embedder.proj.weight", 4)
        parts = {name: Part(checkpoint, prefix, SINGLE, {}) for name, (_, _, prefix) in PARTS.items() if checkpoint.under(prefix)}
    for place in (place for place in (weights, text) if place and place.is_dir()):
        kind = read_json(place / "model_index.json").get("_class_name", "StableDiffusion3Pipeline")
        if kind != "StableDiffusion3Pipeline":
            raise InputError(f"{place}: this folder holds a {kind}; a StableDiffusion3Pipeline (Stable Diffusion 3 or 3.5) is needed")
        for name, (folder, stem, _) in PARTS.items():
            if name not in parts and (checkpoint := Checkpoint.find(place / folder, stem)):
                parts[name] = Part(checkpoint, "", DIFFUSERS, read_json(place / folder / "config.json"))
        for name, folder in TOKENIZERS.items():
            if (place / folder).is_dir():
                tokenizers.setdefault(name, place / folder)
    missing = [f"{PARTS[name][0]}/" for name in ("transformer", "vae", "clip_l", "clip_g") if name not in parts]
    missing += [f"{folder}/" for name, folder in TOKENIZERS.items() if name not in tokenizers and (name != "t5" or "t5" in parts)]
    if missing:
        raise InputError(f"{weights}{f' and {text}' if text else ''}: no {', '.join(missing)}; the diffusers folder of the model has "
                         f"{'them: download these too' if weights.is_dir() else 'them: give it with --text DIR'}")
    return parts, tokenizers


def mmdit_config(part: Part, latent_size: int) -> MMDiTConfig:
    """Of the transformer in a checkpoint, with as many positions as latents of `latent_size` a side need. Raises InputError if it has fewer."""
    block, patches = (("joint_blocks.", "x_embedder.proj") if part.layout == SINGLE else ("transformer_blocks.", "pos_embed.proj"))
    width, channels, patch, _ = part.shape(f"{patches}.weight", 4)
    depth = part.count(block)
    layers = mmdit_layers(part.layout, max(depth, 1))
    source = lambda layer: layers[layer].partition("[")[0] + ".weight"
    norm = source("blocks.0.attention.image.norm_q")
    head_width = part.shape(norm, 1)[0] if norm in part.shapes else part.config.get("attention_head_dim", HEAD_WIDTH)
    rows, grid = latent_size // patch, isqrt(part.shape(POSITIONS[part.layout], 3)[1])
    rows += (grid - rows) % 2                    # so that a crop's centre is the whole's
    if rows > grid:
        raise InputError(f"{part.checkpoint.where}: it knows positions for {grid} x {grid} patches, not for {rows} x {rows}; choose a smaller --size")
    return MMDiTConfig(channels, patch, width, depth, max(1, width // head_width), part.shape("context_embedder.weight", 2)[1],
                       part.shape(source("pooled_embedder.fc1"), 2)[1], max_grid=rows, base_grid=rows, qk_norm=norm in part.shapes,
                       dual_attention_layers=tuple(n for n in range(depth) if source(f"blocks.{n}.attention2.to_q") in part.shapes))


def load_mmdit(part: Part, latent_size: int, dtype: torch.dtype, device) -> MMDiT:
    """Of a full-size file's 384 x 384 positions only those are kept that latents of `latent_size` a side need."""
    mmdit = part.build(lambda: MMDiT(mmdit_config(part, latent_size)))
    positions, rows = POSITIONS[part.layout], mmdit.config.max_grid
    load(mmdit, part.checkpoint, part.prefix, mmdit_layers(part.layout, mmdit.config.depth), dtype, device, extra=(positions,))
    grid = isqrt(part.shape(positions, 3)[1])
    first = (grid - rows) // 2
    mapped = part.checkpoint.tensor(part.prefix + positions)[:, :grid**2].unflatten(1, (grid, grid))
    mmdit.positions = mapped[0, first:first + rows, first:first + rows].to(device=device, dtype=dtype, copy=True)
    return mmdit


def load_clip(part: Part, activation: str) -> TextEncoder:
    vocabulary_size, width = part.shape("text_model.embeddings.token_embedding.weight", 2)
    depth = part.count("text_model.encoder.layers.")
    projection = part.shapes.get("text_projection.weight", (None,))
    length, hidden = (part.shape(f"text_model.{name}.weight", 2)[0] for name in ("embeddings.position_embedding", "encoder.layers.0.mlp.fc1"))
    heads = part.config.get("num_attention_heads", width // HEAD_WIDTH)
    encoder = part.build(lambda: TextEncoder(TextConfig(vocabulary_size, length, width, depth, heads, hidden, projection[0],
                                                        end=vocabulary_size - 1, activation=activation)))
    load(encoder, part.checkpoint, part.prefix, clip_layers(depth), None, "cpu")
    return encoder


def load_t5(part: Part) -> T5Encoder:
    both = [name for name in ("shared", "encoder.embed_tokens") if f"{name}.weight" in part.shapes] or ["shared"]
    vocabulary_size, width = part.shape(f"{both[0]}.weight", 2)
    depth, first = part.count("encoder.block."), "encoder.block.0.layer."
    buckets, heads = part.shape(f"{first}0.SelfAttention.relative_attention_bias.weight", 2)
    inner, hidden = part.shape(f"{first}0.SelfAttention.q.weight", 2)[0], part.shape(f"{first}1.DenseReluDense.wi_0.weight", 2)[0]
    encoder = part.build(lambda: T5Encoder(T5Config(vocabulary_size, width, depth, heads, inner // heads, hidden, buckets)))
    load(encoder, part.checkpoint, part.prefix, t5_layers(depth, both[0]), None, "cpu", extra=tuple(f"{name}.weight" for name in both[1:]))
    return encoder


def vae_config(part: Part) -> VAEConfig:
    level, block = ("down", "block") if part.layout == SINGLE else ("down_blocks", "resnets")
    channels = tuple(part.shape(f"encoder.{level}.{n}.{block}.0.conv1.weight", 4)[0] for n in range(part.count(f"encoder.{level}.")))
    published = VAEConfig()
    return VAEConfig(channels, part.count(f"encoder.{level}.0.{block}."), part.shape("decoder.conv_in.weight", 4)[1],
                     part.config.get("norm_num_groups", published.groups), part.config.get("scaling_factor", published.scale),
                     part.config.get("shift_factor", published.shift))


def load_vae(part: Part, device) -> VAE:
    """In fp32: it is small, and half precision shows in the pictures."""
    config = vae_config(part)
    vae = part.build(lambda: VAE(config))
    load(vae, part.checkpoint, part.prefix, vae_layers(part.layout, len(config.channels), config.layers), torch.float32, device)
    return vae


def load_tokenizer(weights: str | Path, text: str | Path | None = None) -> SD3Tokenizer:
    """The three tokenizers of a model, or two where it has no T5."""
    parts, folders = find_parts(Path(weights), Path(text) if text else None)
    return SD3Tokenizer(ClipTokenizer(folders["clip_l"], pad=49407), ClipTokenizer(folders["clip_g"], pad=0),
                        T5Tokenizer(folders["t5"]) if "t5" in parts else None)


def read_config(weights: str | Path, text: str | Path | None, size: int) -> MMDiTConfig:
    """The transformer's configuration for pictures of `size` px, from shapes alone: nothing is loaded."""
    parts, _ = find_parts(Path(weights), Path(text) if text else None)
    return mmdit_config(parts["transformer"], size // vae_config(parts["vae"]).factor)


def load_sd3(weights: str | Path, text: str | Path | None = None, size: int = 512, device="cpu", dtype: torch.dtype = torch.bfloat16) -> Pipeline:
    """Public weights as a frozen Pipeline.

    Args:
        weights: a diffusers folder, or a single file. text: a folder for the text encoders and tokenizers that `weights` lacks.
        size: pixels a side of the pictures. dtype: of the MMDiT.
    Raises: InputError for everything that cannot be used: see checkpoint.py.
    """
    tokenizer, (parts, _) = load_tokenizer(weights, text), find_parts(Path(weights), Path(text) if text else None)
    clip_l, clip_g = load_clip(parts["clip_l"], "quick_gelu"), load_clip(parts["clip_g"], "gelu")
    t5 = load_t5(parts["t5"]) if "t5" in parts else None
    vae = load_vae(parts["vae"], device)
    mmdit = load_mmdit(parts["transformer"], size // vae.factor, dtype, device)
    encoder = SD3Encoder(clip_l, clip_g, t5, mmdit.config.context_width)
    return Pipeline(tokenizer, encoder, mmdit, vae, size, SHIFT, LAST_TIME, GUIDANCE).requires_grad_(False).eval()

"""Stable Diffusion 3 and 3.5: from public weights to a Pipeline.

    load_sd3(DIR or FILE) -> Pipeline            with tokenizers, CLIP-L, CLIP-G, T5, MMDiT and VAE

All sizes are read off the shapes of the tensors, so 3.5 Medium, 3 Medium and a small random model of the same
layout are loaded by the same lines. parts.py finds the tensors, checkpoint.py reads them, and layouts.py
translates their names. Read next: parts.py.
"""

from math import isqrt
from pathlib import Path

import torch

from tinyflow.errors import InputError, shown
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline
from tinyflow.sd3.checkpoint import load
from tinyflow.sd3.encoder import SD3Encoder, SD3Tokenizer
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE, clip_layers, mmdit_layers, t5_layers, vae_layers
from tinyflow.sd3.offload import offload
from tinyflow.sd3.parts import Part, find_parts
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.vae import VAE, VAEConfig

SD35_MEDIUM = MMDiTConfig(channels=16, patch=2, width=1536, depth=24, heads=24,
                          context_width=4096, pooled_width=2048, max_grid=384, base_grid=64,
                          qk_norm=True, dual_attention_layers=tuple(range(13)))
SHIFT, LAST_TIME = 3.0, 0.002994                 # as in the scheduler that is published with the weights
GUIDANCE = 5.0                                   # Stability's own choice for 3.5 Medium
HEAD_WIDTH = 64                                  # of all published models; others say theirs in config.json
BLOCKS = {DIFFUSERS: "transformer_blocks.", SINGLE: "joint_blocks."}
POSITIONS = {DIFFUSERS: "pos_embed.pos_embed", SINGLE: "pos_embed"}


def mmdit_config(part: Part, latent_size: int) -> MMDiTConfig:
    """The configuration of the transformer, with the positions that latents of `latent_size` a side need.

    Raises InputError if the checkpoint has fewer positions.
    """
    depth = part.count(BLOCKS[part.layout])
    layers = mmdit_layers(part.layout, max(depth, 1))
    weights = {ours: theirs.partition("[")[0] + ".weight" for ours, theirs in layers.items()}
    width, channels, patch, _ = part.shape(weights["patch_embedder"])
    norm = weights["blocks.0.attention.image.norm_q"]
    has_norm = norm in part.shapes
    head_width = part.shape(norm)[0] if has_norm else int(part.number("attention_head_dim", HEAD_WIDTH))
    rows, grid = latent_size // patch, isqrt(part.shape(POSITIONS[part.layout])[1])
    rows += (grid - rows) % 2                    # so that the crop can have the same centre as the whole
    if rows > grid:
        raise InputError(f"{part.checkpoint.where}: it knows positions for {grid} x {grid} patches, "
                         f"not for {rows} x {rows}; choose a smaller --size")
    dual = tuple(n for n in range(depth) if weights[f"blocks.{n}.attention2.to_q"] in part.shapes)
    return MMDiTConfig(channels, patch, width, depth, heads=max(1, width // head_width),
                       context_width=part.shape(weights["context_embedder"])[1],
                       pooled_width=part.shape(weights["pooled_embedder.fc1"])[1],
                       max_grid=rows, base_grid=rows, qk_norm=has_norm, dual_attention_layers=dual)


def load_mmdit(part: Part, latent_size: int, dtype: torch.dtype, device) -> MMDiT:
    """The transformer. The published files hold 384 x 384 positions, and only the needed ones are kept."""
    with part.building():
        mmdit = MMDiT(mmdit_config(part, latent_size))
    layers, positions = mmdit_layers(part.layout, mmdit.config.depth), POSITIONS[part.layout]
    load(mmdit, part.checkpoint, part.prefix, layers, dtype, device, extra=(positions,))
    grid, rows = isqrt(part.shape(positions)[1]), mmdit.config.max_grid
    crop = slice((grid - rows) // 2, (grid + rows) // 2)
    mapped = part.checkpoint.tensor(part.prefix + positions)[0, :grid**2].unflatten(0, (grid, grid))
    mmdit.positions = mapped[crop, crop].to(device=device, dtype=dtype, copy=True)     # [G, G, width]
    return mmdit


def load_clip(part: Part, activation: str) -> TextEncoder:
    """CLIP-L (activation "quick_gelu") or CLIP-G ("gelu"). The weights stay in the file: see offload.py."""
    depth, projection = part.count("text_model.encoder.layers."), "text_projection.weight"
    if (found := part.config.get("hidden_act", activation)) != activation:
        raise InputError(f"{part.checkpoint.where}: its config.json names the activation {shown(str(found))} "
                         f"in place of {activation}; are text_encoder/ and text_encoder_2/ exchanged?")
    with part.building():
        vocabulary_size, width = part.shape("text_model.embeddings.token_embedding.weight")
        length, _ = part.shape("text_model.embeddings.position_embedding.weight")
        hidden, _ = part.shape("text_model.encoder.layers.0.mlp.fc1.weight")
        pooled_width = part.shape(projection)[0] if projection in part.shapes else None
        heads = int(part.number("num_attention_heads", 0 if width % HEAD_WIDTH else width // HEAD_WIDTH))
        if heads < 1 or width % heads:
            raise InputError(f"{part.checkpoint.where}: {part.prefix} has width {width} that does not divide "
                             f"into heads of {HEAD_WIDTH}; its config.json says how many there are: give the "
                             "folder of the text encoders as --text DIR")
        encoder = TextEncoder(TextConfig(vocabulary_size, length, width, depth, heads, hidden, pooled_width,
                                         end=vocabulary_size - 1, activation=activation))
    load(encoder, part.checkpoint, part.prefix, clip_layers(depth), None, "cpu")
    return offload(encoder)


def load_t5(part: Part) -> T5Encoder:
    """T5's encoder. The weights stay in the file, which names the token embedding once or twice."""
    token_embedding = "shared" if "shared.weight" in part.shapes else "encoder.embed_tokens"
    depth, first = part.count("encoder.block."), "encoder.block.0.layer."
    with part.building():
        vocabulary_size, width = part.shape(f"{token_embedding}.weight")
        buckets, heads = part.shape(f"{first}0.SelfAttention.relative_attention_bias.weight")
        inner, _ = part.shape(f"{first}0.SelfAttention.q.weight")
        hidden, _ = part.shape(f"{first}1.DenseReluDense.wi_0.weight")
        encoder = T5Encoder(T5Config(vocabulary_size, width, depth, heads, inner // heads, hidden, buckets))
    load(encoder, part.checkpoint, part.prefix, t5_layers(depth, token_embedding), None, "cpu",
         extra=("encoder.embed_tokens.weight",))         # the same values again, in some files
    return offload(encoder)


def vae_config(part: Part) -> VAEConfig:
    """The configuration of the autoencoder. What a single file does not tell is taken to be SD3's."""
    level, block = ("down", "block") if part.layout == SINGLE else ("down_blocks", "resnets")
    channels = tuple(part.shape(f"encoder.{level}.{n}.{block}.0.conv1.weight")[0]
                     for n in range(max(1, part.count(f"encoder.{level}."))))
    published = VAEConfig()
    return VAEConfig(channels, layers=part.count(f"encoder.{level}.0.{block}."),
                     latent_channels=part.shape("decoder.conv_in.weight")[1],
                     groups=int(part.number("norm_num_groups", published.groups)),
                     scale=part.number("scaling_factor", published.scale),
                     shift=part.number("shift_factor", published.shift))


def load_vae(part: Part, device) -> VAE:
    """The autoencoder, in fp32: it is small, and half precision shows in the pictures."""
    with part.building():
        vae = VAE(vae_config(part))
    layers = vae_layers(part.layout, len(vae.config.channels), vae.config.layers)
    load(vae, part.checkpoint, part.prefix, layers, torch.float32, device)
    return vae


def load_tokenizer(weights: str | Path, text: str | Path | None = None) -> SD3Tokenizer:
    """The tokenizers of a model: three, or two if it has no T5. Raises InputError as `load_sd3` does."""
    _, folders = find_parts(weights, text)
    return SD3Tokenizer(folders)


def read_config(weights: str | Path, text: str | Path | None, size: int) -> MMDiTConfig:
    """The transformer's configuration for pictures of `size` pixels a side. No tensor is read for it.

    Raises InputError as `load_sd3` does.
    """
    parts, _ = find_parts(weights, text)
    with parts["transformer"].building():
        return mmdit_config(parts["transformer"], latent_size(parts["vae"], size))


def latent_size(vae: Part, size: int) -> int:
    """Latents a side of pictures of `size` pixels. Raises InputError if these do not make whole patches."""
    with vae.building():
        factor = vae_config(vae).factor
    step = 2 * factor                            # all published models have patches of 2 x 2 latents
    if size < step or size % step:
        raise InputError(f"pictures of {size} px: the side must be a multiple of {step}, for example "
                         f"{max(step, size // step * step)}")
    return size // factor


def load_sd3(weights: str | Path, text: str | Path | None = None, size: int = 512, device="cpu",
             dtype: torch.dtype = torch.bfloat16) -> Pipeline:
    """Loads public weights as a frozen Pipeline.

    Args:
        weights: a diffusers folder, or a single file.
        text: a folder for the text encoders and tokenizers that `weights` lacks.
        size: pixels a side of the pictures.
        device: of the MMDiT and the VAE. The text encoders stay in host memory: see offload.py.
        dtype: of the MMDiT.
    Raises: InputError for a size that does not make whole patches, and for every file that cannot be used:
        see parts.py and checkpoint.py.
    """
    parts, folders = find_parts(weights, text)
    side, tokenizer = latent_size(parts["vae"], size), SD3Tokenizer(folders)
    clip_l, clip_g = load_clip(parts["clip_l"], "quick_gelu"), load_clip(parts["clip_g"], "gelu")
    t5 = load_t5(parts["t5"]) if "t5" in parts else None
    vae = load_vae(parts["vae"], device)
    mmdit = load_mmdit(parts["transformer"], side, dtype, device)
    widths = [clip_l.config.pooled_width, clip_g.config.pooled_width]
    if (None in widths or sum(widths) != mmdit.config.pooled_width
            or vae.config.latent_channels != mmdit.config.channels
            or t5 and t5.config.width != mmdit.config.context_width):
        raise InputError(f"{weights}: its parts are of different models, whose widths do not fit each other; "
                         "download all of one model")
    encoder = SD3Encoder(clip_l, clip_g, t5, mmdit.config.context_width)
    return Pipeline(tokenizer, encoder, mmdit, vae, size, SHIFT, LAST_TIME,
                    GUIDANCE).requires_grad_(False).eval()

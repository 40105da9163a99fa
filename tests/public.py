"""A small Stable Diffusion 3 with random weights in the public layouts.

diffusers and transformers write the folder themselves. The single file is written here, by `to_single_file`,
and test_sd3.py lets diffusers' own converters read it.
"""

import gzip
import json
import shutil
from functools import partial
from importlib.metadata import files
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from tinyflow.sd3.checkpoint import take
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE, mmdit_layers, vae_layers

PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}        # of CLIP-L and of CLIP-G


def write_clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of CLIP, from the merges that OpenAI's package ships."""
    packed = next(file for file in files("openai-clip") if file.name == "bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(packed.locate().read_bytes()).decode().split("\n")[1:48895]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())        # one visible character for each byte
    words = [*symbols, *(symbol + "</w>" for symbol in symbols),
             *(merge.replace(" ", "") for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({word: n for n, word in enumerate(words)})
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def write_t5_tokenizer(folder: Path) -> None:
    """A small unigram tokenizer.json, built as T5's is. Its settings to cut and to pad must not matter."""
    words = ["▁a", "▁the", "▁on", "▁and", "▁dog", "▁cat", "▁robot", "▁big", "▁te", "dd", "y", "▁be", "ar",
             "▁beach", "▁photo", "graph", "ing", "s", "▁1", "▁"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'![]é⁄"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -3.0) for word in words),
                  *((letter, -6.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()    # changes how many characters there are
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_tokenizers(folder: Path) -> None:
    for name in PADS:
        write_clip_tokenizer(folder / name)
    write_t5_tokenizer(folder / "tokenizer_3")


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Random weights: no gate, norm or bias is left at zero or one. The meta device has no numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                continue
            norm = "norm" in name and name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(norm + 0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def small_transformer(**changes) -> diffusers.SD3Transformer2DModel:
    settings = dict(sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3,
                    attention_head_dim=16, num_attention_heads=2, joint_attention_dim=80,
                    pooled_projection_dim=56, pos_embed_max_size=12, dual_attention_layers=(0, 1),
                    qk_norm="rms_norm") | changes
    settings["caption_projection_dim"] = settings["attention_head_dim"] * settings["num_attention_heads"]
    return randomise(diffusers.SD3Transformer2DModel(**settings), seed=1)


def small_vae(channels: tuple[int, ...] = (8, 16, 16, 16), layers: int = 1,
              groups: int = 4) -> diffusers.AutoencoderKL:
    down, up = (len(channels) * (kind,) for kind in ("DownEncoderBlock2D", "UpDecoderBlock2D"))
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels, layers_per_block=layers, norm_num_groups=groups, latent_channels=16,
        down_block_types=down, up_block_types=up, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609)
    return randomise(vae, seed=2)


def small_clip(width: int, activation: str, seed: int, heads: int = 4,
               **changes) -> transformers.CLIPTextModelWithProjection:
    settings = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, eos_token_id=2,
                    num_attention_heads=heads, hidden_act=activation, projection_dim=width) | changes
    return randomise(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**settings)), seed)


def small_t5(**changes) -> transformers.T5EncoderModel:
    settings = dict(vocab_size=68, d_model=80, d_kv=8, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
                    feed_forward_proj="gated-gelu", tie_word_embeddings=False) | changes
    return randomise(transformers.T5EncoderModel(transformers.T5Config(**settings)), seed=5)


def write_sd3(folder: Path) -> diffusers.StableDiffusion3Pipeline:
    """Saves a small pipeline in the diffusers layout and returns it."""
    write_tokenizers(folder)
    load = partial(transformers.CLIPTokenizer.from_pretrained, model_max_length=77)
    tokenizer, tokenizer_2 = (load(folder / name, pad_token=pad) for name, pad in PADS.items())
    t5_file = str(folder / "tokenizer_3" / "tokenizer.json")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=small_transformer(), vae=small_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        text_encoder=small_clip(24, "quick_gelu", 3), tokenizer=tokenizer,
        text_encoder_2=small_clip(32, "gelu", 4), tokenizer_2=tokenizer_2, text_encoder_3=small_t5(),
        tokenizer_3=transformers.T5TokenizerFast(tokenizer_file=t5_file, extra_ids=0))
    pipeline.save_pretrained(folder)
    for name in (*PADS, "tokenizer_3"):          # transformers saves other files than the public folders hold
        shutil.rmtree(folder / name)
    write_tokenizers(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


State = dict[str, torch.Tensor]


def renamed(state: State, folder: dict[str, str], single: dict[str, str]) -> State:
    """One model's tensors as the single file has them, by both columns of the rename table."""
    found = {}
    for ours, theirs in folder.items():
        source, _, how = theirs.removesuffix("]").partition("[")
        target, _, single_how = single[ours].partition("[")
        for last in ("weight", "bias"):
            if f"{source}.{last}" in state:
                tensor = take(state[f"{source}.{last}"], how)
                is_convolution = single_how == "1x1]" and last == "weight"
                tensor = tensor[..., None, None] if is_convolution else tensor
                found.setdefault(f"{target}.{last}", []).append(tensor)
    return {name: torch.cat(thirds) for name, thirds in found.items()}


def to_single_file(transformer: State, vae: State, **encoders: State) -> State:
    """State dicts of the diffusers layout, as the original single file has them. Meta tensors will do."""
    def count(state: State, blocks: str) -> int:
        numbers = [name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)]
        return 1 + max(map(int, numbers))

    depth, levels = count(transformer, "transformer_blocks."), count(vae, "encoder.down_blocks.")
    parts = {"model.diffusion_model.": renamed(transformer, mmdit_layers(DIFFUSERS, depth),
                                               mmdit_layers(SINGLE, depth)),
             "first_stage_model.": renamed(vae, vae_layers(DIFFUSERS, levels, 2),
                                           vae_layers(SINGLE, levels, 2))}
    parts["model.diffusion_model."]["pos_embed"] = transformer["pos_embed.pos_embed"]
    parts |= {f"text_encoders.{name}.transformer.": state for name, state in encoders.items()}
    return {prefix + name: tensor.contiguous()
            for prefix, part in parts.items() for name, tensor in part.items()}


def small_single_file() -> State:
    """A single file without text encoders: a transformer of one block, an autoencoder of one level."""
    return to_single_file(small_transformer(num_layers=1, dual_attention_layers=()).state_dict(),
                          small_vae(channels=(4,)).state_dict())


def write_sparse(path: Path, tensors: State) -> None:
    """A safetensors file of the given (meta) tensors in bf16, all zeros, that takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)          # as safetensors does: tensors that lie evenly can be mapped
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)

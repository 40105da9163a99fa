"""The public layouts against diffusers: every model, prompt assembly, whole pictures, and full-size files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.public import small_clip, small_t5, small_transformer, small_vae, to_single_file, write_sparse
from tinyflow.errors import InputError
from tinyflow.flow import noise_for
from tinyflow.sd3.checkpoint import Checkpoint
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3.load import SD35_MEDIUM, load_mmdit, load_sd3, load_vae, mmdit_config
from tinyflow.sd3.parts import Part

TEXTS = ["a dog on the beach", "a teddy bear!!! on the big beach, " + "a robot " * 60, ""]
VARIANTS = [dict(), dict(qk_norm=None, dual_attention_layers=(), num_layers=4),
            dict(num_layers=1, dual_attention_layers=(0,)),
            dict(num_attention_heads=3, num_layers=5, dual_attention_layers=(1, 3), pos_embed_max_size=13)]
PREFIXES = ["model.diffusion_model.", "first_stage_model."]      # of both models in a single file


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def both_velocities(theirs: SD3Transformer2DModel, ours, rows, columns, batch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    t, shapes = torch.rand(batch, generator=generator), ((16, rows, columns), (9, 80), (56,))
    x, context, pooled = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    with torch.no_grad():
        expected = theirs(x, context, pooled, timestep=t * 1000).sample
        return ours(x, t, context, pooled).float(), expected.float()


def transformer_part(folder: Path, config: dict) -> Part:
    return Part(Checkpoint.find(folder, "diffusion_pytorch_model"), "", DIFFUSERS, config)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("rows, columns, batch", [(8, 8, 1), (10, 6, 3), (4, 22, 1)])
def test_the_mmdit_is_diffusers_to_2e_6(tmp_path, changes, rows, columns, batch):
    theirs = small_transformer(**changes)
    theirs.save_pretrained(tmp_path)
    part = transformer_part(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    ours = load_mmdit(part, max(rows, columns), torch.float32, "cpu")
    assert relative_error(*both_velocities(theirs, ours, rows, columns, batch)) < 2e-6


def test_the_mmdit_in_bf16_is_as_near_to_fp32_as_diffusers_is(sd3):
    """bf16 keeps 8 bits: the error is below 0.03 after three blocks, and below 1.1 of diffusers' own."""
    folder, pipeline = sd3
    part = transformer_part(folder / "transformer", {})
    exact, _ = both_velocities(pipeline.transformer, load_mmdit(part, 8, torch.float32, "cpu"), 8, 8, 3)
    theirs, ours = small_transformer().to(torch.bfloat16), load_mmdit(part, 8, torch.bfloat16, "cpu")
    rounded, expected = both_velocities(theirs, ours, 8, 8, 3, torch.bfloat16)
    assert relative_error(rounded, exact) < min(0.03, 1.1 * relative_error(expected, exact))


@pytest.mark.parametrize("changes", [dict(attention_head_dim=64),
                                     dict(attention_head_dim=64, qk_norm=None, dual_attention_layers=())])
def test_the_single_file_holds_the_same_model(tmp_path, changes):
    """tests/public.py writes the file by our rename table; diffusers' own converters check it."""
    theirs, vae = small_transformer(**changes), small_vae(channels=(32, 32, 64), layers=2, groups=32)
    single = to_single_file(theirs.state_dict(), vae.state_dict())
    halves = [{name: tensor for name, tensor in single.items() if name.startswith(prefix)}
              for prefix in PREFIXES]
    for converted, model in ((convert_sd3_transformer_checkpoint_to_diffusers(dict(halves[0])), theirs),
                             (convert_ldm_vae_checkpoint(halves[1], vae.config), vae)):
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())

    save_file(single, tmp_path / "model.safetensors")
    file = Checkpoint([tmp_path / "model.safetensors"])
    transformer, autoencoder = (Part(file, prefix, SINGLE, {}) for prefix in PREFIXES)
    ours = load_mmdit(transformer, 8, torch.float32, "cpu")
    assert relative_error(*both_velocities(theirs, ours, 8, 6, 3)) < 2e-6
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = (vae.encode(pictures).latent_dist.mean - 0.0609) * 1.5305
    torch.testing.assert_close(load_vae(autoencoder, "cpu").encode(pictures), latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_t5", [True, False])
def test_the_whole_pipeline_draws_what_diffusers_draws(sd3, tmp_path, with_t5):
    """The same noise, 4 steps, guidance 5; latents to 1e-5, pictures to the rounding of a byte."""
    folder, theirs = sd3
    if not with_t5:                              # its 256 tokens are zeros then
        left_out = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")       # as a user may download it
        folder = shutil.copytree(folder, tmp_path / "sd3", ignore=left_out)
        theirs = type(theirs)(**{**theirs.components, "text_encoder_3": None, "tokenizer_3": None})
    ours = load_sd3(folder, size=64, dtype=torch.float32)
    text = ours.encode_text(TEXTS)
    context, _, pooled, _ = theirs.encode_prompt(TEXTS, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(text.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert text.context.shape == (3, 333, 80) and not text.slots.any()
    latents = ours.sample(text, [1, 2, 3], steps=4, guidance=5.0)
    expected, pictures = (theirs(TEXTS, negative_prompt=[""] * 3, num_inference_steps=4, guidance_scale=5.0,
                                 height=64, width=64, latents=noise_for([1, 2, 3], (16, 8, 8)),
                                 output_type=output).images for output in ("latent", "np"))
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(ours.decode_images(latents) - 255 * pictures).max() < 0.51


def test_shards_other_dtypes_and_a_single_file_give_the_same_pipeline(sd3, tmp_path):
    folder, pipeline = sd3
    pipeline.transformer.save_pretrained(tmp_path / "sharded" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 2
    whole, sharded = load_sd3(folder, size=64), load_sd3(tmp_path / "sharded", folder, size=64)
    pairs = zip(whole.mmdit.state_dict().values(), sharded.mmdit.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.mmdit.final_linear.weight.dtype == torch.bfloat16
    assert whole.codec.decoder.conv_in.weight.dtype == torch.float32

    source, target = folder / "transformer", tmp_path / "mixed" / "transformer"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    mixed = {name: tensor.to(dtypes[n % 3]) for n, (name, tensor) in
             enumerate(load_file(source / "diffusion_pytorch_model.safetensors").items())}
    target.mkdir(parents=True)
    save_file(mixed, target / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(source / "config.json", target)
    cast = load_sd3(tmp_path / "mixed", folder, size=64)
    assert {tensor.dtype for tensor in cast.mmdit.state_dict().values()} == {torch.bfloat16}


def test_what_is_missing_is_named_at_once(sd3, tmp_path):
    folder, _ = sd3
    single = tmp_path / "model.safetensors"
    save_file(to_single_file(small_transformer(attention_head_dim=64).state_dict(),
                             small_vae(channels=(32, 32), groups=32).state_dict()), single)
    missing = "no text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/; .* give it with --text DIR"
    with pytest.raises(InputError, match=missing):
        load_sd3(single)
    assert load_sd3(single, folder, size=16).mmdit.config.width == 128
    with pytest.raises(InputError, match="choose a smaller --size"):
        load_sd3(folder, size=512)
    with pytest.raises(InputError, match="give the folder that holds transformer/"):
        load_sd3(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_half_a_t5_is_no_absent_t5(sd3, tmp_path):
    """With its config and no weights, everything was learned without T5, without a word."""
    folder = tmp_path / "sd3"
    shutil.copytree(sd3[0], folder)
    for file in (folder / "text_encoder_3").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match="text_encoder_3: there is no model.safetensors in it; complete"):
        load_sd3(folder, size=64)


def test_exchanged_text_encoders_are_named(sd3, tmp_path):
    """They have the same tensors in other sizes, so that the exchanged model loaded and learned."""
    folder = shutil.copytree(sd3[0], tmp_path / "exchanged")
    (folder / "text_encoder").rename(folder / "other")
    (folder / "text_encoder_2").rename(folder / "text_encoder")
    (folder / "other").rename(folder / "text_encoder_2")
    with pytest.raises(InputError, match="are text_encoder/ and text_encoder_2/ exchanged"):
        load_sd3(folder, size=64)


@pytest.mark.parametrize("size", [-16, 65])
def test_a_size_that_makes_no_whole_patches_is_refused_at_once(sd3, size):
    """It was once a bare ValueError, after everything had been loaded."""
    with pytest.raises(InputError, match=f"^pictures of {size} px: the side must be a multiple of"):
        load_sd3(sd3[0], size=size)


def test_weights_that_are_not_finite_are_named(sd3, tmp_path):
    """They once led to a training that advised a lower learning rate."""
    folder = shutil.copytree(sd3[0], tmp_path / "nan")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(InputError, match="proj_out.weight holds numbers that are not finite in bfloat16"):
        load_sd3(folder, size=64)


@pytest.mark.parametrize("widths, heads", [((128, 64), (2, 1)), ((48, 64), (3, 2))])
def test_a_single_file_may_hold_the_text_encoders(sd3, tmp_path, widths, heads):
    """All models are in one file, the tokenizers come from --text, and T5's embedding has its other name.

    Shapes do not tell how many heads there are: 64 numbers a head, or what a config.json in --text says. A
    width of 48 once was a ZeroDivisionError, and heads of 32 were taken for heads of 64.
    """
    clip_l, clip_g = (small_clip(*case) for case in ((widths[0], "quick_gelu", 3, heads[0]),
                                                     (widths[1], "gelu", 4, heads[1])))
    t5 = small_t5(width=200)
    encoders = {"clip_l": clip_l.state_dict(), "clip_g": clip_g.state_dict(), "t5xxl": t5.state_dict()}
    del encoders["t5xxl"]["shared.weight"]
    transformer = small_transformer(attention_head_dim=64, joint_attention_dim=200,
                                    pooled_projection_dim=sum(widths))
    vae, single = small_vae(channels=(32, 32), groups=32), tmp_path / "all.safetensors"
    save_file(to_single_file(transformer.state_dict(), vae.state_dict(), **encoders), single)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(sd3[0] / name, tmp_path / "text" / name)
    if widths[0] % 64:
        with pytest.raises(InputError, match="width 48 that does not divide into heads of 64; .* --text DIR"):
            load_sd3(single, tmp_path / "text", size=16)
        for name, clip in (("text_encoder", clip_l), ("text_encoder_2", clip_g)):
            clip.config.save_pretrained(tmp_path / "text" / name)
    ours = load_sd3(single, tmp_path / "text", size=16, dtype=torch.float32)
    ids = ours.tokenizer(["a dog on the beach"]).ids
    text = ours.encode_text(["a dog on the beach"])
    both = [clip_l(ids[:, :77], output_hidden_states=True), clip_g(ids[:, 77:154], output_hidden_states=True)]
    clip = torch.cat([output.hidden_states[-2] for output in both], dim=-1)
    pooled = torch.cat([output.text_embeds for output in both], dim=-1)
    torch.testing.assert_close(text.context[:, :77, :sum(widths)], clip, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.context[:, 77:], t5(ids[:, 154:]).last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no tokenizer/, tokenizer_2/, tokenizer_3/; .* with --text DIR"):
        load_sd3(single, size=16)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Sparse files of the full size: all zeros, with every name and shape of the published configurations."""
    folder = tmp_path_factory.mktemp("full")
    clip_l = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    clip_g = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
    t5 = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                  feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        models = {
            "transformer": SD3Transformer2DModel(
                sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
                joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
                pos_embed_max_size=1, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                use_quant_conv=False, use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**clip_l, projection_dim=768)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**clip_g, projection_dim=1280)),
            "text_encoder_3": T5EncoderModel(t5)}
    states = {name: dict(model.state_dict()) for name, model in models.items()}
    states["transformer"]["pos_embed.pos_embed"] = torch.empty(1, 384 * 384, 1536, device="meta")
    for name, state in states.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        write_sparse(folder / name / f"{stem}.safetensors", state)
    write_sparse(folder / "single.safetensors", to_single_file(states["transformer"], states["vae"]))
    return folder, states


def test_the_full_size_manifests(full_size):
    folder, states = full_size
    assert [len(state) for state in states.values()] == [909, 244, 197, 517, 220]
    single = Part(Checkpoint([folder / "single.safetensors"]), PREFIXES[0], SINGLE, {})
    assert len(single.shapes) == 665 and len(single.checkpoint.under(PREFIXES[1])) == 244
    diffusers = transformer_part(folder / "transformer", {})
    published = dict(vars(SD35_MEDIUM)) | dict(max_grid=64, base_grid=64)
    assert vars(mmdit_config(diffusers, 128)) == vars(mmdit_config(single, 128)) == published


LOAD = """
import resource, sys, torch
from pathlib import Path
from tinyflow.sd3.checkpoint import Checkpoint
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3.load import load_clip, load_mmdit, load_t5, load_vae
from tinyflow.sd3.parts import Part
folder, before = Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = lambda name, stem: Part(Checkpoint.find(folder / name, stem), "", DIFFUSERS, {})
if sys.argv[2] == "encoders":
    loaded = [load_clip(part("text_encoder", "model"), "quick_gelu"),
              load_clip(part("text_encoder_2", "model"), "gelu"), load_t5(part("text_encoder_3", "model"))]
else:
    single = Checkpoint([folder / "single.safetensors"])
    parts = [Part(single, prefix, SINGLE, {}) for prefix in ("model.diffusion_model.", "first_stage_model.")]
    if sys.argv[2] == "folder":
        parts = [part(name, "diffusion_pytorch_model") for name in ("transformer", "vae")]
    loaded = [load_mmdit(parts[0], 64, torch.bfloat16, "cpu"), load_vae(parts[1], "cpu")]
values = sum(tensor.numel() for module in loaded for tensor in module.state_dict().values())
print(values, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("what, values", [
    ("encoders", 123_650_304 + 694_659_840 + 4_762_310_656), ("folder", 2_243_171_520 + 83_819_683),
    ("single", 2_243_171_520 + 83_819_683)])
def test_the_full_size_loads_in_mapped_memory(full_size, what, values):
    """Every tensor of the published sizes finds its place. A bf16 file is mapped, not copied.

    A tenth of the file's size is plenty for everything else.
    """
    command = [sys.executable, "-c", LOAD, str(full_size[0]), what]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    loaded, grown = map(int, run.stdout.split())
    assert loaded == values and grown < 0.1 * 2 * values


CAST = """
import resource, sys, torch
from pathlib import Path
from tinyflow.sd3.checkpoint import Checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = Checkpoint([Path(sys.argv[1])])
tensors = [checkpoint.tensor(name).to(torch.bfloat16) for name in checkpoint.stored]
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_a_file_that_is_cast_is_never_held_twice(tmp_path):
    """fp32 becomes bf16 one tensor at a time: the peak is about half of the file, and below 0.7 of it."""
    file = tmp_path / "big.safetensors"
    save_file({f"layer{n}": torch.zeros(1024, 4096) for n in range(16)}, file)
    run = subprocess.run([sys.executable, "-c", CAST, str(file)], capture_output=True, text=True, timeout=120)
    assert int(run.stdout) < 0.7 * file.stat().st_size

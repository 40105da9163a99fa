"""The public layouts against diffusers: loading, every model in it, prompt assembly, the whole pipeline, and the full-size manifests."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.public import small_clip, small_t5, small_transformer, small_vae, to_single_file, write_sparse
from tinyflow.checkpoint import Checkpoint
from tinyflow.errors import InputError
from tinyflow.flow import noise_for
from tinyflow.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3 import SD35_MEDIUM, Part, load_mmdit, load_sd3, load_vae, mmdit_config

TEXTS = ["a dog on the beach", "a teddy bear!!! on the big beach, " + "a robot " * 60, ""]
VARIANTS = [dict(), dict(qk_norm=None, dual_attention_layers=(), num_layers=4), dict(num_layers=1, dual_attention_layers=(0,)),
            dict(num_attention_heads=3, num_layers=5, dual_attention_layers=(1, 3), pos_embed_max_size=13)]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def both_velocities(theirs: SD3Transformer2DModel, ours, rows: int, columns: int, batch: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn((batch, *shape), generator=generator)
    x, t, context, pooled = draw(16, rows, columns), torch.rand(batch, generator=generator), draw(9, 80), draw(56)
    x, context, pooled = x.to(dtype), context.to(dtype), pooled.to(dtype)
    with torch.no_grad():
        expected = theirs(x, timestep=t * 1000, encoder_hidden_states=context, pooled_projections=pooled).sample
        return ours(x, t, context, pooled).float(), expected.float()


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("rows, columns, batch", [(8, 8, 1), (10, 6, 3), (4, 22, 1)])
def test_the_mmdit_is_diffusers_to_2e_6(tmp_path, changes, rows, columns, batch):
    theirs = small_transformer(**changes)
    theirs.save_pretrained(tmp_path)
    part = Part(Checkpoint.find(tmp_path, "diffusion_pytorch_model"), "", DIFFUSERS, json.loads((tmp_path / "config.json").read_text()))
    ours = load_mmdit(part, max(rows, columns), torch.float32, "cpu")
    assert relative_error(*both_velocities(theirs, ours, rows, columns, batch)) < 2e-6


def test_the_mmdit_in_bf16_is_as_near_to_fp32_as_diffusers_is(sd3):
    """bf16 keeps 8 bits: 0.03 relative after three blocks, and no more than diffusers' own error and a tenth."""
    folder, pipeline = sd3
    part = Part(Checkpoint.find(folder / "transformer", "diffusion_pytorch_model"), "", DIFFUSERS, {})
    exact, _ = both_velocities(pipeline.transformer, load_mmdit(part, 8, torch.float32, "cpu"), 8, 8, 3)
    theirs = small_transformer().to(torch.bfloat16)
    ours, expected = both_velocities(theirs, load_mmdit(part, 8, torch.bfloat16, "cpu"), 8, 8, 3, torch.bfloat16)
    assert relative_error(ours, exact) < min(0.03, 1.1 * relative_error(expected, exact))


@pytest.mark.parametrize("changes", [dict(attention_head_dim=64), dict(attention_head_dim=64, qk_norm=None, dual_attention_layers=())])
def test_the_single_file_holds_the_same_model(tmp_path, changes):
    """The file is written here, from the layout's description; diffusers' own converter says that it is written right."""
    theirs, vae = small_transformer(**changes), small_vae(channels=(32, 32, 64), layers=2, groups=32)
    single = to_single_file(theirs.state_dict(), vae.state_dict())
    prefix = "model.diffusion_model."
    converted = convert_sd3_transformer_checkpoint_to_diffusers({name: t for name, t in single.items() if name.startswith(prefix)})
    assert converted.keys() == theirs.state_dict().keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in theirs.state_dict().items())

    save_file(single, tmp_path / "model.safetensors")
    checkpoint = Checkpoint([tmp_path / "model.safetensors"])
    ours = load_mmdit(Part(checkpoint, prefix, SINGLE, {}), 8, torch.float32, "cpu")
    assert relative_error(*both_velocities(theirs, ours, 8, 6, 3)) < 2e-6
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    mean = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(load_vae(Part(checkpoint, "first_stage_model.", SINGLE, {}), "cpu").encode(pictures), (mean - 0.0609) * 1.5305,
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_t5", [True, False])
def test_prompts_are_assembled_as_in_diffusers(sd3, with_t5, tmp_path):
    """Without T5 its 256 tokens are zeros."""
    folder, pipeline = sd3
    ours = load_sd3(folder, size=64, dtype=torch.float32)
    parts = pipeline.components if with_t5 else pipeline.components | {"text_encoder_3": None, "tokenizer_3": None}
    context, _, pooled, _ = type(pipeline)(**parts).encode_prompt(TEXTS, None, None, do_classifier_free_guidance=False)
    if not with_t5:
        ours.encoder.t5 = ours.tokenizer.t5 = None
    text = ours.encode_text(TEXTS)
    torch.testing.assert_close(text.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert text.context.shape == (3, 333, 80) and not text.slots.any()


def test_the_whole_pipeline_draws_what_diffusers_draws(sd3):
    """The same noise, 4 steps, guidance 5; latents to 1e-5, pictures to the rounding of a byte."""
    folder, pipeline = sd3
    ours = load_sd3(folder, size=64, dtype=torch.float32)
    call = lambda output: pipeline(TEXTS, negative_prompt=[""] * 3, num_inference_steps=4, guidance_scale=5.0, height=64, width=64,
                                   latents=noise_for([1, 2, 3], (16, 8, 8)), output_type=output).images
    latents = ours.sample(ours.encode_text(TEXTS), [1, 2, 3], steps=4, guidance=5.0)
    torch.testing.assert_close(latents, call("latent"), rtol=1e-5, atol=1e-5)
    assert np.abs(ours.decode_images(latents) - 255 * call("np")).max() < 0.51


def test_the_placeholder_has_a_slot_in_the_clip_and_in_the_t5_segment(sd3):
    ours = load_sd3(sd3[0], size=64, dtype=torch.float32)
    text = ours.encode_text(["a [V] dog on the beach"], {"[V]": "dog"})
    assert text.slots.nonzero().tolist() == [[0, 2], [0, 77 + 1]]                    # <start> a [V]; a [V]
    plain = ours.encode_text(["a dog dog on the beach"])
    assert torch.equal(text.context, plain.context) and torch.equal(text.pooled, plain.pooled)


def test_shards_other_dtypes_and_a_single_file_give_the_same_pipeline(sd3, tmp_path):
    folder, pipeline = sd3
    pipeline.transformer.save_pretrained(tmp_path / "sharded" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 2
    whole, sharded = load_sd3(folder, size=64), load_sd3(tmp_path / "sharded", folder, size=64)
    assert all(torch.equal(a, b) for a, b in zip(whole.mmdit.state_dict().values(), sharded.mmdit.state_dict().values(), strict=True))
    assert whole.mmdit.final_linear.weight.dtype == torch.bfloat16 and whole.codec.decoder.conv_in.weight.dtype == torch.float32

    mixed = {name: tensor.to((torch.float32, torch.float16, torch.bfloat16)[n % 3])
             for n, (name, tensor) in enumerate(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors").items())}
    (tmp_path / "mixed" / "transformer").mkdir(parents=True)
    save_file(mixed, tmp_path / "mixed" / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "mixed" / "transformer" / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
    cast = load_sd3(tmp_path / "mixed", folder, size=64)
    assert {tensor.dtype for tensor in cast.mmdit.state_dict().values()} == {torch.bfloat16}


def test_what_is_missing_is_named_at_once(sd3, tmp_path):
    folder, _ = sd3
    only = tmp_path / "model.safetensors"
    save_file(to_single_file(small_transformer(attention_head_dim=64).state_dict(), small_vae(channels=(32, 32), groups=32).state_dict()), only)
    with pytest.raises(InputError, match="no text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/; .* give it with --text DIR"):
        load_sd3(only)
    assert load_sd3(only, folder, size=16).mmdit.config.width == 128
    with pytest.raises(InputError, match="choose a smaller --size"):
        load_sd3(folder, size=512)


def test_a_single_file_may_hold_the_text_encoders(sd3, tmp_path):
    """All in one, with the tokenizers from --text; T5's embedding under either of its names."""
    clip_l, clip_g, t5 = small_clip(128, "quick_gelu", 3, heads=2), small_clip(64, "gelu", 4, heads=1), small_t5(width=200)
    encoders = {name: model.state_dict() for name, model in (("clip_l", clip_l), ("clip_g", clip_g), ("t5xxl", t5))}
    del encoders["t5xxl"]["shared.weight"]
    transformer = small_transformer(attention_head_dim=64, joint_attention_dim=200, pooled_projection_dim=192)
    vae = small_vae(channels=(32, 32), groups=32)
    save_file(to_single_file(transformer.state_dict(), vae.state_dict(), **encoders), tmp_path / "all.safetensors")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(sd3[0] / name, tmp_path / "text" / name)
    ours = load_sd3(tmp_path / "all.safetensors", tmp_path / "text", size=16, dtype=torch.float32)
    ids, _ = ours.tokenizer(["a dog on the beach"])
    text = ours.encode_text(["a dog on the beach"])
    l, g = (model(part, output_hidden_states=True) for model, part in ((clip_l, ids[:, :77]), (clip_g, ids[:, 77:154])))
    torch.testing.assert_close(text.context[:, :77, :192], torch.cat([l.hidden_states[-2], g.hidden_states[-2]], -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.context[:, 77:], t5(ids[:, 154:]).last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled, torch.cat([l.text_embeds, g.text_embeds], -1), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no tokenizer/, tokenizer_2/, tokenizer_3/; .* give it with --text DIR"):
        load_sd3(tmp_path / "all.safetensors", size=16)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Sparse files of the full size: every name and shape that diffusers and transformers give the published configurations, and zeros."""
    folder = tmp_path_factory.mktemp("full")
    clip = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
    clip_g = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
    with torch.device("meta"):
        models = {
            "transformer": SD3Transformer2DModel(sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
                                                 joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
                                                 pos_embed_max_size=1, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
            "vae": AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                                 use_quant_conv=False, use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",) * 4,
                                 up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**clip_g)),
            "text_encoder_3": T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                                      feed_forward_proj="gated-gelu"))}
    states = {name: dict(model.state_dict()) for name, model in models.items()}
    states["transformer"]["pos_embed.pos_embed"] = torch.empty(1, 384 * 384, 1536, device="meta")
    for name, state in states.items():
        write_sparse(folder / name / ("model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"), state)
    write_sparse(folder / "single.safetensors", to_single_file(states["transformer"], states["vae"]))
    return folder, states


def test_the_full_size_manifests(full_size):
    folder, states = full_size
    assert [len(state) for state in states.values()] == [909, 244, 197, 517, 220]
    single = Part(Checkpoint([folder / "single.safetensors"]), "model.diffusion_model.", SINGLE, {})
    assert len(single.shapes) == 665 and len(single.checkpoint.under("first_stage_model.")) == 244
    diffusers = Part(Checkpoint([folder / "transformer" / "diffusion_pytorch_model.safetensors"]), "", DIFFUSERS, {})
    configs = [mmdit_config(part, 128) for part in (diffusers, single)]
    published = dict(vars(SD35_MEDIUM)) | dict(max_grid=64, base_grid=64)
    assert vars(configs[0]) == vars(configs[1]) == published


LOAD = """
import resource, sys, torch
from pathlib import Path
from tinyflow.checkpoint import Checkpoint
from tinyflow.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3 import Part, load_clip, load_mmdit, load_t5, load_vae
folder, before = Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = lambda name, stem: Part(Checkpoint.find(folder / name, stem), "", DIFFUSERS, {})
if sys.argv[2] == "encoders":
    clip_l, clip_g, t5 = (part(name, "model") for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    loaded = [load_clip(clip_l, "quick_gelu"), load_clip(clip_g, "gelu"), load_t5(t5)]
else:
    single = Checkpoint([folder / "single.safetensors"])
    parts = [Part(single, prefix, SINGLE, {}) for prefix in ("model.diffusion_model.", "first_stage_model.")]
    if sys.argv[2] == "folder":
        parts = [part(name, "diffusion_pytorch_model") for name in ("transformer", "vae")]
    loaded = [load_mmdit(parts[0], 64, torch.bfloat16, "cpu"), load_vae(parts[1], "cpu")]
values = sum(tensor.numel() for module in loaded for tensor in module.state_dict().values())
print(values, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("what, values", [("encoders", 123_650_304 + 694_659_840 + 4_762_310_656), ("folder", 2_243_171_520 + 83_819_683),
                                          ("single", 2_243_171_520 + 83_819_683)])
def test_the_full_size_loads_in_mapped_memory(full_size, what, values):
    """Every tensor of the published sizes finds its place; a bf16 file is mapped, not copied: 0.1 of the file's size is plenty for the rest."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(full_size[0]), what], capture_output=True, text=True, timeout=300)
    loaded, grown = map(int, run.stdout.split())
    assert loaded == values and grown < 0.1 * 2 * values


def test_a_file_that_is_cast_is_never_held_twice(tmp_path):
    """fp32 to bf16, one tensor at a time: the peak stays below 1.1 of the file (here about half of it)."""
    file = tmp_path / "big.safetensors"
    save_file({f"layer{n}": torch.zeros(1024, 4096) for n in range(16)}, file)
    code = ("import resource, sys, torch\nfrom pathlib import Path\nfrom tinyflow.checkpoint import Checkpoint\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore, checkpoint = peak(), Checkpoint([Path(sys.argv[1])])\n"
            "tensors = [checkpoint.tensor(name).to(torch.bfloat16) for name in checkpoint.stored]\nprint(1024 * (peak() - before))")
    run = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=120)
    assert int(run.stdout) < 0.7 * file.stat().st_size

"""The public layouts against diffusers and transformers: every model, whole pictures, full-size files."""

import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from tests.public import small_clip, small_t5, small_transformer, small_vae, to_single_file, write_sparse
from tinyflow.errors import InputError
from tinyflow.flow import noise_for
from tinyflow.mmdit import position_features
from tinyflow.sd3.checkpoint import Checkpoint
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3.load import SD35_MEDIUM, load_clip, load_mmdit, load_sd3, load_t5, load_vae, mmdit_config
from tinyflow.sd3.offload import offload
from tinyflow.sd3.parts import Part
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.weights import tensor_hash

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


def saved(state: dict, folder: Path, **config) -> Part:
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return Part(Checkpoint([folder / "model.safetensors"]), "", DIFFUSERS, config)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("rows, columns, batch", [(8, 8, 1), (10, 6, 3), (4, 22, 1)])
def test_the_mmdit_is_diffusers_to_2e_6(tmp_path, changes, rows, columns, batch):
    theirs = small_transformer(**changes)
    part = saved(theirs.state_dict(), tmp_path, **theirs.config)
    ours = load_mmdit(part, max(rows, columns), torch.float32, "cpu")
    assert relative_error(*both_velocities(theirs, ours, rows, columns, batch)) < 2e-6
    positions = theirs.pos_embed.pos_embed[0]    # a pretrained file holds them; we make those of a new model
    grid = theirs.config.pos_embed_max_size
    made = position_features(theirs.inner_dim, grid, base_grid=4).flatten(0, 1)
    torch.testing.assert_close(made, positions)


def test_the_mmdit_in_bf16_is_as_near_to_fp32_as_diffusers_is(tmp_path):
    """bf16 keeps 8 bits: the error is below 0.03 after three blocks, and below 1.1 of diffusers' own."""
    theirs = small_transformer()
    part = saved(theirs.state_dict(), tmp_path)
    exact, _ = both_velocities(theirs, load_mmdit(part, 8, torch.float32, "cpu"), 8, 8, 3)
    theirs, ours = theirs.to(torch.bfloat16), load_mmdit(part, 8, torch.bfloat16, "cpu")
    rounded, expected = both_velocities(theirs, ours, 8, 8, 3, torch.bfloat16)
    assert relative_error(rounded, exact) < min(0.03, 1.1 * relative_error(expected, exact))


@pytest.mark.parametrize("settings", [dict(channels=(8, 16, 16)),
                                      dict(channels=(16, 32, 32, 32), layers=2, groups=8)])
@pytest.mark.parametrize("batch, height, width", [(1, 40, 24), (3, 24, 56)])
def test_the_autoencoder_is_diffusers_in_both_directions(tmp_path, settings, batch, height, width):
    theirs = small_vae(**settings)
    ours = load_vae(saved(theirs.state_dict(), tmp_path, **theirs.config), "cpu")
    pictures = torch.rand(batch, 3, height, width) * 2 - 1
    latents, mean = ours.encode(pictures), theirs.encode(pictures).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(mean).sample, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- text encoders
@pytest.mark.parametrize("activation, pad", [("quick_gelu", 49), ("gelu", 0)])         # CLIP-L and CLIP-G
@pytest.mark.parametrize("width, heads, is_projected", [(24, 2, True), (24, 2, False), (128, 2, True)])
def test_clip_agrees_with_transformers(activation, pad, width, heads, is_projected, tmp_path):
    """The context is causal, and the pooled state that of the first end token. It may have no projection."""
    peer = small_clip(width, activation, 0, heads, vocab_size=50, max_position_embeddings=9, eos_token_id=49,
                      num_hidden_layers=3, projection_dim=12 if is_projected else width)
    state = dict(peer.state_dict())
    if not is_projected:
        peer.text_projection.weight.copy_(torch.eye(width))
        del state["text_projection.weight"]
    config = {} if width % 64 == 0 else {"num_attention_heads": heads}   # else 64 numbers a head
    ours = load_clip(saved(state, tmp_path, **config), activation)
    ids = torch.tensor([[1, 5, 6, 7, 49] + 4 * [pad], [1, 49] + 7 * [pad], [1, 2, 3, 4, 5, 6, 7, 8, 49]])
    expected, (context, pooled) = peer(ids, output_hidden_states=True), ours(ids)
    torch.testing.assert_close(context, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes, batch, tokens", [
    (dict(num_layers=1), 1, 300), (dict(num_layers=3, num_heads=3), 3, 300),
    (dict(d_kv=4, relative_attention_num_buckets=16), 3, 77), (dict(num_layers=1), 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_agrees_with_transformers_in_fp32(changes, batch, tokens, dtype, tmp_path):
    """T5-XXL overflows in fp16: what is kept in 16 bits is computed with in fp32, too, a layer at a time."""
    peer = small_t5(vocab_size=30, d_model=20, d_ff=28, **changes).to(dtype)
    ours = load_t5(saved(peer.state_dict(), tmp_path))
    ids = torch.randint(0, 30, (batch, tokens), generator=torch.Generator().manual_seed(1))
    assert ours.token_embedding.weight.dtype == dtype
    torch.testing.assert_close(ours(ids), peer.float()(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", [TextEncoder(TextConfig(20)), T5Encoder(T5Config(20, 16, 2, 2, 8, 24))])
def test_an_encoder_follows_its_ids_to_another_device_layer_by_layer(encoder, monkeypatch):
    """Every weight is copied once in a forward pass, and never more than those of one layer at a time."""
    calls, names = Mock(side_effect=functional_call), list(encoder.state_dict())
    monkeypatch.setattr("tinyflow.sd3.offload.functional_call", calls)
    output = offload(encoder)(torch.zeros(2, 5, dtype=torch.long, device="meta"))
    copied = [len(call.args[1]) for call in calls.call_args_list]
    assert {tensor.device.type for tensor in (output if isinstance(output, tuple) else (output,))} == {"meta"}
    assert {parameter.device.type for parameter in encoder.parameters()} == {"cpu"}
    assert list(encoder.state_dict()) == names and sum(copied) == len(names)
    assert max(copied) == len(encoder.layers[0].state_dict())
    calls.reset_mock()
    encoder(torch.zeros(2, 5, dtype=torch.long))         # the weights are there in fp32: nothing is copied
    assert not calls.called


# ------------------------------------------------------------------------------------- files and whole models
@pytest.mark.parametrize("changes", [dict(attention_head_dim=64),
                                     dict(attention_head_dim=64, qk_norm=None, dual_attention_layers=())])
def test_the_single_file_holds_the_same_model(tmp_path, changes):
    """tests/public.py writes the file by our rename table; diffusers' own converters check it."""
    theirs, vae = small_transformer(**changes), small_vae(channels=(32, 32, 64), layers=2, groups=32)
    single = to_single_file(theirs.state_dict(), vae.state_dict())
    halves = [{name: tensor for name, tensor in single.items() if name.startswith(prefix)}
              for prefix in PREFIXES]
    to_theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    for converted, model in (
            (to_theirs(dict(halves[0])), theirs),
            (single_file_utils.convert_ldm_vae_checkpoint(halves[1], vae.config), vae)):
        assert tensor_hash(converted) == tensor_hash(model.state_dict())

    save_file(single, tmp_path / "model.safetensors")
    file = Checkpoint([tmp_path / "model.safetensors"])
    transformer, autoencoder = (Part(file, prefix, SINGLE, {}) for prefix in PREFIXES)
    ours = load_mmdit(transformer, 8, torch.float32, "cpu")
    assert relative_error(*both_velocities(theirs, ours, 8, 6, 3)) < 2e-6
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = (vae.encode(pictures).latent_dist.mean - 0.0609) * 1.5305
    torch.testing.assert_close(load_vae(autoencoder, "cpu").encode(pictures), latents, rtol=1e-5, atol=1e-5)


def test_the_whole_pipeline_draws_what_diffusers_draws(sd3_in_both_forms):
    """The same noise, 4 steps, guidance 5; latents to 1e-5, pictures to the rounding of a byte. T5 may be
    missing: its 256 tokens are zeros then.
    """
    folder, theirs = sd3_in_both_forms
    ours = load_sd3(folder, size=64, dtype=torch.float32)
    text = ours.encode_text(TEXTS)
    context, _, pooled, _ = theirs.encode_prompt(TEXTS, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(text.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=1e-5, atol=1e-5)
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
    assert tensor_hash(whole.mmdit.state_dict()) == tensor_hash(sharded.mmdit.state_dict())
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


def without_t5s_weights(folder: Path) -> None:
    (folder / "text_encoder_3" / "model.safetensors").unlink()


def with_exchanged_encoders(folder: Path) -> None:
    (folder / "text_encoder").rename(folder / "other")
    (folder / "text_encoder_2").rename(folder / "text_encoder")
    (folder / "other").rename(folder / "text_encoder_2")


def with_a_nan(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = torch.nan
    save_file(tensors, file)


@pytest.mark.parametrize("spoil, message", [
    (without_t5s_weights, "text_encoder_3: there is no model.safetensors in it; complete"),
    (with_exchanged_encoders, "are text_encoder/ and text_encoder_2/ exchanged"),
    (with_a_nan, "proj_out.weight holds numbers that are not finite in bfloat16")])
def test_what_could_be_loaded_and_would_be_wrong_is_named(sd3, tmp_path, spoil, message):
    """All was learned without T5, without a word; exchanged encoders have the same tensors in other sizes, so
    they were loaded; and a nan led to a training that advised a lower learning rate.
    """
    folder = shutil.copytree(sd3[0], tmp_path / "sd3")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_sd3(folder, size=64)


@pytest.mark.parametrize("size, message", [(-16, "^pictures of -16 px: the side must be a multiple of"),
                                           (65, "^pictures of 65 px: the side must be a multiple of"),
                                           (512, "choose a smaller --size")])
def test_a_size_that_cannot_be_is_refused_at_once(sd3, size, message):
    """It was once a bare ValueError, after everything had been loaded."""
    with pytest.raises(InputError, match=message):
        load_sd3(sd3[0], size=size)


def test_a_single_file_may_hold_the_text_encoders(sd3, tmp_path):
    """What is missing in it is named, or taken from --text. There the embedding of T5 has its other name."""
    (folder, theirs), single, alone = sd3, tmp_path / "single.safetensors", tmp_path / "alone.safetensors"
    encoders = {"clip_l": theirs.text_encoder.state_dict(), "clip_g": theirs.text_encoder_2.state_dict(),
                "t5xxl": theirs.text_encoder_3.state_dict()}
    del encoders["t5xxl"]["shared.weight"]
    models = (theirs.transformer.state_dict(), theirs.vae.state_dict())
    save_file(to_single_file(*models), alone)
    save_file(to_single_file(*models, **encoders), single)
    text = shutil.copytree(folder, tmp_path / "text", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = load_sd3(folder, size=64)
    for ours in (load_sd3(single, text, size=64), load_sd3(alone, folder, size=64)):
        for part in ("encoder", "mmdit", "codec"):
            states = [getattr(pipe, part).state_dict() for pipe in (ours, whole)]
            assert tensor_hash(states[0]) == tensor_hash(states[1])
        assert torch.equal(ours.encode_text(TEXTS).context, whole.encode_text(TEXTS).context)
    for wrong, message in (
            (single, "no tokenizer/, tokenizer_2/, tokenizer_3/; .* --text DIR"),
            (alone, "no text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/; .* --text DIR"),
            (folder / "transformer" / "diffusion_pytorch_model.safetensors", "give the folder that holds")):
        with pytest.raises(InputError, match=message):
            load_sd3(wrong, size=16)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Sparse files of the full size: all zeros, with every name and shape of the published configurations."""
    folder = tmp_path_factory.mktemp("full")
    with torch.device("meta"):
        models = {
            "transformer": small_transformer(
                sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
                joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=1,
                dual_attention_layers=tuple(range(13))),
            "vae": small_vae((128, 256, 512, 512), layers=2, groups=32),
            "text_encoder": small_clip(768, "quick_gelu", 0, 12, num_hidden_layers=12,
                                       intermediate_size=3072),
            "text_encoder_2": small_clip(1280, "gelu", 0, 20, num_hidden_layers=32,
                                         intermediate_size=5120),
            "text_encoder_3": small_t5(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24,
                                       num_heads=64)}
    states = {name: dict(model.state_dict()) for name, model in models.items()}
    states["transformer"]["pos_embed.pos_embed"] = torch.empty(1, 384 * 384, 1536, device="meta")
    for name, state in states.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        write_sparse(folder / name / f"{stem}.safetensors", state)
    write_sparse(folder / "single.safetensors", to_single_file(states["transformer"], states["vae"]))
    return folder


def test_the_published_configuration_is_read_off_the_shapes(full_size):
    published = dict(vars(SD35_MEDIUM)) | dict(max_grid=64, base_grid=64)
    folder = Checkpoint.find(full_size / "transformer", "diffusion_pytorch_model")
    single = Part(Checkpoint([full_size / "single.safetensors"]), PREFIXES[0], SINGLE, {})
    for part in (Part(folder, "", DIFFUSERS, {}), single):
        assert vars(mmdit_config(part, 128)) == published


LOAD = """
import resource, sys, torch
from pathlib import Path
from tinyflow.sd3.checkpoint import Checkpoint
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3.load import load_clip, load_mmdit, load_t5, load_vae
from tinyflow.sd3.parts import Part
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder
folder, what, before = Path(sys.argv[1]), sys.argv[2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = lambda name, stem: Part(Checkpoint.find(folder / name, stem), "", DIFFUSERS, {})
if what == "cast":
    file = Checkpoint([folder / "fp32.safetensors"])
    kept = [file.tensor(name).to(torch.bfloat16) for name in file.stored]
elif what == "encoders":
    loaded = [load_clip(part("text_encoder", "model"), "quick_gelu"),
              load_clip(part("text_encoder_2", "model"), "gelu"), load_t5(part("text_encoder_3", "model"))]
else:
    single = Checkpoint([folder / "single.safetensors"])
    loaded = [load_mmdit(Part(single, "model.diffusion_model.", SINGLE, {}), 64, torch.bfloat16, "cpu"),
              load_vae(Part(single, "first_stage_model.", SINGLE, {}), "cpu")]
if what != "cast":
    kept = [tensor for module in loaded for tensor in module.state_dict().values()]
print(sum(t.numel() for t in kept), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def load_in_a_process(folder: Path, what: str) -> list[int]:
    """How many numbers were loaded, and by how many bytes the process grew."""
    command = [sys.executable, "-c", LOAD, str(folder), what]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.split()))


@pytest.mark.parametrize("what, values", [
    ("encoders", 123_650_304 + 694_659_840 + 4_762_310_656), ("single", 2_243_171_520 + 83_819_683)])
def test_the_full_size_loads_in_mapped_memory(full_size, what, values):
    """Every tensor of the published sizes finds its place. A bf16 file is mapped, not copied: a tenth of its
    size is plenty for everything else.
    """
    loaded, grown = load_in_a_process(full_size, what)
    assert loaded == values and grown < 0.1 * 2 * values


def test_a_file_that_is_cast_is_never_held_twice(tmp_path):
    """fp32 becomes bf16 one tensor at a time: the peak is about half of the file, and below 0.7 of it."""
    save_file({f"layer{n}": torch.zeros(1024, 4096) for n in range(16)}, tmp_path / "fp32.safetensors")
    loaded, grown = load_in_a_process(tmp_path, "cast")
    assert grown < 0.7 * 4 * loaded

"""Files that are not what they should be: one line says what is wrong and what to do."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.public import small_clip, small_single_file
from tinyflow.errors import InputError
from tinyflow.sd3.checkpoint import Checkpoint, load
from tinyflow.sd3.layouts import DIFFUSERS, SINGLE
from tinyflow.sd3.load import load_clip, load_mmdit, load_sd3, load_vae, read_config
from tinyflow.sd3.parts import Part

SMALL = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(5, dtype=torch.float16),
         "none": torch.zeros(0, 4)}
TRANSFORMER = "model.diffusion_model."


def load_transformer(checkpoint: Checkpoint) -> None:
    load_mmdit(Part(checkpoint, TRANSFORMER, SINGLE, {"attention_head_dim": 16}), 8, torch.float32, "cpu")


def load_autoencoder(checkpoint: Checkpoint) -> None:
    load_vae(Part(checkpoint, "first_stage_model.", SINGLE, {"norm_num_groups": 4}), "cpu")


def test_a_truncated_download_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(SMALL, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="download was cut short or damaged, download it again"):
        Checkpoint([path])


def test_a_length_that_looks_like_a_web_page_is_a_length(tmp_path):
    """A header of 60 bytes and a multiple of 256 makes a file begin with "<"."""
    header = json.dumps({"one": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes((60 + 256).to_bytes(8, "little") + header.ljust(60 + 256) + b"\0\0\x80?")
    assert path.read_bytes()[:1] == b"<" and Checkpoint([path]).tensor("one").item() == 1


def test_tensors_come_back_as_they_were_wherever_they_begin(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(SMALL, path)
    for name, tensor in SMALL.items():
        ours = Checkpoint([path]).tensor(name)
        assert torch.equal(ours, tensor) and ours.dtype == tensor.dtype
    header = json.dumps({"byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                         "one": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" + b"\0\0\x80?")
    with pytest.raises(InputError, match="byte is U8"):
        Checkpoint([path])
    header = header.replace(b"byte", b"position_ids")    # it is skipped, and "one" begins at an odd place
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" + b"\0\0\x80?")
    assert Checkpoint([path]).tensor("one").item() == 1


def test_fp8_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({f"{TRANSFORMER}x_embedder.proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match="x_embedder.proj.weight is F8_E4M3; this code reads bf16"):
        load_sd3(path)


@pytest.mark.parametrize("name, what", [
    ("conditioner.embedders.0.transformer.weight", "Stable Diffusion XL"),
    ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
    ("cond_stage_model.transformer.weight", "Stable Diffusion 1 or 2"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA, which needs a base"),
    ("lora_unet_down.lora_up.weight", "a LoRA"), ("something.else", "something this code does not know")])
def test_other_models_are_called_by_their_name(tmp_path, name, what):
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=f"this file holds {what}.*Stable Diffusion 3 or 3.5 is needed"):
        load_sd3(path)


def test_a_folder_of_another_model_or_an_incomplete_one(tmp_path, sd3):
    with pytest.raises(InputError, match="no such file or folder"):
        load_sd3(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, "
                                         "tokenizer_2/; .*download these too"):
        load_sd3(tmp_path)
    (tmp_path / "transformer").mkdir()
    model = tmp_path / "model_index.json"
    shards = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for path, content, message in (
            (model, '{"_class_name": "FluxPipeline"}', "holds a FluxPipeline"),
            (model, '{"_class_name', "model_index.json: damaged"),
            (model, "{}", "no transformer/"),
            (shards, '{"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}',
             "00002-of-00002.safetensors: there is no such file"),
            (shards, '{"weight_map": 3}', "index.json: damaged")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_sd3(tmp_path, sd3[0] if path == shards else None)


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a.weight": torch.zeros(2, 3), "c.weight": torch.zeros(1), "extra": torch.zeros(1)}, path)
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"one": torch.nn.Linear(4, 2), "two": torch.nn.Linear(3, 2, bias=False)})
    with pytest.raises(InputError) as caught:
        load(module, Checkpoint([path]), "", {"one": "a", "two": "b"}, None, "cpu", extra=("extra",))
    assert str(caught.value).endswith("a.weight is (2, 3), which gives (2, 3) where (2, 4) is needed; "
                                      "missing a.bias; missing b.weight; unexpected c.weight")


def test_a_thousand_corruptions_are_a_thousand_clean_errors(tmp_path):
    """Changed and missing bytes in headers, and files cut anywhere: InputError, or still a whole file."""
    path = tmp_path / "weights.safetensors"
    save_file(small_single_file(), path)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    digits = [n for n in range(8, header) if chr(whole[n]).isdigit()]
    for _ in range(1000):
        damaged = bytearray(whole)
        way = draw.randrange(4)
        if way == 0:                                     # a flipped bit
            damaged[draw.randrange(header)] ^= 1 << draw.randrange(8)
        elif way == 1:                                   # a few bytes replaced by a few others
            at = draw.randrange(header)
            damaged[at:at + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(9))
        elif way == 2:                                   # cut short
            del damaged[draw.randrange(len(whole)):]
        else:                                            # digits changed: block numbers, shapes, offsets
            for at in draw.sample(digits, draw.randrange(1, 4)):
                damaged[at] = draw.choice(b"0123456789")
        path.write_bytes(damaged)
        try:
            checkpoint = Checkpoint([path])
            load_transformer(checkpoint)
            load_autoencoder(checkpoint)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 950                         # the rest: a digit replaced by itself, a bit in the metadata


@pytest.mark.parametrize("name, shape", [
    ("joint_blocks.x.mlp.weight", (2, 2)), ("joint_blocks.999999999999.mlp.weight", (2, 2)),
    ("x_embedder.proj.weight", (3,)), ("x_embedder.proj.weight", (0, 0, 0, 0)), ("pos_embed", (1,)),
    ("joint_blocks.0.x_block.attn.ln_q.weight", (0,)), ("context_embedder.weight", (7, 0))])
def test_absurd_names_and_shapes_are_errors_too(tmp_path, name, shape):
    """Well-formed files that random damage does not hit once ended in a traceback or in 10^12 blocks."""
    path = tmp_path / "weights.safetensors"
    save_file(small_single_file() | {TRANSFORMER + name: torch.zeros(shape)}, path)
    with pytest.raises(InputError):
        load_transformer(Checkpoint([path]))


def test_half_an_autoencoder_and_a_clip_without_a_matrix_are_errors_too(tmp_path):
    """A file with the decoder alone, and a projection that is one number, once ended in an IndexError."""
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor for name, tensor in small_single_file().items() if ".encoder." not in name}, path)
    with pytest.raises(InputError, match="there is no first_stage_model.encoder"):
        load_autoencoder(Checkpoint([path]))
    save_file(small_clip(24, "gelu", 4).state_dict() | {"text_projection.weight": torch.tensor(1.0)}, path)
    with pytest.raises(InputError, match=r"text_projection.weight is \(\), where 2 dimensions are needed"):
        load_clip(Part(Checkpoint([path]), "", DIFFUSERS, {}), "gelu")


def test_contradicting_shapes_are_one_line_before_anything_is_loaded(tmp_path, sd3):
    """`learn` reads the configuration first, and ended in a traceback there where loading gave one line."""
    source, target = sd3[0] / "transformer", tmp_path / "transformer"
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    norms = {name: torch.ones(5) for name in state if ".norm_q." in name or ".norm_k." in name}
    target.mkdir()
    save_file(state | norms, target / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="contradict each other .width 32 must be divisible by the 6 heads"):
        read_config(tmp_path, sd3[0], 64)

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
TRANSFORMER, ONE = "model.diffusion_model.", b"\0\0\x80?"       # the number 1 in fp32


def write_raw(path, header: dict, data: bytes, length: int = 0) -> None:
    packed = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(packed).to_bytes(8, "little") + packed + data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def load_transformer(checkpoint: Checkpoint) -> None:
    load_mmdit(Part(checkpoint, TRANSFORMER, SINGLE, {"attention_head_dim": 16}), 8, torch.float32, "cpu")


def load_autoencoder(checkpoint: Checkpoint) -> None:
    load_vae(Part(checkpoint, "first_stage_model.", SINGLE, {"norm_num_groups": 4}), "cpu")


@pytest.mark.parametrize("spoil, message", [
    (lambda whole: whole[:-7], "download was cut short or damaged, download it again"),
    (lambda whole: b"<!doctype html>", "a web page, not weights: the repository is gated"),
    (lambda whole: b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not weights"),
    (lambda whole: b"PK\x03\x04" + bytes(99), "a pickled torch file, which is never opened")])
def test_a_file_of_another_kind_is_named(path, spoil, message):
    save_file(SMALL, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        Checkpoint([path])


def test_a_length_that_looks_like_a_web_page_is_a_length(path):
    """A header of 60 bytes and a multiple of 256 makes a file begin with "<"."""
    write_raw(path, {"one": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, ONE, length=60 + 256)
    assert path.read_bytes()[:1] == b"<" and Checkpoint([path]).tensor("one").item() == 1


def test_tensors_come_back_as_they_were_wherever_they_begin(path):
    save_file(SMALL, path)
    for name, tensor in SMALL.items():
        ours = Checkpoint([path]).tensor(name)
        assert torch.equal(ours, tensor) and ours.dtype == tensor.dtype
    byte, one = ({"dtype": kind, "shape": [1], "data_offsets": [start, stop]}
                 for kind, start, stop in (("U8", 0, 1), ("F32", 1, 5)))
    write_raw(path, {"byte": byte, "one": one}, b"\0" + ONE)
    with pytest.raises(InputError, match="byte is U8; this code reads bf16"):
        Checkpoint([path])
    write_raw(path, {"position_ids": byte, "one": one}, b"\0" + ONE)     # skipped: 1 begins at an odd place
    assert Checkpoint([path]).tensor("one").item() == 1


def test_a_file_or_folder_of_another_model_or_an_incomplete_one(path, tmp_path, sd3):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="no model.diffusion_model.x_embedder.*this is another model"):
        load_sd3(path)
    with pytest.raises(InputError, match="no such file or folder"):
        load_sd3(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, "
                                         "tokenizer_2/; .*download these too"):
        load_sd3(tmp_path)
    (tmp_path / "transformer").mkdir()
    model = tmp_path / "model_index.json"
    for content, message in (('{"_class_name": "FluxPipeline"}', "holds a FluxPipeline"),
                             ('{"_class_name', "model_index.json: damaged"), ("{}", "no transformer/")):
        model.write_text(content)
        with pytest.raises(InputError, match=message):
            load_sd3(tmp_path)
    save_file(SMALL, tmp_path / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="only 1 of the shards diffusion_pytorch_model-.*-of-00002"):
        load_sd3(tmp_path, sd3[0])


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(path):
    save_file({"a.weight": torch.zeros(2, 3), "c.weight": torch.zeros(1), "extra": torch.zeros(1)}, path)
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"one": torch.nn.Linear(4, 2), "two": torch.nn.Linear(3, 2, bias=False)})
    with pytest.raises(InputError) as caught:
        load(module, Checkpoint([path]), "", {"one": "a", "two": "b"}, None, "cpu", extra=("extra",))
    assert str(caught.value).endswith("a.weight is (2, 3), which gives (2, 3) where (2, 4) is needed; "
                                      "missing a.bias; missing b.weight; unexpected c.weight")


def test_300_corruptions_are_300_clean_errors(path):
    """Changed and missing bytes in headers, and files cut anywhere: InputError, or still a whole file."""
    save_file(small_single_file(), path)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    digits = [n for n in range(8, header) if chr(whole[n]).isdigit()]
    for _ in range(300):
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
    assert refused > 280                         # the rest: a digit replaced by itself, a bit in the metadata


@pytest.mark.parametrize("name, shape", [
    ("joint_blocks.x.mlp.weight", (2, 2)), ("joint_blocks.999999999999.mlp.weight", (2, 2)),
    ("x_embedder.proj.weight", (3,)), ("x_embedder.proj.weight", (0, 0, 0, 0)), ("pos_embed", (1,)),
    ("joint_blocks.0.x_block.attn.ln_q.weight", (0,)), ("context_embedder.weight", (7, 0))])
def test_absurd_names_and_shapes_are_errors_too(path, name, shape):
    """Well-formed files that random damage does not hit once ended in a traceback or in 10^12 blocks."""
    save_file(small_single_file() | {TRANSFORMER + name: torch.zeros(shape)}, path)
    with pytest.raises(InputError):
        load_transformer(Checkpoint([path]))


def test_half_an_autoencoder_and_a_clip_without_a_matrix_are_errors_too(path):
    """They once ended in an IndexError; and a width of 48, which heads of 64 do not divide, in another."""
    save_file({name: tensor for name, tensor in small_single_file().items() if ".encoder." not in name}, path)
    with pytest.raises(InputError, match="there is no first_stage_model.encoder"):
        load_autoencoder(Checkpoint([path]))
    save_file(small_clip(24, "gelu", 4).state_dict() | {"text_projection.weight": torch.tensor(1.0)}, path)
    with pytest.raises(InputError, match="the shapes contradict each other"):
        load_clip(Part(Checkpoint([path]), "", DIFFUSERS, {}), "gelu")
    save_file(small_clip(48, "gelu", 4).state_dict(), path)
    with pytest.raises(InputError, match="width 48 that does not divide into heads of 64; .* --text DIR"):
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

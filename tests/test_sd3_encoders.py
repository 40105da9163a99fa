"""CLIP and T5 against transformers, with random weights; and weights on another device than the ids."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from tests.public import small_clip, small_t5
from tinyflow.errors import InputError
from tinyflow.sd3.checkpoint import Checkpoint
from tinyflow.sd3.layouts import DIFFUSERS
from tinyflow.sd3.load import load_clip, load_t5
from tinyflow.sd3.offload import offload
from tinyflow.sd3.parts import Part
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder


def saved(state: dict, folder: Path, **config) -> Part:
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return Part(Checkpoint([folder / "model.safetensors"]), "", DIFFUSERS, config)


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


def test_how_many_heads_clip_has_is_not_guessed(tmp_path):
    """A width of 48 once was a ZeroDivisionError, and heads of 32 were taken for heads of 64."""
    with pytest.raises(InputError, match="width 48 that does not divide into heads of 64; .* --text DIR"):
        load_clip(saved(small_clip(48, "gelu", 0).state_dict(), tmp_path), "gelu")


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

"""CLIP and T5 against transformers, with random weights; and weights on another device than the ids."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tinyflow.sd3.offload import offload
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder

transformers = pytest.importorskip("transformers")

CLIP_NAMES = {"self_attn.q_proj": "to_q", "self_attn.k_proj": "to_k", "self_attn.v_proj": "to_v",
              "self_attn.out_proj": "to_out", "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.": "",
              "final_layer_norm": "final_norm", "text_model.": "", "encoder.": "", "embeddings.": "",
              "text_projection": "projection"}
T5_NAMES = {"SelfAttention.relative_attention_bias": "distance_embedding", "SelfAttention.q": "to_q",
            "SelfAttention.k": "to_k", "SelfAttention.v": "to_v", "SelfAttention.o": "to_out",
            "DenseReluDense.wi_0": "gate", "DenseReluDense.wi_1": "fc1", "DenseReluDense.wo": "fc2",
            "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2", "layer.0.": "", "layer.1.": "",
            "encoder.": "", "block.0.distance": "distance", "block": "layers",
            "final_layer_norm": "final_norm", "shared": "token_embedding"}


def transfer(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> nn.Module:
    """Loads the peer's weights, strictly, after all replacements of `names` in turn."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name == "encoder.embed_tokens.weight":        # the same as shared.weight
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours.load_state_dict(state)
    return ours.requires_grad_(False).eval()


def randomised(encoder: nn.Module) -> nn.Module:
    """Weights that bf16 can hold, so that a comparison in bf16 compares the arithmetic alone."""
    torch.manual_seed(0)
    for name, parameter in encoder.requires_grad_(False).named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return encoder.bfloat16().float().eval()


def clip_peer(config: TextConfig):
    peer = transformers.CLIPTextConfig(
        vocab_size=config.vocabulary_size, max_position_embeddings=config.length, hidden_size=config.width,
        num_hidden_layers=config.depth, num_attention_heads=config.heads, intermediate_size=config.hidden,
        projection_dim=config.pooled_width or 8, hidden_act=config.activation, eos_token_id=config.end,
        bos_token_id=1, pad_token_id=0)
    with_projection, without = transformers.CLIPTextModelWithProjection, transformers.CLIPTextModel
    return randomised(with_projection(peer) if config.pooled_width else without(peer))


def t5_pair(config: T5Config):
    peer = randomised(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=config.vocabulary_size, d_model=config.width, num_layers=config.depth,
        num_heads=config.heads, d_kv=config.head_width, d_ff=config.hidden, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=config.buckets, relative_attention_max_distance=config.max_distance)))
    return peer, transfer(peer, T5Encoder(config), T5_NAMES)


@pytest.mark.parametrize("activation, pad", [("quick_gelu", 49), ("gelu", 0)])         # CLIP-L and CLIP-G
@pytest.mark.parametrize("pooled_width", [12, None])
def test_clip_agrees_with_transformers(activation, pad, pooled_width):
    config = TextConfig(50, length=9, width=24, depth=3, heads=2, hidden=40, pooled_width=pooled_width,
                        end=49, activation=activation)
    peer = clip_peer(config)
    ours = transfer(peer, TextEncoder(config), CLIP_NAMES)
    ids = torch.tensor([[1, 5, 6, 7, 49] + 4 * [pad], [1, 49] + 7 * [pad], [1, 2, 3, 4, 5, 6, 7, 8, 49]])
    expected, (context, pooled) = peer(ids, output_hidden_states=True), ours(ids)
    expected_pooled = expected.text_embeds if pooled_width else expected.pooler_output
    torch.testing.assert_close(context, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config, batch, tokens", [
    (T5Config(30, width=20, depth=1, heads=3, head_width=8, hidden=28), 1, 300),
    (T5Config(30, width=20, depth=3, heads=3, head_width=8, hidden=28), 3, 300),
    (T5Config(30, width=32, depth=3, heads=2, head_width=4, hidden=28, buckets=16, max_distance=50), 3, 77),
    (T5Config(30, width=32, depth=1, heads=2, head_width=4, hidden=28), 3, 1),
])
def test_t5_agrees_with_transformers(config, batch, tokens):
    peer, ours = t5_pair(config)
    ids = torch.randint(0, 30, (batch, tokens), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(ids), peer(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_weights_that_are_kept_in_16_bits_are_computed_with_in_fp32():
    """T5-XXL overflows in fp16. No encoder needs half precision: a layer at a time, fp32 fits everywhere."""
    _, ours = t5_pair(T5Config(30, width=20, depth=2, heads=3, head_width=8, hidden=28))
    ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(1))
    exact, offloaded = ours(ids), offload(ours.bfloat16())
    assert torch.equal(offloaded(ids), exact) and ours.token_embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("encoder", [
    TextEncoder(TextConfig(20)), TextEncoder(TextConfig(20, pooled_width=None)),
    T5Encoder(T5Config(20, 16, 2, 2, 8, 24))])
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

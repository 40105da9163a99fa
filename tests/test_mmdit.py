import pytest
import torch
from einops import rearrange

from tests.conftest import make_pipe
from tinyflow.attention import JointAttention
from tinyflow.mmdit import MMDiT, MMDiTConfig, position_features, time_features

SMALL = dict(width=32, depth=3, heads=2, context_width=16, pooled_width=16)


def inputs(batch=2, height=32, width=32, tokens=5):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    return draw(batch, 3, height, width), torch.rand(batch, generator=generator), draw(batch, tokens, 16), draw(batch, 16)


@pytest.mark.parametrize("dual", [(), (0, 2)])
def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity(dual):
    model = MMDiT(MMDiTConfig(**SMALL, dual_attention_layers=dual))
    assert model(*inputs()).abs().max() == 0
    x, c, vec = torch.randn(2, 64, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in model.blocks:
        x_out, c_out = block(x, c, vec)
        assert torch.equal(x_out, x) and (c_out is None or torch.equal(c_out, c))


def test_only_the_last_block_drops_the_text_stream():
    blocks = MMDiT(MMDiTConfig(**SMALL)).blocks
    assert [block.text_mlp is None for block in blocks] == [False, False, True]
    assert [block.attention.text.to_out is None for block in blocks] == [False, False, True]


def test_dual_attention_and_qk_norm_are_where_the_config_says():
    model = MMDiT(MMDiTConfig(**SMALL, dual_attention_layers=(1,), qk_norm=False))
    assert [block.attention2 is not None for block in model.blocks] == [False, True, False]
    assert not any("norm_q" in name for name, _ in model.named_parameters())


def test_the_output_puts_every_value_on_its_pixel():
    """The last layer's values of a token are its patch row by row, channels innermost; patches follow row by row."""
    model = MMDiT(MMDiTConfig(**SMALL))
    with torch.no_grad():
        model.final_linear.bias.copy_(torch.arange(48.0))
    v = model(*inputs())
    for c, p, q in ((0, 0, 0), (2, 0, 0), (0, 0, 1), (0, 1, 0), (1, 3, 2)):
        assert (v[:, c, p::4, q::4] == (p * 4 + q) * 3 + c).all()
    patches = rearrange(v, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)
    assert torch.equal(patches, torch.arange(48.0).expand(2, 64, 48))


def test_joint_attention_is_one_softmax_over_both_streams():
    """Written out by hand: each token's query against the keys of all image and text tokens."""
    torch.manual_seed(0)
    layer, x, c = JointAttention(8, 2, qk_norm=True, text_output=True), torch.randn(1, 4, 8), torch.randn(1, 3, 8)
    split = lambda z: z.view(-1, 2, 4).transpose(0, 1)                               # [heads, tokens, 4]
    unit = lambda z: z / z.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    q, k, v = (torch.cat([split(getattr(layer.image, to)(x[0])), split(getattr(layer.text, to)(c[0]))], dim=1) for to in ("to_q", "to_k", "to_v"))
    weights = (unit(q) @ unit(k).transpose(1, 2) / 2).softmax(-1)                    # sqrt(4) = 2
    out = (weights @ v).transpose(0, 1).reshape(7, 8)
    x_out, c_out = layer(x, c)
    torch.testing.assert_close(x_out[0], layer.image.to_out(out[:4]))
    torch.testing.assert_close(c_out[0], layer.text.to_out(out[4:]))


def test_a_patch_changes_only_through_attention():
    """Pixels land where they came from: without attention a change in one patch stays in that patch."""
    pipe = make_pipe()
    with torch.no_grad():
        for block in pipe.mmdit.blocks:
            block.attention.image.to_out.weight.zero_()
    x, t, context, pooled = inputs()
    other = x.clone()
    other[:, :, 8:12, 20:24] += 1
    change = (pipe.mmdit(x, t, context, pooled) - pipe.mmdit(other, t, context, pooled)).abs().amax((0, 1)) > 1e-6
    assert change[8:12, 20:24].all() and change.sum() == 16


def test_non_square_pictures_use_the_middle_of_the_positions(pipe):
    x, t, context, pooled = inputs(height=16, width=24)
    assert pipe.mmdit(x, t, context, pooled).shape == x.shape
    crop = pipe.mmdit.cropped_positions(4, 6)
    assert torch.equal(crop[0], pipe.mmdit.positions[2:6, 1:7].reshape(24, -1))


def test_positions_tell_x_and_y_apart():
    grid = position_features(32, 8, 8)
    assert torch.equal(grid[0, 3, :16], grid[5, 3, :16]) and torch.equal(grid[2, 0, 16:], grid[2, 7, 16:])
    assert torch.allclose(time_features(torch.zeros(1))[0, :128], torch.ones(128))              # cosines first


@pytest.mark.parametrize("shape, message", [((30, 32), "patches of 4"), ((64, 32), "exceeds")])
def test_pictures_that_do_not_fit_are_refused(pipe, shape, message):
    with pytest.raises(ValueError, match=message):
        pipe.mmdit(*inputs(height=shape[0], width=shape[1]))


def test_config_errors_state_both_numbers():
    with pytest.raises(ValueError, match="30.*heads 4"):
        MMDiTConfig(width=30, heads=4)


def test_the_hook_sees_the_text_at_the_input_of_every_block(pipe):
    x, t, context, pooled = inputs()
    seen = []
    pipe.mmdit(x, t, context, pooled, lambda l, c: seen.append((l, tuple(c.shape))) or c)
    assert seen == [(0, (2, 5, 32)), (1, (2, 5, 32)), (2, (2, 5, 32))]


def test_a_sample_does_not_depend_on_its_batch(pipe):
    x, t, context, pooled = inputs(batch=3)
    alone = pipe.mmdit(x[1:2], t[1:2], context[1:2], pooled[1:2])
    torch.testing.assert_close(pipe.mmdit(x, t, context, pooled)[1:2], alone, atol=2e-6, rtol=1e-5)


def test_gradient_matches_finite_differences_in_float64():
    model = make_pipe(width=16, depth=2).mmdit.double()
    x, t, context, pooled = (v.double() for v in inputs(batch=1, height=8, width=8))
    x.requires_grad_(True)
    # The time features are fp32 by design; they do not depend on x.
    assert torch.autograd.gradcheck(lambda x: model(x, t, context, pooled).square().mean(), (x,), eps=1e-5, atol=1e-4, nondet_tol=0)

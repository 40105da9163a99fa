import pytest
import torch
from einops import rearrange

from tests.conftest import make_pipe
from tinyflow.attention import JointAttention
from tinyflow.mmdit import MMDiT, MMDiTConfig, position_features, time_features

SMALL = dict(width=32, depth=3, heads=2, context_width=16, pooled_width=16)


def inputs(batch=2, height=16, width=16, tokens=5):
    """x_t, t, context and pooled, as MMDiT.forward takes them."""
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 16, height, width, generator=generator)
    t = torch.rand(batch, generator=generator)
    context = torch.randn(batch, tokens, 16, generator=generator)
    return x_t, t, context, torch.randn(batch, 16, generator=generator)


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
    assert [hasattr(block.attention.text, "to_out") for block in blocks] == [True, True, False]


def test_dual_attention_and_qk_norm_are_where_the_config_says():
    model = MMDiT(MMDiTConfig(**SMALL, dual_attention_layers=(1,), qk_norm=False))
    assert [block.attention2 is not None for block in model.blocks] == [False, True, False]
    assert not any("norm_q" in name for name, _ in model.named_parameters())


def test_the_output_puts_every_value_on_its_pixel():
    """A token's last values are the 2 x 2 latents of its patch, row by row, channels innermost."""
    model = MMDiT(MMDiTConfig(**SMALL))
    with torch.no_grad():
        model.final_linear.bias.copy_(torch.arange(64.0))
    v = model(*inputs())
    for c, p, q in ((0, 0, 0), (2, 0, 0), (0, 0, 1), (0, 1, 0), (13, 1, 1)):
        assert (v[:, c, p::2, q::2] == (p * 2 + q) * 16 + c).all()
    patches = rearrange(v, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
    assert torch.equal(patches, torch.arange(64.0).expand(2, 64, 64))


def test_joint_attention_is_one_softmax_over_both_streams():
    """Written out by hand: each token's query against the keys of all image and text tokens."""
    torch.manual_seed(0)
    layer = JointAttention(8, 2, qk_norm=True, text_output=True)
    x, c = torch.randn(1, 4, 8), torch.randn(1, 3, 8)

    def both(name):
        z = torch.cat([getattr(layer.image, name)(x[0]), getattr(layer.text, name)(c[0])])
        return z.view(7, 2, 4).transpose(0, 1)                                          # [heads, tokens, 4]

    def unit(z):
        return z / z.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    q, k, v = both("to_q"), both("to_k"), both("to_v")
    weights = (unit(q) @ unit(k).transpose(1, 2) / 2).softmax(-1)                       # sqrt(4) = 2
    out = (weights @ v).transpose(0, 1).reshape(7, 8)
    x_out, c_out = layer(x, c)
    torch.testing.assert_close(x_out[0], layer.image.to_out(out[:4]))
    torch.testing.assert_close(c_out[0], layer.text.to_out(out[4:]))


def test_a_patch_changes_only_through_attention():
    """Latents land where they came from: without attention a change in one patch stays in that patch."""
    pipe = make_pipe()
    with torch.no_grad():
        for block in pipe.mmdit.blocks:
            block.attention.image.to_out.weight.zero_()
    x, t, context, pooled = inputs()
    other = x.clone()
    other[:, :, 4:6, 10:12] += 1
    difference = pipe.mmdit(x, t, context, pooled) - pipe.mmdit(other, t, context, pooled)
    change = difference.abs().amax((0, 1)) > 1e-6                                       # [H, W]
    assert change[4:6, 10:12].all() and change.sum() == 4


def test_non_square_pictures_use_the_middle_of_the_positions(pipe):
    x, t, context, pooled = inputs(height=8, width=12)
    assert pipe.mmdit(x, t, context, pooled).shape == x.shape
    crop = pipe.mmdit.cropped_positions(4, 6)
    assert torch.equal(crop[0], pipe.mmdit.positions[2:6, 1:7].reshape(24, -1))


def test_positions_tell_x_and_y_apart():
    grid = position_features(32, 8, 8)
    assert torch.equal(grid[0, 3, :16], grid[5, 3, :16]) and torch.equal(grid[2, 0, 16:], grid[2, 7, 16:])
    assert torch.allclose(time_features(torch.zeros(1))[0, :128], torch.ones(128))      # cosines first


@pytest.mark.parametrize("shape, message", [((15, 16), "patches of 2"), ((32, 16), "exceed the model's")])
def test_pictures_that_do_not_fit_are_refused(pipe, shape, message):
    with pytest.raises(ValueError, match=message):
        pipe.mmdit(*inputs(height=shape[0], width=shape[1]))


def test_config_errors_state_both_numbers():
    with pytest.raises(ValueError, match="width 30 must be divisible by the 4 heads"):
        MMDiTConfig(width=30, heads=4)


def test_a_visit_stands_in_every_blocks_place(pipe):
    """It gets the block and the block's inputs; what it returns goes on to the next block."""
    seen = []

    def watch(number, block, x, c, vec):
        assert block is pipe.mmdit.blocks[number]
        seen.append((number, tuple(x.shape), tuple(c.shape), tuple(vec.shape)))
        return block(x, c, vec)

    def overwrite(number, block, x, c, vec):
        return block(x, torch.zeros_like(c), vec)

    plain = pipe.mmdit(*inputs())
    assert torch.equal(pipe.mmdit(*inputs(), watch), plain)
    assert seen == [(number, (2, 64, 32), (2, 5, 32), (2, 32)) for number in range(3)]
    assert not torch.allclose(pipe.mmdit(*inputs(), overwrite), plain)


def test_a_sample_does_not_depend_on_its_batch(pipe):
    x, t, context, pooled = inputs(batch=3)
    alone = pipe.mmdit(x[1:2], t[1:2], context[1:2], pooled[1:2])
    torch.testing.assert_close(pipe.mmdit(x, t, context, pooled)[1:2], alone, atol=2e-6, rtol=1e-5)


def test_gradient_matches_finite_differences_in_float64():
    model = make_pipe(width=16, depth=2).mmdit.double()
    x, t, context, pooled = (value.double() for value in inputs(batch=1, height=4, width=4))
    x.requires_grad_(True)

    def loss(x):                                 # time features are fp32 by design, but do not depend on x
        return model(x, t, context, pooled).square().mean()

    assert torch.autograd.gradcheck(loss, (x,), eps=1e-5, atol=1e-4, nondet_tol=0)

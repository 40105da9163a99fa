"""Rectified flow; an MMDiT before training; and what model and autoencoder refuse.

What they compute with other weights is compared with diffusers and transformers in test_sd3*.py.
"""

import pytest
import torch

from tinyflow import flow
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.vae import VAE, VAEConfig

SMALL = dict(width=32, depth=3, heads=2, context_width=16, pooled_width=16)


def velocity(mmdit, height=16, width=16):
    x_t, context = torch.randn(2, 16, height, width), torch.randn(2, 5, 16)
    return mmdit(x_t, torch.rand(2), context, torch.randn(2, 16))


def test_path_runs_from_data_to_noise_at_the_target_velocity():
    x_0, x_1 = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    assert torch.equal(flow.path(x_0, x_1, torch.zeros(5)), x_0)
    assert torch.equal(flow.path(x_0, x_1, torch.ones(5)), x_1)
    slope = (flow.path(x_0, x_1, t + 1e-6) - flow.path(x_0, x_1, t)) / 1e-6
    torch.testing.assert_close(slope, flow.velocity_target(x_0, x_1), atol=1e-8, rtol=1e-6)


def test_euler_follows_a_flow_known_in_closed_form():
    """Data is N(m, s^2): the marginal velocity is linear in x, and the flow carries noise z to m + s z."""
    m, s = 2.0, 0.5

    def velocity(x, t):
        t = flow.expand(t, x)
        variance = (1 - t) ** 2 * s**2 + t**2
        x_0 = m + (1 - t) * s**2 / variance * (x - (1 - t) * m)                      # E[x_0 | x_t]
        x_1 = t / variance * (x - (1 - t) * m)                                       # E[x_1 | x_t]
        return x_1 - x_0

    z = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (50, 100, 200):
        *_, (t, x) = flow.euler(velocity, z, steps)
        assert t == 0
        errors.append((x - (m + s * z)).abs().max().item())
    assert errors[2] < 0.02 and 1.8 < errors[0] / errors[1] < 2.2        # half the step makes half the error


def test_training_and_sampling_shift_times_alike():
    plain, shifted = (flow.training_times(100, shift, torch.Generator().manual_seed(3)) for shift in (1, 3))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    visited = torch.tensor([t for t, _ in flow.euler(lambda x, t: x * 0, torch.zeros(1, 1), 4, shift=3.0)])
    torch.testing.assert_close(visited, flow.shift_times(torch.tensor([.75, .5, .25, 0]), 3.0))


@pytest.mark.parametrize("dual", [(), (0, 2)])
def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity(dual):
    model = MMDiT(MMDiTConfig(**SMALL, dual_attention_layers=dual))
    assert velocity(model).abs().max() == 0
    x, c, vec = torch.randn(2, 64, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in model.blocks:
        x_out, c_out = block(x, c, vec)
        assert torch.equal(x_out, x) and (c_out is None or torch.equal(c_out, c))


def test_pictures_that_do_not_fit_are_refused(pipe):
    for height, message in ((15, "15 x 16 does not divide into patches of 2"), (32, "exceed the model's 8")):
        with pytest.raises(ValueError, match=message):
            velocity(pipe.mmdit, height)
    with pytest.raises(ValueError, match="multiples of 4 pixels, not 30 x 24"):
        VAE(VAEConfig((8, 16, 16), layers=1, groups=4)).encode(torch.zeros(1, 3, 24, 30))

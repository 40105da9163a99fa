import torch

from tinyflow import flow


def test_path_runs_from_data_to_noise_at_the_target_velocity():
    x_0, x_1 = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    assert torch.equal(flow.path(x_0, x_1, torch.zeros(5)), x_0)
    assert torch.equal(flow.path(x_0, x_1, torch.ones(5)), x_1)
    step = 1e-6
    slope = (flow.path(x_0, x_1, t + step) - flow.path(x_0, x_1, t)) / step
    torch.testing.assert_close(slope, flow.velocity_target(x_0, x_1), atol=1e-8, rtol=1e-6)


def test_x_0_is_recovered_from_the_true_velocity():
    x_0, x_1, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5)
    v = flow.velocity_target(x_0, x_1)
    torch.testing.assert_close(flow.path(x_0, x_1, t) - flow.expand(t, v) * v, x_0)


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


def test_shift_keeps_the_ends_and_composes():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(flow.shift_times(t, 1.0), t)
    assert flow.shift_times(t, 3.0)[[0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(flow.shift_times(flow.shift_times(t, 3.0), 2.0), flow.shift_times(t, 6.0))


def test_training_and_sampling_shift_times_alike():
    plain, shifted = (flow.sample_times(100, shift, torch.Generator().manual_seed(3)) for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted, flow.shift_times(plain, 3.0))
    visited = [t for t, _ in flow.euler(lambda x, t: x * 0, torch.zeros(1, 1), 4, shift=3.0)]
    torch.testing.assert_close(torch.tensor(visited), flow.shift_times(torch.tensor([.75, .5, .25, 0]), 3.0))


def test_guidance_one_is_the_text_and_zero_the_null():
    null, text = torch.randn(2, 3)
    assert torch.allclose(flow.guide(null, text, 1.0), text)
    assert torch.equal(flow.guide(null, text, 0.0), null)


def test_a_seeds_noise_does_not_depend_on_its_neighbours():
    many = flow.noise_for([5, 6, 7], (3, 8, 8))
    assert torch.equal(flow.noise_for([6], (3, 8, 8))[0], many[1]) and not torch.equal(many[0], many[1])


def test_the_samplers_times_are_those_of_the_public_sd3_scheduler():
    """With shift 3 it spaces its times evenly from 1 to 0.002994, and not to one step before 0."""
    times = flow.sampling_times(4, shift=3.0, last=0.002994)
    assert [round(t, 4) for t in times] == [1.0, .8577, .6022, .0089, 0.0]
    torch.testing.assert_close(torch.tensor(flow.sampling_times(4)), torch.tensor([1, .75, .5, .25, 0]))

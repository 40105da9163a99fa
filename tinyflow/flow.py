"""Rectified flow: path, target, times, loss, guidance and the Euler sampler.

The convention of the whole project: t = 0 is data, t = 1 is noise.

    x_t = (1 - t) x_0 + t x_1                         (Eq. 1)     the straight path from data to noise
    v   = x_1 - x_0                                   (Eq. 2)     its velocity, which the model learns
    L   = E || v_theta(x_t, t | y) - v ||^2           (Eq. 3)     the flow-matching loss

Sampling starts from noise at t = 1 and integrates dx/dt = v_theta down to t = 0. Read next: attention.py.
"""

from typing import Callable, Iterator

import torch
from torch import Tensor


def expand(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...], to multiply with x [B, ...]."""
    return t.view(-1, *[1] * (x.ndim - 1))


def path(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t of Eq. 1. x_0 data and x_1 noise [B, ...], t [B] in [0, 1]."""
    t = expand(t, x_0)
    return (1 - t) * x_0 + t * x_1


def velocity_target(x_0: Tensor, x_1: Tensor) -> Tensor:
    """v of Eq. 2."""
    return x_1 - x_0


def predict_x_0(x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """The data that a velocity points at: x_0 = x_t - t v, by Eq. 1 and 2."""
    return x_t - expand(t, x_t) * v


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Moves times toward noise: t -> s t / (1 + (s - 1) t). Large pictures need a large s; 1 is no shift."""
    return shift * t / (1 + (shift - 1) * t)


def sample_times(count: int, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Training times [count] in (0, 1): the sigmoid of a standard normal (logit-normal), then shifted."""
    return shift_times(torch.sigmoid(torch.randn(count, generator=generator)), shift)


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error, in fp32: the expectation in Eq. 3 and Eq. 14, a mean over batch and pixels.

    weight: [B, 1, H, W], 0 or more: what each pixel of [B, C, H, W] counts in the mean. By default all alike.
    """
    error = (prediction.float() - target.float()).square()
    return error.mean() if weight is None else (weight * error).mean() / weight.mean()


def guide(v_null: Tensor, v_text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: extrapolates from the empty text's prediction. 1 changes nothing."""
    return v_null + guidance * (v_text - v_null)


def noise_for(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """x_1 [len(seeds), *shape]. Each sample has its own generator, so no other sample changes its noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def sampling_times(steps: int, shift: float = 1.0, last: float | None = None) -> list[float]:
    """The times from 1 down to 0 at which the sampler stops, steps + 1 of them.

    Args:
        last: the last time that is not 0, unshifted. By default the times are evenly spaced. The public
            sampler of SD3 has 0.002994 here, so its last step is very short.
    """
    last = 1 / steps if last is None else last
    times = torch.linspace(1, last, steps, dtype=torch.float64)
    return [*shift_times(times, shift).tolist(), 0.0]


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, shift: float = 1.0,
          last: float | None = None) -> Iterator[tuple[float, Tensor]]:
    """Integrates dx/dt = velocity(x, t), x [B, ...] and t [B], from the noise x at t = 1 down to 0 in `steps`
    Euler steps; yields (t, x) after each. shift, last: see sampling_times.
    """
    times = sampling_times(steps, shift, last)
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, device=x.device))
        yield t_next, x

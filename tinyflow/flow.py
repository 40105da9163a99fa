"""Rectified flow: path, target, times, loss, guidance and the Euler sampler.

The convention of the whole project: t = 0 is data, t = 1 is noise.

    x_t = (1 - t) x_0 + t x_1                            (Eq. 1)     the straight path from data to noise
    v   = x_1 - x_0                                                  its velocity, which the model learns
    L   = E || v_theta(x_t, t | y) - v ||^2              (Eq. 2)     the flow-matching loss
    v_g = v_theta(null) + g (v_theta(y) - v_theta(null)) (Eq. 4, 5)  classifier-free guidance

theta are the model's weights, y is the text, and E is the mean over data, noise and times. Sampling starts
from noise at t = 1 and integrates dx/dt = v_theta down to t = 0. Read next: attention.py.
"""

from typing import Callable, Iterator

import torch
from torch import Tensor


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Reshapes t [B] to [B, 1, 1, ...], so that it multiplies x [B, ...]."""
    return t.view(-1, *[1] * (x.ndim - 1))


def path(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t of Eq. 1. x_0 data and x_1 noise [B, ...], t [B] in [0, 1]."""
    t = expand(t, x_0)
    return (1 - t) * x_0 + t * x_1


def velocity_target(x_0: Tensor, x_1: Tensor) -> Tensor:
    """v, the target of Eq. 2."""
    return x_1 - x_0


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Moves times toward 1 (noise): t becomes s t / (1 + (s - 1) t), s = shift. s = 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(count: int, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Times for training [count] in (0, 1): the sigmoid of a standard normal (logit-normal), then shifted."""
    return shift_times(torch.sigmoid(torch.randn(count, generator=generator)), shift)


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in fp32: the E of Eq. 2 and 3, divided by the number of values in a sample.

    weight: [B, 1, H, W], not negative: the weight of each position. None: all weights are equal.
    """
    error = (prediction.float() - target.float()).square()
    return error.mean() if weight is None else (weight * error).mean() / weight.mean()


def guide(v_null: Tensor, v_text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Eq. 4, in the form of Eq. 5). guidance = 1 gives v_text."""
    return v_null + guidance * (v_text - v_null)


def noise_for(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Noise x_1 [len(seeds), *shape]. Row i depends on seeds[i] alone, not on the size of the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def sampling_times(steps: int, shift: float = 1.0, last: float | None = None) -> list[float]:
    """The steps + 1 times of the sampler, 1 to 0. last: the last time above 0, unshifted; None: 1 / steps."""
    times = torch.linspace(1, last or 1 / steps, steps, dtype=torch.float64)
    return [*shift_times(times, shift).tolist(), 0.0]


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, shift: float = 1.0,
          last: float | None = None) -> Iterator[tuple[float, Tensor]]:
    """Integrates dx/dt = velocity(x, t) from t = 1 to t = 0 in Euler steps; yields (t, x) after each.

    x: noise [B, ...]. velocity: gets x [B, ...] and t [B]. shift: see shift_times; last: sampling_times.
    """
    times = sampling_times(steps, shift, last)
    for t, t_next in zip(times, times[1:]):
        # t_next < t: each step moves x toward the data
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, device=x.device))
        yield t_next, x

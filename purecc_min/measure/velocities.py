"""How far a customized model's velocities move from the original's, at five times, on noised renders.

The prompts are those about other objects, so ideally nothing moves. The path KL weighs the same differences
in such a way that they become a KL divergence between the two models. Read next: judge.py.
"""

from typing import NamedTuple

import numpy as np
import torch

from purecc_min.measure.toy import Toy
from tinyflow.flow import noise_for, path
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import Pipeline, Velocity

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)                # at which velocities are compared


class VelocityError(NamedTuple):
    """Compares the customized model's velocities v with the original's, at each t of TIMES."""
    relative: list[float]                        # |v - v_original|^2 / |v_original|^2
    squared: list[float]                         # |v - v_original|^2 of a picture

    @property
    def path_kl(self) -> float:
        """The KL divergence between the distributions of whole sampling paths, in nats per picture.

        A velocity v is a score: score = -(x + (1 - t) v) / t. Take two reverse diffusions with this path's
        noise, g^2 = 2 t / (1 - t), whose scores differ by D. Their KL is 1/2 E integral g^2 |D|^2 dt, that is
        E integral (1 - t)/t |v - v_original|^2 dt. It bounds the KL between the pictures from above. Two
        approximations remain: the expectation is over noised renders and not over the model's own paths,
        and the integral over [0, 1] is a sum over TIMES (the midpoint rule).
        """
        return float(np.mean([(1 - t) / t * error for t, error in zip(TIMES, self.squared)]))


@torch.no_grad()
def velocity_error(pipe: Pipeline, theta: Velocity | None, toy: Toy) -> VelocityError:
    """Compares theta's velocities with the original's on the prompts of the other group, at noised renders.

    theta None stands for a method that does not change the original's velocities: all its errors are zero.
    """
    if theta is None:
        return VelocityError([0.0] * len(TIMES), [0.0] * len(TIMES))
    prompts, errors = toy.prompts()["other"], VelocityError([], [])
    x_0 = pipe.encode_images(render_all([p.scene for p in prompts])[0])                   # [24, C, H, W]
    x_1 = noise_for(list(range(len(x_0))), x_0.shape[1:]).to(x_0)
    text = pipe.encode_text([p.base for p in prompts])
    for time in TIMES:
        t = torch.full((len(x_0),), time, device=x_0.device)
        x_t = path(x_0, x_1, t)
        v_original = pipe.velocity(x_t, t, text)
        squared = (theta(x_t, t, text) - v_original).square().sum()
        errors.relative.append((squared / v_original.square().sum()).item())
        errors.squared.append(squared.item() / len(x_0))
    return errors

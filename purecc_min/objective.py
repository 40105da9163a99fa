"""The decoupled objective of PureCC: Eq. 8 to 15 of the paper, in one function.

theta_1 is the frozen representation extractor (stage 1), theta_2 the model in training. Both are called as
theta(x_t, t, text) and return a velocity [B, C, H, W]. R(y_tar) is what the concept alone adds to the
extractor's prediction; R(y_complete, y_base) is what [V] adds to a whole text in theta_2. lambda* is the
length of the second along the first. L_PureCC is zero if the second points in the first one's direction.

Put lambda* into Eq. 14, and L_PureCC is the squared part of R(y_complete, y_base) that is orthogonal to
R(y_tar): it never pulls toward the concept, which L_CC alone does. The paper does not say whether
v_original carries a gradient; here it does not. (lambda* is detached too, which changes nothing: it
minimises L_PureCC, so the gradient through it is zero.) Read next: methods.py.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

from purecc_min.concept import Batch
from tinyflow.flow import expand, squared_error
from tinyflow.pipeline import Velocity, in_one_batch


class Terms(NamedTuple):
    """What one step computes, for the log, the lessons and the figures. Velocities are [B, C, H, W]."""
    v_original: Tensor                           # v_theta2(x_t | y_base)
    v_complete: Tensor                           # v_theta2(x_t | y_complete), which carries the gradient
    v_purecc: Tensor
    R_target: Tensor                             # R(y_tar), frozen
    R_complete: Tensor                           # R(y_complete, y_base)
    lam: Tensor                                  # [B] lambda*
    loss_cc: Tensor                              # a number: L_CC
    loss_purecc: Tensor                          # a number: L_PureCC


def lambda_star(R_complete: Tensor, R_target: Tensor) -> Tensor:
    """lambda* = argmin_l |R_complete - l R_target|^2 = <R_complete, R_target> / |R_target|^2 (Eq. 11, 12).

    It is one number a sample, [B], which is our reading: the paper does not say. It may be negative, and it
    is 0 where R_target vanishes, in value and in gradient.
    """
    squared_norm = inner(R_target, R_target)
    vanishes = squared_norm == 0
    return torch.where(vanishes, 0.0, inner(R_complete, R_target) / torch.where(vanishes, 1.0, squared_norm))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, over channels and pixels: [B, C, H, W] -> [B], in fp32 or better."""
    a, b = (v if v.dtype == torch.float64 else v.float() for v in (a, b))
    return (a * b).flatten(1).sum(1)


def pcc_loss(theta_1: Velocity, theta_2: Velocity, batch: Batch, eta: float,
             lambda_rule: Callable[[Tensor, Tensor], Tensor] = lambda_star) -> tuple[Tensor, Terms]:
    """L_PCC of one step, and the terms that it is made of."""
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_tar, v_null = in_one_batch(theta_1, x_t, t, texts.target, texts.null)
        R_target = v_tar - v_null                                                       # Eq. 8
        v_original = theta_2(x_t, t, texts.base)                                        # Eq. 9
    v_complete = theta_2(x_t, t, texts.complete)
    R_complete = v_complete - v_original                                                # Eq. 10
    lam = lambda_rule(R_complete, R_target).detach()                                    # Eq. 11, 12
    v_purecc = v_original + expand(lam, R_target) * R_target                            # Eq. 6, 13
    loss_purecc = squared_error(v_purecc, v_complete)                                   # Eq. 14
    loss_cc = squared_error(v_complete, batch.v, batch.mask)                            # Eq. 3
    loss = loss_cc + eta * loss_purecc                                                  # Eq. 15
    return loss, Terms(v_original, v_complete, v_purecc, R_target, R_complete, lam, loss_cc, loss_purecc)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between a and b of each sample, [B]; 0 where one of them vanishes."""
    return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt().clamp(min=1e-20)

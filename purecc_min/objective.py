"""The decoupled objective of PureCC: Eq. 8 to 15 of the paper (and Eq. 6), in one function.

theta_1 is the frozen representation extractor (stage 1), theta_2 the model in training. Both are called as
theta(x_t, t, text) and return a velocity [B, C, H, W]. R(y_tar) is theta_1's velocity for y_tar minus its
velocity for the empty text: what the concept alone adds. R(y_complete, y_base) is theta_2's velocity for
y_complete minus that for y_base: what [V] adds to a whole text. lambda* is the coefficient of the projection
of R(y_complete, y_base) on R(y_tar).

With lambda*, L_PureCC is the mean square of the part of R(y_complete, y_base) that is orthogonal to R(y_tar).
So only L_CC moves theta_2 toward the concept; L_PureCC never does. The paper does not say whether v_original
carries a gradient; here it does not. (lambda* is detached, too. This changes no gradient, because lambda*
minimises L_PureCC; with another rule it could.) Read next: train.py.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

from purecc_min.concept import Batch
from tinyflow.flow import expand, squared_error
from tinyflow.pipeline import Velocity, in_one_batch


class Terms(NamedTuple):
    """The intermediate results of one step, for logs, lessons and figures. Velocities are [B, C, H, W]."""
    v_original: Tensor                           # v_theta2(x_t | y_base)
    v_complete: Tensor                           # v_theta2(x_t | y_complete), with a gradient
    v_purecc: Tensor
    R_target: Tensor                             # R(y_tar), frozen
    R_complete: Tensor                           # R(y_complete, y_base)
    lam: Tensor                                  # [B] lambda*, or what lambda_rule returned
    loss_cc: Tensor                              # scalar L_CC
    loss_purecc: Tensor                          # scalar L_PureCC


def lambda_star(R_complete: Tensor, R_target: Tensor) -> Tensor:
    """lambda* = argmin_k |R_complete - k R_target|^2 = <R_complete, R_target> / |R_target|^2 (Eq. 11, 12).

    One lambda* per sample, [B], is our choice: the paper is silent. lambda* may be negative. If R_target
    is 0, lambda* is 0.
    """
    squared_norm = inner(R_target, R_target)
    return inner(R_complete, R_target) / torch.where(squared_norm == 0, 1.0, squared_norm)      # no 0 / 0


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, over channels and positions: [B, C, H, W] -> [B], in fp32, or fp64 for fp64."""
    a, b = (v if v.dtype == torch.float64 else v.float() for v in (a, b))
    return (a * b).flatten(1).sum(1)


def pcc_loss(theta_1: Velocity, theta_2: Velocity, batch: Batch, eta: float,
             lambda_rule: Callable[[Tensor, Tensor], Tensor] = lambda_star) -> tuple[Tensor, Terms]:
    """L_PCC of one step, and its terms. lambda_rule: (R_complete, R_target) -> [B]; see ablations.py."""
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

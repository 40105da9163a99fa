"""The decoupled objective, Eq. 8 to 15 of the paper: pure functions of tensors, to be checked against it line by line.

    v_target               = R(y_tar) = v_theta1(x_t | y_tar) - v_theta1(x_t | null)               (Eq. 8)
    v_original             = v_theta2(x_t | y_base)                                                (Eq. 9)
    R(y_complete, y_base)  = v_theta2(x_t | y_complete) - v_theta2(x_t | y_base)                   (Eq. 10)
    lambda*                = argmin_l || R(y_complete, y_base) - l R(y_tar) ||^2                   (Eq. 11)
                           = < R(y_complete, y_base), R(y_tar) > / || R(y_tar) ||^2                (Eq. 12)
    v_PureCC               = v_original + lambda* v_target                                         (Eq. 6, 13)
    L_PureCC               = E || v_PureCC - v_theta2(x_t | y_complete) ||^2                       (Eq. 14)
    L_PCC                  = L_CC + eta L_PureCC                                                   (Eq. 15)

theta1 is the frozen extractor, theta2 the trainable model; L_CC is the flow-matching loss (Eq. 3). Inner products are taken a sample,
over channels and pixels, in fp32 (the paper does not say; this is our reading). Put lambda* into Eq. 14 and what is left is the part of
R(y_complete, y_base) that is orthogonal to R(y_tar): L_PureCC never pulls along the target direction. Read next: train.py, where
these functions are called in this order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinyflow.flow import expand, squared_error


def representation(v_with: Tensor, v_without: Tensor) -> Tensor:
    """R: what a text adds to a prediction (Eq. 8 against the empty text, Eq. 10 against the base text). All [B, C, H, W]."""
    return v_with - v_without


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample: [B, C, H, W] -> [B], in fp32 or better."""
    a, b = (v if v.dtype == torch.float64 else v.float() for v in (a, b))
    return (a * b).flatten(1).sum(1)


def lambda_star(R_complete: Tensor, R_target: Tensor) -> Tensor:
    """lambda* of Eq. 12 for each sample, [B]. It is 0 where R_target vanishes, in value and in gradient."""
    squared_norm = inner(R_target, R_target)
    usable = squared_norm > 0
    return torch.where(usable, inner(R_complete, R_target) / torch.where(usable, squared_norm, 1.0), 0.0)


def v_purecc(v_original: Tensor, lam: Tensor, v_target: Tensor) -> Tensor:
    """Eq. 13 (and Eq. 6): the original prediction plus lambda [B] times the target direction."""
    return v_original + expand(lam, v_target).to(v_target.dtype) * v_target


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between a and b of each sample, [B]; 0 where one of them vanishes."""
    return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt().clamp(min=1e-20)


class Terms(NamedTuple):
    """Everything that one step of stage 2 computes, for the loss, the log and the lessons."""
    v_pure: Tensor                               # [B, C, H, W]
    R_complete: Tensor                           # [B, C, H, W]
    R_target: Tensor                             # [B, C, H, W]
    lam: Tensor                                  # [B]
    loss: Tensor                                 # L_PureCC, a scalar


def purecc_terms(v_complete: Tensor, v_original: Tensor, R_target: Tensor, fixed_lambda: float | Tensor | None = None) -> Terms:
    """Eq. 10 to 14 in order, from the three predictions.

    Args:
        v_complete: v_theta2(x_t | y_complete), carries the gradient. v_original: Eq. 9; detached or not by the caller.
        R_target: Eq. 8, frozen.
        fixed_lambda: a constant, or one a sample [B], in place of lambda* (the paper's Table 3).
    lambda* is detached. That changes nothing: it minimises L_PureCC, so the gradient through it is zero (envelope theorem).
    """
    R_complete = representation(v_complete, v_original)                                          # Eq. 10
    if fixed_lambda is None:
        lam = lambda_star(R_complete, R_target).detach()                                         # Eq. 12
    else:
        lam = torch.as_tensor(fixed_lambda, dtype=torch.float32, device=R_target.device).expand(len(R_target))
    v_pure = v_purecc(v_original, lam, R_target)                                                 # Eq. 13
    return Terms(v_pure, R_complete, R_target, lam, squared_error(v_pure, v_complete))           # Eq. 14


def total_loss(loss_cc: Tensor, loss_purecc: Tensor, eta: float) -> Tensor:
    """L_PCC of Eq. 15."""
    return loss_cc + eta * loss_purecc

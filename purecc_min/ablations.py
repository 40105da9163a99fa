"""The paper's loss with one part replaced. objective.py itself is not changed.

    constant_lambda      a number in place of lambda* (Table 3)
    untouched_original   v_original from the base model (Sec. 14)
    not_detached         the gradient goes through v_original, too

Read next: benchmark/entries.py.
"""

import torch
from torch import Tensor

from purecc_min.branch import Thetas
from purecc_min.concept import Batch
from purecc_min.methods import Loss, LossOfStep, log_of, paper
from purecc_min.objective import pcc_loss
from tinyflow.pipeline import Text, Velocity


def constant_lambda(value: float) -> LossOfStep:
    """The paper's loss with a constant in place of lambda* (Table 3)."""
    def rule(R_complete: Tensor, R_target: Tensor) -> Tensor:
        return torch.full((len(R_target),), value, device=R_target.device)

    def loss(thetas: Thetas, batch: Batch, eta: float) -> Loss:
        loss, terms = pcc_loss(thetas.theta_1, thetas.theta, batch, eta, rule)
        return loss, log_of(terms)
    loss.__name__ = f"lambda {value:g}"          # checkpoints store this name
    return loss


def untouched_original(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """The paper's loss with v_original from the untouched base model, in Eq. 10 and in Eq. 13 (Sec. 14)."""
    theta = answered_by(thetas.theta_0, batch.texts.base, thetas.theta)
    return paper(thetas._replace(theta=theta), batch, eta)


def not_detached(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """The paper's loss with the gradient through v_original: enable_grad undoes pcc_loss's no_grad."""
    with_gradient = torch.enable_grad()(thetas.theta.__call__)
    theta = answered_by(with_gradient, batch.texts.base, thetas.theta)
    return paper(thetas._replace(theta=theta), batch, eta)


def answered_by(other: Velocity, text: Text, theta: Velocity) -> Velocity:
    """Returns a velocity that calls `other` if the text is this same object, and theta otherwise."""
    return lambda x_t, t, asked: (other if asked is text else theta)(x_t, t, asked)

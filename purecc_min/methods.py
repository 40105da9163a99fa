"""The methods: each is the loss of one step, and what it trains. No renderer or benchmark is needed.

    l_cc               the flow-matching loss alone (Eq. 3)
    paper              PureCC as the paper writes it (Eq. 8 to 15)
    anchored           L_CC, and the base text must predict what it predicted before (DOP)
    the ablations      the paper's loss with one part replaced: lambda, v_original, R(y_tar), or the detaching

A loss takes the models of a step, the batch and eta, the weight of what it adds to L_CC. It returns a number,
which is minimised, and what is logged beside it. METHODS says what each is used for by `learn`. To try an
idea, write one more loss and one more entry. Read next: train.py.
"""

from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from purecc_min.concept import Batch
from purecc_min.objective import Terms, cosine, inner, lambda_star, pcc_loss
from tinyflow.flow import expand, squared_error
from tinyflow.pipeline import Velocity, in_one_batch


class Thetas(NamedTuple):
    """The models of one step, each called as theta(x_t, t, text)."""
    theta_0: Velocity                            # the base model, untouched
    theta_1: Velocity | None                     # the frozen extractor, for the methods that have one
    theta: Velocity                              # the model in training: theta_2 (theta_1 in stage 1)


Loss = tuple[Tensor, dict[str, Tensor]]          # what is minimised, and what is logged beside it
LossOfStep = Callable[[Thetas, Batch, float], Loss]      # (thetas, batch, eta) -> Loss


def l_cc(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """L_CC alone (Eq. 3); eta is not used."""
    v_complete = thetas.theta(batch.x_t, batch.t, batch.texts.complete)
    return squared_error(v_complete, batch.v, batch.mask), {}


def paper(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """L_PCC, Eq. 8 to 15."""
    loss, terms = pcc_loss(thetas.theta_1, thetas.theta, batch, eta)
    return loss, log_of(terms)


def anchored(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """L_CC, and the base text must predict what it predicted before (differential output preservation)."""
    loss_cc, _ = l_cc(thetas, batch, eta)
    anchor = anchor_loss(thetas, batch)
    return loss_cc + eta * anchor, {"loss_cc": loss_cc, "loss_anchor": anchor}


def anchor_loss(thetas: Thetas, batch: Batch) -> Tensor:
    """How far the base text's prediction has moved from the base model's."""
    with torch.no_grad():
        v_before = thetas.theta_0(batch.x_t, batch.t, batch.texts.base)
    return squared_error(thetas.theta(batch.x_t, batch.t, batch.texts.base), v_before)


def log_of(terms: Terms) -> dict[str, Tensor]:
    """What is worth watching in a step of the paper's loss.

    "negative" is the share of samples with lambda < 0. "rejection" is the squared part of R_complete that is
    orthogonal to R_target: it is L_PureCC itself if lam is lambda*.
    """
    R_complete, R_target = terms.R_complete.detach(), terms.R_target
    along = inner(R_complete, R_target).square() / inner(R_target, R_target).clamp(min=1e-20)
    return {"loss_cc": terms.loss_cc, "loss_purecc": terms.loss_purecc,
            "rejection": (inner(R_complete, R_complete) - along).mean() / R_target[0].numel(),
            "lambda": terms.lam.mean(), "negative": (terms.lam < 0).float().mean(),
            "cosine": cosine(R_complete, R_target).mean(),
            "norm_R_complete": inner(R_complete, R_complete).sqrt().mean(),
            "norm_R_target": inner(R_target, R_target).sqrt().mean()}


# ----------------------------------------------------------------------------------- ablations of the paper's
def from_parts(v_original: Tensor, v_complete: Tensor, R_target: Tensor, batch: Batch, eta: float,
               lam: Tensor | None = None) -> Loss:
    """pcc_loss from Eq. 10 on, for ablations that bring some parts themselves; lam [B] for lambda*."""
    R_complete = v_complete - v_original
    if lam is None:
        lam = lambda_star(R_complete, R_target).detach()
    v_purecc = v_original + expand(lam, R_target) * R_target
    loss_purecc = squared_error(v_purecc, v_complete)
    loss_cc = squared_error(v_complete, batch.v, batch.mask)
    terms = Terms(v_original, v_complete, v_purecc, R_target, R_complete, lam, loss_cc, loss_purecc)
    return loss_cc + eta * loss_purecc, log_of(terms)


@torch.no_grad()
def target_direction(theta_1: Velocity, batch: Batch) -> Tensor:
    """R(y_tar) of Eq. 8, [B, C, H, W]."""
    v_tar, v_null = in_one_batch(theta_1, batch.x_t, batch.t, batch.texts.target, batch.texts.null)
    return v_tar - v_null


def predictions(thetas: Thetas, batch: Batch) -> tuple[Tensor, Tensor]:
    """v_original (Eq. 9), without a gradient, and v_complete."""
    with torch.no_grad():
        v_original = thetas.theta(batch.x_t, batch.t, batch.texts.base)
    return v_original, thetas.theta(batch.x_t, batch.t, batch.texts.complete)


def constant_lambda(value: float) -> LossOfStep:
    """The paper's loss with a constant in place of lambda* (Table 3)."""
    def loss(thetas: Thetas, batch: Batch, eta: float) -> Loss:
        R_target = target_direction(thetas.theta_1, batch)
        lam = torch.full((len(batch.t),), value, device=R_target.device)
        return from_parts(*predictions(thetas, batch), R_target, batch, eta, lam)
    loss.__name__ = f"lambda {value:g}"          # a checkpoint knows its loss by name
    return loss


def untouched_original(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """The paper's loss with v_original from the untouched base model, in Eq. 10 and in Eq. 13 (Sec. 14)."""
    R_target = target_direction(thetas.theta_1, batch)
    with torch.no_grad():
        v_original = thetas.theta_0(batch.x_t, batch.t, batch.texts.base)
    v_complete = thetas.theta(batch.x_t, batch.t, batch.texts.complete)
    return from_parts(v_original, v_complete, R_target, batch, eta)


def not_detached(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """The paper's loss with the gradient through v_original."""
    R_target, texts = target_direction(thetas.theta_1, batch), batch.texts
    v_complete, v_original = in_one_batch(thetas.theta, batch.x_t, batch.t, texts.complete, texts.base)
    return from_parts(v_original, v_complete, R_target, batch, eta)


def another_direction(direction: Callable[[Thetas, Batch], Tensor]) -> LossOfStep:
    """The paper's loss with direction(thetas, batch) [B, C, H, W] in place of R(y_tar)."""
    def loss(thetas: Thetas, batch: Batch, eta: float) -> Loss:
        R_target = direction(thetas, batch)
        return from_parts(*predictions(thetas, batch), R_target, batch, eta)
    loss.__name__ = direction.__name__
    return loss


# ---------------------------------------------------------------------------------------- what `learn` offers
@dataclass(frozen=True)
class Method:
    """A way to learn a concept."""
    about: str                                   # in words, for the help
    loss: LossOfStep                             # of the model that is kept
    where: str = "everywhere"                    # where its adapters act; or at [V]'s "token" alone (lora.py)
    adapters: bool = True                        # False: Y alone is trained
    extractor: bool = False                      # True: stage 1 makes the frozen theta_1 that the loss wants
    named_only: bool = False                     # True: pictures are drawn without it where a text has no [V]


METHODS = {
    "lora": Method("a plain LoRA: L_CC, with adapters everywhere and Y", l_cc),
    "switched-off": Method("a plain LoRA that is switched off for texts without [V]", l_cc, named_only=True),
    "paper": Method("PureCC as the paper writes it: an extractor, then L_PCC", paper, extractor=True),
    "anchor": Method("a LoRA whose base text must predict what it predicted before (DOP)", anchored),
    "embeddings": Method("Y alone; no weight of the model changes", l_cc, adapters=False),
    "bound": Method("L_CC, with adapters that act at [V] alone: texts without [V] cannot change", l_cc,
                    where="token"),
    "bound-paper": Method("the paper's objective, with such adapters in both stages", paper, where="token",
                          extractor=True),
}

"""The losses: what a step of each method minimises. No renderer or benchmark is needed.

    l_cc               the flow-matching loss alone (Eq. 3)
    paper              PureCC as the paper writes it (Eq. 8 to 15)
    anchored           L_CC, and the base text must predict what it predicted before (DOP)

A loss takes the models of a step, the batch and eta, the weight of what it adds to L_CC. It returns a number,
which is minimised, and what is logged with it. More losses are in pairs.py and ablations.py; registry.py
lists the methods that users have. Read next: learning.py.
"""

from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

from purecc_min.branch import Thetas
from purecc_min.concept import Batch
from purecc_min.objective import Terms, cosine, inner, pcc_loss
from tinyflow.flow import squared_error

Loss = tuple[Tensor, dict[str, Tensor]]          # what is minimised, and what is logged with it
LossOfStep = Callable[[Thetas, Batch, float], Loss]      # (thetas, batch, eta) -> Loss


@dataclass(frozen=True)
class Method:
    """A way to learn a concept."""
    name: str
    about: str                                   # in words, for the help
    loss: LossOfStep                             # of the model that is kept
    where: str = "everywhere"                    # where its adapters act (lora.py)
    embeddings: bool = True                      # whether Y^l takes [V]'s place (Eq. 7); or the word stays
    adapters: bool = True                        # whether they are trained; or Y alone
    extractor: "Method | None" = None            # what teaches the frozen theta_1, in stage 1
    imagines: bool = False                       # whether its loss wants scenes of two things (pairs.py)
    named_only: bool = False                     # whether the base model answers texts without [V]
    settings: dict = field(default_factory=dict) # for TrainConfig, on the tiny model

    @property
    def stages(self) -> int:
        """Of Algorithm 1: stage 2 follows a frozen extractor."""
        return 2 if self.extractor else 1


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

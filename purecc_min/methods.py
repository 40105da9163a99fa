"""The losses: what a step of each method minimises.

    l_cc               only the flow-matching loss (Eq. 3)
    paper              PureCC as the paper writes it (Eq. 8 to 15)
    anchored           L_CC, and the velocity for the base text must stay the base model's

A loss gets the models of a step, the batch, and eta, the weight of what it adds to L_CC. It returns a scalar
and a dict of values to log. More losses are in pairs.py and ablations.py; registry.py lists the methods that
users can choose. Read next: learning.py.
"""

from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

from purecc_min.branch import Thetas
from purecc_min.concept import Batch
from purecc_min.objective import Terms, inner, pcc_loss
from tinyflow.flow import squared_error

Loss = tuple[Tensor, dict[str, Tensor]]          # what is minimised, and values to log
LossOfStep = Callable[[Thetas, Batch, float], Loss]      # (thetas, batch, eta) -> Loss


@dataclass(frozen=True)
class Method:
    """A way to learn a concept."""
    name: str
    about: str                                   # in words, for the help
    loss: LossOfStep                             # of the last stage
    where: str = "everywhere"                    # where its adapters act (lora.py)
    embeddings: bool = True                      # True: Y^l replaces the token at [V] (Eq. 7)
    adapters: bool = True                        # False: only Y is trained
    extractor: "Method | None" = None            # the method that trains theta_1; None: one stage
    imagines: bool = False                       # True: the loss needs imagined scenes (pairs.py)
    named_only: bool = False                     # True: texts without [V] use the base model
    settings: dict = field(default_factory=dict) # TrainConfig values for the tiny model

    @property
    def stages(self) -> int:
        """The number of stages: 2 with an extractor, else 1."""
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
    """L_CC, and the velocity for the base text must stay: differential output preservation (DOP)."""
    loss_cc, _ = l_cc(thetas, batch, eta)
    anchor = anchor_loss(thetas, batch)
    return loss_cc + eta * anchor, {"loss_cc": loss_cc, "loss_anchor": anchor}


def anchor_loss(thetas: Thetas, batch: Batch) -> Tensor:
    """The mean squared difference between theta's and theta_0's velocity for the base text."""
    with torch.no_grad():
        v_before = thetas.theta_0(batch.x_t, batch.t, batch.texts.base)
    return squared_error(thetas.theta(batch.x_t, batch.t, batch.texts.base), v_before)


def log_of(terms: Terms) -> dict[str, Tensor]:
    """Returns the values to log for one step of the paper's loss.

    negative: the share of samples with lambda < 0. rejection: the mean square of R_complete's part that is
    orthogonal to R_target. It equals L_PureCC if lam is lambda*.
    """
    R_complete, R_target = terms.R_complete.detach(), terms.R_target
    along = inner(R_complete, R_target).square() / inner(R_target, R_target).clamp(min=1e-20)
    return {"loss_cc": terms.loss_cc, "loss_purecc": terms.loss_purecc,
            "rejection": (inner(R_complete, R_complete) - along).mean() / R_target[0].numel(),
            "lambda": terms.lam.mean(), "negative": (terms.lam < 0).float().mean(),
            "cosine": cosine(R_complete, R_target).mean(),
            "norm_R_complete": inner(R_complete, R_complete).sqrt().mean(),
            "norm_R_target": inner(R_target, R_target).sqrt().mean()}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between a and b of each sample, [B]; 0 if one of them is 0."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))

"""The methods that users can choose. learn, the demo, the benchmark and the help read this table.

An entry has the loss (methods.py, pairs.py), the place where its adapters act (lora.py), whether Y^l takes
[V]'s place, the method of its extractor, the model that computes texts without [V], and settings for the tiny
model: the best ones on the concepts that the benchmark uses for tuning. `as_sampled` returns the velocity
functions with which all pictures of a method are made. Read next: commands/learn.py.
"""

import torch
from torch import Tensor

from purecc_min.methods import Method, anchored, l_cc, paper
from purecc_min.pairs import half_kept, pairs
from tinyflow.pipeline import Text, Velocity

LORA = Method("lora", "a plain LoRA: adapters in every joint attention, and embeddings of [V]", l_cc,
              settings=dict(learning_rate=1e-3))
BOUND = Method("bound", "adapters that act only on [V]'s phrase: pictures without [V] cannot change", l_cc,
               where="phrase", embeddings=False, settings=dict(learning_rate=2e-3, rank=16))
METHODS = {method.name: method for method in (
    LORA,
    Method("switched-off", "a plain LoRA that is switched off for texts without [V]", l_cc, named_only=True,
           settings=dict(learning_rate=1e-3, rank=16)),
    Method("paper", "PureCC as the paper writes it: an extractor, then L_PCC", paper, extractor=LORA,
           settings=dict(learning_rate=1e-3, extractor_learning_rate=2e-3)),
    Method("anchor", "a LoRA that must keep the base model's velocity for the base text (DOP)", anchored,
           settings=dict(learning_rate=4e-3, eta=1.0)),
    Method("embeddings", "only the embeddings of [V], and no adapters", l_cc, adapters=False,
           settings=dict(embedding_learning_rate=2.0)),
    BOUND,
    Method("bound-paper", "the paper's objective, with adapters that act on [V]'s phrase", paper,
           where="phrase", embeddings=False, extractor=BOUND, settings=dict(learning_rate=4e-3, rank=16)),
    Method("bound-half", "like bound; in imagined scenes of two things the half without [V] must stay",
           half_kept, where="phrase", embeddings=False, imagines=True,
           settings=dict(learning_rate=2e-3, rank=16)),
    Method("bound-pairs", "like bound; in imagined scenes [V]'s half must follow a LoRA, the other stay",
           pairs, where="phrase", embeddings=False, extractor=LORA, imagines=True,
           settings=dict(learning_rate=1e-2, extractor_learning_rate=2e-3)),
)}


def as_sampled(method: Method, theta: Velocity, theta_0: Velocity) -> dict[str, Velocity]:
    """Returns the arguments theta and theta_null of Pipeline.sample for a method.

    theta_null is always the base model, because the empty text has no [V].
    """
    return {"theta": only_with_token(theta, theta_0) if method.named_only else theta, "theta_null": theta_0}


def only_with_token(theta: Velocity, theta_0: Velocity) -> Velocity:
    """Returns a velocity: theta for rows with a placeholder, theta_0 for all other rows."""
    def velocity(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        has_placeholder = (text.slots > 0).any(1)                                       # [B]
        v = torch.empty_like(x_t)
        for model, rows in ((theta, has_placeholder), (theta_0, ~has_placeholder)):
            if rows.any():
                v[rows] = model(x_t[rows], t[rows], text[rows])
        return v
    return velocity


def is_held(method: Method) -> bool:
    """Whether a text without [V] has exactly the base model's velocity."""
    return method.named_only or not method.adapters or method.where in ("phrase", "token")

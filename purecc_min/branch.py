"""A branch, v_theta: the base model with one set of adapters and concept embeddings.

theta_1 and theta_2 are branches, and are called like the paper's velocity: theta(x_t, t, text).
`velocity_with` is the one place at which [V] enters the model. A branch without embeddings leaves the word at
[V] as it is: then the concept is its adapters alone. Several concepts can stand in one text, each with a name
of its own. A learned concept is a branch in one small safetensors file (concept_file.py reads it). Read next:
objective.py.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from purecc_min.embeddings import ConceptEmbeddings
from purecc_min.lora import LoRA
from tinyflow.pipeline import Pipeline, Text, Velocity
from tinyflow.weights import save_tensors


class Branch(nn.Module):
    """theta(x_t, t, text) -> v. Its parameters are the adapters and Y; the base model in `pipe` is shared."""
    pipe: Pipeline

    def __init__(self, pipe: Pipeline, lora: LoRA, embeddings: ConceptEmbeddings | None):
        super().__init__()
        self.lora, self.embeddings = lora, embeddings
        self.__dict__["pipe"] = pipe             # unregistered: its weights are not this module's own

    @classmethod
    def fresh(cls, pipe: Pipeline, Y: Tensor | None, rank: int, generator: torch.Generator | None = None,
              where: str = "everywhere") -> "Branch":
        """New adapters, which change nothing yet, and a copy of Y [L, D], or none. where: see lora.py."""
        embeddings = None if Y is None else ConceptEmbeddings(Y)
        return cls(pipe, LoRA(pipe.mmdit, rank, generator, where), embeddings)

    def forward(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """v_theta(x_t | text), [B, C, H, W]."""
        return velocity_with([self], x_t, t, text)

    def save(self, path: str | Path, facts: dict) -> None:
        """`facts` is what the file says about itself: at least "rank" and "class_word"."""
        save_tensors(path, "concept", self.state_dict(), {**facts, "where": self.lora.where})


class Thetas(NamedTuple):
    """The models of one step."""
    theta_0: Velocity                            # the base model, untouched
    theta_1: Branch | None                       # the frozen extractor, for the methods that have one
    theta: Branch                                # the branch in training: theta_2 (theta_1 in stage 1)


def velocity_with(branches: list[Branch], x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """v(x_t | text) [B, C, H, W] of the base model with several concepts, the n-th at the n-th placeholder.

    A bound set of adapters acts for its own concept only. Those that act everywhere add up.
    """
    def visit(l: int, block: nn.Module, x: Tensor, c: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
        with contextlib.ExitStack() as stack:
            for n, branch in enumerate(branches, start=1):
                if branch.embeddings is not None:
                    c = branch.embeddings(l, c, text.slots == n)                        # Eq. 7
                stack.enter_context(branch.lora.attached(l, block, branch.lora.places(text, n)))
            return block(x, c, vec)
    return branches[0].pipe.velocity(x_t, t, text, visit)


def only_with_token(theta: Velocity, theta_0: Velocity) -> Velocity:
    """theta for texts that name a concept, theta_0 for all others; each computes its own rows alone."""
    def velocity(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        named = (text.slots > 0).any(1)                                                 # [B]
        v = torch.empty_like(x_t)
        for follow, rows in ((theta, named), (theta_0, ~named)):
            if rows.any():
                v[rows] = follow(x_t[rows], t[rows], text[rows])
        return v
    return velocity

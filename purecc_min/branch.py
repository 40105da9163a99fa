"""A branch, v_theta: the base model with one set of adapters and concept embeddings.

theta_1 (the frozen extractor) and theta_2 (the model in training) are branches, called like the paper's
velocity: theta(x_t, t, text). Only `velocity_with` gives adapters and Y to the MMDiT. Without embeddings the
class word's state stays at [V]; then only adapters hold the concept. One text can have several concepts, each
with its own placeholder. A learned concept is a branch in one small file (concept_file.py reads it).
Read next: objective.py.
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
        self.__dict__["pipe"] = pipe             # no submodule: state_dict() does not hold the base model

    @classmethod
    def fresh(cls, pipe: Pipeline, Y: Tensor | None, rank: int, generator: torch.Generator | None = None,
              where: str = "everywhere") -> "Branch":
        """A branch with new adapters (B = 0), and a copy of Y [L, D] or none. where: see lora.py."""
        embeddings = None if Y is None else ConceptEmbeddings(Y)
        return cls(pipe, LoRA(pipe.mmdit, rank, generator, where), embeddings)

    def forward(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """v_theta(x_t | text), [B, C, H, W]."""
        return velocity_with([self], x_t, t, text)

    def save(self, path: str | Path, facts: dict) -> None:
        """facts: the file's metadata, with at least "rank" and "class_word"."""
        save_tensors(path, "concept", self.state_dict(), {**facts, "where": self.lora.where})


class Thetas(NamedTuple):
    """The models that a loss may call."""
    theta_0: Velocity                            # the base model
    theta_1: Branch | None                       # the frozen extractor, in stage 2
    theta: Branch                                # in training: theta_1 in stage 1, theta_2 in stage 2


def velocity_with(branches: list[Branch], x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """v(x_t | text) [B, C, H, W] of the base model with several concepts; placeholder n is branches[n - 1].

    Adapters everywhere act at all tokens, others at their own phrase or placeholder. Changes add up.
    """
    def visit(l: int, block: nn.Module, x: Tensor, c: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
        with contextlib.ExitStack() as stack:
            for n, branch in enumerate(branches, start=1):
                if branch.embeddings is not None:
                    c = branch.embeddings(l, c, text.slots == n)                        # Eq. 7
                stack.enter_context(branch.lora.attached(l, block, branch.lora.places(text, n)))
            return block(x, c, vec)
    return branches[0].pipe.velocity(x_t, t, text, visit)

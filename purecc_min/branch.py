"""A branch, v_theta: the base model with one set of adapters and concept embeddings.

theta_1 and theta_2 are branches, and are called like the paper's velocity: theta(x_t, t, text).
`velocity_with` is the one place at which [V] enters the model. A branch without embeddings leaves the word at
[V] as it is: then the concept is its adapters alone. A learned concept is a branch in one small safetensors
file, which also says the token, the class word, the settings, the seed and the versions that made it. Several
concepts can stand in one text, each with a name of its own. Read next: objective.py.
"""

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

from purecc_min.embeddings import ConceptEmbeddings
from purecc_min.lora import TARGETS, LoRA
from tinyflow.errors import InputError, shown
from tinyflow.mmdit import Block
from tinyflow.pipeline import Pipeline, Text, Velocity
from tinyflow.weights import load_into, load_tensors, sample_of, save_tensors


class Branch(nn.Module):
    """theta(x_t, t, text) -> v. Its parameters are the adapters and Y; the base model in `pipe` is shared."""

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

    @classmethod
    def load(cls, pipe: Pipeline, path: str | Path) -> tuple["Branch", dict]:
        """The branch, frozen, and its facts.

        Raises: InputError for a file that is missing, foreign, damaged, or of another base model's size.
        """
        tensors, facts = load_concept_file(path)
        depth, width = pipe.mmdit.config.depth, pipe.mmdit.config.width
        Y = torch.zeros(depth, width) if "embeddings.Y" in tensors else None
        branch = cls.fresh(pipe, Y, facts["rank"], where=facts["where"])
        load_into(branch, tensors, path)
        check_base(path, facts, pipe)
        return branch.to(pipe.device).requires_grad_(False), facts


def load_concept_file(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of a concept's file.

    Raises: InputError for a file that is missing, foreign or damaged, or that does not say what it must.
    """
    tensors, facts = load_tensors(path, "concept")
    facts = {"where": "everywhere", "base": "tiny", "size": 64, "method": ""} | facts    # of older versions
    for name, kind in {"rank": int, "class_word": str, "base": str, "size": int, "method": str}.items():
        if type(facts.get(name)) is not kind:
            raise InputError(f"{path}: a concept that does not say its {name}; learn it again")
    if facts["where"] not in list(TARGETS):
        raise InputError(f"{path}: its adapters act in {shown(facts['where'])}, which this version does not "
                         "know; learn it again")
    return tensors, facts


def check_base(path: str | Path, facts: dict, pipe: Pipeline) -> None:
    """Raises: InputError if a concept was learned on other weights, which fit by their shapes alone."""
    own = torch.tensor(sample_of(pipe.mmdit))
    learned_on = torch.tensor(facts.get("base_sample", own.tolist()))
    if learned_on.shape != own.shape or (learned_on - own).norm() > 0.05 * own.norm():
        raise InputError(f"{path}: learned on other weights than these; use the base model that it was "
                         "learned on")


def velocity_with(branches: list[Branch], x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """v(x_t | text) [B, C, H, W] of the base model with several concepts, the n-th at the n-th placeholder.

    A bound set of adapters acts for its own concept only. Those that act everywhere add up.
    """
    def visit(l: int, block: Block, x: Tensor, c: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
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

"""A branch: v_theta, the base model with one set of adapters and concept embeddings. theta_1 and theta_2
are branches.

A branch is called like the paper's velocity: theta(x_t, t, text). Its `forward` is the one place at which
[V] enters the model. A learned concept is a branch in one small safetensors file: adapters, embeddings, and
beside them the token, the class word, the settings, the seed and the versions that made it. Read next:
objective.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from purecc_min.embeddings import ConceptEmbeddings
from purecc_min.lora import LoRA
from tinyflow.mmdit import Block
from tinyflow.pipeline import Pipeline, Text
from tinyflow.weights import load_into, load_tensors, save_tensors


class Branch(nn.Module):
    """theta(x_t, t, text) -> v. Its parameters are the adapters and Y; the base model in `pipe` is shared."""

    def __init__(self, pipe: Pipeline, lora: LoRA, embeddings: ConceptEmbeddings):
        super().__init__()
        self.lora, self.embeddings = lora, embeddings
        self.__dict__["pipe"] = pipe             # unregistered: its weights are not this module's own

    @classmethod
    def fresh(cls, pipe: Pipeline, Y: Tensor, rank: int,
              generator: torch.Generator | None = None) -> "Branch":
        """New adapters, which change nothing yet, and a copy of Y [L, D]."""
        return cls(pipe, LoRA(pipe.mmdit, rank, generator), ConceptEmbeddings(Y))

    def forward(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """v_theta(x_t | text), [B, C, H, W]."""
        def visit(l: int, block: Block, x: Tensor, c: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
            c = self.embeddings(l, c, text.slots)                                       # Eq. 7
            with self.lora.attached(l, block):
                return block(x, c, vec)
        return self.pipe.velocity(x_t, t, text, visit)

    def save(self, path: str | Path, facts: dict) -> None:
        """`facts` is what the file says about itself: at least "rank" and "class_word"."""
        save_tensors(path, "concept", self.state_dict(), facts)

    @classmethod
    def load(cls, pipe: Pipeline, path: str | Path) -> tuple["Branch", dict]:
        """The branch, frozen, and its facts.

        Raises: InputError for a file that is missing, foreign, damaged, or of another base model's size.
        """
        tensors, facts = load_tensors(path, "concept")
        config = pipe.mmdit.config
        branch = cls.fresh(pipe, torch.zeros(config.depth, config.width), facts["rank"])
        load_into(branch, tensors, path)
        return branch.to(pipe.device).requires_grad_(False), facts

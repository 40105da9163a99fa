"""A branch: one set of adapters and concept embeddings over the shared base. theta1 and theta2 are two of these.

A learned concept is theta2 in one small safetensors file: adapters, embeddings, and in the metadata the token, the class word, the
configuration, the seed and the versions that made it. Read next: concept.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from purecc_min.embeddings import ConceptEmbeddings
from purecc_min.lora import LoRA
from tinyflow.pipeline import Pipeline, Text
from tinyflow.weights import load_into, load_tensors, save_tensors

TOKEN = "[V]"                                    # the new concept's name in every text


class Branch(nn.Module):
    def __init__(self, lora: LoRA, embeddings: ConceptEmbeddings):
        super().__init__()
        self.lora, self.embeddings = lora, embeddings

    @classmethod
    def fresh(cls, pipe: Pipeline, Y: Tensor, rank: int, generator: torch.Generator | None = None) -> "Branch":
        """New adapters, which change nothing yet, and a copy of Y [L, D]."""
        return cls(LoRA(pipe.mmdit, rank, generator), ConceptEmbeddings(Y))

    def attached(self, pipe: Pipeline):
        """The context within which `pipe` computes with this branch's weights."""
        return self.lora.attached(pipe.mmdit)

    def velocity(self, pipe: Pipeline, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """v_theta(x_t | text) with this branch's theta."""
        with self.attached(pipe):
            return pipe.velocity(x_t, t, text, fill=self.embeddings)

    def sample(self, pipe: Pipeline, text: Text, seeds: list[int], **options) -> Tensor:
        with self.attached(pipe):
            return pipe.sample(text, seeds, fill=self.embeddings, **options)

    def save(self, path: str | Path, facts: dict) -> None:
        """`facts` holds class_word, rank, config, seed, versions."""
        save_tensors(path, "concept", self.state_dict(), facts)

    @classmethod
    def load(cls, pipe: Pipeline, path: str | Path) -> tuple["Branch", dict]:
        """Returns the branch and its facts. Raises InputError for a file that is missing, foreign, damaged or made for another base."""
        tensors, facts = load_tensors(path, "concept")
        config = pipe.mmdit.config
        branch = cls.fresh(pipe, torch.zeros(config.depth, config.width), facts["rank"])
        load_into(branch, tensors, path)
        return branch.to(pipe.device).requires_grad_(False), facts

"""Reads a learned concept's file: checks its metadata, and returns its branch.

The file has a branch's tensors and facts: the token, the class word, the base model and a few of its weights,
the method, the settings, the seed and the versions that made it (learning.py, `concept_facts`).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from purecc_min.branch import Branch
from purecc_min.lora import TARGETS
from tinyflow.checkpoints import is_number
from tinyflow.errors import InputError, shown
from tinyflow.pipeline import Pipeline
from tinyflow.weights import load_into, load_tensors


def load_branch(pipe: Pipeline, path: str | Path) -> tuple[Branch, dict]:
    """A concept's branch, frozen, and its facts.

    Raises: InputError for an unreadable file, or one that was learned on another base model.
    """
    tensors, facts = read_concept(path)
    depth, width = pipe.mmdit.config.depth, pipe.mmdit.config.width
    Y = torch.zeros(depth, width) if "embeddings.Y" in tensors else None
    branch = Branch.fresh(pipe, Y, facts["rank"], where=facts["where"])
    check_base(path, facts, pipe)
    load_into(branch, tensors, path)
    return branch.to(pipe.device).requires_grad_(False), facts


def read_concept(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of a concept's file.

    Raises: InputError for a file that is missing, damaged or of another kind, or has incomplete metadata.
    """
    tensors, facts = load_tensors(path, "concept")
    # files of older versions lack some facts
    facts = {"where": "everywhere", "base": "tiny", "size": 64, "method": ""} | facts
    for name, kind in {"rank": int, "class_word": str, "base": str, "size": int, "method": str}.items():
        if type(facts.get(name)) is not kind or (kind is int and facts[name] < 1):
            raise InputError(f"{path}: the concept's {name} is missing or wrong; learn it again")
    sample = facts.get("base_sample", [0])       # older files do not have it
    if not isinstance(sample, list) or not sample or not all(map(is_number, sample)):
        raise InputError(f"{path}: the concept's base_sample is missing or wrong; learn it again")
    if facts["where"] not in list(TARGETS):      # a list, because the value may not be hashable
        raise InputError(f"{path}: where its adapters act, {shown(facts['where'])}, is unknown to this "
                         "version; learn it again")
    return tensors, facts


def check_base(path: str | Path, facts: dict, pipe: Pipeline) -> None:
    """Raises: InputError if the concept was learned on other weights, or only one of the two with T5."""
    own = torch.tensor(sample_of(pipe.mmdit))
    learned_on = torch.tensor(facts.get("base_sample", own.tolist()))
    if learned_on.shape != own.shape or not (learned_on - own).norm() <= 0.05 * own.norm():  # 5 %: dtypes
        raise InputError(f"{path}: the concept was learned on other weights than these; use the base model "
                         "that it was learned on")
    if facts.get("t5", has_t5(pipe)) != has_t5(pipe):
        raise InputError(f"{path}: the concept was learned {'with' if facts['t5'] else 'without'} T5; load "
                         "the base model in the same way")


def has_t5(pipe: Pipeline) -> bool:
    """Whether the text encoder includes T5. Stable Diffusion 3 can be loaded without T5."""
    return getattr(pipe.encoder, "t5", None) is not None


def sample_of(module: nn.Module, count: int = 32) -> list[float]:
    """Up to `count` values of a module, which identify its weights in any dtype."""
    matrices = [parameter for _, parameter in sorted(module.named_parameters()) if parameter.dim() > 1]
    chosen = matrices[::max(1, len(matrices) // count)][:count]
    return [matrix.detach().flatten()[matrix.numel() // 2].item() for matrix in chosen]

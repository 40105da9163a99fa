"""Algorithm 1: stage 1 teaches the representation extractor theta_1, stage 2 teaches theta_2 purely.

Stage 1 (lines 1-7) trains adapters and concept embeddings on the flow-matching loss of the references (Eq.
3, 7). The result is frozen: theta_1. Stage 2 (lines 8-18) starts theta_2 from fresh adapters and a copy of
theta_1's embeddings, and trains it on a method's loss: the paper's L_PCC (Eq. 15), or another of
methods.py. Read next: measure/measures.py.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import torch

from purecc_min.branch import Branch
from purecc_min.concept import TOKEN, ConceptSet, EncodedConcept, encode
from purecc_min.embeddings import class_word_states
from purecc_min.methods import Method, Thetas, l_cc, paper
from purecc_min.train import TrainConfig, generator_for, train_resumably
from tinyflow.pipeline import Pipeline
from tinyflow.weights import tensor_hash, text_hash

Training = tuple[Branch, Iterator[dict]]         # what is trained, and the loop that trains it


def stage_1(pipe: Pipeline, data: EncodedConcept, config: TrainConfig, folder: Path) -> Training:
    """The extractor to be, and the loop that trains it. When it is done, freeze it: requires_grad_(False)."""
    generator = generator_for(config.seed, 1, step=-1)
    Y = class_word_states(pipe, data, generator)
    theta_1 = Branch.fresh(pipe, Y, config.rank, generator)
    thetas = Thetas(pipe.velocity, None, theta_1)
    origin = text_hash(data.fingerprint() + tensor_hash(pipe.mmdit.state_dict()))
    return theta_1, train_resumably(l_cc, thetas, data, config, 1, folder / "stage1.safetensors", origin)


def stage_2(pipe: Pipeline, theta_1: Branch, data: EncodedConcept, config: TrainConfig, folder: Path,
            method: Method = paper, name: str = "stage2") -> Training:
    """theta_2, from fresh adapters and a copy of theta_1's Y, and its loop. name: of the checkpoint."""
    generator = generator_for(config.seed, 2, step=-1)
    theta_2 = Branch.fresh(pipe, theta_1.embeddings.Y.detach(), config.rank, generator)
    thetas = Thetas(pipe.velocity, theta_1, theta_2)
    origin = text_hash(data.fingerprint() + tensor_hash(theta_1.state_dict()))
    return theta_2, train_resumably(method, thetas, data, config, 2, folder / f"{name}.safetensors", origin)


def learn(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path, method: Method = paper,
          base_model: str = "tiny") -> Iterator[tuple[int, dict]]:
    """Algorithm 1, whole: yields (stage, row of the log) and leaves folder/concept.safetensors.

    Raises: RuntimeError if the base model was written to, which its hash would show.
    """
    data, before = encode(pipe, concept), tensor_hash(pipe.mmdit.state_dict())
    theta_1, rows = stage_1(pipe, data, config, folder)
    yield from ((1, row) for row in rows)
    theta_2, rows = stage_2(pipe, theta_1.requires_grad_(False), data, config, folder, method)
    yield from ((2, row) for row in rows)
    if tensor_hash(pipe.mmdit.state_dict()) != before:
        raise RuntimeError("the base model changed during training")
    facts = concept_facts(concept.class_word, config, base_model, pipe.picture_size)
    theta_2.save(folder / "concept.safetensors", facts)


def concept_facts(class_word: str, config: TrainConfig, base_model: str, size: int) -> dict:
    """What a concept's file says about itself. size: pixels a side of the pictures it was learned on."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__.split("+")[0]}
    return {"token": TOKEN, "class_word": class_word, "rank": config.rank, "base": base_model, "size": size,
            "seed": config.seed, "config": asdict(config), "versions": versions}

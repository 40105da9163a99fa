"""Algorithm 1: stage 1 teaches the representation extractor theta_1, stage 2 teaches theta_2 purely.

Stage 1 (lines 1-7) trains adapters and concept embeddings on the flow-matching loss of the references (Eq. 3,
7). The result is frozen: theta_1. Stage 2 (lines 8-18) starts theta_2 from fresh adapters and a copy of
theta_1's embeddings, and trains it on the paper's L_PCC (Eq. 15). A method without an extractor is one stage
with its own loss. Read next: registry.py, which lists the methods.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterator

import torch

from purecc_min.branch import Branch
from purecc_min.concept import TOKEN, ConceptSet, EncodedConcept, encode
from purecc_min.embeddings import class_word_states
from purecc_min.methods import Method, Thetas
from purecc_min.train import TrainConfig, generator_for, train_resumably
from tinyflow.pipeline import Pipeline
from tinyflow.weights import sample_of, tensor_hash, text_hash

Training = tuple[Branch, Iterator[dict]]         # what is trained, and the loop that trains it


def stage_1(pipe: Pipeline, data: EncodedConcept, config: TrainConfig, folder: Path, method: Method,
            name: str = "stage1") -> Training:
    """The extractor, or all of a method without one: a branch that starts from the class word, and its loop.

    Nothing is trained before the loop is iterated over. Freeze an extractor when it is done.

    Args:
        name: of the checkpoint.
    """
    generator = generator_for(config.seed, 1, step=-1)
    Y = class_word_states(pipe, data, generator) if method.embeddings else None
    theta = Branch.fresh(pipe, Y, config.rank, generator, method.where)
    theta.lora.requires_grad_(method.adapters)
    origin = text_hash(data.fingerprint() + tensor_hash(pipe.mmdit.state_dict()))
    thetas, checkpoint = Thetas(pipe.velocity, None, theta), folder / f"{name}.safetensors"
    return theta, train_resumably(method.loss, thetas, data, config, 1, checkpoint, origin)


def stage_2(pipe: Pipeline, theta_1: Branch, data: EncodedConcept, config: TrainConfig, folder: Path,
            method: Method, name: str = "stage2") -> Training:
    """theta_2, from fresh adapters and a copy of theta_1's Y, and its loop. name: of the checkpoint."""
    generator = generator_for(config.seed, 2, step=-1)
    Y = theta_1.embeddings.Y.detach() if method.embeddings else None
    theta_2 = Branch.fresh(pipe, Y, config.rank, generator, method.where)
    origin = text_hash(data.fingerprint() + tensor_hash(theta_1.state_dict()))
    thetas, checkpoint = Thetas(pipe.velocity, theta_1, theta_2), folder / f"{name}.safetensors"
    return theta_2, train_resumably(method.loss, thetas, data, config, 2, checkpoint, origin)


def learn(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path, method: Method,
          base_model: str = "tiny",
          imagined: EncodedConcept | None = None) -> Iterator[tuple[int, Branch, dict]]:
    """Yields (stage, what it trains, row of the log) and leaves folder/concept.safetensors.

    Args:
        imagined: scenes of two things, for a method that wants them (pairs.py).
    Raises: RuntimeError if the base model was written to, which its hash would show.
    """
    data, before = encode(pipe, concept), tensor_hash(pipe.mmdit.state_dict())
    if method.extractor is None:
        theta, rows = stage_1(pipe, data._replace(imagined=imagined), config, folder, method)
        yield from ((1, theta, row) for row in rows)
    else:
        first = replace(config, learning_rate=config.extractor_learning_rate or config.learning_rate)
        theta_1, rows = stage_1(pipe, data, first, folder, method.extractor)
        yield from ((1, theta_1, row) for row in rows)
        theta_1.requires_grad_(False)
        theta, rows = stage_2(pipe, theta_1, data._replace(imagined=imagined), config, folder, method)
        yield from ((2, theta, row) for row in rows)
    if tensor_hash(pipe.mmdit.state_dict()) != before:
        raise RuntimeError("the base model changed during training")
    facts = concept_facts(pipe, concept.class_word, config, method.name, base_model)
    theta.save(folder / "concept.safetensors", facts)


def concept_facts(pipe: Pipeline, class_word: str, config: TrainConfig, method: str, base_model: str) -> dict:
    """What a concept's file says about itself, and by what the base model's weights are recognised."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__.split("+")[0]}
    return {"token": TOKEN, "class_word": class_word, "method": method, "rank": config.rank,
            "size": pipe.picture_size, "base": base_model, "base_sample": sample_of(pipe.mmdit),
            "seed": config.seed, "config": asdict(config), "versions": versions}

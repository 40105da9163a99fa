"""What `learn`, the demo and the benchmark make of Algorithm 1: any method, resumed runs, a concept's facts.

A stage starts from fresh adapters and from Y: the class word's states in stage 1, a copy of theta_1's Y in
stage 2. A method without an extractor is one stage with its own loss. Read next: registry.py.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterator

import torch

from purecc_min.branch import Branch, Thetas
from purecc_min.concept import TOKEN, ConceptSet, EncodedConcept, Texts, encode
from purecc_min.concept_file import has_t5, sample_of
from purecc_min.embeddings import class_word_states
from purecc_min.methods import LossOfStep, Method
from purecc_min.train import SCALE, TrainConfig, draw_batch, generator_for, optimizer_for, update
from tinyflow.checkpoints import read_log, resume, save_checkpoint
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.pipeline import Pipeline
from tinyflow.weights import tensor_hash, text_hash

SAVE_EVERY = 25                                  # steps between checkpoints


def begin(pipe: Pipeline, data: EncodedConcept, config: TrainConfig, method: Method,
          theta_1: Branch | None = None) -> Branch:
    """What a stage trains, before its first step; theta_1: the frozen extractor, in stage 2."""
    generator, Y = generator_for(config.seed, 1 if theta_1 is None else 2, step=-1), None
    if method.embeddings:
        known = theta_1 and theta_1.embeddings
        Y = known.Y if known else class_word_states(pipe, data, generator)
    theta = Branch.fresh(pipe, Y, config.rank, generator, method.where)
    theta.lora.requires_grad_(method.adapters)
    return theta


def stage(pipe: Pipeline, data: EncodedConcept, config: TrainConfig, folder: Path, method: Method,
          theta_1: Branch | None = None, name: str = "") -> tuple[Branch, Iterator[dict]]:
    """What a stage trains, and the loop that trains it, which begins when it is iterated over.

    theta_1: the frozen extractor, in stage 2. name: stands before the names of its files.
    """
    number, theta = 1 if theta_1 is None else 2, begin(pipe, data, config, method, theta_1)
    origin = text_hash(fingerprint(data) + tensor_hash((theta_1 or pipe.mmdit).state_dict()))
    return theta, train_resumably(method.loss, Thetas(pipe.velocity, theta_1, theta), data, config, number,
                                  folder / f"{name}stage{number}.safetensors", origin)


def train_steps(loss_of_step: LossOfStep, thetas: Thetas, data: EncodedConcept, config: TrainConfig,
                stage: int, optimizer: torch.optim.Optimizer, first: int = 0) -> Iterator[dict]:
    """Trains thetas.theta from step `first` on; yields {"step", "loss", what the loss logs} a step.

    Args:
        stage: 1 or 2 of Algorithm 1; each has draws of its own.
    Raises: InputError for a loss, or gradients, that are not finite.
    """
    scale = SCALE
    for step in range(first, config.steps):
        batch = draw_batch(data, config, stage, step, thetas.theta.pipe.shift)
        loss, log = loss_of_step(thetas, batch, config.eta)
        if loss.isfinite() and not update(thetas.theta, optimizer, loss, scale):
            scale, log = scale / 2, {**log, "skipped": torch.ones(())}       # too large a gradient for fp16
        if not loss.isfinite() or scale < 1 and "skipped" in log:
            raise InputError(f"the loss or its gradients are not finite at step {step + 1} of stage {stage}; "
                             "try a lower learning rate")
        yield {"step": step + 1, "loss": loss.item(), **{name: value.item() for name, value in log.items()}}


def train_resumably(loss_of_step: LossOfStep, thetas: Thetas, data: EncodedConcept, config: TrainConfig,
                    stage: int, checkpoint: Path, origin: str) -> Iterator[dict]:
    """`train_steps` that goes on from `checkpoint` if that file exists, and leaves a .jsonl log beside it.

    Args:
        origin: a fingerprint of all that this stage starts from. A checkpoint of another origin is refused.
    Raises: InputError for another run's checkpoint, and for a loss that is not finite (the checkpoint stays).
    """
    theta, log_file = thetas.theta, checkpoint.with_suffix(".jsonl")
    optimizer = optimizer_for(theta, config)
    facts = {"config": asdict(config), "stage": stage, "loss": loss_of_step.__name__, "origin": origin}
    first = resume(checkpoint, theta, optimizer, facts) if checkpoint.exists() else 0
    log = [row for row in read_log(log_file) if row["step"] <= first]
    try:
        for row in train_steps(loss_of_step, thetas, data, config, stage, optimizer, first):
            log.append(row)
            if row["step"] % SAVE_EVERY == 0 or row["step"] == config.steps:
                write_whole(log_file, "".join(json.dumps(row) + "\n" for row in log).encode())
                save_checkpoint(checkpoint, theta, optimizer, facts, row["step"])
            yield row
    except InputError as error:
        kept = f"; {checkpoint} holds the last good state" if checkpoint.exists() else ""
        raise InputError(f"{error}{kept}") from None


def fingerprint(data: EncodedConcept) -> str:
    """A SHA-256 over pictures, texts and their order."""
    named = zip(Texts._fields, data.texts)
    tensors = {f"{name}.{part}": tensor for name, text in named for part, tensor in vars(text).items()}
    tensors |= {"variants": data.variants} | ({} if data.masks is None else {"masks": data.masks})
    imagined = fingerprint(data.imagined) if data.imagined else ""
    return text_hash(tensor_hash(tensors) + json.dumps(data.ids) + imagined)


def learn(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path, method: Method,
          base_model: str = "tiny", imagined: EncodedConcept | None = None,
          name: str = "") -> Iterator[tuple[int, Branch, dict]]:
    """Yields (stage, what it trains, row of the log) and leaves folder/concept.safetensors.

    Args:
        imagined: scenes of two things, for a method that wants them (pairs.py).
        name: stands before the names of all files, where several methods share a folder.
    Raises: RuntimeError if the base model was written to, which its hash would show.
    """
    data, before, theta_1 = encode(pipe, concept), tensor_hash(pipe.mmdit.state_dict()), None
    if method.extractor:
        first = replace(config, learning_rate=config.extractor_learning_rate or config.learning_rate)
        theta_1, rows = stage(pipe, data, first, folder, method.extractor, name=name)
        yield from ((1, theta_1, row) for row in rows)
        theta_1.requires_grad_(False)
    theta, rows = stage(pipe, data._replace(imagined=imagined), config, folder, method, theta_1, name)
    yield from ((method.stages, theta, row) for row in rows)
    if tensor_hash(pipe.mmdit.state_dict()) != before:
        raise RuntimeError("the base model changed during training")
    theta.save(folder / f"{name}concept.safetensors",
               concept_facts(pipe, concept.class_word, config, method.name, base_model))


def concept_facts(pipe: Pipeline, class_word: str, config: TrainConfig, method: str, base_model: str) -> dict:
    """What a concept's file says about itself, and by what the base model's weights are recognised."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__.split("+")[0]}
    return {"token": TOKEN, "class_word": class_word, "method": method, "rank": config.rank,
            "size": pipe.picture_size, "base": base_model, "base_sample": sample_of(pipe.mmdit),
            "seed": config.seed, "config": asdict(config), "versions": versions, "t5": has_t5(pipe)}

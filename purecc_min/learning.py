"""Algorithm 1 for learn, the demo and the benchmark: any method, checkpoints, the concept's file.

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
from purecc_min.concept import TOKEN, ConceptSet, EncodedConcept, encode
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


def stage(pipe: Pipeline, data: EncodedConcept, config: TrainConfig, folder: Path, method: Method,
          theta_1: Branch | None = None, name: str = "", origin: str = "") -> tuple[Branch, Iterator[dict]]:
    """Returns the stage's branch and an iterator; iterating trains the branch, one step per item.

    Args:
        theta_1: the frozen extractor, in stage 2.
        name: a prefix of the file names.
        origin: a fingerprint of the data. A checkpoint of other data is refused.
    """
    number = 1 if theta_1 is None else 2
    Y = None
    generator = generator_for(config.seed, number, step=-1)
    if method.embeddings:
        trained = theta_1 and theta_1.embeddings
        Y = trained.Y if trained else class_word_states(pipe, data, generator)
    theta = Branch.fresh(pipe, Y, config.rank, generator, method.where)
    theta.lora.requires_grad_(method.adapters)
    origin = text_hash(origin + tensor_hash((theta_1 or pipe.mmdit).state_dict()))
    return theta, train_resumably(method.loss, Thetas(pipe.velocity, theta_1, theta), data, config, number,
                                  folder / f"{name}stage{number}.safetensors", origin)


def train_steps(loss_of_step: LossOfStep, thetas: Thetas, data: EncodedConcept, config: TrainConfig,
                number: int, optimizer: torch.optim.Optimizer, first: int = 0) -> Iterator[dict]:
    """Trains thetas.theta from step `first` on; yields a dict per step: step (from 1), loss, logged values.

    number: of the stage, 1 or 2; the two use different random numbers.
    Raises: InputError for a loss, or gradients, that are not finite.
    """
    scale = SCALE
    for step in range(first, config.steps):
        batch = draw_batch(data, config, number, step, thetas.theta.pipe.shift)
        loss, log = loss_of_step(thetas, batch, config.eta)
        updated = bool(loss.isfinite()) and update(thetas.theta, optimizer, loss, scale)
        if not updated:                          # a gradient overflowed in fp16: skip it, halve the scale
            scale, log = scale / 2, {**log, "skipped": torch.ones(())}
        if not loss.isfinite() or (not updated and scale < 1):
            raise InputError(f"the loss or a gradient is not finite at step {step + 1} of stage {number}; "
                             "try a lower learning rate")
        yield {"step": step + 1, "loss": loss.item(), **{name: value.item() for name, value in log.items()}}


def train_resumably(loss_of_step: LossOfStep, thetas: Thetas, data: EncodedConcept, config: TrainConfig,
                    number: int, checkpoint: Path, origin: str) -> Iterator[dict]:
    """Like train_steps, but resumes from `checkpoint` if it exists, and writes a .jsonl log next to it.

    origin: a fingerprint of all that this stage starts from. A checkpoint of another origin is refused (but a
        run that was only given more steps starts stage 2 again).
    Raises: InputError for another run's checkpoint, and for a loss that is not finite (the checkpoint stays).
    """
    theta, log_file = thetas.theta, checkpoint.with_suffix(".jsonl")
    optimizer = optimizer_for(theta, config)
    facts = {"config": asdict(config), "stage": number, "loss": loss_of_step.__name__, "origin": origin}
    first = resume(checkpoint, theta, optimizer, facts) if checkpoint.exists() else 0
    log = [row for row in read_log(log_file) if row["step"] <= first]
    try:
        for row in train_steps(loss_of_step, thetas, data, config, number, optimizer, first):
            log.append(row)
            yield row                            # then saved: a step that is stopped here is done again
            if row["step"] % SAVE_EVERY == 0 or row["step"] == config.steps:
                write_whole(log_file, "".join(json.dumps(row) + "\n" for row in log).encode())
                save_checkpoint(checkpoint, theta, optimizer, facts, row["step"])
    except InputError as error:
        kept = f"; {checkpoint} holds the last good state" if checkpoint.exists() else ""
        raise InputError(f"{error}{kept}") from None


def fingerprint(concept: ConceptSet, imagined: EncodedConcept | None = None) -> str:
    """A SHA-256 of pictures, masks, texts and imagined scenes, in order.

    Not of encoded references: their last bits may depend on the number of threads.
    """
    texts = [concept.class_word, *([r.id, r.complete, r.base, r.target] for r in concept.references)]
    tensors = {f"{name} {n}": torch.tensor(getattr(r, name)) for n, r in enumerate(concept.references)
               for name in ("pictures", "masks") if getattr(r, name) is not None}
    if imagined:
        tensors["imagined"] = imagined.variants
    return text_hash(tensor_hash(tensors) + json.dumps(texts))


def learn(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path, method: Method,
          base_model: str = "tiny", imagined: EncodedConcept | None = None,
          name: str = "") -> Iterator[tuple[int, Branch, dict]]:
    """Trains a concept: yields (stage, branch, log row) per step, then writes concept.safetensors.

    Args:
        imagined: scenes of two things, for a method that needs them (pairs.py).
        name: a prefix of all file names, where several methods share a folder.
    Raises: RuntimeError if the hash of the base model's weights has changed.
    """
    data, before, theta_1 = encode(pipe, concept), tensor_hash(pipe.mmdit.state_dict()), None
    origin = fingerprint(concept, imagined)
    if method.extractor:
        of_stage_1 = replace(config, learning_rate=config.extractor_learning_rate or config.learning_rate)
        theta_1, rows = stage(pipe, data, of_stage_1, folder, method.extractor, None, name, origin)
        yield from ((1, theta_1, row) for row in rows)
        theta_1.requires_grad_(False)
    theta, rows = stage(pipe, data._replace(imagined=imagined), config, folder, method, theta_1, name,
                        origin)
    yield from ((method.stages, theta, row) for row in rows)
    if tensor_hash(pipe.mmdit.state_dict()) != before:
        raise RuntimeError("the base model changed during training")
    theta.save(folder / f"{name}concept.safetensors",
               concept_facts(pipe, concept.class_word, config, method.name, base_model))


def concept_facts(pipe: Pipeline, class_word: str, config: TrainConfig, method: str, base_model: str) -> dict:
    """The metadata of a concept's file, with sample values that identify the base model."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__.split("+")[0]}
    return {"token": TOKEN, "class_word": class_word, "method": method, "rank": config.rank,
            "size": pipe.picture_size, "base": base_model, "base_sample": sample_of(pipe.mmdit),
            "seed": config.seed, "config": asdict(config), "versions": versions, "t5": has_t5(pipe)}

"""Algorithm 1: stage 1 teaches the representation extractor theta1, stage 2 teaches theta2 purely.

Stage 1 (Eq. 3, 7): adapters and concept embeddings on the plain flow-matching loss of the reference pictures. Its result is
kept as it is: theta1, frozen. Stage 2 (Eq. 8 to 15): theta2 starts from fresh adapters and a copy of theta1's embeddings, and learns on
L_PCC = L_CC + eta L_PureCC. With eta = 0 stage 2 is a plain LoRA. Loops yield a row of the log for each step; callers show them.
Every step's draws depend on (seed, stage, step) only, so a run that was interrupted anywhere ends bitwise where an uninterrupted one
ends (on CPU). Read next: evaluate.py.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

from purecc_min.branch import TOKEN, Branch
from purecc_min.concept import ConceptSet
from purecc_min.embeddings import class_word_states
from purecc_min.objective import cosine, inner, purecc_terms, representation, total_loss
from tinyflow.errors import InputError
from tinyflow.flow import path, sample_times, squared_error, velocity_target
from tinyflow.pipeline import Pipeline, Text
from tinyflow.weights import load_into, load_optimizer, load_tensors, optimizer_tensors, save_tensors, tensor_hash, write_whole

SAVE_EVERY = 25                                  # steps between checkpoints


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are for the tiny world; base.py has those of SD3.5 Medium."""
    steps: int = 400                             # of each stage
    batch: int = 4
    rank: int = 4
    learning_rate: float = 2e-3                  # of the adapters
    embedding_learning_rate: float = 5e-3        # of Y
    eta: float = 1.0                             # weight of L_PureCC (Eq. 15); 0 is a plain LoRA
    fixed_lambda: float | None = None            # a constant in place of lambda*
    original: str = "model"                      # v_original (Eq. 9) from the trainable "model", or from the untouched "base"
    detach: bool = True                          # no gradient through v_original
    seed: int = 0

    def __post_init__(self):
        if self.original not in ("model", "base"):
            raise InputError(f"original is {self.original!r}; it must be 'model' or 'base'")
        for name in ("steps", "batch", "rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


class TrainingData(NamedTuple):
    """Pictures and texts, encoded once. Row i of everything belongs to the reference ids[i]."""
    ids: list[str]
    variants: Tensor                             # [n, V, C, H, W]: each picture, then its random crops and flips
    complete: Text
    base: Text
    target: Text
    null: Text
    class_text: Text                             # the base texts, slots at the class word

    @property
    def x_0(self) -> Tensor:
        """[n, C, H, W], the pictures themselves."""
        return self.variants[:, 0]

    def fingerprint(self) -> str:
        tensors = {"variants": self.variants} | {f"{name}.{part}": tensor for name in ("complete", "base", "target")
                                       for part, tensor in vars(getattr(self, name)).items()}
        return hashlib.sha256((tensor_hash(tensors) + json.dumps(self.ids)).encode()).hexdigest()


def prepare(pipe: Pipeline, concept: ConceptSet) -> TrainingData:
    """Encodes a custom set. Raises InputError for words that the text encoder does not know."""
    references, word = concept.references, concept.class_word
    encode = lambda texts: pipe.encode_text(texts, {TOKEN: word})
    class_texts = [r.base if word in r.base.split() else word for r in references]
    return TrainingData([r.id for r in references], torch.stack([pipe.encode_images(r.pictures) for r in references]),
                        encode([r.complete for r in references]), encode([r.base for r in references]),
                        encode([r.target for r in references]), encode([""] * len(references)),
                        pipe.encode_text(class_texts, {word: word}))


class Batch(NamedTuple):
    """One step's draw: the same x_t and t for every prediction in it."""
    rows: Tensor                                 # [B] which references
    x_t: Tensor                                  # [B, C, H, W]
    t: Tensor                                    # [B]
    v: Tensor                                    # [B, C, H, W] the target velocity of Eq. 2


def draw_batch(data: TrainingData, config: TrainConfig, stage: int, step: int, shift: float) -> Batch:
    generator = torch.Generator().manual_seed((config.seed * 10 + stage) * 10**7 + step)
    rows = torch.randint(len(data.variants), (config.batch,), generator=generator)
    t = sample_times(config.batch, shift, generator).to(data.variants)
    x_1 = torch.randn((config.batch, *data.x_0.shape[1:]), generator=generator).to(data.variants)
    x_0 = data.variants[rows, torch.randint(data.variants.shape[1], (config.batch,), generator=generator)]
    return Batch(rows, path(x_0, x_1, t), t, velocity_target(x_0, x_1))


def stage_1_losses(pipe: Pipeline, theta_1: Branch, data: TrainingData, batch: Batch) -> dict[str, Tensor]:
    """L_CC of the extractor (Eq. 3): Algorithm 1, lines 3-6."""
    v_complete = theta_1.velocity(pipe, batch.x_t, batch.t, data.complete[batch.rows])
    return {"loss": squared_error(v_complete, batch.v)}


@torch.no_grad()
def target_representation(pipe: Pipeline, theta_1: Branch, data: TrainingData, batch: Batch) -> Tensor:
    """R(y_tar) of the frozen extractor, [B, C, H, W] (Eq. 8)."""
    v_tar, v_null = theta_1.velocity(pipe, torch.cat([batch.x_t, batch.x_t]), torch.cat([batch.t, batch.t]),
                                     Text.cat([data.target[batch.rows], data.null[batch.rows]])).chunk(2)
    return representation(v_tar, v_null)


def pcc_losses(v_complete: Tensor, v_original: Tensor, R_target: Tensor, v: Tensor, config: TrainConfig,
               fixed_lambda: float | Tensor | None = None) -> dict[str, Tensor]:
    """Eq. 10 to 15 from the predictions, all [B, C, H, W], and everything worth logging. "rejection" is what L_PureCC is with lambda*.

    "negative" is the share of samples whose lambda is below 0.
    """
    terms = purecc_terms(v_complete, v_original, R_target, fixed_lambda)                         # Eq. 10-14
    loss_cc = squared_error(v_complete, v)                                                       # Eq. 3
    R_complete, norm = terms.R_complete.detach(), lambda R: inner(R, R).sqrt().mean()            # the rest is for the log
    along = inner(R_complete, R_target).square() / inner(R_target, R_target).clamp(min=1e-20)
    rejection = (inner(R_complete, R_complete) - along).mean() / R_target[0].numel()
    return {"loss": total_loss(loss_cc, terms.loss, config.eta), "loss_cc": loss_cc, "loss_purecc": terms.loss,       # Eq. 15
            "rejection": rejection, "lambda": terms.lam.mean(), "negative": (terms.lam < 0).float().mean(),
            "cosine": cosine(R_complete, R_target).mean(), "norm_R_complete": norm(R_complete), "norm_R_target": norm(R_target)}


def stage_2_predictions(pipe: Pipeline, theta_2: Branch, data: TrainingData, batch: Batch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """v_complete, which carries the gradient, and v_original, which does not unless config.detach is off: both [B, C, H, W]."""
    rows, x_t, t, _ = batch
    if config.original == "model" and not config.detach:
        return theta_2.velocity(pipe, torch.cat([x_t, x_t]), torch.cat([t, t]), Text.cat([data.complete[rows], data.base[rows]])).chunk(2)
    v_complete = theta_2.velocity(pipe, x_t, t, data.complete[rows])
    with torch.no_grad():
        if config.original == "base":
            v_original = pipe.velocity(x_t, t, data.base[rows])                                  # Sec. 14: an untouched copy
        else:
            v_original = theta_2.velocity(pipe, x_t, t, data.base[rows])                         # Eq. 9
    return v_complete, v_original


def stage_2_losses(pipe: Pipeline, theta_1: Branch, theta_2: Branch, data: TrainingData, batch: Batch,
                   config: TrainConfig) -> dict[str, Tensor]:
    """L_PCC (Eq. 15) and everything worth logging: Algorithm 1, lines 10-17."""
    if config.eta == 0:
        loss_cc = squared_error(theta_2.velocity(pipe, batch.x_t, batch.t, data.complete[batch.rows]), batch.v)
        return {"loss": loss_cc, "loss_cc": loss_cc}
    R_target = target_representation(pipe, theta_1, data, batch)         # first: it needs memory that v_complete's graph will take
    return pcc_losses(*stage_2_predictions(pipe, theta_2, data, batch, config), R_target, batch.v, config, config.fixed_lambda)


def optimizer_for(theta: Branch, config: TrainConfig) -> torch.optim.Optimizer:
    Y = list(theta.embeddings.parameters())
    others = [parameter for parameter in theta.parameters() if all(parameter is not y for y in Y)]
    return torch.optim.AdamW([{"params": others, "lr": config.learning_rate}, {"params": Y, "lr": config.embedding_learning_rate}], weight_decay=0.0)


def train_step(pipe: Pipeline, theta: Branch, optimizer: torch.optim.Optimizer, losses: Callable[[Batch], dict[str, Tensor]],
               data: TrainingData, config: TrainConfig, stage: int, step: int) -> dict[str, float]:
    """One step; returns its row of the log. Raises InputError for a loss that is not finite."""
    values = losses(draw_batch(data, config, stage, step, pipe.shift))
    if not torch.isfinite(values["loss"]):
        raise InputError(f"the loss is not finite at step {step + 1} of stage {stage}; try a lower learning rate")
    optimizer.zero_grad()
    with theta.attached(pipe):                   # gradient checkpointing computes blocks again in here
        values["loss"].backward()
    torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
    optimizer.step()
    return {"step": step + 1, **{name: value.item() for name, value in values.items()}}


def train_branch(pipe: Pipeline, theta: Branch, losses: Callable[[Batch], dict[str, Tensor]], data: TrainingData, config: TrainConfig,
                 stage: int, checkpoint: Path, origin: str) -> Iterator[dict[str, float]]:
    """Trains theta for config.steps steps and yields a row of the log for each. Goes on from `checkpoint` if that file exists.

    Args:
        losses: Batch -> named scalars; "loss" is the one that is minimised.
        origin: a fingerprint of all that this stage starts from; a checkpoint of another origin is refused.
    Raises: InputError for another run's checkpoint, and for a loss that is not finite (the last checkpoint is kept).
    """
    optimizer = optimizer_for(theta, config)
    log_file, log, first = checkpoint.with_suffix(".jsonl"), [], 0
    facts = {"config": asdict(config), "stage": stage, "origin": origin}
    if checkpoint.exists():
        tensors, saved = load_tensors(checkpoint, "training checkpoint")
        if {**saved, "step": None} != {**facts, "step": None}:
            raise InputError(f"{checkpoint.parent}: this folder holds another run (other pictures, texts or settings); choose another --out")
        load_into(theta, {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}, checkpoint)
        load_optimizer(optimizer, tensors)
        first = saved["step"]
        lines = log_file.read_text().splitlines() if log_file.exists() else []
        log = [row for row in map(json.loads, lines) if row["step"] <= first]

    for step in range(first, config.steps):
        try:
            row = train_step(pipe, theta, optimizer, losses, data, config, stage, step)
        except InputError as error:
            raise InputError(f"{error}; {checkpoint} holds the last good state") from None
        log.append(row)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps:
            write_whole(log_file, "".join(json.dumps(row) + "\n" for row in log).encode())
            save_tensors(checkpoint, "training checkpoint", theta.state_dict() | optimizer_tensors(optimizer), {**facts, "step": step + 1})
        yield row


def stage_1(pipe: Pipeline, data: TrainingData, config: TrainConfig, folder: Path) -> tuple[Branch, Iterator[dict[str, float]]]:
    """The extractor to be, and the loop that trains it. Once the loop is done, freeze it: theta_1.requires_grad_(False)."""
    generator = torch.Generator().manual_seed((config.seed * 10 + 1) * 10**7 - 1)
    Y = class_word_states(pipe, data.x_0, data.class_text, generator)
    theta_1 = Branch.fresh(pipe, Y, config.rank, generator)
    origin = hashlib.sha256((data.fingerprint() + tensor_hash(pipe.mmdit.state_dict())).encode()).hexdigest()
    losses = lambda batch: stage_1_losses(pipe, theta_1, data, batch)
    return theta_1, train_branch(pipe, theta_1, losses, data, config, 1, folder / "stage1.safetensors", origin)


def stage_2(pipe: Pipeline, theta_1: Branch, data: TrainingData, config: TrainConfig, folder: Path,
            name: str = "stage2") -> tuple[Branch, Iterator[dict[str, float]]]:
    """theta2, from fresh adapters and a copy of theta1's embeddings, and the loop that trains it."""
    generator = torch.Generator().manual_seed((config.seed * 10 + 2) * 10**7 - 1)
    theta_2 = Branch.fresh(pipe, theta_1.embeddings.Y.detach(), config.rank, generator)
    origin = hashlib.sha256((data.fingerprint() + tensor_hash(theta_1.state_dict())).encode()).hexdigest()
    losses = lambda batch: stage_2_losses(pipe, theta_1, theta_2, data, batch, config)
    return theta_2, train_branch(pipe, theta_2, losses, data, config, 2, folder / f"{name}.safetensors", origin)


def learn(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path, base: str = "tiny") -> Iterator[tuple[str, dict[str, float]]]:
    """Algorithm 1, whole: yields ("stage 1" or "stage 2", log row), leaves folder/concept.safetensors. The base is not written: checked by hash."""
    data, base_hash = prepare(pipe, concept), tensor_hash(pipe.mmdit.state_dict())
    theta_1, rows = stage_1(pipe, data, config, folder)
    yield from (("stage 1", row) for row in rows)
    theta_2, rows = stage_2(pipe, theta_1.requires_grad_(False), data, config, folder)
    yield from (("stage 2", row) for row in rows)
    if tensor_hash(pipe.mmdit.state_dict()) != base_hash:
        raise RuntimeError("the base model changed during training")
    theta_2.save(folder / "concept.safetensors", concept_facts(concept.class_word, config, base, pipe.picture_size))


def concept_facts(class_word: str, config: TrainConfig, base: str = "tiny", size: int = 32) -> dict:
    """What a concept's file says about itself."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__.split("+")[0]}
    return {"token": TOKEN, "class_word": class_word, "rank": config.rank, "base": base, "size": size, "seed": config.seed, "config": asdict(config),
            "versions": versions}

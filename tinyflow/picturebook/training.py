"""How the three networks of the picture book are trained: codec, base model and reader.

Each is a `Training` that knows its loss. The steps around it are the same: gradient, Muon's step, a learning
rate that warms up, stays and falls, a moving average of the weights, which is what is kept, and checkpoints.
What step k sees depends on (seed, k) only, so an interrupted run goes on where it stopped and ends where an
uninterrupted one would. Read next: codec.py.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinyflow.checkpoints import load_optimizer, reached_step, read_log, save_checkpoint
from tinyflow.disk import locked, make_folder
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.picturebook.muon import Muon
from tinyflow.terminal import Parser, file_path, positive, seed
from tinyflow.weights import load_into, load_tensors, save_tensors, tensor_hash


@dataclass(frozen=True)
class Config:
    steps: int
    lr: float                                    # of Adam
    warmup: int                                  # steps
    flat: float                                  # the share of the steps after which the rates fall
    batch: int = 64
    pictures: int = 40000                        # rendered for the training
    ema: float = .999
    matrix_lr: float = .02                       # of Muon
    seed: int = 0
    start: str = ""                              # the hash of the weights that this stage goes on from


# What a stage that starts from trained weights changes in its config: lower learning rates, falling soon.
LATER = {"lr": 8e-4, "matrix_lr": .01, "flat": .1}


def parser_of(name: str, about: str, config: Config, start: str = "weights to go on from") -> Parser:
    """The options that all trainings have. start: what --start does."""
    parser = Parser(f"python -m tinyflow.picturebook.{name}", description=about.split("\n\n")[0])
    parser.add_argument("--out", type=file_path, default=Path(f"runs/{name}"),
                        help="folder for checkpoint, log and weights; a run found there goes on")
    parser.add_argument("--start", type=file_path, help=f"{start}, by default none")
    parser.add_argument("--steps", type=positive, default=config.steps, help="training steps")
    parser.add_argument("--seed", type=seed, default=config.seed, help="of weights, pictures and noise")
    return parser


def stage(config: Config, options: argparse.Namespace, model: nn.Module, later: dict = LATER) -> Config:
    """Makes the folder of a stage, and returns its configuration. Raises InputError for a wrong folder."""
    make_folder(options.out)
    config = replace(config, steps=options.steps, seed=options.seed)
    return replace(config, start=tensor_hash(model.state_dict()), **later) if options.start else config


def rate_share(k: int, config: Config) -> float:
    """The share of the full learning rate at step k: it warms up to 1, and falls to .02 along a cosine."""
    falling = max(0.0, (k / config.steps - config.flat) / (1 - config.flat))
    return min(1, (k + 1) / config.warmup) * (.02 + .98 * .5 * (1 + np.cos(np.pi * falling)))


def fast_precision(device: torch.device) -> torch.autocast:
    """bf16 where the hardware computes in it. A CPU without it takes ten times as long as for fp32."""
    has_it = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


class Training:
    """A model with its moving average and optimizer. A subclass says what the loss of step k is.

    by_adam: see Muon.
    """
    name = ""                                    # "reader" makes reader.safetensors

    def __init__(self, config: Config, model: nn.Module, by_adam: tuple[str, ...]):
        self.config, self.model = config, model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.both = nn.ModuleDict({"model": model, "average": self.average})
        self.optimizer = Muon(model, config.lr, config.matrix_lr, by_adam)

    def loss(self, k: int) -> Tensor:
        raise NotImplementedError

    def report(self, out: Path, k: int) -> dict:
        """Leaves the weights so far, since a stage may be stopped. Returns what the log tells besides."""
        self.finish(out, {"step": k})
        return {}

    def finish(self, out: Path, facts: dict) -> None:
        """Writes the average as it is shipped, in half precision."""
        halves = {name: tensor.half() for name, tensor in self.average.state_dict().items()}
        save_tensors(out / f"{self.name}.safetensors", f"tinyflow {self.name}", halves, facts)

    def step(self, k: int) -> float:
        loss = self.loss(k)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.scale_rates(rate_share(k, self.config))
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.config.ema, (k + 1) / (k + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def resume(self, file: Path) -> int:
        """Returns the step to go on with. Raises InputError if the file is of another configuration."""
        tensors, facts = load_tensors(file, "training checkpoint")
        if facts.get("config") != asdict(self.config):
            raise InputError(f"{file}: the run in this folder has another configuration; "
                             "choose another --out")
        step = reached_step(tensors, facts, file)
        weights = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
        load_into(self.both, weights, file)
        load_optimizer(self.optimizer, tensors)
        return step


def train(training: Training, out: Path, save_every: int) -> Iterator[tuple[int, float]]:
    """Trains and yields (step, loss) after each step. A run found in `out` is continued.

    Leaves a checkpoint, the log, and what the training finishes with.
    Raises: InputError if the run there has another configuration, and if the loss is not finite.
    """
    config, checkpoint = training.config, out / "checkpoint.safetensors"
    result, first, rows, recent = f"{training.name}.safetensors", 0, [], []
    if checkpoint.exists():
        first = training.resume(checkpoint)
        rows = [row for row in read_log(out / "log.jsonl") if row["step"] <= first]
    elif (out / result).exists():
        raise InputError(f"{out}: it holds {result}, and no checkpoint to go on from; choose another --out")
    begun = time.time() - (rows[-1]["seconds"] if rows else 0)
    for k in range(first, config.steps):
        loss = training.step(k)
        if not np.isfinite(loss):
            raise InputError(f"the loss is not finite at step {k}; try lower learning rates")
        recent.append(loss)
        if (k + 1) % save_every == 0 or k + 1 == config.steps:
            row = {"step": k + 1, "loss": round(float(np.mean(recent)), 5),
                   "seconds": round(time.time() - begun)}
            rows.append(row | training.report(out, k + 1))
            write_whole(out / "log.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
            save_checkpoint(checkpoint, training.both, training.optimizer, {"config": asdict(config)}, k + 1)
            recent = []
        yield k, loss
    training.finish(out, {"config": asdict(config), "seconds": round(time.time() - begun),
                          "torch": torch.__version__})


def follow(training: Training, out: Path, save_every: int) -> None:
    """Trains behind a progress bar. No other process may train in the same folder meanwhile."""
    with locked(out), tqdm(total=training.config.steps, desc=training.name) as bar:
        for k, loss in train(training, out, save_every):
            bar.update(k + 1 - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

"""How the three networks of the picture book are trained: codec, base model and reader.

Each is a `Training` that knows its loss. The steps around it are the same: gradient, Muon's step, a learning
rate that warms up, stays and falls, a moving average of the weights, which is what is kept, and checkpoints.
What step k sees depends on (seed, k) only, so an interrupted run goes on where it stopped and ends where an
uninterrupted one would. Read next: codec.py.
"""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinyflow.checkpoints import load_optimizer, optimizer_tensors, progress, reached_step, read_log
from tinyflow.disk import locked
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.picturebook.muon import Muon
from tinyflow.weights import load_into, load_tensors, save_tensors

# What a stage that starts from trained weights changes in its config: lower learning rates, falling soon.
LATER = {"lr": 8e-4, "matrix_lr": .01, "flat": .1}


def rate_share(k: int, steps: int, warmup: int, flat: float) -> float:
    """The share of the full learning rate at step k: up to 1 in `warmup` steps, and from the share `flat`
    of the steps on down to .02 along a cosine.
    """
    falling = max(0.0, (k / steps - flat) / (1 - flat))
    return min(1, (k + 1) / warmup) * (.02 + .98 * .5 * (1 + np.cos(np.pi * falling)))


def fast_precision(device: torch.device) -> torch.autocast:
    """bf16 where the hardware computes in it. A CPU without it takes ten times as long as for fp32."""
    has_it = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


class Training:
    """A model with its moving average and optimizer. A subclass says what the loss of step k is.

    Args:
        config: a dataclass with steps, lr, matrix_lr, warmup, flat, ema, seed, and what the loss needs.
        by_adam: see Muon.
    """
    kind = ""                                    # what its checkpoint says it is
    result = ""                                  # the file that it makes

    def __init__(self, config, model: nn.Module, by_adam: tuple[str, ...]):
        self.config, self.model = config, model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = Muon(model, config.lr, config.matrix_lr, by_adam)

    def loss(self, k: int) -> Tensor:
        raise NotImplementedError

    def report(self, out: Path, k: int) -> dict:
        """What the log tells besides the mean loss, after k steps."""
        return {}

    def finish(self, out: Path, facts: dict) -> None:
        """Writes what the training was for."""
        raise NotImplementedError

    def step(self, k: int) -> float:
        config, loss = self.config, self.loss(k)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.scale_rates(rate_share(k, config.steps, config.warmup, config.flat))
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(config.ema, (k + 1) / (k + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def save(self, file: Path, k: int, seconds: float) -> None:
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        save_tensors(file, f"{self.kind} checkpoint", tensors,
                     {"seconds": seconds, "config": asdict(self.config), **progress(tensors, k)})

    def load(self, file: Path) -> tuple[int, float]:
        """Returns the step to go on with and the seconds spent so far.

        Raises: InputError if the file is from another configuration.
        """
        tensors, facts = load_tensors(file, f"{self.kind} checkpoint")
        if facts.get("config") != asdict(self.config):
            raise InputError(f"{file}: the run in this folder has another configuration; "
                             "choose another --out")
        for prefix, module in (("model.", self.model), ("average.", self.average)):
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            load_into(module, own, file)
        step = reached_step(tensors, facts, file)
        load_optimizer(self.optimizer, tensors)
        return step, float(facts["seconds"])


def train(training: Training, out: Path, save_every: int) -> Iterator[tuple[int, float]]:
    """Trains and yields (step, loss) after each step.

    Leaves a checkpoint and the log in `out`, and what the training finishes with. A run found there is
    continued.
    Raises: InputError if it has another configuration, and if the loss is not finite.
    """
    config, checkpoint = training.config, out / "checkpoint.safetensors"
    log, first, seconds = [], 0, 0.0
    if not checkpoint.exists() and (out / training.result).exists():
        raise InputError(f"{out}: it holds {training.result}, and no checkpoint to go on from; choose "
                         "another --out")
    if checkpoint.exists():
        first, seconds = training.load(checkpoint)
        log = [json.dumps(row) for row in read_log(out / "log.jsonl") if row["step"] <= first]
    begun, recent = time.time() - seconds, []
    for k in range(first, config.steps):
        loss = training.step(k)
        if not np.isfinite(loss):
            raise InputError(f"the loss is not finite at step {k}; try lower learning rates")
        recent.append(loss)
        if (k + 1) % save_every == 0 or k + 1 == config.steps:
            seconds, mean = round(time.time() - begun), float(np.mean(recent))
            row, recent = {"step": k + 1, "loss": round(mean, 5), "seconds": seconds}, []
            log.append(json.dumps(row | training.report(out, k + 1)))
            write_whole(out / "log.jsonl", "\n".join([*log, ""]).encode())
            training.save(checkpoint, k + 1, time.time() - begun)
        yield k, loss
    training.finish(out, {"config": asdict(config), "seconds": round(time.time() - begun),
                          "torch": torch.__version__})


def follow(training: Training, out: Path, save_every: int, name: str) -> None:
    """Trains behind a progress bar. No other process may train in the same folder meanwhile."""
    with locked(out), tqdm(total=training.config.steps, desc=name) as bar:
        for k, loss in train(training, out, save_every):
            bar.update(k + 1 - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)


def halves(module: nn.Module) -> dict[str, Tensor]:
    """Weights as they are shipped."""
    return {name: tensor.half() for name, tensor in module.state_dict().items()}

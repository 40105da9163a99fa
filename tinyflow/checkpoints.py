"""Checkpoints and logs of trainings: which facts they hold, and how a run is resumed.

A checkpoint holds the tensors of a module and of its optimizer, and facts: the run, the step, and a hash of
the names and shapes of the optimizer's state. An InputError says what is missing or wrong.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyflow.disk import read_text
from tinyflow.errors import InputError
from tinyflow.weights import load_into, load_tensors, save_tensors, text_hash


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_log(file: Path) -> list[dict]:
    """The rows of a log, none if it is not there. Raises InputError if it is damaged."""
    lines = read_text(file, math.inf).splitlines() if file.exists() else []
    try:
        rows = [dict(json.loads(line)) for line in lines]
        if not all(type(row["step"]) is int and all(map(is_number, row.values())) for row in rows):
            raise ValueError
        return sorted(rows, key=lambda row: row["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{file}: damaged; delete it, and the run goes on without it") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as flat tensors, "optimizer.<parameter>.<entry>", for a checkpoint."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{n}.{key}": value for n, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took; other names are ignored."""
    state = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, n, key = name.split(".")
            state.setdefault(int(n), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def progress(tensors: dict[str, Tensor], step: int) -> dict:
    """Facts that check a checkpoint: its step, and a hash over names and shapes of the optimizer's state."""
    parts = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()
                   if name.startswith("optimizer."))
    return {"step": step, "optimizer": text_hash("\n".join(parts))}


def reached_step(tensors: dict[str, Tensor], facts: dict, path: str | Path) -> int:
    """The step that a checkpoint has reached. Removes the entries of `progress` from its facts.

    Raises: InputError if the step is missing or not one of its run's, or the optimizer's state is not whole.
    """
    step, parts, config = facts.pop("step", None), facts.pop("optimizer", None), facts.get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    if type(step) is not int or type(steps) is not int or not 1 <= step <= steps:
        raise InputError(f"{path}: its step is missing or wrong; delete the file, and the run starts again")
    if parts != progress(tensors, step)["optimizer"]:
        raise InputError(f"{path}: the optimizer's state is not whole; delete the file, and the run "
                         "starts again")
    return step


def save_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, facts: dict,
                    step: int) -> None:
    """Keeps all that `resume` needs. facts: which run this is, with the run's settings as "config"."""
    tensors = module.state_dict() | optimizer_tensors(optimizer)
    save_tensors(path, "training checkpoint", tensors, {**facts, **progress(tensors, step)})


def resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> int:
    """Puts back what `save_checkpoint` kept; returns the step that it has reached.

    If a run gets more steps, its stage 1 ends with other weights. Then stage 2 starts again: returns 0.
    Raises: InputError for a checkpoint that is damaged, or of another run; it names what differs.
    """
    tensors, saved = load_tensors(path, "training checkpoint")
    step, before, config = reached_step(tensors, saved, path), saved["config"], facts["config"]
    longer = before["steps"] < config["steps"]
    wrong = [f"{name} is {before.get(name)} there and {config[name]} here" for name in config
             if before.get(name) != config[name] and not (longer and name == "steps")]
    # repr, because True == 1
    others = {name for name in facts if name != "config" and repr(saved.get(name)) != repr(facts[name])}
    if longer and facts["stage"] == 2 and others == {"origin"} and not wrong:
        return 0
    if others:
        wrong.append("other pictures, texts or methods")
    if wrong:
        raise InputError(f"{path.parent}: this folder holds another run ({'; '.join(wrong)}); choose another "
                         "--out")
    load_into(module, {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}, path)
    load_optimizer(optimizer, tensors)
    return step

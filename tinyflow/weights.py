"""Saving and loading tensors: safetensors only, written whole or not at all, checked when read back.

Every file of ours says in its metadata what it is (`kind`), how it was made (`facts`), and its SHA-256, so
a file that is foreign, cut short or damaged ends in one clear error.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tinyflow.errors import InputError, listing
from tinyflow.files import ordinary_file, write_whole


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def seal(kind: str, tensors: dict[str, Tensor], facts: dict) -> str:
    """The SHA-256 of a whole file's content."""
    return text_hash(json.dumps([kind, tensor_hash(tensors), facts], sort_keys=True))


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_finite(path: str | Path, tensors: dict[str, Tensor], advice: str) -> None:
    """Raises: InputError if a number is infinite or none."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds numbers that are not finite; {advice}")


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], facts: dict,
                 metadata: dict[str, str] | None = None) -> None:
    """Writes tensors with `facts` (JSON-able) beside them.

    `metadata` is for entries that other programs read.
    Raises: InputError for numbers that are not finite; the file stays as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(path, tensors, "nothing was saved; try lower learning rates")
    about = json.dumps({"kind": kind, "sha256": seal(kind, tensors, facts), "facts": facts}, sort_keys=True)
    write_whole(path, in_order(save(tensors, {"tinyflow": about} | (metadata or {}))))


def in_order(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata: it is written in a random order, and equal contents
    should be equal files.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= length
    return data[:8] + text.ljust(length) + data[8 + length:]


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of a file that `save_tensors` wrote.

    Raises: InputError if the file is missing, foreign or damaged, or holds numbers that are not finite.
    """
    path = ordinary_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(json.loads((file.metadata() or {}).get("tinyflow", "{}")))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a readable safetensors file, perhaps cut short ({reason}); "
                         "copy or make it again") from None
    found = about.get("kind", "nothing of ours")
    if found != kind:
        raise InputError(f"{path}: this is not a {kind} file of purecc-min; it says it is {found}")
    if not isinstance(about.get("facts"), dict):
        raise InputError(f"{path}: it says nothing about itself; make it again")
    if about.get("sha256") != seal(kind, tensors, about["facts"]):
        raise InputError(f"{path}: the content does not match the file's SHA-256; it is damaged, "
                         "copy or make it again")
    check_finite(path, tensors, "make the file again, with lower learning rates")
    return tensors, about["facts"]


def load_into(module: nn.Module, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Copies tensors into a module, strictly.

    Raises: InputError that lists what is missing, unexpected or mis-shaped.
    """
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own.keys() - tensors.keys()]
    wrong += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    both = own.keys() & tensors.keys()
    wrong += [f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
              for name in both if own[name].shape != tensors[name].shape]
    if wrong:
        raise InputError(f"{where}: the tensors do not fit this model: {listing(wrong)}")
    module.load_state_dict(tensors)


def sample_of(module: nn.Module, count: int = 32) -> list[float]:
    """A few of a module's values, by which its weights can be recognised in whatever dtype they are."""
    matrices = [parameter for _, parameter in sorted(module.named_parameters()) if parameter.dim() > 1]
    chosen = matrices[::max(1, len(matrices) // count)][:count]
    return [matrix.detach().flatten()[matrix.numel() // 2].item() for matrix in chosen]


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
    """What a training checkpoint says of how far it is: its step, and its optimizer's parts."""
    parts = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()
                   if name.startswith("optimizer."))
    return {"step": step, "optimizer": text_hash("\n".join(parts))}


def reached_step(tensors: dict[str, Tensor], facts: dict, where: str | Path) -> int:
    """The step that a training checkpoint has reached; what `progress` said is taken out of its facts.

    Raises: InputError if it says none of those that its run has, or if its optimizer's state is not whole.
    """
    step, parts, config = facts.pop("step", None), facts.pop("optimizer", None), facts.get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    if type(step) is not int or type(steps) is not int or not 1 <= step <= steps:
        raise InputError(f"{where}: it does not say which of its run's steps it has reached; delete it, and "
                         "the run begins anew")
    if parts != progress(tensors, step)["optimizer"]:
        raise InputError(f"{where}: the optimizer's state is not whole; delete it, and the run begins anew")
    return step


def save_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, facts: dict,
                    step: int) -> None:
    """Keeps all that `resume` needs. facts: which run it is of, with its settings as "config"."""
    tensors = module.state_dict() | optimizer_tensors(optimizer)
    save_tensors(path, "training checkpoint", tensors, {**facts, **progress(tensors, step)})


def resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> int:
    """Puts back what `save_checkpoint` kept; returns the step that it has reached.

    A run may go on to more steps. Then stage 1 ends elsewhere, and stage 2 begins anew: 0 is returned.
    Raises: InputError for a checkpoint that is damaged, or of another run; it names what differs.
    """
    tensors, saved = load_tensors(path, "training checkpoint")
    step, there, here = reached_step(tensors, saved, path), saved["config"], facts["config"]
    longer = there["steps"] < here["steps"]
    wrong = [f"{name} is {there.get(name)} there and {here[name]} here" for name in here
             if there.get(name) != here[name] and not (longer and name == "steps")]
    others = {name for name in facts if name != "config" and saved.get(name) != facts[name]}
    begins_anew = longer and facts["stage"] == 2 and others == {"origin"}
    if others and not begins_anew:
        wrong.append("other pictures, texts or methods")
    if wrong:
        raise InputError(f"{path.parent}: this folder holds another run ({'; '.join(wrong)}); choose another "
                         "--out")
    if begins_anew:
        return 0
    load_into(module, {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}, path)
    load_optimizer(optimizer, tensors)
    return step

"""Saving and loading tensors: safetensors only, written whole or not at all, checked when loaded.

The metadata of our files have a `kind`, `facts` (how the file was made) and a SHA-256. So a file of another
kind, one that is cut short, and a damaged one end in one clear error.
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
    """SHA-256 over names, dtypes, shapes and values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal(kind: str, tensors: dict[str, Tensor], facts: dict) -> str:
    """The SHA-256 of kind, tensors and facts, which the file stores."""
    return text_hash(json.dumps([kind, tensor_hash(tensors), facts], sort_keys=True))


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_finite(path: str | Path, tensors: dict[str, Tensor], advice: str) -> None:
    """Raises: InputError if a tensor contains inf or nan."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds numbers that are not finite; {advice}")


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], facts: dict) -> None:
    """Writes tensors with `facts` (JSON-able). Raises InputError for inf or nan; an existing file stays."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(path, tensors, "nothing was saved; try lower learning rates")
    about = json.dumps({"kind": kind, "sha256": seal(kind, tensors, facts), "facts": facts}, sort_keys=True)
    write_whole(path, save(tensors, {"tinyflow": about}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of a file that `save_tensors` wrote.

    Raises: InputError if the file is missing, foreign or damaged, or holds numbers that are not finite.
    """
    path = ordinary_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(json.loads((file.metadata() or {}).get("tinyflow", "{}")))
            names = file.keys() if about.get("kind") == kind else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a readable safetensors file, perhaps cut short ({reason}); "
                         "copy or make it again") from None
    found = about.get("kind", "nothing of ours")
    if found != kind:
        raise InputError(f"{path}: not a purecc-min file of kind {kind}; its kind is: {found}")
    if not isinstance(about.get("facts"), dict):
        raise InputError(f"{path}: the file's metadata have no facts; make it again")
    if about.get("sha256") != seal(kind, tensors, about["facts"]):
        raise InputError(f"{path}: the content does not match the file's SHA-256; it is damaged, "
                         "copy or make it again")
    check_finite(path, tensors, "make the file again, with lower learning rates")
    return tensors, about["facts"]


def load_into(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Copies tensors into a module. Raises InputError that lists each tensor that is missing, unexpected, or
    of a wrong shape.
    """
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own.keys() - tensors.keys()]
    wrong += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    both = own.keys() & tensors.keys()
    wrong += [f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
              for name in both if own[name].shape != tensors[name].shape]
    if wrong:
        raise InputError(f"{path}: the tensors do not fit this model: {listing(wrong)}")
    module.load_state_dict(tensors)

"""Where a command computes: on the CPU, on a CUDA card or on Apple's MPS."""

import os

import torch

from tinyflow.errors import InputError


def leave_busy_cores() -> None:
    """Takes fewer threads for torch where other programs have kept cores busy during the last minute."""
    if hasattr(os, "getloadavg"):                # not on Windows
        torch.set_num_threads(max(1, torch.get_num_threads() - round(os.getloadavg()[0])))


def choose_device(name: str = "auto") -> torch.device:
    """A device by its name; "auto" takes CUDA, then MPS, then the CPU.

    Raises: InputError if this machine does not have it.
    """
    leave_busy_cores()
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: torch can use none on this machine; try --device cpu") from None

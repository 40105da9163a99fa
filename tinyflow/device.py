"""Where a command computes: on the CPU, on a CUDA card or on Apple's MPS."""

import torch

from tinyflow.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """A device by its name; "auto" takes CUDA, then MPS, then the CPU.

    Raises: InputError if this machine does not have it.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: torch can use none on this machine; try --device cpu") from None

"""What all lessons use: how pictures are shown, and how exercises are checked.

A blank exercise raises `YourTurn`, an answer that is not right yet `NotYet`. Both show one line in a notebook
in place of a traceback. Read next: build.py, which makes the notebooks.
"""

import os
from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

INK, CORAL, BLUE, GOLD, GREY = "#2b2d42", "#e4572e", "#2e86ab", "#e9a23b", "#b9bac4"
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False,
                     "axes.spines.top": False, "axes.spines.right": False, "image.interpolation": "nearest"})

if hasattr(os, "getloadavg"):                    # a notebook has loaded torch, so PASSIVE would come too late
    torch.set_num_threads(max(1, torch.get_num_threads() - round(os.getloadavg()[0])))


def show(pictures: Sequence[np.ndarray], titles: Sequence[str] = (), left: Sequence[str] = (),
         columns: int = 6, side: float = 1.35) -> None:
    """uint8 pictures [H, W, 3], `columns` in a row; titles stand above the first row, `left` beside rows."""
    rows = -(-len(pictures) // columns)
    _, axes = plt.subplots(rows, columns, squeeze=False, layout="compressed",
                           figsize=(side * columns + 0.6, side * rows + 0.4))
    for n, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[], frame_on=False, title=titles[n] if n < len(titles) else "")
        if n < len(pictures):
            axis.imshow(pictures[n])
    for axis, label in zip(axes[:, 0], left):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    plt.show()


class OneLine(Exception):
    def _render_traceback_(self) -> list[str]:   # IPython asks an exception for this
        return [str(self)]


class YourTurn(OneLine):
    def __init__(self, exercise: str):
        super().__init__(f"Exercise {exercise} is still blank: write it above, run its cell, and come back.")


class NotYet(OneLine):
    """An answer that the check has refused; the message says what to look at."""


def expect(condition: bool, hint: str) -> None:
    """Raises: NotYet with the hint."""
    if not condition:
        raise NotYet("Not yet: " + hint)


def expect_close(yours: Tensor, ours: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raises: NotYet if yours is no tensor, or differs in its shape or its values."""
    expect(isinstance(yours, Tensor), f"{what}: a tensor is wanted, and there is {type(yours).__name__}.")
    expect(yours.shape == ours.shape, f"{what}: the shape should be {list(ours.shape)}, and is "
                                      f"{list(yours.shape)}.")
    largest = (yours.detach() - ours.detach()).abs().max().item()
    expect(torch.allclose(yours, ours, atol=tolerance, rtol=tolerance),
           f"{what}: the shape is right, and the values are not; they differ by up to {largest:.2g}.")

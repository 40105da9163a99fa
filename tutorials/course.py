"""What all lessons use: how pictures are shown, and how exercises are checked.

A blank exercise raises `YourTurn`, an answer that is not right yet `NotYet`. Both show one line in a notebook
in place of a traceback. So does an exception inside an answer, with the learner's own line number.
"""

import dis
import functools
import inspect
import linecache
import re
import sys
import traceback
from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from tinyflow.device import leave_busy_cores

INK, CORAL, BLUE, GOLD, GREY = "#2b2d42", "#b23a17", "#1d6283", "#e9a23b", "#6b6d7c"
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False,
                     "axes.spines.top": False, "axes.spines.right": False, "image.interpolation": "nearest"})

GIVEN = "# given"                                # below it, the lesson's own lines go on (build.py writes it)
EXERCISE, CHECK = "# Exercise ", "# Check "      # the first lines of such cells, with the exercise's number
PACKAGES = ("tinyflow", "purecc_min")
HINTS = {                                        # what an exception's own words do not say
    "NoneType": " Something is None there: is a return missing?",
    "does not require grad": " The loss has no gradient: was it computed under no_grad, or detached?",
    "values to unpack": " Does each function return as many things as the exercise says?",
}

leave_busy_cores()


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


def in_lines(text: str) -> str:
    """A caption in short lines, for a picture's title."""
    return re.sub(r" (?=(on|in|at|and|with) )", "\n", text).replace(", ", ",\n")


# -------------------------------------------------------------------------------------------- blank exercises
class OneLine(Exception):
    def _render_traceback_(self) -> list[str]:   # IPython asks an exception for this
        return [str(self)]


class YourTurn(OneLine):
    """Raised where an answer belongs. It looks at its own cell: is there code below it already?"""

    def __init__(self, exercise: str):
        caller = sys._getframe(1)
        line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
        if below(caller.f_code.co_filename, caller.f_lineno):
            text = (f"Exercise {exercise}: there is code below the raise, and it is never reached: "
                    f"delete the line {line.strip()!r}, run the cell again, and come back.")
        else:
            text = f"Exercise {exercise} is still blank: write it above, run its cell, and come back."
        super().__init__(text)


def below(filename: str, number: int) -> list[str]:
    """The code that stands below a line, in the same block and above the lesson's own lines (GIVEN)."""
    lines = [line.rstrip() for line in linecache.getlines(filename)]
    indent, found = len(lines[number - 1]) - len(lines[number - 1].lstrip()) if lines else 0, []
    for line in lines[number:]:
        if line.strip() == GIVEN or line and len(line) - len(line.lstrip()) < indent:
            break
        if line and not line.lstrip().startswith("#"):
            found.append(line)
    return found


# ------------------------------------------------------------------------------------------------- the checks
class NotYet(OneLine):
    """An answer that the check has refused; the message says what to look at."""


def expect(condition: bool | None, hint: str) -> None:
    """Raises: NotYet with the hint, or with another one where an answer was None."""
    if condition is None:
        raise NotYet("Not yet: your function returned None: is the return missing?")
    if not condition:
        raise NotYet("Not yet: " + hint)


def expect_close(yours: Tensor, ours: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raises: NotYet if yours is no tensor, or differs in its shape or its values."""
    what = what.rstrip(",")
    expect(yours is not None, f"{what}: it returned None: is the return missing?")
    expect(isinstance(yours, Tensor), f"{what}: a tensor is wanted, and there is {type(yours).__name__}.")
    expect(yours.shape == ours.shape, f"{what}: the shape should be {list(ours.shape)}, and is "
                                      f"{list(yours.shape)}.")
    yours, ours = yours.detach().double(), ours.detach().double()
    expect(torch.allclose(yours, ours, atol=tolerance, rtol=tolerance),
           f"{what}: the shape is right, and the values are not; {difference(yours, ours, tolerance)}.")


def rule_out(yours: Tensor | float | None, mistakes: dict[str, Tensor | float]) -> None:
    """Refuses what usual mistakes give. mistakes: what is wrong -> the values that this mistake gives.

    Raises: NotYet for the first mistake whose values are yours, and where an answer was None.
    """
    expect(yours is not None, "it returned None: is the return missing?")
    if not isinstance(yours, (Tensor, float)):
        return                                   # `expect_close` says what is wanted
    yours = torch.as_tensor(yours).detach().double()
    for what, wrong in mistakes.items():
        wrong = torch.as_tensor(wrong).detach().double()
        near = 1e-4 * wrong.abs().max().item()
        expect(yours.shape != wrong.shape or not torch.allclose(yours, wrong, rtol=1e-4, atol=near), what)


def several(answer: Sequence | None, what: Sequence[str]) -> Sequence:
    """The answer, if it is a tuple or list with as many parts as `what` names. Raises: NotYet if not."""
    expect(answer is not None, "it returned None: is the return missing?")
    are = len(answer) if isinstance(answer, (tuple, list)) else f"one {type(answer).__name__}"
    expect(are == len(what), f"return {len(what)} things, {', '.join(what)}; there is {are}.")
    return answer


def difference(yours: Tensor, ours: Tensor, tolerance: float) -> str:
    """What two tensors of one shape have in common, where that is to be seen."""
    def close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, atol=tolerance, rtol=tolerance)

    if not yours.isfinite().all():
        return "some are nan or infinite"
    factor = (yours * ours).sum() / ours.square().sum()
    if close(yours, -ours):
        return "every one has the other sign"
    if ours.numel() == 1:
        return f"it is {yours.item():.4g}, and should be {ours.item():.4g}"
    if factor.isfinite() and factor.abs() > 1e-3 and close(yours, factor * ours):
        return f"every one is {factor:.4g} times what it should be"
    if ours.numel() > 1 and close(yours.flatten().sort()[0], ours.flatten().sort()[0]):
        return "they are the right numbers in another order"
    return f"they differ by up to {(yours - ours).abs().max():.2g}"


def own_work(*answers, without: str) -> None:
    """Refuses the package's own functions as an answer; `without` names those that the check compares with.

    `python -m tutorials.build` writes this line above each check that compares with the package.
    """
    for answer in answers:
        while isinstance(answer, functools.partial):
            answer = answer.func
        home = (getattr(answer, "__module__", None) or "").split(".")[0]
        expect(home not in PACKAGES, f"{getattr(answer, '__qualname__', answer)} is the package's own; write "
                                     "yours, and the check compares the two.")
        parts = vars(answer).values() if isinstance(answer, type) else [answer]
        for part in parts:
            code = getattr(inspect.unwrap(part) if callable(part) else part, "__code__", None)
            for name in sorted(names_in(code)) if code else ():
                own = name not in without.split(", ") and name.split(".")[0] not in PACKAGES
                expect(own, f"{name} is the package's own answer; write it out yourself.")


def names_in(code) -> set[str]:
    """The dotted names that a function, or one inside it, uses and imports, such as flow.path."""
    inner = [names_in(constant) for constant in code.co_consts if inspect.iscode(constant)]
    names, dotted = set(), ""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "IMPORT_NAME"):
            dotted = step.argval
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and dotted:
            dotted = f"{dotted}.{step.argval}"
        else:
            dotted = ""
        names.add(dotted)
    return names.union(*inner)


# ---------------------------------------------------------------------------------- an exception in an answer
def stopped(error: BaseException, cells: dict) -> str | None:
    """One line for an exception that came out of an exercise's cell, or that stopped a check, and for a name
    that a cell above should have made.

    None for every other exception, which keeps its traceback: it is not the learner's. `cells` is the
    namespace of the notebook, by which a function that was written in one of its cells is known.
    """
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_globals is cells]
    marked = [(code, line, linecache.getline(code.co_filename, 1).strip()) for code, line in frames]
    exercise = [found for found in marked if found[2].startswith(EXERCISE)]
    check = [found for found in marked if found[2].startswith(CHECK)]
    if isinstance(error, NameError) and (missing := getattr(error, "name", "")) and not exercise:
        return f"Not yet: `{missing}` is not there: a cell above has not run to its end (a blank exercise?)."
    if not exercise and not check:
        return None
    code, line, mark = (exercise or check)[-1]   # the innermost
    said = " ".join(str(error).split())
    hint = next((hint for words, hint in HINTS.items() if words in said), "")
    place = f"the check {mark.removeprefix(CHECK)} stops in its line {line}"
    if exercise:
        name = code.co_qualname.split(".<locals>")[0]
        inside = "its cell" if name == "<module>" else f"your `{name}`"
        place = f"exercise {mark.removeprefix(EXERCISE)} stops in {inside}, line {line} of the cell"
    text = linecache.getline(code.co_filename, line).split("  #")[0].strip()
    return f"Not yet: {place}, `{text[:90]}`, with {type(error).__name__}: {said[:200].rstrip('.')}.{hint}"


def show_one_line(shell, kind, error, trace, tb_offset=None) -> None:
    """IPython calls this for each exception of a cell."""
    text = None if isinstance(error, OneLine) else stopped(error, shell.user_ns)
    if text:
        shell._showtraceback(NotYet, NotYet(text), [text])
    else:
        shell.showtraceback((kind, error, trace), running_compiled_code=True)


if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
    shell.set_custom_exc((Exception,), show_one_line)

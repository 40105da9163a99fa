"""Errors for people: what was wrong, where, and what to do, on one line, with exit code 2.

Anything that a user can cause raises InputError; a command runs its work inside `report_errors`. A bug
keeps its traceback.
"""

import argparse
import contextlib
import errno
import sys

import torch


class InputError(ValueError):
    """Something that the user gave cannot be used. The message says what, where, and what to do."""


def positive(text: str) -> int:
    """The type of a command's option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def listing(items: list[str], shown: int = 6) -> str:
    """Many complaints on one line: the first few, in order, and how many more there are."""
    more = f"; and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(sorted(items)[:shown]) + more


INTACT = "what was saved before is intact"


def explain(error: BaseException) -> str | None:
    """One line for an error that a user can mend; None for a bug."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"error: cannot write {error.filename or 'the output'}: {error.strerror.lower()}; {INTACT}"
    exhausted = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    if exhausted or "can't allocate memory" in str(error):
        return f"error: out of memory; choose a smaller --batch, --number or --size; {INTACT}"
    return None


@contextlib.contextmanager
def report_errors():
    """Turns bad input, a full or read-only disk, exhausted memory (exit 2) and Ctrl-C (130) into one line."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(2)

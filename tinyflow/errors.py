"""Errors for people: what was wrong, where, and what to do, on one line, with exit code 2.

Anything that a user can cause raises InputError; a command runs its work inside `report_errors`, and its
options are of the types below, which say what they take. A bug keeps its traceback.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

LINE = 300                                       # characters of an error at most
INTACT = "what was saved before is intact"


class InputError(ValueError):
    """Something that the user gave cannot be used. The message says what, where, and what to do."""


# ------------------------------------------------------------------------------------------ what a line shows
def shown(text: str, most: int = 60) -> str:
    """What a user wrote, in quotes; the middle of a long text is left out."""
    text = str(text)
    return repr(text if len(text) <= most else f"{text[:most - 15]} ... {text[-10:]}")


def listing(items: list[str], most: int = 6) -> str:
    """Many complaints on one line: the first few, in order, and how many more there are."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(sorted(items)[:most]) + more


def one_line(message: str) -> str:
    """A message without line breaks. Of a long one the beginning says what is wrong, the end what to do."""
    message = " ".join(message.split())
    return message if len(message) <= LINE else f"{message[:LINE - 115]} ... {message[-110:]}"


# ---------------------------------------------------------------------------------------- options of commands
def number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], int | float]:
    """The type of an option that is a number from `least` to `most`."""
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {name}") from None
        if not least <= value <= most:           # nan is not, either
            raise argparse.ArgumentTypeError(f"{shown(text)} is not between {least:g} and {most:g}")
        return value
    return read


positive = number(int, 1, 10**6)                 # something that is counted
seed = number(int, 0, 2**32 - 1)


def file_path(text: str) -> Path:
    """The type of an option that is a file or a folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a path")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A parser that says on one line what is wrong, and where the options are explained."""

    def error(self, message: str) -> None:
        print(one_line(f"error: {message}; see {self.prog} --help"), file=sys.stderr)
        sys.exit(2)


# ----------------------------------------------------------------------------------------------- the one line
def explain(error: BaseException) -> str | None:
    """One line for an error that a user can mend; None for a bug."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: cannot use {error.filename}: {error.strerror.lower()}; {INTACT}, choose another place"
    exhausted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"     # torch's
    if exhausted or "can't allocate memory" in str(error):
        return f"error: out of memory; choose a smaller --batch, --rank, --number or --size; {INTACT}"
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
        print(one_line(message), file=sys.stderr)
        sys.exit(2)

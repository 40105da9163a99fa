"""What all commands have in common: types of options, and error messages of one line.

A command runs its work inside `report_errors`, with exit code 2 for bad input. A bug keeps its traceback.
"""

import argparse
import codecs
import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tinyflow.errors import InputError, shown

LINE = 300                                       # characters of an error at most
EXHAUSTED = ("out of memory", "allocate memory", "alloc_failed")       # of torch and of the system
INTACT = "what was saved before is intact"
ASCII = {"\u2191": "^", "\u2193": "v", "\u2192": "->", "\u00b1": "+-", "\u2588": "#"}


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
    if any("\ud800" <= character <= "\udfff" for character in text):         # Linux allows any bytes
        raise argparse.ArgumentTypeError(f"{shown(text)} is no name in UTF-8; rename it")
    return Path(text).expanduser()


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
                        help="auto takes CUDA, then MPS, then CPU")


class Parser(argparse.ArgumentParser):
    """A parser that says on one line what is wrong, and where the options are explained."""

    def error(self, message: str) -> None:
        print(one_line(f"error: {message}; see {self.prog} --help"), file=sys.stderr)
        sys.exit(2)


# ----------------------------------------------------------------------------------------------- the one line
def one_line(message: str) -> str:
    """One line. A long message loses its middle: its start says what is wrong, its end what to do."""
    message = " ".join(message.split())
    return message if len(message) <= LINE else f"{message[:LINE - 115]} ... {message[-110:]}"


def explain(error: BaseException) -> str | None:
    """One line for an error that a user can correct; None for a bug."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or "the output"
        return f"error: cannot use {place}: {error.strerror.lower()}; {INTACT}, choose another place"
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return f"error: the package {error.name} is not installed; pip install -r requirements.txt"
    if isinstance(error, MemoryError) or any(said in str(error).lower() for said in EXHAUSTED):
        return f"error: out of memory; choose a smaller --batch, --rank, --number or --size; {INTACT}"
    return None


@contextlib.contextmanager
def report_errors(goes_on: bool = False):
    """Turns bad input, a full or read-only disk, exhausted memory (exit 2) and Ctrl-C (130) into one line.

    A pipe that nobody reads any more ends the command quietly. What the terminal cannot show is written in
    ASCII.

    goes_on: whether the same command goes on where it was stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="in_ascii")
    try:
        yield
        if sys.stdout:                           # it may be closed
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped" + "; the same command goes on from the last checkpoint" * goes_on, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(one_line(message), file=sys.stderr)
        sys.exit(2)


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that the terminal's encoding lacks: a codec error handler."""
    lost = error.object[error.start:error.end]
    return "".join(ASCII.get(character, "?") for character in lost), error.end


codecs.register_error("in_ascii", in_ascii)

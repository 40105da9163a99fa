"""Errors for people: what was wrong, where, and what to do, on one line, with exit code 2.

Anything a user can cause raises InputError; a command runs its work inside `report_errors`. A bug keeps its traceback.
"""

import argparse
import contextlib
import errno
import sys

import torch


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where, and what to do."""


def positive(text: str) -> int:
    """The type of a command's option that counts something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def listing(items: list[str], shown: int = 6) -> str:
    """Many complaints on one line: the first few, in order, and how many more there are."""
    return "; ".join(sorted(items)[:shown]) + (f"; and {len(items) - shown} more" if len(items) > shown else "")


@contextlib.contextmanager
def report_errors():
    """Turns an InputError, a full or read-only disk, exhausted memory and Ctrl-C into one line on stderr and an exit code (2; 130 for Ctrl-C)."""
    try:
        yield
    except InputError as error:
        message, code = f"error: {error}", 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        message, code = f"error: cannot write {error.filename or 'the output'}: {error.strerror.lower()}; what was saved before is intact", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        message, code = "error: out of memory; choose a smaller --batch, --number or --size; what was saved before is intact", 2
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on from the last checkpoint", 130
    else:
        return
    print("\n" + message if code == 130 else message, file=sys.stderr)
    sys.exit(code)

"""Files, read and written in one way: under another name first, and then renamed, so whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path

from tinyflow.errors import InputError


def ordinary_file(path: str | Path) -> Path:
    """The path of a file that can be read to its end. Raises InputError if it is missing or another thing."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: this is a {'folder' if path.is_dir() else 'device or a pipe'}, not a file")
    return path


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes beside the file and renames: a reader finds the old file or the new one, never half of one.

    Raises: OSError with the file's name, for example when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")      # nobody has taken this name
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None

"""Writing files: under a temporary name first, then renamed, so that no file is ever half written."""

import contextlib
import os
import secrets
from pathlib import Path

from tinyflow.errors import InputError


def ordinary_file(path: str | Path) -> Path:
    """Returns the path if it is an ordinary file. Raises InputError if it is missing, or another thing."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: this is a {'folder' if path.is_dir() else 'device or a pipe'}, not a file")
    return path


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a temporary file in the same folder and renames it: a reader never finds half a file.

    Raises: OSError with the file's name, for example when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")   # a name that no other file has
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None

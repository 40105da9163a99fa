"""Files: every command reads and writes them in one way.

A text is UTF-8, with or without a byte-order mark. A file is written beside its place and then renamed, so
it is there whole or not at all. Where a result is to go is looked at before any work is done for it, and a
folder in use is locked. Read next: weights.py.
"""

import contextlib
import errno
import io
import json
import math
import os
import secrets
from itertools import chain, count
from pathlib import Path
from typing import Iterable

from PIL import Image

from tinyflow.errors import InputError

try:
    import fcntl
except ModuleNotFoundError:                      # Windows has none: there nothing is locked
    fcntl = None

LARGEST_TEXT = 10_000_000                        # bytes


def ordinary_file(path: str | Path) -> Path:
    """The path of a file that can be read to its end. Raises InputError if it is missing or another thing."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: this is a {'folder' if path.is_dir() else 'device or a pipe'}, not a file")
    return path


def read_text(path: str | Path, largest: float = LARGEST_TEXT) -> str:
    """A text file's content. Raises InputError if it is missing, larger than `largest` bytes,
    or not UTF-8.
    """
    path = ordinary_file(path)
    if path.stat().st_size > largest:
        raise InputError(f"{path}: a text of {path.stat().st_size / 1e6:.0f} MB; that cannot be right")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 (at byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path}: it holds null characters; save it as a text in UTF-8")
    return text


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_log(file: Path) -> list[dict]:
    """The rows of a log, none if it is not there. Raises InputError if it is damaged."""
    lines = read_text(file, math.inf).splitlines() if file.exists() else []
    try:
        rows = [dict(json.loads(line)) for line in lines]
        if not all(type(row["step"]) is int and all(map(is_number, row.values())) for row in rows):
            raise ValueError
        return sorted(rows, key=lambda row: row["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{file}: damaged; delete it, and the run goes on without it") from None


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


def free_name(path: Path) -> Path:
    """The path, or with -2, -3, ... before its ending the first at which there is no file."""
    names = chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in count(2)))
    return next(name for name in names if not os.path.lexists(name))


def write_picture(path: str | Path, picture: Image.Image) -> None:
    """Writes a PNG, whole or not at all."""
    data = io.BytesIO()
    picture.save(data, "png")
    write_whole(path, data.getvalue())


def check_output(path: Path, suffix: str, inputs: Iterable[Path] = ()) -> None:
    """Raises: InputError if no file can be written there, if its name does not end in `suffix`, or if it is
    one of the inputs; OSError for a path that the system refuses.
    """
    if path.suffix.lower() != suffix:
        raise InputError(f"--out {path}: its name must end in {suffix}")
    check_place(path.parent)
    if not present(path):
        return
    if not path.is_file():
        raise InputError(f"--out {path}: this is no file that could be replaced; choose another --out")
    for file in inputs:
        if file.exists() and path.samefile(file):
            raise InputError(f"--out {path}: this is one of the inputs; choose another --out")


def check_place(folder: Path) -> None:
    """Raises: InputError or OSError if no file can be put into the folder, which need not be there yet."""
    while not present(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"--out: {folder} is a file, not a folder; choose another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def make_folder(folder: Path) -> None:
    """Makes a folder that results can be written to, if it is not there. Raises as `check_place` does."""
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)


def present(path: Path) -> bool:
    """Whether something is there. Raises OSError for a name too long, or a link that leads to itself."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path):
    """Within this context no other process has this folder locked. Raises InputError if one does.

    The system takes the lock away when a process ends, however it ends.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{folder}: another process is at work in this folder; wait for it, or choose "
                         "another --out") from None
    try:
        yield
    finally:
        os.close(descriptor)

"""What commands read from a disk, and where their results go.

A text is UTF-8, with or without a byte-order mark. A path for results is checked before any work starts, and
a folder in use is locked.
"""

import contextlib
import errno
import io
import json
import os
from itertools import chain, count
from pathlib import Path
from typing import Iterable

from PIL import Image

from tinyflow.errors import InputError, shown
from tinyflow.files import ordinary_file, write_whole

try:
    import fcntl
except ModuleNotFoundError:                      # Windows has none: there nothing is locked
    fcntl = None


LARGEST_TEXT = 10_000_000                        # bytes


def read_text(path: str | Path, largest: float = LARGEST_TEXT) -> str:
    """A text file's content. Raises InputError if it is missing, larger than `largest` bytes,
    or not UTF-8.
    """
    path = ordinary_file(path)
    if path.stat().st_size > largest:
        raise InputError(f"{path}: {path.stat().st_size / 1e6:.0f} MB are too large for a text")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 (at byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path}: it holds null characters; save it as a text in UTF-8")
    return text


def read_json(path: str | Path, advice: str) -> dict:
    """A file's JSON object. Raises InputError if it is damaged; advice: what to do then."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged; {advice}")
    return found


def free_name(path: Path) -> Path:
    """The path if it is free; otherwise the first free one of name-2.ext, name-3.ext, ..."""
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
    if len(path.name.encode()) > 220:            # longer names stand next to it: name-seed0.png
        raise InputError(f"--out: the name {shown(path.name)} is too long; choose a shorter one")
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
        if folder == folder.parent:              # a drive that is not there
            raise InputError(f"--out: there is no {folder}; choose another --out")
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

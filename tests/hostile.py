"""One case of bad input: a folder full of traps, a command that runs in it, and how it must end.

It must end with exit code 2 and ONE line of at most 300 characters. Every file that was there must be byte
for byte as it was, nothing new may lie there, and nothing may wait for ever.
"""

import contextlib
import io
import os
import shutil
import signal
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, NamedTuple

from purecc_min import __main__ as purecc_min
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING
from tinyflow.terminal import LINE

REFERENCES, WORD = FOLDER / TUNING[0], CONCEPTS[TUNING[0]].class_word
LONG = "x" * 300
LIMIT = 60                                       # seconds after which a case is taken to wait for ever
STOP = "nothing.txt: there is no text in it"     # `learn` says so when it has read all of the folder
Prepare = Callable[[Path], None]


class Case(NamedTuple):
    kind: str
    name: str                                    # of what is bad about it
    arguments: tuple                             # of the command
    prepare: Prepare | None = None               # spoils something in the case's folder
    main: Callable[[list[str]], None] = purecc_min.main
    says: str = ""                               # what the line must hold


class Hang(BaseException):
    """No error that a command could catch."""


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def outcome(case: Case, root: Path) -> str:
    """"clear", or in a few words what is wrong with how the command ended."""
    before, said, names = contents(root), io.StringIO(), set(root.rglob("*"))
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            case.main(list(map(str, case.arguments)))
        ended = "accepted"
    except SystemExit as end:
        ended = end.code
    except Hang:
        return "waits for ever"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
    lines = said.getvalue().replace("\x1b[A", "").splitlines()
    lines = [line for line in lines if line.strip() and "%|" not in line]    # a progress bar is no message
    if any(contents(root).get(path) != data for path, data in before.items()):
        return "lost: a file that was there is gone, or another one"
    if ended != 2:
        return f"{ended}: {lines}"
    left = [path for path in set(root.rglob("*")) - names if path.is_file() or path.name != "out"]
    if left:
        return f"left behind: {left}"
    good = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) <= LINE
    return "clear" if good and case.says in lines[0] else f"unclear: {lines}"


def hangs(*_) -> None:
    raise Hang


def set_traps(root: Path) -> None:
    """A folder of references, and everything that a path can be by mistake."""
    shutil.copytree(REFERENCES, root / "photos")
    for name in ("theirs", "folder.png", "empty"):
        (root / name).mkdir()
    for name, text in (("file", "mine"), ("nothing.txt", " \n"), ("theirs/thesis.txt", "mine"),
                       ("sheet.png", "an older sheet")):
        (root / name).write_text(text)
    for name in ("loop", "loop.png"):
        (root / name).symlink_to(root / name)
    for name in ("pipe", "pipe.png"):
        os.mkfifo(root / name)
    shutil.copy(FOLDER.parent / "learned" / "dotted_house-bound.safetensors", root / "good.safetensors")


def run(case: Case) -> str:
    """The outcome of a case, in a folder of its own."""
    here = os.getcwd()
    with TemporaryDirectory() as place:
        root = Path(place)
        set_traps(root)
        if case.prepare:
            case.prepare(root)
        os.chdir(root)
        try:
            return outcome(case, root)
        finally:
            os.chdir(here)

"""A place full of traps, and the one way in which every command must fail in it.

test_bad_input.py and test_bad_files.py use it.
"""

import os
import shutil
from pathlib import Path

import pytest

from purecc_min import __main__ as purecc_min
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING
from tinyflow.errors import LINE

REFERENCES, WORD = FOLDER / TUNING[0], CONCEPTS[TUNING[0]].class_word
LONG = "x" * 300


def set_traps(root: Path) -> None:
    """A folder of references, and everything that a path can be by mistake."""
    shutil.copytree(REFERENCES, root / "photos")
    (root / "file").write_text("mine")
    (root / "theirs").mkdir()
    (root / "theirs" / "thesis.txt").write_text("mine")
    (root / "loop").symlink_to(root / "loop")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "folder.png").mkdir()
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe")
    (root / "sheet.png").write_bytes(b"an older sheet")


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(capsys, root: Path, main, *arguments) -> str:
    """Runs a command in `root` that must fail well; returns its line."""
    before, here = contents(root), os.getcwd()
    os.chdir(root)
    try:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
    finally:
        os.chdir(here)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert caught.value.code == 2 and len(lines) == 1, (caught.value.code, lines)
    assert lines[0].startswith("error: ") and len(lines[0]) <= LINE, lines[0]
    assert contents(root) == before
    assert not (root / "out").exists() or not list((root / "out").iterdir())
    return lines[0]


def learn_spoiled(capsys, photos: Path, *options) -> str:
    return refused(capsys, photos.parent, purecc_min.main, "learn", photos.name, "--class-word", WORD,
                   "--out", "out", *options)

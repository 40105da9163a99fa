"""The package as pip installs it: code, weights and references, usable from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import purecc_min, tinyflow
from pathlib import Path
from purecc_min.__main__ import main
from purecc_min.commands.folder import load_concept
from purecc_min.measure.toy import CONCEPTS, FOLDER
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
assert {Path(package.__file__).parent.parent for package in (purecc_min, tinyflow)} == {Path(SITE)}
pipe = load_tiny()
pixels = pipe.decode(pipe.sample(pipe.encode_text(["a red cat"]), [0], steps=2))
Reader.shipped()(pixels)
for folder in FOLDER.iterdir():
    assert len(load_concept(folder, CONCEPTS[folder.name].class_word, pipe.picture_size).references) == 4
main(["words"])
"""


def test_an_installed_package_brings_all_that_it_needs(tmp_path):
    site, source = tmp_path / "site", tmp_path / "source"
    for name in ("tinyflow", "purecc_min", "tests"):     # a copy: building leaves files beside the source
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", site, source]
    subprocess.run([sys.executable, *install], check=True)
    used = subprocess.run([sys.executable, "-c", f"SITE = {str(site)!r}\n{USE}"], cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True)
    assert used.returncode == 0 and "robot" in used.stdout, used.stderr
    assert not list(site.glob("tests")), "tests are not installed"


@pytest.mark.parametrize("extra, file", [("course", "tutorials"), ("test", "tests")])
def test_an_extra_is_what_its_requirements_say(extra, file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = (ROOT / file / "requirements.txt").read_text().splitlines()
    wanted = [row.partition("#")[0].strip() for row in rows]
    assert project["optional-dependencies"][extra] == [row for row in wanted if row]

"""The house: what is core, how large it may grow, which way imports run, and what pip installs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "purecc_min" / "measure" / "references" / "checked_robot"
CORE = re.findall(r"^\| \[([a-z_/0-9]+\.py)\]", (ROOT / "README.md").read_text(), re.MULTILINE)
SERVANTS = ["tinyflow/errors.py", "tinyflow/files.py", "tinyflow/weights.py"]      # that the core imports
CORE_LINES, SERVANT_LINES = 1500, 150
FILE_LINES, FUNCTION_LINES = 400, 60             # ruff counts the columns

# Each layer may import those before it, and none after it.
LAYERS = ["tinyflow", "tinyflow.sd3", "tinyflow.picturebook", "purecc_min", "purecc_min.measure",
          "purecc_min.benchmark", "purecc_min.commands", "tutorials", "tests"]
FORBIDDEN = {("tinyflow.picturebook", "tinyflow.sd3"), ("purecc_min", "tinyflow.sd3"),
             ("purecc_min", "tinyflow.picturebook"), ("purecc_min.measure", "tinyflow.sd3"),
             ("purecc_min.benchmark", "tinyflow.sd3"), ("purecc_min.commands", "purecc_min.benchmark")}
EVERYTHING = {"purecc_min.__main__", "purecc_min.algorithm"}  # the entry point, and the script of the core
SOURCES = [path for package in ("tinyflow", "purecc_min", "tutorials")
           for path in (ROOT / package).rglob("*.py") if path.parent.name != "lessons"]      # of notebooks


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> str:
    """The deepest layer that a module lies in."""
    return max((layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")), key=len)


def imports_of(path: Path) -> set[str]:
    """Modules of this project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {module_of(source) for source in SOURCES}
    return found & modules


def test_the_core_is_small_and_runs_by_itself(tmp_path):
    """A course is taught from these files. With the weights and a folder of pictures they are enough."""
    assert len(CORE) == 16 and CORE[-1] == "purecc_min/algorithm.py"
    for files, most in ((CORE, CORE_LINES), (SERVANTS, SERVANT_LINES)):
        assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= most
    for folder in ("tinyflow", "tinyflow/picturebook", "purecc_min"):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / "__init__.py", tmp_path / folder)
    for file in CORE + SERVANTS:
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / "tinyflow" / "picturebook" / "weights", tmp_path / "tinyflow/picturebook/weights")
    line = [sys.executable, "-m", "purecc_min.algorithm", REFERENCES, "--steps", "2", "--out", "out"]
    ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pictures.png", "concept.safetensors"}


def test_no_import_runs_back_up_or_in_a_circle():
    graph = {module_of(path): imports_of(path) - {module_of(path)} for path in SOURCES}
    assert list(TopologicalSorter(graph).static_order())     # it raises a CycleError
    for module in graph.keys() - EVERYTHING:
        for imported in graph[module]:
            mine, theirs = layer_of(module), layer_of(imported)
            assert LAYERS.index(theirs) <= LAYERS.index(mine), f"{module} imports {imported}"
            assert (mine, theirs) not in FORBIDDEN, f"{module} imports {imported}"


def test_everything_imports_and_runs_without_what_only_unix_has():
    """No command started where the module `resource` is missing (Windows)."""
    script = "import os, sys\nfor name in ('resource', 'fcntl'): sys.modules[name] = None\n" \
             "import torch\ndel os.sysconf, os.sched_getaffinity\nimport importlib\n"
    modules = [module_of(path) for path in SOURCES if path.name not in ("__main__.py", "algorithm.py")]
    script += "".join(f"importlib.import_module({name!r})\n" for name in modules)
    script += "from purecc_min.commands.memory import free_memory\nfree_memory(torch.device('cpu'))\n"
    script += "from purecc_min.__main__ import main\nmain(['words'])\n"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_loading_public_weights_does_not_pull_in_the_renderer():
    code = "import sys, purecc_min.commands.learn, purecc_min.commands.sample\n" \
           "print([name for name in sys.modules if 'picturebook.r' in name or 'measure' in name])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_files_and_functions_stay_short():
    wrong = []
    for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]:
        lines = path.read_text().splitlines()
        wrong += [f"{path}: {len(lines)} lines"] * (len(lines) > FILE_LINES)
        wrong += [f"{path}: {node.name}" for node in ast.walk(ast.parse(path.read_text()))
                  if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES]
    assert not wrong


def test_links_on_every_page_lead_somewhere():
    pages = [path for path in ROOT.rglob("*.md") if not {"output", ".pytest_cache"} & set(path.parts)]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert not [(page, target) for page, target in links if not target.startswith(("http", "#", "<"))
                and not (page.parent / target.partition("#")[0]).exists()]


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

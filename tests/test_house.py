"""The house: what is core, how large it may grow, and which way imports run."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "purecc_min" / "measure" / "references" / "checked_robot"
CORE = [f"{name}.py" for name in (
    "tinyflow/flow", "tinyflow/attention", "tinyflow/mmdit", "tinyflow/text", "tinyflow/phrase",
    "tinyflow/tokenizer", "tinyflow/vae", "tinyflow/pipeline", "tinyflow/picturebook/model",
    "purecc_min/concept", "purecc_min/embeddings", "purecc_min/lora", "purecc_min/branch",
    "purecc_min/objective", "purecc_min/train", "purecc_min/algorithm")]
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


def test_the_readme_names_the_core_in_its_order():
    named = re.findall(r"^\| \[([a-z_/0-9]+\.py)\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == CORE


def test_links_on_every_page_lead_somewhere():
    pages = [path for path in ROOT.rglob("*.md") if not {"output", ".pytest_cache"} & set(path.parts)]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert not [(page, target) for page, target in links if not target.startswith(("http", "#", "<"))
                and not (page.parent / target.partition("#")[0]).exists()]

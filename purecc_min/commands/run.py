"""What the commands share: the folder that a run owns, and its progress bars.

A folder belongs to one run, and to one process at a time. Its run.json (settings, versions) says which run it
is. The same run may go on to more steps. A run that ends before it has saved anything leaves nothing, so a
corrected command can start there.
"""

import contextlib
import json
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from tqdm import tqdm

from purecc_min.concept import ConceptSet
from purecc_min.train import TrainConfig
from tinyflow.disk import check_place, locked, present, read_json
from tinyflow.errors import InputError, shown
from tinyflow.files import write_whole

# the names of a run's files
OURS = re.compile(r"(run\.json|table\.md|results\.json|[\w-]*(stage|concept|samples|imagined|comparison)"
                  r"[\w-]*\.(safetensors|jsonl|png))(\.[0-9a-f]{8}\.part)?")


def check_run_folder(folder: Path) -> None:
    """Raises: InputError or OSError if the folder cannot be used for a run. Called before any work."""
    check_place(folder)
    found = sorted(path.name for path in folder.iterdir()) if present(folder) else []
    others = [name for name in found if not name.startswith(".") and not is_part(name)]
    if others and not (folder / "run.json").exists():
        raise InputError(f"{folder}: this folder holds other files, such as {shown(others[0])}; choose "
                         "another --out")


def is_part(name: str) -> bool:
    """Whether a file is what an interrupted write of ours has left."""
    return name.endswith(".part") and OURS.fullmatch(name) is not None


@contextlib.contextmanager
def run_folder(folder: Path, concept: ConceptSet, config: TrainConfig, method: str, base_model: str):
    """Locks `folder` for this run, and writes its run.json.

    Raises: InputError if it is another run's, or if another process is at work in it.
    """
    texts = {r.id: [r.complete, r.base, r.target] for r in concept.references}
    run = {"base": base_model, "class_word": concept.class_word, "references": texts,
           "method": method, "config": asdict(config)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "machine": platform.machine()}
    check_run_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for path in list(folder.iterdir()):
            if is_part(path.name):
                path.unlink()
        file, before = folder / "run.json", set(folder.iterdir())
        is_new, about = not file.exists(), json.dumps({**run, "versions": versions}, indent=1).encode()
        if is_new:
            write_whole(file, about)
        else:
            check_same(run, file)
        try:
            yield
            write_whole(file, about)             # a resumed run may have more steps now
        except BaseException:
            created = [path for path in folder.iterdir() if path not in before and OURS.fullmatch(path.name)]
            if is_new and not any(path.suffix == ".safetensors" for path in created):
                for path in created:
                    path.unlink()
            raise


def check_same(run: dict, file: Path) -> None:
    """Raises: InputError if run.json is damaged or of another run. Fewer steps there are allowed."""
    advice = "choose another --out or delete the folder"
    try:
        there = read_json(file, advice)
        config = dict(there["config"])
        longer = config["steps"] < run["config"]["steps"]
    except (TypeError, KeyError):
        raise InputError(f"{file}: damaged; {advice}") from None
    wrong = [name for name in ("base", "class_word", "references", "method") if there.get(name) != run[name]]
    wrong += [f"{name}, which is {config.get(name)} there and {value} here"
              for name, value in run["config"].items()
              if config.get(name) != value and not (longer and name == "steps")]
    if wrong:
        raise InputError(f"{file.parent}: this folder holds another run (different: {'; '.join(wrong)}); "
                         "choose another --out")


def follow(title: str, training: Iterator[tuple], steps: int, stages: int = 1) -> Iterator[tuple]:
    """Passes on what `learn` yields, with a progress bar that says where a resumed run starts."""
    with tqdm(total=stages * steps, desc=f"{title:24s}", unit="step") as bar:
        reached = 0
        for stage, theta, row in training:
            step = row["step"] + (stage - 1) * steps
            if reached == 0 and step > 1:
                bar.write(f"{title}: going on from step {step - 1}")
                bar.initial = step - 1           # so that the estimate counts only this process's steps
            bar.update(step - reached)
            reached = step
            told = {name: f"{row[name]:.3f}" for name in ("loss", "lambda", "cosine") if name in row}
            bar.set_postfix(told, refresh=False)
            yield stage, theta, row
        bar.update(stages * steps - reached)

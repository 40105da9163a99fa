"""What the commands share: the folder that a run owns, and its progress bars.

A folder belongs to one run, and to one process at a time. Its run.json (settings, versions) says which run it
is. A run that ends before it has saved anything leaves no run.json, so a corrected command can start there.
"""

import contextlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from tqdm import tqdm

from purecc_min.concept import ConceptSet
from purecc_min.train import TrainConfig
from tinyflow.errors import InputError
from tinyflow.files import check_place, locked, present, read_text, write_whole


def check_run_folder(folder: Path) -> None:
    """Raises: InputError or OSError if no run can live there, before any work is done for it."""
    check_place(folder)
    found = list(folder.iterdir()) if present(folder) else []    # an interrupted write leaves a .part
    if any(path.suffix != ".part" for path in found) and not (folder / "run.json").exists():
        raise InputError(f"{folder}: this folder holds other files; choose another --out")


@contextlib.contextmanager
def run_folder(folder: Path, concept: ConceptSet, config: TrainConfig, method: str, base_model: str):
    """Within this context `folder` is this run's own.

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
        file = folder / "run.json"
        if is_new := not file.exists():
            write_whole(file, json.dumps({**run, "versions": versions}, indent=1).encode())
        elif not is_same(run, file):
            raise InputError(f"{folder}: this folder holds another run (see its run.json); "
                             "choose another --out")
        try:
            yield
        except BaseException:
            left = list(folder.iterdir())
            if is_new and not any(path.suffix == ".safetensors" for path in left):
                for path in left:
                    if path.suffix in (".json", ".jsonl", ".part"):
                        path.unlink()
            raise


def is_same(run: dict, file: Path) -> bool:
    """Whether a run.json is of this run. Raises InputError if it cannot be read."""
    try:
        found = dict(json.loads(read_text(file)))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{file}: damaged; choose another --out or delete the folder") from None
    return {name: found.get(name) for name in run} == run


def follow(title: str, rows: Iterator[dict], steps: int) -> None:
    """Runs a training loop behind a progress bar, which says so if it goes on from a checkpoint."""
    with tqdm(total=steps, desc=f"{title:24s}", unit="step") as bar:
        for row in rows:
            if bar.n == 0 and row["step"] > 1:
                bar.write(f"{title}: going on from step {row['step'] - 1}")
                bar.initial = row["step"] - 1    # so that the estimate counts this process's steps alone
            bar.update(row["step"] - bar.n)
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "lambda", "cosine") if name in row}
            bar.set_postfix(shown, refresh=False)
        bar.update(steps - bar.n)

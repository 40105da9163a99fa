"""A run's folder and its progress bars: what the commands share.

A folder belongs to one run: `claim` writes run.json (settings, versions) before anything else, and refuses a folder that holds another
run or somebody's files. Read next: demo.py.
"""

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
from tinyflow.weights import write_whole


def claim(folder: Path, concept: ConceptSet, config: TrainConfig, base: str = "tiny at 32 px") -> None:
    """Makes `folder` this run's, or checks that it already is. Raises InputError if it is another's."""
    run = {"base": base, "class_word": concept.class_word, "references": {r.id: [r.complete, r.base, r.target] for r in concept.references},
           "config": asdict(config)}
    file = folder / "run.json"
    if file.exists():
        try:
            found = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{file}: damaged; choose another --out or delete the folder") from None
        if {name: found.get(name) for name in run} != json.loads(json.dumps(run)):
            raise InputError(f"{folder}: this folder holds another run (see its run.json); choose another --out")
        return
    if folder.is_file() or folder.is_dir() and any(path.suffix != ".part" for path in folder.iterdir()):
        raise InputError(f"{folder}: this folder holds other files; choose another --out")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "machine": platform.machine()}
    write_whole(file, json.dumps({**run, "versions": versions}, indent=1).encode())


def follow(name: str, rows: Iterator[dict[str, float]], steps: int) -> None:
    """Runs a training loop behind a progress bar."""
    with tqdm(total=steps, desc=f"{name:24s}", unit="step") as bar:
        for row in rows:
            bar.update(row["step"] - bar.n)
            shown = {"loss": row["loss"], **{key: row[key] for key in ("lambda", "cosine") if key in row}}
            bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
        bar.update(steps - bar.n)

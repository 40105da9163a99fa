"""What the commands share: the folder that a run owns, and its progress bars.

A folder belongs to one run. `claim` writes run.json (settings, versions) before anything else, and refuses
a folder that holds another run or somebody's files.
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


def claim(folder: Path, concept: ConceptSet, config: TrainConfig, method: str, base_model: str) -> None:
    """Makes `folder` this run's, or checks that it already is. Raises InputError if it is another's."""
    texts = {r.id: [r.complete, r.base, r.target] for r in concept.references}
    run = {"base": base_model, "class_word": concept.class_word, "references": texts,
           "method": method, "config": asdict(config)}
    file = folder / "run.json"
    if file.exists():
        try:
            found = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{file}: damaged; choose another --out or delete the folder") from None
        if {name: found.get(name) for name in run} != run:
            raise InputError(f"{folder}: this folder holds another run (see its run.json); "
                             "choose another --out")
        return
    found = list(folder.iterdir()) if folder.is_dir() else []    # an interrupted write leaves a .part
    if folder.is_file() or any(path.suffix != ".part" for path in found):
        raise InputError(f"{folder}: this folder holds other files; choose another --out")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "machine": platform.machine()}
    write_whole(file, json.dumps({**run, "versions": versions}, indent=1).encode())


def follow(title: str, rows: Iterator[dict], steps: int) -> None:
    """Runs a training loop behind a progress bar."""
    with tqdm(total=steps, desc=f"{title:24s}", unit="step") as bar:
        for row in rows:
            bar.update(row["step"] - bar.n)
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "lambda", "cosine") if name in row}
            bar.set_postfix(shown, refresh=False)
        bar.update(steps - bar.n)

"""A cell: one method on one concept with one training seed, trained and measured. It is the unit of the benchmark's work.

A cell's draws depend on nothing but the cell, and it runs on one thread, so its result is the same on any number of cores and after any
interruption: a cell is done or not done, a file or no file. While it trains it is measured at a few steps (SNAPSHOTS), because a concept learned
less always damages less: methods are compared along that front. A method with a frozen extractor takes a LoRA of the same concept,
seed and rank, trained for as many steps. Read next: plans.py.
"""

import copy
import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from PIL import Image

from purecc_min.benchmark.methods import EXTRACTOR, FURTHER, METHODS, Trial, start
from purecc_min.branch import Branch
from purecc_min.evaluate import TIMES, Pictures, draw_groups, measure, perfect, velocity_error
from purecc_min.toy import CONCEPTS, Toy
from purecc_min.train import Batch, TrainConfig, TrainingData, concept_facts, optimizer_for, prepare, train_step
from tinyflow.flow import noise_for, path, velocity_target
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader
from tinyflow.weights import SHIPPED, load_tensors, write_whole

STEPS = 200                                      # of training, for every method alike
SNAPSHOTS = (50, 100)                            # and before that, steps at which a cell is measured
CURVE = (1, 25, 50, 100, 150, 200)               # steps at which the terms of Eq. 10 to 14 are recorded
SAMPLING_STEPS = 8                               # at which the shipped base draws as it is told as often as at 28
STRIP = {"concept": 12, "unsaid": 6, "composition": 6, "plain": 6, "other": 6}          # pictures kept of each group
RESULTS = Path(__file__).parent / "results"      # that came with this repository, a file a part
KEPT = ("LoRA", "paper")                         # methods whose concepts stay in the folder
ALL = METHODS | FURTHER


@cache
def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def shipped_results() -> dict[str, dict]:
    """File name of a cell -> its result, of all results that came with this repository."""
    results = [result for file in sorted(RESULTS.glob("*.json")) for result in json.loads(file.read_text())]
    return {Cell.of(result).file: result for result in results}


@dataclass(frozen=True)
class Cell:
    concept: str                                 # a key of CONCEPTS
    method: str                                  # a key of METHODS or FURTHER; or "nothing", or "perfect"
    seed: int = 0
    changes: tuple[tuple[str, object], ...] = ()    # settings that differ from the method's own
    steps: int = STEPS
    front: bool = True                           # whether it is also measured on the way

    @classmethod
    def of(cls, result: dict) -> "Cell":
        return cls(result["concept"], result["method"], result["seed"], tuple(result["changes"].items()), result["steps"], result.get("front", True))

    @property
    def snapshots(self) -> tuple[int, ...]:
        return (*(step for step in SNAPSHOTS if step < self.steps and self.front), self.steps)

    @property
    def file(self) -> str:
        return f"cells/{self.concept}/{self.name}{f' steps{self.steps}' * (self.steps != STEPS)} seed{self.seed}.json"

    @property
    def settings(self) -> dict:
        return ALL[self.method].settings | dict(self.changes)

    @property
    def name(self) -> str:
        """The method and what was changed in it."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.changes)])

    def recipe(self) -> str:
        """A fingerprint of all that this cell's result depends on, short of the code."""
        toy = CONCEPTS[self.concept]
        parts = [self.settings if self.method in ALL else {}, EXTRACTOR, self.snapshots, SAMPLING_STEPS, asdict(toy),
                 [r.complete for r in toy.references().references], *(hash_of(SHIPPED / name) for name in ("base.safetensors", "reader.safetensors"))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def result(self, folder: Path, shipped: bool = False) -> dict | None:
        """What is known about this cell; None if it was not run yet, or with other settings, weights or references.

        Args:
            shipped: whether a result that came with this repository will do.
        """
        file = folder / self.file
        found = json.loads(file.read_text()) if file.exists() else shipped_results().get(self.file, {}) if shipped else {}
        return found if found.get("recipe") == self.recipe() else None

    def config(self) -> TrainConfig:
        known = {name: value for name, value in self.settings.items() if name in TrainConfig.__dataclass_fields__}
        return replace(TrainConfig(seed=self.seed, steps=self.steps), **known)

    def extras(self) -> dict:
        return {name: value for name, value in self.settings.items() if name not in TrainConfig.__dataclass_fields__}


@dataclass
class Stage:
    """A concept on the base: what all of its cells share."""
    pipe: Pipeline
    reader: Reader
    toy: Toy
    data: TrainingData
    pictures: np.ndarray                         # uint8 [n, 32, 32, 3], the references
    original: Pictures


@cache
def set_up(concept: str) -> Stage:
    """Kept, since many cells of a worker share it."""
    pipe, toy = Pipeline.shipped(), CONCEPTS[concept]
    references = toy.references()
    return Stage(pipe, Reader.shipped(), toy, prepare(pipe, references), np.stack([r.picture for r in references.references]),
                 draw_groups(pipe, None, toy, steps=SAMPLING_STEPS))


def terms_over_t(trial: Trial, losses, extras: dict) -> list[dict[str, float]]:
    """The terms that a method's loss reports, at each t of TIMES, over all references and the same noise every time."""
    trial = copy.copy(trial)                     # asking must not change what the trial draws or remembers
    trial.running, trial.generator = dict(trial.running), torch.Generator()
    rows, x_0 = torch.arange(len(trial.data.ids)), trial.data.x_0
    x_1, result = noise_for(rows.tolist(), x_0.shape[1:]).to(x_0), []
    for moment in TIMES:
        t = torch.full((len(rows),), moment, device=x_0.device)
        with torch.no_grad():
            values = losses(trial, Batch(rows, path(x_0, x_1, t), t, velocity_target(x_0, x_1)), **extras)
        result.append({"t": moment, **{name: value.item() for name, value in values.items()}})
    return result


def train_cell(cell: Cell, stage: Stage, theta_1: Branch | None) -> Iterator[tuple[int, Trial]]:
    """Trains; yields (step, trial) after every step. Raises InputError for a loss that is not finite."""
    method, config, extras = ALL[cell.method], cell.config(), cell.extras()
    theta = start(method, stage.pipe, stage.data, config, theta_1)
    trial = Trial(stage.pipe, stage.toy, stage.data, config, theta, theta_1, torch.Generator().manual_seed(cell.seed))
    optimizer, losses = optimizer_for(theta, config), lambda batch: method.losses(trial, batch, **extras)
    for step in range(config.steps):
        train_step(stage.pipe, theta, optimizer, losses, stage.data, config, method.stage, step)
        yield step + 1, trial


def concept_file(cell: Cell, folder: Path) -> Path:
    return folder / "concepts" / f"{Path(cell.file).relative_to('cells').with_suffix('')}.safetensors"


def learned(cell: Cell, stage: Stage, folder: Path) -> Branch:
    """What a cell has learned, frozen; trained here if it is not in the folder. For methods that train adapters."""
    file = concept_file(cell, folder)
    if not file.exists() or load_tensors(file, "concept")[1]["recipe"] != cell.recipe():
        for _, trial in train_cell(cell, stage, extractor(cell, stage, folder)):
            pass
        keep(cell, trial.theta, folder)
    return Branch.load(stage.pipe, file)[0]


def keep(cell: Cell, theta: Branch, folder: Path) -> None:
    theta.save(concept_file(cell, folder), concept_facts(CONCEPTS[cell.concept].class_word, cell.config()) | {"recipe": cell.recipe()})


def extractor_cell(cell: Cell) -> Cell | None:
    """Which cell learns theta1 for this one: a LoRA of the same concept, seed and rank. None for a method that wants none."""
    if cell.method not in ALL or ALL[cell.method].extractor != "frozen":
        return None
    rank = tuple(change for change in cell.changes if change[0] == "rank")
    return Cell(cell.concept, "LoRA", cell.seed, (*EXTRACTOR.items(), *rank), cell.steps)


def extractor(cell: Cell, stage: Stage, folder: Path) -> Branch | None:
    theirs = extractor_cell(cell)
    return learned(theirs, stage, folder) if theirs else None


def make_extractor(cell: Cell, folder: Path) -> None:
    """Leaves a cell's theta1 in the folder, so that several cells can take it at once."""
    extractor(cell, set_up(cell.concept), folder)


def write_strip(pipe: Pipeline, drawn: Pictures, file: Path) -> None:
    """The first pictures of each group in STRIP, side by side, to be looked at."""
    pictures = pipe.decode_images(torch.cat([drawn[group][:count] for group, count in STRIP.items()]))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(pictures, axis=1)).save(file)


def run_cell(cell: Cell, folder: Path) -> dict:
    """Runs a cell unless its file is there; returns what the file holds."""
    if result := cell.result(folder):
        return result
    begun, stage = time.time(), set_up(cell.concept)
    assess = lambda branch, drawn: measure(stage.pipe, stage.reader, branch, stage.toy, stage.pictures, stage.original, drawn)
    result = {**asdict(cell), "changes": dict(cell.changes), "recipe": cell.recipe(), "snapshots": {}, "terms": {}}
    if cell.method in ("nothing", "perfect"):
        drawn = stage.original if cell.method == "nothing" else perfect(stage.reader, stage.toy, stage.original)
        result["snapshots"]["0"] = assess(None, drawn)
    else:
        method = ALL[cell.method]
        for step, trial in train_cell(cell, stage, extractor(cell, stage, folder)):
            if step in CURVE and method.extractor:
                result["terms"][str(step)] = terms_over_t(trial, method.losses, cell.extras())
            if step in cell.snapshots:
                drawn = draw_groups(stage.pipe, trial.theta, stage.toy, steps=SAMPLING_STEPS)
                result["snapshots"][str(step)] = assess(trial.theta, drawn)
        result["velocity_error"] = velocity_error(stage.pipe, trial.theta, stage.toy).relative       # over TIMES, at the end
        if cell.method in KEPT:
            keep(cell, trial.theta, folder)
    result["seconds"] = round(time.time() - begun, 1)
    write_strip(stage.pipe, drawn, (folder / cell.file).with_suffix(".png"))
    write_whole(folder / cell.file, json.dumps(result).encode())
    return result

"""A cell: one method on one concept with one training seed, trained and measured: the unit of the work.

A cell's random numbers depend only on the cell, and it runs on one thread, so its result is the same on any
number of cores and after any interruption: a finished cell is one file, an unfinished one leaves none. It is
measured at a few steps (SNAPSHOTS) while it trains: fewer steps learn less and damage less, so methods are
compared at equal similarity, between snapshots. A frozen extractor is a cell of its own, on the same concept,
seed and rank, trained for the same number of steps. Read next: plans.py.
"""

import copy
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from purecc_min.benchmark.entries import ABLATIONS, FURTHER, MAIN, PHRASE, Setup, as_sampled, start
from purecc_min.branch import Branch, Thetas
from purecc_min.concept import EncodedConcept, encode, noised
from purecc_min.concept_file import load_branch
from purecc_min.learning import concept_facts, train_steps
from purecc_min.measure.draw import FEW_STEPS, UNNAMED, Pictures, draw_groups, perfect
from purecc_min.measure.measures import measure
from purecc_min.measure.toy import CONCEPTS, PAIR_TEMPLATES
from purecc_min.measure.velocities import TIMES, velocity_error
from purecc_min.pairs import IMAGINED, imagine
from purecc_min.registry import is_held
from purecc_min.train import TrainConfig, draw_batch, optimizer_for
from tinyflow.disk import read_json, write_picture
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.flow import noise_for
from tinyflow.picturebook.model import SHIPPED, load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Velocity, to_pictures
from tinyflow.weights import load_tensors

STEPS = 200                                      # of training, for every method alike
SNAPSHOTS = (50, 100)                            # and before that, steps at which a cell is measured
CURVE = (1, 25, 50, 100, 150, 200)               # steps at which the terms of Eq. 10 to 14 are recorded
STRIP = {"concept": 12, "unsaid": 6, "composition": 6, "neighbour": 6, "plain": 6, "other": 6}   # kept
IMAGINING_STEPS = 10                             # of the sampler, for imagined scenes
RESULTS = Path(__file__).parent / "results"      # that came with this repository, a file for each part
KEPT = ("lora", "switched-off", "anchor", "paper", "token", "bound", "bound-half", "bound-pairs")  # stay
ALL = MAIN | PHRASE | ABLATIONS | FURTHER


@cache
def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def texts_of(concept: str) -> list[tuple[str, str, str]]:
    """The texts of a concept's references; cached, since every fingerprint asks for them."""
    return [(r.complete, r.base, r.target) for r in CONCEPTS[concept].references().references]


@cache
def shipped_results() -> dict[str, dict]:
    """File -> result, of all cells and pairs that came with this repository."""
    parts = [json.loads(file.read_bytes()) for file in sorted(RESULTS.glob("*.json"))]
    return {pair_file(**row) if "names" in row else Cell.of(row).file: row for part in parts for row in part}


def pair_file(names: Iterable[str], method: str, seed: int, **_) -> str:
    """Where two.py keeps what it knows of a pair of concepts."""
    return f"two/{' and '.join(names)}/{method} seed{seed}.json"


class Work:
    """What is run once and leaves a file, self.file, with a fingerprint of what it depends on, self.recipe().

    A picture of the same name shows what was drawn.
    """

    def result(self, folder: Path, shipped: bool = False) -> dict | None:
        """What the file holds; None if there is none, or of other settings, weights or references.

        shipped: whether a result that came with this repository will do.

        Raises: InputError if the file cannot be read.
        """
        file, advice = folder / self.file, "delete it; the same command makes it again"
        found = shipped_results().get(self.file) if shipped else None
        if file.exists():
            found = read_json(file, advice)
            if "recipe" not in found:
                raise InputError(f"{file}: damaged; {advice}")
        return found if found and found["recipe"] == self.recipe() else None

    def leave(self, result: dict, pictures: Tensor, folder: Path) -> dict:
        """Writes the picture, then the result, which it returns."""
        strip = Image.fromarray(np.concatenate(to_pictures(pictures), axis=1))
        write_picture((folder / self.file).with_suffix(".png"), strip)
        write_whole(folder / self.file, json.dumps(result).encode())
        return result


@dataclass(frozen=True)
class Cell(Work):
    concept: str                                 # a key of CONCEPTS
    method: str                                  # a key of ALL; or "nothing", or "perfect"
    seed: int = 0
    changes: tuple[tuple[str, object], ...] = () # settings that differ from the method's own
    steps: int = STEPS
    on_the_way: bool = True                      # whether it is also measured at SNAPSHOTS

    @classmethod
    def of(cls, result: dict) -> "Cell":
        return cls(result["concept"], result["method"], result["seed"], tuple(result["changes"].items()),
                   result["steps"], result["on_the_way"])

    @property
    def snapshots(self) -> tuple[int, ...]:
        last = self.config().steps if self.method in ALL else self.steps
        early = [step for step in (*SNAPSHOTS, STEPS) if step < last] if self.on_the_way else []
        return (*early, last)

    @property
    def name(self) -> str:
        """The method and what was changed in it."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.changes)])

    @property
    def file(self) -> str:
        steps = "" if self.steps == STEPS else f" steps{self.steps}"
        return f"cells/{self.concept}/{self.name}{steps} seed{self.seed}.json"

    @property
    def settings(self) -> dict:
        """The fields of TrainConfig that are not left at their defaults."""
        own = ALL[self.method].settings if self.method in ALL else {}
        return own | {name: value for name, value in self.changes if name != "imagined"}

    @property
    def imagined(self) -> int:
        """How many scenes the base model imagines, for a method that wants them."""
        return dict(self.changes).get("imagined", IMAGINED)

    def config(self) -> TrainConfig:
        return TrainConfig(**{"seed": self.seed, "steps": self.steps * ALL[self.method].times,
                              **self.settings})

    def recipe(self, measured: bool = True) -> str:
        """A fingerprint of all that this cell's result depends on, except the code.

        measured: False leaves out what only the measuring depends on.
        """
        toy = CONCEPTS[self.concept]
        imagined = self.imagined if self.method in ALL and ALL[self.method].imagines else None
        seen = [self.snapshots, FEW_STEPS] if measured else self.steps
        parts = [self.settings, imagined, seen, asdict(toy), texts_of(self.concept),
                 *(hash_of(SHIPPED / f"{name}.safetensors") for name in ("base", "codec", "reader"))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def set_up(concept: str) -> Setup:
    """A concept on the base model. Cached, since the cells of a worker share it."""
    pipe, toy = load_tiny(), CONCEPTS[concept]
    references = toy.references()
    pictures = np.stack([reference.picture for reference in references.references])
    original = draw_groups(pipe, None, toy, steps=FEW_STEPS, forms=True)
    masked = encode(pipe, toy.references(masked=True))
    data = encode(pipe, references)
    return Setup(pipe, Reader.shipped(), toy, references, data, masked, pictures, original)


@cache
def imagined_scenes(concept: str, seed: int, count: int) -> EncodedConcept:
    """Scenes of two things that the base model imagines, for the methods that want them."""
    setup = set_up(concept)
    return imagine(setup.pipe, setup.concept, PAIR_TEMPLATES, seed, count, IMAGINING_STEPS)


def data_of(cell: Cell) -> EncodedConcept:
    """What a cell learns from: the references, with masks or imagined scenes if its method wants them."""
    setup, method = set_up(cell.concept), ALL[cell.method]
    data = setup.masked if method.masked else setup.data
    if method.imagines:
        data = data._replace(imagined=imagined_scenes(cell.concept, cell.seed, cell.imagined))
    return data


def train_cell(cell: Cell, theta_1: Branch | None) -> Iterator[tuple[int, Thetas, Callable]]:
    """Trains; yields (step, the models, the method's loss) after every step.

    Raises: InputError for a loss that is not finite.
    """
    setup, method, config = set_up(cell.concept), ALL[cell.method], cell.config()
    theta = start(method, setup.pipe, setup.data, config, theta_1)
    thetas, loss = Thetas(setup.pipe.velocity, theta_1, theta), method.loss_for(setup, config)
    steps = train_steps(loss, thetas, data_of(cell), config, method.stages, optimizer_for(theta, config))
    for row in steps:
        yield row["step"], thetas, loss


def count_passes(cell: Cell, theta_1: Branch | None) -> dict[str, float]:
    """Forward and backward passes per picture and step; a LoRA has 1 and 1.

    What a method does before its first step is shared out among all of its steps, and its extractor counts.
    """
    setup, method, config = set_up(cell.concept), ALL[cell.method], cell.config()
    counted = {"forward": 0.0, "backward": 0.0}

    def count(mmdit, inputs, out: Tensor) -> None:
        counted["forward"] += len(out)
        counted["backward"] += len(out) * out.requires_grad

    data = data_of(cell)                         # scenes that it imagines are counted below
    hook = setup.pipe.mmdit.register_forward_hook(count)     # a copy of the model has it, too
    theta, loss = start(method, setup.pipe, setup.data, config, theta_1), method.loss_for(setup, config)
    if method.imagines:
        counted["forward"] += cell.imagined * IMAGINING_STEPS * 2        # guidance asks twice
    before = dict(counted)
    batch = draw_batch(data, config, method.stages, 0, setup.pipe.shift)
    loss(Thetas(setup.pipe.velocity, theta_1, theta), batch, config.eta)
    hook.remove()
    own = {name: (before[name] / config.steps + counted[name] - before[name]) / config.batch
           for name in counted}
    teacher = theta_1_cell(cell)
    taught = count_passes(teacher, None) if teacher else dict.fromkeys(own, 0.0)
    return {name: method.times * own[name] + taught[name] for name in own}


def terms_over_t(loss: Callable, thetas: Thetas, data: EncodedConcept, eta: float) -> list[dict[str, float]]:
    """What a method's loss logs at each t of TIMES, over all references and the same noise every time."""
    loss, rows = copy.deepcopy(loss), []         # a copy: calling a loss may advance its generator
    x_1 = noise_for(list(range(len(data.x_0))), data.x_0.shape[1:]).to(data.x_0)
    for moment in TIMES:
        t = torch.full((len(x_1),), moment, device=x_1.device)
        with torch.no_grad():
            value, log = loss(thetas, noised(data.x_0, x_1, t, data.texts), eta)
        rows.append({"t": moment, "loss": value.item(), **{name: term.item() for name, term in log.items()}})
    return rows


def concept_file(cell: Cell, folder: Path) -> Path:
    return (folder / "concepts" / cell.file.removeprefix("cells/")).with_suffix(".safetensors")


def keep(cell: Cell, theta: Branch, folder: Path) -> None:
    facts = concept_facts(theta.pipe, CONCEPTS[cell.concept].class_word, cell.config(), cell.method, "tiny")
    theta.save(concept_file(cell, folder), {**facts, "recipe": cell.recipe(measured=False)})


def learned_file(cell: Cell, folder: Path) -> Path:
    """The file of what a cell learns, for methods with adapters; it is trained here if it is not there."""
    file = concept_file(cell, folder)
    if not file.exists() or load_tensors(file, "concept")[1].get("recipe") != cell.recipe(measured=False):
        for _, thetas, _ in train_cell(cell, learn_theta_1(cell, folder)):
            pass
        keep(cell, thetas.theta, folder)
    return file


def learned(cell: Cell, folder: Path) -> Branch:
    """What a cell learns, frozen."""
    return load_branch(set_up(cell.concept).pipe, learned_file(cell, folder))[0]


def theta_1_cell(cell: Cell) -> Cell | None:
    """The cell that learns theta_1 for this one, on the same concept, seed and rank.

    It is None for a method without a frozen extractor.
    """
    if cell.method not in ALL or ALL[cell.method].extractor is None:
        return None
    teacher, config = ALL[cell.method].extractor.name, cell.config()
    rate = config.extractor_learning_rate or config.learning_rate
    changes = (("learning_rate", rate), ("rank", config.rank))
    return Cell(cell.concept, teacher, cell.seed, changes, cell.steps)


def learn_theta_1(cell: Cell, folder: Path) -> Branch | None:
    """The frozen extractor of a cell's method, trained here if it is not in the folder; None without one."""
    teacher = theta_1_cell(cell)
    return learned(teacher, folder) if teacher else None


def assess_ways(cell: Cell, step: int, thetas: Thetas, assess: Callable) -> Pictures:
    """Draws and measures each way of sampling the method's model; returns the first way's pictures.

    Pictures of texts that the method leaves to the base model are reused. Toy.forms and other ways are
    measured only at the last step.
    """
    setup, method, drawn = set_up(cell.concept), ALL[cell.method], {}
    known = {group: setup.original[group] for group in UNNAMED if is_held(method)}
    is_end = step == cell.snapshots[-1]
    for way in method.ways if is_end else method.ways[:1]:
        who = as_sampled(method, thetas, way)
        drawn[way] = draw_groups(setup.pipe, toy=setup.toy, steps=FEW_STEPS, forms=is_end, known=known, **who)
        assess(step, way, None if is_held(method) else thetas.theta, drawn[way])
    return drawn[""]


def run_cell(cell: Cell, folder: Path) -> dict:
    """Runs a cell unless its file is there; returns what the file holds."""
    if result := cell.result(folder):
        return result
    begun, setup = time.time(), set_up(cell.concept)
    pipe, toy, ways, terms = setup.pipe, setup.toy, {}, {}
    result = {**asdict(cell), "changes": dict(cell.changes), "recipe": cell.recipe(), "ways": ways,
              "terms": terms}

    def assess(step: int, way: str, theta: Velocity | None, drawn: Pictures) -> None:
        measured = measure(pipe, setup.reader, theta, toy, setup.pictures, setup.original, drawn)
        ways.setdefault(way, {})[str(step)] = measured

    if cell.method in ("nothing", "perfect"):
        drawn = setup.original if cell.method == "nothing" else perfect(setup.reader, toy, setup.original)
        assess(0, "", None, drawn)
    else:
        method, theta_1 = ALL[cell.method], learn_theta_1(cell, folder)
        result["passes"] = count_passes(cell, theta_1)
        for step, thetas, loss in train_cell(cell, theta_1):
            if step in CURVE and method.has_theta_1 and not method.imagines:
                terms[str(step)] = terms_over_t(loss, thetas, setup.data, cell.config().eta)
            if step in cell.snapshots:
                drawn = assess_ways(cell, step, thetas, assess)
        result["trained"] = sum(parameter.numel() for parameter in thetas.theta.parameters()
                                if parameter.requires_grad)              # its extractor's do not count
        theta = as_sampled(method, thetas)["theta"]
        result["velocity_error"] = velocity_error(pipe, theta, toy).relative            # over TIMES
        if cell.method in KEPT:
            keep(cell, thetas.theta, folder)
    result["seconds"] = round(time.time() - begun, 1)
    kept = [drawn[group][:count] for group, count in STRIP.items() if group in drawn]
    return cell.leave(result, torch.cat(kept), folder)

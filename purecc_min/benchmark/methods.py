"""The methods: each is the loss of one step, what that loss trains, and its tuned settings.

To add one, write a function (trial, batch) -> {"loss": ...} and an entry in METHODS: `python -m purecc_min.benchmark --methods NAME` runs it.
A trial offers the predictions of the model in training (`custom`), of the untouched base (`base`) and of the extractor, and scenes that
the base imagines. Texts are named as in the paper: complete, base, target, null. METHODS are the paper's method, its authors' code, and
what people use instead; FURTHER are experiments of ours with the same pieces. Read next: cells.py, where a trial is run.
"""

import contextlib
import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Callable

import torch
from torch import Tensor, nn

from purecc_min.branch import TOKEN, Branch
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.objective import inner, lambda_star, representation
from purecc_min.toy import Toy
from purecc_min.train import Batch, TrainConfig, TrainingData, pcc_losses, stage_2_losses, stage_2_predictions, target_representation
from tinyflow import world
from tinyflow.flow import path, squared_error, velocity_target
from tinyflow.pipeline import Pipeline, Text

IMAGINED = 32                                    # scenes that the base imagines


class WholeModel(Branch):
    """Every weight of a copy of the base's MMDiT in place of adapters, and Y."""

    def __init__(self, mmdit: nn.Module, embeddings: ConceptEmbeddings):
        nn.Module.__init__(self)
        self.mmdit, self.embeddings = copy.deepcopy(mmdit).requires_grad_(True), embeddings

    @contextlib.contextmanager
    def attached(self, pipe: Pipeline):
        base, pipe.mmdit = pipe.mmdit, self.mmdit
        try:
            yield
        finally:
            pipe.mmdit = base


class Joint(Branch):
    """theta2 with an extractor that is trained along with it."""

    def __init__(self, theta_2: Branch, theta_1: Branch):
        super().__init__(theta_2.lora, theta_2.embeddings)
        self.theta_1 = theta_1


@dataclass
class Trial:
    """One run: everything that a loss may want."""
    pipe: Pipeline
    toy: Toy
    data: TrainingData
    config: TrainConfig
    theta: Branch                                # what is trained
    theta_1: Branch | None                       # the frozen extractor, for methods that want one
    generator: torch.Generator = field(default_factory=torch.Generator)
    running: dict[int, Tensor] = field(default_factory=dict)

    def custom(self, batch: Batch, text: str) -> Tensor:
        """v_theta(x_t | text) of the model in training, with its gradient."""
        return self.theta.velocity(self.pipe, batch.x_t, batch.t, getattr(self.data, text)[batch.rows])

    @torch.no_grad()
    def base(self, batch: Batch, text: str) -> Tensor:
        """v(x_t | text) of the untouched base."""
        return self.pipe.velocity(batch.x_t, batch.t, getattr(self.data, text)[batch.rows])

    @torch.no_grad()
    def extractor(self, batch: Batch, text: str) -> Tensor:
        return self.theta_1.velocity(self.pipe, batch.x_t, batch.t, getattr(self.data, text)[batch.rows])

    @cached_property
    def imagined(self) -> "Trial":
        """The same trial, with scenes that the base draws for base texts in place of the references."""
        generator = torch.Generator().manual_seed(self.config.seed)
        draw = lambda options: list(options)[torch.randint(len(options), (1,), generator=generator).item()]
        scenes = [world.Scene(draw(world.OBJECTS) if self.toy.is_style else self.toy.class_word, draw(world.COLOURS), draw(world.SIZES),
                              draw(world.PLACES), draw(world.BACKGROUND_WORDS)) for _ in range(IMAGINED)]
        encode = lambda texts: self.pipe.encode_text(list(texts), {TOKEN: self.toy.class_word})
        complete, base = (encode(texts) for texts in list(zip(*map(self.toy.prompt, scenes)))[1:])
        x_0 = torch.cat([self.pipe.sample(base[rows], (10_000 + rows).tolist(), steps=10) for rows in torch.arange(IMAGINED).split(16)])
        several = lambda text: text[[0] * IMAGINED]
        data = TrainingData([str(n) for n in range(IMAGINED)], x_0[:, None], complete, base, several(self.data.target), several(self.data.null), base)
        return replace(self, data=data)

    def imagine(self) -> tuple["Trial", Batch]:
        """A batch of imagined scenes, and the trial in which their texts are found."""
        count, x_0 = self.config.batch, self.imagined.data.x_0
        rows = torch.randint(IMAGINED, (count,), generator=self.generator)
        t = torch.sigmoid(torch.randn(count, generator=self.generator)).to(x_0)
        x_1 = torch.randn((count, *x_0.shape[1:]), generator=self.generator).to(x_0)
        return self.imagined, Batch(rows, path(x_0[rows], x_1, t), t, velocity_target(x_0[rows], x_1))


# ---------------------------------------------------------------------------------------------- what people use
def flow_matching(trial: Trial, batch: Batch) -> dict[str, Tensor]:
    """L_CC alone (Eq. 3)."""
    loss = squared_error(trial.custom(batch, "complete"), batch.v)
    return {"loss": loss}


def prior_preservation(trial: Trial, batch: Batch, weight: float) -> dict[str, Tensor]:
    """DreamBooth's second term: L_CC on the base's own pictures of the class."""
    imagined, class_batch = trial.imagine()
    prior = squared_error(imagined.custom(class_batch, "base"), class_batch.v)
    return {"loss": squared_error(trial.custom(batch, "complete"), batch.v) + weight * prior}


def anchored(trial: Trial, batch: Batch, weight: float) -> dict[str, Tensor]:
    """The base text must predict what it predicted before ("differential output preservation")."""
    anchor = squared_error(trial.custom(batch, "base"), trial.base(batch, "base"))
    return {"loss": squared_error(trial.custom(batch, "complete"), batch.v) + weight * anchor}


# ------------------------------------------------------------------------------------------------ the paper's
def paper(trial: Trial, batch: Batch) -> dict[str, Tensor]:
    """Eq. 8 to 15 as they are written."""
    return stage_2_losses(trial.pipe, trial.theta_1, trial.theta, trial.data, batch, trial.config)


def along(direction: Callable[[Trial, Batch], Tensor], least: float | None = None) -> Callable[[Trial, Batch], dict[str, Tensor]]:
    """Eq. 9 to 15 with another R(y_tar), or with lambda* not below `least`."""
    def losses(trial: Trial, batch: Batch) -> dict[str, Tensor]:
        v_complete, v_original = stage_2_predictions(trial.pipe, trial.theta, trial.data, batch, trial.config)
        R_target, lam = direction(trial, batch), trial.config.fixed_lambda
        if least is not None:
            lam = lambda_star(representation(v_complete, v_original), R_target).detach().clamp(min=least)
        return pcc_losses(v_complete, v_original, R_target, batch.v, trial.config, lam)
    return losses


def against_null(trial: Trial, batch: Batch) -> Tensor:
    """Eq. 8 itself."""
    return target_representation(trial.pipe, trial.theta_1, trial.data, batch)


@torch.no_grad()
def without_adapters(trial: Trial, batch: Batch) -> Tensor:
    """Eq. 8 as the authors' code computes it: the extractor's adapters are off, so stage 1 reaches the loss through Y alone."""
    v_tar, v_null = (trial.pipe.velocity(batch.x_t, batch.t, getattr(trial.data, text)[batch.rows], fill=trial.theta_1.embeddings)
                     for text in ("target", "null"))
    return representation(v_tar, v_null)


def against_class(trial: Trial, batch: Batch) -> Tensor:
    """What the extractor's "[V] robot" says that the base's "robot" does not."""
    word = trial.pipe.encode_text([trial.toy.class_word])[[0] * len(batch.rows)]
    with torch.no_grad():
        return representation(trial.extractor(batch, "target"), trial.pipe.velocity(batch.x_t, batch.t, word))


def against_base_text(trial: Trial, batch: Batch) -> Tensor:
    """What the extractor's complete text says that the base's base text does not."""
    return representation(trial.extractor(batch, "complete"), trial.base(batch, "base"))


def merged_stages(trial: Trial, batch: Batch) -> dict[str, Tensor]:
    """Table 2: one stage, in which the extractor learns on L_CC while theta2 learns from it."""
    theta_1 = trial.theta.theta_1
    loss_1 = squared_error(theta_1.velocity(trial.pipe, batch.x_t, batch.t, trial.data.complete[batch.rows]), batch.v)
    losses = stage_2_losses(trial.pipe, theta_1, trial.theta, trial.data, batch, trial.config)
    return losses | {"loss": losses["loss"] + loss_1}


# --------------------------------------------------------------------------------------------------- and further
def lambda_of_t(trial: Trial, batch: Batch, bins: int = 10, decay: float = 0.9) -> dict[str, Tensor]:
    """One lambda* for each tenth of t, from running means of Eq. 12's two inner products, in place of one for each sample."""
    v_complete, v_original = stage_2_predictions(trial.pipe, trial.theta, trial.data, batch, trial.config)
    R_target = against_null(trial, batch)
    products = torch.stack([inner(representation(v_complete, v_original), R_target), inner(R_target, R_target)], dim=1).detach()  # [B, 2]
    keys = (batch.t * bins).long().tolist()
    for key, both in zip(keys, products):
        trial.running[key] = torch.lerp(both, trial.running.get(key, both), decay)
    lam = torch.stack([trial.running[key][0] / trial.running[key][1] for key in keys])
    return pcc_losses(v_complete, v_original, R_target, batch.v, trial.config, lam)


def anchored_paper(trial: Trial, batch: Batch, weight: float) -> dict[str, Tensor]:
    """Anchoring and rejection together."""
    losses, anchor = paper(trial, batch), squared_error(trial.custom(batch, "base"), trial.base(batch, "base"))
    return losses | {"loss": losses["loss"] + weight * anchor}


def imagined_scenes(trial: Trial, batch: Batch, weight: float) -> dict[str, Tensor]:
    """No reference picture at all: Eq. 14 with lambda 1 where the base draws its own pictures, the base text anchored."""
    imagined, scenes = trial.imagine()
    v_original, direction = imagined.base(scenes, "base"), against_class(imagined, scenes)
    both = imagined.theta.velocity(trial.pipe, torch.cat([scenes.x_t] * 2), torch.cat([scenes.t] * 2),
                                   Text.cat([imagined.data.complete[scenes.rows], imagined.data.base[scenes.rows]]))
    v_complete, v_base = both.chunk(2)
    return {"loss": squared_error(v_complete, v_original + trial.config.fixed_lambda * direction) + weight * squared_error(v_base, v_original)}


@dataclass(frozen=True)
class Method:
    about: str                                   # what it is, in words
    losses: Callable[..., dict[str, Tensor]]     # (trial, batch, **the settings that are not TrainConfig's)
    settings: dict = field(default_factory=dict) # chosen on the tuning tasks among `tries`
    tries: tuple[dict, ...] = ()
    trains: str = "adapters"                     # and Y; or "embeddings" alone, or the whole "model" and Y
    extractor: str = ""                          # "frozen": of stage 1; "joint": trained along

    @property
    def stage(self) -> int:
        """Whose draws it uses (Algorithm 1): stage 2 follows an extractor."""
        return 2 if self.extractor == "frozen" else 1


RATES = tuple(dict(learning_rate=rate) for rate in (1e-3, 2e-3, 4e-3))
WHOLE_RATES = tuple(dict(learning_rate=rate) for rate in (5e-5, 1e-4, 2e-4))
AS_RELEASED = dict(fixed_lambda=1.0, detach=False, eta=2.0)
EXTRACTOR = dict(learning_rate=2e-3)             # of the LoRA that is the frozen extractor of all methods that have one
METHODS = {
    "DreamBooth": Method("L_CC on every weight of a copy", flow_matching, WHOLE_RATES[2], WHOLE_RATES, trains="model"),
    "DreamBooth + prior": Method("and on the base's own pictures of the class", prior_preservation, WHOLE_RATES[2] | dict(weight=1.0),
                                 tuple(rate | dict(weight=1.0) for rate in WHOLE_RATES), trains="model"),
    "embeddings alone": Method("L_CC on Y", flow_matching, dict(embedding_learning_rate=0.5),
                               tuple(dict(embedding_learning_rate=rate) for rate in (0.02, 0.1, 0.5)), trains="embeddings"),
    "LoRA": Method("L_CC on adapters and Y", flow_matching, RATES[2], RATES),
    "LoRA + anchor": Method("and the base text predicts what it predicted before (DOP)", anchored, dict(learning_rate=4e-3, weight=1.0),
                            (dict(learning_rate=2e-3, weight=1.0), dict(learning_rate=2e-3, weight=5.0), dict(learning_rate=4e-3, weight=1.0))),
    "paper": Method("PureCC as the paper writes it", paper, RATES[2], RATES, extractor="frozen"),
    "released": Method("PureCC as its authors' code does it: lambda 1, the extractor's adapters off, nothing detached, eta 2",
                       along(without_adapters), RATES[2] | AS_RELEASED, tuple(rate | AS_RELEASED for rate in RATES), extractor="frozen"),
    "merged stages": Method("PureCC with an extractor that is trained in the same stage", merged_stages, RATES[2], RATES, extractor="joint"),
}
FURTHER = {
    "not detached": Method("the paper's, with the gradient through v_original", paper, dict(learning_rate=4e-3, detach=False), extractor="frozen"),
    "untouched v_original": Method("v_original from the base, in Eq. 10 and Eq. 13", paper, dict(learning_rate=4e-3, original="base"),
                                   extractor="frozen"),
    "R against the class word": Method("Eq. 8 with the base's class word in place of null", along(against_class), dict(learning_rate=4e-3),
                                       extractor="frozen"),
    "R against the base text": Method("Eq. 8 with complete text and the base's base text", along(against_base_text), dict(learning_rate=4e-3),
                                      extractor="frozen"),
    "lambda* at least 0": Method("negative lambda* cut off", along(against_null, least=0.0), dict(learning_rate=4e-3), extractor="frozen"),
    "lambda* at least 1": Method("lambda* raised to 1", along(against_null, least=1.0), dict(learning_rate=4e-3), extractor="frozen"),
    "lambda* of t": Method("one lambda* for each tenth of t", lambda_of_t, dict(learning_rate=4e-3), extractor="frozen"),
    "anchor + paper": Method("the paper's, with the base text anchored", anchored_paper, dict(learning_rate=4e-3, weight=1.0), extractor="frozen"),
    "imagined scenes": Method("Eq. 14 at lambda 1 on scenes that the base imagines, R against the class word, the base text anchored",
                              imagined_scenes, dict(learning_rate=4e-3, fixed_lambda=1.0, weight=1.0), extractor="frozen"),
}


def start(method: Method, pipe: Pipeline, data: TrainingData, config: TrainConfig, theta_1: Branch | None) -> Branch:
    """What the method trains, before the first step. With a frozen extractor Y starts as a copy of its Y, otherwise from the class word."""
    generator = torch.Generator().manual_seed((config.seed * 10 + method.stage) * 10**7 - 1)
    Y = class_word_states(pipe, data.x_0, data.class_text, generator) if theta_1 is None else theta_1.embeddings.Y.detach()
    if method.trains == "model":
        return WholeModel(pipe.mmdit, ConceptEmbeddings(Y))
    theta = Branch.fresh(pipe, Y, config.rank, generator)
    if method.trains == "embeddings":
        theta.lora.requires_grad_(False)
    return Joint(theta, Branch.fresh(pipe, Y, config.rank, generator)) if method.extractor == "joint" else theta

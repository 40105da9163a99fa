"""The benchmark's methods: for each the loss of one step, what that loss trains, and its tuned settings.

The losses are those of purecc_min/methods.py, and beside them, here, the ones that only experiments want.
MAIN is what people use, the paper's method, and both bound to [V]; FURTHER are rivals and experiments with
the same pieces; ABLATIONS are the paper's objective with one part replaced, for adapters that act everywhere
and for bound ones. A trained model can be sampled in several WAYS, which differ in who answers a text without
[V]. README.md shows how to add a method. Read next: cells.py, where a method is run.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from purecc_min.branch import Branch, only_with_token
from purecc_min.concept import TOKEN, Batch, EncodedConcept, Texts, noised
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.measure.draw import Pictures
from purecc_min.measure.toy import Toy
from purecc_min.methods import (
    Loss,
    Thetas,
    anchored,
    constant_lambda,
    from_parts,
    l_cc,
    not_detached,
    paper,
    target_direction,
    untouched_original,
)
from purecc_min.train import TrainConfig, generator_for
from tinyflow.flow import sample_times, squared_error
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline, Text, Velocity, in_one_batch

IMAGINED = 32                                    # scenes that the base model imagines


@dataclass(frozen=True)
class Setup:
    """A concept on the base model: what all of its cells share."""
    pipe: Pipeline
    reader: Reader
    toy: Toy
    data: EncodedConcept
    masked: EncodedConcept                       # the same, with masks of the concept
    pictures: np.ndarray                         # uint8 [n, H, W, 3], the references
    original: Pictures                           # what the base model draws


# ------------------------------------------------------------------------------------ branches of other kinds
class NoAdapters(nn.Module):
    """In place of a LoRA, in a branch that has Y alone."""

    def attached(self, l: int, block: nn.Module, slots: Tensor):
        return contextlib.nullcontext()


class WholeModel(Branch):
    """Y and every weight of a copy of the base model's MMDiT, in place of adapters."""

    def __init__(self, pipe: Pipeline, embeddings: ConceptEmbeddings):
        super().__init__(copy.deepcopy(pipe), NoAdapters(), embeddings)
        self.mmdit = self.pipe.mmdit.requires_grad_(True)


class Joint(Branch):
    """theta_2 with an extractor that is trained along with it."""

    def __init__(self, theta_2: Branch, theta_1: Branch):
        super().__init__(theta_2.pipe, theta_2.lora, theta_2.embeddings)
        self.theta_1 = theta_1


# -------------------------------------------------------------- losses on scenes that the base model imagines
class Imagining:
    """Scenes that the base model draws itself, for random base texts. Two losses are made from them."""

    def __init__(self, setup: Setup, config: TrainConfig):
        pipe, toy = setup.pipe, setup.toy
        scenes = [world.random_scene(np.random.default_rng((config.seed, n)), parts=False, pairs=0)
                  for n in range(IMAGINED)]
        if not toy.is_style:
            scenes = [scene.changed(object=toy.class_word) for scene in scenes]
        prompts = [toy.prompt(scene) for scene in scenes]
        stand_ins, rows = {TOKEN: toy.class_word}, [0] * IMAGINED
        base = pipe.encode_text([prompt.base for prompt in prompts], stand_ins)
        complete = pipe.encode_text([prompt.complete for prompt in prompts], stand_ins)
        self.texts = Texts(complete, base, setup.data.texts.target[rows], setup.data.texts.null[rows])
        self.x_0 = torch.cat([pipe.sample(base[some], (10_000 + some).tolist(), steps=10)
                              for some in torch.arange(IMAGINED).split(16)])
        self.word, self.shift = pipe.encode_text([toy.class_word]), pipe.shift
        self.generator = torch.Generator().manual_seed(config.seed)

    def draw(self, count: int) -> Batch:
        """Random scenes at random times, with random noise."""
        rows = torch.randint(IMAGINED, (count,), generator=self.generator)
        t = sample_times(count, self.shift, self.generator).to(self.x_0)
        x_1 = torch.randn((count, *self.x_0.shape[1:]), generator=self.generator).to(self.x_0)
        return noised(self.x_0[rows], x_1, t, self.texts.rows(rows))


class PriorPreservation(Imagining):
    """DreamBooth's second term: L_CC on the base model's own pictures of the class."""

    def __call__(self, thetas: Thetas, batch: Batch, eta: float) -> Loss:
        prior = self.draw(len(batch.t))
        loss_prior = squared_error(thetas.theta(prior.x_t, prior.t, prior.texts.base), prior.v)
        return l_cc(thetas, batch, eta)[0] + eta * loss_prior, {"loss_prior": loss_prior}


class ImaginedScenes(Imagining):
    """Eq. 14 with lambda 1 where the base model draws its own pictures, with the base text anchored.

    No reference picture is used.
    """

    def __call__(self, thetas: Thetas, batch: Batch, eta: float) -> Loss:
        scenes = self.draw(len(batch.t))
        x_t, t, texts = scenes.x_t, scenes.t, scenes.texts
        with torch.no_grad():
            v_original = thetas.theta_0(x_t, t, texts.base)
        v_purecc = v_original + beyond(thetas, scenes, texts.target, self.word[[0] * len(t)])
        v_complete, v_base = in_one_batch(thetas.theta, x_t, t, texts.complete, texts.base)
        return squared_error(v_complete, v_purecc) + eta * squared_error(v_base, v_original), {}


class EWC(Imagining):
    """L_CC, and weights that matter for the base model's own pictures stay near theirs.

    How much a weight matters is its Fisher information there: the mean square of the gradient of Eq. 3, a
    picture at a time, on a scale on which the mean over all weights is 1.
    """

    def __init__(self, setup: Setup, config: TrainConfig):
        super().__init__(setup, config)
        mmdit = copy.deepcopy(setup.pipe.mmdit).requires_grad_(True)
        self.before = [parameter.detach().clone() for parameter in mmdit.parameters()]
        self.fisher = [torch.zeros_like(parameter) for parameter in self.before]
        for _ in range(IMAGINED):
            scene = self.draw(1)
            text = scene.texts.base
            squared_error(mmdit(scene.x_t, scene.t, text.context, text.pooled), scene.v).backward()
            for fisher, parameter in zip(self.fisher, mmdit.parameters()):
                fisher += parameter.grad.square()
                parameter.grad = None
        mean = torch.cat([fisher.flatten() for fisher in self.fisher]).mean()
        self.fisher = [fisher / mean for fisher in self.fisher]

    def __call__(self, thetas: Thetas, batch: Batch, eta: float) -> Loss:
        loss_cc, _ = l_cc(thetas, batch, eta)
        moved = [(fisher * (now - before).square()).sum() for fisher, now, before
                 in zip(self.fisher, thetas.theta.mmdit.parameters(), self.before)]
        loss_ewc = torch.stack(moved).sum()
        return loss_cc + eta * loss_ewc, {"loss_cc": loss_cc, "loss_ewc": loss_ewc}


# -------------------------------------------------------------- the paper's loss with one part of it replaced
@torch.no_grad()
def beyond(thetas: Thetas, batch: Batch, said: Text, known: Text) -> Tensor:
    """What `said` means to the extractor beyond what `known` means to the base model, [B, C, H, W]."""
    return thetas.theta_1(batch.x_t, batch.t, said) - thetas.theta_0(batch.x_t, batch.t, known)


def released(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """The paper's loss as its authors' code computes it.

    The extractor's adapters are off, so stage 1 reaches the loss through Y alone. lambda is 1, and nothing is
    detached.
    """
    texts, Y_alone = batch.texts, Branch(thetas.theta_1.pipe, NoAdapters(), thetas.theta_1.embeddings)
    R_target = target_direction(Y_alone, batch)
    v_complete, v_original = in_one_batch(thetas.theta, batch.x_t, batch.t, texts.complete, texts.base)
    return from_parts(v_original, v_complete, R_target, batch, eta, lam=torch.ones_like(batch.t))


def merged_stages(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """Table 2: one stage, in which the extractor learns on L_CC while theta_2 learns from it."""
    theta_1 = thetas.theta.theta_1
    loss_1, _ = l_cc(thetas._replace(theta=theta_1), batch, eta)
    loss, log = paper(thetas._replace(theta_1=theta_1), batch, eta)
    return loss + loss_1, log


# ------------------------------------------------------------------------------------------------ the methods
WAYS = {"": "the base model answers guidance's empty text",
        "switched off": "the base model answers every text without [V]",
        "own empty text": "the adapted model answers every text, as in training"}


@dataclass(frozen=True)
class Entry:
    about: str                                   # what it is, in words
    loss: Callable                               # (thetas, batch, eta) -> (loss, log): purecc_min/methods.py
    settings: dict = field(default_factory=dict) # for TrainConfig: the best of `tries` on the tuning concepts
    tries: tuple[dict, ...] = ()
    trains: str = "adapters"                     # and Y; or "embeddings" alone, or the whole "model" and Y
    theta_1: str = ""                            # "frozen": the extractor of stage 1; "joint": trained along
    made_anew: bool = False                      # True: `loss` makes a run's own loss, loss(setup, config)
    masked: bool = False                         # True: L_CC counts the concept alone
    where: str = "everywhere"                    # its adapters act there, or at the "token" (lora.py)
    teacher: str = "LoRA"                        # the method that teaches its frozen extractor
    times: int = 1                               # how many times as many steps as the others
    ways: tuple[str, ...] = ("",)                # keys of WAYS: each is a row of the tables
    beside: tuple[str, ...] = ()                 # methods of MAIN with which the tables compare it

    @property
    def stage(self) -> int:
        """The stage of Algorithm 1 whose draws it uses: stage 2 follows a frozen extractor."""
        return 2 if self.theta_1 == "frozen" else 1

    def loss_for(self, setup: Setup, config: TrainConfig) -> Callable[[Thetas, Batch, float], Loss]:
        return self.loss(setup, config) if self.made_anew else self.loss


def as_sampled(thetas: Thetas, way: str) -> tuple[Velocity, dict]:
    """The velocity that is followed in sampling, and options for Pipeline.sample."""
    if way == "switched off":
        return only_with_token(thetas.theta, thetas.theta_0), {}
    return thetas.theta, {} if way == "own empty text" else {"theta_null": thetas.theta_0}


def follows(about: str, loss: Callable, **more) -> Entry:
    """A method that follows a frozen extractor, with the settings that won for the paper's."""
    return Entry(about, loss, MAIN["paper"].settings | more, theta_1="frozen")


def bound_follows(about: str, loss: Callable, **more) -> Entry:
    """The same with adapters that act at [V] alone, and such an extractor."""
    return Entry(about, loss, MAIN["bound paper"].settings | more, theta_1="frozen", where="token",
                 teacher="bound")


RATES = tuple(dict(learning_rate=rate) for rate in (1e-3, 2e-3, 4e-3))
WHOLE_RATES = tuple(dict(learning_rate=rate) for rate in (5e-5, 1e-4, 2e-4))
BOUND_RATES = tuple(dict(learning_rate=rate) for rate in (2e-3, 4e-3, 1e-2))
Y_RATES = tuple(dict(embedding_learning_rate=rate) for rate in (0.02, 0.1, 0.5))
ANCHOR_TRIES = (RATES[1] | dict(eta=1.0), RATES[1] | dict(eta=5.0), RATES[2] | dict(eta=1.0))
PRIOR_TRIES = tuple(rate | dict(eta=1.0) for rate in WHOLE_RATES)
EWC_TRIES = tuple(WHOLE_RATES[2] | dict(eta=eta) for eta in (0.1, 1.0, 10.0))
RELEASED_TRIES = tuple(rate | dict(eta=2.0) for rate in RATES)
THETA_1_SETTINGS = {"LoRA": dict(learning_rate=2e-3), "bound": dict(learning_rate=4e-3)}     # of extractors
MAIN = {
    "DreamBooth": Entry("L_CC on every weight of a copy", l_cc, WHOLE_RATES[0], WHOLE_RATES, trains="model"),
    "LoRA": Entry("L_CC on adapters and Y", l_cc, RATES[0], RATES, ways=tuple(WAYS)),
    "LoRA + anchor": Entry("LoRA, and the base text predicts what it predicted before (DOP)",
                            anchored, ANCHOR_TRIES[2], ANCHOR_TRIES),
    "Y alone": Entry("L_CC on Y: no weight changes (XTI)", l_cc, Y_RATES[2], Y_RATES, trains="embeddings"),
    "paper": Entry("PureCC as the paper writes it", paper, RATES[0], RATES, theta_1="frozen",
                    ways=("", "own empty text")),
    "bound": Entry("L_CC on adapters that act at [V] alone, and Y", l_cc, BOUND_RATES[2], BOUND_RATES,
                    where="token"),
    "bound paper": Entry("the paper's objective on such adapters", paper, BOUND_RATES[2], BOUND_RATES,
                          theta_1="frozen", where="token", teacher="bound"),
}
FURTHER = {
    "DreamBooth + prior": Entry("DreamBooth, and L_CC on the base model's own pictures of the class",
                                 PriorPreservation, PRIOR_TRIES[2], PRIOR_TRIES, trains="model",
                                 made_anew=True, beside=("DreamBooth",)),
    "DreamBooth + EWC": Entry("DreamBooth, and weights that matter stay near the base model's", EWC,
                               EWC_TRIES[1], EWC_TRIES, trains="model", made_anew=True,
                               beside=("DreamBooth",)),
    "released": Entry("PureCC as its authors' code does it", released, RELEASED_TRIES[0], RELEASED_TRIES,
                       theta_1="frozen", beside=("paper",)),
    "merged stages": Entry("PureCC with an extractor that is trained in the same stage", merged_stages,
                            RATES[0], RATES, theta_1="joint", beside=("paper",)),
    "bound, imagined scenes": Entry("Eq. 14 at lambda 1 on scenes that the base model imagines",
                                     ImaginedScenes, BOUND_RATES[0], BOUND_RATES, theta_1="frozen",
                                     made_anew=True, where="token", teacher="bound",
                                     beside=("bound paper",)),
    "LoRA, masked": Entry("LoRA, and what is beside the concept does not count", l_cc, RATES[0],
                           masked=True, beside=("LoRA",)),
    "bound, masked": Entry("bound, and what is beside the concept does not count", l_cc, BOUND_RATES[2],
                            where="token", masked=True, beside=("bound",)),
    "LoRA, twice": Entry("LoRA for as many steps as the paper's two stages", l_cc, RATES[0], times=2,
                          beside=("LoRA", "paper")),
    "bound, twice": Entry("bound for as many steps as two stages", l_cc, BOUND_RATES[2], times=2,
                           where="token", beside=("bound", "bound paper")),
}
ABLATIONS = {
    "paper, lambda 1": follows("lambda 1 in place of lambda* (Table 3)", constant_lambda(1.0)),
    "paper, lambda 3": follows("lambda 3 in place of lambda* (Table 3)", constant_lambda(3.0)),
    "paper, lambda 5": follows("lambda 5 in place of lambda* (Table 3)", constant_lambda(5.0)),
    "paper, eta 0.5": follows("eta 0.5 (Table 6)", paper, eta=0.5),
    "paper, eta 1.5": follows("eta 1.5 (Table 6)", paper, eta=1.5),
    "paper, eta 2": follows("eta 2 (Table 6)", paper, eta=2.0),
    "not detached": follows("the gradient goes through v_original", not_detached),
    "untouched v_original": follows("v_original from the base model, in Eq. 10 and Eq. 13",
                                    untouched_original),
    "bound paper, lambda 1": bound_follows("lambda 1 in place of lambda*", constant_lambda(1.0)),
    "bound paper, lambda 3": bound_follows("lambda 3 in place of lambda*", constant_lambda(3.0)),
    "bound paper, lambda 5": bound_follows("lambda 5 in place of lambda*", constant_lambda(5.0)),
    "bound paper, eta 0.5": bound_follows("eta 0.5", paper, eta=0.5),
    "bound paper, eta 1.5": bound_follows("eta 1.5", paper, eta=1.5),
    "bound paper, eta 2": bound_follows("eta 2", paper, eta=2.0),
}


def start(method: Entry, pipe: Pipeline, data: EncodedConcept, config: TrainConfig,
          theta_1: Branch | None) -> Branch:
    """What the method trains, before the first step.

    Y starts as a copy of the frozen extractor's Y if there is one, otherwise from the class word.
    """
    generator = generator_for(config.seed, method.stage, step=-1)
    Y = class_word_states(pipe, data, generator) if theta_1 is None else theta_1.embeddings.Y.detach()
    if method.trains == "model":
        return WholeModel(pipe, ConceptEmbeddings(Y))
    if method.trains == "embeddings":
        return Branch(pipe, NoAdapters(), ConceptEmbeddings(Y))
    theta = Branch.fresh(pipe, Y, config.rank, generator, method.where)
    if method.theta_1 == "joint":
        theta = Joint(theta, Branch.fresh(pipe, Y, config.rank, generator))
    return theta

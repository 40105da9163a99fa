"""The benchmark's methods: for each the loss of one step, what that loss trains, and its tuned settings.

The losses are those of purecc_min/methods.py, and beside them, here, the ones that only experiments want.
MAIN are the paper's method, its authors' code, and what people use instead; ABLATIONS are the paper's
method with one part replaced; FURTHER are experiments of ours with the same pieces; BINDING are adapters that
act at [V] alone, with their rivals. README.md shows how to add a method. Read next: cells.py, where a method
is run.
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
    anchor_loss,
    anchored,
    another_direction,
    constant_lambda,
    from_parts,
    l_cc,
    not_detached,
    paper,
    predictions,
    target_direction,
    untouched_original,
)
from purecc_min.objective import inner, lambda_star
from purecc_min.train import TrainConfig, generator_for
from tinyflow.flow import sample_times, squared_error
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline, Text, Velocity, in_one_batch

IMAGINED = 32                                    # scenes that the base model imagines
BINS, DECAY = 10, 0.9                            # of "lambda* of t"


@dataclass(frozen=True)
class Setup:
    """A concept on the base model: what all of its cells share."""
    pipe: Pipeline
    reader: Reader
    toy: Toy
    data: EncodedConcept
    pictures: np.ndarray                         # uint8 [n, 32, 32, 3], the references
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
        generator = torch.Generator().manual_seed(config.seed)

        def choose(options) -> str:
            return list(options)[torch.randint(len(options), (1,), generator=generator).item()]

        prompts = []
        for _ in range(IMAGINED):
            noun = choose(world.OBJECTS) if toy.is_style else toy.class_word
            scene = world.Scene(noun, choose(world.COLOURS), choose(world.SIZES), choose(world.PLACES),
                                choose(world.BACKGROUND_WORDS))
            prompts.append(toy.prompt(scene))
        stand_ins, rows = {TOKEN: toy.class_word}, [0] * IMAGINED
        base = pipe.encode_text([prompt.base for prompt in prompts], stand_ins)
        complete = pipe.encode_text([prompt.complete for prompt in prompts], stand_ins)
        self.texts = Texts(complete, base, setup.data.texts.target[rows], setup.data.texts.null[rows])
        self.x_0 = torch.cat([pipe.sample(base[some], (10_000 + some).tolist(), steps=10)
                              for some in torch.arange(IMAGINED).split(16)])
        self.word = pipe.encode_text([toy.class_word])
        self.generator = torch.Generator().manual_seed(config.seed)

    def draw(self, count: int) -> Batch:
        """Random scenes at random times, with random noise."""
        rows = torch.randint(IMAGINED, (count,), generator=self.generator)
        t = sample_times(count, generator=self.generator).to(self.x_0)
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


# -------------------------------------------------------------- the paper's loss with one part of it replaced
@torch.no_grad()
def beyond(thetas: Thetas, batch: Batch, said: Text, known: Text) -> Tensor:
    """What `said` means to the extractor beyond what `known` means to the base model, [B, C, H, W]."""
    return thetas.theta_1(batch.x_t, batch.t, said) - thetas.theta_0(batch.x_t, batch.t, known)


def beyond_base_text(thetas: Thetas, batch: Batch) -> Tensor:
    """What the complete text means beyond the base text, in place of R(y_tar)."""
    return beyond(thetas, batch, batch.texts.complete, batch.texts.base)


def against_class_word(setup: Setup, config: TrainConfig) -> Callable[[Thetas, Batch, float], Loss]:
    """The paper's loss, with R(y_tar) measured against the class word in place of the empty text."""
    word = setup.pipe.encode_text([setup.toy.class_word])

    def direction(thetas: Thetas, batch: Batch) -> Tensor:
        return beyond(thetas, batch, batch.texts.target, word[[0] * len(batch.t)])
    return another_direction(direction)


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


def lambda_at_least(least: float) -> Callable[[Thetas, Batch, float], Loss]:
    """The paper's loss with lambda* raised to `least` where it is below."""
    def loss(thetas: Thetas, batch: Batch, eta: float) -> Loss:
        R_target = target_direction(thetas.theta_1, batch)
        v_original, v_complete = predictions(thetas, batch)
        lam = lambda_star(v_complete - v_original, R_target).detach().clamp(min=least)
        return from_parts(v_original, v_complete, R_target, batch, eta, lam)
    return loss


class LambdaOfT:
    """The paper's loss with one lambda* for each tenth of t in place of one for each sample.

    It is the quotient of running means of the two inner products in Eq. 12.
    """

    def __init__(self, setup: Setup, config: TrainConfig):
        self.running: dict[int, Tensor] = {}     # the tenth of t -> the means of both products, [2]

    def __call__(self, thetas: Thetas, batch: Batch, eta: float) -> Loss:
        R_target = target_direction(thetas.theta_1, batch)
        v_original, v_complete = predictions(thetas, batch)
        R_complete = (v_complete - v_original).detach()
        products = torch.stack([inner(R_complete, R_target), inner(R_target, R_target)], dim=1)     # [B, 2]
        tenths = (batch.t * BINS).long().tolist()
        for tenth, new in zip(tenths, products):
            self.running[tenth] = torch.lerp(new, self.running.get(tenth, new), DECAY)
        means = torch.stack([self.running[tenth] for tenth in tenths])                  # [B, 2]
        return from_parts(v_original, v_complete, R_target, batch, eta, means[:, 0] / means[:, 1])


def anchored_paper(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """The paper's loss and, with weight 1, the anchor."""
    loss, log = paper(thetas, batch, eta)
    return loss + anchor_loss(thetas, batch), log


# ------------------------------------------------------------------------------------------------ the methods
@dataclass(frozen=True)
class Entry:
    about: str                                   # what it is, in words
    loss: Callable                               # (thetas, batch, eta) -> (loss, log): purecc_min/methods.py
    settings: dict = field(default_factory=dict) # for TrainConfig: the best of `tries` on the tuning concepts
    tries: tuple[dict, ...] = ()
    trains: str = "adapters"                     # and Y; or "embeddings" alone, or the whole "model" and Y
    theta_1: str = ""                            # "frozen": the extractor of stage 1; "joint": trained along
    made_anew: bool = False                      # True: `loss` makes a run's own loss, loss(setup, config)
    where: str = "everywhere"                 # its adapters act there, or at the "token" (purecc_min/lora.py)
    teacher: str = "LoRA"                        # the method that teaches its frozen extractor
    without_token: str = "adapted"               # who answers guidance's empty text: the adapted, the "base"
                                                 # model; "off": the base model answers all texts without [V]

    @property
    def stage(self) -> int:
        """The stage of Algorithm 1 whose draws it uses: stage 2 follows a frozen extractor."""
        return 2 if self.theta_1 == "frozen" else 1

    def as_sampled(self, thetas: Thetas) -> tuple[Velocity, dict]:
        """The velocity that is followed in sampling, and options for Pipeline.sample."""
        if self.without_token == "off":
            return only_with_token(thetas.theta, thetas.theta_0), {}
        return thetas.theta, {"theta_null": thetas.theta_0} if self.without_token == "base" else {}

    def loss_for(self, setup: Setup, config: TrainConfig) -> Callable[[Thetas, Batch, float], Loss]:
        return self.loss(setup, config) if self.made_anew else self.loss


def follows(about: str, loss: Callable, made_anew: bool = False, **settings) -> Entry:
    """A method that follows a frozen extractor, at the learning rate that won for the paper's."""
    return Entry(about, loss, RATES[2] | settings, theta_1="frozen", made_anew=made_anew)


RATES = tuple(dict(learning_rate=rate) for rate in (1e-3, 2e-3, 4e-3))
WHOLE_RATES = tuple(dict(learning_rate=rate) for rate in (5e-5, 1e-4, 2e-4))
Y_RATES = tuple(dict(embedding_learning_rate=rate) for rate in (0.02, 0.1, 0.5))
PRIOR_TRIES = tuple(rate | dict(eta=1.0) for rate in WHOLE_RATES)
RELEASED_TRIES = tuple(rate | dict(eta=2.0) for rate in RATES)
ANCHOR_TRIES = (RATES[1] | dict(eta=1.0), RATES[1] | dict(eta=5.0), RATES[2] | dict(eta=1.0))
THETA_1_SETTINGS = {"LoRA": dict(learning_rate=2e-3), "bound": dict(learning_rate=4e-3)}     # of extractors
MAIN = {
    "DreamBooth": Entry("L_CC on every weight of a copy", l_cc, WHOLE_RATES[2], WHOLE_RATES, trains="model"),
    "DreamBooth + prior": Entry("DreamBooth, and L_CC on the base model's own pictures of the class",
                                 PriorPreservation, PRIOR_TRIES[2], PRIOR_TRIES, trains="model",
                                 made_anew=True),
    "embeddings alone": Entry("L_CC on Y", l_cc, Y_RATES[2], Y_RATES, trains="embeddings"),
    "LoRA": Entry("L_CC on adapters and Y", l_cc, RATES[2], RATES),
    "LoRA + anchor": Entry("LoRA, and the base text predicts what it predicted before (DOP)",
                            anchored, ANCHOR_TRIES[2], ANCHOR_TRIES),
    "paper": Entry("PureCC as the paper writes it", paper, RATES[2], RATES, theta_1="frozen"),
    "released": Entry("PureCC as its authors' code does it", released, RELEASED_TRIES[2], RELEASED_TRIES,
                       theta_1="frozen"),
    "merged stages": Entry("PureCC with an extractor that is trained in the same stage", merged_stages,
                            RATES[2], RATES, theta_1="joint"),
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
}
FURTHER = {
    "R against the class word": follows("Eq. 8 with the base model's class word in place of the empty text",
                                        against_class_word, made_anew=True),
    "R against the base text": follows("Eq. 8 with the complete text and the base model's base text",
                                       another_direction(beyond_base_text)),
    "lambda* at least 0": follows("negative lambda* cut off", lambda_at_least(0.0)),
    "lambda* at least 1": follows("lambda* raised to 1", lambda_at_least(1.0)),
    "lambda* of t": follows("one lambda* for each tenth of t", LambdaOfT, made_anew=True),
    "anchor + paper": follows("the paper's loss, and the base text anchored", anchored_paper),
    "imagined scenes": follows("Eq. 14 at lambda 1 on scenes that the base model imagines, R against the "
                               "class word, the base text anchored", ImaginedScenes, made_anew=True),
}




def bound(about: str, loss: Callable, settings: dict, tries: tuple[dict, ...] = (), **more) -> Entry:
    """A method whose adapters act at [V] alone, so that who answers the empty text makes no difference."""
    return Entry(about, loss, settings, tries, where="token", without_token="base", **more)


BOUND_RATES = tuple(dict(learning_rate=rate) for rate in (2e-3, 4e-3, 1e-2))
BOUND_ETAS = tuple(dict(learning_rate=4e-3, eta=eta) for eta in (0.1, 0.3, 1.0))
BINDING = {
    "LoRA, base's empty text": Entry("LoRA, with guidance's empty text from the base model", l_cc, RATES[2],
                                      without_token="base"),
    "LoRA switched off": Entry("the same weights, switched off for every text without [V]", l_cc, RATES[2],
                                without_token="off"),
    "anchor, base's empty text": Entry("LoRA + anchor, with the empty text from the base model", anchored,
                                        ANCHOR_TRIES[2], without_token="base"),
    "paper, base's empty text": Entry("PureCC, with the empty text from the base model", paper, RATES[2],
                                       theta_1="frozen", without_token="base"),
    "bound": bound("L_CC on adapters that act at [V] alone, and Y", l_cc, BOUND_RATES[0], BOUND_RATES),
    "bound paper, eta 1": bound("the paper's objective on such adapters", paper, BOUND_ETAS[2], BOUND_ETAS,
                                theta_1="frozen", teacher="bound"),
    "bound paper, eta 0.3": bound("the same with another eta", paper, BOUND_ETAS[1], theta_1="frozen",
                                  teacher="bound"),
    "bound paper, eta 0.1": bound("the same with another eta", paper, BOUND_ETAS[0], theta_1="frozen",
                                  teacher="bound"),
    "bound, extractor's Y": bound("eta 0: L_CC alone, from the same start", l_cc, dict(learning_rate=4e-3),
                                  theta_1="frozen", teacher="bound"),
    "bound paper, LoRA's extractor": bound("eta 1, with an extractor that acts everywhere", paper,
                                           BOUND_ETAS[2], theta_1="frozen"),
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

"""The benchmark's methods: those of purecc_min/registry.py, and beside them what only experiments want.

MAIN is what people use, the paper's method, and adapters that are bound to the token [V] alone, with Y in the
word's place: an ablation of those that are bound to its phrase. FURTHER are rivals and experiments with the
same pieces; ABLATIONS are the paper's objective with one part replaced; PHRASE takes the phrase apart. A
trained model can be sampled in several WAYS, which differ in who answers a text without [V]. README.md shows
how to add a method. Read next: cells.py, where a method is run.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from purecc_min.ablations import answered_by, constant_lambda, not_detached, untouched_original
from purecc_min.branch import Branch, only_with_token
from purecc_min.concept import TOKEN, Batch, ConceptSet, EncodedConcept, Texts, noised, styles_among
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.lora import LoRA
from purecc_min.measure.draw import Pictures
from purecc_min.measure.toy import Toy
from purecc_min.methods import (
    Loss,
    Method,
    Thetas,
    l_cc,
    paper,
)
from purecc_min.pairs import pairs_with_lambda
from purecc_min.registry import METHODS
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
    concept: ConceptSet
    data: EncodedConcept
    masked: EncodedConcept                       # the same, with masks of the concept
    pictures: np.ndarray                         # uint8 [n, H, W, 3], the references
    original: Pictures                           # what the base model draws


# ------------------------------------------------------------------------------------ branches of other kinds
class NoAdapters(nn.Module):
    """In place of a LoRA, in a branch that has Y alone."""
    where = "everywhere"

    def places(self, text: Text, n: int) -> None:
        return None

    def attached(self, l: int, block: nn.Module, places: Tensor | None):
        return contextlib.nullcontext()


class Residual(ConceptEmbeddings):
    """Y^l is added to the word's state at [V]; it does not take its place."""

    def forward(self, l: int, c: Tensor, slots: Tensor) -> Tensor:
        return c + slots[..., None] * self.Y[l].to(c.dtype)


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
        texts = [prompt.complete for prompt in prompts]
        complete = pipe.encode_text(texts, stand_ins, styles_among(stand_ins))
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
    Y_alone = Branch(thetas.theta_1.pipe, NoAdapters(), thetas.theta_1.embeddings)
    with_gradient = torch.enable_grad()(thetas.theta.__call__)
    theta = answered_by(with_gradient, batch.texts.base, thetas.theta)
    return constant_lambda(1.0)(thetas._replace(theta_1=Y_alone, theta=theta), batch, eta)


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
class Entry(Method):
    """A method, and what the benchmark wants to know of it."""
    tries: tuple[dict, ...] = ()                 # `settings` are the best of these on the tuning concepts
    whole_model: bool = False                    # whether it trains every weight of a copy, and no adapters
    joint: bool = False                          # whether its extractor is trained along with it
    made_anew: bool = False                      # whether `loss` makes a run's own loss, loss(setup, config)
    masked: bool = False                         # whether L_CC counts the concept alone
    residual: bool = False                       # whether Y^l is added to the word, in place of replacing it
    values_alone: bool = False                   # whether the adapters on keys stay at zero
    times: int = 1                               # how many times as many steps as the others
    ways: tuple[str, ...] = ("",)                # keys of WAYS: each is a row of the tables
    beside: tuple[str, ...] = ()                 # methods of MAIN with which the tables compare it

    @property
    def stage(self) -> int:
        """The stage of Algorithm 1 whose draws it uses: stage 2 follows a frozen extractor."""
        return 2 if self.extractor else 1

    @property
    def has_theta_1(self) -> bool:
        return self.joint or self.extractor is not None

    def loss_for(self, setup: Setup, config: TrainConfig) -> Callable[[Thetas, Batch, float], Loss]:
        return self.loss(setup, config) if self.made_anew else self.loss


def as_sampled(thetas: Thetas, way: str) -> tuple[Velocity, dict]:
    """The velocity that is followed in sampling, and options for Pipeline.sample."""
    if way == "switched off":
        return only_with_token(thetas.theta, thetas.theta_0), {}
    return thetas.theta, {} if way == "own empty text" else {"theta_null": thetas.theta_0}


def like(method: Method, **changes) -> Entry:
    """An entry with what another method has, and some changes."""
    return Entry(**vars(method) | changes)


def entries(*rows: Entry) -> dict[str, Entry]:
    return {row.name: row for row in rows}


RATES = tuple(dict(learning_rate=rate) for rate in (1e-3, 2e-3, 4e-3))
PAPER_RATES = tuple(rate | dict(extractor_learning_rate=2e-3) for rate in RATES)
WHOLE_RATES = tuple(dict(learning_rate=rate) for rate in (5e-5, 1e-4, 2e-4))
TOKEN_RATES = tuple(dict(learning_rate=rate) for rate in (2e-3, 4e-3, 1e-2))
TOKEN_PAPER_RATES = tuple(rate | dict(extractor_learning_rate=4e-3) for rate in TOKEN_RATES)
Y_RATES = tuple(dict(embedding_learning_rate=rate) for rate in (0.02, 0.1, 0.5))
ANCHOR_TRIES = (RATES[1] | dict(eta=1.0), RATES[1] | dict(eta=5.0), RATES[2] | dict(eta=1.0))
PRIOR_TRIES = tuple(rate | dict(eta=1.0) for rate in WHOLE_RATES)
EWC_TRIES = tuple(WHOLE_RATES[2] | dict(eta=eta) for eta in (0.1, 1.0, 10.0))
RELEASED_TRIES = tuple(rate | dict(eta=2.0, extractor_learning_rate=2e-3) for rate in RATES)
TOKEN_BOUND = Entry("token", "bound to the token: L_CC on adapters that act at [V] alone, and Y", l_cc,
                    where="token", settings=TOKEN_RATES[2], tries=TOKEN_RATES)
MAIN = entries(
    Entry("DreamBooth", "L_CC on every weight of a copy", l_cc, settings=WHOLE_RATES[0], tries=WHOLE_RATES,
          whole_model=True),
    like(METHODS["lora"], tries=RATES, ways=tuple(WAYS)),
    like(METHODS["anchor"], tries=ANCHOR_TRIES),
    like(METHODS["embeddings"], tries=Y_RATES),
    like(METHODS["paper"], tries=PAPER_RATES, ways=("", "own empty text")),
    TOKEN_BOUND,
    Entry("token paper", "the paper's objective on such adapters", paper, where="token",
          extractor=TOKEN_BOUND, settings=TOKEN_PAPER_RATES[2], tries=TOKEN_PAPER_RATES),
)
FURTHER = entries(
    Entry("DreamBooth + prior", "DreamBooth, and L_CC on the base model's own pictures of the class",
          PriorPreservation, settings=PRIOR_TRIES[2], tries=PRIOR_TRIES, whole_model=True, made_anew=True,
          beside=("DreamBooth",)),
    Entry("DreamBooth + EWC", "DreamBooth, and weights that matter stay near the base model's", EWC,
          settings=EWC_TRIES[1], tries=EWC_TRIES, whole_model=True, made_anew=True, beside=("DreamBooth",)),
    like(MAIN["paper"], name="released", about="PureCC as its authors' code does it", loss=released,
         settings=RELEASED_TRIES[0], tries=RELEASED_TRIES, ways=("",), beside=("paper",)),
    Entry("merged stages", "PureCC with an extractor that is trained in the same stage", merged_stages,
          settings=RATES[0], tries=RATES, joint=True, beside=("paper",)),
    like(MAIN["token paper"], name="token, imagined scenes", loss=ImaginedScenes, made_anew=True,
         about="Eq. 14 at lambda 1 on scenes that the base model imagines", settings=TOKEN_PAPER_RATES[0],
         beside=("token paper",)),
    like(METHODS["lora"], name="lora, masked", about="lora, and what is outside the concept does not count",
         masked=True, beside=("lora",)),
    like(TOKEN_BOUND, name="token, masked", about="token, and what is outside the concept does not count",
         tries=(), masked=True, beside=("token",)),
    like(METHODS["lora"], name="lora, twice", about="lora for as many steps as the paper's two stages",
         times=2, beside=("lora", "paper")),
    like(TOKEN_BOUND, name="token, twice", about="token for as many steps as two stages", tries=(), times=2,
         beside=("token", "token paper")),
)


def ablations(method: Entry) -> list[Entry]:
    """The paper's objective on one kind of adapters, with one part replaced (Tables 3 and 6)."""
    def ablation(name: str, about: str, loss: Callable = paper, **settings) -> Entry:
        return like(method, name=f"{method.name}, {name}", about=about, loss=loss, tries=(), ways=("",),
                    settings=method.settings | settings)
    return [*(ablation(f"lambda {value}", f"lambda {value} in place of lambda* (Table 3)",
                       constant_lambda(float(value))) for value in (1, 3, 5)),
            *(ablation(f"eta {eta:g}", f"eta {eta:g} (Table 6)", eta=eta) for eta in (0.5, 1.5, 2.0))]


ABLATIONS = entries(
    *ablations(MAIN["paper"]),
    like(MAIN["paper"], name="not detached", about="the gradient goes through v_original", loss=not_detached,
         tries=(), ways=("",)),
    like(MAIN["paper"], name="untouched v_original", loss=untouched_original, tries=(), ways=("",),
         about="v_original from the base model, in Eq. 10 and Eq. 13"),
    *ablations(MAIN["token paper"]),
)
BOUND, LORA = METHODS["bound"], METHODS["lora"]
PHRASE = entries(
    like(BOUND, tries=TOKEN_RATES),
    like(METHODS["bound-paper"]),
    like(METHODS["bound-half"]),
    like(METHODS["bound-pairs"]),
    like(METHODS["bound-pairs"], name="bound-pairs, lambda*", loss=pairs_with_lambda,
         about="bound-pairs with lambda* M R, its inner products inside the half"),
    like(BOUND, name="bound, Y added", about="bound, and Y^l is added to the word at [V]", embeddings=True,
         residual=True),
    like(BOUND, name="bound, Y replaces", about="bound, and Y^l takes the word's place", embeddings=True),
    like(BOUND, name="bound, values alone", about="bound, with adapters on the values and not on the keys",
         values_alone=True),
    like(TOKEN_BOUND, name="token, word kept", about="adapters at [V] alone, and the word stays", tries=(),
         embeddings=False, settings=BOUND.settings),
    like(TOKEN_BOUND, name="token, Y added", about="adapters at [V] alone, and Y^l is added to the word",
         tries=(), residual=True, settings=BOUND.settings),
    like(LORA, name="lora, word kept", about="a LoRA without Y: the word at [V] stays", embeddings=False,
         ways=("", "switched off")),
    like(LORA, name="lora, switched off", about="a LoRA that is switched off for texts without [V]",
         ways=("", "switched off")),
)


def start(method: Entry, pipe: Pipeline, data: EncodedConcept, config: TrainConfig,
          theta_1: Branch | None) -> Branch:
    """What the method trains, before the first step.

    Y starts as a copy of the frozen extractor's Y if there is one, otherwise from the class word; where it is
    added to a word, at zero.
    """
    generator, Y = generator_for(config.seed, method.stage, step=-1), None
    if method.embeddings:
        Y = class_word_states(pipe, data, generator) if theta_1 is None else theta_1.embeddings.Y.detach()
    if method.whole_model:
        return WholeModel(pipe, ConceptEmbeddings(Y))
    if not method.adapters:
        return Branch(pipe, NoAdapters(), ConceptEmbeddings(Y))
    if method.residual:
        return Branch(pipe, LoRA(pipe.mmdit, config.rank, generator, method.where), Residual(0 * Y))
    theta = Branch.fresh(pipe, Y, config.rank, generator, method.where)
    if method.values_alone:
        for key, B in theta.lora.B.items():
            B.requires_grad_(key.endswith("to_v"))
    if method.joint:
        theta = Joint(theta, Branch.fresh(pipe, Y, config.rank, generator))
    return theta

"""The benchmark's methods: those of purecc_min/registry.py, and methods that only experiments need.

MAIN is what people use, the paper's method in two forms, and what each row has to be compared with: adapters
at the token [V] alone, a LoRA without Y, and the simple methods for as many passes as the costly ones.
FURTHER are rivals and experiments with the same pieces; ABLATIONS are the paper's objective with one part
replaced; PHRASE changes one part of the bound adapters at a time. Pictures are sampled as users sample them;
WAYS adds one other way, for `lora` only. README.md shows how to add a method. Read next: cells.py, where a
method is run.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from purecc_min import registry
from purecc_min.ablations import answered_by, constant_lambda, not_detached, untouched_original
from purecc_min.branch import Branch, Thetas
from purecc_min.concept import TOKEN, Batch, ConceptSet, EncodedConcept, Texts, noised, styles_among
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.lora import LoRA
from purecc_min.measure.draw import Pictures
from purecc_min.measure.toy import Toy
from purecc_min.methods import Loss, Method, l_cc, paper
from purecc_min.pairs import pairs_with_lambda
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig, generator_for
from tinyflow.flow import squared_error, training_times
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline, Text, Velocity

IMAGINED = 32                                    # scenes that the base model imagines
LONGER = 5                                       # times the steps: at least as many passes as bound-pairs


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


class NoAdapters(nn.Module):
    """In place of a LoRA, in a branch that has Y alone."""
    where = "everywhere"

    def places(self, text: Text, n: int) -> None:
        return None

    def attached(self, l: int, block: nn.Module, places: Tensor | None):
        return contextlib.nullcontext()


class Residual(ConceptEmbeddings):
    """Y^l is added to the word's state at [V], instead of replacing it."""

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
    """Scenes that the base model samples itself, for random base texts. The base class of two losses."""

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
        self.shift, self.generator = pipe.shift, torch.Generator().manual_seed(config.seed)

    def draw(self, count: int) -> Batch:
        """Random scenes at random times, with random noise."""
        rows = torch.randint(IMAGINED, (count,), generator=self.generator)
        t = training_times(count, self.shift, self.generator).to(self.x_0)
        x_1 = torch.randn((count, *self.x_0.shape[1:]), generator=self.generator).to(self.x_0)
        return noised(self.x_0[rows], x_1, t, self.texts.rows(rows))


class PriorPreservation(Imagining):
    """DreamBooth's second term: L_CC on the base model's own pictures of the class."""

    def __call__(self, thetas: Thetas, batch: Batch, eta: float) -> Loss:
        prior = self.draw(len(batch.t))
        loss_prior = squared_error(thetas.theta(prior.x_t, prior.t, prior.texts.base), prior.v)
        return l_cc(thetas, batch, eta)[0] + eta * loss_prior, {"loss_prior": loss_prior}


class EWC(Imagining):
    """L_CC, and weights that matter for the base model's own pictures stay near theirs.

    How much a weight matters is its Fisher information there: the mean square of the gradient of Eq. 2, a
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
WAYS = {"": "as its users draw it (registry.as_sampled)",
        "own empty text": "the adapted model answers guidance's empty text, too"}


@dataclass(frozen=True)
class Entry(Method):
    """A method, and what the benchmark wants to know of it."""
    tries: tuple[dict, ...] = ()                 # `settings` are the best of these on the tuning concepts
    whole_model: bool = False                    # whether it trains every weight of a copy, and no adapters
    joint: bool = False                          # whether its extractor is trained along with it
    masked: bool = False                         # whether L_CC counts the concept alone
    residual: bool = False                       # whether Y^l is added to the word, in place of replacing it
    values_alone: bool = False                   # whether the adapters on keys stay at zero
    times: int = 1                               # how many times as many steps as the others
    ways: tuple[str, ...] = ("",)                # keys of WAYS: each is a row of the tables
    beside: tuple[str, ...] = ()                 # methods of MAIN with which the tables compare it

    @property
    def has_theta_1(self) -> bool:
        return self.joint or self.extractor is not None

    def loss_for(self, setup: Setup, config: TrainConfig) -> Callable[[Thetas, Batch, float], Loss]:
        """The loss of one run. A class makes it from the run's own scenes."""
        return self.loss(setup, config) if isinstance(self.loss, type) else self.loss


def as_sampled(method: Method, thetas: Thetas, way: str = "") -> dict[str, Velocity]:
    """The theta and theta_null of Pipeline.sample in one of WAYS."""
    if way == "own empty text":
        return {"theta": thetas.theta}
    return registry.as_sampled(method, thetas.theta, thetas.theta_0)


def like(method: Method, **changes) -> Entry:
    """An entry with what another method has, and some changes."""
    return Entry(**vars(method) | changes)


def entries(*rows: Entry) -> dict[str, Entry]:
    return {row.name: row for row in rows}


def tried(name: str, *rates: float, ranks: bool = True, **settings) -> tuple[dict, ...]:
    """Five tries: five rates, or three at rank 4 and the lower two at rank 16."""
    at_rank_4 = [{name: rate} | settings for rate in rates]
    return (*at_rank_4, *(try_ | dict(rank=16) for try_ in at_rank_4[:2] if ranks))


RATES, TOKEN_RATES = (1e-3, 2e-3, 4e-3), (2e-3, 4e-3, 1e-2)
WHOLE_RATES = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
OF_LORA, OF_TOKEN = tried("learning_rate", *RATES), tried("learning_rate", *TOKEN_RATES)
OF_PAPER = tried("learning_rate", *RATES, extractor_learning_rate=2e-3)
OF_WHOLE = tried("learning_rate", *WHOLE_RATES, ranks=False)
ANCHOR_TRIES = tuple(dict(learning_rate=rate, eta=eta) | rank for rate, eta, rank in
                     ((2e-3, 1.0, {}), (2e-3, 5.0, {}), (4e-3, 1.0, {}), (2e-3, 1.0, dict(rank=16)),
                      (4e-3, 1.0, dict(rank=16))))
LORA, BOUND = METHODS["lora"], METHODS["bound"]
TOKEN_BOUND = Entry("token", "bound to the token: L_CC on adapters that act at [V] alone, and Y", l_cc,
                    where="token", settings=OF_TOKEN[2], tries=OF_TOKEN)
MAIN = entries(
    Entry("DreamBooth", "L_CC on every weight of a copy", l_cc, settings=OF_WHOLE[1], tries=OF_WHOLE,
          whole_model=True),
    like(LORA, tries=OF_LORA, ways=tuple(WAYS)),
    like(METHODS["switched-off"], tries=OF_LORA),
    like(METHODS["switched-off"], name="switched-off, word kept", tries=OF_LORA, embeddings=False,
         settings=OF_LORA[3],
         about="a LoRA without Y, so that the word at [V] stays; switched off for texts without [V]"),
    like(METHODS["anchor"], tries=ANCHOR_TRIES),
    like(METHODS["embeddings"], tries=tried("embedding_learning_rate", .02, .1, .5, 1, 2, ranks=False)),
    like(METHODS["paper"], tries=OF_PAPER),
    like(METHODS["paper"], name="paper, v_0", loss=untouched_original, tries=OF_PAPER,
         settings=OF_PAPER[3],
         about="the paper's loss with v_original from the base model (its Sec. 14)"),
    TOKEN_BOUND,
    like(BOUND, tries=OF_TOKEN),
    like(METHODS["bound-half"], tries=OF_TOKEN),
    like(METHODS["bound-pairs"], tries=tried("learning_rate", *TOKEN_RATES, extractor_learning_rate=2e-3)),
    like(METHODS["bound-paper"], tries=OF_TOKEN),
    like(METHODS["switched-off"], name="switched-off, longer", times=LONGER,
         about="switched-off for as many passes as bound-pairs takes"),
    like(BOUND, name="bound, longer", times=LONGER, about="bound for as many passes as bound-pairs takes"),
)
PRIOR_TRIES = tuple(dict(learning_rate=rate, eta=1.0) for rate in (5e-5, 1e-4, 2e-4))
EWC_TRIES = tuple(dict(learning_rate=2e-4, eta=eta) for eta in (0.1, 1.0, 10.0))
RELEASED_TRIES = tuple(dict(learning_rate=rate, eta=2.0, extractor_learning_rate=2e-3) for rate in RATES)
FURTHER = entries(
    Entry("DreamBooth + prior", "DreamBooth, and L_CC on the base model's own pictures of the class",
          PriorPreservation, settings=PRIOR_TRIES[2], tries=PRIOR_TRIES, whole_model=True,
          beside=("DreamBooth",)),
    Entry("DreamBooth + EWC", "DreamBooth, and weights that matter stay near the base model's", EWC,
          settings=EWC_TRIES[1], tries=EWC_TRIES, whole_model=True, beside=("DreamBooth",)),
    like(MAIN["paper"], name="released", about="PureCC as its authors' code does it", loss=released,
         settings=RELEASED_TRIES[0], tries=RELEASED_TRIES, beside=("paper",)),
    Entry("merged stages", "PureCC with an extractor that is trained in the same stage", merged_stages,
          settings=OF_LORA[0], tries=OF_LORA[:3], joint=True, beside=("paper",)),
    like(LORA, name="lora, masked", about="lora, and what is outside the concept does not count",
         masked=True, beside=("lora",)),
    like(BOUND, name="bound, masked", about="bound, and what is outside the concept does not count",
         masked=True, beside=("bound",)),
    like(LORA, name="lora, twice", about="lora for as many steps as the paper's two stages", times=2,
         beside=("lora", "paper")),
)


def ablations(method: Entry) -> list[Entry]:
    """The paper's objective on one kind of adapters, with one part replaced (Tables 3 and 6)."""
    def ablation(name: str, about: str, loss: Callable = paper, **settings) -> Entry:
        return like(method, name=f"{method.name}, {name}", about=about, loss=loss, tries=(),
                    settings=method.settings | settings)
    return [*(ablation(f"lambda {value}", f"lambda {value} in place of lambda* (Table 3)",
                       constant_lambda(float(value))) for value in (1, 3, 5)),
            *(ablation(f"eta {eta:g}", f"eta {eta:g} (Table 6)", eta=eta) for eta in (0.5, 1.5, 2.0))]


ABLATIONS = entries(
    *ablations(MAIN["paper"]),
    like(MAIN["paper"], name="not detached", about="the gradient goes through v_original", loss=not_detached,
         tries=()),
    *ablations(MAIN["bound-paper"]),
)
PHRASE = entries(
    like(METHODS["bound-pairs"], name="bound-pairs, lambda*", loss=pairs_with_lambda,
         about="bound-pairs with lambda* M R, its inner products inside the half"),
    like(BOUND, name="bound, Y added", about="bound, and Y^l is added to the word at [V]", embeddings=True,
         residual=True),
    like(BOUND, name="bound, Y replaces", about="bound, and Y^l takes the word's place", embeddings=True),
    like(BOUND, name="bound, values alone", about="bound, with adapters on the values and not on the keys",
         values_alone=True),
    like(TOKEN_BOUND, name="token, word kept", about="adapters at [V] alone, and the word stays", tries=(),
         embeddings=False),
    like(TOKEN_BOUND, name="token, Y added", about="adapters at [V] alone, and Y^l is added to the word",
         tries=(), residual=True),
)


def start(method: Entry, pipe: Pipeline, data: EncodedConcept, config: TrainConfig,
          theta_1: Branch | None) -> Branch:
    """What the method trains, before the first step.

    Y starts as a copy of the frozen extractor's Y if there is one, otherwise from the class word; where it is
    added to a word, at zero.
    """
    generator, Y = generator_for(config.seed, method.stages, step=-1), None
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

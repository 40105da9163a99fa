# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7 · What nothing holds
#
# **Where $v_{original}$ goes, which loss takes it there, and three ways to hold it**
#
# Lesson 6 ended with a warning: $L_{PureCC}$ compares $\theta_2$ with itself, so what the adapters do to both
# texts alike it cannot see. You measure how much that is, and what does it. Then you write three cures
# and compare them at equal fidelity. **Then you can say** why no $\eta$ holds $v_{original}$, what $\eta$
# does where it is held, why bound adapters cost texts without [V] exactly nothing, and what to use.
#
# | | |
# |---|---|
# | Needs | lesson 4 (adapters, hooks, the visit that writes $Y^l$), lesson 6 (Eq. 8 to 15) |
# | Keep open | [`methods.py`](../../purecc_min/methods.py), [`lora.py`](../../purecc_min/lora.py), **after** you have tried |
# | Read after | [`purecc_min/benchmark`](../../purecc_min/benchmark/README.md): more concepts and seeds |
#
# An exercise is a function with a blank body; the cell below checks it. Hints are folded, solutions in
# [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 7 · What nothing holds
#
# Where $v_{original}$ goes, which gradient takes it there, and three ways to hold it.

# %%
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from purecc_min import methods
from purecc_min.benchmark import tables
from purecc_min.benchmark.page import INDIVIDUALS
from purecc_min.benchmark.plans import plan
from purecc_min.benchmark.report import gather
from purecc_min.branch import Branch, Thetas
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode, noised
from purecc_min.embeddings import class_word_states
from purecc_min.learning import train_steps
from purecc_min.lora import key_of
from purecc_min.measure.draw import draw
from purecc_min.measure.measures import Judge
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING
from purecc_min.measure.velocities import TIMES
from purecc_min.objective import pcc_loss
from purecc_min.registry import only_with_token
from purecc_min.train import TrainConfig, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import to_pictures
from tutorials.course import (BLUE, CORAL, INK, YourTurn,
                              expect, expect_close, in_lines, rule_out, several, show)
from tutorials.experiments.mechanism import gradient, look_inside

pipe = load_tiny()                               # the base model, frozen
theta_0 = pipe.velocity
concept = load_concept(FOLDER / TUNING[0], "robot", pipe.picture_size)
data, word = encode(pipe, concept), concept.class_word
config, KEEP = TrainConfig(steps=50, learning_rate=4e-3), (.1, .2, .4, .6, .8, 1)

def train(loss_of_step, theta_1, theta, stage=2, config=config):
    # -> the parameters of theta after the shares KEEP of the steps. The batches are the same in every run.
    steps = train_steps(loss_of_step, Thetas(theta_0, theta_1, theta), data, config, stage,
                        optimizer_for(theta, config))
    kept = [round(share * config.steps) for share in KEEP]
    return [parameters_to_vector(theta.parameters()).detach().clone() for row in steps if row["step"] in kept]

random = generator_for(config.seed, stage=1, step=-1)
theta_1 = Branch.fresh(pipe, class_word_states(pipe, data, random), config.rank, random)
train(methods.l_cc, None, theta_1, stage=1)
theta_1.requires_grad_(False)                    # the extractor, frozen as in lesson 6

def fresh(kind=Branch, where="everywhere"):      # how every run of stage 2 begins
    Y = None if where == "phrase" else theta_1.embeddings.Y
    return kind.fresh(pipe, Y, config.rank, generator_for(config.seed, stage=2, step=-1), where)

theta_2, start = fresh(), fresh()                # start stays untrained
snapshots = {"PureCC": train(methods.paper, theta_1, theta_2)}

with_V = ["a small [V] robot on the left in the snow", "a big [V] robot in the middle at night",
          "a big [V] robot on the right on the beach"]
without_V = ["a big robot on the left in the snow", "a big red cat in the middle on the beach",
             "a small green house on the right in the snow"]

def pictures(theta, theta_null=None):            # -> of three texts with [V], and of three without
    return torch.cat([draw(pipe, theta, texts, word, steps=12, theta_null=theta_null)
                      for texts in (with_V, without_V)])

def show_all(rows):                              # name -> pictures
    show([p for x in rows.values() for p in to_pictures(x)], [in_lines(text) for text in with_V + without_V],
         list(rows), side=1.4)

drawn = {"base model": pictures(None), "PureCC": pictures(theta_2)}
show([r.picture for r in concept.references], left=["[V]"], columns=4, side=1.2)
show_all(drawn)

judge = Judge(Reader.shipped(), CONCEPTS[TUNING[0]], np.stack([r.picture for r in concept.references]))

def like(x):                                     # the references, as the reader network sees them: a cosine
    return judge.similarity(judge.reader(x)).mean().item()

gone = {name: like(x[3:4]) for name, x in drawn.items()}
print("the plain robot, like the references:", {name: round(value, 2) for name, value in gone.items()})
assert gone["PureCC"] > gone["base model"] + 0.15

# %% [markdown] tags=["slide"]
# ## Nobody asked for [V] in the fourth column
#
# ![Pictures after stage 2; the fourth column has a text without [V]](last)
#
# After stage 2 of PureCC, with $\eta = 1$.

# %% [markdown]
# These are lesson 6's two stages, at twice the learning rate. The three columns on the left ask for [V], the
# others do not. The plain robot has turned into *the* robot.
#
# ## 1 · How far has $v_{original}$ moved?
#
# Take noised references $(x_t, t)$, and the untouched model's prediction for the base text, $v_0$. From
# there, two arrows go out:
#
# ```
#                         move of v_complete
#      v_0  o --------------------------------------> v_theta2(x_t | complete)
#            \                                          ^
#             \ move of v_original                      |  R(y_complete, y_base): what L_PureCC looks at
#              '-------------------------------------> v_theta2(x_t | base)
# ```
#
# The length of the lower arrow, as a share of $\lVert v_0 \rVert$, is the **drift**. If [V] alone carried the
# concept, the drift would be zero.
#
# ### Exercise 7.1 ★ · The drift
#
# Return three numbers: the drift; the same share for $v_{complete}$, measured from the same $v_0$; and the
# cosine of the two moves. Read each $[B, C, H, W]$ as **one** long vector.

# %% tags=["exercise"]
def drift(theta_0, theta, batch):
    # -> |move of v_original| / |v_0|, |move of v_complete| / |v_0|, cosine of the moves: three numbers
    # BEGIN SOLUTION 7.1
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_0 = theta_0(x_t, t, texts.base).flatten()
        of_original = theta(x_t, t, texts.base).flatten() - v_0
        of_complete = theta(x_t, t, texts.complete).flatten() - v_0
    cosine = (of_original @ of_complete) / (of_original.norm() * of_complete.norm()).clamp(min=1e-12)
    return of_original.norm() / v_0.norm(), of_complete.norm() / v_0.norm(), cosine
    # END SOLUTION

# %% tags=["wrong"]
# says: measure from theta_0
def drift(theta_0, theta, batch):                # measures from theta's own base text: that is R_complete
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_0 = theta(x_t, t, texts.base).flatten()
        of_original = theta_0(x_t, t, texts.base).flatten() - v_0
        of_complete = theta(x_t, t, texts.complete).flatten() - v_0
    cosine = (of_original @ of_complete) / (of_original.norm() * of_complete.norm()).clamp(min=1e-12)
    return of_original.norm() / v_0.norm(), of_complete.norm() / v_0.norm(), cosine

# %% tags=["wrong"]
# says: of the two moves
def drift(theta_0, theta, batch):                # the cosine of the predictions, not of their moves
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_0 = theta_0(x_t, t, texts.base).flatten()
        v_original, v_complete = theta(x_t, t, texts.base).flatten(), theta(x_t, t, texts.complete).flatten()
    cosine = (v_original @ v_complete) / (v_original.norm() * v_complete.norm())
    return (v_original - v_0).norm() / v_0.norm(), (v_complete - v_0).norm() / v_0.norm(), cosine

# %% tags=["wrong"]
# says: one long vector
def drift(theta_0, theta, batch):                # a share for each sample, and their mean
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_0 = theta_0(x_t, t, texts.base).flatten(1)
        of_original = theta(x_t, t, texts.base).flatten(1) - v_0
        of_complete = theta(x_t, t, texts.complete).flatten(1) - v_0
    cosine = torch.cosine_similarity(of_original, of_complete).mean()
    return (of_original.norm(dim=1) / v_0.norm(dim=1)).mean(), \
        (of_complete.norm(dim=1) / v_0.norm(dim=1)).mean(), cosine

# %% [markdown]
# <details><summary>Hint</summary>
#
# `theta_0` is called once, with the base text; `theta` twice. Keep the cosine of an untrained theta
# from 0 / 0 with `.clamp(min=1e-12)`.
# </details>

# %% tags=["check"]
rows = torch.arange(len(data.ids)).repeat(len(TIMES))                       # every reference at five times
t = torch.tensor(TIMES).repeat_interleave(len(data.ids))
batch = noised(data.x_0[rows], flow.noise_for(rows.tolist(), data.x_0.shape[1:]), t, data.texts.rows(rows))
mine = several(drift(theta_0, theta_2, batch), ("the drift", "the share of v_complete", "the cosine"))
mine = [torch.as_tensor(number).detach() for number in mine]
inside = look_inside(Thetas(theta_0, theta_1, theta_2), theta_1, data)      # the package's numbers
with torch.no_grad():
    v_0, v_0c, v_o, v_c = (theta(batch.x_t, batch.t, text) for theta in (theta_0, theta_2)
                           for text in (batch.texts.base, batch.texts.complete))
moved, whole = (v_o - v_0).norm() / v_0.norm(), (v_c - v_0).norm() / v_0.norm()
each = [(v - v_0).flatten(1).norm(dim=1) / v_0.flatten(1).norm(dim=1) for v in (v_o, v_c)]
rule_out(mine[0], {"the drift: one long vector, not a share for each sample.": each[0].mean(),
                   "the drift: measure from theta_0's prediction.": (v_o - v_0).norm() / v_o.norm(),
                   "the drift: a share of |v_0|, so divide.": (v_o - v_0).norm(),
                   "the drift: lengths, not their squares.": moved**2})
R_c = (v_c - v_o).norm()
rule_out(mine[1], {"v_complete: measure from theta_0's prediction for the base text.": R_c / v_o.norm(),
                   "v_complete: this is R_complete; measure from theta_0.": R_c / v_0.norm(),
                   "v_complete: v_0 is theta_0's prediction for the BASE text.":
                   (v_c - v_0c).norm() / v_0c.norm()})
rule_out(mine[2], {"the cosine is of the two moves, not of the predictions.":
                       torch.cosine_similarity(v_o.flatten(), v_c.flatten(), dim=0)})
expect_close(mine[0], moved, "the drift (from theta_0's prediction, by its length)")
expect_close(mine[0] / mine[1], torch.tensor(inside["base moves"]), "drift over the move of v_complete", 1e-3)
expect_close(mine[2], torch.tensor(inside["same way"]), "the cosine (of the two moves)", 1e-3)
expect(drift(theta_0, pipe.velocity, batch)[0] == 0, "the base model itself should have no drift.")
print("7.1 right                        untrained    after stage 2")
before = drift(theta_0, start, batch)
names = "move of v_original (the drift)", "move of v_complete", "cosine of the two"
for name, a, b in zip(names, before, mine):
    print(f"{name:31s}{a:11.3f}{b:17.3f}")
assert before[0] == 0 and mine[0] > 0.6 * mine[1] and mine[2] > 0.8 and 0 < before[1] < 0.6 * mine[1]

# %% [markdown]
# After fifty steps $v_{original}$ has moved about as far as $v_{complete}$, and in nearly the same direction.
# The concept is not where [V] is. It is in the adapters, for any text about a robot. (Untrained,
# $v_{complete}$ has moved a little already, since $Y^l$ is the extractor's.)
#
# **Why the loss allows it, in two lines.** Add the same $\delta$ to both predictions of $\theta_2$:
#
# $$R(y_{complete},y_{base}) = (v_{complete}+\delta)-(v_{original}+\delta) = v_{complete}-v_{original}.$$
#
# So $R_c$, $\lambda^*$ and $L_{PureCC}$ stay *exactly* what they were, for every $\delta$, and $L_{CC}$ falls
# if $\delta$ leads toward the references. The cheapest way to learn the concept is to move both alike.

# %% [markdown] tags=["slide"]
# ## Why the loss allows it
#
# $$(v_{complete} + \delta) - (v_{original} + \delta) = v_{complete} - v_{original}$$
#
# Move both predictions by the same $\delta$: $R_c = R(y_{complete}, y_{base})$, $\lambda^*$ and $L_{PureCC}$ do
# not change. $L_{CC}$ falls if $\delta$ leads toward the references.

# %% [markdown]
# ## 2 · Which loss moves it?
#
# $L_{PureCC}$ *allows* the drift. What causes it? Two gradients push $\theta_2$: get hold of them.
#
# ### Exercise 7.2 ★ · Two gradients
#
# `pcc_loss(theta_1, theta_2, batch, eta)` returns the loss and its terms, among them `loss_cc` and
# `loss_purecc`. Return the gradient of each over **all** parameters of $\theta_2$, as one vector $[P]$, in
# the order of `theta_2.parameters()`. Leave no trace in `.grad`.

# %% tags=["exercise"]
def two_gradients(theta_1, theta_2, batch):
    # -> g_CC [P], g_PureCC [P]
    # BEGIN SOLUTION 7.2
    _, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    weights = list(theta_2.parameters())
    of_cc = torch.autograd.grad(terms.loss_cc, weights, retain_graph=True)
    of_purecc = torch.autograd.grad(terms.loss_purecc, weights)
    return parameters_to_vector(of_cc), parameters_to_vector(of_purecc)
    # END SOLUTION

# %% tags=["wrong"]
# says: of L_PureCC alone
def two_gradients(theta_1, theta_2, batch):      # the second is the gradient of the sum
    loss, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    weights = list(theta_2.parameters())
    of_cc = torch.autograd.grad(terms.loss_cc, weights, retain_graph=True)
    return parameters_to_vector(of_cc), parameters_to_vector(torch.autograd.grad(loss, weights))

# %% tags=["wrong"]
# says: add up in .grad
def two_gradients(theta_1, theta_2, batch):      # .grad is never emptied
    _, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    found = []
    for loss in (terms.loss_cc, terms.loss_purecc):
        loss.backward(retain_graph=True)
        found.append(parameters_to_vector([p.grad for p in theta_2.parameters()]).clone())
    return tuple(found)

# %% tags=["wrong"]
# says: return g_CC first
def two_gradients(theta_1, theta_2, batch):
    _, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    weights = list(theta_2.parameters())
    of_cc = torch.autograd.grad(terms.loss_cc, weights, retain_graph=True)
    return parameters_to_vector(torch.autograd.grad(terms.loss_purecc, weights)), parameters_to_vector(of_cc)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.autograd.grad(loss, weights, retain_graph=True)` writes nothing anywhere. `parameters_to_vector`
# joins its list to one vector.
# </details>

# %% tags=["check"]
theta_2.zero_grad()
_, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
mine = several(two_gradients(theta_1, theta_2, batch), ("g_CC", "g_PureCC"))
theirs = [gradient(loss, theta_2)[0] for loss in (terms.loss_cc, terms.loss_purecc)]
left = any(p.grad is not None for p in theta_2.parameters())
theta_2.zero_grad()
rule_out(mine[0], {"return g_CC first, then g_PureCC.": theirs[1]})
rule_out(mine[1], {"g_PureCC: two calls of backward add up in .grad." if left else
                   "g_PureCC: of L_PureCC alone; this is the gradient of the sum.": sum(theirs)})
expect_close(mine[0], theirs[0], "g_CC", 1e-5)
expect_close(mine[1], theirs[1], "g_PureCC (of L_PureCC alone)", 1e-5)
expect(not left, "you have left something in .grad.")
g_cc, g_pure = (g.detach() for g in mine)
in_loss = (terms.loss_purecc / (terms.loss_cc + terms.loss_purecc)).item()
in_gradient = (g_pure.norm() / (g_cc.norm() + g_pure.norm())).item()
print(f"7.2 right: {len(g_cc)} parameters; |g_CC| = {g_cc.norm():.4f}, |g_PureCC| = {g_pure.norm():.4f}, "
      f"cosine {torch.cosine_similarity(g_cc, g_pure, dim=0):.2f}")
print(f"the share of L_PureCC, for eta = 1:  in the loss {in_loss:.1%}, in the gradients' lengths "
      f"{in_gradient:.0%}")
assert in_loss < 0.15 and in_gradient > 2 * in_loss

# %% [markdown]
# $L_{PureCC}$ is a small part of the loss, and a much larger part of the gradients. What does it do? How a
# prediction answers to a step is a **directional derivative**: with the parameters $w$, a direction $d$, and
# the Jacobian $J$ of the prediction,
#
# $$\frac{v(w+h\,d)-v(w-h\,d)}{2h} = J d+O(h^2).$$
#
# This *central difference* needs two forward passes with a shifted $\theta_2$.
#
# ### Exercise 7.3 ★★ · The answer of a prediction
#
# `predict()` returns a tensor, computed with `theta`'s parameters as they are at that moment. Shift the
# parameters by $\pm h d$, predict, and put them back **exactly**.
# `vector_to_parameters(w, theta.parameters())` writes a vector $[P]$ into them.

# %% tags=["exercise"]
def answer(theta, d, predict, h):
    # d [P] -> the derivative of predict() along d, of predict()'s shape
    # BEGIN SOLUTION 7.3
    w = parameters_to_vector(theta.parameters()).detach().clone()
    with torch.no_grad():
        vector_to_parameters(w + h * d, theta.parameters())
        ahead = predict()
        vector_to_parameters(w - h * d, theta.parameters())
        behind = predict()
        vector_to_parameters(w, theta.parameters())
    return (ahead - behind) / (2 * h)
    # END SOLUTION

# %% tags=["wrong"]
# says: it is 2 h
def answer(theta, d, predict, h):                # the way from behind to ahead is 2 h long
    w = parameters_to_vector(theta.parameters()).detach().clone()
    with torch.no_grad():
        vector_to_parameters(w + h * d, theta.parameters())
        ahead = predict()
        vector_to_parameters(w - h * d, theta.parameters())
        behind = predict()
        vector_to_parameters(w, theta.parameters())
    return (ahead - behind) / h

# %% tags=["wrong"]
# says: not exactly
def answer(theta, d, predict, h):                # there and back by adding: w is only nearly what it was
    def shift(step):
        vector_to_parameters(parameters_to_vector(theta.parameters()) + step * d, theta.parameters())
        return predict()

    with torch.no_grad():
        ahead, behind = shift(h), shift(-2 * h)
        shift(h)
    return (ahead - behind) / (2 * h)

# %% tags=["wrong"]
# says: divide by 2 h
def answer(theta, d, predict, h):                # the difference itself
    w = parameters_to_vector(theta.parameters()).detach().clone()
    with torch.no_grad():
        vector_to_parameters(w + h * d, theta.parameters())
        ahead = predict()
        vector_to_parameters(w - h * d, theta.parameters())
        behind = predict()
        vector_to_parameters(w, theta.parameters())
    return ahead - behind

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep `w = parameters_to_vector(theta.parameters()).detach().clone()` and write `w + h * d`, `w - h * d` and
# at the end `w` itself. Adding and subtracting in turn rounds each time. (The check compares with a backward
# pass: $\langle Jd,u\rangle = \langle d,J^\top u\rangle$.)
# </details>

# %% tags=["check"]
def predict_with(theta):                         # -> v_original and v_complete, [2, B, C, H, W]
    return lambda: torch.stack([theta(batch.x_t, batch.t, text)
                                for text in (batch.texts.base, batch.texts.complete)])

h = 1e-2
d, w = -g_cc / g_cc.norm(), parameters_to_vector(theta_2.parameters()).detach().clone()
Jd = answer(theta_2, d, predict_with(theta_2), h)
Jd = Jd.detach() if isinstance(Jd, Tensor) else Jd
same = torch.equal(parameters_to_vector(theta_2.parameters()), w)
vector_to_parameters(w, theta_2.parameters())
expect(same, "theta_2's parameters are not exactly what they were.")
expect(isinstance(Jd, Tensor) and Jd.shape[1:] == batch.x_t.shape, "return a tensor of predict()'s shape.")
expect(bool(Jd.any()), "the answer is 0: are the shifted parameters written before predict()?")
v = predict_with(theta_2)()
found = torch.autograd.grad((v * Jd).sum(), list(theta_2.parameters()))     # J^T u, with u = Jd
there, back = Jd.square().sum(), parameters_to_vector(found) @ d
expect(abs(there / back - 2) > 0.1, "twice too long: from w - h d to w + h d it is 2 h.")
expect(abs(there / back - 2 * h) > 0.1 * h, "divide by 2 h: this is the difference itself.")
expect(there / back > 0, "the wrong sign: ahead minus behind.")
expect_close(there / back, torch.ones(()), "<Jd, u> / <d, J^T u>", 0.02)
print(f"7.3 right: <Jd, u> = {there:.4f} by two forward passes, <d, J^T u> = {back:.4f} by a backward pass")

# %% [markdown]
# How far do $v_{original}$, $v_{complete}$ and $R_c$ go along each of the two, per unit of step? And
# does $v_{original}$ go where the whole training has taken it?

# %%
def answers(theta):                              # name of a gradient -> the answers of v_original, v_complete
    gradients = zip(("g_CC", "g_PureCC"), two_gradients(theta_1, theta, batch))
    return {name: g.norm() * answer(theta, -g / g.norm(), predict_with(theta), h) for name, g in gradients}

found, held = {"begin": answers(start), "end": answers(theta_2)}, {}
print("a step along               v_original  v_complete  R_complete   cosine of the   of v_original")
print("                                                                first two       with the drift")
for when, by_name in found.items():
    for name, (of_o, of_c) in by_name.items():
        cosine, onward = (torch.cosine_similarity(of_o.flatten(), other.flatten(), dim=0).item()
                            for other in (of_c, v_o - v_0))
        lengths = of_o.norm().item(), of_c.norm().item(), (of_c - of_o).norm().item()
        held[when, name] = (*lengths, cosine, onward)
        print(f"-{name:9s} at the {when:8s}" + "".join(f"{x:12.4f}" for x in lengths)
              + f"{cosine:16.3f}{onward:16.3f}")
for o, c, R, cosine, _ in held.values():
    assert o > 0.5 * c and R < 0.8 * o and cosine > 0.7
assert held["begin", "g_CC"][4] > 0.1 and held["end", "g_CC"][4] < 0

def strength(R):
    return R.square().mean(1).sqrt()             # [B, H, W]

n = len(data.ids) * (len(TIMES) // 2)            # the first reference, at the middle time
figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.4), layout="compressed")
for row, (name, (of_o, of_c)) in zip(axes, found["end"].items()):
    row[0].imshow(pipe.decode_images(batch.x_t[n:n + 1])[0])
    maps = [strength(v)[n] for v in (of_o, of_c, of_c - of_o)]
    for axis, v in zip(row[1:], maps):
        axis.imshow(v, cmap="magma", vmin=0, vmax=max(m.max() for m in maps))
    row[0].set_ylabel({"g_CC": "$-g_{CC}$", "g_PureCC": "$-g_{PureCC}$"}[name], rotation=0, ha="right")
for axis, title in zip(axes[0], ("$x_t$", "$v_{original}$", "$v_{complete}$", "$R_c$")):
    axis.set_title(title)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown] tags=["slide"]
# ## Which loss moves it? $L_{CC}$, and the other one does not stop it
#
# ![Maps of where one small step changes v_original and v_complete, for each loss](last)
#
# A row: where one small step against a loss's gradient acts, on one scale. Neither loss asks for a move of
# $v_{original}$. The adapters are shared, so it goes along.
# ???
# One step moves both predictions nearly alike: the maps of v_original and v_complete look the same, and that of
# their difference R_c is almost dark. L_CC never sees the base text; the same adapters act on it all the same.
# No term of Eq. 15 knows where v_original was. Something has to say so: a loss, a switch, or the place where
# adapters act.

# %% [markdown]
# * **One step moves both predictions nearly alike.** $L_{CC}$ never sees the base text. But adapters that act
# on every token change the picture of "a robot" with that of "a [V] robot", if nothing asks them not to.
# * **At the beginning $-g_{CC}$ leads $v_{original}$ partly to where it ends** (last column). At the end this
# one batch's gradient points partly *back*: the way is the sum of all steps, not the last one. Section 6
# shows that $L_{CC}$ is enough: a LoRA without $L_{PureCC}$ drifts as far.
# * **$-g_{PureCC}$ moves $v_{original}$ too.** Only the small part in the column R_complete does what its
# loss asks for.
# * **So no $\eta$ helps.** No term of Eq. 15 knows where $v_{original}$ *was*. Something has to say so: a
# loss, a switch, or the place where adapters act.
#
# ## 3 · First cure: an anchor
#
# Ask for it. On the base texts, $\theta$ should predict what $\theta_0$ predicts (differential output
# preservation, DOP; it is not in the paper):
#
# $$L = L_{CC}+\eta\,L_{anchor}, \qquad
# L_{anchor} = \mathbb E\,\lVert v_\theta(x_t\mid y_{base})-v_{\theta_0}(x_t\mid y_{base})\rVert^2.$$
#
# ### Exercise 7.4 ★ · The anchor

# %% tags=["exercise"]
def anchor(theta_0, theta, batch):
    # -> L_anchor, a number
    # BEGIN SOLUTION 7.4
    with torch.no_grad():
        v_before = theta_0(batch.x_t, batch.t, batch.texts.base)
    return (theta(batch.x_t, batch.t, batch.texts.base) - v_before).square().mean()
    # END SOLUTION

# %% tags=["wrong"]
# says: base text
def anchor(theta_0, theta, batch):               # holds the text with [V], so nothing could be learned
    with torch.no_grad():
        v_before = theta_0(batch.x_t, batch.t, batch.texts.base)
    return (theta(batch.x_t, batch.t, batch.texts.complete) - v_before).square().mean()

# %% tags=["wrong"]
# says: no gradient
def anchor(theta_0, theta, batch):               # the value is right, and no gradient flows
    with torch.no_grad():
        v_before = theta_0(batch.x_t, batch.t, batch.texts.base)
        return (theta(batch.x_t, batch.t, batch.texts.base) - v_before).square().mean()

# %% tags=["wrong"]
# says: a mean
def anchor(theta_0, theta, batch):               # a sum over the numbers of a sample
    with torch.no_grad():
        v_before = theta_0(batch.x_t, batch.t, batch.texts.base)
    return (theta(batch.x_t, batch.t, batch.texts.base) - v_before).square().sum((1, 2, 3)).mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# Both networks get the base text. `theta_0` stands under `torch.no_grad()`, `theta` does not.
# </details>

# %% tags=["check"]
theirs, mine = methods.anchor_loss(Thetas(theta_0, None, theta_2), batch), anchor(theta_0, theta_2, batch)
rule_out(mine, {"L_anchor holds the base text, in both networks, and no [V].": (v_c - v_0).square().mean(),
                "L_anchor: theta keeps its base text; this is R_complete.": (v_c - v_o).square().mean(),
                "L_anchor: a mean over all numbers, not a sum.": (v_o - v_0).square().sum((1, 2, 3)).mean(),
                "L_anchor: square the difference.": (v_o - v_0).abs().mean()})
expect_close(mine, theirs, "L_anchor (the base text, in both networks)", 1e-6)
expect(mine.requires_grad, "the value is right, but there is no gradient: theta has to feel it.")
g_anchor = gradient(mine, theta_2)[0]
expect_close(g_anchor, gradient(theirs, theta_2)[0], "its gradient", 1e-5)
with torch.no_grad():
    way_back = theta_0(batch.x_t, batch.t, batch.texts.base) - theta_2(batch.x_t, batch.t, batch.texts.base)
print("7.4 right. Along minus this gradient, v_original goes the way back to the base model's:")
back = {}
for name, g in (("g_CC", g_cc), ("g_PureCC", g_pure), ("g_anchor", g_anchor)):
    of_o = answer(theta_2, -g / g.norm(), predict_with(theta_2), h)[0]
    back[name] = torch.cosine_similarity(of_o.flatten(), way_back.flatten(), dim=0).item()
    print(f"   -{name:9s} |g| = {g.norm():.4f}   cosine of v_original's answer with the way back "
          f"{back[name]:6.3f}")
assert back["g_anchor"] > 0.2 and back["g_anchor"] > max(back["g_CC"], back["g_PureCC"])

# %% [markdown]
# Of the three the anchor's gradient leads $v_{original}$ home most directly. ($-g_{CC}$ at the end leads
# partly home as well: the minus sign in section 2's last column.) Its price: a second prediction that comes
# back, a forward pass of $\theta_0$, and a weight to choose. And it is a *request*.
#
# ## 4 · Second cure: switching off
#
# If the text has no [V], why use the adapters at all?
#
# $$v(x_t\mid y) = \begin{cases} v_\theta(x_t\mid y) & \text{if [V] is in } y,\\
# v_{\theta_0}(x_t\mid y) & \text{otherwise.}\end{cases}$$
#
# `text.slots` $[B, T]$ is 0 except where a placeholder stands. A batch may mix both kinds of texts: guidance
# (lesson 3) puts the empty text and the prompt into one.
#
# ### Exercise 7.5 ★★ · The switch, row by row

# %% tags=["exercise"]
def switched_off(theta, theta_0):
    # -> a velocity: theta for the rows whose text has a placeholder, theta_0 for all others
    def velocity(x_t, t, text):
        # BEGIN SOLUTION 7.5
        named = (text.slots > 0).any(dim=1)[:, None, None, None]            # [B, 1, 1, 1]
        return torch.where(named, theta(x_t, t, text), theta_0(x_t, t, text))
        # END SOLUTION
    return velocity

# %% tags=["wrong"]
# says: row by row
def switched_off(theta, theta_0):                # one decision for the whole batch
    def velocity(x_t, t, text):
        return theta(x_t, t, text) if (text.slots > 0).any() else theta_0(x_t, t, text)
    return velocity

# %% tags=["wrong"]
# says: anywhere in a text
def switched_off(theta, theta_0):                # looks at the first token alone
    def velocity(x_t, t, text):
        named = (text.slots[:, 0] > 0)[:, None, None, None]
        return torch.where(named, theta(x_t, t, text), theta_0(x_t, t, text))
    return velocity

# %% tags=["wrong"]
# says: the other way round
def switched_off(theta, theta_0):
    def velocity(x_t, t, text):
        plain = (text.slots == 0).all(dim=1)[:, None, None, None]
        return torch.where(plain, theta(x_t, t, text), theta_0(x_t, t, text))
    return velocity

# %% [markdown]
# <details><summary>Hint</summary>
#
# `(text.slots > 0).any(dim=1)` is $[B]$. Give it three axes of length 1, then `torch.where(named, a, b)`
# chooses a row's prediction.
# </details>

# %% tags=["check"]
mixed = pipe.encode_text(["", "a [V] robot at night", "a robot at night", "[V] robot"], {"[V]": word})
x_t, t = batch.x_t[:4], batch.t[:4]
with torch.no_grad():
    theirs, mine = (switch(theta_2, theta_0)(x_t, t, mixed) for switch in (only_with_token, switched_off))
    base, of_theta = theta_0(x_t, t, mixed), theta_2(x_t, t, mixed)
rule_out(mine, {"it is the other way round: theta is for the rows with [V].": base + of_theta - theirs,
                "theta answers all rows. Decide row by row: rows 0 and 2 of this batch have no [V].":
                of_theta,
                "the base model answers all rows; [V] may stand anywhere in a text.": base})
expect(isinstance(mine, Tensor) and torch.allclose(mine[[0, 2]], base[[0, 2]], atol=1e-3),
       "rows 0 and 2 of this batch have no [V]: they should be the base model's. Decide row by row.")
expect_close(mine, theirs, "the velocity (every row with [V] is theta's, wherever [V] stands)")
print("7.5 right: the rows without [V] are the base model's")

# %% [markdown]
# The leak is gone, for any LoRA, after the training. But see what has changed in guidance,
# $v_\varnothing+g\,(v_y-v_\varnothing)$. Suppose that the adapters add $\delta$ to *every* prediction. If
# they answer the empty text too, $\delta$ arrives once:
#
# $$(v_\varnothing+\delta)+g\,\big((v_y+\delta)-(v_\varnothing+\delta)\big)
# = v_\varnothing+g\,(v_y-v_\varnothing)+\delta.$$
#
# With the base model's empty text it arrives $g$ times. What was learned in one way is drawn in another.

# %%
@torch.no_grad()
def guided(theta, g):
    text, null = batch.texts.complete, batch.texts.null
    return flow.guide(theta(batch.x_t, batch.t, null), theta(batch.x_t, batch.t, text), g)

switch = switched_off(theta_2, theta_0)
print("how far guidance moves from the base model's, as a multiple of the move without guidance")
print("        g    the adapters answer the empty text    the base model does")
for g in (1.0, 2.0, pipe.guidance):
    own, off = ((guided(theta, g) - guided(theta_0, g)).norm() for theta in (theta_2, switch))
    if g == 1:
        once = own
    print(f"{g:9g} {own / once:38.2f} {off / once:22.2f}")
assert off > 1.15 * own and abs(off - g * once) < 1e-2 * off

drawn["PureCC, switched"] = pictures(switch)
show_all(drawn)
assert torch.equal(drawn["PureCC, switched"][3:], drawn["base model"][3:])
assert not torch.equal(drawn["PureCC, switched"][:3], drawn["PureCC"][:3])

# %% [markdown] tags=["slide"]
# ## Switched off without [V]
#
# ![Pictures with the adapters switched off for texts without [V]](last)
#
# The last three columns are the base model's, bit for bit. But guidance's empty text is now the base model's
# too: what was learned arrives $g$ times.

# %% [markdown]
# In the right column of the table the move is multiplied by $g$, exactly. In the left one it grows less: the
# adapters move the empty text too, and what is common to both cancels. In the pictures, the three without [V]
# are the base model's, bit for bit; the other three come from *the same weights* as the row above them.
#
# **Where a switch cannot help: one picture, two robots.** "A [V] robot beside a robot" has a [V] in it, so
# the adapters are on, for every token. Only something that acts inside the picture, token by token, could
# tell the two robots apart.
#
# ## 5 · Third cure: binding
#
# Let the adapters act at [V]'s token only. A text without [V] has no such token, so nothing acts. Which
# layers can be adapted there? Follow the slot through block $l$ (lesson 4: at its input stands $Y^l$):
#
# ```
#                 .--> to_k, to_v ---> keys and values ---> attended to by EVERY token, patches too
#    Y^l ---------|
#                 '--> to_q ---> what the slot itself reads ---> to_out ---> MLP ---> thrown away:
#                                                                                     Y^(l+1) comes
# ```
#
# What the slot computes for *itself* never leaves it. What others read from it are its keys and values. Test
# it: push the output of each layer at the slot, in all blocks, and see whether $v$ moves.

# %% [markdown] tags=["slide"]
# ## Which layers can be bound to [V]?
#
# ![Keys and values of the slot are read by every token; what its query reads is overwritten by the next
# block's Y](../diagrams/bound.svg)
#
# Only the keys and values of the slot leave it.

# %%
complete, Y, depth = batch.texts.complete, theta_1.embeddings.Y, pipe.mmdit.config.depth
slots = complete.slots > 0                                                  # [B, T]
here = batch.x_t, batch.t, complete

@torch.no_grad()
def pushed(name, with_Y):                        # v, with a random push at the slot behind the layer `name`
    def push(layer, inputs, output):
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0))
        return output + 0.5 * slots[..., None] * noise

    def visit(l, block, x, c, vec):
        layer = dict(block.named_modules()).get(name)                       # the last block has no to_out
        handle = layer.register_forward_hook(push) if layer is not None else None
        out = block(x, torch.where(slots[..., None], Y[l], c) if with_Y else c, vec)
        if handle is not None:
            handle.remove()
        return out
    return pipe.velocity(*here, visit)

layers = [f"attention.text.{name}" for name in ("to_q", "to_k", "to_v", "to_out")] + ["text_mlp.fc2"]
still, reach = {with_Y: pushed("nothing", with_Y) for with_Y in (True, False)}, {}
print(f"{'pushed at the slot':22s}{'v moves, with Y in every block':>32s}{'without Y':>14s}")
for name in layers:
    for with_Y in (True, False):
        reach[name, with_Y] = ((pushed(name, with_Y) - still[with_Y]).norm() / still[with_Y].norm()).item()
    print(f"{name:22s}{reach[name, True]:32.2%}{reach[name, False]:14.2%}")
assert all((reach[name, True] > 0) == (name[-4:] in ("to_k", "to_v")) for name in layers)
assert all(reach[name, False] > 0 for name in layers)

# %% [markdown]
# With $Y^l$ in every block, exactly two layers reach the picture; the zeros are exact. (In the right column
# nothing overwrites the slot, and every layer counts. The argument holds *because of* Eq. 7.) So a bound set
# has adapters on `to_k` and `to_v` of the text stream and nowhere else: $y=Wx+m\cdot BAx$, where the mask $m$
# is 1 where it acts and 0 at every other token.
#
# ### Exercise 7.6 ★★★ · Bound adapters
#
# Write the visit: put $Y^l$ into the places (unless `Y` is None), attach the adapters of block $l$ to
# `block.attention.text.to_k` and `.to_v` with hooks (lesson 4), multiply each change with the mask, run the
# block, remove the hooks.

# %% tags=["exercise"]
def bound_visit(pairs, places, Y):
    # pairs: (l, "to_k" or "to_v") -> A [r, D], B [D, r]; places [B, T] bool; Y [depth, D] or None -> a visit
    def hook(A, B):
        # BEGIN SOLUTION 7.6
        def add(layer, inputs, output):
            return output + places[..., None] * (inputs[0] @ A.T @ B.T)
        return add
        # END SOLUTION

    def visit(l, block, x, c, vec):
        # BEGIN SOLUTION 7.6
        if Y is not None:
            c = torch.where(places[..., None], Y[l], c)
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_k", "to_v")]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
        # END SOLUTION
    return visit

# %% tags=["wrong"]
# says: without [V] has changed
def bound_visit(pairs, places, Y):               # no mask: an ordinary LoRA on two layers
    def hook(A, B):
        def add(layer, inputs, output):
            return output + inputs[0] @ A.T @ B.T
        return add

    def visit(l, block, x, c, vec):
        if Y is not None:
            c = torch.where(places[..., None], Y[l], c)
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_k", "to_v")]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
    return visit

# %% tags=["wrong"]
# says: nothing else, with the mask
def bound_visit(pairs, places, Y):               # the mask is laid on the whole output
    def hook(A, B):
        def add(layer, inputs, output):
            return places[..., None] * (output + inputs[0] @ A.T @ B.T)
        return add

    def visit(l, block, x, c, vec):
        if Y is not None:
            c = torch.where(places[..., None], Y[l], c)
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_k", "to_v")]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
    return visit

# %% tags=["wrong"]
# says: hook is left behind
def bound_visit(pairs, places, Y):               # nothing is removed
    def hook(A, B):
        def add(layer, inputs, output):
            return output + places[..., None] * (inputs[0] @ A.T @ B.T)
        return add

    def visit(l, block, x, c, vec):
        if Y is not None:
            c = torch.where(places[..., None], Y[l], c)
        for name in ("to_k", "to_v"):
            getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
        return block(x, c, vec)
    return visit

# %% tags=["wrong"]
# says: both to_k and to_v
def bound_visit(pairs, places, Y):               # values alone
    def hook(A, B):
        def add(layer, inputs, output):
            return output + places[..., None] * (inputs[0] @ A.T @ B.T)
        return add

    def visit(l, block, x, c, vec):
        if Y is not None:
            c = torch.where(places[..., None], Y[l], c)
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_v",)]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
    return visit

# %% tags=["wrong"]
# says: Y is not there
def bound_visit(pairs, places, Y):               # the words stay, Y or not
    def hook(A, B):
        def add(layer, inputs, output):
            return output + places[..., None] * (inputs[0] @ A.T @ B.T)
        return add

    def visit(l, block, x, c, vec):
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_k", "to_v")]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
    return visit

# %% [markdown]
# <details><summary>Hint</summary>
#
# The mask is `places[..., None]`, $[B, T, 1]$. It multiplies $BAx$ only; $Wx$ stays at every token.
# `try: return block(x, c, vec)` with `finally:` removes the hooks on every way out.
# </details>

# %% tags=["check"]
class Bound(Branch):                             # trained by the package's loop, computed by your visit
    def forward(self, x_t, t, text):
        keys = {(l, name): key_of(l, f"attention.text.{name}")
                for l in range(depth) for name in ("to_k", "to_v")}
        pairs = {place: (self.lora.A[key], self.lora.B[key]) for place, key in keys.items()}
        Y = None if self.embeddings is None else self.embeddings.Y
        return self.pipe.velocity(x_t, t, text, bound_visit(pairs, self.lora.places(text, 1), Y))

layers_k_v = [layer for block in pipe.mmdit.blocks
              for layer in (block.attention.text.to_k, block.attention.text.to_v)]
for layer in layers_k_v:                         # what an earlier try may have left behind
    layer._forward_hooks.clear()
with torch.no_grad():
    base = theta_0(*here[:2], batch.texts.base)
for where in ("token", "phrase"):                # at [V] alone with Y, and at its phrase with no Y
    yours, ours, no_keys, no_Y = fresh(Bound, where), *(fresh(Branch, where) for _ in range(3))
    for parameters in zip(*(theta.parameters() for theta in (yours, ours, no_keys, no_Y))):
        p = parameters[1].data                   # one set, which changes something
        p = p + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
        for own in parameters:
            own.data = p.clone()
    for key, B in no_keys.lora.B.items():
        B.data *= not key.endswith("to_k")
    no_Y.embeddings = None
    with torch.no_grad():
        mine = yours(*here)
        left = any(layer._forward_hooks for layer in layers_k_v)
        expect(not left, "a hook is left behind after the block.")
        of_base, theirs = yours(*here[:2], batch.texts.base), ours(*here)
        rule_out(mine, {"adapters on both to_k and to_v.": no_keys(*here)})
        if where == "token":
            rule_out(mine, {"Y is not there: it takes its places in c.": no_Y(*here)})
    expect(torch.equal(of_base, base), "a text without [V] has changed. Multiply the change, and nothing "
                                       "else, with the mask.")
    expect_close(mine, theirs, f"v with adapters that are bound to the {where}", 1e-3)
    of_yours, of_ours = (gradient(theta(*here).square().mean(), theta) for theta in (yours, ours))
    expect_close(of_yours, of_ours, "the gradient in the adapters and Y", 1e-3)
    print(f"7.6 right: bound to the {where}, the package's v to {(mine - theirs).abs().max():.0e}; "
          "without [V] the base model's, bit for bit")

# %% [markdown]
# The anchor *asks*, the switch *chooses*, binding makes it *impossible*: without [V] $m=0$ at every token, so
# $y=Wx+0$ in every layer, before the training, after it, and for guidance's empty text.
#
# **From the token to the phrase.** You have tested the function in two places. Bound to the *token*, with
# $Y^l$ in the word's place, [V] is a word without a sentence: overwritten in every block, it does not know
# which of two robots it speaks of. And a causal text encoder puts what is said of a thing, "on the left",
# into the words *after* it. So keep the word, and let the adapters act at all tokens of [V]'s **phrase**,
# from [V] to the end of its clause: the same function with another mask and without $Y$. That is today's
# cure, `bound` in the package; the token is its older form, `token` in the benchmark. Lesson 9 tells the
# story.
#
# ## 6 · Five runs on the same draws
#
# PureCC; a plain LoRA ($L_{CC}$); an anchored one ($L_{CC}+L_{anchor}$); and adapters bound to the token and
# to the phrase ($L_{CC}$). One learning rate, the same batches; fifty steps each, and two hundred for the
# bound ones, which learn more slowly. The base model answers guidance's empty text for all.

# %%
def l_cc(thetas, batch, eta):
    return (thetas.theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean(), {}

def with_anchor(thetas, batch, eta):
    return l_cc(thetas, batch, eta)[0] + eta * anchor(thetas.theta_0, thetas.theta, batch), {}

runs = {"PureCC": theta_2, "LoRA": fresh(), "anchored": fresh(),
        "token": fresh(Bound, "token"), "phrase": fresh(Bound, "phrase")}
for name, loss in (("LoRA", l_cc), ("anchored", with_anchor)):
    snapshots[name] = train(loss, theta_1, runs[name])
for name in ("token", "phrase"):
    snapshots[name] = train(l_cc, theta_1, runs[name], config=replace(config, steps=200))
drawn = {name: pictures(runs.get(name), theta_0) for name in ("base model", *runs)}
for some in (("PureCC", "LoRA", "anchored"), ("base model", "token", "phrase")):
    show_all({name: drawn[name] for name in some})
for name in ("token", "phrase"):                 # also after the training
    with torch.no_grad():
        assert torch.equal(runs[name](*here[:2], batch.texts.base), base)
    assert torch.equal(drawn[name][3:], drawn["base model"][3:])

# %% [markdown] tags=["slide"]
# ## Bound runs, with [V] and without
#
# ![Pictures of the base model and of the bound runs, with [V] on the left and without [V] on the right](last)
#
# Left: with [V]. Right: without. The right halves of the rows *token* and *phrase* are the base model's, bit
# for bit.

# %%
def apart(a, b):                                 # mean difference of pixels, 0 to 1
    return ((a - b).abs().mean() / 2).item()

beside = ["a big [V] robot on the left and a small robot on the right in the room",
          "a small [V] robot on the left and a big robot on the right at night",
          "a small robot on the left and a big [V] robot on the right in the meadow",
          "a big robot on the left and a small [V] robot on the right in the snow"]
halves = [slice(32, 64)] * 2 + [slice(0, 32)] * 2                           # where the plain robot stands
two = {name: draw(pipe, runs.get(name), beside, word, steps=12, theta_null=theta_0) for name in drawn}
plain = {name: [x[n, :, :, half] for n, half in enumerate(halves)] for name, x in two.items()}
table = {}
heads = ((12, "like the", "references"), (12, "drift on", "base texts"), (12, "change", "with [V]"),
         (12, "of pictures", "without"), (16, "of a plain", "one beside [V]"), (12, "L_PureCC", "/ L"))
for line in (1, 2):
    print(" " * 12 + "".join(f"{head[line]:>{head[0]}s}" for head in heads))
for name, x in drawn.items():
    theta = runs.get(name, theta_0)
    changes = [apart(x[part], drawn["base model"][part]) for part in (slice(0, 3), slice(3, 6))]
    changes.append(np.mean([apart(a, b) for a, b in zip(plain[name], plain["base model"])]))
    with torch.no_grad():
        loss, terms = pcc_loss(theta_1, theta, batch, eta=1.0)
    share = (terms.loss_purecc / loss).item()
    table[name] = like(x[:3]), drift(theta_0, theta, batch)[0].item(), *changes, share
    print(f"{name:12s}" + "".join(f"{value:{head[0]}.3f}" for value, head in zip(table[name], heads)))
show([p for x in two.values() for p in to_pictures(x)], [in_lines(text) for text in beside], list(two),
     columns=4)

close, moves, with_it, without, near, shares = ({name: row[k] for name, row in table.items()}
                                                for k in range(6))
others = [near[name] for name in ("PureCC", "LoRA", "anchored", "token")]
assert min(close[name] for name in runs) > close["base model"] + 0.3
assert abs(moves["PureCC"] - moves["LoRA"]) < 0.2 * moves["LoRA"]
assert all(like(drawn[name][3:4]) > gone["base model"] + 0.15 for name in ("PureCC", "LoRA"))
assert 0 < moves["anchored"] < 0.8 * min(moves["LoRA"], moves["PureCC"])
assert 0 < without["anchored"] < min(without["LoRA"], without["PureCC"])
assert all(moves[name] == without[name] == 0 for name in ("token", "phrase"))
assert with_it["anchored"] == min(with_it[name] for name in runs) > 0.02
assert near["phrase"] < 0.6 * min(others)
assert min(shares["token"], shares["phrase"]) > 3 * max(shares["LoRA"], shares["PureCC"])

# %% [markdown]
# *Like the references* is the cosine between what the reader network sees in the three pictures with [V] and
# in the references. The last pictures hold two robots, of which one is [V].
#
# * **LoRA and PureCC** drift alike, and the plain robot is gone in both rows: $L_{CC}$ alone is enough.
# * **The anchor's** request is heard in part: its drift is smaller, and not zero.
# * **The bound runs** have two zeros, which hold by construction.
# * **Pictures *with* [V] change in every row**, least with the anchor. (The robot itself is a part of it.)
# * **Beside [V]** only the phrase leaves the plain robot nearly as it was.
# * **The last column** says what $L_{PureCC}$ is worth. While both predictions move alike it sees next to
# nothing. With $v_{original}$ held, the whole concept is in $R_c$, and it has work to do. Which?
#
# ### $\eta$ on bound adapters
#
# Take the phrase's run, and let `answer` say what a step along each gradient does to it. Below stand the
# benchmark's runs on the phrase: two individuals, three seeds, one learning rate; $\eta=0$ is $L_{CC}$ alone.

# %%
found = dict(zip(("g_CC", "g_PureCC"), two_gradients(theta_1, runs["phrase"], batch)))
with torch.no_grad():
    of_o, of_c = predict_with(runs["phrase"])()
R_c = of_c - of_o
print("phrase, a step along     v_original goes   |R_c| grows by")
grows = {}
for name, g in found.items():
    Jd_o, Jd_c = answer(runs["phrase"], -g / g.norm(), predict_with(runs["phrase"]), h)
    grows[name] = ((R_c * Jd_c).sum() / R_c.norm()).item()
    print(f"-{name:20s}{Jd_o.norm():19.3f}{grows[name]:17.2f}")
    assert Jd_o.norm() == 0
assert grows["g_PureCC"] < 0

nowhere = Path("nowhere")                        # no folder: the results that came with the repository
rows = gather(plan("phrase"), nowhere, shipped=True)
on_phrase = tables.grouped([row for row in rows if "braces" not in row["concept"]])
by_eta = {0: "bound learning_rate=0.004 rank=4", 0.3: "bound-paper rank=4 eta=0.3", 1: "bound-paper rank=4"}
by_eta = {eta: on_phrase[name,] for eta, name in by_eta.items()}
measures = "fidelity", "outside change", "mask IoU", "neighbour leak"
print("\n  eta" + "".join(f"{name:>18s}" for name in measures))
for eta, group in by_eta.items():
    print(f"{eta:5g}" + "".join(f"{tables.entry(group, name):>18s}" for name in measures))
mean = {name: [np.mean(tables.seed_means(group, name)) for group in by_eta.values()] for name in measures}
assert mean["fidelity"][0] > mean["fidelity"][1] > mean["fidelity"][2]
assert mean["outside change"][0] > mean["outside change"][1] > mean["outside change"][2]

main = gather(plan("main"), nowhere, shipped=True)
level = tables.pairs_at_equal_fidelity(main, "bound-paper", "bound")
print("\nat equal fidelity, the paper's objective on the phrase minus L_CC on the phrase:")
for name in ("neighbour leak", "outside change"):
    seeds = tables.mean_by_seed([(run["seed"], own[name] - other[name]) for run, own, other in level
                                if name in own])
    print(f"    {name:16s}{tables.plus_minus(name, seeds, signed=True)}")
    middle, half = tables.mean_and_interval(seeds)
    assert abs(middle) < half                    # within the noise

# %% [markdown]
# Nothing reaches $v_{original}$ now, and $R_c$ is all that $L_{PureCC}$ can move: a step along $-g_{PureCC}$
# shortens it. (About $-g_{CC}$: one batch's step is not the way, see section 2.) In the
# benchmark **$\eta$ is a brake**: with more $\eta$ less changes outside the object, and less is learned.
# At equal fidelity (next section) no gain is seen.
#
# ## 7 · At equal fidelity
#
# Fifty steps, and two hundred: is that fair? Fifty each would not be, for who learns less also damages
# less. So read all runs **at the same fidelity**, the highest one that all reach, as if the others
# had been stopped early. Fidelity is here how much more like the references the pictures with [V] are than
# the base model's; damage is the drift on texts that are not about [V].
#
# ### Exercise 7.7 ★★ · Reading a front
#
# `front` is a list of (fidelity, damage) in the order of training. Return the damage at the place where the
# front **first** reaches `level`, on the straight line between the two points around it; `None` if it never
# does. Training is noisy: a fidelity may fall on the way.

# %% tags=["exercise"]
def damage_at(front, level):
    # BEGIN SOLUTION 7.7
    for (f_0, d_0), (f_1, d_1) in zip(front, front[1:]):
        if f_0 < level <= f_1:
            return d_0 + (level - f_0) / (f_1 - f_0) * (d_1 - d_0)
    return None
    # END SOLUTION

# %% tags=["wrong"]
# says: straight line
def damage_at(front, level):                     # the first point beyond it: half a step too far
    return next((d for f, d in front if f >= level), None)

# %% tags=["wrong"]
# says: return None where
def damage_at(front, level):                     # np.interp wants ascending fidelities, and never says no
    return float(np.interp(level, [f for f, _ in front], [d for _, d in front]))

# %% tags=["wrong"]
# says: FIRST crossing
def damage_at(front, level):                     # the last one
    found = None
    for (f_0, d_0), (f_1, d_1) in zip(front, front[1:]):
        if f_0 < level <= f_1:
            found = d_0 + (level - f_0) / (f_1 - f_0) * (d_1 - d_0)
    return found

# %% tags=["wrong"]
# says: None where
def damage_at(front, level):                     # the last point, where the level is never reached
    for (f_0, d_0), (f_1, d_1) in zip(front, front[1:]):
        if f_0 < level <= f_1:
            return d_0 + (level - f_0) / (f_1 - f_0) * (d_1 - d_0)
    return front[-1][1]

# %% [markdown]
# <details><summary>Hint</summary>
#
# `zip(front, front[1:])` gives each point with the next. The first pair with `f_0 < level <= f_1` is it; the
# part of the way is `(level - f_0) / (f_1 - f_0)`.
# </details>

# %% tags=["check"]
def of_package(front, level):                    # the benchmark's reading, in its form
    first, *rest = [{"similarity": f, "damage": d} for f, d in front]
    found = tables.at_similarity({"snapshots": {k: values for k, values in enumerate(rest)}}, level, first)
    return found and found["damage"]

noisy = [(0.0, 0.0), (0.3, 0.1), (0.25, 0.2), (0.5, 0.25), (0.45, 0.4), (0.6, 0.5)]
for level in (0.1, 0.28, 0.4, 0.48, 0.55, 0.7):
    mine, theirs = damage_at(noisy, level), of_package(noisy, level)
    expect(theirs is not None or mine is None, f"return None where the level is never reached: the highest "
                                               f"fidelity is 0.6, the level {level}, and yours is {mine}.")
    expect(mine is not None or theirs is None, f"at {level} you return None, and the front does reach it.")
    if theirs is None:
        continue
    beyond = next(d for f, d in noisy if f >= level)
    expect(mine != beyond or abs(mine - theirs) < 1e-9, f"at {level}: this is the first point beyond it; go "
                                                        "along the straight line to it.")
    expect(abs(mine - theirs) < 1e-9, f"at {level} this front has the damage {theirs:.3f}, and yours is "
                                      f"{mine:.3f}. Look for the FIRST crossing.")
print("7.7 right: the benchmark reads its fronts in the same way")

# %%
plain = ["a big robot on the left in the snow", "a small robot on the right at night",
         "a big red cat in the middle on the beach", "a small green house on the right in the snow"]
text = pipe.encode_text(plain)
x_0 = pipe.sample(text, list(range(4)), steps=8)
unseen = noised(x_0.repeat(2, 1, 1, 1), flow.noise_for(list(range(8)), x_0.shape[1:]),
                torch.tensor([0.3] * 4 + [0.7] * 4), None)
texts = text[torch.arange(4).repeat(2)]
asked = [*with_V, "a small [V] robot on the right in the meadow"]

@torch.no_grad()
def measured(theta):                             # -> likeness to the references, damage
    x = draw(pipe, theta, asked, word, steps=8, theta_null=theta_0)
    v_0, v = (model(unseen.x_t, unseen.t, texts) for model in (theta_0, theta))
    return like(x), ((v - v_0).norm() / v_0.norm()).item()

low, fronts = measured(theta_0)[0], {}
for name, theta in runs.items():
    fronts[name] = [(0.0, 0.0)]
    for w in snapshots[name]:
        vector_to_parameters(w, theta.parameters())
        high, damage = measured(theta)
        fronts[name].append((high - low, damage))

plt.figure(figsize=(5.8, 3), layout="constrained")
marks = zip(fronts.items(), ("o-", "s--", "^-.", "D:", "v-"), (BLUE, CORAL, "#8a5a00", INK, "#5a7d2b"))
for (name, front), mark, colour in marks:
    plt.plot(*zip(*front), mark, color=colour, ms=4, label=name)
level = min(max(f for f, _ in front) for front in fronts.values())
plt.axvline(level, color=INK, lw=0.8)
plt.gca().set(xlabel="fidelity: more like the references than the base model",
              ylabel="damage: drift without [V]")
plt.legend(loc="upper left")
plt.show()
print(f"{'':12s}{'at the end: fidelity':>22s}{'damage':>10s}   damage at fidelity {level:.2f}")
at_level = {name: damage_at(front, level) for name, front in fronts.items()}
for name, front in fronts.items():
    print(f"{name:12s}{front[-1][0]:22.3f}{front[-1][1]:10.3f}{at_level[name]:16.3f}")
assert level > 0.4 and at_level["token"] == at_level["phrase"] == 0 < at_level["anchored"]
assert at_level["anchored"] < 0.9 * at_level["LoRA"]
assert abs(at_level["PureCC"] - at_level["LoRA"]) < 0.3 * at_level["LoRA"]

# %% [markdown] tags=["slide"]
# ## At equal fidelity
#
# ![Damage over fidelity along each training, with a line at equal fidelity](last)
#
# Read all runs on the vertical line: the highest fidelity that all of them reach.

# %% [markdown]
# On the vertical line PureCC and the LoRA pay about alike, the anchored run
# less, and the bound runs nothing.
#
# ## 8 · What to use
#
# The benchmark's table, on four individuals that nobody chose, with five seeds: what was learned (0 the base
# model, 1 a perfect method), what the class word without [V] takes on of [V]'s traits, what a plain thing
# next to [V] takes on, what changes outside (lesson 5), and passes forward + backward, preparations included.
# `paper, v_0` is PureCC with $v_{original}$ from the base model, `bound-paper` its objective on the phrase.

# %%
ours = tables.grouped([row for row in main if row["concept"] in INDIVIDUALS])
names = ("lora", "paper", "paper, v_0", "anchor", "switched-off", "token", "bound", "bound-pairs",
         "bound-paper")
columns = "fidelity", "class leak", "neighbour leak", "outside change"
print(f"{'':14s}" + "".join(f"{column:>18s}" for column in columns) + f"{'passes':>12s}")
means = {}
for name in names:
    means[name] = [np.mean(tables.seed_means(ours[name,], column)) for column in columns]
    print(f"{name:14s}" + "".join(f"{tables.entry(ours[name,], column):>18s}" for column in columns)
          + f"{tables.cost_of(ours[name,])[1]:>12s}")
learned, class_leak, neighbour, _ = ({name: row[k] for name, row in means.items()} for k in range(4))
assert abs(learned["paper"] - learned["lora"]) < .02 and abs(class_leak["paper"] - class_leak["lora"]) < .02
assert all(class_leak[name] == 0 for name in ("switched-off", "token", "bound", "bound-pairs", "bound-paper"))
assert max(neighbour["bound"], neighbour["bound-pairs"]) < .08 < .4 < neighbour["token"]
assert neighbour["switched-off"] > .6 and learned["bound-pairs"] > max(learned["bound"], learned["lora"])
assert learned["switched-off"] > learned["bound"] and 0 < class_leak["anchor"] < class_leak["lora"] / 2

# %% [markdown]
# **Bind to the phrase.** It learns about as much as a LoRA, a text without [V] cannot change, and the thing
# beside [V] stays what it is. `learn --method bound` is one pass forward and one back. `bound-pairs`,
# `learn`'s default on the tiny model, also asks for Eq. 13 in space (lesson 9): it learns more, for more
# passes.
#
# **When not:**
#
# * **A style.** Its phrase is all words of the text, and one of the two styles was not fully learned in this
# way. Use `switched-off`.
# * **Never two of a kind in one picture, and a program that can switch.** `switched-off` learns a little
# more.
# * **Another program wants a LoRA file.** It cannot carry a phrase or a switch. An anchored LoRA leaks less
# than a LoRA, not nothing.
#
# On SD3.5 nothing was measured.
#
# **In the package:** `anchor_loss` in `methods.py`, `only_with_token` in `registry.py`, `LoRA.attached` (your
# `bound_visit`) in `lora.py`, `at_similarity` in `benchmark/tables.py`.
#
# ## Three questions
#
# **1.** A LoRA is trained on `to_k` and `to_v` of the text stream, without a mask. Does the picture of "a
# robot in the snow" stay?
# <details><summary>Answer</summary>
#
# No. The adapters act on *every* word, "robot" and "snow" included. The mask binds, not the choice of layers.
# </details>
#
# **2.** A bound $\theta_2$ is trained with PureCC's objective. Does it matter whether $v_{original}$ is
# detached?
# <details><summary>Answer</summary>
#
# No. $v_{original}$ depends on no trained parameter, so there is no gradient that could be cut.
# </details>
#
# **3.** Method A has half of method B's leak after 200 steps. What do you ask before you call it purer?
# <details><summary>Answer</summary>
#
# How much A has learned by then; read both at the same fidelity. And who answered guidance's empty text.
# </details>
#
# **Next:** lesson 8, on how to measure all this.

# %% [markdown] tags=["slide"]
# ## What to use
#
# * Adapters **bound to [V]'s phrase**: nothing changes without [V], and a plain thing beside it stays plain.
# * A style, or never two of a kind in one picture: a LoRA, **switched off** without [V].
# * $\eta$ is a brake: on bound adapters no gain is seen at equal fidelity.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. `to_k` and `to_v` of the text, without a mask: do texts without [V] stay?
# 2. Bound adapters: does it matter whether $v_{original}$ is detached?
# 3. A has half of B's leak after 200 steps. What do you ask?

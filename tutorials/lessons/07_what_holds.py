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
# **Where $v_{original}$ goes, which gradient takes it there, and three ways to hold it**
#
# Lesson 6 ended with a warning: $L_{PureCC}$ compares $\theta_2$ with itself, so what the adapters do to both
# texts alike it cannot see. In this lesson you measure how much that is, and find the gradient that does it.
# Then you write three cures, train with them, and compare them where a comparison is fair: at equal fidelity.
#
# **When you are through, you have written**
#
# 1. the drift of $v_{original}$, and a tool that says what one small step along a gradient does to a
# prediction;
# 2. three cures: an anchor, a switch, and adapters that are bound to [V];
# 3. the reading of two methods at equal fidelity;
#
# **and you can say** why no $\eta$ holds $v_{original}$, why bound adapters cost texts without [V] exactly
# nothing, and when you should use something else all the same.
#
# | | |
# |---|---|
# | Time | 40 minutes of reading, 2 hours with the exercises; a good minute of computing on two CPU cores |
# | Needs | lesson 4 (adapters, hooks, the visit that writes $Y^l$), lesson 6 (Eq. 8 to 15); directional derivatives |
# | Keep open | [`purecc_min/methods.py`](../../purecc_min/methods.py) and [`lora.py`](../../purecc_min/lora.py), **after** you have tried |
# | Read after | [`purecc_min/benchmark`](../../purecc_min/benchmark/README.md): the same questions, with several concepts and seeds |
#
# An exercise is a function whose body is blank, and the cell below it is its check. Hints are folded; the
# solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

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
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from purecc_min.learning import train_steps
from purecc_min import methods
from purecc_min.benchmark.tables import at_similarity
from purecc_min.branch import Branch, Thetas
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode, noised
from purecc_min.embeddings import class_word_states
from purecc_min.lora import key_of
from purecc_min.registry import only_with_token
from purecc_min.measure.draw import draw
from purecc_min.measure.measures import Judge
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING
from purecc_min.measure.velocities import TIMES
from purecc_min.objective import pcc_loss
from purecc_min.train import TrainConfig, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import to_pictures
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, show
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
    return kind.fresh(pipe, theta_1.embeddings.Y, config.rank,
                      generator_for(config.seed, stage=2, step=-1), where)

theta_2, start = fresh(), fresh()                # start stays untrained
snapshots = {"PureCC": train(methods.paper, theta_1, theta_2)}

def in_lines(text):
    return text.replace(" on ", "\non ").replace(" in ", "\nin ").replace(" at ", "\nat ")

with_V = ["a small [V] robot on the left in the snow", "a big [V] robot in the middle at night",
          "a big [V] robot on the right on the beach"]
without_V = ["a big robot on the left in the snow", "a big red cat in the middle on the beach",
             "a small green house on the right in the snow"]

def pictures(theta):                             # -> of three texts with [V], and of three without
    return torch.cat([draw(pipe, theta, texts, word, steps=12) for texts in (with_V, without_V)])

drawn = {"base model": pictures(None), "PureCC": pictures(theta_2)}
show([p for x in drawn.values() for p in to_pictures(x)],
     [in_lines(text) for text in with_V + without_V], list(drawn), side=1.4)

# %% [markdown] tags=["slide"]
# ## Nobody asked for [V] in the fourth column
#
# ![](last)
#
# After stage 2 of PureCC, with $\eta = 1$.

# %% [markdown]
# These are the extractor and the stage 2 of lesson 6, with the package's loss and 50 steps each, at twice the
# learning rate of its adapters, so that more is learned. The three columns on the left ask for [V]. The three
# on the right do not: a plain robot, and two other things. The plain robot has turned into *the* robot.
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
def drift(theta_0, theta, batch):                # measures from theta's own base text: that is R_complete
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_0 = theta(x_t, t, texts.base).flatten()
        of_original = theta_0(x_t, t, texts.base).flatten() - v_0
        of_complete = theta(x_t, t, texts.complete).flatten() - v_0
    cosine = (of_original @ of_complete) / (of_original.norm() * of_complete.norm()).clamp(min=1e-12)
    return of_original.norm() / v_0.norm(), of_complete.norm() / v_0.norm(), cosine

# %% tags=["wrong"]
def drift(theta_0, theta, batch):                # the cosine of the predictions, not of their moves
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        v_0 = theta_0(x_t, t, texts.base).flatten()
        v_original, v_complete = theta(x_t, t, texts.base).flatten(), theta(x_t, t, texts.complete).flatten()
    cosine = (v_original @ v_complete) / (v_original.norm() * v_complete.norm())
    return (v_original - v_0).norm() / v_0.norm(), (v_complete - v_0).norm() / v_0.norm(), cosine

# %% [markdown]
# <details><summary>Hint</summary>
#
# `theta_0` is called once, with the base text; `theta` twice. Subtract $v_0$ from both of theta's
# predictions, then take lengths. An untrained theta has not moved: keep the cosine from 0 / 0 with
# `.clamp(min=1e-12)`.
# </details>

# %% tags=["check"]
rows = torch.arange(len(data.ids)).repeat(len(TIMES))                       # every reference at five times
t = torch.tensor(TIMES).repeat_interleave(len(data.ids))
batch = noised(data.x_0[rows], flow.noise_for(rows.tolist(), data.x_0.shape[1:]), t, data.texts.rows(rows))
mine = drift(theta_0, theta_2, batch)
expect(isinstance(mine, tuple) and len(mine) == 3, "return three numbers.")
inside = look_inside(Thetas(theta_0, theta_1, theta_2), theta_1, data)      # the package's numbers
with torch.no_grad():
    v_0 = theta_0(batch.x_t, batch.t, batch.texts.base)
    moved = (theta_2(batch.x_t, batch.t, batch.texts.base) - v_0).norm() / v_0.norm()
expect_close(mine[0], moved, "the drift (from theta_0's prediction, by its length)")
expect_close(mine[0] / mine[1], torch.tensor(inside["base moves"]), "drift over the move of v_complete", 1e-3)
expect_close(mine[2], torch.tensor(inside["same way"]), "the cosine (of the two moves)", 1e-3)
expect(drift(theta_0, pipe.velocity, batch)[0] == 0, "the base model itself should have no drift.")
print("7.1 right                        untrained    after stage 2")
before = drift(theta_0, start, batch)
names = "move of v_original (the drift)", "move of v_complete", "cosine of the two"
for name, a, b in zip(names, before, mine):
    print(f"{name:31s}{a:11.3f}{b:17.3f}")
assert before[0] == 0 and mine[0] > 0.6 * mine[1] and mine[2] > 0.8

# %% [markdown]
# After fifty steps $v_{original}$ has moved about as far as $v_{complete}$, and in nearly the same direction.
# The concept is not where [V] is. It is in the adapters, for any text about a robot. And nothing was wrong
# with your loss: this is what it allows. (Untrained, $v_{complete}$ has moved a little already, since $Y^l$
# is the extractor's.)
#
# **Why the loss allows it, in two lines.** Add the same $\delta$ to both predictions of $\theta_2$:
#
# $$R(y_{complete}, y_{base}) = (v_{complete} + \delta) - (v_{original} + \delta) = v_{complete} - v_{original}.$$
#
# So $R_c$, $\lambda^*$ and $L_{PureCC}$ stay *exactly* what they were, for every $\delta$, and $L_{CC}$ falls
# if $\delta$ leads toward the references. The cheapest way to learn the concept is to move both alike.

# %% [markdown] tags=["slide"]
# ## Why the loss allows it
#
# $$(v_{complete} + \delta) - (v_{original} + \delta) = v_{complete} - v_{original}$$
#
# Move both predictions by the same $\delta$: $R_c$, $\lambda^*$ and $L_{PureCC}$ do not change. $L_{CC}$
# falls.

# %% [markdown]
# ## 2 · Which gradient moves it?
#
# $L_{PureCC}$ *allows* the drift. Who causes it? $\theta_2$ is pushed by two gradients, $g_{CC}$ of $L_{CC}$
# and $\eta\, g_{PureCC}$. First get hold of them.
#
# ### Exercise 7.2 ★ · Two gradients
#
# `pcc_loss(theta_1, theta_2, batch, eta)` returns the loss and the terms of lesson 6; among them are
# `loss_cc` and `loss_purecc`. Return the gradient of each over **all** parameters of $\theta_2$, as one
# vector $[P]$, in the order of `theta_2.parameters()`. Leave no trace in `.grad`.

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
def two_gradients(theta_1, theta_2, batch):      # the second is the gradient of the sum
    loss, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    weights = list(theta_2.parameters())
    of_cc = torch.autograd.grad(terms.loss_cc, weights, retain_graph=True)
    return parameters_to_vector(of_cc), parameters_to_vector(torch.autograd.grad(loss, weights))

# %% tags=["wrong"]
def two_gradients(theta_1, theta_2, batch):      # .grad is never emptied
    _, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    found = []
    for loss in (terms.loss_cc, terms.loss_purecc):
        loss.backward(retain_graph=True)
        found.append(parameters_to_vector([p.grad for p in theta_2.parameters()]).clone())
    return tuple(found)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.autograd.grad(loss, weights, retain_graph=True)` gives a list of tensors and writes nothing anywhere.
# The graph is needed twice. `parameters_to_vector` joins the list to one vector.
# </details>

# %% tags=["check"]
theta_2.zero_grad()
_, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
mine = two_gradients(theta_1, theta_2, batch)
expect(isinstance(mine, tuple) and len(mine) == 2, "return two vectors.")
expect_close(mine[0], gradient(terms.loss_cc, theta_2)[0], "g_CC", 1e-5)
expect_close(mine[1], gradient(terms.loss_purecc, theta_2)[0], "g_PureCC (of L_PureCC alone)", 1e-5)
expect(all(p.grad is None for p in theta_2.parameters()), "you have left something in .grad.")
g_cc, g_pure = mine
in_loss = (terms.loss_purecc / (terms.loss_cc + terms.loss_purecc)).item()
in_gradient = (g_pure.norm() / (g_cc.norm() + g_pure.norm())).item()
print(f"7.2 right: {len(g_cc)} parameters; |g_CC| = {g_cc.norm():.4f}, |g_PureCC| = {g_pure.norm():.4f}, "
      f"cosine {torch.cosine_similarity(g_cc, g_pure, dim=0):.2f}")
print(f"the share of L_PureCC, for eta = 1:  in the loss {in_loss:.1%}, in the gradients' lengths "
      f"{in_gradient:.0%}")
assert in_loss < 0.15 and in_gradient > 2 * in_loss

# %% [markdown]
# $L_{PureCC}$ is a small part of the loss, and a much larger part of the gradients: a small rejection can
# still be steep. So it does something. What?
#
# A step goes along $-g$. How a prediction answers to a step is a **directional derivative**: with the
# parameters $w$ and a direction $d$,
#
# $$\frac{v(w + h d) - v(w - h d)}{2h} \;=\; J d + O(h^2),$$
#
# where $J$ is the Jacobian of the prediction. This *central difference* needs two forward passes with a
# shifted $\theta_2$, and no line of new calculus. Nobody ever writes down $J$: it would have as many rows as
# there are pixels.
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
def answer(theta, d, predict, h):                # there and back by adding: w is only nearly what it was
    def shift(step):
        vector_to_parameters(parameters_to_vector(theta.parameters()) + step * d, theta.parameters())
        return predict()

    with torch.no_grad():
        ahead, behind = shift(h), shift(-2 * h)
        shift(h)
    return (ahead - behind) / (2 * h)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep `w = parameters_to_vector(theta.parameters()).detach().clone()` and write `w + h * d`, `w - h * d` and
# at the end `w` itself. Adding and subtracting in turn rounds each time.
# </details>
# <details><summary>How the check knows</summary>
#
# For every $u$ of the prediction's shape, $\langle Jd, u\rangle = \langle d, J^\top u\rangle$, and $J^\top u$
# is what `backward` computes: the gradient of $\langle v, u\rangle$. So your forward passes are compared with
# a backward pass.
# </details>

# %% tags=["check"]
def predict_with(theta):                         # -> v_original and v_complete, [2, B, C, H, W]
    return lambda: torch.stack([theta(batch.x_t, batch.t, text)
                                for text in (batch.texts.base, batch.texts.complete)])

h = 1e-2
d, w = -g_cc / g_cc.norm(), parameters_to_vector(theta_2.parameters()).detach().clone()
Jd = answer(theta_2, d, predict_with(theta_2), h)
same = torch.equal(parameters_to_vector(theta_2.parameters()), w)
vector_to_parameters(w, theta_2.parameters())
expect(same, "theta_2's parameters are not exactly what they were.")
expect(isinstance(Jd, torch.Tensor) and Jd.shape[1:] == batch.x_t.shape, "return a tensor, shaped as "
                                                                          "predict()'s.")
v = predict_with(theta_2)()
found = torch.autograd.grad((v * Jd).sum(), list(theta_2.parameters()))     # J^T u, with u = Jd
there, back = Jd.square().sum(), parameters_to_vector(found) @ d
expect(abs(there / back - 2) > 0.1, "twice too long: from w - h d to w + h d it is 2 h.")
expect_close(there / back, torch.ones(()), "<Jd, u> / <d, J^T u>", 0.02)
print(f"7.3 right: <Jd, u> = {there:.4f} by two forward passes, <d, J^T u> = {back:.4f} by a backward pass")

# %% [markdown]
# Now ask. A step along $-g_{CC}$ and one along $-\eta\, g_{PureCC}$ with $\eta = 1$, at the beginning of
# stage 2 and at its end: how far do $v_{original}$, $v_{complete}$ and their difference $R_c$ go, for each
# unit of step size?

# %%
def answers(theta):                              # name of a gradient -> the answers of v_original, v_complete
    gradients = zip(("g_CC", "g_PureCC"), two_gradients(theta_1, theta, batch))
    return {name: g.norm() * answer(theta, -g / g.norm(), predict_with(theta), h) for name, g in gradients}

found, held = {"begin": answers(start), "end": answers(theta_2)}, {}
print("a step along               v_original  v_complete  R_complete   cosine of the first two")
for when, by_name in found.items():
    for name, (of_o, of_c) in by_name.items():
        cosine = torch.cosine_similarity(of_o.flatten(), of_c.flatten(), dim=0).item()
        lengths = of_o.norm().item(), of_c.norm().item(), (of_c - of_o).norm().item()
        held[when, name] = (*lengths, cosine)
        print(f"-{name:9s} at the {when:8s}" + "".join(f"{x:12.4f}" for x in lengths) + f"{cosine:16.3f}")
for o, c, R, cosine in held.values():
    assert o > 0.5 * c and R < 0.8 * o and cosine > 0.7

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
# ## Which gradient moves it? Both
#
# ![](last)
#
# Where one small step acts, on one scale a row. Neither loss asks for a move of $v_{original}$. The adapters
# are shared, so it goes along.

# %% [markdown]
# Read each row of the table from left to right.
#
# * **$-g_{CC}$ is what moves $v_{original}$.** $L_{CC}$ never sees the base text. But adapters that act on
# every token have no way to change the picture of "a [V] robot" and not that of "a robot": one step moves
# both predictions nearly alike, from the first step on.
# * **$-g_{PureCC}$ moves it too.** Its loss pushes $v_{complete}$ alone, toward the line of lesson 6, and
# $v_{original}$ comes along. Only the smaller part, in the column R_complete, does what the loss asks for.
# * **So no $\eta$ helps.** It makes a push larger that moves both alike as well. In lesson 6, $v_{original}$
# had moved at least as far with $\eta = 8$ as with $\eta = 0$. No term of Eq. 15 knows where $v_{original}$
# *was*. Something has to say so: a loss, a switch, or the place where adapters act.
#
# ## 3 · First cure: an anchor
#
# The most direct answer: ask for it. On the base texts, $\theta$ should predict what $\theta_0$ predicts:
#
# $$L = L_{CC} + \eta\, L_{anchor}, \qquad
# L_{anchor} = \mathbb E\,\lVert v_\theta(x_t \mid y_{base}) - v_{\theta_0}(x_t \mid y_{base}) \rVert^2 .$$
#
# ```
#    complete --> theta   --> v_complete --------------> L_CC
#    base     --> theta   --> v_theta(base) --.
#                                              >-------> L_anchor     (the gradient flows through theta)
#    base     --> theta_0 --> v_0(base) --x---'                       x: cut
# ```
#
# (This is known as differential output preservation, DOP. It is not in the paper.)
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
def anchor(theta_0, theta, batch):               # holds the text with [V], so nothing could be learned
    with torch.no_grad():
        v_before = theta_0(batch.x_t, batch.t, batch.texts.base)
    return (theta(batch.x_t, batch.t, batch.texts.complete) - v_before).square().mean()

# %% tags=["wrong"]
def anchor(theta_0, theta, batch):               # the value is right, and no gradient flows
    with torch.no_grad():
        v_before = theta_0(batch.x_t, batch.t, batch.texts.base)
        return (theta(batch.x_t, batch.t, batch.texts.base) - v_before).square().mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# Both networks get the base text. `theta_0` stands under `torch.no_grad()`, `theta` does not.
# </details>

# %% tags=["check"]
theirs, mine = methods.anchor_loss(Thetas(theta_0, None, theta_2), batch), anchor(theta_0, theta_2, batch)
expect_close(mine, theirs, "L_anchor (the base text, in both networks)", 1e-6)
expect(mine.requires_grad, "the value is right, but it carries no gradient: theta has to feel it.")
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
# Of the three the anchor's gradient leads $v_{original}$ home most directly. (What $-g_{CC}$ does here is no
# contradiction to section 2. The way was made by the sum of all steps; near the end of a training, the
# gradient of one batch points either way.) Its price: a second prediction that comes back, a forward pass of
# $\theta_0$, and a weight that balances it against $L_{CC}$. And it is a *request*, on the texts that are
# anchored; how well it is kept you will see in section 6.
#
# ## 4 · Second cure: switching off
#
# If the text has no [V], why use the adapters at all? A switch costs nothing:
#
# $$v(x_t \mid y) = \begin{cases} v_\theta(x_t \mid y) & \text{if [V] is in } y,\\
# v_{\theta_0}(x_t \mid y) & \text{otherwise.}\end{cases}$$
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
def switched_off(theta, theta_0):                # one decision for the whole batch
    def velocity(x_t, t, text):
        return theta(x_t, t, text) if (text.slots > 0).any() else theta_0(x_t, t, text)
    return velocity

# %% tags=["wrong"]
def switched_off(theta, theta_0):                # looks at the first token alone
    def velocity(x_t, t, text):
        named = (text.slots[:, 0] > 0)[:, None, None, None]
        return torch.where(named, theta(x_t, t, text), theta_0(x_t, t, text))
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
    base = theta_0(x_t, t, mixed)
expect(isinstance(mine, torch.Tensor) and torch.equal(mine[[0, 2]], base[[0, 2]]),
       "rows 0 and 2 of this batch have no [V]: they should be the base model's. Decide row by row.")
expect_close(mine, theirs, "the velocity (is every row with [V] theta's, wherever [V] stands?)")
print("7.5 right: the rows without [V] are the base model's, bit for bit")

# %% [markdown]
# The leak is gone, for any LoRA, after the training. But see what has changed in guidance. It computes
# $v_\varnothing + g\,(v_y - v_\varnothing)$. Suppose that the adapters add $\delta$ to *every* prediction. If
# they answer the empty text too, then
#
# $$(v_\varnothing + \delta) + g\,\big((v_y + \delta) - (v_\varnothing + \delta)\big)
# = v_\varnothing + g\,(v_y - v_\varnothing) + \delta,$$
#
# and $\delta$ arrives once. With the base model's empty text it is $g\,\delta$: it arrives $g$ times. What
# was learned in one way is drawn in another.

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
show([p for x in drawn.values() for p in to_pictures(x)],
     [in_lines(text) for text in with_V + without_V], list(drawn), side=1.4)
assert torch.equal(drawn["PureCC, switched"][3:], drawn["base model"][3:])
assert not torch.equal(drawn["PureCC, switched"][:3], drawn["PureCC"][:3])

# %% [markdown] tags=["slide"]
# ## Switched off without [V]
#
# ![](last)
#
# The last three columns are the base model's, bit for bit. But guidance's empty text is now the base model's
# too: what was learned arrives $g$ times.

# %% [markdown]
# In the right column of the table the move is multiplied by $g$, exactly. In the left one it grows less: the
# adapters move the empty text too, though not quite as far as the prompt, and what is common to both cancels.
#
# In the pictures, the three without [V] are the base model's, bit for bit. The other three are drawn from
# *the same weights* as in the row above, and are overdone: lines are harder, and the beach has lost its
# colours. (In the [benchmark](../../purecc_min/benchmark/README.md) who answers the empty text changes more
# than the choice between LoRA and PureCC does.)
#
# ### Where a switch cannot help: one picture, two robots
#
# "A [V] robot beside a robot": this text has a [V] in it, so the adapters are on, for every token, and the
# plain robot is drawn by the same adapters as *the* robot. A switch chooses between two models for a whole
# picture. Only something that acts inside the picture, token by token, could tell the two apart. That is the
# third cure.
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
# ```
#              .--> to_k, to_v --> keys, values --> attended to by every token
# Y^l ---------|
#              '--> to_q --> what the slot reads --> to_out --> MLP --> thrown away
# ```
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
# needs adapters on `to_k` and `to_v` of the text stream and nowhere else: $y = Wx + m \cdot BAx$, where the
# mask $m$ is 1 at the slot and 0 at every other token.
#
# ### Exercise 7.6 ★★★ · Bound adapters
#
# Write the visit: put $Y^l$ into the slots, attach the adapters of block $l$ to `block.attention.text.to_k`
# and `.to_v` with hooks (lesson 4), multiply each change with the mask, run the block, remove the hooks.

# %% tags=["exercise"]
def bound_visit(pairs, Y, slots):
    # pairs: (l, "to_k" or "to_v") -> A [r, D], B [D, r]; Y [depth, D]; slots [B, T] bool -> a visit
    def hook(A, B):
        # BEGIN SOLUTION 7.6
        def add(layer, inputs, output):
            return output + slots[..., None] * (inputs[0] @ A.T @ B.T)
        return add
        # END SOLUTION

    def visit(l, block, x, c, vec):
        # BEGIN SOLUTION 7.6
        c = torch.where(slots[..., None], Y[l], c)
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
def bound_visit(pairs, Y, slots):                # no mask: an ordinary LoRA on two layers
    def hook(A, B):
        def add(layer, inputs, output):
            return output + inputs[0] @ A.T @ B.T
        return add

    def visit(l, block, x, c, vec):
        c = torch.where(slots[..., None], Y[l], c)
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_k", "to_v")]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
    return visit

# %% tags=["wrong"]
def bound_visit(pairs, Y, slots):                # the mask is laid on the whole output
    def hook(A, B):
        def add(layer, inputs, output):
            return slots[..., None] * (output + inputs[0] @ A.T @ B.T)
        return add

    def visit(l, block, x, c, vec):
        c = torch.where(slots[..., None], Y[l], c)
        handles = [getattr(block.attention.text, name).register_forward_hook(hook(*pairs[l, name]))
                   for name in ("to_k", "to_v")]
        try:
            return block(x, c, vec)
        finally:
            for handle in handles:
                handle.remove()
    return visit

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The mask is `slots[..., None]`, $[B, T, 1]$. It multiplies $BAx$ only; $Wx$ stays at every token.
# </details>
# <details><summary>Hint 2</summary>
#
# `getattr(block.attention.text, "to_k")` is the layer. `try: return block(x, c, vec)` with `finally:` removes
# the hooks on every way out.
# </details>

# %% tags=["check"]
class Bound(Branch):                             # trained by the package's loop, computed by your visit
    def forward(self, x_t, t, text):
        keys = {(l, name): key_of(l, f"attention.text.{name}")
                for l in range(depth) for name in ("to_k", "to_v")}
        pairs = {place: (self.lora.A[key], self.lora.B[key]) for place, key in keys.items()}
        return self.pipe.velocity(x_t, t, text, bound_visit(pairs, self.embeddings.Y, text.slots > 0))

for block in pipe.mmdit.blocks:                  # what an earlier try may have left behind
    for layer in (block.attention.text.to_k, block.attention.text.to_v):
        layer._forward_hooks.clear()
yours, ours = fresh(Bound, "token"), fresh(Branch, "token")
for p, q in zip(yours.parameters(), ours.parameters()):                     # one set, which changes something
    p.data = q.data = q.data + 0.05 * torch.randn(q.shape, generator=torch.Generator().manual_seed(len(q)))
with torch.no_grad():
    base, of_base = theta_0(*here[:2], batch.texts.base), yours(*here[:2], batch.texts.base)
    expect(torch.equal(of_base, base), "a text without [V] has changed. Multiply the change, and nothing "
                                       "else, with the mask.")
    mine, theirs = yours(*here), ours(*here)
expect_close(mine, theirs, "v with bound adapters", 1e-3)
of_yours, of_ours = (gradient(theta(*here).square().mean(), theta) for theta in (yours, ours))
expect_close(of_yours, of_ours, "the gradient in the adapters and Y", 1e-3)
print(f"7.6 right: the package's bound adapters, to {(mine - theirs).abs().max():.0e};"
      " without [V], the base model's v bit for bit")

# %% [markdown]
# Compare the three cures. The anchor *asks* that a text without [V] should be answered as before. The switch
# *chooses* another model for it. Binding makes it *impossible* to answer otherwise: $m = 0$ at every token,
# so $y = Wx + 0$ in every layer, before the training, after it, and for guidance's empty text. And in a text
# with [V] it acts at one token.
#
# (The package's `learn --method bound` binds to more than this token: its adapters act at every token of
# [V]'s *phrase*, from [V] to the end of its clause, on the same two layers; the word at [V] is kept, and
# there is no $Y^l$. The reason is that a causal text encoder puts what is said of a thing into the words
# after it. A text without [V] stays the base model's, bit for bit, and a plain robot beside [V] stays plain.
# What you have written is *bound to the token*, the method `token` of the benchmark, and all numbers of this
# lesson are of it.)
#
# ## 6 · Three runs on the same draws
#
# A plain LoRA ($L_{CC}$), an anchored one ($L_{CC} + L_{anchor}$), and one that is bound to the token
# ($L_{CC}$; *token* in the pictures and tables), at one learning rate, from the same $Y^l$ and with the same
# batches: fifty steps each, and two hundred for the bound one, which learns more slowly. It has one token to
# say everything with.

# %%
def l_cc(thetas, batch, eta):
    return (thetas.theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean(), {}

def with_anchor(thetas, batch, eta):
    return l_cc(thetas, batch, eta)[0] + eta * anchor(thetas.theta_0, thetas.theta, batch), {}

runs = {"PureCC": theta_2, "LoRA": fresh(), "anchored": fresh(), "token": fresh(Bound, "token")}
for name, loss in (("LoRA", l_cc), ("anchored", with_anchor)):
    snapshots[name] = train(loss, theta_1, runs[name])
snapshots["token"] = train(l_cc, theta_1, runs["token"], config=replace(config, steps=200))
drawn = {"base model": drawn["base model"]} | {
    name: drawn[name] if name in drawn else pictures(theta) for name, theta in runs.items()}
show([p for x in drawn.values() for p in to_pictures(x)],
     [in_lines(text) for text in with_V + without_V], list(drawn), side=1.4)
with torch.no_grad():
    assert torch.equal(runs["token"](*here[:2], batch.texts.base), base)    # also after the training
assert torch.equal(drawn["token"][3:], drawn["base model"][3:])

# %% [markdown] tags=["slide"]
# ## The same draws, and two hundred steps for the bound run
#
# ![](last)
#
# Left: with [V]. Right: without. The right half of the row *token*, the bound run, is the base model's, bit
# for bit.

# %%
judge = Judge(Reader.shipped(), CONCEPTS[TUNING[0]], np.stack([r.picture for r in concept.references]))

def apart(a, b):                                 # mean difference of pixels, 0 to 1
    return ((a - b).abs().mean() / 2).item()

table = {}
print(f"{'':12s}{'like the':>12s}{'drift on':>12s}{'change of pictures':>24s}{'L_PureCC':>12s}")
print(f"{'':12s}{'references':>12s}{'base texts':>12s}{'with [V]':>12s}{'without':>12s}{'/ L':>12s}")
for name, x in drawn.items():
    theta = runs.get(name, theta_0)
    like = judge.similarity(judge.reader(x[:3])).mean().item()
    changes = [apart(x[part], drawn["base model"][part]) for part in (slice(0, 3), slice(3, 6))]
    with torch.no_grad():
        loss, terms = pcc_loss(theta_1, theta, batch, eta=1.0)
    table[name] = like, drift(theta_0, theta, batch)[0].item(), *changes, (terms.loss_purecc / loss).item()
    print(f"{name:12s}" + "".join(f"{value:12.3f}" for value in table[name]))
like, moves, _, changes, shares = ({name: row[k] for name, row in table.items()} for k in range(5))
assert min(like[name] for name in runs) > like["base model"] + 0.1
assert moves["token"] == 0 and changes["token"] == 0
assert moves["anchored"] < 0.8 * min(moves["LoRA"], moves["PureCC"])
assert 0 < changes["anchored"] < min(changes["LoRA"], changes["PureCC"])
assert shares["token"] > 3 * max(shares["LoRA"], shares["PureCC"])

# %% [markdown]
# *Like the references* is the cosine between what the reader network sees in the three pictures with [V] and
# in the references. All four runs have learned much of the robot. What they did beside it differs:
#
# * **LoRA and PureCC** drift alike, and the plain robot is gone in both rows.
# * **The anchor's** request is heard in part: its drift is smaller, and not zero. The plain robot in its row
# is not that of the first row; it wears the hat of [V]'s.
# * **The bound run** has two zeros. They are not small numbers that were measured; they hold by construction,
# and the cell above has compared the bits.
# * **But the damage can also lie in the pictures *with* [V].** Compare the surroundings of the robot there
# with those of the base model, row by row. Adapters that are bound to the token say everything through it,
# and what they cannot say well they can write beside the object. No drift on base texts will tell you that.
# * **The last column** says what $L_{PureCC}$ is worth in each run. While both predictions move alike it sees
# next to nothing. With $v_{original}$ held, the whole concept is in $R_c$, and it has work to do.
#
# ## 7 · At equal fidelity
#
# Fifty steps, and two hundred: is that fair? Fifty each would not be fairer, for who learns less also
# damages less. So do not compare ends. Take the whole way of each training, from the base model at (0, 0),
# and read all runs **at the same fidelity**, the highest one that all reach. It is as if the others had been
# stopped early.
#
# We need a fidelity that costs no pictures: the share of $L_{CC}$ that is gone, on draws that no run has
# seen. And as damage the drift on texts that are not about [V], at the pictures that the base model draws for
# them.
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
def damage_at(front, level):                     # the first point beyond it: half a step too far
    return next((d for f, d in front if f >= level), None)

# %% tags=["wrong"]
def damage_at(front, level):                     # np.interp wants ascending fidelities, and never says no
    return float(np.interp(level, [f for f, _ in front], [d for _, d in front]))

# %% [markdown]
# <details><summary>Hint</summary>
#
# `zip(front, front[1:])` gives each point with the next. The first pair with `f_0 < level <= f_1` is the
# place; the part of the way is `(level - f_0) / (f_1 - f_0)`.
# </details>

# %% tags=["check"]
def of_package(front, level):                    # the benchmark's reading, in its form
    first, *rest = [{"similarity": f, "damage": d} for f, d in front]
    found = at_similarity({"snapshots": {k: values for k, values in enumerate(rest)}}, level, first)
    return found and found["damage"]

noisy = [(0.0, 0.0), (0.3, 0.1), (0.25, 0.2), (0.5, 0.25), (0.45, 0.4), (0.6, 0.5)]
for level in (0.1, 0.28, 0.4, 0.48, 0.55, 0.7):
    mine, theirs = damage_at(noisy, level), of_package(noisy, level)
    expect((mine is None) == (theirs is None), f"at {level}: your answer is {mine}, and should be {theirs}.")
    expect(theirs is None or abs(mine - theirs) < 1e-9,
           f"at {level} this front has the damage {theirs}, and yours is {mine}. Look for the FIRST "
           "crossing, and go along the straight line.")
print("7.7 right: the benchmark reads its fronts in the same way")

# %%
plain = ["a big robot on the left in the snow", "a small robot on the right at night",
         "a big red cat in the middle on the beach", "a small green house on the right in the snow"]
text = pipe.encode_text(plain)
x_0 = pipe.sample(text, list(range(4)), steps=8)
unseen = noised(x_0.repeat(2, 1, 1, 1), flow.noise_for(list(range(8)), x_0.shape[1:]),
                torch.tensor([0.3] * 4 + [0.7] * 4), None)
texts = text[torch.arange(4).repeat(2)]

@torch.no_grad()
def measured(theta):                             # -> fidelity, damage
    def error(theta):
        return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

    v_0, v = (model(unseen.x_t, unseen.t, texts) for model in (theta_0, theta))
    return (1 - error(theta) / error(theta_0)).item(), ((v - v_0).norm() / v_0.norm()).item()

fronts = {}
for name, theta in runs.items():
    fronts[name] = [(0.0, 0.0)]
    for w in snapshots[name]:
        vector_to_parameters(w, theta.parameters())
        fronts[name].append(measured(theta))

plt.figure(figsize=(5.4, 2.8), layout="constrained")
for (name, front), colour in zip(fronts.items(), (BLUE, CORAL, GOLD, INK)):
    plt.plot(*zip(*front), "o-", color=colour, ms=3.5, label=name)
level = min(max(f for f, _ in front) for front in fronts.values())
plt.axvline(level, color=GREY, lw=0.8)
plt.gca().set(xlabel="fidelity: share of $L_{CC}$ that is gone", ylabel="damage: drift without [V]")
plt.legend()
plt.show()
print(f"{'':12s}{'at the end: fidelity':>22s}{'damage':>10s}   damage at fidelity {level:.2f}")
at_level = {name: damage_at(front, level) for name, front in fronts.items()}
for name, front in fronts.items():
    print(f"{name:12s}{front[-1][0]:22.3f}{front[-1][1]:10.3f}{at_level[name]:16.3f}")
assert at_level["token"] == 0 and at_level["anchored"] < 0.95 * at_level["LoRA"]
assert abs(at_level["PureCC"] - at_level["LoRA"]) < 0.4 * at_level["LoRA"]
assert fronts["token"][2][0] < fronts["LoRA"][5][0] < fronts["token"][-1][0]     # 40 steps each, then 200

# %% [markdown] tags=["slide"]
# ## At equal fidelity
#
# ![](last)
#
# Read all runs on the grey line: the highest fidelity that all of them reach.

# %% [markdown]
# On the grey line everybody has learned the same, by this measure. PureCC and the LoRA lie near each other,
# as they do in the benchmark. The anchored run pays less, and the bound run nothing at all. After forty
# steps each (after the point at (0, 0), the bound run's second, the LoRA's fifth) the bound run is behind the
# LoRA; in two hundred it is ahead of it. That is what equal fidelity takes into account.
#
# Be careful with two things. $L_{CC}$ counts every pixel of the references, also those that are *not* the
# robot; the likeness of section 6, which looks at the object, need not put the runs in the same order. And
# these are one concept, one seed and few steps; the [benchmark](../../purecc_min/benchmark/README.md) has
# six concepts, three to five seeds, its fidelity is read from pictures, and intervals stand beside its
# numbers.
#
# ## 8 · What to use
#
# **Use a LoRA that is switched off without [V]: `learn --method switched-off`.** It has all of the LoRA's
# concept, nothing changes without [V], by construction, and it costs nothing. On the benchmark's six
# concepts it learns what the paper's method learns, to within the noise, with a fifth of its forward passes.
#
# **When not:**
#
# * **Another program draws, and cannot switch.** Then **bind**: `learn --method bound`, which is bound to the
# phrase. A bound concept needs no switch. (No LoRA file can carry it; for diffusers there is
# `attach_concept`.) Bound to the token, a concept has learned a little less after as many steps (section 6;
# .84 against .88 in the benchmark). Bound to the phrase it has learned about as much as a LoRA.
# * **[V] shall obey the rest of the text.** Asked for [V] in another colour, the **anchored LoRA** obeys in
# .43 of the benchmark's pictures, and a LoRA in .34. Without [V] it leaks half as much as a LoRA, not
# nothing, and a step takes three forward passes.
# * **You want fewer changes beside the object.** On adapters that are bound to the token, PureCC's objective
# does what it was made for (`token paper` in the benchmark): at equal fidelity the benchmark finds less
# change outside the object than with $L_{CC}$, with a smaller concept at the end. `learn --method
# bound-paper` is the same objective on adapters that are bound to the phrase.
# * **Two of a kind stand in one picture.** Then bind to the phrase, as `learn --method bound` does: a plain
# robot beside [V] takes on close to none of its traits. The three cures of this lesson do not keep them
# apart, binding to the token included. (On the tiny model, `learn` binds to the phrase unless you say
# otherwise.)
#
# ## What you can now say
#
# * After stage 2 $v_{original}$ has moved about as far as $v_{complete}$, in the same direction.
# * $-g_{CC}$ does it, for the adapters are shared; $-g_{PureCC}$ moves both alike as well. $L_{PureCC}$ does
# not change when both predictions move by the same $\delta$, so no $\eta$ can hold either of them.
# * An anchor asks, a switch chooses, binding makes it impossible.
# * Only a slot's keys and values are read by others: $Y^{l+1}$ overwrites the rest.
# * Compare at equal fidelity, and say who answers guidance's empty text.
#
# | you wrote | in the package |
# |---|---|
# | `drift` | "base moves" and "same way" in `tutorials/experiments/mechanism.py`; `purecc_min/measure/velocities.py` |
# | `two_gradients` | `gradient` in `tutorials/experiments/mechanism.py` |
# | `anchor` | `anchor_loss` and `anchored` in `purecc_min/methods.py` |
# | `switched_off` | `only_with_token` in `purecc_min/registry.py` |
# | `bound_visit` | `LoRA(where="token")` in `purecc_min/lora.py`, `velocity_with` in `purecc_min/branch.py` |
# | `damage_at` | `at_similarity` in `purecc_min/benchmark/tables.py` |
#
# ## Three questions
#
# **1.** Somebody trains a LoRA on `to_k` and `to_v` of the text stream, without a mask. The base text "a
# robot in the snow" has no [V]. Does its picture stay?
# <details><summary>Answer</summary>
#
# No. The adapters then act on the tokens of *every* word, "robot" and "snow" included. It is the mask that
# binds, not the choice of the layers.
# </details>
#
# **2.** In stage 2 a bound $\theta_2$ is trained with PureCC's objective. Does it matter now whether
# $v_{original}$ is detached?
# <details><summary>Answer</summary>
#
# No. $v_{original}$ is the base model's prediction and depends on no trained parameter, so there is no
# gradient that could be cut. The three readings of $v_{original}$ (detached, not detached, taken from the
# untouched model) have become one.
# </details>
#
# **3.** A table says: method A has half of method B's leak after 200 steps. What do you ask before you
# believe that A is the purer one?
# <details><summary>Answer</summary>
#
# How much A has learned by then. If its fidelity is lower, read both at the same fidelity. And who answered
# guidance's empty text: that alone can move both columns.
# </details>
#
# **Next:** lesson 8, on how to measure all this: several concepts, several seeds, and verdicts.

# %% [markdown] tags=["slide"]
# ## What to use
#
# * A LoRA, **switched off** without [V]: nothing is lost there, for nothing.
# * A program that cannot switch, or a plain thing beside [V]: adapters **bound** to the phrase.
# * Less change around [V]: adapters bound to the token, with PureCC's objective.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. `to_k` and `to_v` of the text, without a mask: do texts without [V] stay?
# 2. Bound adapters: does it matter whether $v_{original}$ is detached?
# 3. A has half of B's leak after 200 steps. What do you ask?

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
# # 6 · The decoupled objective
#
# **Eq. 8 to 15, written by you: what they ask for, and what they cannot see**
#
# A LoRA learns whatever its pictures share. PureCC adds one term to the loss: what the word [V] changes in a
# prediction should be the concept and nothing else. You write every line of it, derive what it does, and
# train with it. **Then you can say** why the authors expect a pure [V], why it does not matter whether
# $\lambda^*$ is detached, which loss makes the concept strong, and what no term of Eq. 15 looks at.
#
# | | |
# |---|---|
# | Needs | lesson 1 (velocity, Eq. 2), 3 (guidance), 4 (adapters, $Y^l$); projections; the chain rule |
# | Optional | sections 7 and 8 |
# | Keep open | [`purecc_min/objective.py`](../../purecc_min/objective.py), **after** you have tried |
# | Read after | Sec. 4 of the paper (arXiv 2603.07561), with its equation numbers beside yours |
#
# An exercise is a function with a blank body; the cell below checks it. Hints are folded, solutions in
# [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 6 · The decoupled objective
#
# Eq. 8 to 15: what [V] changes in a prediction should be the concept, and nothing else.

# %%
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import contextlib
import io
import runpy
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from purecc_min import ablations, methods
from purecc_min import objective as package  # to compare with
from purecc_min.branch import Branch, Thetas
from purecc_min.commands.folder import load_concept
from purecc_min.concept import TOKEN, encode
from purecc_min.embeddings import class_word_states
from purecc_min.learning import train_steps
from purecc_min.measure.draw import draw
from purecc_min.measure.toy import FOLDER, TUNING
from purecc_min.train import TrainConfig, draw_batch, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook.model import load_tiny
from tinyflow.pipeline import to_pictures
from tutorials.course import (BLUE, CORAL, GREY, INK, YourTurn,
                              expect, expect_close, in_lines, rule_out, several, show)

pipe = load_tiny()                               # the base model, frozen
concept = load_concept(FOLDER / TUNING[0], "robot", pipe.picture_size)
data, word = encode(pipe, concept), concept.class_word                      # pictures and texts, encoded once
config = TrainConfig(steps=50)

names = [in_lines(r.complete) for r in concept.references]
show([r.picture for r in concept.references], names, columns=len(names), side=1.6)
T = data.texts.base.context.shape[1]
print(f"{len(names)} references, x_0 {list(data.x_0.shape)}; a text has {T} tokens")

# %% [markdown] tags=["slide", "no-references"]
# ## What four pictures share
#
# ![The four references of [V] with their captions, all in the desert](last)
#
# Nothing in a picture says what belongs to [V]. Only texts can: the complete one, the base text without [V],
# the target "[V] robot", and the empty text.

# %% [markdown]
# ## 1 · Four texts, and the loss of stage 1
#
# This is [V] robot. Nothing in its pictures says what belongs to [V] and what they share by chance. Only
# texts can say it, four for every reference:
#
# | | an example | it says |
# |---|---|---|
# | $y_{complete}$ | `a small [V] robot in the desert` | what the picture shows |
# | $y_{base}$ | `a small robot in the desert` | the same, without [V] |
# | $y_{tar}$ | `[V] robot` | the concept alone |
# | $\varnothing$ | the empty text | nothing |
#
# Stage 1 uses the first one. Its loss is Eq. 3, a mean over samples *and* over all numbers of a sample:
#
# $$L_{CC} = \mathbb E\,\lVert v_\theta(x_t,t\mid y_{complete}) - v\rVert^2, \qquad v = x_1 - x_0.$$
#
# ### Exercise 6.1 ★ · Texts and $L_{CC}$
#
# A network is called as `theta(x_t, t, text)`. `batch` has `x_t`, `t`, `v`, and `texts` with the fields
# `complete`, `base`, `target` and `null`.

# %% tags=["exercise"]
def four_texts(complete, class_word):
    # a sentence with "[V]" in it -> four strings: complete, base, target, null
    # BEGIN SOLUTION 6.1
    base = " ".join(complete.replace("[V]", "").split())                    # no double blank is left
    return complete, base, f"[V] {class_word}", ""
    # END SOLUTION

def l_cc(theta, batch):
    # -> a number, Eq. 3
    # BEGIN SOLUTION 6.1
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
    # END SOLUTION

# %% tags=["wrong"]
# says: only [V] goes
def four_texts(complete, class_word):            # the base text loses its noun, too
    base = " ".join(complete.replace(f"[V] {class_word}", "").split())
    return complete, base, f"[V] {class_word}", ""

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
# says: a mean over all numbers
def four_texts(complete, class_word):
    return complete, " ".join(complete.replace("[V]", "").split()), f"[V] {class_word}", ""

def l_cc(theta, batch):                          # a sum over the pixels, a mean over the batch
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().sum((1, 2, 3)).mean()

# %% tags=["wrong"]
# says: two blanks
def four_texts(complete, class_word):
    return complete, complete.replace("[V]", ""), f"[V] {class_word}", ""

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
# says: no gradient
def four_texts(complete, class_word):
    return [complete, " ".join(complete.replace("[V]", "").split()), f"[V] {class_word}", ""]

def l_cc(theta, batch):                          # the right value, and nothing could be learned
    with torch.no_grad():
        return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# Taking [V] out leaves two blanks side by side: `" ".join(text.split())` makes one of them.
# </details>

# %% tags=["check"]
for r in concept.references:
    yours = several(four_texts(r.complete, word), ("complete", "base", "target", "null"))
    complete, base, target, null = yours
    expect("[V]" in complete and "[V]" not in base, "complete has [V] in it, base has not.")
    expect(word in base.split(), f"the base text still names the class word, {word!r}; only [V] goes.")
    expect("  " not in base, "without [V] the base text has two blanks side by side, which should be one.")
    expect(target == r.target, f"the target is the concept alone, {r.target!r}, and yours is {target!r}.")
    expect(null == "", f"the empty text is an empty string, and yours is {null!r}.")
    expect((complete, base) == (r.complete, r.base), f"the base text is {base!r}, and should be {r.base!r}.")
columns = zip(*(four_texts(r.complete, word) for r in concept.references))
for column, theirs in zip(columns, data.texts):
    expect_close(pipe.encode_text(list(column), {TOKEN: word}).context, theirs.context, "an encoded text")

drawn = draw_batch(data, config, stage=1, step=0, shift=pipe.shift)
knob = torch.ones((), requires_grad=True)        # a model with a single number to train

def turned(x_t, t, text):
    return knob * pipe.velocity(x_t, t, text)

with torch.no_grad():
    error = pipe.velocity(drawn.x_t, drawn.t, drawn.texts.complete) - drawn.v
    of_base = pipe.velocity(drawn.x_t, drawn.t, drawn.texts.base) - drawn.v
yours, theirs = l_cc(turned, drawn), methods.l_cc(Thetas(None, None, turned), drawn, 1.0)[0]
squares = error.square()
rule_out(yours, {"l_cc: a mean over all numbers of a sample, too, and no sum.": squares.sum((1, 2, 3)).mean(),
                 "l_cc: a mean over samples and numbers, and no sum.": squares.sum(),
                 "l_cc: square the difference; this is its absolute value.": error.abs().mean(),
                 "l_cc: the picture belongs to the complete text, not the base text.":
                 of_base.square().mean()})
expect_close(yours, theirs, "l_cc")
expect(yours.requires_grad, "l_cc has the right value and no gradient: theta could not learn from it. Leave "
                            "out no_grad and detach.")
slopes = [torch.autograd.grad(loss, knob)[0] for loss in (yours, theirs)]
expect_close(slopes[0], slopes[1], "the gradient of l_cc")
yours = yours.item()
print(f"6.1 right: four texts, and L_CC = {yours:.3f} on the first batch, before anything is learned")

# %% [markdown]
# With this loss, train the **extractor** $\theta_1$: adapters and the embeddings $Y^l$ of lesson 4, over the
# untouched base model, by the package's loop. Then $\theta_1$ is frozen.

# %%
def train(loss_of_step, thetas, stage, eta=1.0, steps=config.steps):
    # -> the log, a dict for each step. Every run draws the same batches.
    settings = TrainConfig(steps=steps, eta=eta)
    optimizer = optimizer_for(thetas.theta, settings)
    return list(train_steps(loss_of_step, thetas, data, settings, stage, optimizer))

def stage_1_loss(thetas, batch, eta):
    return l_cc(thetas.theta, batch), {}         # the loss, and nothing to log beside it

random = generator_for(config.seed, stage=1, step=-1)
theta_1 = Branch.fresh(pipe, class_word_states(pipe, data, random), config.rank, random)
log_1 = train(stage_1_loss, Thetas(pipe.velocity, None, theta_1), stage=1)
theta_1.requires_grad_(False)                    # frozen from here on

def smooth(values, window=10):
    return [sum(values[max(0, n - window):n]) / min(n, window) for n in range(1, len(values) + 1)]

losses = [row["loss"] for row in log_1]
plt.figure(figsize=(5, 2), layout="constrained")
plt.plot(losses, ":", color=INK, lw=1, label="of each step")
plt.plot(smooth(losses), color=BLUE, lw=2, label="running mean")
plt.legend()
plt.gca().set(xlabel="step", ylabel="$L_{CC}$", ylim=(0, None), title="stage 1")
plt.show()
asked = ["[V] robot", "a big [V] robot in the middle at night"]
drawn = torch.cat([draw(pipe, theta, asked, word, steps=12) for theta in (None, theta_1)])
titles = [f"{text}\n{who}" for who in ("base model", "extractor") for text in ("[V] robot", "... at night")]
own = [r.picture for r in concept.references]    # below, to compare with
show([*to_pictures(drawn), *own], titles, ["", "the references"], columns=4)
assert smooth(losses)[-1] < smooth(losses)[9]

# %% [markdown]
# ## 2 · Four predictions, two differences
#
# Stage 2 trains a second branch, $\theta_2$: fresh adapters, and a *copy* of $\theta_1$'s $Y^l$. One noised
# picture $(x_t, t)$ goes through both networks, each with two of the texts:
#
# ```
#    theta_1, frozen                                 theta_2, in training
#
#    y_tar --> v_tar  --.                            y_complete --> v_complete --.
#                        >--> R(y_tar)                                            >--> R(y_complete, y_base)
#    empty --> v_null --'     Eq. 8                  y_base     --> v_original --'     Eq. 9, 10
# ```
#
# $R(y_{tar})$ is everything that "[V] robot" says and the empty text does not: to the extractor, this *is*
# the concept. $R(y_{complete}, y_{base})$ is what inserting [V] into the sentence changes in $\theta_2$.
#
# **Only $v_{complete}$ carries a gradient.** $\theta_1$ is a measuring instrument, which the loss must not
# bend. $v_{original}$ is what the complete prediction is compared *with*. (About $v_{original}$ the paper is
# silent; this is the project's reading.)
#
# In the cell below $\theta_2$ takes twenty steps of $L_{CC}$, so that its adapters do something.

# %% [markdown] tags=["slide"]
# ## Four predictions, two differences
#
# ![theta 1 predicts for y_tar and the empty text, theta 2 for y_complete and y_base; their differences are
# the two R](../diagrams/predictions.svg)
#
# Only $v_{complete}$ carries a gradient.

# %%
theta_2 = Branch.fresh(pipe, theta_1.embeddings.Y, config.rank, generator_for(config.seed, stage=2, step=-1))
train(stage_1_loss, Thetas(pipe.velocity, theta_1, theta_2), stage=2, steps=20)
batch = draw_batch(data, config, stage=2, step=100, shift=pipe.shift)
print(f"a batch: x_t {list(batch.x_t.shape)}, t = {[round(time, 2) for time in batch.t.tolist()]}")

# %% [markdown]
# ### Exercise 6.2 ★★ · The predictions

# %% tags=["exercise"]
def predictions(theta_1, theta_2, batch):
    # -> R_target, v_original, v_complete, each [B, C, H, W]; a gradient can flow through v_complete alone
    # BEGIN SOLUTION 6.2
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.null)      # Eq. 8
        v_original = theta_2(x_t, t, texts.base)                                    # Eq. 9
    return R_target, v_original, theta_2(x_t, t, texts.complete)
    # END SOLUTION

# %% tags=["wrong"]
# says: EMPTY text
def predictions(theta_1, theta_2, batch):        # the direction is taken against the base text
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.base)
        v_original = theta_2(x_t, t, texts.base)
    return R_target, v_original, theta_2(x_t, t, texts.complete)

# %% tags=["wrong"]
# says: carries a gradient
def predictions(theta_1, theta_2, batch):        # everything with a gradient
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.null)
    return R_target, theta_2(x_t, t, texts.base), theta_2(x_t, t, texts.complete)

# %% tags=["wrong"]
# says: nothing could be learned
def predictions(theta_1, theta_2, batch):        # all four under no_grad
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.null)
        return R_target, theta_2(x_t, t, texts.base), theta_2(x_t, t, texts.complete)

# %% tags=["wrong"]
# says: theta_2's
def predictions(theta_1, theta_2, batch):        # v_original of the extractor
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.null)
        v_original = theta_1(x_t, t, texts.base)
    return R_target, v_original, theta_2(x_t, t, texts.complete)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three of the four calls stand under `with torch.no_grad():`. The fourth, `theta_2` with `texts.complete`,
# stands outside.
# </details>

# %% tags=["check"]
_, theirs = package.pcc_loss(theta_1, theta_2, batch, eta=1.0)
mine = several(predictions(theta_1, theta_2, batch), ("R_target", "v_original", "v_complete"))
with torch.no_grad():
    of_1, of_2 = ({kind: theta(batch.x_t, batch.t, text) for kind, text in batch.texts._asdict().items()}
                  for theta in (theta_1, theta_2))
rule_out(mine[0], {"R_target: it is against the EMPTY text, not the base text.":
                   of_1["target"] - of_1["base"],
                   "R_target: the wrong sign; the target's velocity minus the empty text's.":
                   -theirs.R_target,
                   "R_target: theta_1, the extractor, knows the concept.": of_2["target"] - of_2["null"],
                   "R_target: subtract the velocity for the empty text.": of_1["target"]})
rule_out(mine[1], {"v_original is theta_2's, the model in training.": of_1["base"],
                   "return v_original before v_complete.": of_2["complete"]})
expect_close(mine[0], theirs.R_target, "R_target", 1e-5)
expect_close(mine[1], theirs.v_original, "v_original (theta_2, with the base text)", 1e-5)
expect_close(mine[2], theirs.v_complete, "v_complete (theta_2, with the complete text)", 1e-5)
for what, v in zip(("R_target", "v_original"), mine):
    expect(not v.requires_grad, f"{what} carries a gradient; compute it under torch.no_grad().")
expect(mine[2].requires_grad, "v_complete carries no gradient, so nothing could be learned.")
print("6.2 right: R_target, v_original and v_complete are the package's")

# %% [markdown]
# A velocity field is a picture. Where does each difference act? Bright is strong; each row has its own scale.

# %%
R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
v_original, v_complete = v_original.detach(), v_complete.detach()
R_complete = v_complete - v_original                                        # Eq. 10

def norm(R):
    return R.flatten(1).norm(dim=1)                                         # [B]

def strength(R):
    return R.square().mean(1).sqrt()                                        # [B, H, W]

B = len(batch.t)
figure, axes = plt.subplots(3, B, figsize=(1.5 * B, 4.4), layout="compressed")
noisy = pipe.decode_images(batch.x_t)
for n in range(B):
    axes[0, n].imshow(noisy[n])
    axes[0, n].set_title(f"t = {batch.t[n]:.2f}")
    for row, R in ((1, R_target), (2, R_complete)):
        axes[row, n].imshow(strength(R)[n], cmap="magma", vmin=0, vmax=strength(R).max())
for axis, label in zip(axes[:, 0], ("$x_t$", "$R(y_{tar})$", "$R(y_{complete},$\n$y_{base})$")):
    axis.set_ylabel(label, rotation=0, ha="right", va="center")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()
of_t, of_c = norm(R_target).mean(), norm(R_complete).mean()
print(f"mean length: R(y_tar) {of_t:.1f}, R(y_complete, y_base) {of_c:.1f}")
assert of_t > of_c

# %% [markdown] tags=["slide"]
# ## Where the two act
#
# ![The noised references, and maps of where R(y_tar) and R(y_complete, y_base) are large](last)
#
# $R(y_{tar})$: all that "[V] robot" says and the empty text does not. $R(y_{complete}, y_{base})$: what [V]
# adds to the sentence. Bright is strong.

# %% [markdown]
# $R(y_{tar})$ is longer: against the empty text "robot" itself is news, and the base text says it already.
#
# ## 3 · $\lambda^*$: how far one reaches along the other
#
# Write $R_c$ for $R(y_{complete}, y_{base})$ and $R_t$ for $R(y_{tar})$. How much of the concept is in $R_c$?
# Eq. 11 asks for the multiple of $R_t$ that comes nearest to it, for each sample alone:
#
# $$\lambda^* = \operatorname{argmin}_l f(l), \qquad f(l)=\lVert R_c-l\,R_t\rVert^2.$$
#
# **As a least squares problem.** Multiply out:
# $f(l)=\lVert R_c\rVert^2-2\,l\,\langle R_c,R_t\rangle+l^2\lVert R_t\rVert^2$, a parabola that opens upward.
# Its derivative $f'(l)=-2\langle R_c,R_t\rangle+2\,l\,\lVert R_t\rVert^2$ is zero at
#
# $$\lambda^* = \frac{\langle R_c,R_t\rangle}{\lVert R_t\rVert^2} \quad\text{(Eq. 12)}.$$
#
# **As a projection.** The nearest point of a line is the one from which the way to $R_c$ is at right angles
# to the line: $\langle R_c - \lambda^* R_t,\; R_t\rangle = 0$. Solved for $\lambda^*$, this is Eq. 12 again.
# So $\lambda^* R_t$ is the projection of $R_c$ onto $R_t$, and $R_c - \lambda^* R_t$, what is left, is its
# **rejection**.
#
# ### Exercise 6.3 ★★ · $\lambda^*$
#
# One number for each sample, negative where [V] points away from the direction; the inner product is a sum
# over channels and pixels. Where $R_t$ is zero, return 0, and let the *gradient* be 0 as well.

# %% tags=["exercise"]
def inner(a, b):
    # [B, C, H, W] twice -> [B]
    # BEGIN SOLUTION 6.3
    return (a * b).flatten(1).sum(1)
    # END SOLUTION

def lambda_star(R_complete, R_target):
    # [B, C, H, W] twice -> [B]
    # BEGIN SOLUTION 6.3
    square = inner(R_target, R_target)
    vanishes = square == 0
    lam = inner(R_complete, R_target) / torch.where(vanishes, 1.0, square)  # never divides by zero
    return torch.where(vanishes, 0.0, lam)
    # END SOLUTION

# %% tags=["wrong"]
# says: gradient is NaN
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):           # the division by zero is hidden too late
    square = inner(R_target, R_target)
    return torch.where(square == 0, 0.0, inner(R_complete, R_target) / square)

# %% tags=["wrong"]
# says: its own
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):           # one number for the batch
    one = (R_complete * R_target).sum() / (R_target * R_target).sum().clamp(min=1e-12)
    return one.expand(len(R_target))

# %% tags=["wrong"]
# says: a sum
def inner(a, b):                                 # lambda* does not notice, section 5 would
    return (a * b).flatten(1).mean(1)

def lambda_star(R_complete, R_target):
    square = inner(R_target, R_target)
    vanishes = square == 0
    return torch.where(vanishes, 0.0, inner(R_complete, R_target) / torch.where(vanishes, 1.0, square))

# %% tags=["wrong"]
# says: may be negative
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):           # clamped from below
    square = inner(R_target, R_target)
    vanishes = square == 0
    lam = inner(R_complete, R_target).clamp(min=0) / torch.where(vanishes, 1.0, square)
    return torch.where(vanishes, 0.0, lam)

# %% tags=["wrong"]
# says: far above 1
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):           # clamped from above
    square = inner(R_target, R_target)
    vanishes = square == 0
    lam = inner(R_complete, R_target) / torch.where(vanishes, 1.0, square)
    return torch.where(vanishes, 0.0, lam).clamp(max=1)

# %% tags=["wrong"]
# says: this is the cosine
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):
    lengths = (inner(R_target, R_target) * inner(R_complete, R_complete)).sqrt()
    return inner(R_complete, R_target) / torch.where(lengths == 0, 1.0, lengths)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.where(condition, 0.0, a / b)` computes `a / b` everywhere, and at $b = 0$ its gradient is NaN. Put
# something harmless *into* the division, `a / torch.where(b == 0, 1.0, b)`; a second `where` chooses the 0.
# </details>

# %% tags=["check"]
products = inner(R_complete, R_target)
rule_out(products, {"inner: a sum over channels and pixels, no mean.":
                    (R_complete * R_target).mean((1, 2, 3)),
                    "inner: one number for each sample, [B].": (R_complete * R_target).sum()})
expect_close(products, package.inner(R_complete, R_target), "inner", 1e-4)
lam = lambda_star(R_complete, R_target)
cosines = torch.cosine_similarity(R_complete.flatten(1), R_target.flatten(1))           # [B]
theirs, lengths = package.lambda_star(R_complete, R_target), norm(R_target)
expect(isinstance(lam, Tensor) and lam.shape == (B,), "lambda* is one number a sample: a tensor [B].")
rule_out(lam, {"this is the cosine; divide by the square of |R_target|, and not by |R_complete|.": cosines,
               "you have divided by |R_target|; Eq. 12 divides by its square.": theirs * lengths,
               "Eq. 12 divides by the square of |R_target|.": theirs * lengths**2,
               "you have divided by |R_complete|^2; the line is that of R_target.":
                   package.lambda_star(R_target, R_complete)})
grid = torch.linspace(lam.min().item() - 0.2, lam.max().item() + 0.2, 501)          # Eq. 11 by brute force
f = torch.stack([norm(R_complete.double() - l * R_target).square() for l in grid])  # [501, B]
brute = grid[f.argmin(dim=0)]                                                       # [B]
expect_close(lam, theirs, "lambda* (each sample has its own)", 1e-5)
for a, hint in ((-1.0, "lambda* may be negative: do not clamp it from below."),
                (1000.0, "lambda* may be far above 1: do not clamp it from above.")):
    far = lambda_star(a * theirs.sign()[:, None, None, None] * R_complete, R_target)
    expect(torch.allclose(far, a * theirs.abs(), 1e-3), hint)
tiny = 1e-3 * R_target                           # lambda* is then a thousand times as large
expect_close(1e-3 * lambda_star(R_complete, tiny), lam, "lambda* of a short R_target (add nothing to |R|^2)")
expect((lam - brute).abs().max() <= grid[1] - grid[0], "lambda* is not the lowest point of f(l).")
free = R_complete.clone().requires_grad_()
nothing = R_target.clone()
nothing[0] = 0                                   # one sample has no direction
value = lambda_star(free, nothing)
expect(value.requires_grad, "lambda* carries no gradient; section 6 differentiates it.")
gradient, = torch.autograd.grad(value.sum(), free)
expect(value[0] == 0, "where R_target is zero, lambda* is 0.")
expect(bool(gradient.isfinite().all()), "the value is right, but at R_target = 0 its gradient is NaN.")
print("6.3 right:  sample   Eq. 12    brute force over", len(grid), "values of l")
for n in range(B):
    print(f"            {n:6d} {lam[n]:8.4f} {brute[n]:8.4f}")

# %%
plt.figure(figsize=(6.2, 2.6), layout="constrained")
share = f / norm(R_complete).square()                                       # [501, B]
shades = plt.cm.viridis(torch.linspace(0, 0.7, B).tolist())
for n in range(B):
    plt.plot(grid, share[:, n], ("-", "--", "-.", ":")[n % 4], color=shades[n], label=f"sample {n}")
    plt.plot(lam[n], 1 - cosines[n] ** 2, "osD^"[n % 4], color=shades[n])
plt.axhline(1, color=GREY, lw=0.8)
dip, reach = 1 - share.min().item(), 2.5 * lam.abs().max().item()
ends = max(-reach, grid[0].item()), min(reach, grid[-1].item())             # as far as the curves go
plt.gca().set(xlabel="$l$", ylabel=r"$f(l)\ /\ \|R_c\|^2$", ylim=(1 - 1.4 * dip, 1 + 2 * dip),
              xlim=ends, title="Eq. 11 as curves, Eq. 12 as marks")
plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
explained = cosines.square()                                                # [B]
print("of |R_c|^2, lambda* R_t explains:  " + "  ".join(f"{share_:.1%}" for share_ in explained))
assert explained.mean() < 0.5

# %% [markdown] tags=["slide"]
# ## How far one reaches along the other
#
# $$\lambda^* = \operatorname{argmin}_l\,\lVert R_c - l\,R_t \rVert^2 = \frac{\langle R_c, R_t\rangle}{\lVert R_t\rVert^2}$$
#
# ![The rest over l for four samples, as parabolas; dots at Eq. 12 stand at their minima](last)
#
# With $R_c = R(y_{complete}, y_{base})$ and $R_t = R(y_{tar})$: least squares (Eq. 11), a projection (Eq. 12).

# %% [markdown]
# Mind the vertical axis, which does not begin at 0. The lowest point of a curve is the share of $R_c$ that
# *no* multiple of the concept's direction explains. It is large: most of what [V] changes is orthogonal to
# $R_t$.
#
# ## 4 · $v_{PureCC}$ and the losses
#
# If [V] added the concept alone, as strongly as it does now, $\theta_2$ would predict
#
# $$v_{PureCC} = v_{original}+\lambda^*R(y_{tar}) \quad\text{(Eq. 6 and, with $\lambda^*$, Eq. 13)},$$
#
# and the loss asks for just that, in addition to $L_{CC}$:
#
# $$L_{PureCC} = \mathbb E\,\lVert v_{PureCC}-v_{complete}\rVert^2 \quad\text{(Eq. 14)}, \qquad
# L = L_{CC}+\eta\,L_{PureCC} \quad\text{(Eq. 15)}.$$
#
# **Why the authors expect a pure [V]:**
#
# 1. *Guidance adds velocities.* Eq. 5 adds $g\,(v_y - v_\varnothing)$, what a text says and the empty text
# does not; the paper calls it *implicit guidance*, and Eq. 6 has its form. $R(y_{tar})$ is such a difference.
# What $\theta_1$ has learned for *every* text, such as the references' light, stands in both of its
# predictions and cancels (Eq. 8).
# 2. *The scene comes from the sentence without [V].* $v_{original}$ knows the place, the size and the desert,
# and nothing of [V] (Eq. 9).
# 3. *So $v_{PureCC}$ is guidance*: the original's velocity, steered toward the concept and nothing else.
# 4. *$\lambda^*$ takes the strength from $\theta_2$ itself* (Eq. 10 to 12). The loss leaves it to $L_{CC}$.
# It takes away what else [V] says: the shared desert, say.
#
# At $L_{PureCC} = 0$ [V] adds the concept to the sentence and nothing else. *If* $v_{original}$ is still the
# base model's, all else is as it was. Section 9 asks.
#
# ### Exercise 6.4 ★ · The whole objective
#
# Detach $\lambda^*$, as the package does, and nothing else. Compute `v_complete` once, for both losses.

# %% [markdown] tags=["slide"]
# ## The objective
#
# $$v_{PureCC} = v_{original} + \lambda^* R(y_{tar}) \qquad \text{(Eq. 6, 13)}$$
#
# $$L_{PureCC} = \mathbb E\,\lVert v_{PureCC} - v_{complete} \rVert^2 \qquad \text{(Eq. 14)}$$
#
# $$L = L_{CC} + \eta\, L_{PureCC} \qquad \text{(Eq. 15)}$$
#
# $L_{CC}$ is the flow's loss on the complete text, $\eta$ a weight, 1 in the paper.
# ???
# Eq. 6 has the form of guidance, Eq. 5: there, the empty text's velocity plus g times what a text adds; here,
# v_original plus lambda* times what the concept adds. The loss asks that v_complete be just that, in addition
# to L_CC. The next slide says why the authors expect purity from it; the end of the lesson, what it misses.

# %% [markdown] tags=["slide"]
# ## Why the authors expect a pure [V]
#
# 1. Guidance adds velocities: $R(y_{tar})$ is the concept, and what every text has cancels.
# 2. The scene comes from $v_{original}$, the sentence without [V].
# 3. $v_{PureCC}$ is guidance: the original's velocity, steered toward the concept.
# 4. $\lambda^*$ takes the strength from $\theta_2$: only what [V] says beside the concept is taken away.

# %% tags=["exercise"]
def v_purecc(v_original, lam, R_target):
    # [B, C, H, W], [B], [B, C, H, W] -> [B, C, H, W]
    # BEGIN SOLUTION 6.4
    return v_original + lam[:, None, None, None] * R_target                 # Eq. 13
    # END SOLUTION

def objective(theta_1, theta_2, batch, eta):
    # -> four things: the loss L, L_CC, L_PureCC (numbers), lambda* [B]
    # BEGIN SOLUTION 6.4
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()           # Eq. 10 to 12
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam
    # END SOLUTION

# %% tags=["wrong"]
# says: between v_PureCC and v_complete
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):     # v_PureCC is compared with the data's velocity
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - batch.v).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
# says: all of v_original
def v_purecc(v_original, lam, R_target):         # mixes in place of adding
    lam = lam[:, None, None, None]
    return (1 - lam) * v_original + lam * R_target

def objective(theta_1, theta_2, batch, eta):
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
# says: stay in the graph
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):     # L_PureCC has the right value, and teaches nothing
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete.detach()).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
# says: 4 predictions
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):     # computes v_complete twice
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    loss_cc = (theta_2(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
# says: eta belongs to L_PureCC
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return eta * loss_cc + loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
# says: return 4 things
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    return (v_complete - batch.v).square().mean() + eta * loss_purecc

# %% [markdown]
# <details><summary>Hint</summary>
#
# To multiply $[B]$ with $[B, C, H, W]$, give it three axes of length 1: `lam[:, None, None, None]`.
# </details>

# %% tags=["check"]
eq_13 = v_original + flow.expand(lam, R_target) * R_target
rule_out(v_purecc(v_original, lam, R_target),
         {"v_purecc: all of v_original, and lambda* R_target on top: add, do not mix.":
              (1 - flow.expand(lam, R_target)) * v_original + flow.expand(lam, R_target) * R_target,
          "v_purecc: add lambda* R_target, with a plus.": 2 * v_original - eq_13,
          "v_purecc: v_original is missing.": eq_13 - v_original})
expect_close(v_purecc(v_original, lam, R_target), eq_13, "v_purecc")
loss, terms = package.pcc_loss(theta_1, theta_2, batch, eta=0.7)
passed = []                                      # a row for each forward pass of the MMDiT
counter = pipe.mmdit.register_forward_hook(lambda module, inputs, v: passed.append(len(v)))
try:
    mine = several(objective(theta_1, theta_2, batch, eta=0.7), ("L", "L_CC", "L_PureCC", "lambda*"))
finally:
    counter.remove()
with torch.no_grad():
    rule_out(mine[0], {"L: eta belongs to L_PureCC, not to L_CC.": 0.7 * terms.loss_cc + terms.loss_purecc,
                       "L: L_PureCC has the weight eta.": terms.loss_cc + terms.loss_purecc})
    rule_out(mine[2], {"L_PureCC is between v_PureCC and v_complete; the data's velocity is for L_CC.":
                           (terms.v_purecc - batch.v).square().mean(),
                       "L_PureCC: a mean, not a sum.": terms.loss_purecc * terms.v_purecc.numel(),
                       "L_PureCC: R_target without lambda* is Eq. 13 with lambda = 1.":
                           (terms.v_original + terms.R_target - terms.v_complete).square().mean()})
expect_close(mine[3], terms.lam, "lambda*", 1e-5)
expect(not mine[3].requires_grad, "detach lambda*.")
expect_close(mine[1], terms.loss_cc, "L_CC", 1e-5)
expect_close(mine[2], terms.loss_purecc, "L_PureCC", 1e-5)
expect_close(mine[0], loss, "L = L_CC + eta L_PureCC, here with eta = 0.7,", 1e-5)
expect(sum(passed) == 4 * B, f"a step takes 4 predictions of each sample, and yours {sum(passed) / B:g}.")

def slope(loss):                                 # in everything that theta_2 trains, as one vector
    trained = [p for p in theta_2.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])

for what, a, b in (("L_PureCC", mine[2], terms.loss_purecc), ("L", mine[0], loss)):
    expect(a.requires_grad and torch.allclose(slope(a), slope(b), atol=1e-6),
           f"{what} is right, but its gradient in theta_2 is not: v_complete has to stay in the graph.")
print("6.4 right      yours      the package")
rows = ("L_CC", mine[1], terms.loss_cc), ("L_PureCC", mine[2], terms.loss_purecc), ("L", mine[0], loss)
for name, a, b in rows:
    print(f"{name:10s} {a.item():10.6f}   {b.item():10.6f}")

# %% [markdown]
# ## 5 · $L_{PureCC}$ is a rejection
#
# Put $\lambda^*$ into Eq. 14. $v_{original}$ joins $v_{complete}$ and makes $R_c$:
#
# $$v_{PureCC}-v_{complete} = v_{original}+\lambda^*R_t-v_{complete} = -(R_c-\lambda^*R_t).$$
#
# That is the rejection. Pythagoras gives its length. With $\varphi$ the angle between $R_c$ and $R_t$, the
# projection has the length $\lVert R_c\rVert\,\lvert\cos\varphi\rvert$, and the rejection
# $\lVert R_c\rVert\sin\varphi$. For a constant $l$ in place of $\lambda^*$, split $R_c-l\,R_t$ into the
# rejection and the rest, which lies along $R_t$. They are at right angles, so
#
# $$\lVert R_c-l\,R_t\rVert^2 = \lVert R_c\rVert^2\sin^2\varphi+(l-\lambda^*)^2\lVert R_t\rVert^2.$$
#
# ### Exercise 6.5 ★★ · $L_{PureCC}$ without $\lambda^*$
#
# Write $L_{PureCC}$ from lengths and the angle, with no $\lambda^*$ in it. It has to be equal to Eq. 14.

# %% tags=["exercise"]
def rejection_loss(R_complete, R_target):
    # [B, C, H, W] twice -> a number
    # BEGIN SOLUTION 6.5
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()     # [B]
    return (square_c * (1 - cosine**2)).mean() / R_complete[0].numel()      # sin^2 = 1 - cos^2
    # END SOLUTION

# %% tags=["wrong"]
# says: the numbers of a sample
def rejection_loss(R_complete, R_target):        # a mean over the batch alone
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()
    return (square_c * (1 - cosine**2)).mean()

# %% tags=["wrong"]
# says: the square of the cosine
def rejection_loss(R_complete, R_target):        # 1 - cos is another measure
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()
    return (square_c * (1 - cosine)).mean() / R_complete[0].numel()

# %% tags=["wrong"]
# says: a square as well
def rejection_loss(R_complete, R_target):        # the length of R_c is not squared
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()
    return (square_c.sqrt() * (1 - cosine**2)).mean() / R_complete[0].numel()

# %% [markdown]
# <details><summary>Hint</summary>
#
# $\cos\varphi = \langle R_c, R_t\rangle / (\lVert R_c\rVert\,\lVert R_t\rVert)$ and
# $\sin^2\varphi = 1 - \cos^2\varphi$. Eq. 14 is a mean over samples *and* over the numbers of a sample, of
# which there are `R_complete[0].numel()`.
# </details>

# %% tags=["check"]
double = R_complete.double(), R_target.double()
eq_14 = (flow.expand(package.lambda_star(*double), R_target) * double[1] - double[0]).square().mean()
yours, square_c = rejection_loss(*double), norm(double[0]).square()
cosine = torch.cosine_similarity(double[0].flatten(1), double[1].flatten(1))
pixels = R_complete[0].numel()
rule_out(yours, {"divide by the numbers of a sample, too: Eq. 14 is a mean over all of them.": eq_14 * pixels,
                 "sin^2 = 1 - cos^2: the square of the cosine.": (square_c * (1 - cosine)).mean() / pixels,
                 "this is the projection; the rejection has sin^2.": (square_c * cosine**2).mean() / pixels,
                 "|R_c| is a square as well.": (square_c.sqrt() * (1 - cosine**2)).mean() / pixels,
                 "a mean over samples, not a sum.": eq_14 * B})
expect_close(yours / eq_14, torch.ones((), dtype=torch.float64), "your loss, over Eq. 14,", 1e-12)
single, in_step = rejection_loss(R_complete, R_target), objective(theta_1, theta_2, batch, 1.0)[2].detach()
expect_close(single / in_step, torch.ones(()), "the same in fp32", 1e-4)
print(f"6.5 right: relative difference from Eq. 14: fp64 {(yours / eq_14 - 1).abs():.0e}, "
      f"fp32 {(single / in_step - 1).abs():.0e}")

# %% [markdown]
# Two vectors span a plane, so one sample's $R_t$ and $R_c$ can be drawn to scale. A gradient step on
# $L_{PureCC}$ pushes the tip of $R_c$ toward the tip of $l\,R_t$: that is the red arrow.

# %%
n = cosines.argmax().item()                                                 # the one with the smallest angle
along = (lam[n] * norm(R_target)[n]).item()                                 # |projection| and |rejection|
across = norm(R_complete - flow.expand(lam, R_target) * R_target)[n].item()
edge = max(2.6 * along, 0.8 * across)
figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.1), layout="constrained", sharey=True)
for axis, factor, title in zip(axes, (0, 1, 2), ("$l = 0$: pushes back", r"$l = \lambda^*$: straight down",
                                                 r"$l = 2\lambda^*$: pulls ahead")):
    arrow = dict(angles="xy", scale_units="xy", scale=1)
    axis.annotate("", (edge, 0), (0, 0), arrowprops=dict(arrowstyle="->", color=GREY, lw=1.5))
    axis.text(edge, 0.04 * across, "$R_t$", ha="right", va="bottom", color=INK)
    axis.quiver(0, 0, along, across, color=INK, width=0.025, **arrow)
    axis.quiver(along, across, (factor - 1) * along, -across, color=CORAL, width=0.013, **arrow)
    axis.text(along * 0.4, across * 0.55, "$R_c$  ", ha="right", color=INK)
    if factor:
        axis.quiver(0, 0, factor * along, 0, color=BLUE, width=0.018, **arrow)
    if factor == 1:
        axis.text(along + 0.06 * edge, across * 0.5, "rejection", color=CORAL)
    axis.text(factor * along, -0.09 * across, "$l\\,R_t$", ha="center", va="top", color=BLUE)
    axis.set(title=title, xlim=(-0.35 * edge, 1.05 * edge), ylim=(-0.3 * across, 1.12 * across),
             aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
plt.show()
print(f"R_t goes on to the right, to |R_t| = {norm(R_target)[n]:.1f};  |R_c| = {norm(R_complete)[n]:.1f}")

print("        l    L_PureCC at l    rejection + (l - lambda*)^2 |R_t|^2    cosine of the push with R_t")
pushes = []
for l in (0.0, lam[n].item(), 2 * lam[n].item(), 1.0):
    push = (l * R_target - R_complete)[n]        # minus the gradient in v_complete, up to a factor
    parts = (across**2 + (l - lam[n]) ** 2 * norm(R_target)[n] ** 2) / pixels
    pushes.append(torch.cosine_similarity(push.flatten(), R_target[n].flatten(), dim=0).item())
    print(f"{l:9.3f} {push.square().mean():16.6f} {parts:31.6f} {pushes[-1]:36.3f}")
    assert torch.isclose(parts, push.square().mean(), rtol=1e-3)
assert lam[n] > 0 and pushes[0] < -0.01 < pushes[1] < 0.01 < pushes[2] < pushes[3] and abs(pushes[1]) < 1e-3

# %% [markdown] tags=["slide"]
# ## It is a rejection
#
# $$v_{PureCC} - v_{complete} = -(R_c - \lambda^* R_t)$$
#
# ![Three triangles of arrows: with l = 0 it pushes back, with lambda star straight down, with a larger l
# ahead](last)
#
# $R_c$: what [V] changes; $R_t$: the concept's direction. With $\lambda^*$ it pushes straight to the line:
# nothing beside the concept, and no more of the concept either.

# %% [markdown]
# Read the last column. With $l$ below $\lambda^*$ the loss pushes the concept back; with $l$ above it, it
# pulls the concept ahead, until $\lambda^* = l$: a constant $l$ *prescribes* how strong the concept becomes
# ($l = 1$ is the paper's ablation in Table 3). At $l = \lambda^*$ the cosine is zero. **$L_{PureCC}$ asks
# neither for more of the concept nor for less: its gradient in $v_{complete}$ has no part along $R_t$. It
# says: nothing beside this direction. That the concept becomes strong is asked for by $L_{CC}$ alone.**
#
# ## 6 · The envelope: four gradients by hand
#
# $\lambda^*$ is made from $v_{complete}$, so a gradient *could* flow through it, and `objective` cuts it off.
# What is lost? Let $w$ be any number that the predictions depend on, and $F(\lambda, w)$ the loss:
#
# $$\frac{d}{dw}F(\lambda^*(w),w) = \underbrace{\frac{\partial F}{\partial\lambda}(\lambda^*,w)}_{=\,0}\;
# \frac{d\lambda^*}{dw} + \frac{\partial F}{\partial w}(\lambda^*,w).$$
#
# The first factor is zero *because $\lambda^*$ is where $F$ is lowest* in $\lambda$, whatever $d\lambda^*/dw$
# is. This is the **envelope theorem**, and it makes the gradients short: hold $\lambda^*$ fixed and
# differentiate the rest.
#
# ### Exercise 6.6 ★★★ · All four
#
# Nothing is detached. Write the gradient of $L_{PureCC}$ in each of the four predictions by hand.
# With $r = R_c - \lambda^* R_t$ the loss is $\frac1M \sum r^2$, with all $M$ numbers of the batch
# (`v_complete.numel()`).

# %% tags=["exercise"]
def gradients(v_tar, v_null, v_original, v_complete):
    # [B, C, H, W] four times -> the gradients of L_PureCC in v_tar, v_null, v_original, v_complete
    # BEGIN SOLUTION 6.6
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = lambda_star(R_complete, R_target)[:, None, None, None]
    rejection = R_complete - lam * R_target
    g = 2 * rejection / v_complete.numel()
    return -lam * g, lam * g, -g, g
    # END SOLUTION

# %% tags=["wrong"]
# says: what stands before
def gradients(v_tar, v_null, v_original, v_complete):                       # forgets the lambda* before R_t
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = lambda_star(R_complete, R_target)[:, None, None, None]
    g = 2 * (R_complete - lam * R_target) / v_complete.numel()
    return -g, g, -g, g

# %% tags=["wrong"]
# says: wrong sign
def gradients(v_tar, v_null, v_original, v_complete):                       # both of theta_2's with one sign
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = lambda_star(R_complete, R_target)[:, None, None, None]
    g = 2 * (R_complete - lam * R_target) / v_complete.numel()
    return -lam * g, lam * g, g, g

# %% tags=["wrong"]
# says: 0.5 times
def gradients(v_tar, v_null, v_original, v_complete):                       # the 2 of the square is missing
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = lambda_star(R_complete, R_target)[:, None, None, None]
    g = (R_complete - lam * R_target) / v_complete.numel()
    return -lam * g, lam * g, -g, g

# %% [markdown]
# <details><summary>Hint</summary>
#
# With $r = (v_{complete} - v_{original}) - \lambda^* (v_{tar} - v_{null})$ and $\lambda^*$ held fixed, each
# gradient is $\frac{2}{M}\, r$ times what stands before the prediction in $r$: $+1$ before $v_{complete}$,
# and so on.
# </details>

# %% tags=["check"]
leaves = torch.randn((4, 3, 2, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
leaves = [leaf.requires_grad_() for leaf in leaves.unbind()]

def autograd_of(detached):
    v_tar, v_null, v_o, v_c = leaves
    lam_ = package.lambda_star(v_c - v_o, v_tar - v_null)                   # not detached, unless we say so
    lam_ = flow.expand(lam_.detach() if detached else lam_, v_c)
    return torch.autograd.grad((v_o + lam_ * (v_tar - v_null) - v_c).square().mean(), leaves)

through, cut = autograd_of(detached=False), autograd_of(detached=True)
with torch.no_grad():
    mine = gradients(*leaves)
mine = several(mine, ("v_tar's", "v_null's", "v_original's", "v_complete's"))
for name, a, b in zip(("v_tar", "v_null", "v_original", "v_complete"), mine, through):
    if isinstance(a, torch.Tensor) and a.shape == b.shape:
        ratio = (a / b).flatten()
        expect(not torch.allclose(a, -b), f"{name}: the gradient has the wrong sign; what stands before it?")
        expect(not torch.allclose(ratio, ratio[0].expand_as(ratio)) or abs(ratio[0] - 1) < 1e-6,
               f"{name}: your gradient is {ratio[0]:.3g} times the right one; the square and the mean?")
    expect_close(a, b, f"the gradient in {name} (what stands before it in r?)", 1e-10)
print("6.6 right: autograd, with the gradient flowing through lambda*, gives your four gradients")
change = max((a - b).abs().max().item() for a, b in zip(through, cut))
print(f"when lambda* is detached, it changes by at most {change:.0e}")
assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(through, cut))

# %% [markdown]
# Why "envelope"? Move $v_{complete}$ along a line, here nearly along $R_t$, and draw the loss
# over $w$. The thick curve is the lower edge of all thin ones and touches each of them. Where two curves
# touch, they have the same slope.

# %%
w = torch.linspace(-0.4, 0.4, 81)
side = 0.05 * flow.noise_for(list(range(B)), tuple(R_complete.shape[1:]))   # a bit of another direction

def along_the_line(lam_of):                      # -> the loss of sample n at each w
    moved = [(R_complete + a * (R_target + side))[n:n + 1] for a in w]
    return [(R - flow.expand(lam_of(R), R) * R_target[n:n + 1]).square().mean().item() for R in moved]

plt.figure(figsize=(5.6, 2.5), layout="constrained")
for constant in lam[n] + torch.linspace(-0.35, 0.35, 8):
    plt.plot(w, along_the_line(lambda R: constant[None]), ":", color=INK, lw=1)
lowest = along_the_line(lambda R: lambda_star(R, R_target[n:n + 1]))
plt.plot(w, lowest, color=CORAL, lw=2.5)
plt.gca().set(xlabel="$w$", ylabel="$F$", ylim=(0, 3 * max(lowest)),
              title=r"thin: constant $\lambda$; thick: $\lambda^*(w)$")
plt.show()

# %% [markdown] tags=["slide"]
# ## Detaching λ* changes nothing
#
# ![Curves for constant lambda, and below them, touching, the curve for lambda star](last)
#
# The loss $F$ along one direction $w$ of $v_{complete}$. $\lambda^*$ is where $F$ is lowest in $\lambda$, so
# the gradient through it is multiplied with zero: the envelope theorem.

# %% [markdown]
# Read your four lines. The gradient in $v_{complete}$ is the rejection: nothing along $R_t$, as section 5
# said. The one in $v_{original}$ is *exactly its opposite*: the gap can be closed from both sides. So the
# detaching of $\lambda^*$ is free, and that of $v_{original}$ is not.
#
# ## 7 · A gradient that leaks (optional)
#
# A forgotten `detach` raises no error, and the loss still falls. To find it, ask every network what gradient
# it gets.
#
# ### Exercise 6.7 ★★ · Who gets a gradient?
#
# `networks` is a dict of modules. Return for each the length of the gradient of `loss` in *all* its trainable
# parameters, as one vector: a float, and 0.0 if there is none. Leave no trace: a second call gives the same.

# %% tags=["exercise"]
def gradient_norms(loss, networks):
    # -> {name: float}
    # BEGIN SOLUTION 6.7
    norms = {}
    for name, network in networks.items():
        weights = [p for p in network.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if weights else []
        norms[name] = sum(g.square().sum().item() for g in found if g is not None) ** 0.5
    return norms
    # END SOLUTION

# %% tags=["wrong"]
# says: an old .grad does not
def gradient_norms(loss, networks):              # .grad adds up from call to call
    loss.backward(retain_graph=True)
    return {name: sum(p.grad.square().sum().item() for p in network.parameters() if p.grad is not None) ** 0.5
            for name, network in networks.items()}

# %% tags=["wrong"]
# says: all count
def gradient_norms(loss, networks):              # the adapters alone, without Y
    norms = {}
    for name, network in networks.items():
        weights = [p for key, p in network.named_parameters() if p.requires_grad and "lora" in key]
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if weights else []
        norms[name] = sum(g.square().sum().item() for g in found if g is not None) ** 0.5
    return norms

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)` writes to no `.grad` and gives
# `None` for an unused weight. It wants at least one weight: treat a frozen network on its own.
# </details>

# %% tags=["check"]
networks = {"base model": pipe, "theta_1": theta_1, "theta_2": theta_2, "Y in theta_2": theta_2.embeddings}
loss = package.pcc_loss(theta_1, theta_2, batch, eta=1.0)[0]
networks["not reached"] = torch.nn.Linear(2, 2)
try:
    first, second = gradient_norms(loss, networks), gradient_norms(loss, networks)
except (RuntimeError, ValueError) as error:
    expect("not have been used" not in str(error), "some weights are not in the loss: allow_unused=True.")
    expect("empty" not in str(error), "a frozen network has no weights to ask for: its answer is 0.0.")
    raise
for network in networks.values():
    network.zero_grad()                          # theta_1 may still hold one from stage 1
loss.backward()
true = {name: sum(p.grad.square().sum().item() for p in network.parameters() if p.grad is not None) ** 0.5
        for name, network in networks.items()}
theta_2.zero_grad()
expect(isinstance(first, dict) and list(first) == list(networks), "return a dict, with the networks' names.")
for name, value in true.items():
    expect(abs(first[name] - second[name]) <= 1e-3 * value,
           f"a second call gives another answer for {name}: gradients have been added up in .grad.")
    expect(abs(first[name] - value) <= 1e-3 * value, f"{name}: your {first[name]:.5f} should be {value:.5f}; "
                                                     "A, B and Y all count, and an old .grad does not.")
print("6.7 right: " + ", ".join(f"{name} {value:.4f}" for name, value in first.items()))

# %% [markdown]
# Every `detach` is a switch now. First guess: in which row does $\theta_1$ get a gradient? In which rows does
# that of $\theta_2$ change?

# %%
def with_forgotten(what, theta_1, theta_2):      # L_PureCC; nothing in `what` is detached
    def cut(name, value):
        return value if name in what else value.detach()
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    R_target = cut("R_target", theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.null))
    v_original, v_complete = cut("v_original", theta_2(x_t, t, texts.base)), theta_2(x_t, t, texts.complete)
    lam = cut("lambda", lambda_star(v_complete - v_original, R_target))
    return (v_purecc(v_original, lam, R_target) - v_complete).square().mean()

def thawed():                                    # an extractor that nobody has frozen
    theta = Branch(pipe, theta_1.lora, theta_1.embeddings)
    return theta.requires_grad_(True)

def flat_gradient(loss, theta):
    found = torch.autograd.grad(loss, list(theta.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])

#        the row's name                 not detached  theta_1 thawed  Y shared
cases = [("all detached",               "",           False,          False),
         ("lambda* is not",             "lambda",     False,          False),
         ("v_original is not",          "v_original", False,          False),
         ("R_target is not",            "R_target",   False,          False),
         ("  nor is theta_1 frozen",    "R_target",   True,           False),
         ("theta_1 is not frozen",      "",           True,           False),
         ("  and theta_2 shares its Y", "",           True,           True)]
print(f"{'L_PureCC, where':28s}{'base model':>11s}{'theta_1':>10s}{'theta_2':>10s}   cosine with row 1")
seen = {}
for name, what, thaw, shared in cases:
    first = thawed() if thaw else theta_1.requires_grad_(False)
    second = Branch(pipe, theta_2.lora, theta_1.embeddings if shared else theta_2.embeddings)
    loss = with_forgotten([what], first, second)
    norms = gradient_norms(loss, {"base model": pipe, "theta_1": first, "theta_2": second})
    g = flat_gradient(loss, second)
    seen[name] = norms, g
    cosine = torch.cosine_similarity(g, seen["all detached"][1], dim=0).item()
    print(f"{name:28s} " + "".join(f"{value:10.5f}" for value in norms.values()) + f"{cosine:14.4f}")
theta_1.requires_grad_(False)                    # frozen again
norms = {name: found for name, (found, _) in seen.items()}
assert all(row["base model"] == 0 for row in norms.values())
assert [row["theta_1"] > 0 for row in norms.values()] == [False, False, False, False, True, False, True]
length, g = norms["all detached"]["theta_2"], seen["all detached"][1]
assert torch.allclose(seen["lambda* is not"][1], g, atol=1e-3 * length)
assert norms["v_original is not"]["theta_2"] < length
assert torch.cosine_similarity(seen["v_original is not"][1], g, dim=0) < 0.95

# %% [markdown]
# * **$\lambda^*$**: the same gradient, the envelope theorem in the real network.
# * **$\theta_1$ has two locks**, `no_grad` and `requires_grad_(False)`; a gradient arrives where both are
# missing.
# * **The last row** no `detach` can mend: $\theta_2$ was given $\theta_1$'s $Y$ itself, not a copy.
# * **$v_{original}$**: another gradient, and a shorter one. With the derivatives $J_c$ and $J_o$ of the two
# predictions it is $(J_c-J_o)^\top g$ in place of $J_c^\top g$: what moves both alike is not felt.
#
# ## 8 · What a step costs (optional)
#
# Which passes come back? Count them, by a wrapper that looks like the network itself. Count *samples*, not
# calls: the package puts several texts into one batch.
#
# ### Exercise 6.8 ★★ · A counter
#
# `v.register_hook(f)` calls `f(g)` when the gradient $g$ of $v$ has been computed: once for each backward
# pass through the network. It can be set only if `v.requires_grad`.

# %% [markdown] tags=["slide"]
# ## What a step costs
#
# ![L_CC: one forward and one backward pass; PureCC: four forward passes and one backward
# pass](../diagrams/cost.svg)
#
# Four forwards and *one* backward, against one of each.

# %% tags=["exercise"]
def counting(theta, name, tally):
    # -> a velocity like theta that adds samples to tally[name, "forward"] and tally[name, "backward"].
    # tally is a Counter: tally["a key"] += 3 works for a new key
    def velocity(x_t, t, text):
        # BEGIN SOLUTION 6.8
        v = theta(x_t, t, text)
        tally[name, "forward"] += len(x_t)
        if v.requires_grad:
            v.register_hook(lambda g: tally.update({(name, "backward"): len(g)}))
        return v
        # END SOLUTION
    return velocity

# %% tags=["wrong"]
# says: not calls
def counting(theta, name, tally):                # counts calls
    def velocity(x_t, t, text):
        v = theta(x_t, t, text)
        tally[name, "forward"] += 1
        if v.requires_grad:
            v.register_hook(lambda g: tally.update({(name, "backward"): 1}))
        return v
    return velocity

# %% tags=["wrong"]
# says: never comes back
def counting(theta, name, tally):                # believes that every gradient is asked for
    def velocity(x_t, t, text):
        v = theta(x_t, t, text)
        tally[name, "forward"] += len(x_t)
        tally[name, "backward"] += len(x_t) * v.requires_grad
        return v
    return velocity

# %% [markdown]
# <details><summary>Hint</summary>
#
# Inside the hook, `tally.update({(name, "backward"): len(g)})` adds; a `lambda` cannot hold a `+=`.
# </details>

# %% tags=["check"]
def count(loss_of_step):
    tally = Counter()
    thetas = Thetas(*(counting(theta, name, tally) for name, theta in
                      (("theta_0", pipe.velocity), ("theta_1", theta_1), ("theta_2", theta_2))))
    loss_of_step(thetas, batch, 1.0)[0].backward()
    theta_2.zero_grad()
    return {key: value / B for key, value in tally.items() if value}

expected = {methods.l_cc: {("theta_2", "forward"): 1, ("theta_2", "backward"): 1},
            methods.paper: {("theta_1", "forward"): 2, ("theta_2", "forward"): 2, ("theta_2", "backward"): 1},
            ablations.not_detached: {("theta_1", "forward"): 2, ("theta_2", "forward"): 2,
                                     ("theta_2", "backward"): 2}}
counts = {loss_of_step: count(loss_of_step) for loss_of_step in expected}
for loss_of_step, wanted in expected.items():
    got = counts[loss_of_step]
    expect(got.get(("theta_2", "forward")) == wanted["theta_2", "forward"],
           f"{loss_of_step.__name__}: count len(x_t) samples for each call, not calls.")
    expect(got == wanted, f"{loss_of_step.__name__}: you counted {got},\nand it is {wanted}; a prediction "
                          "comes back only if it carries a gradient, and then once.")
tally = Counter()                                # two predictions, of which only one is in the loss
seen = counting(theta_2, "theta_2", tally)
_, used = seen(batch.x_t, batch.t, batch.texts.base), seen(batch.x_t, batch.t, batch.texts.complete)
used.mean().backward()
theta_2.zero_grad()
expect(tally["theta_2", "backward"] == B, "what is not in the loss never comes back: use the hook.")
print("6.8 right: passes for each sample     forward    backward")
for loss_of_step, got in counts.items():
    print(f"{loss_of_step.__name__:38s}{sum(v for k, v in got.items() if 'forward' in k):7.0f}"
          f"{sum(v for k, v in got.items() if 'backward' in k):12.0f}")

# %% [markdown]
# A step of PureCC has four forwards and **one** backward, a step of $L_{CC}$ one of each. (The paper: 0.20
# A100 hours for stage 2, 0.13 for stage 1.) Drawing costs what it costs with a LoRA.
#
# ## 9 · Training with your own objective
#
# Wrap your objective as the package's loop wants it, compare three steps with the package's, and train with
# three values of $\eta$: 0 is a plain LoRA, 1 the paper's choice, and 8 far too much, to see the tendency.

# %%
def stage_2_loss(thetas, batch, eta):
    loss, loss_cc, loss_purecc, lam = objective(thetas.theta_1, thetas.theta, batch, eta)
    return loss, {"loss_cc": loss_cc, "loss_purecc": loss_purecc, "lambda": lam.mean()}

def fresh():
    return Branch.fresh(pipe, theta_1.embeddings.Y, config.rank, generator_for(config.seed, stage=2, step=-1))

yours, theirs = (train(loss, Thetas(pipe.velocity, theta_1, fresh()), stage=2, steps=3)
                 for loss in (stage_2_loss, methods.paper))
difference = max(abs(a[key] - b[key]) for a, b in zip(yours, theirs) for key in a)
print(f"three steps with your objective and with the package's: the logs differ by at most {difference:.0e}")
assert difference < 1e-4

etas, runs, logs = (0.0, 1.0, 8.0), {}, {}
for eta in etas:
    runs[eta] = fresh()
    logs[eta] = train(stage_2_loss, Thetas(pipe.velocity, theta_1, runs[eta]), stage=2, eta=eta)

figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
curves = ("loss_cc", "$L_{CC}$"), ("loss_purecc", "$L_{PureCC}$"), ("lambda", r"$\lambda^*$, mean")
for axis, (key, title) in zip(axes, curves):
    for eta, colour, line in zip(etas, (CORAL, BLUE, INK), ("-", "--", ":")):
        axis.plot(smooth([row[key] for row in logs[eta]]), line, color=colour, label=rf"$\eta$ = {eta:g}")
    axis.set(title=title, xlabel="step", ylim=(0, None))
axes[0].legend()
plt.show()

# %%
scene = draw_batch(data, TrainConfig(batch=8), stage=2, step=1000, shift=pipe.shift)    # no run has seen it
late = {(eta, key): sum(row[key] for row in logs[eta][-20:]) / 20 for eta in etas for key in logs[eta][0]}
with torch.no_grad():
    before = pipe.velocity(scene.x_t, scene.t, scene.texts.base)            # of the untouched model
print("means of the last 20 steps                                     | 8 unseen draws: length of")
print("  eta      L_CC   L_PureCC   eta L_PureCC / L   lambda*        | R_complete   change of v_original")
gap, drift = {}, {}
for eta in etas:
    R_t, v_o, v_c = (v.detach() for v in predictions(theta_1, runs[eta], scene))
    gap[eta], drift[eta] = norm(v_c - v_o).mean().item(), norm(v_o - before).mean().item()
    share = eta * late[eta, "loss_purecc"] / late[eta, "loss"]
    print(f"{eta:5g}{late[eta, 'loss_cc']:10.4f}{late[eta, 'loss_purecc']:11.5f}{share:19.1%}"
          f"{late[eta, 'lambda']:10.3f}        |{gap[eta]:11.2f}{drift[eta]:20.2f}")
assert late[0.0, "loss_purecc"] > late[1.0, "loss_purecc"] > late[8.0, "loss_purecc"]
assert late[1.0, "loss_purecc"] < 0.15 * late[1.0, "loss"] and all(drift[eta] > gap[eta] for eta in etas)
assert gap[0.0] > gap[1.0] > gap[8.0] and late[0.0, "lambda"] > late[8.0, "lambda"]
assert late[8.0, "loss_cc"] > late[0.0, "loss_cc"]

asked = ["a small [V] robot on the left in the snow", "a big [V] robot in the middle at night",
         "a big [V] robot on the right on the beach", "a big robot on the left in the snow"]
rows = [to_pictures(draw(pipe, theta, asked, word, steps=12)) for theta in (None, *runs.values())]
show([picture for row in rows for picture in row], [in_lines(text) for text in asked],
     ["base model", *(rf"$\eta$ = {eta:g}" for eta in etas)], columns=4, side=1.4)
plain = [(row[3].astype(float) - rows[0][3]) / 255 for row in rows[1:]]     # nobody asked for [V] here
print("without [V], a pixel changes by " + ", ".join(f"{np.abs(change).mean():.3f}" for change in plain))
assert min(np.abs(change).mean() for change in plain) > 0.01

# %% [markdown] tags=["slide"]
# ## Trained with it
#
# ![Pictures after training with the objective, the last column without [V]](last)
#
# Look at the last column: nobody asked for [V] there.

# %% [markdown]
# $L_{PureCC}$ falls with $\eta$, as it should. At $\eta = 1$ it is a small part of the loss, a gentle
# correction of a LoRA; at $\eta = 8$ it is bought with a larger $L_{CC}$. Adapters that make
# the rejection small make all of $R_c$ small (`R_complete` in the table).
#
# The table's last column holds the most important fact of this lesson, the *if* of section 4. For every
# $\eta$, $v_{original}$ has moved *further* from the untouched model than [V] makes a difference. Adapters act
# on every text, and what they do to both predictions alike cancels in $R_c$. The last column of pictures
# shows it, where nobody asked for [V]. $L_{PureCC}$ keeps the *difference* pure; nothing in Eq. 15 holds
# $v_{original}$ where it was. (One seed, fifty steps; the
# [benchmark](../../purecc_min/benchmark/README.md) measures it.)
#
# ### Algorithm 1, as a script
#
# `python -m purecc_min.algorithm` is all of it, to be read from top to bottom: it opens the references,
# trains $\theta_1$ (lines 1 to 7 of the paper's Algorithm 1), freezes it, trains $\theta_2$ (lines 8 to 18),
# draws and saves. Below: its second stage, read from the file, and a run of ten steps a stage. (The default
# is 200.)

# %%
lines = (Path(package.__file__).parent / "algorithm.py").read_text(encoding="utf-8").splitlines()
first, last = (next(n for n, line in enumerate(lines) if words in line)
               for words in ("stage 2: pure learning", "draw, and save"))
print("\n".join(lines[first:last]))

with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
    out = Path(place) / "algorithm"
    sys.argv = ["algorithm", str(FOLDER / TUNING[0]), "--class-word", "robot", "--steps", "10",
                "--out", str(out)]
    script = runpy.run_module("purecc_min.algorithm")                       # what the command does
    picture = np.array(Image.open(out / "pictures.png"))
plt.figure(figsize=(6.4, 5), layout="constrained")
plt.imshow(picture)
plt.yticks([picture.shape[0] * (n + 0.5) / 3 for n in range(3)], ["base model", "theta_1", "theta_2"])
plt.xticks([picture.shape[1] * (n + 0.5) / 4 for n in range(4)], [in_lines(text) for text in script["texts"]])
plt.gca().xaxis.tick_top()
plt.show()

terms = script["terms"]                          # of the last step
with torch.no_grad():
    lam = lambda_star(terms.R_complete, terms.R_target)
    one = lam.mean().expand(len(lam))            # one lambda for the batch
    with_one = (v_purecc(terms.v_original, one, terms.R_target) - terms.v_complete).square().mean()
print("its last step: lambda*", [round(value, 3) for value in lam.tolist()])
print(f"L_PureCC {terms.loss_purecc:.6f}, yours {rejection_loss(terms.R_complete, terms.R_target):.6f}, "
      f"with one lambda for the batch {with_one:.6f}")
assert torch.allclose(lam, terms.lam, 1e-4) and with_one > terms.loss_purecc

# %% [markdown]
# The paper does not say whether $\lambda^*$ is one number for a sample or for the batch. Try the latter in
# the script: import `lambda_star`, and give `pcc_loss` a rule as its last argument,
# `lambda R_c, R_t: lambda_star(R_c, R_t).mean().expand(len(R_t))`. $L_{PureCC}$ becomes larger, as above: a
# sample's own $\lambda^*$ makes it smallest. Do the pictures change?
#
# **In the package:** `pcc_loss`, `inner` and `lambda_star` in `purecc_min/objective.py`, `base_text` in
# `concept.py`, `l_cc` and, as "rejection", your `rejection_loss` in `methods.py`; a constant $l$ and a
# $v_{original}$ that is not detached in `ablations.py`.
#
# ## Three questions
#
# **1.** The extractor's direction is multiplied by 10, "to teach the concept more strongly". What changes?
# <details><summary>Answer</summary>
#
# Nothing. $\lambda^*$ becomes a tenth, and $\lambda^* R(y_{tar})$ stays. Only the *line* through $R(y_{tar})$
# matters. With a constant $l$ it would change everything.
# </details>
#
# **2.** $v_{original}$ in Eq. 13 comes from the untouched base model, in Eq. 10 from $\theta_2$. May the
# `detach` of $\lambda^*$ still be left out?
# <details><summary>Answer</summary>
#
# No. $\lambda^*$ then minimises $\lVert R_c - l R_t \rVert^2$ with *another* $v_{original}$ than the loss
# has, so $\partial F / \partial\lambda$ is not zero there.
# </details>
#
# **3.** After stage 2, $L_{PureCC}$ is exactly zero and $\lambda^* = 0$. What does [V] do?
# <details><summary>Answer</summary>
#
# Nothing: a text means the same with [V] and without. The model can still draw the concept, for *every*
# robot. A small $L_{PureCC}$ alone is no proof of purity.
# </details>
#
# **Next:** lesson 7. The objective is written; what holds $v_{original}$?

# %% [markdown] tags=["slide"]
# ## What it does not see
#
# The objective compares $\theta_2$ with itself. What the adapters do to both texts alike cancels in
# $R(y_{complete}, y_{base})$.
#
# Nothing in Eq. 15 holds $v_{original}$ where it was. That is lesson 7.
# ???
# Point back to the last column of the pictures: nobody asked for [V] there, and the plain robot has changed.
# The loss is small all the same, for it compares theta_2 with itself. Ask what could hold v_original; lesson 7
# tries three cures.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. The extractor's direction is multiplied by 10. What changes?
# 2. $v_{original}$ in Eq. 13 comes from the untouched model. May $\lambda^*$ still be left attached?
# 3. After stage 2, $L_{PureCC} = 0$ and $\lambda^* = 0$. What does [V] do?

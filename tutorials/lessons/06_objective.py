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
# **Eq. 8 to 15, written by you, and what they can push and what they cannot**
#
# A LoRA learns whatever its pictures share. PureCC adds one term to the loss, and this term says: what the
# word [V] changes in a prediction should be the concept and nothing else. The term is four lines long. In
# this lesson you write every one of them, derive what it does to the network, and train with it.
#
# **When you are through, you have written**
#
# 1. the four texts and the four predictions of a step, with a gradient where one belongs (Eq. 3, 8, 9, 10);
# 2. $\lambda^*$, $v_{PureCC}$, $L_{PureCC}$ and the whole loss (Eq. 11 to 15);
# 3. the gradients of $L_{PureCC}$, by hand, a tool that finds leaking gradients, and one that counts passes;
#
# **and you can say** why it does not matter whether $\lambda^*$ is detached, why it does matter for
# $v_{original}$, and which loss makes the concept strong.
#
# | | |
# |---|---|
# | Time | 40 minutes of reading, 2 hours with the exercises; about a minute of computing on two CPU cores |
# | Needs | lesson 1 (velocity, Eq. 3), lesson 4 (adapters, $Y^l$); projections; the chain rule |
# | Keep open | [`purecc_min/objective.py`](../../purecc_min/objective.py), 73 lines, **after** you have tried |
# | Read after | Sec. 4 of the paper (arXiv 2603.07561), with its equation numbers beside yours |
#
# An exercise is a function whose body is blank, and the cell below it is its check. Hints are folded; the
# solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 6 · The decoupled objective
#
# Eq. 8 to 15: what [V] changes in a prediction should be the concept, and nothing else.

# %%
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import torch

from purecc_min.learning import train_steps
from purecc_min import ablations, methods
from purecc_min import objective as package      # to compare with
from purecc_min.branch import Branch, Thetas
from purecc_min.commands.folder import load_concept
from purecc_min.concept import TOKEN, encode
from purecc_min.embeddings import class_word_states
from purecc_min.measure.draw import draw
from purecc_min.measure.toy import FOLDER, TUNING
from purecc_min.train import TrainConfig, draw_batch, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook.model import load_tiny
from tinyflow.pipeline import to_pictures
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, show

pipe = load_tiny()                               # the base model, frozen
concept = load_concept(FOLDER / TUNING[0], "robot", pipe.picture_size)
data, word = encode(pipe, concept), concept.class_word                      # pictures and texts, encoded once
config = TrainConfig(steps=50)

def in_lines(text):
    return text.replace(" on ", "\non ").replace(" in ", "\nin ").replace(" at ", "\nat ")

names = [in_lines(r.complete) for r in concept.references]
show([r.picture for r in concept.references], names, columns=len(names), side=1.6)
T = data.texts.base.context.shape[1]
print(f"{len(names)} references, x_0 {list(data.x_0.shape)}; a text has {T} tokens")

# %% [markdown] tags=["slide"]
# ## What four pictures share
#
# ![](last)
#
# Nothing in a picture says what belongs to [V]. Only texts can: the complete one, the base text without [V],
# the target "[V] robot", and the empty text.

# %% [markdown]
# ## 1 · Four texts, and the loss of stage 1
#
# This is [V] robot. Look at what its pictures share beside the robot itself; nothing in a picture says that
# it does not belong to [V]. Only texts can say it. For every reference there are four:
#
# | | an example | used for |
# |---|---|---|
# | $y_{complete}$ | `a small [V] robot in the middle in the desert` | what the picture shows |
# | $y_{base}$ | `a small robot in the middle in the desert` | the same sentence without [V] |
# | $y_{tar}$ | `[V] robot` | the concept alone |
# | $\varnothing$ | the empty text | nothing |
#
# Stage 1 uses the first one only. Its loss is Eq. 3, with the batch's $x_t$, $t$ and target velocity
# $v = x_1 - x_0$:
#
# $$L_{CC} = \mathbb E\,\lVert v_\theta(x_t, t \mid y_{complete}) - v \rVert^2,$$
#
# and the expectation is a mean over samples *and* over all numbers of a sample.
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
def four_texts(complete, class_word):            # the base text loses its noun, too
    base = " ".join(complete.replace(f"[V] {class_word}", "").split())
    return complete, base, f"[V] {class_word}", ""

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
def four_texts(complete, class_word):
    return complete, " ".join(complete.replace("[V]", "").split()), f"[V] {class_word}", ""

def l_cc(theta, batch):                          # a sum over the pixels, a mean over the batch
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().sum((1, 2, 3)).mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# Taking [V] out leaves two blanks side by side: `" ".join(text.split())` makes one of them. The noun stays:
# $y_{base}$ is a sentence that the base model understands. For the loss, `.square().mean()` is enough.
# </details>

# %% tags=["check"]
for r in concept.references:
    yours = four_texts(r.complete, word)
    expect(isinstance(yours, tuple) and len(yours) == 4, "return four strings.")
    expect(word in yours[1].split(), f"the base text still names the class word, {word!r}; only [V] goes.")
    expect(yours == (r.complete, r.base, r.target, ""), f"the texts are {yours},\nand should be "
                                                         f"{(r.complete, r.base, r.target, '')}")
columns = zip(*(four_texts(r.complete, word) for r in concept.references))
for column, theirs in zip(columns, data.texts):
    expect_close(pipe.encode_text(list(column), {TOKEN: word}).context, theirs.context, "an encoded text")
with torch.no_grad():
    drawn = draw_batch(data, config, stage=1, step=0, shift=pipe.shift)
    theirs, yours = methods.l_cc(Thetas(None, None, pipe.velocity), drawn, 1.0)[0], l_cc(pipe.velocity, drawn)
expect_close(yours, theirs, "l_cc (a mean over everything, no sum)")
print(f"6.1 right: four texts, and L_CC = {yours:.3f} on the first batch, before anything is learned")

# %% [markdown]
# With this loss, train the **extractor** $\theta_1$: adapters and the embeddings $Y^l$ of lesson 4,
# over the untouched base model. The loop is the package's; it calls your `l_cc` for every step. Then
# $\theta_1$ is frozen.

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
plt.plot(losses, color=GREY)
plt.plot(smooth(losses), color=BLUE)
plt.gca().set(xlabel="step", ylabel="$L_{CC}$", ylim=(0, None), title="stage 1; blue: running mean")
plt.show()
asked = ["[V] robot", "a big [V] robot in the middle at night"]
drawn = torch.cat([draw(pipe, theta, asked, word, steps=12) for theta in (None, theta_1)])
titles = [f"{text}\n{who}" for who in ("base model", "extractor") for text in ("[V] robot", "... at night")]
show(to_pictures(drawn), titles, columns=4)
assert smooth(losses)[-1] < smooth(losses)[9]

# %% [markdown]
# ## 2 · Four predictions, two differences
#
# Stage 2 trains a second branch, $\theta_2$: fresh adapters, and a *copy* of $\theta_1$'s $Y^l$. One noised
# picture $(x_t, t)$ goes through both networks, with all four texts:
#
# ```
#    theta_1, frozen                                        theta_2, in training
#
#    y_tar   --> v_tar  --.                                 y_complete --> v_complete --.
#                          >-- minus --> R(y_tar)                                        >-- minus --> R(y_complete,
#    empty   --> v_null --'    Eq. 8                        y_base     --> v_original --'    Eq. 10        y_base)
#                                                               Eq. 9
# ```
#
# $R(y_{tar})$ is everything that "[V] robot" says and the empty text does not: to the extractor, this *is*
# the concept. $R(y_{complete}, y_{base})$ is what inserting [V] into the sentence changes in $\theta_2$.
#
# **Which of the four carries a gradient?** Only $v_{complete}$. $\theta_1$ is a measuring instrument: if the
# loss could bend it, it would be fitted to what is measured. $v_{original}$ is what the complete prediction
# is compared *with*. (About $v_{original}$ the paper says nothing; not to differentiate it is this project's
# reading, and section 7 shows what the other choice does.)
#
# In the cell below $\theta_2$ takes twenty steps of $L_{CC}$, so that its adapters do something; then we draw
# a batch.

# %% [markdown] tags=["slide"]
# ## Four predictions, two differences
#
# ```
# theta_1, frozen                            theta_2, in training
#
# y_tar --> v_tar  --.                       y_complete --> v_complete --.
#                     >-- R(y_tar)                                        >-- R(y_complete, y_base)
# empty --> v_null --'   Eq. 8               y_base     --> v_original --'   Eq. 10
# ```
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
def predictions(theta_1, theta_2, batch):        # the direction is taken against the base text
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    with torch.no_grad():
        R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.base)
        v_original = theta_2(x_t, t, texts.base)
    return R_target, v_original, theta_2(x_t, t, texts.complete)

# %% tags=["wrong"]
def predictions(theta_1, theta_2, batch):        # everything with a gradient
    x_t, t, texts = batch.x_t, batch.t, batch.texts
    R_target = theta_1(x_t, t, texts.target) - theta_1(x_t, t, texts.null)
    return R_target, theta_2(x_t, t, texts.base), theta_2(x_t, t, texts.complete)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three of the four calls stand under `with torch.no_grad():`, two of `theta_1` and one of `theta_2`. The
# fourth, `theta_2` with `texts.complete`, stands outside.
# </details>

# %% tags=["check"]
_, theirs = package.pcc_loss(theta_1, theta_2, batch, eta=1.0)
mine = predictions(theta_1, theta_2, batch)
expect(isinstance(mine, tuple) and len(mine) == 3, "return three tensors.")
for what, v in zip(("R_target", "v_original"), mine):
    expect(not v.requires_grad, f"{what} carries a gradient; compute it under torch.no_grad().")
expect(mine[2].requires_grad, "v_complete carries no gradient, so nothing could be learned.")
expect_close(mine[0], theirs.R_target, "R_target (theta_1: target against the EMPTY text)")
expect_close(mine[1], theirs.v_original, "v_original (theta_2, the model in training, with the base text)")
expect_close(mine[2], theirs.v_complete, "v_complete")
print("6.2 right: R_target, v_original and v_complete are the package's")

# %% [markdown]
# A velocity field is a picture, so you can look at where each difference acts: bright is strong, and each row
# has its own scale.

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
# ![](last)
#
# $R(y_{tar})$: all that "[V] robot" says and the empty text does not. $R(y_{complete}, y_{base})$: what [V]
# adds to the sentence.

# %% [markdown]
# $R(y_{tar})$ is the longer one. Against the empty text "robot" itself is news, with all its outlines; the
# base text already says "robot", so there [V] adds less.
#
# ## 3 · $\lambda^*$: how far one reaches along the other
#
# Write $R_c$ for $R(y_{complete}, y_{base})$ and $R_t$ for $R(y_{tar})$. How much of the concept is in $R_c$?
# Eq. 11 asks for the multiple of $R_t$ that comes nearest to it, for each sample alone:
#
# $$\lambda^* = \arg\min_l f(l), \qquad f(l) = \lVert R_c - l\,R_t \rVert^2.$$
#
# **As a least squares problem.** Multiply out:
# $f(l) = \lVert R_c\rVert^2 - 2\,l\,\langle R_c, R_t\rangle + l^2 \lVert R_t\rVert^2$, a parabola in $l$ that
# opens upward. Its derivative $f'(l) = -2\langle R_c, R_t\rangle + 2\,l\,\lVert R_t\rVert^2$ is zero at
#
# $$\lambda^* = \frac{\langle R_c, R_t\rangle}{\lVert R_t\rVert^2} \qquad \text{(Eq. 12)}.$$
#
# **As a projection.** The nearest point of a line is the one from which the way to $R_c$ is at right angles
# to the line: $\langle R_c - \lambda^* R_t,\; R_t\rangle = 0$. Solved for $\lambda^*$, this is Eq. 12 again.
# So $\lambda^* R_t$ is the projection of $R_c$ onto $R_t$, and $R_c - \lambda^* R_t$, what is left, is its
# **rejection**.
#
# ### Exercise 6.3 ★★ · $\lambda^*$
#
# One number for each sample; the inner product runs over channels and pixels. It may be negative: then what
# [V] adds points away from the direction. Where $R_t$ is zero there is no direction: return 0 there, and let
# the *gradient* be 0 as well.

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
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):           # the division by zero is hidden too late
    square = inner(R_target, R_target)
    return torch.where(square == 0, 0.0, inner(R_complete, R_target) / square)

# %% tags=["wrong"]
def inner(a, b):
    return (a * b).flatten(1).sum(1)

def lambda_star(R_complete, R_target):           # one number for the batch
    one = (R_complete * R_target).sum() / (R_target * R_target).sum().clamp(min=1e-12)
    return one.expand(len(R_target))

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `torch.where(condition, 0.0, a / b)` computes `a / b` everywhere, and its gradient as well: at $b = 0$ that
# is zero times infinity, which is NaN.
# </details>
# <details><summary>Hint 2</summary>
#
# So put something harmless *into* the division, `a / torch.where(b == 0, 1.0, b)`, and let a second `where`
# choose the value 0.
# </details>

# %% tags=["check"]
lam = lambda_star(R_complete, R_target)
cosines = torch.cosine_similarity(R_complete.flatten(1), R_target.flatten(1))           # [B]
expect(isinstance(lam, torch.Tensor) and lam.shape == (B,), "lambda* is one number a sample: a tensor [B].")
expect(not torch.allclose(lam, cosines, atol=1e-4),
       "this is the cosine; divide by the square of |R_target|, and not by |R_complete|.")
expect(not torch.allclose(lam, package.lambda_star(R_complete, R_target) * norm(R_target), atol=1e-4),
       "you have divided by |R_target|; Eq. 12 divides by its square.")
grid = torch.linspace(lam.min().item() - 0.2, lam.max().item() + 0.2, 501)          # Eq. 11 by brute force
f = torch.stack([norm(R_complete.double() - l * R_target).square() for l in grid])  # [501, B]
brute = grid[f.argmin(dim=0)]                                                       # [B]
expect_close(lam, package.lambda_star(R_complete, R_target), "lambda* (each sample has its own)", 1e-5)
tiny = 1e-3 * R_target                           # lambda* is then a thousand times as large
expect_close(1e-3 * lambda_star(R_complete, tiny), lam, "lambda* of a short R_target (add nothing to |R|^2)")
expect((lam - brute).abs().max() <= grid[1] - grid[0], "lambda* is not the lowest point of f(l).")
free = R_complete.clone().requires_grad_()
nothing = R_target.clone()
nothing[0] = 0                                   # one sample has no direction
value = lambda_star(free, nothing)
gradient, = torch.autograd.grad(value.sum(), free)
expect(value[0] == 0, "where R_target is zero, lambda* is 0.")
expect(bool(gradient.isfinite().all()), "the value is right, but at R_target = 0 its gradient is NaN.")
print("6.3 right:  sample   Eq. 12    brute force over", len(grid), "values of l")
for n in range(B):
    print(f"            {n:6d} {lam[n]:8.4f} {brute[n]:8.4f}")

# %%
plt.figure(figsize=(6.2, 2.6), layout="constrained")
share = f / norm(R_complete).square()                                       # [501, B]
shades = plt.cm.viridis(torch.linspace(0.1, 0.85, B).tolist())
for n in range(B):
    plt.plot(grid, share[:, n], color=shades[n], label=f"sample {n}")
    plt.plot(lam[n], 1 - cosines[n] ** 2, "o", color=shades[n])
plt.axhline(1, color=GREY, lw=0.8)
dip, reach = 1 - share.min().item(), 2.5 * lam.abs().max().item()
ends = max(-reach, grid[0].item()), min(reach, grid[-1].item())             # as far as the curves go
plt.gca().set(xlabel="$l$", ylabel=r"$f(l)\ /\ \|R_c\|^2$", ylim=(1 - 1.4 * dip, 1 + 2 * dip),
              xlim=ends, title="Eq. 11 as curves, Eq. 12 as dots")
plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown] tags=["slide"]
# ## How far one reaches along the other
#
# $$\lambda^* = \operatorname{argmin}_l\,\lVert R_c - l\,R_t \rVert^2 = \frac{\langle R_c, R_t\rangle}{\lVert R_t\rVert^2}$$
#
# ![](last)
#
# A least squares problem (Eq. 11), and a projection (Eq. 12).

# %% [markdown]
# Mind the vertical axis, which does not begin at 0. Every curve passes through 1 at $l = 0$. Its lowest point
# is the share of $R_c$ that *no* multiple of the concept's direction explains, and it is large: the next cell
# prints it. Most of what [V] changes lies beside the direction of $R_t$, so "nothing beside this direction",
# which is what the loss is going to say, asks for much. Section 9 shows what comes of it.

# %%
explained = cosines.square()                                                # [B]
print("of |R_c|^2, lambda* R_t explains:  " + "  ".join(f"{share_:.1%}" for share_ in explained))
assert explained.mean() < 0.5

# %% [markdown]
# ## 4 · $v_{PureCC}$ and the losses
#
# If [V] added the concept alone, as strongly as it does now, $\theta_2$ would predict
#
# $$v_{PureCC} = v_{original} + \lambda^* R(y_{tar}) \qquad \text{(Eq. 6, 13)},$$
#
# and the loss asks for just that, beside $L_{CC}$:
#
# $$L_{PureCC} = \mathbb E\,\lVert v_{PureCC} - v_{complete} \rVert^2 \quad \text{(Eq. 14)}, \qquad
# L = L_{CC} + \eta\, L_{PureCC} \quad \text{(Eq. 15)}.$$
#
# ### Exercise 6.4 ★ · The whole objective
#
# Detach $\lambda^*$, as the package does, and nothing else. `v_complete` is computed once and used in both
# losses.

# %% [markdown] tags=["slide"]
# ## The objective
#
# $$v_{PureCC} = v_{original} + \lambda^* R(y_{tar})$$
#
# $$L_{PureCC} = \mathbb E\,\lVert v_{PureCC} - v_{complete} \rVert^2$$
#
# $$L = L_{CC} + \eta\, L_{PureCC}$$

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
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):     # v_PureCC is compared with the data's velocity
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - batch.v).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
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
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):     # L_PureCC has the right value, and teaches nothing
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete.detach()).square().mean()
    loss_cc = (v_complete - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% tags=["wrong"]
def v_purecc(v_original, lam, R_target):
    return v_original + lam[:, None, None, None] * R_target

def objective(theta_1, theta_2, batch, eta):     # computes v_complete twice
    R_target, v_original, v_complete = predictions(theta_1, theta_2, batch)
    lam = lambda_star(v_complete - v_original, R_target).detach()
    loss_purecc = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    loss_cc = (theta_2(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
    return loss_cc + eta * loss_purecc, loss_cc, loss_purecc, lam

# %% [markdown]
# <details><summary>Hint</summary>
#
# To multiply $[B]$ with $[B, C, H, W]$, give it three axes of length 1: `lam[:, None, None, None]`. Without
# them PyTorch would match the $B$ numbers with the *last* axis, the columns of the picture.
# </details>

# %% tags=["check"]
eq_13 = v_original + flow.expand(lam, R_target) * R_target
expect_close(v_purecc(v_original, lam, R_target), eq_13,
             "v_purecc (all of v_original, and lambda* R_target on top)")
loss, terms = package.pcc_loss(theta_1, theta_2, batch, eta=0.7)
passed = []                                      # a row for each forward pass of the MMDiT
counter = pipe.mmdit.register_forward_hook(lambda module, inputs, v: passed.append(len(v)))
mine = objective(theta_1, theta_2, batch, eta=0.7)
counter.remove()
expect(isinstance(mine, tuple) and len(mine) == 4, "return L, L_CC, L_PureCC and lambda*.")
expect_close(mine[3], terms.lam, "lambda*", 1e-5)
expect(not mine[3].requires_grad, "detach lambda*.")
expect_close(mine[1], terms.loss_cc, "L_CC", 1e-5)
expect_close(mine[2], terms.loss_purecc, "L_PureCC (between v_PureCC and v_complete)", 1e-5)
expect_close(mine[0], loss, "L = L_CC + eta L_PureCC, here with eta = 0.7,", 1e-5)
expect(sum(passed) == 4 * B, f"a step takes 4 predictions of each sample, and yours {sum(passed) / B:g}.")

def slope(loss):                                 # in everything that theta_2 trains, as one vector
    trained = [p for p in theta_2.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])

expect(mine[2].requires_grad and torch.allclose(slope(mine[2]), slope(terms.loss_purecc), atol=1e-6),
       "L_PureCC is right, but its gradient in theta_2 is not: v_complete has to stay in the graph.")
print("6.4 right      yours      the package")
rows = ("L_CC", mine[1], terms.loss_cc), ("L_PureCC", mine[2], terms.loss_purecc), ("L", mine[0], loss)
for name, a, b in rows:
    print(f"{name:10s} {a.item():10.6f}   {b.item():10.6f}")

# %% [markdown]
# ## 5 · $L_{PureCC}$ is a rejection
#
# Put $\lambda^*$ into Eq. 14. $v_{original}$ joins $v_{complete}$ and makes $R_c$:
#
# $$v_{PureCC} - v_{complete} = v_{original} + \lambda^* R_t - v_{complete} = -(R_c - \lambda^* R_t).$$
#
# That is the rejection. Pythagoras gives its length. With $\varphi$ the angle between $R_c$ and $R_t$, the
# projection has the length $\lVert R_c\rVert\,\lvert\cos\varphi\rvert$, and the rejection
# $\lVert R_c\rVert \sin\varphi$. And for a constant $l$ in place of $\lambda^*$, split $R_c - l R_t$ into the
# rejection and the rest, which lies along $R_t$. They are at right angles, so
#
# $$\lVert R_c - l\,R_t\rVert^2 = \lVert R_c\rVert^2 \sin^2\varphi \;+\; (l - \lambda^*)^2\, \lVert R_t\rVert^2 .$$
#
# ### Exercise 6.5 ★★ · $L_{PureCC}$ without $\lambda^*$
#
# Write $L_{PureCC}$ from the two differences, with no $\lambda^*$ in it: from lengths and the angle. It has
# to be equal to Eq. 14 as far as the floating point numbers go.

# %% tags=["exercise"]
def rejection_loss(R_complete, R_target):
    # [B, C, H, W] twice -> a number
    # BEGIN SOLUTION 6.5
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()     # [B]
    return (square_c * (1 - cosine**2)).mean() / R_complete[0].numel()      # sin^2 = 1 - cos^2
    # END SOLUTION

# %% tags=["wrong"]
def rejection_loss(R_complete, R_target):        # a mean over the batch alone
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()
    return (square_c * (1 - cosine**2)).mean()

# %% tags=["wrong"]
def rejection_loss(R_complete, R_target):        # 1 - cos is another measure
    square_c, square_t = inner(R_complete, R_complete), inner(R_target, R_target)
    cosine = inner(R_complete, R_target) / (square_c * square_t).sqrt()
    return (square_c * (1 - cosine)).mean() / R_complete[0].numel()

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
yours = rejection_loss(*double)
expect(not torch.allclose(yours, eq_14 * R_complete[0].numel()), "divide by the numbers of a sample, too.")
expect_close(yours / eq_14, torch.ones((), dtype=torch.float64), "your loss, over Eq. 14,", 1e-12)
single, in_step = rejection_loss(R_complete, R_target), objective(theta_1, theta_2, batch, 1.0)[2].detach()
expect_close(single / in_step, torch.ones(()), "the same in fp32", 1e-4)
print(f"6.5 right: relative difference from Eq. 14: fp64 {(yours / eq_14 - 1).abs():.0e}, "
      f"fp32 {(single / in_step - 1).abs():.0e}")

# %% [markdown]
# Two vectors span a plane, so one sample's $R_t$ and $R_c$ can be drawn without any loss: to scale, in the
# plane in which both lie. A gradient step on $L_{PureCC}$ pushes the tip of $R_c$ toward the tip of $l\,R_t$:
# that is the red arrow.

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
    axis.text(edge, 0.04 * across, "$R_t$", ha="right", va="bottom", color=GREY)
    axis.quiver(0, 0, along, across, color=INK, width=0.025, **arrow)
    axis.quiver(along, across, (factor - 1) * along, -across, color=CORAL, width=0.013, **arrow)
    axis.text(along * 0.4, across * 0.55, "$R_c$  ", ha="right", color=INK)
    if factor:
        axis.quiver(0, 0, factor * along, 0, color=BLUE, width=0.018, **arrow)
    if factor == 1:
        axis.text(along, across * 0.5, "  rejection", color=CORAL)
    axis.text(factor * along, -0.09 * across, "$l\\,R_t$", ha="center", va="top", color=BLUE)
    axis.set(title=title, xlim=(-0.35 * edge, 1.05 * edge), ylim=(-0.3 * across, 1.12 * across),
             aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
plt.show()
print(f"R_t goes on to the right, to |R_t| = {norm(R_target)[n]:.1f};  |R_c| = {norm(R_complete)[n]:.1f}")

print("        l    L_PureCC at l    rejection + (l - lambda*)^2 |R_t|^2    cosine of the push with R_t")
pixels, pushes = R_complete[n].numel(), []
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
# ![](last)
#
# With $\lambda^*$ it pushes straight to the line: nothing beside the concept, and no more of the concept
# either.

# %% [markdown]
# Read the last column. With $l$ below $\lambda^*$ the loss pushes the concept back; with $l$ above it, it
# pulls the concept ahead, until $\lambda^* = l$: a constant $l$ *prescribes* how strong the concept becomes
# ($l = 1$ is the paper's ablation in Table 3). At $l = \lambda^*$ the cosine is zero. **$L_{PureCC}$ does not
# ask for more of the concept, nor for less: its gradient in $v_{complete}$ has no part along $R_t$. It says:
# nothing beside this direction. That the concept becomes strong is asked for by $L_{CC}$ alone.**
#
# ## 6 · The envelope: four gradients by hand
#
# $\lambda^*$ is made from $v_{complete}$, so a gradient *could* flow through it, and `objective` cuts it off.
# What is lost? Let $w$ be any number that the predictions depend on, and write the loss as $F(\lambda, w)$.
# The chain rule has two parts:
#
# $$\frac{d}{dw} F(\lambda^*(w), w) = \underbrace{\frac{\partial F}{\partial \lambda}(\lambda^*, w)}_{=\,0}\;
# \frac{d\lambda^*}{dw} \;+\; \frac{\partial F}{\partial w}(\lambda^*, w).$$
#
# The first factor is zero *because $\lambda^*$ is where $F$ is lowest* in $\lambda$. So whatever
# $d\lambda^*/dw$ is, it is multiplied with zero. This is the **envelope theorem**, and it makes the gradients
# short: hold $\lambda^*$ fixed and differentiate the rest.
#
# ### Exercise 6.6 ★★★ · All four
#
# Suppose that nothing is detached. Write the gradient of $L_{PureCC}$ in each of the four predictions,
# without autograd. With $r = R_c - \lambda^* R_t$ the loss is $\frac1M \sum r^2$, a mean over all $M$ numbers
# of the batch (`v_complete.numel()`).

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
def gradients(v_tar, v_null, v_original, v_complete):                       # forgets the lambda* before R_t
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = lambda_star(R_complete, R_target)[:, None, None, None]
    g = 2 * (R_complete - lam * R_target) / v_complete.numel()
    return -g, g, -g, g

# %% tags=["wrong"]
def gradients(v_tar, v_null, v_original, v_complete):                       # both of theta_2's with one sign
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = lambda_star(R_complete, R_target)[:, None, None, None]
    g = 2 * (R_complete - lam * R_target) / v_complete.numel()
    return -lam * g, lam * g, g, g

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# $L_{PureCC} = \frac1M \sum \lVert r\rVert^2$ with
# $r = (v_{complete} - v_{original}) - \lambda^* (v_{tar} - v_{null})$ and $M$ numbers in all. Differentiate
# with $\lambda^*$ held fixed: each gradient is $\frac{2}{M}\, r$ times what stands before the prediction in
# $r$.
# </details>
# <details><summary>Hint 2</summary>
#
# Before $v_{complete}$ stands $+1$, before $v_{original}$ $-1$, before $v_{tar}$ $-\lambda^*$, before
# $v_{null}$ $+\lambda^*$.
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
expect(isinstance(mine, tuple) and len(mine) == 4, "return four gradients.")
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
# Why is it called an envelope? Move $v_{complete}$ along a line, here nearly in the direction of $R_t$, and
# draw the loss over $w$: a thin curve for each *constant* $\lambda$, a thick one with $\lambda^*(w)$. The
# thick curve is the lower edge of all thin ones, and touches each of them. Where two curves touch, they have
# the same slope, so the slope of $F(\lambda^*(w), w)$ is the one with $\lambda$ held fixed.

# %%
w = torch.linspace(-0.4, 0.4, 81)
side = 0.05 * flow.noise_for(list(range(B)), tuple(R_complete.shape[1:]))   # a bit of another direction

def along_the_line(lam_of):                      # -> the loss of sample n at each w
    moved = [(R_complete + a * (R_target + side))[n:n + 1] for a in w]
    return [(R - flow.expand(lam_of(R), R) * R_target[n:n + 1]).square().mean().item() for R in moved]

plt.figure(figsize=(5.6, 2.5), layout="constrained")
for constant in lam[n] + torch.linspace(-0.35, 0.35, 8):
    plt.plot(w, along_the_line(lambda R: constant[None]), color=GREY, lw=1)
lowest = along_the_line(lambda R: lambda_star(R, R_target[n:n + 1]))
plt.plot(w, lowest, color=CORAL, lw=2.5)
plt.gca().set(xlabel="$w$", ylabel="$F$", ylim=(0, 3 * max(lowest)),
              title=r"grey: constant $\lambda$; red: $\lambda^*(w)$")
plt.show()

# %% [markdown] tags=["slide"]
# ## Detaching λ* changes nothing
#
# ![](last)
#
# $\lambda^*$ is where the loss is lowest in $\lambda$, so the gradient through it is multiplied with zero:
# the envelope theorem.

# %% [markdown]
# Read your four lines. The gradient in $v_{complete}$ is the rejection: nothing along $R_t$, as section 5
# said. The one in $v_{original}$ is *exactly its opposite*: the gap can be closed from both sides. And
# $v_{tar}$ would be turned *toward* what $\theta_2$ does already. So the detaching of $\lambda^*$ is free,
# and the other three are not. Now in the real network.
#
# ## 7 · A gradient that leaks
#
# A forgotten `detach` raises no error, and the loss still falls. To find it, ask every network what gradient
# it gets.
#
# ```
#    y_tar, empty --> theta_1 --> R(y_tar) ---x---.
#    y_base       --> theta_2 --> v_original -x----+--> lambda* --x--> v_PureCC --.
#    y_complete   --> theta_2 --> v_complete ------'                               >--> L_PureCC
#                                     '-------------- the only way back ----------'         x: cut for gradients
# ```
#
# ### Exercise 6.7 ★★ · Who gets a gradient?
#
# `networks` is a dict of modules. Return for each the length of the gradient of `loss` in *all* its
# parameters that can be trained, as one vector: a float, and 0.0 if there is none. Leave no trace: a second
# call has to give the same answer.

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
def gradient_norms(loss, networks):              # .grad adds up from call to call
    loss.backward(retain_graph=True)
    return {name: sum(p.grad.square().sum().item() for p in network.parameters() if p.grad is not None) ** 0.5
            for name, network in networks.items()}

# %% tags=["wrong"]
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
# `torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)` writes to no `.grad`, keeps the
# graph for the next network, and gives `None` for a weight that the loss does not depend on. It wants at
# least one weight, so treat a frozen network (an empty list) on its own.
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
# Here is $L_{PureCC}$ with every `detach` as a switch. Before you run it, guess: in which row does $\theta_1$
# get a gradient? In which rows does the gradient of $\theta_2$ change?

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
# * **$\lambda^*$**: the cosine is 1 and the length is the same. That is the envelope theorem, in the real
# network.
# * **$\theta_1$ has two locks**, `no_grad` around $R(y_{tar})$ and `requires_grad_(False)`. Either is enough;
# only where both are missing does a gradient arrive. (`no_grad` also keeps no activations in memory.)
# * **The last row** is a mistake that no `detach` can mend: $\theta_2$ was given $\theta_1$'s $Y$ itself, not
# a copy, so training the one moves the other. `ConceptEmbeddings` therefore begins with a `clone`.
# * **$v_{original}$**: another gradient, in length and direction. Both predictions come from the same
# adapters, with the derivatives $J_c$ and $J_o$. Detached, they receive $J_c^\top g$; not detached,
# $(J_c - J_o)^\top g$: shorter, because whatever moves both predictions alike is not felt at all. And the gap
# is closed from both sides, so the sentence *without* [V] is asked to move toward the one with it. Detached,
# $v_{original}$ is what it is called, a reference. (`ablations.not_detached` trains the other choice, and the
# benchmark compares them.)
#
# ## 8 · What a step costs
#
# A batch of $B$ samples costs $B$ forward passes for each text. Which passes come back? Count them, by a
# wrapper that looks like the network itself. (The package puts several texts into one larger batch, so
# counting *calls* would miss half of them: count *samples*.)
#
# ### Exercise 6.8 ★★ · A counter
#
# `v.register_hook(f)` calls `f(g)` when the gradient $g$ of $v$ has been computed, so once for each backward
# pass through the network. It can be set only if `v.requires_grad`.

# %% [markdown] tags=["slide"]
# ## What a step costs
#
# ```
# L_CC      [complete][      backward      ]
# PureCC    [target  ][ empty  ][  base  ][complete][      backward      ]
# ```
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
def counting(theta, name, tally):                # counts calls
    def velocity(x_t, t, text):
        v = theta(x_t, t, text)
        tally[name, "forward"] += 1
        if v.requires_grad:
            v.register_hook(lambda g: tally.update({(name, "backward"): 1}))
        return v
    return velocity

# %% tags=["wrong"]
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
    return {key: value / B for key, value in tally.items()}

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
# A step of PureCC has four forwards and **one** backward, and a step of $L_{CC}$ one of each. If a backward
# costs $b$ forwards, the ratio is $(4 + b) / (1 + b)$: it is below 4, because the dear part is not repeated.
# Drawn for $b = 2$:
#
# ```
#    L_CC      [complete][      backward      ]
#    PureCC    [target  ][ empty  ][  base  ][complete][      backward      ]
# ```
#
# `python -m purecc_min speed` measures the ratio on your computer.
#
# The paper's own figures, for 400 steps of each stage on Stable Diffusion 3.5 Medium: 0.13 A100 hours for
# stage 1, whose step is a LoRA's, and 0.20 for stage 2, a ratio of 1.5. PureCC needs both stages, 0.33 hours
# in all: 2.5 times a LoRA. (In the formula 0.20 / 0.13 would be $b = 4.6$. The hours hold more than passes,
# and the paper does not divide them.) At inference only $\theta_2$ is used, and it costs what a LoRA costs.
#
# ## 9 · Training with your own objective
#
# The package's loop calls a function `(thetas, batch, eta) -> (loss, what to log)`. Wrap yours, check that
# three steps of it are the package's three steps, and train with three values of $\eta$: 0 is a plain LoRA, 1
# is the paper's choice, and 8 is far too much, to see the tendency. All three start alike and see the same
# batches.

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
    for eta, colour in zip(etas, (CORAL, BLUE, GOLD)):
        axis.plot(smooth([row[key] for row in logs[eta]]), color=colour, label=rf"$\eta$ = {eta:g}")
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
     ["base model"] + [rf"$\eta$ = {eta:g}" for eta in etas], columns=4, side=1.4)

# %% [markdown] tags=["slide"]
# ## Trained with it
#
# ![](last)
#
# Look at the last column: nobody asked for [V] there.

# %% [markdown]
# Read the table downward. $L_{PureCC}$ falls with $\eta$, as it should, and at $\eta = 8$ $L_{CC}$
# pays for it. At $\eta = 1$ it is a small part of the loss: a gentle correction of a LoRA, and no other kind
# of training. The adapters that make the rejection small make all of $R_c$ small (column R_complete).
#
# The last two columns hold the most important fact of this lesson. For every $\eta$, $v_{original}$ has moved
# away from the untouched model *further* than [V] makes a difference. The adapters act on every text, and
# what they do to both predictions alike cancels in $R_c$: Eq. 14 cannot see it. The last column of pictures
# shows it, where nobody asked for [V]. $L_{PureCC}$ keeps the *difference* pure; nothing in Eq. 15 holds
# $v_{original}$ where it was. (One concept, one seed, fifty steps: an illustration, not a measurement. The
# measurement is in [`purecc_min/benchmark`](../../purecc_min/benchmark/README.md).)
#
# ## What you can now say
#
# * $\lambda^* R(y_{tar})$ is the projection of $R(y_{complete}, y_{base})$, and $L_{PureCC}$ the squared
# rejection.
# * $L_{PureCC}$ takes away what [V] adds beside the concept's direction. Only $L_{CC}$ asks for the concept.
# * Detaching $\lambda^*$ changes nothing (envelope). Detaching $v_{original}$ is a choice. $\theta_1$ has two
# locks.
# * A step is four forwards and one backward.
# * The objective compares $\theta_2$ with itself. What it does to both texts alike, it does not see.
#
# | you wrote | in the package |
# |---|---|
# | `four_texts`, `l_cc` | `base_text` and `Texts` in `purecc_min/concept.py`; `methods.l_cc`, which knows masks as well |
# | `predictions`, `v_purecc`, `objective` | `pcc_loss` in `purecc_min/objective.py` |
# | `inner`, `lambda_star` | the same names in `purecc_min/objective.py` |
# | `rejection_loss` | the row "rejection" of `log_of` in `purecc_min/methods.py` |
# | `with_forgotten`; section 5 with a constant $l$ | `not_detached`, `constant_lambda` in `purecc_min/ablations.py` |
#
# ## Three questions
#
# **1.** A colleague multiplies the extractor's direction by 10, "to teach the concept more strongly". What
# changes?
# <details><summary>Answer</summary>
#
# Nothing. $\lambda^*$ becomes a tenth, and $\lambda^* R(y_{tar})$ stays. The same holds for the factor $-1$.
# Only the *line* through $R(y_{tar})$ matters. With a constant $l$ it would change everything.
# </details>
#
# **2.** Somebody takes $v_{original}$ in Eq. 13 from the untouched base model, and leaves $\theta_2$'s in Eq.
# 10. May they still leave out the `detach` of $\lambda^*$?
# <details><summary>Answer</summary>
#
# No. $\lambda^*$ then minimises $\lVert R_c - l R_t \rVert^2$ with *another* $v_{original}$ than the loss
# has, so $\partial F / \partial\lambda$ is not zero there, and the first part of the chain rule stays.
# </details>
#
# **3.** After stage 2, $L_{PureCC}$ is exactly zero and $\lambda^* = 0$. What does [V] do?
# <details><summary>Answer</summary>
#
# Nothing: the rejection and the projection are both zero, so $R(y_{complete}, y_{base}) = 0$, and a text
# means the same with [V] and without. The model can still draw the concept, for *every* robot. A small
# $L_{PureCC}$ alone is no proof of purity.
# </details>
#
# **Next:** lesson 7. The objective is written; what it gains and what it costs has to be measured.

# %% [markdown] tags=["slide"]
# ## What it does not see
#
# The objective compares $\theta_2$ with itself. What the adapters do to both texts alike cancels in
# $R(y_{complete}, y_{base})$.
#
# Nothing in Eq. 15 holds $v_{original}$ where it was. That is lesson 7.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. The extractor's direction is multiplied by 10. What changes?
# 2. $v_{original}$ in Eq. 13 comes from the untouched model. May $\lambda^*$ still be left attached?
# 3. After stage 2, $L_{PureCC} = 0$ and $\lambda^* = 0$. What does [V] do?

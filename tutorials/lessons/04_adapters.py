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
# # 4 · Adapters and embeddings: where a concept enters
#
# **You write LoRA and the embeddings of [V] from nothing, and teach the model a robot with them**
#
# The model knows robots. It does not know *this* robot, of which there are four pictures. Two places can be
# trained: the weights of the layers, and the word that names the robot, written [V]. PureCC's stage 1 uses
# both: a LoRA, which is a small change of the weights, and one vector of [V] for every block. In the base
# model itself not one number is ever changed.
#
# | | |
# |---|---|
# | Needs | lessons 1 to 3 |
# | Optional | sections 1 (it needs the singular value decomposition), 5 and 9 |
# | Keep open | [`lora.py`](../../purecc_min/lora.py), [`embeddings.py`](../../purecc_min/embeddings.py), [`branch.py`](../../purecc_min/branch.py), **after** you have tried |
# | Read after | Sec. 4.2 of the paper (arXiv 2603.07561), and lesson 6 |

# %% [markdown] tags=["slide"]
# # 4 · Adapters and embeddings: where a concept enters
#
# A LoRA and one vector of [V] for every block, over a base model in which not one number is ever changed.

# %%
import contextlib
import copy
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from purecc_min.learning import train_steps
from purecc_min import methods                   # to compare with
from purecc_min.branch import Branch
from purecc_min.commands.export import export_lora
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.lora import LoRA, target_layers
from purecc_min.measure.judge import Judge
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING
from purecc_min.train import TrainConfig, draw_batch, optimizer_for
from tinyflow import flow
from tinyflow.picturebook import world
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import to_pixels
from tinyflow.weights import tensor_hash
from tutorials.course import (BLUE, CORAL, GOLD, GREY, INK, YourTurn,
                              expect, expect_close, in_lines, rule_out, several, show)

pipe = load_tiny()                               # the base model, frozen
model, D, depth = pipe.mmdit, pipe.mmdit.config.width, pipe.mmdit.config.depth
robot = CONCEPTS[TUNING[0]]                      # all that is true about this robot
word = robot.class_word
concept = load_concept(FOLDER / TUNING[0], word, pipe.picture_size)
data = encode(pipe, concept)                     # x_0 [n, C, S, S] and the texts, encoded once
settings = TrainConfig(steps=80)                 # batch 4, rank 4, and the learning rates
r = settings.rank

layers = {f"blocks.{l}.{name}": layer for l, block in enumerate(model.blocks)
          for name, layer in target_layers(block, "everywhere").items()}
untouched = tensor_hash(model.state_dict())      # a SHA-256 over every weight

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def draws(k, stage=1):                           # step k's batch: x_t, t, v, texts
    return draw_batch(data, settings, stage, k, pipe.shift)

held = [draws(k, stage=3) for k in range(6)]     # noise and times that no training in this lesson sees

@torch.no_grad()
def held_loss(theta):                            # theta(x_t, t, text) -> v
    return sum(flow.squared_error(theta(b.x_t, b.t, b.texts.complete), b.v).item() for b in held) / len(held)

show([ref.picture for ref in concept.references], [in_lines(ref.complete) for ref in concept.references],
     columns=len(concept.references), side=1.6)
print(f"{len(layers)} linear layers in the attentions of {depth} blocks, x_0 {list(data.x_0.shape)}")

# %% [markdown] tags=["slide", "no-references"]
# ## This robot, and no other
#
# ![The four references of [V] with their captions](last)
#
# Four references, and their texts.

# %% [markdown]
# ## What the base model has seen of this robot
#
# In pretraining every drawing had a text, and its parts had words: objects, colours, markings, something on
# the head, one eye or two. Of each object three things were **held out** (`MISSING` in
# [`world.py`](../../tinyflow/picturebook/world.py)): a colour, a background, and a marking together with
# something on the head. And each drawing had an **identity**: eleven numbers, such as the body's width or
# the slant of the checks, that no text names.
#
# So the base model can be told of this robot in words. How far do they get? A network reads the pictures
# (lesson 5): which parts they show, their `similarity` to the references (at most 1), and the share that
# shows *the individual*.

# %%
colour, background, parts = world.MISSING[word]
traits = robot.known_traits
print(f"held out of pretraining: {word}s that are {colour}, {word}s {world.BACKGROUNDS[background]}, "
      f"and {word}s with {' and '.join(parts)}")
print("our robot:", ", ".join(f"{head} {value}" for head, value in traits.items()))
assert (traits["marking"], traits["topper"]) == parts and traits["colour"] != colour

places = ["a small {} on the left in the snow", "a big {} on the right at night",
          "a small {} on the right on the beach", "a big {} on the left in the room"]
prompts = [place.format(f"[V] {word}") for place in places]
told = [place.format(f"orange {word} with blue checks, a hat and one eye") for place in places]

def pictures(theta, prompts, steps=12):
    text = pipe.encode_text(prompts, {"[V]": word})
    return list(pipe.decode_images(pipe.sample(text, list(range(len(prompts))), steps, theta=theta)))

def show_rows(rows, prompts, side=1.35):         # rows: name -> pictures, one for each prompt
    show([picture for row in rows.values() for picture in row], [in_lines(prompt) for prompt in prompts],
         list(rows), columns=len(prompts), side=side)

def apart(a, b):                                 # mean difference of two rows of pictures, in parts of white
    return sum(abs(p.astype(float) - q).mean() for p, q in zip(a, b)) / len(a) / 255

references = np.stack([ref.picture for ref in concept.references])
judge = Judge(Reader.shipped(), robot, references)       # a network that reads pictures (lesson 5)

def judged(rows):            # prints what the network sees; name -> shares of traits, similarity, individual
    print(f"{'share of pictures with':24s}" + "".join(f"{head:>9s}" for head in traits)
          + f"{'similarity':>13s}{'the individual':>16s}")
    table = {}
    for name, row in rows.items():
        reading = judge.reader(to_pixels(np.stack(row)))
        shares = judge.traits(reading).float().mean(0)
        table[name] = shares, judge.similarity(reading).mean(), judge.is_it(reading).float().mean()
        print(f"{name:24s}" + "".join(f"{share:9.2f}" for share in shares)
              + f"{table[name][1]:13.2f}{table[name][2]:16.2f}")
    return table

base_row = pictures(pipe.velocity, prompts)
told_row = pictures(pipe.velocity, told)
show_rows({"base model": told_row}, told, side=2.1)
seen = judged({"the references": references, "base model, [V]": base_row, "base model, in words": told_row})
in_words = seen["base model, in words"][1]
assert min(seen["the references"][1:]) > 0.9 and seen["base model, [V]"][1] < 0.3
assert seen["base model, in words"][0].min() > 0.7 and seen["base model, in words"][2] < 0.5
assert seen["the references"][1] - in_words > 0.1

# %% [markdown]
# Words bring back the **parts**, and even the combination that was held out: the model puts parts together.
# They do not bring back the **individual**. That is what [V] has to add. ([V] itself says nothing yet: it is
# read as one more `robot`.)
#
# ## 1 · How large is a change? (optional)
#
# Train all matrices of the attentions on these pictures, with the complete texts, for 40 steps, on a copy of
# the model. What we keep is the **change** $\Delta W=W_{after}-W$ of each matrix.

# %%
full = copy.deepcopy(model)
matrices = [full.get_submodule(name).weight.requires_grad_(True) for name in layers]
optimizer = torch.optim.Adam(matrices, lr=5e-4)
for k in range(40):
    batch = draws(k)
    text = batch.texts.complete
    loss = flow.squared_error(full(batch.x_t, batch.t, text.context, text.pooled), batch.v)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
changes = {name: full.get_submodule(name).weight.detach() - layer.weight for name, layer in layers.items()}

@torch.no_grad()
def with_changes(changes):
    # a copy of the model with these changes added to its weights, called as theta(x_t, t, text)
    copied = copy.deepcopy(model)
    for name, change in changes.items():
        copied.get_submodule(name).weight.add_(change)
    return lambda x_t, t, text: copied(x_t, t, text.context, text.pooled)

before, after = held_loss(pipe.velocity), held_loss(with_changes(changes))
still = [name for name, change in changes.items() if not change.any()]
print(f"{sum(change.numel() for change in changes.values()):,d} numbers trained; "
      f"loss {before:.3f} before, {after:.3f} after")
print("layers that did not move:", still)
assert after < 0.9 * before and still == [f"blocks.{depth - 1}.attention.text.to_q"]

# %% [markdown]
# (One layer did not move. In the last block the text stream ends, so nobody reads what its queries find.)
#
# How much of these changes is needed? The singular value decomposition writes a matrix as a sum of matrices
# of rank one, ordered by their size:
#
# $$\Delta W = U \operatorname{diag}(s)\, V^\top = \sum_i s_i\, u_i v_i^\top, \qquad s_1 \ge s_2 \ge \dots \ge 0.$$
#
# The first $r$ terms are the matrix of rank $r$ that comes nearest to $\Delta W$ (Eckart and Young, 1936).
# It is a product of a tall and a wide matrix, $B\ [out,r]$ and $A\ [r,in]$.
#
# ### Exercise 4.1 ★ · The nearest matrix of rank r

# %% tags=["exercise"]
def low_rank(change, r):
    # change [out, in] -> B [out, r], A [r, in] whose product B A is the nearest of rank r
    # BEGIN SOLUTION 4.1
    U, s, Vt = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r] * s[:r], Vt[:r]
    # END SOLUTION

# %% tags=["wrong"]
# says: each s_i is missing
def low_rank(change, r):
    U, s, Vt = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r], Vt[:r]

# %% tags=["wrong"]
# says: is there twice
def low_rank(change, r):
    U, s, Vt = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r] * s[:r], s[:r, None] * Vt[:r]

# %% tags=["wrong"]
# says: V^T already
def low_rank(change, r):
    U, s, V = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r] * s[:r], V[:, :r].T

# %% tags=["wrong"]
# says: B first
def low_rank(change, r):
    U, s, Vt = torch.linalg.svd(change, full_matrices=False)
    return Vt[:r], U[:, :r] * s[:r]

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.linalg.svd(change, full_matrices=False)` gives $V^\top$ already, with the $v_i$ as its **rows**.
# Each term needs its $s_i$ once, in either factor.
# </details>

# %% tags=["check"]
for sample in (torch.randn(7, 5, generator=seeded(0)), next(iter(changes.values()))):
    for n in (1, 3):
        B, A = several(low_rank(sample, n), ("B", "A"))
        wanted = (len(sample), n), (n, sample.shape[1])
        expect((A.shape, B.shape) != wanted, "return B first, then A.")
        fits = (B.shape, A.shape) == wanted
        expect(fits, "B is [out, r], and A is [r, in].")
        U, s, Vt = torch.linalg.svd(sample, full_matrices=False)
        U, Vt_n, nearest = U[:, :n], Vt[:n], U[:, :n] * s[:n] @ Vt[:n]
        rule_out(B @ A, {"each s_i is missing: a term is s_i u_i v_i^T.": U @ Vt_n,
                         "each s_i is there twice: it belongs into one factor only.":
                         U * s[:n].square() @ Vt_n,
                         "torch.linalg.svd returns V^T already: take its first rows.":
                         U * s[:n] @ Vt[:, :n].T})
        missing = (sample - B @ A).square().sum()
        expect(missing < 1.001 * s[n:].square().sum() + 1e-6, "there is a nearer matrix of this rank.")
        expect_close(B @ A, nearest, "B A")
print("4.1 right: nothing of the same rank comes nearer")

# %%
ranks = [0, 1, 2, 4, 8, 16]
factors = {name: low_rank(change, ranks[-1]) for name, change in changes.items()}

def of_rank(n):
    return {name: B[:, :n] @ A[:n] for name, (B, A) in factors.items()}

losses = [held_loss(with_changes(of_rank(n))) for n in ranks]
moved = [change for change in changes.values() if change.any()]
spectra = torch.stack([torch.linalg.svdvals(change) for change in moved])                  # [layers, D]
noise = torch.linalg.svdvals(torch.randn(moved[0].shape, generator=seeded(1)))[None]       # [1, D]
size, chance = ([(s[:, :n].square().sum() / s.square().sum()).item() for n in ranks]
                for s in (spectra, noise))
gain = [(before - loss) / (before - after) for loss in losses]

plt.figure(figsize=(5.6, 2.7), layout="constrained")
plt.plot(ranks, gain, "o-", color=CORAL, label="of the gain in the loss")
plt.plot(ranks, size, "s--", color=BLUE, label="of the squared norm")
plt.plot(ranks, chance, "^:", color=INK, label="of a random matrix's")
plt.gca().set(xlabel="rank r that is kept", ylim=(0, 1.05), xticks=ranks, title="what r terms bring back")
plt.legend()
plt.show()
print("rank               " + "".join(f"{n:8d}" for n in ranks))
print("held-out loss      " + "".join(f"{loss:8.3f}" for loss in losses))
print("share of the gain  " + "".join(f"{share:8.0%}" for share in gain))
print("share of the norm² " + "".join(f"{share:8.0%}" for share in size))
print("  a random matrix  " + "".join(f"{share:8.0%}" for share in chance))
assert all(g > n > 3 * c for g, n, c in zip(gain[1:5], size[1:5], chance[1:5])) and size[3] > 0.5

# %% [markdown] tags=["slide"]
# ## A useful change has few directions that matter
#
# Train all matrices of the attentions on four pictures, and keep $r$ terms of each change.
#
# ![The singular values of the trained change and of a random matrix, and how much the first r terms bring
# back](last)

# %% [markdown]
# Four terms of a change keep more than half of its squared norm, four of a random matrix a small part. The
# held-out loss comes back faster still.
#
# ## 2 · LoRA: train the two factors, and nothing else
#
# A useful change of a large matrix often has a low rank. Then one may train its two factors alone (Hu and
# others, 2021, arXiv 2106.09685). $W$ is frozen, and a layer computes
#
# $$y = W x + b + B\,(A\,x), \qquad A\ [r, in],\quad B\ [out, r].$$
#
# The brackets matter: $Ax$ has $r$ numbers, so this way costs $r\,(in+out)$ products a token, and $BA$ is
# never formed.
#
# ### Exercise 4.2 ★ · Count
#
# How many numbers has a set of adapters of rank $r$ for these layers? Layers need not be square.

# %% tags=["exercise"]
def count_lora(shapes, r):
    # shapes: a list of (out, in), the shapes of the W -> how many numbers A and B have in all
    # BEGIN SOLUTION 4.2
    return sum(r * (n_in + n_out) for n_out, n_in in shapes)
    # END SOLUTION

# %% tags=["wrong"]
# says: 128 to 512
def count_lora(shapes, r):
    return sum(2 * r * n_in for n_out, n_in in shapes)

# %% tags=["wrong"]
# says: never formed
def count_lora(shapes, r):
    return sum(n_out * n_in for n_out, n_in in shapes)

# %% tags=["wrong"]
# says: of one layer only
def count_lora(shapes, r):
    for n_out, n_in in shapes:
        return r * (n_in + n_out)

# %% tags=["check"]
shapes = [tuple(layer.weight.shape) for layer in layers.values()]
whole = sum(n_out * n_in for n_out, n_in in shapes)
count = count_lora([(512, 128)], 4)
expect(count is not None, "it returned None: is the return missing?")
expect(count not in (4 * 128, 4 * 512), "count both A and B.")
expect(count != 512 * 128, "BA is never formed: count the numbers of A and of B.")
expect(count == 4 * (512 + 128),
       "A has r · in numbers and B has out · r; in a layer of 128 to 512 these are not the same.")
for n in (1, 4, 16):
    ours, yours = sum(parameter.numel() for parameter in LoRA(model, n).parameters()), count_lora(shapes, n)
    expect(yours != ours / len(shapes), "that is the count of one layer only: add up over all shapes.")
    expect(yours == ours, f"for rank {n} the package has {ours} numbers, and you count {yours}.")
some = (1, 4, 16, D // 2)
print("4.2 right.  rank" + "".join(f"{n:10d}" for n in some))
print("         numbers" + "".join(f"{count_lora(shapes, n):10,d}" for n in some))
print("  parts of the W" + "".join(f"{count_lora(shapes, n) / whole:10.1%}" for n in some))
large = count_lora([(1536, 1536)], 4) / 1536 ** 2
print(f"rank 4 in a layer of Stable Diffusion 3.5 Medium, whose width is 1536: {large:.2%}")
assert count_lora(shapes, D // 2) == whole and large < 0.01

# %% [markdown]
# So in a square layer of width $D$ an adapter saves something as long as $r<D/2$.
#
# ### Exercise 4.3 ★ · A fresh set, and a layer with it
#
# The entries of $A$ are drawn evenly from $-1/\sqrt{in}$ to $1/\sqrt{in}$, and $B$ is zero. (Section 4 says
# why.) Draw with `torch.rand(shape, generator=generator)`, layer by layer; plain tensors are enough.

# %% tags=["exercise"]
def fresh(layers, r, generator):
    # layers: name -> nn.Linear. Returns name -> (A [r, in], B [out, r])
    adapters = {}
    for name, layer in layers.items():
        # BEGIN SOLUTION 4.3
        A = (2 * torch.rand((r, layer.in_features), generator=generator) - 1) * layer.in_features ** -0.5
        adapters[name] = A, torch.zeros(layer.out_features, r)
        # END SOLUTION
    return adapters

def adapted(layer, x, A, B):
    # x [..., in], a token a row -> W x + b + B (A x), [..., out]
    # BEGIN SOLUTION 4.3
    return layer(x) + x @ A.T @ B.T
    # END SOLUTION

# %% tags=["wrong"]
# says: both sides of zero
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = torch.rand((r, layer.in_features), generator=generator) * layer.in_features ** -0.5
        adapters[name] = A, torch.zeros(layer.out_features, r)
    return adapters

def adapted(layer, x, A, B):
    return layer(x) + x @ A.T @ B.T

# %% tags=["wrong"]
# says: the root
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = (2 * torch.rand((r, layer.in_features), generator=generator) - 1) / layer.in_features
        adapters[name] = A, torch.zeros(layer.out_features, r)
    return adapters

def adapted(layer, x, A, B):
    return layer(x) + x @ A.T @ B.T

# %% tags=["wrong"]
# says: B is zero at the start
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = (2 * torch.rand((r, layer.in_features), generator=generator) - 1) * layer.in_features ** -0.5
        adapters[name] = A, torch.rand((layer.out_features, r), generator=generator)
    return adapters

def adapted(layer, x, A, B):
    return layer(x) + x @ A.T @ B.T

# %% tags=["wrong"]
# says: not to its input
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = (2 * torch.rand((r, layer.in_features), generator=generator) - 1) * layer.in_features ** -0.5
        adapters[name] = A, torch.zeros(layer.out_features, r)
    return adapters

def adapted(layer, x, A, B):                     # the change goes into the layer
    return layer(x + x @ A.T @ B.T)

# %% tags=["wrong"]
# says: alone
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = (2 * torch.rand((r, layer.in_features), generator=generator) - 1) * layer.in_features ** -0.5
        adapters[name] = A, torch.zeros(layer.out_features, r)
    return adapters

def adapted(layer, x, A, B):
    return x @ A.T @ B.T

# %% tags=["check"]
def of_package(lora):                            # the package's set in your form
    return {name: (lora.A[name.replace(".", "/")], lora.B[name.replace(".", "/")])
            for name in layers if name.replace(".", "/") in lora.A}

yours, ours = fresh(layers, r, seeded(3)), of_package(LoRA(model, r, seeded(3)))
expect(isinstance(yours, dict) and set(yours) == set(ours), "there is one pair for each of the layers.")
for name in ours:
    A, B = several(yours[name], ("A", "B"))
    expect(A.shape[0] == r, "return A first, which is [r, in], then B.")
    expect(A.min() < 0, "A is drawn from both sides of zero: 2 rand - 1 lies between -1 and 1.")
    rule_out(A * A.shape[1] ** 0.5, {"the bound is one over the root of in.": ours[name][0].detach()})
    expect(not B.any(), "B is zero at the start.")
    expect_close(A, ours[name][0], f"A of {name}", tolerance=1e-6)
    expect_close(B, ours[name][1], f"B of {name}", tolerance=1e-6)
A, _ = fresh({"wide": nn.Linear(64, 256)}, r, seeded(3))["wide"]
expect(A.shape == (r, 64) and A.abs().max() > 1 / 16, "the bound is one over the root of in, and not of out.")
layer, A, B = next(iter(layers.values())), *(one.detach() for one in next(iter(ours.values())))
B = torch.randn(B.shape, generator=seeded(5))
x = torch.randn(3, 4, layer.in_features, generator=seeded(6))
y, change = adapted(layer, x, A, B), x @ (B @ A).T
expect(y is not None, "adapted returned None: is the return missing?")
rule_out(y, {"that is B (A x) alone: W x + b is missing.": change,
             "the change is added to the layer's output, not to its input.": layer(x + change)})
expect_close(y, x @ (layer.weight + B @ A).T + layer.bias, "adapted(layer, x, A, B)", 1e-3)
print("4.3 right: the same A and B as the package's, and W x + b + B A x is (W + B A) x + b")

# %% [markdown] tags=["slide"]
# ## LoRA: train the two factors
#
# $$y = W x + b + B\,(A\,x), \qquad A\ [r, in],\quad B\ [out, r]$$
#
# * $r\,(in + out)$ numbers a layer instead of $in \cdot out$; $BA$ is never formed.
# * A set is hooks over a frozen layer: attached, taken off, exchanged. Merging into $W$ rounds.

# %% [markdown]
# ## 3 · A set over the model: attached, taken off, merged
#
# How does $BAx$ come into a model that must not change? PyTorch can call a function of ours each time a
# layer has computed, a *forward hook*; what the hook returns takes the place of the output. `handle =
# layer.register_forward_hook(f)` calls `f(layer, inputs, output)`, with the inputs in a tuple, until
# `handle.remove()`.
#
# ```
#                   layer (frozen, shared)
#     x ----------------> W x + b ----------(+)----> y
#       \                                    ^
#        '------- hook of a set: B (A x) ----'
# ```
#
# ### Exercise 4.4 ★★★ · Attach and detach
#
# Within `with attached(adapters):` every layer computes with its adapter, and afterwards the model is what
# it was, **also when something inside has failed**. The output that a hook is given is $Wx+b$ already. A
# `mask` $[B,T,1]$ is multiplied with the change before it is added. A generator with
# `@contextlib.contextmanager` runs to its `yield`, then the lines in the `with`, then the rest.

# %% tags=["exercise"]
@contextlib.contextmanager
def attached(adapters, mask=None):
    # adapters: name -> (A, B), for layers[name]
    # BEGIN SOLUTION 4.4
    def hook(A, B):
        def add(layer, inputs, output):
            change = inputs[0] @ A.T @ B.T
            return output + (change if mask is None else mask * change)
        return add

    handles = [layers[name].register_forward_hook(hook(A, B)) for name, (A, B) in adapters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    # END SOLUTION

# %% tags=["wrong"]
# says: the last A and B
@contextlib.contextmanager
def attached(adapters, mask=None):               # all hooks share the last A and B
    handles = []
    for name, (A, B) in adapters.items():
        def add(layer, inputs, output):
            change = inputs[0] @ A.T @ B.T
            return output + (change if mask is None else mask * change)
        handles.append(layers[name].register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

# %% tags=["wrong"]
# says: try and finally
@contextlib.contextmanager
def attached(adapters, mask=None):               # an error inside leaves the hooks where they are
    def hook(A, B):
        def add(layer, inputs, output):
            change = inputs[0] @ A.T @ B.T
            return output + (change if mask is None else mask * change)
        return add

    handles = [layers[name].register_forward_hook(hook(A, B)) for name, (A, B) in adapters.items()]
    yield
    for handle in handles:
        handle.remove()

# %% tags=["wrong"]
# says: the change alone
@contextlib.contextmanager
def attached(adapters, mask=None):
    def hook(A, B):
        def add(layer, inputs, output):
            change = inputs[0] @ A.T @ B.T
            return change if mask is None else mask * change
        return add

    handles = [layers[name].register_forward_hook(hook(A, B)) for name, (A, B) in adapters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

# %% tags=["wrong"]
# says: the mask is not used
@contextlib.contextmanager
def attached(adapters, mask=None):
    def hook(A, B):
        def add(layer, inputs, output):
            return output + inputs[0] @ A.T @ B.T
        return add

    handles = [layers[name].register_forward_hook(hook(A, B)) for name, (A, B) in adapters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

# %% tags=["wrong"]
# says: no gradient
@contextlib.contextmanager
def attached(adapters, mask=None):
    def hook(A, B):
        @torch.no_grad()
        def add(layer, inputs, output):
            change = inputs[0] @ A.T @ B.T
            return output + (change if mask is None else mask * change)
        return add

    handles = [layers[name].register_forward_hook(hook(A, B)) for name, (A, B) in adapters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

# %% [markdown]
# <details><summary>Hint</summary>
#
# A function that is defined in a loop looks up the loop's `A` and `B` when it is called, and finds the last
# ones. Make it in a function of its own, `def hook(A, B): def add(...): ...; return add`.
# </details>

# %% tags=["check"]
def random_set(seed, where="everywhere"):        # a set of the package that changes something
    lora, generator = LoRA(model, r, seeded(seed), where), seeded(seed + 100)
    for B in lora.B.values():
        B.data.normal_(std=0.1, generator=generator)
    return lora.requires_grad_(False)

def with_set(adapters, name, x, mask=None):      # what the layer of this name makes of x with your set
    try:
        with attached(adapters, mask):
            return layers[name](x)
    except RecursionError:
        expect(False, "your hook calls the layer, which calls your hook. Its `output` is W x + b already.")
    except TypeError as error:
        expect("iterator" not in str(error), "`attached` has no yield: there, the lines inside `with` run.")
        raise

for layer in layers.values():                    # what an earlier try may have left behind
    layer._forward_hooks.clear()
weights = {name: layer.weight.clone() for name, layer in layers.items()}
batch, no_Y, lora = held[0], torch.zeros(depth, D), random_set(1)
see = batch.x_t, batch.t, batch.texts.base       # a text without [V]
alone, ours = pipe.velocity(*see), Branch(pipe, lora, ConceptEmbeddings(no_Y).requires_grad_(False))(*see)

names = list(layers)[:2]                         # first, two layers by themselves
pairs, x = {name: of_package(lora)[name] for name in names}, torch.randn(2, 3, D, generator=seeded(16))
W_x, change, last = layers[names[0]](x), *(x @ (B @ A).T for A, B in pairs.values())
y = with_set(pairs, names[0], x)
rule_out(y, {"the output has not changed: does the hook return the new output?": W_x,
             "the hook returned the change alone: return output + change.": change,
             "both layers got the last A and B: each hook needs its own (see the hint).": W_x + last})
expect_close(y, W_x + change, f"W x + b + B A x of {names[0]}", 1e-3)
mask = torch.tensor([1.0, 0.0, 1.0]).expand(2, 3)[..., None]
y = with_set(pairs, names[0], x, mask)
rule_out(y, {"the mask is not used.": W_x + change,
             "the mask belongs to the change, not to the whole output.": mask * (W_x + change)})
expect_close(y, W_x + mask * change, "W x + b + mask · B A x", 1e-3)
learned = {names[0]: tuple(tensor.clone().requires_grad_(True) for tensor in pairs[names[0]])}
expect(with_set(learned, names[0], x).requires_grad, "no gradient reaches A and B: no no_grad, no detach.")

with torch.no_grad():                            # then, the whole model
    with attached(of_package(lora)):
        mine = pipe.velocity(*see)
    expect_close(mine, ours, "v with your set attached", 1e-3)
    try:
        with attached(of_package(lora)):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    left = sum(len(layer._forward_hooks) for layer in layers.values())
    expect(left == 0, f"an error inside has left {left} hooks on the model: use try and finally.")
    written = [name for name, layer in layers.items() if not torch.equal(layer.weight, weights[name])]
    for name in written:
        layers[name].weight.copy_(weights[name])
    expect(not written, "you wrote to the base model's weights (they are restored). Change the output.")
    expect(torch.equal(pipe.velocity(*see), alone), "afterwards v is not what it was.")
assert tensor_hash(model.state_dict()) == untouched
print(f"4.4 right: v as the package computes it, to {(mine - ours).abs().max():.0e}; all hooks are gone; "
      f"the model's hash is {untouched[:12]}, before and after")

# %% [markdown]
# Lesson 6 has two sets over one base, a frozen one and one in training. The next cell uses two in turn
# and together. Then it adds $BA$ to $W$ for good (*merging*), and subtracts it again.

# %%
one, two = of_package(random_set(1)), of_package(random_set(2))

@torch.no_grad()
def v_with(*sets):
    with contextlib.ExitStack() as stack:
        for adapters in sets:
            stack.enter_context(attached(adapters))
        return pipe.velocity(*see)

first = v_with(one)
second = v_with(two)
assert torch.equal(v_with(one), first) and torch.equal(v_with(), alone) and not torch.equal(first, second)
name = next(iter(layers))
both = sum(B @ A for A, B in (one[name], two[name]))
print(f"set 1, set 2, set 1 again, none: each gives the same v every time. Both at once: rank "
      f"{torch.linalg.matrix_rank(both)} in {name}")
assert torch.linalg.matrix_rank(both) == 2 * r

W, (A, B) = layers[name].weight, one[name]
print(f"\n{'merge and unmerge in':22s}{'entries that come back':>24s}{'error of the merged change':>28s}")
table, kept_part = {}, {}
for dtype in (torch.float32, torch.bfloat16):
    W_there = W.to(dtype)                        # as a model in this dtype holds it
    merged = (W_there.float() + 0.2 * B @ A).to(dtype)
    back = (merged.float() - 0.2 * B @ A).to(dtype)
    error = merged.float() - W_there.float() - 0.2 * B @ A
    kept_part[dtype], table[dtype] = (back == W_there).float().mean(), error.norm() / (0.2 * B @ A).norm()
    print(f"{str(dtype):22s}{kept_part[dtype]:24.1%}{table[dtype]:28.1e}")
assert all(share < 1 for share in kept_part.values()) and table[torch.bfloat16] > 0.1 > table[torch.float32]

# %% [markdown]
# Merged weights cost nothing when pictures are drawn, and that is why programs merge. But each sum is
# rounded to the dtype's nearest number: some entries do not come back, also in fp32, and in bf16 the change
# itself arrives with a large error. So we never merge.
#
# ## 4 · Exactly one factor starts at zero
#
# Let $G=\partial L/\partial y$ be the gradient that arrives at the layer's output, $[N,out]$ for $N$ tokens
# $x\ [N,in]$.
#
# * One token: $y=Wx+b+Bh$ with $h=Ax$. So $\partial L/\partial B=g\,h^\top$, with $g$ the token's row of
# $G$.
# * $\partial L/\partial h=B^\top g$, and $h=Ax$, so $\partial L/\partial A=(B^\top g)\,x^\top$.
# * All tokens use the same $A$ and $B$: their gradients **add up**.
#
# $B$'s gradient contains $A$, and $A$'s gradient contains $B$. With $B=0$ the first step gives $A$ nothing
# and $B$ everything; after it $B\ne0$, and both learn.
#
# ### Exercise 4.5 ★★ · The two gradients

# %% tags=["exercise"]
def gradients(x, G, A, B):
    # x [N, in], G [N, out], A [r, in], B [out, r] -> dL/dA [r, in], dL/dB [out, r]. Without autograd, please.
    # BEGIN SOLUTION 4.5
    return (G @ B).T @ x, G.T @ (x @ A.T)
    # END SOLUTION

# %% tags=["wrong"]
# says: no mean
def gradients(x, G, A, B):                       # a mean over the tokens
    return (G @ B).T @ x / len(x), G.T @ (x @ A.T) / len(x)

# %% tags=["wrong"]
# says: the other factor is missing
def gradients(x, G, A, B):                       # treats the other factor as 1
    dW = G.T @ x
    return dW[:A.shape[0]], dW[:, :B.shape[1]]

# %% tags=["wrong"]
# says: dL/dA first
def gradients(x, G, A, B):
    return G.T @ (x @ A.T), (G @ B).T @ x

# %% tags=["wrong"]
# says: one token alone
def gradients(x, G, A, B):
    return (G @ B)[:1].T @ x[:1], G[:1].T @ (x @ A.T)[:1]

# %% [markdown]
# <details><summary>Hint</summary>
#
# With tokens as rows, $h$ is `x @ A.T` and $B^\top g$ is `G @ B`. A sum over tokens of (column times row) is
# one matrix product.
# </details>

# %% tags=["check"]
name = next(iter(layers))                        # a real layer in a real step, with a B that is not zero
A, B = (tensor.clone().requires_grad_(True) for tensor in one[name])
seen = {}

def remember(layer, inputs, output):
    output.retain_grad()
    seen["x"], seen["y"] = inputs[0], output
    return output

handle = layers[name].register_forward_hook(lambda layer, i, output: output + i[0] @ A.T @ B.T)
handle_too = layers[name].register_forward_hook(remember)
flow.squared_error(pipe.velocity(*see), batch.v).backward()
handle.remove()
handle_too.remove()
x, G = seen["x"].flatten(0, 1), seen["y"].grad.flatten(0, 1)
G, A_grad, B_grad = G / A.grad.abs().max(), A.grad / A.grad.abs().max(), B.grad / A.grad.abs().max()
dA, dB = several(gradients(x, G, A.detach(), B.detach()), ("dL/dA", "dL/dB"))
expect(dA.shape != B.shape, "return dL/dA first, then dL/dB.")
expect(dA.shape == A.shape and dB.shape == B.shape, "a gradient has the shape of what it belongs to.")
rule_out(dA, {"the other factor is missing: dL/dA contains B, and dL/dB contains A.": (G.T @ x)[:r]})
rule_out(dA * len(x), {"gradients of tokens add up: no mean.": A_grad})
rule_out(dA, {"that is the gradient of one token alone: add up over all.": (G[:1] @ B).T @ x[:1]})
expect_close(dA, A_grad, "dL/dA (divided by its largest entry)")
expect_close(dB, B_grad, "dL/dB (divided by the largest entry of dL/dA)")
dA, dB = gradients(x, G, A.detach(), 0 * B.detach())
print(f"4.5 right. With B = 0 the largest entry of dL/dA is {dA.abs().max():.0f}, "
      f"that of dL/dB {dB.abs().max():.1e}")
assert dA.abs().max() == 0 < dB.abs().max()

# %% [markdown]
# Four starts are possible. Before you run the cell, say what each will do. A random $B$ is drawn by the same
# rule as $A$: evenly within $\pm 1 / \sqrt r$, because $r$ is the number of its inputs.

# %%
starts = {"B zero (LoRA)": (1, 0), "A zero": (0, 1), "both zero": (0, 0), "none zero": (1, 1)}
RATE = 2e-3

def begin(start, rate):
    adapters, generator = fresh(layers, r, seeded(7)), seeded(8)
    for name, (A, B) in adapters.items():
        B = (2 * torch.rand(B.shape, generator=generator) - 1) * r ** -0.5
        use_A, use_B = starts[start]
        adapters[name] = (use_A * A).requires_grad_(True), (use_B * B).requires_grad_(True)
    return adapters, torch.optim.Adam([tensor for pair in adapters.values() for tensor in pair], lr=rate)

other = pipe.encode_text(["a big green tree on the right on the beach"])[[0] * len(batch.t)]

@torch.no_grad()
def moved():                                     # how far v of another text is from the base model's
    return ((pipe.velocity(*see[:2], other) - v_other).norm() / v_other.norm()).item()

def run(start, rate, steps=20):                  # -> losses, other text moved before training, the adapters
    adapters, optimizer = begin(start, rate)
    with attached(adapters):
        at_first, curve = moved(), []
        for k in range(steps):
            now = draws(k)
            loss = flow.squared_error(pipe.velocity(now.x_t, now.t, now.texts.complete), now.v)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
            if k < 3:
                for n, letter in enumerate("AB"):
                    alive = [bool(pair[n].grad.any()) for pair in adapters.values()]
                    shares.setdefault((start, letter), []).append(sum(alive) / len(alive))
    return curve, at_first, adapters

v_other, shares = pipe.velocity(*see[:2], other), {}
curves, at_first = {}, {}
for start in starts:
    curves[start], at_first[start], _ = run(start, RATE)
faster = "B zero, 4 times the rate"
curves[faster], _, _ = run("B zero (LoRA)", 4 * RATE)
parts = {name: [loss / still for loss, still in zip(curve, curves["both zero"])]
         for name, curve in curves.items()}      # of the base model's loss, for the same draws
late = {name: sum(part[-5:]) / 5 for name, part in parts.items()}

print("share of layers whose gradient is not zero, in steps 1, 2, 3;   how far another text's v is moved")
print(f"{'':16s}{'A':^21s}{'B':^33s}{'at the start':>14s}")
for start in starts:
    columns = ["".join(f"{share:7.0%}" for share in shares[start, letter][:3]) for letter in "AB"]
    print(f"{start:16s}{columns[0]}      {columns[1]}{at_first[start]:20.1%}")
print("\nmean loss of the last five steps, in parts of the base model's")
print("   ".join(f"{name} {part:.3f}" for name, part in late.items()))
plt.figure(figsize=(6, 2.6), layout="constrained")
for (name, part), colour, style in zip(parts.items(), (BLUE, GOLD, INK, CORAL, BLUE),
                                       ("-", "--", "-.", ":", "s-")):
    plt.plot(part, style, color=colour, ms=3, label=name)
plt.gca().set(xlabel="step", ylabel="loss, base model = 1", xticks=range(0, 20, 5))
plt.legend()
plt.show()
assert shares["B zero (LoRA)", "A"][0] == 0 < shares["B zero (LoRA)", "B"][0]
assert shares["A zero", "B"][0] == 0 < shares["A zero", "A"][0]
assert shares["both zero", "A"] == shares["both zero", "B"] == [0, 0, 0]
assert [share > 0.01 for share in at_first.values()] == [False, False, False, True]
assert all(at_first[start] == 0 for start in list(starts)[:3])
assert max(late["A zero"], late["none zero"]) + 0.01 < late["B zero (LoRA)"] < 0.99
assert abs(late["A zero"] - late["none zero"]) < 0.02 and late[faster] < late["B zero (LoRA)"] - 0.01

# %% [markdown] tags=["slide"]
# ## Exactly one factor starts at zero
#
# $$\frac{\partial L}{\partial A} = \sum (B^\top g)\,x^\top, \qquad
# \frac{\partial L}{\partial B} = \sum g\,(A x)^\top$$
#
# Both zero: nothing ever moves. One zero: the start is the base model. At one rate LoRA's choice is the
# slowest of the three that live; a larger rate makes up for it.
#
# ![Losses over the steps for starts with A, B, both or none at zero](last)

# %% [markdown]
# *Both zero* is dead for ever: it stays the base model. *None zero* learns, but look at the last column:
# before the first step it has already changed what the model says to a text about a tree, at random, and
# nothing in the loss asks to take it back. With **one** zero the start is the base model exactly.
#
# Which of the two is zero? That it is $B$ is a custom, and at this rate $B$ zero is the **slowest** of the
# three that live. A step of one factor counts as much as the other one is large, and the random $A$ (within
# $1/\sqrt{in}$) is smaller than the random $B$ (within $1/\sqrt r$). With four times the rate it is the
# fastest.
#
# ## 5 · alpha: what a file must say (optional)
#
# Most programs do not compute $W+BA$ but $W+\frac{\alpha}{r}\,BA$, with a number $\alpha$, `lora_alpha`,
# that stands in the file with the rank. The package's scale is 1. A reader that finds no alpha guesses.
#
# ### Exercise 4.6 ★★ · Out and in
#
# `export` makes a file's content such that another program computes just what we compute; it leaves the
# tensors as they are. `imported` takes the content of any such file, with any alpha, and returns a set of
# ours, for which the scale is 1.

# %% tags=["exercise"]
def export(adapters):
    # name -> (A, B) to {"tensors": name -> (A, B), "r": a number, "lora_alpha": a number}
    # BEGIN SOLUTION 4.6
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": rank}
    # END SOLUTION

def imported(file):
    # the content of a file -> name -> (A, B), for which the scale is 1
    # BEGIN SOLUTION 4.6
    scale = file["lora_alpha"] / file["r"]
    return {name: (A, scale * B) for name, (A, B) in file["tensors"].items()}
    # END SOLUTION

# %% tags=["wrong"]
# says: must be 1
def export(adapters):
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": 1}

def imported(file):
    scale = file["lora_alpha"] / file["r"]
    return {name: (A, scale * B) for name, (A, B) in file["tensors"].items()}

# %% tags=["wrong"]
# says: comes in twice
def export(adapters):
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": rank}

def imported(file):                              # the scale comes in twice
    scale = file["lora_alpha"] / file["r"]
    return {name: (scale * A, scale * B) for name, (A, B) in file["tensors"].items()}

# %% tags=["wrong"]
# says: is not used
def export(adapters):
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": rank}

def imported(file):
    return dict(file["tensors"])

# %% tags=["wrong"]
# says: upside down
def export(adapters):
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": rank}

def imported(file):
    scale = file["r"] / file["lora_alpha"]
    return {name: (A, scale * B) for name, (A, B) in file["tensors"].items()}

# %% tags=["check"]
def another_program(file):                       # name -> the change of W
    return {name: file["lora_alpha"] / file["r"] * B @ A for name, (A, B) in file["tensors"].items()}

for rank in (2, 8):
    pairs = fresh({name: layers[name] for name in list(layers)[:2]}, rank, seeded(9))
    pairs = {name: (A, torch.randn(B.shape, generator=seeded(10))) for name, (A, B) in pairs.items()}
    file = export(pairs)
    expect(isinstance(file, dict) and file.keys() == {"tensors", "r", "lora_alpha"},
           "export returns a dictionary with tensors, r and lora_alpha.")
    for name, (A, B) in pairs.items():
        expect(torch.equal(file["tensors"][name][1], B), "leave the tensors as they are.")
        expect(file["r"] == rank, f"the rank of these adapters is {rank}, and the file says {file['r']}.")
        expect(file["lora_alpha"] == rank, f"lora_alpha / r must be 1, and is {file['lora_alpha'] / rank}.")
        theirs = {"tensors": {name: (A, B)}, "r": rank, "lora_alpha": 3 * rank}
        back = imported(theirs)
        expect(isinstance(back, dict), "imported returns name -> (A, B): is the return missing?")
        change = back[name][1] @ back[name][0]
        rule_out(change, {"the file's alpha is not used.": B @ A,
                          "the scale comes in twice: multiply one of the two factors.": 9 * B @ A,
                          "the scale is upside down: it is alpha / r.": B @ A / 3})
        expect_close(change, another_program(theirs)[name], "B A of a file with alpha = 3 r")

with TemporaryDirectory() as folder:             # what the package writes
    # It exports nothing of the tiny model, which no other program has: so we say that it is another one.
    facts = {"rank": r, "class_word": word, "base": "sd3.5-medium"}
    Branch(pipe, random_set(1), ConceptEmbeddings(no_Y)).save(f"{folder}/concept.safetensors", facts)
    export_lora(f"{folder}/concept.safetensors", f"{folder}/lora.safetensors")
    with safe_open(f"{folder}/lora.safetensors", framework="pt") as written:
        says = json.loads(written.metadata()["lora_adapter_metadata"])
        names = sorted(written.keys())
mine = export(one)
expect((says["transformer.r"], says["transformer.lora_alpha"]) == (mine["r"], mine["lora_alpha"]),
       "the package's export says another rank or alpha.")
print(f"4.6 right. The package's file: r = {mine['r']}, lora_alpha = {mine['lora_alpha']}, "
      f"{len(names)} tensors, such as\n  {names[0]}")

# %% [markdown]
# What does a wrong alpha do? We train a set of rank 4 for sixty steps, and let another program read it with
# three alphas. The tensors are the same in all three files.

# %%
_, _, trained = run("B zero (LoRA)", 4 * RATE, steps=60)
trained = {name: (A.detach(), B.detach()) for name, (A, B) in trained.items()}

def read_with(alpha):                            # theta of a program that finds this alpha
    scaled = {name: (A, alpha / r * B) for name, (A, B) in trained.items()}

    def theta(x_t, t, text):
        with attached(scaled):
            return pipe.velocity(x_t, t, text)
    return theta

alphas = {f"alpha = {alpha}": read_with(alpha) for alpha in (r, 1, 3 * r)}
rows = {name: pictures(theta, prompts) for name, theta in alphas.items()}
show_rows(rows, prompts)

seen = judged({"base model": base_row} | rows)
losses = {name: held_loss(theta) for name, theta in alphas.items()}
for name, loss in losses.items():
    print(f"{name:12s} held-out loss {loss:.3f}; "
          f"the pictures are {apart(rows[name], base_row):.3f} from the base model's")
like = {name: found[1] for name, found in seen.items()}
weak, burnt = "alpha = 1", f"alpha = {3 * r}"
assert like[f"alpha = {r}"] > max(like[burnt] + 0.1, like[weak] + 0.3)
assert like[weak] < like["base model"] + 0.25
assert apart(rows[weak], base_row) < 0.5 * apart(rows[f"alpha = {r}"], base_row)
assert losses[burnt] > held_loss(pipe.velocity) > losses[weak] > losses[f"alpha = {r}"]

# %% [markdown] tags=["slide"]
# ## alpha: what a file must say
#
# $$W + \frac{\alpha}{r}\, B A$$
#
# The same tensors, read with three alphas. Nothing fails, and no program complains.
#
# ![Pictures drawn from the same tensors, read with three values of alpha](last)

# %% [markdown]
# No program complains. With alpha = 1 the change has a quarter of its size, and the
# pictures are nearly the base model's. With alpha = 12 it is three times too large: the similarity falls
# again, and the loss is above the base model's. If a LoRA looks weak or burnt in another program, look at
# alpha first.
#
# ## 6 · [V]: a word that is not in the dictionary
#
# The other place for a concept is its name. `[V]` is a *placeholder*. The tokenizer gives the encoder an
# ordinary word in its place, the **stand-in** (here the class word), and reports where it stands, the
# **slot**. So the encoder, and with it the pooled vector, reads `a small robot robot in the desert`. At the
# input of every block $l$ the token in the slot is then **replaced** by a learned vector $Y^l$ (Eq. 7):
#
# ```
#  encoder reads    a    small  robot  robot   in    the   desert     -> context, pooled
#  slots            0      0      1      0      0     0      0
#  into block 0     c      c     Y^0     c      c     c      c
#  out of block 0   c'     c'    (c')    c'     c'    c'     c'       (c') is thrown away
#  into block 1     c'     c'    Y^1     c'     c'    c'     c'       and so on
# ```
#
# `pipe.velocity(x_t, t, text, visit)` calls `visit(l, block, x, c, vec)` in place of each block, and takes
# what it returns, `x` and `c` after the block. $Y^l$ starts as the base model's own mean state of the class
# word at the input of block $l$. (The paper leaves open how the encoder reads [V] and how $Y^l$ starts.)
#
# ### Exercise 4.7 ★★ · The visit that writes Y

# %% tags=["exercise"]
def visit_with(Y, slots):
    # Y [depth, D], slots [B, T] bool: where [V] stands -> a visit for pipe.velocity. Do not write into c.
    def visit(l, block, x, c, vec):              # c [B, T, D]; returns block(x, ..., vec)
        # BEGIN SOLUTION 4.7
        return block(x, torch.where(slots[..., None], Y[l], c), vec)
        # END SOLUTION
    return visit

# %% tags=["wrong"]
# says: at every block
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):              # one embedding at the entrance
        return block(x, torch.where(slots[..., None], Y[0], c) if l == 0 else c, vec)
    return visit

# %% tags=["wrong"]
# says: before the block
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):              # after the block
        x, c = block(x, c, vec)
        return x, c if c is None else torch.where(slots[..., None], Y[l], c)
    return visit

# %% tags=["wrong"]
# says: it takes its place
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):              # added, not replaced
        return block(x, c + slots[..., None] * Y[l], vec)
    return visit

# %% tags=["wrong"]
# says: its own vector
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):
        return block(x, torch.where(slots[..., None], Y[0], c), vec)
    return visit

# %% tags=["wrong"]
# says: written into c
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):
        c[slots] = Y[l]
        return block(x, c, vec)
    return visit

# %% tags=["wrong"]
# says: every token
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):
        return block(x, Y[l].expand_as(c), vec)
    return visit

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.where(condition, a, b)` takes `a` where the condition holds. `slots[..., None]` is $[B,T,1]$, and
# `Y[l]` $[D]$ fits all of it.
# </details>

# %% tags=["check"]
start_Y = class_word_states(pipe, data, seeded(11))                         # [depth, D]
Y_test = start_Y + torch.randn(start_Y.shape, generator=seeded(12))
batch = held[0]
complete, base = batch.texts.complete, batch.texts.base
given = []

def probe(x, c, vec):                            # stands for a block, and keeps what it is given
    given.append(c.clone())
    return x, c

c_test = torch.randn(*complete.slots.shape, D, generator=seeded(13))
kept, slots, learned = c_test.clone(), complete.slots == 1, Y_test.clone().requires_grad_(True)
embeddings = ConceptEmbeddings(Y_test).requires_grad_(False)
for l in range(depth):
    returned = visit_with(Y_test, slots)(l, probe, None, c_test, None)
    expect(len(given) == l + 1, "your visit has to call block(x, ..., vec) once.")
    expect(returned is not None, "your visit returned None: return what the block returns.")
    changed = not torch.equal(c_test, kept)
    expect(not changed, "you have written into c, which others use, too: make a new tensor with torch.where.")
    rule_out(given[-1], {f"block {l} is given no Y: the token is replaced at every block, not at one."
           if l else "block 0 is given c as it was: Y^0 comes in before the block, not after it.":
                         kept,
                         "you add Y to the token: it takes its place.": kept + slots[..., None] * Y_test[l],
                         "every token is replaced: only those in a slot should be.":
                         Y_test[l].expand_as(kept)})
    if l > 0:
        rule_out(given[-1], {f"block {l} is given Y^0: each has its own vector.": embeddings(0, kept, slots)})
    expect_close(given[-1], embeddings(l, kept, slots), f"what block {l} is given")
visit_with(learned, slots)(0, probe, None, c_test, None)
expect(given[-1].requires_grad, "no gradient reaches Y: no no_grad, and no detach.")
with torch.no_grad():
    yours = pipe.velocity(batch.x_t, batch.t, complete, visit_with(Y_test, slots))
    ours = Branch(pipe, LoRA(model, r), embeddings)(batch.x_t, batch.t, complete)
expect_close(yours, ours, "v with Y in the slots", tolerance=1e-3)
print(f"4.7 right, at all {depth} blocks, and v is the package's to {(yours - ours).abs().max():.0e}")

# %% [markdown]
# What can a slot reach? (1) Write nonsense into every block's output **at the slot**: does $v$ notice? (2)
# Move one $Y^l$ by a tenth of its length: how far does $v$ move? (3) Move all of them: where in the picture?

# %%
@torch.no_grad()
def v_of(Y, nonsense=0.0):
    slots = complete.slots == 1
    inner = visit_with(Y, slots)

    def visit(l, block, x, c, vec):
        x, c = inner(l, block, x, c, vec)
        return x, c if c is None else torch.where(slots[..., None], c + nonsense, c)
    return pipe.velocity(batch.x_t, batch.t, complete, visit)

still = v_of(start_Y)
push = torch.randn(start_Y.shape, generator=seeded(14))
push = 0.1 * push / push.norm(dim=1, keepdim=True) * start_Y.norm(dim=1, keepdim=True)
only = torch.eye(depth)[:, :, None]                                         # [depth, depth, 1]
reach = [((v_of(start_Y + only[l] * push) - still).norm() / still.norm()).item() for l in range(depth)]
where = (v_of(start_Y + push) - still)[0].norm(dim=0)                       # [S, S]
nonsense = v_of(start_Y, 100.0)
print(f"(1) nonsense in the blocks' outputs at the slot moves v by {(nonsense - still).abs().max():.0f}")
print("(2) one Y^l moved: v moves by " + ", ".join(f"{share:.2%}" for share in reach))
assert torch.equal(nonsense, still) and min(reach) > 0.0003

x_0 = batch.x_t - flow.expand(batch.t, still) * batch.v                     # the references in this batch
which = (data.x_0 - x_0[0]).flatten(1).norm(dim=1).argmin()
masks = torch.tensor(robot.references(masked=True).references[which].masks[0] > 0)      # the robot's pixels
cells = nn.functional.max_pool2d(masks.float()[None], masks.shape[-1] // len(where))[0] > 0
share = where[cells].sum() / where.sum()
print(f"(3) the robot covers {cells.float().mean():.0%} of the places, and has {share:.0%} of the change")
assert share > 0.6 and cells.float().mean() < 0.4

figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.5), layout="constrained", width_ratios=[1.6, 1, 1])
axes[0].bar(range(depth), reach, color=BLUE)
axes[0].set(xlabel="block l", ylabel="relative change of v", title="a tenth of one $Y^l$")
axes[1].imshow(pipe.decode_images((batch.x_t - flow.expand(batch.t, still) * still)[:1])[0])
axes[1].set_title(f"the $x_0$ that v points at, t = {batch.t[0]:.2f}")
axes[2].imshow(where, cmap="magma")
axes[2].set_title("where v moves: all $Y^l$")
for axis in axes[1:]:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown] tags=["slide"]
# ## [V]: a slot, and a vector for every block
#
# ![The encoder reads the class word; at the input of every block the slot's state is replaced by the
# block's own Y](../diagrams/slots.svg)

# %% [markdown]
# (1) No: the next block's $Y^{l+1}$ takes its place. So $Y^l$ acts in block $l$ **alone**, and only as a key
# and a value that other tokens attend to. (2) Every block listens, the last one, too. (3) $v$ moves where
# the robot stands. The slot cannot reach the pooled vector and the encoder. And what a block has made of the
# token, from the words around it, is thrown away: **$Y^l$ is a word without a sentence.** Lesson 9 shows the
# price.
#
# ## 7 · Stage 1: train both
#
# $\theta$ is the base model with a set of adapters and with $Y$. You train two kinds of sets:
#
# | | layers | where a change is added |
# |---|---|---|
# | `everywhere` (the paper's; which layers, it does not say) | queries, keys, values, outputs of both streams | at every token |
# | `token`: *bound to the token* [V] | keys and values of the text stream | at the slots: `mask = slots[..., None]` |
#
# The loss is Eq. 3, with the *complete* text (the *base* text has no [V]), a mean over batch and all numbers
# of a sample:
#
# $$L_{CC} = \mathbb E\,\lVert v_\theta(x_t, t \mid y_{complete}) - v \rVert^2.$$
#
# (The command `learn` binds to [V]'s *phrase* instead, without $Y^l$; lesson 9 builds it.)
#
# ### Exercise 4.8 ★★ · The whole model of stage 1, and its loss
#
# `text.slots` is 1 where [V] stands, and 0 elsewhere. `slots == 1` makes the bools that `visit_with` wants,
# and a mask is for bound sets only.

# %% tags=["exercise"]
def make_theta(adapters, Y, bound):
    # adapters: name -> (A, B); Y [depth, D]; bound: whether the adapters act at [V] alone
    def theta(x_t, t, text):
        # BEGIN SOLUTION 4.8
        slots = text.slots == 1
        with attached(adapters, slots[..., None] if bound else None):
            return pipe.velocity(x_t, t, text, visit_with(Y, slots))
        # END SOLUTION
    return theta

def l_cc(theta, batch):
    # batch: x_t, t, v, texts -> a number
    # BEGIN SOLUTION 4.8
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
    # END SOLUTION

# %% tags=["wrong"]
# says: the mask is forgotten
def make_theta(adapters, Y, bound):
    def theta(x_t, t, text):
        with attached(adapters):
            return pipe.velocity(x_t, t, text, visit_with(Y, text.slots == 1))
    return theta

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
# says: for bound sets only
def make_theta(adapters, Y, bound):
    def theta(x_t, t, text):
        slots = text.slots == 1
        with attached(adapters, slots[..., None]):
            return pipe.velocity(x_t, t, text, visit_with(Y, slots))
    return theta

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
# says: Y is not used
def make_theta(adapters, Y, bound):
    def theta(x_t, t, text):
        slots = text.slots == 1
        with attached(adapters, slots[..., None] if bound else None):
            return pipe.velocity(x_t, t, text)
    return theta

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
# says: without [V]
def make_theta(adapters, Y, bound):
    def theta(x_t, t, text):
        slots = text.slots == 1
        with attached(adapters, slots[..., None] if bound else None):
            return pipe.velocity(x_t, t, text, visit_with(Y, slots))
    return theta

def l_cc(theta, batch):                          # the text without [V]
    return (theta(batch.x_t, batch.t, batch.texts.base) - batch.v).square().mean()

# %% tags=["wrong"]
# says: a sum
def make_theta(adapters, Y, bound):
    def theta(x_t, t, text):
        slots = text.slots == 1
        with attached(adapters, slots[..., None] if bound else None):
            return pipe.velocity(x_t, t, text, visit_with(Y, slots))
    return theta

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().sum(dim=(1, 2, 3)).mean()

# %% tags=["wrong"]
# says: no gradient
def make_theta(adapters, Y, bound):
    @torch.no_grad()
    def theta(x_t, t, text):
        slots = text.slots == 1
        with attached(adapters, slots[..., None] if bound else None):
            return pipe.velocity(x_t, t, text, visit_with(Y, slots))
    return theta

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["check"]
slots = complete.slots == 1
for kind in ("token", "everywhere"):
    lora, is_bound = random_set(4, kind), kind == "token"
    theta, branch = make_theta(of_package(lora), Y_test, is_bound), Branch(pipe, lora, embeddings)
    try:
        v = theta(batch.x_t, batch.t, complete)
    except RuntimeError as error:                # the image has another number of tokens than the mask
        expect(is_bound or "size of tensor" not in str(error), "the mask is for bound sets only.")
        raise
    expect(v is not None, "theta returned None: is the return missing?")
    with torch.no_grad():
        rule_out(v, {"no adapter acts: they have to be attached while theta runs.":
                     pipe.velocity(batch.x_t, batch.t, complete, visit_with(Y_test, slots))})
    if is_bound:
        with torch.no_grad(), attached(of_package(lora)):
            rule_out(v, {"the mask is forgotten: bound adapters act at [V] alone.":
                         pipe.velocity(batch.x_t, batch.t, complete, visit_with(Y_test, slots))})
    with torch.no_grad(), attached(of_package(lora), slots[..., None] if is_bound else None):
        rule_out(v, {"Y is not used: give velocity a visit.": pipe.velocity(batch.x_t, batch.t, complete)})
    for some in (complete, base, batch.texts.null):
        expect_close(theta(batch.x_t, batch.t, some), branch(batch.x_t, batch.t, some),
                     f"v of adapters that act {'at [V] alone' if is_bound else 'everywhere'}", tolerance=1e-3)
    yours = l_cc(theta, batch)
    ours, _ = methods.l_cc(methods.Thetas(pipe.velocity, None, branch), batch, 1.0)
    expect(isinstance(yours, torch.Tensor) and yours.shape == (), "l_cc returns one number, a tensor.")
    on_base = (branch(batch.x_t, batch.t, base) - batch.v).square().mean()
    rule_out(yours, {"that is the loss of the text without [V]: Eq. 3 takes the complete text.": on_base})
    expect(yours < 10 * ours, "you take a sum where a mean is asked for.")
    expect_close(yours, ours, "L_CC")
A, B = (tensor.clone().requires_grad_(True) for tensor in of_package(lora)[next(iter(layers))])
loss = l_cc(make_theta({next(iter(layers)): (A, B)}, Y_test, False), batch)
expect(loss.requires_grad, "no gradient reaches the adapters: no no_grad, no detach, no item().")
print("4.8 right: theta and L_CC are the package's, for both kinds of sets")

# %% [markdown]
# Now train. Each kind of adapters has the learning rate that suits it.

# %%
def learn(layers, bound, rate):
    adapters, Y = fresh(layers, r, seeded(15)), start_Y.clone().requires_grad_(True)
    trained = [tensor.requires_grad_(True) for pair in adapters.values() for tensor in pair]
    optimizer = torch.optim.AdamW([{"params": trained, "lr": rate},
                                   {"params": [Y], "lr": settings.embedding_learning_rate}], weight_decay=0.0)
    theta, log = make_theta(adapters, Y, bound), []
    for k in range(settings.steps):
        loss = l_cc(theta, draws(k))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*trained, Y], 1.0)
        optimizer.step()
        log.append(loss.item())
    return theta, log, sum(tensor.numel() for tensor in [*trained, Y])

at_V = {f"blocks.{l}.{name}": layer for l, block in enumerate(model.blocks)
        for name, layer in target_layers(block, "token").items()}
everywhere, log_everywhere, count_everywhere = learn(layers, bound=False, rate=settings.learning_rate)
bound, log_bound, count_bound = learn(at_V, bound=True, rate=1e-2)     # as the benchmark takes for it

package = Branch.fresh(pipe, start_Y, r, seeded(15))      # the package's loop, six steps
thetas, six = methods.Thetas(pipe.velocity, None, package), TrainConfig(steps=6)
rows = train_steps(methods.l_cc, thetas, data, six, 1, optimizer_for(package, six))
their_log = [row["loss"] for row in rows]
print("your first losses:  ", *(f"{loss:.4f}" for loss in log_everywhere[:6]))
print("the package's:      ", *(f"{loss:.4f}" for loss in their_log))
assert all(abs(a - b) < 0.01 * b for a, b in zip(log_everywhere, their_log))
assert tensor_hash(model.state_dict()) == untouched

models = {"base model": pipe.velocity, "everywhere": everywhere, "token": bound}
after_training = {name: held_loss(theta) for name, theta in models.items()}
print("held-out loss:       " + ", ".join(f"{name} {loss:.3f}" for name, loss in after_training.items()))
print(f"numbers trained:      {count_everywhere:,d} everywhere, {count_bound:,d} at the token")
assert max(after_training["everywhere"], after_training["token"]) < 0.85 * after_training["base model"]
assert count_bound < 0.3 * count_everywhere

def smooth(log, n=8):
    return [sum(log[max(0, k - n):k + 1]) / len(log[max(0, k - n):k + 1]) for k in range(len(log))]

plt.figure(figsize=(6, 2.4), layout="constrained")
for log, colour, style, label in ((log_everywhere, BLUE, "-", "everywhere"),
                                  (log_bound, CORAL, "--", "bound to the token")):
    plt.plot(log, style, color=colour, alpha=0.25, lw=0.8)
    plt.plot(smooth(log), style, color=colour, label=label)
plt.gca().set(xlabel="step", ylabel="$L_{CC}$", ylim=(0, None), title="the same draws for both")
plt.legend()
plt.show()

# %%
rows = {"base model": base_row}
rows |= {name: pictures(models[name], prompts) for name in ("everywhere", "token")}
show_rows(rows, prompts)
seen = judged({"the references": references} | rows)
for name in ("everywhere", "token"):
    assert seen["base model"][1] + 0.2 < seen[name][1] < in_words - 0.05 and seen[name][2] < 0.5
    drawn = judge.reader(to_pixels(np.stack(rows[name])))
    assert drawn.names("background") == ["snow", "night", "beach", "room"]
assert abs(seen["everywhere"][1] - seen["token"][1]) < 0.25

# %% [markdown] tags=["slide"]
# ## Stage 1, before and after
#
# $$L_{CC} = E\,\lVert v_\theta(x_t, t \mid y_{complete}) - v \rVert^2$$
#
# ![Pictures before and after stage 1, with the same texts and noise](last)
#
# *everywhere*: adapters at every token. *token*: at [V] alone.

# %% [markdown]
# Backgrounds are those of the texts, and parts of the robot come along, after eighty steps; words still bring
# more, and the individual is not there yet. Both sets have learned about as much; the
# bound one has about a quarter of the numbers.
#
# ## 8 · What happens to a text without [V]?
#
# Ask the same models for a robot **without** [V], and for other things. What do you expect?

# %%
plain = [prompt.replace("[V] ", "") for prompt in prompts[:2]]
plain += ["a big green tree on the right on the beach", "a small red house in the middle at night"]
rows = {name: pictures(theta, plain) for name, theta in models.items()}
show_rows(rows, plain)

with torch.no_grad():
    for name in ("everywhere", "token"):
        v_base, v = (models[which](batch.x_t, batch.t, base) for which in ("base model", name))
        print(f"{name:11s} v of the text without [V] moves by {(v - v_base).norm() / v_base.norm():.2%}; "
              f"the pictures by {apart(rows[name], rows['base model']):.3f}")
        assert torch.equal(v, v_base) == (name == "token")
assert apart(rows["token"], rows["base model"]) == 0
robots, others = (apart(rows["everywhere"][n:n + 2], rows["base model"][n:n + 2]) for n in (0, 2))
print(f"with adapters everywhere the two robots move by {robots:.3f}, the two others by {others:.3f}\n")
seen = judged({f"{name}, no [V]": row[:2] for name, row in rows.items()})
assert min(robots, others) > 0.005
assert seen["everywhere, no [V]"][0].mean() > seen["base model, no [V]"][0].mean() + 0.1

# %% [markdown] tags=["slide"]
# ## A text without [V]
#
# Adapters everywhere change the class word, and other words too. Bound ones cannot: without a slot their mask
# is zero.
#
# ![Pictures of texts without [V]: the base model, adapters everywhere, and bound adapters](last)

# %% [markdown]
# The set that acts everywhere has changed what a plain *robot* looks like, and the pictures of other things
# as well: $L_{CC}$ mentions neither. The bound set has changed **nothing**, and this is no measurement but
# an identity: without a slot the mask is zero at every token, and no token is replaced. It holds for any
# $A$, $B$ and $Y$. It has a price: on the benchmark's six concepts such a set has a fidelity (1:
# perfect) of .829 ± .009, and a LoRA .916 ± .003 ([main
# table](../../purecc_min/benchmark/report_pages/main.md)).
#
# ## 9 · Relatives: what else one can train (optional)
#
# Where may a concept live? The cell counts what some relatives would train on *this* model. The first four
# change no weight. Three of them put their vectors in front of the text encoder; $Y^l$ stands after it.

# %%
E, hidden = pipe.encoder.config.width, 128
neti = nn.Sequential(nn.Linear(32, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(),    # an example of its size
                     nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), nn.Linear(hidden, E))
relatives = [("textual inversion (2208.01618)", E, "one vector", "nothing"),
             ("P+, trained by XTI (2303.09522)", depth * E, "a vector for every layer that reads", "layer"),
             ("NeTI (2305.15391)", sum(parameter.numel() for parameter in neti.parameters()),
              "a network that makes the vector", "layer, time"),
             ("Y alone (--method embeddings)", depth * D, "a vector for every block", "layer"),
             ("bound to the token", count_bound, "Y, and adapters at the slot", "layer, time, pooled text"),
             ("stage 1 (the paper)", count_everywhere, "Y, and adapters everywhere", "the whole text"),
             ("the attentions' matrices", sum(layer.weight.numel() for layer in layers.values()), "", "")]
print(f"{'':33s}{'numbers':>8s}  {'what is trained':37s}{'what its change may differ with'}")
for name, count, what, on in relatives:
    print(f"{name:33s}{count:8,d}  {what:37s}{on}")
numbers = [count for _, count, _, _ in relatives]
assert numbers[0] < numbers[3] < count_bound < count_everywhere < numbers[-1] / 10

# %% [markdown]
# ## What you can now say
#
# * The base model can be told a robot's parts in words, and not the individual: that is what [V] has to add.
# * LoRA trains $r\,(in+out)$ numbers a layer. Exactly one of $A$ and $B$ starts at zero.
# * $Y^l$ replaces the token in the slot at the input of block $l$, acts in this block as a key and a value,
# and is then forgotten.
# * Adapters everywhere also change texts without [V]. Bound ones cannot, by construction.
#
# | you wrote | in the package |
# |---|---|
# | `fresh`, `adapted`, `attached`, `count_lora` | `purecc_min/lora.py`: `LoRA`, `LoRA.attached`, `LoRA.hook` |
# | `export`, `imported` | `purecc_min/commands/export.py`: `export_lora` |
# | `visit_with` | `purecc_min/embeddings.py`: `ConceptEmbeddings` |
# | `make_theta`, `l_cc` | `purecc_min/branch.py`: `Branch`, `velocity_with`; `purecc_min/methods.py`: `l_cc` |
#
# ## Two questions
#
# **1.** The set that is bound to the token adapts the text's keys and values, but not its queries. Why would
# an adapter on the queries at the slot do nothing at all?
# <details><summary>Answer</summary>
#
# A query decides what its **own** token takes from the others. What the token in the slot takes ends up in
# the block's output at the slot, which nobody reads: $Y^{l+1}$ replaces it.
# </details>
#
# **2.** You double $A$ and halve $B$. The product is the same, and so is every picture. Does training go on
# in the same way?
# <details><summary>Answer</summary>
#
# No. By exercise 4.5 the gradient of $B$ contains $A$ and doubles, and that of $A$ is halved. (Adam's steps
# keep their size, but $B$'s is multiplied by the doubled $A$.) So the size of $A$ at the start is
# one of LoRA's settings, though no file mentions it.
# </details>
#
# **Next:** lesson 5, on what goes wrong.

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
# The model knows robots. It does not know *this* robot, of which there are four pictures. Something has to be
# trained, and there are two places for it: the weights of the layers, and the word that names the robot.
# PureCC's stage 1 uses both: a LoRA, which is a small change of the weights, and one vector of [V] for every
# block. In this lesson you write both as plain functions, over a base model in which not one number is ever
# changed.
#
# **When you are through, you have written**
#
# 1. the best approximation of a matrix by a low rank, and LoRA with its start, its gradients and its count;
# 2. a set of adapters that is attached to a frozen model, taken off again, and written to a file for other
# programs;
# 3. the `visit` that puts $Y^l$ in the slot of [V] (Eq. 7), and the loss of stage 1 (Eq. 3);
#
# **and you can say** why exactly one of LoRA's two factors starts at zero, what `alpha` in a file means, what
# the slot of [V] can reach, and which adapters leave a text without [V] exactly as it was.
#
# | | |
# |---|---|
# | Time | 40 minutes of reading, 2 hours with the exercises; about a minute of computing on two CPU cores |
# | Needs | lessons 1 to 3; the singular value decomposition; forward hooks in PyTorch are explained |
# | Keep open | [`lora.py`](../../purecc_min/lora.py), [`embeddings.py`](../../purecc_min/embeddings.py) and [`branch.py`](../../purecc_min/branch.py), **after** you have tried |
# | Read after | Sec. 4.2 of the paper (arXiv 2603.07561), and lesson 6, on what is made of a trained LoRA |
#
# An exercise is a function whose body is blank, and the cell below it is its check. Hints are folded; the
# solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

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
import torch
from safetensors import safe_open
from torch import nn

from purecc_min.learning import train_steps
from purecc_min import methods                   # to compare with
from purecc_min.branch import Branch
from purecc_min.commands.export import export_lora
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode
from purecc_min.embeddings import ConceptEmbeddings, class_word_states, states_in_slots
from purecc_min.lora import LoRA, target_layers
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING
from purecc_min.train import TrainConfig, draw_batch, optimizer_for
from tinyflow import flow
from tinyflow.picturebook.model import load_tiny
from tinyflow.weights import tensor_hash
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, show

pipe = load_tiny()                               # the base model, frozen
model, D, depth = pipe.mmdit, pipe.mmdit.config.width, pipe.mmdit.config.depth
word = CONCEPTS[TUNING[0]].class_word
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

def in_lines(text):
    return text.replace(" on ", "\non ").replace(" in ", "\nin ").replace(" at ", "\nat ")

show([ref.picture for ref in concept.references], [in_lines(ref.complete) for ref in concept.references],
     columns=len(concept.references), side=1.6)
print(f"{len(layers)} linear layers in the attentions of {depth} blocks, x_0 {list(data.x_0.shape)}")

# %% [markdown]
# ## 1 · How large is a change?
#
# Let us begin without any trick: train all matrices of the attentions, both streams, on these pictures. The
# loss is that of lesson 1, Eq. 3, with the complete text $y_{complete}$, for example
# `a small [V] robot in the desert`. For now [V] is read as one more `robot`, its *stand-in*. It takes 40
# steps, on a copy of the model. What we keep is the **change** $\Delta W = W_{after} - W$ of each matrix.

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

held = [draws(k, stage=3) for k in range(6)]     # noise and times that no training in this lesson sees

@torch.no_grad()
def held_loss(theta):                            # theta(x_t, t, text) -> v
    return sum(flow.squared_error(theta(b.x_t, b.t, b.texts.complete), b.v).item() for b in held) / len(held)

def with_changes(changes):
    # a copy of the model with these changes added to its weights, called as theta(x_t, t, text)
    copied = copy.deepcopy(model)
    for name, change in changes.items():
        copied.get_submodule(name).weight.add_(change)
    return lambda x_t, t, text: copied(x_t, t, text.context, text.pooled)

before, after = held_loss(pipe.velocity), held_loss(with_changes(changes))
print(f"{sum(change.numel() for change in changes.values()):,d} numbers trained; "
      f"loss {before:.3f} before, {after:.3f} after")
print("layers that did not move:", [name for name, change in changes.items() if not change.any()])
assert after < 0.9 * before

# %% [markdown]
# (One layer did not move. In the last block the text stream ends, so nobody reads what its queries find.)
#
# How much of these changes is needed? A matrix is a sum of $\min(in, out)$ matrices of rank one, its singular
# value decomposition, in which the terms are ordered by their size:
#
# $$\Delta W = U \operatorname{diag}(s)\, V^\top = \sum_i s_i\, u_i v_i^\top, \qquad s_1 \ge s_2 \ge \dots \ge 0.$$
#
# Stop after $r$ terms, and you have the matrix of rank $r$ that comes nearest to $\Delta W$; what is missing
# has the squared norm $\sum_{i > r} s_i^2$ (Eckart and Young, 1936). A matrix of rank $r$ is a product of a
# tall and a wide one:
#
# ```
#     Delta W          B          A
#    [out, in]   ~  [out, r] · [r, in]
# ```
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
def low_rank(change, r):
    U, s, Vt = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r], Vt[:r]

# %% tags=["wrong"]
def low_rank(change, r):
    U, s, V = torch.linalg.svd(change, full_matrices=False)
    return U[:, :r] * s[:r], V[:, :r].T

# %% [markdown]
# <details><summary>Hint</summary>
#
# `U, s, Vt = torch.linalg.svd(change, full_matrices=False)` gives $V^\top$ already, with the $v_i$ as its
# **rows**. Each term needs its $s_i$ once, in either factor.
# </details>

# %% tags=["check"]
for sample in (torch.randn(7, 5, generator=seeded(0)), next(iter(changes.values()))):
    for n in (1, 3):
        B, A = low_rank(sample, n)
        fits = B.shape == (len(sample), n) and A.shape == (n, sample.shape[1])
        expect(fits, "B is [out, r], and A is [r, in].")
        U, s, V = torch.svd(sample)
        missing = (sample - B @ A).square().sum()
        expect(missing < 1.001 * s[n:].square().sum() + 1e-6,
               "there is a nearer matrix of this rank: is each s_i there once? And Vt is V^T already.")
        expect_close(B @ A, U[:, :n] * s[:n] @ V[:, :n].T, "B A")
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

figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.7), layout="constrained")
scaled = spectra / spectra.norm(dim=1, keepdim=True)
axes[0].semilogy(scaled.median(0).values, color=BLUE, label="the change (median layer)")
axes[0].semilogy(noise[0] / noise.norm(), color=GREY, label="a random matrix")
axes[0].set(xlabel="i", ylabel="$s_i$, in parts of the norm", ylim=(1e-3, 1), title="singular values")
axes[1].plot(ranks, gain, "o-", color=CORAL, label="of the gain in the loss")
axes[1].plot(ranks, size, "o-", color=BLUE, label="of the squared norm")
axes[1].plot(ranks, chance, "o-", color=GREY, label="of a random matrix's")
axes[1].set(xlabel="rank r that is kept", ylim=(0, 1.05), xticks=ranks, title="what r terms bring back")
for axis in axes:
    axis.legend()
plt.show()
print("rank               " + "".join(f"{n:8d}" for n in ranks))
print("held-out loss      " + "".join(f"{loss:8.3f}" for loss in losses))
print("share of the gain  " + "".join(f"{share:8.0%}" for share in gain))
print("share of the norm² " + "".join(f"{share:8.0%}" for share in size))
print("  a random matrix  " + "".join(f"{share:8.0%}" for share in chance))
assert ranks[3] == 4 and gain[3] > size[3] > 0.5 > 3 * chance[3]

# %% [markdown] tags=["slide"]
# ## A useful change has few directions that matter
#
# Train all matrices of the attentions on four pictures, and keep $r$ terms of each change.
#
# ![](last)

# %% [markdown]
# Four terms of a change keep more than half of its squared norm; four terms of a random matrix keep a small
# part. And what the change is **good for**, the loss on noise that was not trained on, comes back faster
# still. That is the low-rank idea: the pictures of one concept ask for few new directions in a matrix. It was
# observed here, and it is no theorem.

# %%
prompts = ["a small [V] {} on the left in the snow", "a big [V] {} on the right at night",
           "a small [V] {} on the right on the beach", "a big [V] {} on the left in the room"]
prompts = [prompt.format(word) for prompt in prompts]

def pictures(theta, prompts, steps=12):
    text = pipe.encode_text(prompts, {"[V]": word})
    return list(pipe.decode_images(pipe.sample(text, list(range(len(prompts))), steps, theta=theta)))

def show_rows(rows, prompts):                    # rows: name -> pictures, one for each prompt
    show([picture for row in rows.values() for picture in row], [in_lines(prompt) for prompt in prompts],
         list(rows), columns=len(prompts))

rows = {"base model": pipe.velocity, "all of the change": with_changes(changes),
        "rank 4 of it": with_changes(of_rank(4)), "rank 1 of it": with_changes(of_rank(1))}
show_rows({name: pictures(theta, prompts) for name, theta in rows.items()}, prompts)

# %% [markdown]
# ## 2 · LoRA: train the two factors, and nothing else
#
# If rank 4 is enough, one may train the two factors from the beginning (Hu and others, 2021, arXiv
# 2106.09685). $W$ is frozen, and a layer computes
#
# $$y = W x + b + B\,(A\,x), \qquad A\ [r, in],\quad B\ [out, r].$$
#
# The brackets matter: $A x$ has $r$ numbers, so the way through them costs $r\,(in + out)$ products a token,
# and $BA$ is never formed.
#
# ### Exercise 4.2 ★ · Count
#
# How many numbers has a set of adapters of rank $r$ for these layers? Derive it from the shapes above. It
# must also be right for layers that are not square.

# %% tags=["exercise"]
def count_lora(shapes, r):
    # shapes: a list of (out, in), the shapes of the W -> how many numbers A and B have in all
    # BEGIN SOLUTION 4.2
    return sum(r * (n_in + n_out) for n_out, n_in in shapes)
    # END SOLUTION

# %% tags=["wrong"]
def count_lora(shapes, r):
    return sum(2 * r * n_in for n_out, n_in in shapes)

# %% tags=["check"]
shapes = [tuple(layer.weight.shape) for layer in layers.values()]
expect(count_lora([(512, 128)], 4) == 4 * (512 + 128),
       "A has r · in numbers and B has out · r; in a layer of 128 to 512 these are not the same.")
for n in (1, 4, 16):
    ours = sum(parameter.numel() for parameter in LoRA(model, n).parameters())
    expect(count_lora(shapes, n) == ours,
           f"for rank {n} the package has {ours} numbers, and you count {count_lora(shapes, n)}.")
whole = sum(n_out * n_in for n_out, n_in in shapes)
some = (1, 4, 16, D // 2)
print("4.2 right.  rank" + "".join(f"{n:10d}" for n in some))
print("         numbers" + "".join(f"{count_lora(shapes, n):10,d}" for n in some))
print("  parts of the W" + "".join(f"{count_lora(shapes, n) / whole:10.1%}" for n in some))

# %% [markdown]
# A square layer of width $D$ has $D^2$ numbers and its adapter $2 r D$, so an adapter saves something as long
# as $r < D / 2$. At the width of Stable Diffusion 3.5 Medium, 1536, rank 4 is half a percent of a layer.
#
# ### Exercise 4.3 ★ · A fresh set, and a layer with it
#
# The package's start: the entries of $A$ are drawn evenly from $-1/\sqrt{in}$ to $1/\sqrt{in}$, and $B$ is
# zero. (Why so is the subject of section 4.) Draw with `torch.rand(shape, generator=generator)`, which lies
# between 0 and 1, layer by layer.

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
    # x [..., in] -> W x + b + B (A x), [..., out]
    # BEGIN SOLUTION 4.3
    return layer(x) + x @ A.T @ B.T
    # END SOLUTION

# %% tags=["wrong"]
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = torch.rand((r, layer.in_features), generator=generator) * layer.in_features ** -0.5
        adapters[name] = A, torch.zeros(layer.out_features, r)
    return adapters

def adapted(layer, x, A, B):
    return layer(x) + x @ A.T @ B.T

# %% tags=["wrong"]
def fresh(layers, r, generator):
    adapters = {}
    for name, layer in layers.items():
        A = (2 * torch.rand((r, layer.in_features), generator=generator) - 1) * layer.in_features ** -0.5
        adapters[name] = A, torch.zeros(layer.out_features, r)
    return adapters

def adapted(layer, x, A, B):                     # the change goes into the layer, not beside it
    return layer(x + x @ A.T @ B.T)

# %% tags=["check"]
def of_package(lora):                            # the package's set in your form
    return {name: (lora.A[name.replace(".", "/")], lora.B[name.replace(".", "/")])
            for name in layers if name.replace(".", "/") in lora.A}

yours, ours = fresh(layers, r, seeded(3)), of_package(LoRA(model, r, seeded(3)))
expect(set(yours) == set(ours), "there is one pair for each of the layers.")
for name in ours:
    expect(yours[name][0].min() < 0, "A is drawn from both sides of zero: 2 rand - 1 lies between -1 and 1.")
    for mine, theirs, letter in zip(yours[name], ours[name], "AB"):
        expect_close(mine, theirs, f"{letter} of {name}", tolerance=1e-6)
layer, A, B = next(iter(layers.values())), *(one.detach() for one in next(iter(ours.values())))
B = torch.randn(B.shape, generator=seeded(5))
x = torch.randn(3, 4, layer.in_features, generator=seeded(6))
merged = x @ (layer.weight + B @ A).T + layer.bias
expect_close(adapted(layer, x, A, B), merged, "adapted(layer, x, A, B), beside the merged matrix,", 1e-3)
print("4.3 right: the same A and B as the package's, and W x + b + B A x is (W + B A) x + b")

# %% [markdown] tags=["slide"]
# ## LoRA: train the two factors
#
# $$y = W x + b + B\,(A\,x), \qquad A\ [r, in],\quad B\ [out, r]$$
#
# * $r\,(in + out)$ numbers a layer instead of $in \cdot out$; $BA$ is never formed.
# * A set is hooks beside a frozen layer: attached, taken off, exchanged. Merging into $W$ rounds.

# %% [markdown]
# ## 3 · A set beside the model: attached, taken off, merged
#
# How does $B A x$ come into a model of which no line and no weight should change? PyTorch can call a function
# of ours each time a layer has computed, a *forward hook*; what the hook returns takes the place of the
# output.
#
# ```
#                    layer (frozen, shared)
#      x ----------------> W x + b ----------(+)----> y
#        \                                    ^
#         \      hook of set 1: B1 (A1 x) ----|         attached or not,
#          \     hook of set 2: B2 (A2 x) ----'         one set, the other, or both
# ```
#
# `handle = layer.register_forward_hook(f)` calls `f(layer, inputs, output)`, with the inputs in a tuple,
# until `handle.remove()` is called.
#
# ### Exercise 4.4 ★★★ · Attach and detach
#
# Within `with attached(adapters):` every layer computes with its adapter, and afterwards the model is what it
# was, **also when something inside has failed**. A hook is given the layer, its inputs and its finished
# output, which is $Wx + b$ already: it adds the change, and must not call the layer again. A `mask` $[B, T,
# 1]$, which section 7 uses, is multiplied with the change before it is added. A generator with
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

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A function that is defined in a loop does not keep the loop's `A` and `B`: it looks them up when it is
# called, and finds the last ones. Make it in a function of its own,
# `def hook(A, B): def add(...): ...; return add`.
# </details>
# <details><summary>Hint 2</summary>
#
# `try: yield` and `finally:` remove the hooks. `finally` runs after an error, too.
# </details>

# %% tags=["check"]
def random_set(seed, where="everywhere"):        # a set of the package that changes something
    lora, generator = LoRA(model, r, seeded(seed), where), seeded(seed + 100)
    for B in lora.B.values():
        B.data.normal_(std=0.1, generator=generator)
    return lora.requires_grad_(False)

for layer in layers.values():                    # what an earlier try may have left behind
    layer._forward_hooks.clear()
weights = {name: layer.weight.clone() for name, layer in layers.items()}
batch, no_Y = held[0], torch.zeros(depth, D)
see = batch.x_t, batch.t, batch.texts.base       # a text without [V]
with torch.no_grad():
    alone, lora = pipe.velocity(*see), random_set(1)
    try:
        with attached(of_package(lora)):
            mine = pipe.velocity(*see)
    except RecursionError:
        expect(False, "your hook calls the layer, which calls your hook. Its `output` is W x + b already.")
    ours = Branch(pipe, lora, ConceptEmbeddings(no_Y))(*see)
    expect(not torch.equal(mine, alone), "nothing has changed: does the hook return the new output?")
    expect_close(mine, ours, "v with your set attached (has every hook its own A and B?)", 1e-3)
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
    text_only = {name: pair for name, pair in of_package(lora).items() if ".attention.text.to_v" in name}
    with attached(text_only, mask=torch.zeros(*batch.texts.base.slots.shape, 1)):
        expect(torch.equal(pipe.velocity(*see), alone), "a mask of zeros should switch the change off.")
assert tensor_hash(model.state_dict()) == untouched
print(f"4.4 right: v as the package computes it, to {(mine - ours).abs().max():.0e}; all hooks are gone; "
      f"the model's hash is {untouched[:12]}, before and after")

# %% [markdown]
# So the frozen extractor $\theta_1$ and the trainable $\theta_2$ of stage 2 need no second model: they are
# two sets over one base. The next cell uses two sets in turn, and then both together. And it looks at the
# other way to use an adapter: add $BA$ to $W$ once and for all (*merge*), and subtract it again.

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
assert all(share < 1 for share in kept_part.values()) and table[torch.bfloat16] > 1000 * table[torch.float32]

# %% [markdown]
# Merged weights cost nothing when pictures are drawn, and that is why programs merge. But $W + BA - BA$ is
# not $W$: each sum is rounded to the dtype's nearest number. Also in fp32 some entries do not come back, and
# in bf16 the change itself arrives with an error that the last column shows. A model that has to be *exactly*
# what it was, as our base model has, is never merged. The package keeps its sets as hooks.
#
# ## 4 · Exactly one factor starts at zero
#
# Lesson 2 has, in its section 6, the sentence *"Exactly one factor of a product may begin at zero"*. $BA$ is
# such a product. Let $G = \partial L / \partial y$ be the gradient that arrives at the layer's output,
# $[N, out]$ for $N$ tokens $x\ [N, in]$. Step by step:
#
# * One token: $y = Wx + b + B h$ with $h = A x$. So $\partial L / \partial B = g\,h^\top$, with $g$ the
# token's row of $G$.
# * $\partial L / \partial h = B^\top g$, and $h = A x$, so $\partial L / \partial A = (B^\top g)\,x^\top$.
# * All tokens use the same $A$ and $B$: their gradients **add up**.
#
# $B$'s gradient contains $A$, and $A$'s gradient contains $B$. With $B = 0$ the first step gives $A$ nothing
# and $B$ everything; after it $B \ne 0$, and both learn.
#
# ### Exercise 4.5 ★★ · The two gradients

# %% tags=["exercise"]
def gradients(x, G, A, B):
    # x [N, in], G [N, out], A [r, in], B [out, r] -> dL/dA [r, in], dL/dB [out, r]. Without autograd, please.
    # BEGIN SOLUTION 4.5
    return (G @ B).T @ x, G.T @ (x @ A.T)
    # END SOLUTION

# %% tags=["wrong"]
def gradients(x, G, A, B):                       # a mean over the tokens
    return (G @ B).T @ x / len(x), G.T @ (x @ A.T) / len(x)

# %% tags=["wrong"]
def gradients(x, G, A, B):                       # treats the other factor as 1
    dW = G.T @ x
    return dW[:A.shape[0]], dW[:, :B.shape[1]]

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

with attached({name: (A, B)}):
    handle = layers[name].register_forward_hook(remember)
    flow.squared_error(pipe.velocity(*see), batch.v).backward()
    handle.remove()
x, G = seen["x"].flatten(0, 1), seen["y"].grad.flatten(0, 1)
dA, dB = gradients(x, G, A.detach(), B.detach())
expect(dA.shape == A.shape and dB.shape == B.shape, "a gradient has the shape of what it belongs to.")
for mine, theirs, letter in ((dA, A.grad, "A"), (dB, B.grad, "B")):
    expect(not torch.allclose(mine * len(x), theirs, rtol=1e-3), "gradients of tokens add up: no mean.")
    scale = theirs.abs().max()
    expect_close(mine / scale, theirs / scale, f"dL/d{letter} (divided by its largest entry)")
dA, dB = gradients(x, G, A.detach(), 0 * B.detach())
print(f"4.5 right. With B = 0 the largest entry of dL/dA is {dA.abs().max():.0f}, "
      f"that of dL/dB {dB.abs().max():.1e}")
assert dA.abs().max() == 0 < dB.abs().max()

# %% [markdown]
# Four starts are possible. Before you run the cell, say what each will do. A random $B$ is drawn by the same
# rule as $A$: evenly within $\pm 1 / \sqrt r$, because $r$ is the number of its inputs.

# %%
starts = {"B zero (LoRA)": (1, 0), "A zero": (0, 1), "both zero": (0, 0), "none zero": (1, 1)}

def begin(start):
    adapters, generator = fresh(layers, r, seeded(7)), seeded(8)
    for name, (A, B) in adapters.items():
        B = (2 * torch.rand(B.shape, generator=generator) - 1) * r ** -0.5
        use_A, use_B = starts[start]
        adapters[name] = (use_A * A).requires_grad_(True), (use_B * B).requires_grad_(True)
    return adapters, torch.optim.Adam([tensor for pair in adapters.values() for tensor in pair], lr=2e-3)

other = pipe.encode_text(["a big green tree on the right on the beach"])[[0] * len(batch.t)]

@torch.no_grad()
def moved():                                     # how far v of another text is from the base model's
    return ((pipe.velocity(*see[:2], other) - v_other).norm() / v_other.norm()).item()

v_other = pipe.velocity(*see[:2], other)
curves, shares, at_first = {}, {}, {}
for start in starts:
    adapters, optimizer = begin(start)
    with attached(adapters):
        at_first[start], curves[start] = moved(), []
        for k in range(20):
            now = draws(k)
            loss = flow.squared_error(pipe.velocity(now.x_t, now.t, now.texts.complete), now.v)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[start].append(loss.item())
            if k < 3:
                for n, letter in enumerate("AB"):
                    alive = [bool(pair[n].grad.any()) for pair in adapters.values()]
                    shares.setdefault((start, letter), []).append(sum(alive) / len(alive))

print("share of layers whose gradient is not zero, in steps 1, 2, 3;   how far another text's v is moved")
print(f"{'':16s}{'A':^21s}{'B':^33s}{'at the start':>14s}")
for start in starts:
    columns = ["".join(f"{share:7.0%}" for share in shares[start, letter]) for letter in "AB"]
    print(f"{start:16s}{columns[0]}      {columns[1]}{at_first[start]:20.1%}")
plt.figure(figsize=(6, 2.6), layout="constrained")
for start, colour, style in zip(starts, (BLUE, GOLD, INK, CORAL), ("-", "--", "-", "-")):
    parts = [loss / still for loss, still in zip(curves[start], curves["both zero"])]
    plt.plot(parts, style, color=colour, label=start)
plt.gca().set(xlabel="step", ylabel="loss, in parts of the base model's", title="the same draws for all")
plt.legend()
plt.show()
assert shares["B zero (LoRA)", "A"][0] == 0 < shares["B zero (LoRA)", "B"][0]
assert shares["A zero", "B"][0] == 0 < shares["A zero", "A"][0]
assert shares["both zero", "A"] == shares["both zero", "B"] == [0, 0, 0]
assert [share > 0.01 for share in at_first.values()] == [False, False, False, True]
assert all(at_first[start] == 0 for start in list(starts)[:3])
assert all(sum(curves[start][-5:]) < sum(curves["both zero"][-5:]) for start in starts
           if start != "both zero")
assert sum(curves["none zero"][-5:]) < 1.2 * sum(curves["B zero (LoRA)"][-5:])
assert sum(curves["A zero"][:10]) < sum(curves["B zero (LoRA)"][:10])

# %% [markdown] tags=["slide"]
# ## Exactly one factor starts at zero
#
# $$\frac{\partial L}{\partial A} = \sum (B^\top g)\,x^\top, \qquad
# \frac{\partial L}{\partial B} = \sum g\,(A x)^\top$$
#
# ![](last)

# %% [markdown]
# *Both zero* is dead for ever: it stays the base model. *None zero* learns this robot just as well, but look
# at the last column: before the first step it has already changed what the model says to a text about a tree.
# That change is random, and nothing in the loss asks to take it back. With **one** zero the start is the base
# model exactly.
#
# Which of the two is zero is a custom; LoRA's is $B$. The other choice is faster at first, because it keeps
# the larger random factor ($1/\sqrt r$ against $1/\sqrt{in}$), and a step of one factor counts as much as the
# other is large. And why is no share 100 %? It is the layer from section 1, the text's queries of the last
# block: an adapter on it never learns anything.
#
# ## 5 · alpha: what a file must say
#
# Most programs do not compute $W + BA$ but
#
# $$W + \frac{\alpha}{r}\, B A,$$
#
# with a number $\alpha$, `lora_alpha`, that stands in the file beside the rank. (The idea is that after a
# change of $r$ the learning rate can stay.) The package has no alpha: its scale is 1. The files of others
# have one, and a reader that does not find it guesses. So writing the right tensors is half of the work.
#
# ### Exercise 4.6 ★★ · Out and in
#
# `export` makes a file's content such that another program computes just what we compute; it says so in
# `lora_alpha` and leaves the tensors as they are. `imported` takes the content of any such file, with any
# alpha, and returns a set of ours, for which the scale is 1.

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
def export(adapters):
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": 1}

def imported(file):
    scale = file["lora_alpha"] / file["r"]
    return {name: (A, scale * B) for name, (A, B) in file["tensors"].items()}

# %% tags=["wrong"]
def export(adapters):
    rank = len(next(iter(adapters.values()))[0])
    return {"tensors": dict(adapters), "r": rank, "lora_alpha": rank}

def imported(file):                              # the scale comes in twice
    scale = file["lora_alpha"] / file["r"]
    return {name: (scale * A, scale * B) for name, (A, B) in file["tensors"].items()}

# %% tags=["check"]
def another_program(file):                       # name -> the change of W
    return {name: file["lora_alpha"] / file["r"] * B @ A for name, (A, B) in file["tensors"].items()}

for rank in (2, 8):
    pairs = fresh(layers, rank, seeded(9))
    pairs = {name: (A, torch.randn(B.shape, generator=seeded(10))) for name, (A, B) in pairs.items()}
    file = export(pairs)
    for name, (A, B) in pairs.items():
        expect(file["tensors"][name][1] is B or torch.equal(file["tensors"][name][1], B),
               "leave the tensors as they are; lora_alpha can say it.")
        expect(file["r"] == rank, f"the rank of these adapters is {rank}, and the file says {file['r']}.")
        expect_close(another_program(file)[name], B @ A, f"what another program adds to {name}")
        theirs = {"tensors": {name: (A, B)}, "r": rank, "lora_alpha": 3 * rank}
        A_in, B_in = imported(theirs)[name]
        expect_close(B_in @ A_in, another_program(theirs)[name], "B A of a file with alpha = 3 r")

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
# What does a wrong alpha do? We take a set that works, rank 4 of section 1's change, and let the other
# program read it with three different alphas. The tensors are the same in all three files.

# %%
trained = {name: (A[:r], B[:, :r]) for name, (B, A) in factors.items()}
drawn = {}
for alpha in (r, 1, 3 * r):
    file = export(trained) | {"lora_alpha": alpha}
    drawn[alpha] = pictures(with_changes(another_program(file)), prompts)
show_rows({f"alpha = {alpha}": row for alpha, row in drawn.items()}, prompts)

def apart(a, b):                                 # mean difference of two rows of pictures, in parts of white
    return sum(abs(p.astype(float) - q).mean() for p, q in zip(a, b)) / len(a) / 255

base_row = pictures(pipe.velocity, prompts)
print(f"from the right pictures: alpha = 1 {apart(drawn[1], drawn[r]):.3f}, alpha = {3 * r} "
      f"{apart(drawn[3 * r], drawn[r]):.3f}, the base model {apart(base_row, drawn[r]):.3f}")
print(f"from the base model's:   alpha = 1 {apart(drawn[1], base_row):.3f}")
assert apart(drawn[1], base_row) < apart(drawn[r], base_row) and apart(drawn[3 * r], drawn[r]) > 0.005

# %% [markdown] tags=["slide"]
# ## alpha: what a file must say
#
# $$W + \frac{\alpha}{r}\, B A$$
#
# The same tensors, read with three alphas.
#
# ![](last)

# %% [markdown]
# Nothing fails, and no program complains. With alpha = 1 at rank 4 the change has a quarter of its size, and
# the pictures are nearly the base model's; with alpha = 3 r they are overdone. If a LoRA looks weak or burnt
# in another program, look at alpha first.
#
# ## 6 · [V]: a word that is not in the dictionary
#
# The other place for a concept is its name. `[V]` is a *placeholder*. The tokenizer gives the encoder an
# ordinary word in its place, the **stand-in** (here the class word), and reports where it stands, the
# **slot**. So the encoder, and with it the pooled vector, reads `a small robot robot in the desert`. At the
# input of every block $l$ the token in the slot is then **replaced** by a learned vector $Y^l$ (Eq. 7):
#
# ```
#  the text         a    small   [V]   robot   in    the   desert  <end> ...
#  encoder reads    a    small  robot  robot   in    the   desert  <end> ...      -> context, pooled
#  slots            0      0      1      0      0     0      0       0
#
#  into block 0     c      c     Y^0     c      c     c      c       c
#  out of block 0   c'     c'    (c')    c'     c'    c'     c'      c'           (c') is thrown away
#  into block 1     c'     c'    Y^1     c'     c'    c'     c'      c'           ... and so on for all blocks
# ```
#
# `pipe.velocity(x_t, t, text, visit)` calls `visit(l, block, x, c, vec)` in place of each block, and takes
# what it returns, `x` and `c` after the block. $Y^l$ starts as the base model's own mean state of the class
# word at the input of block $l$. (How the encoder reads [V] and how $Y^l$ starts is our reading; the paper
# leaves it open.)
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
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):              # one embedding at the entrance
        return block(x, torch.where(slots[..., None], Y[0], c) if l == 0 else c, vec)
    return visit

# %% tags=["wrong"]
def visit_with(Y, slots):
    def visit(l, block, x, c, vec):              # behind the block
        x, c = block(x, c, vec)
        return x, c if c is None else torch.where(slots[..., None], Y[l], c)
    return visit

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.where(condition, a, b)` takes `a` where the condition holds. The condition needs a last axis:
# `slots[..., None]` is $[B, T, 1]$, and `Y[l]` $[D]$ fits all of it.
# </details>

# %% tags=["check"]
start_Y = class_word_states(pipe, data, seeded(11))                         # [depth, D]
Y_test = start_Y + torch.randn(start_Y.shape, generator=seeded(12))
batch = held[0]
complete, base = batch.texts.complete, batch.texts.base
recorded = []

def probe(x, c, vec):                            # stands for a block, and keeps what it is given
    recorded.append(c)
    return x, c

c_test = torch.randn(*complete.slots.shape, D, generator=seeded(13))
kept = c_test.clone()
embeddings = ConceptEmbeddings(Y_test).requires_grad_(False)
for l in range(depth):
    visit_with(Y_test, complete.slots == 1)(l, probe, None, c_test, None)
    expect(len(recorded) == l + 1, "your visit has to call block(x, ..., vec) once.")
    expect_close(recorded[-1], embeddings(l, c_test, complete.slots == 1), f"what block {l} is given")
expect(torch.equal(c_test, kept), "you have written into c, which other people use: make a new tensor.")
with torch.no_grad():
    yours = pipe.velocity(batch.x_t, batch.t, complete, visit_with(Y_test, complete.slots == 1))
    ours = Branch(pipe, LoRA(model, r), embeddings)(batch.x_t, batch.t, complete)
expect_close(yours, ours, "v with Y in the slots", tolerance=1e-3)
print(f"4.7 right, at all {depth} blocks, and v is the package's to {(yours - ours).abs().max():.0e}")

# %% [markdown]
# What can a slot reach? Three experiments on one picture. (1) Write nonsense into every block's output **at
# the slot**: does $v$ notice? (2) Move one $Y^l$ by a tenth of its length and leave the others: how far does
# $v$ move? (3) Move all of them: where in the picture?

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
assert torch.equal(nonsense, still) and min(reach) > 0
strongest = where.flatten().sort(descending=True).values[:where.numel() // 4]
print(f"(3) the strongest quarter of the places has {strongest.sum() / where.sum():.0%} of the change")
assert strongest.sum() > 0.4 * where.sum()

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
# ```
# encoder reads    a    small  robot  robot   in    the   desert
# into block 0     c      c     Y^0     c      c     c      c
# into block 1     c'     c'    Y^1     c'     c'    c'     c'
# ```
#
# ![](last)

# %% [markdown]
# (1) Nothing, exactly: the next block's $Y^{l+1}$ takes its place. So $Y^l$ acts in block $l$ **alone**, and
# only as a key and a value that other tokens attend to; from there it goes on in their states. (2) Every
# block listens, the last one, too. (3) $v$ moves where the robot stands, presumably because the image tokens
# there attend to the slot. What the slot cannot reach is the pooled vector and the encoder: they have read
# the stand-in.
#
# ## 7 · Stage 1: train both
#
# $\theta$ is the base model with a set of adapters and with $Y$. This lesson trains two kinds of sets:
#
# | | layers | where a change is added |
# |---|---|---|
# | `everywhere` (the paper's) | queries, keys, values and outputs of both streams | at every token |
# | `token`: *bound to the token* [V] (ours) | keys and values of the text stream | at the slots: `mask = slots[..., None]` |
#
# and the loss is Eq. 3 with the complete text:
# $\;L_{CC} = \mathbb E\,\lVert v_\theta(x_t, t \mid y_{complete}) - v \rVert^2$, a mean over the batch and
# all numbers of a sample.
#
# (The package has a third kind, `phrase`, and `learn --method bound` takes that one: the same layers as
# `token`, at every token from [V] to the end of its clause; the word at [V] is kept, and there is no $Y^l$.
# The reason is that a causal text encoder puts what is said of a thing into the words after it. Wherever this
# lesson speaks of a bound set, it is bound to the token.)
#
# ### Exercise 4.8 ★★ · The whole model of stage 1, and its loss
#
# `text.slots` holds whole numbers: 1 where [V] stands, 0 elsewhere. `slots == 1` makes the bools that
# `visit_with` wants, and a mask is for bound sets only. Your `attached` and `visit_with` do the rest.

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
def make_theta(adapters, Y, bound):              # the mask is forgotten
    def theta(x_t, t, text):
        with attached(adapters):
            return pipe.velocity(x_t, t, text, visit_with(Y, text.slots == 1))
    return theta

def l_cc(theta, batch):
    return (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()

# %% tags=["wrong"]
def make_theta(adapters, Y, bound):
    def theta(x_t, t, text):
        slots = text.slots == 1
        with attached(adapters, slots[..., None] if bound else None):
            return pipe.velocity(x_t, t, text, visit_with(Y, slots))
    return theta

def l_cc(theta, batch):                          # the text without [V]
    return (theta(batch.x_t, batch.t, batch.texts.base) - batch.v).square().mean()

# %% tags=["check"]
with torch.no_grad():
    for kind in ("everywhere", "token"):
        branch = Branch(pipe, random_set(4, kind), ConceptEmbeddings(Y_test))
        mine = make_theta(of_package(branch.lora), Y_test, bound=kind == "token")
        for some in (complete, base, batch.texts.null):
            expect_close(mine(batch.x_t, batch.t, some), branch(batch.x_t, batch.t, some),
                         f"v of adapters that act {'everywhere' if kind == 'everywhere' else 'at [V] alone'}",
                         tolerance=1e-3)
        ours, _ = methods.l_cc(methods.Thetas(pipe.velocity, None, branch), batch, 1.0)
        expect_close(l_cc(mine, batch), ours, "L_CC (with the complete text)")
print("4.8 right: theta and L_CC are the package's, for both kinds of sets")

# %% [markdown]
# Now train. `learn` below is all there is to it: AdamW, $Y$ with a larger learning rate, and gradients cut to
# length 1.

# %%
def learn(layers, bound, steps=settings.steps):
    adapters, Y = fresh(layers, r, seeded(15)), start_Y.clone().requires_grad_(True)
    trained = [tensor.requires_grad_(True) for pair in adapters.values() for tensor in pair]
    optimizer = torch.optim.AdamW([{"params": trained, "lr": settings.learning_rate},
                                   {"params": [Y], "lr": settings.embedding_learning_rate}], weight_decay=0.0)
    theta, log = make_theta(adapters, Y, bound), []
    for k in range(steps):
        loss = l_cc(theta, draws(k))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*trained, Y], 1.0)
        optimizer.step()
        log.append(loss.item())
    return theta, log, sum(tensor.numel() for tensor in [*trained, Y])

at_V = {f"blocks.{l}.{name}": layer for l, block in enumerate(model.blocks)
        for name, layer in target_layers(block, "token").items()}
everywhere, log_everywhere, count_everywhere = learn(layers, bound=False)
bound, log_bound, count_bound = learn(at_V, bound=True)

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
assert after_training["everywhere"] < after_training["token"] < after_training["base model"]

def smooth(log, n=8):
    return [sum(log[max(0, k - n):k + 1]) / len(log[max(0, k - n):k + 1]) for k in range(len(log))]

plt.figure(figsize=(6, 2.4), layout="constrained")
for log, colour, label in ((log_everywhere, BLUE, "everywhere"), (log_bound, CORAL, "bound to the token")):
    plt.plot(log, color=colour, alpha=0.25, lw=0.8)
    plt.plot(smooth(log), color=colour, label=label)
plt.gca().set(xlabel="step", ylabel="$L_{CC}$", ylim=(0, None), title="the same draws for both")
plt.legend()
plt.show()

# %%
rows = {"before": pipe.velocity, "after: everywhere": everywhere, "after: token": bound}
show_rows({name: pictures(theta, prompts) for name, theta in rows.items()}, prompts)

# %% [markdown] tags=["slide"]
# ## Stage 1, before and after
#
# $$L_{CC} = E\,\lVert v_\theta(x_t, t \mid y_{complete}) - v \rVert^2$$
#
# ![](last)

# %% [markdown]
# Backgrounds and places are others than the references', and the robot's colours and pattern come along,
# after eighty steps; its single eye and what it wears do so only in part. The set that is bound to the token
# has learned less: its robots keep two eyes, and some of their own colours. It has far fewer numbers, and it
# can only speak through the keys and values of one token.
#
# ## 8 · What happens to a text without [V]?
#
# Now ask the same models for a robot **without** [V], and for two other pictures. What do you expect of each?

# %%
plain = [prompt.replace("[V] ", "") for prompt in prompts[:2]]
plain += ["a big green tree on the right on the beach", "a small red house in the middle at night"]
rows = {name: pictures(theta, plain) for name, theta in rows.items()}
show_rows(rows, plain)

with torch.no_grad():
    for name, theta in (("everywhere", everywhere), ("token", bound)):
        v_base = pipe.velocity(batch.x_t, batch.t, base)
        moved = (theta(batch.x_t, batch.t, base) - v_base).norm() / v_base.norm()
        print(f"{name:11s} v of the text without [V] moves by {moved:.2%}; "
              f"the pictures by {apart(rows['after: ' + name], rows['before']):.3f}")
        assert torch.equal(theta(batch.x_t, batch.t, base), v_base) == (name == "token")
assert apart(rows["after: token"], rows["before"]) == 0
robots, others = (apart(rows["after: everywhere"][n:n + 2], rows["before"][n:n + 2]) for n in (0, 2))
print(f"with adapters everywhere the two robots move by {robots:.3f}, the two others by {others:.3f}")
assert min(robots, others) > 0.01

# %% [markdown] tags=["slide"]
# ## A text without [V]
#
# Adapters everywhere change the class word, and other words too. Bound ones cannot: without a slot their mask
# is zero.
#
# ![](last)

# %% [markdown]
# The set that acts everywhere has changed what a plain *robot* looks like, and the pictures of other things
# as well (the last line compares the two): $L_{CC}$ mentions neither. The bound set has changed **nothing**,
# and this is no measurement but an identity: without a slot the mask is zero at every token, so each layer's
# output is $y + 0$; no token is replaced; hence every block computes what the base model computes. It holds
# for any $A$, $B$ and $Y$, trained or not. The price of this set you saw above: it learns less. How much of
# the concept one gets for how much damage is the question of the later lessons.
#
# ## 9 · Relatives: what else one can train
#
# Much has been written on where a concept may live. The figure below counts the numbers for *this* model. The
# first four change no weight. Three of them put their vectors in front of the text encoder, where a word's
# embedding is looked up; $Y^l$ stands behind it. (The size of the network for NeTI is our example; the
# original one has a second output, behind the encoder.)
#
# | method | what it trains | may depend on |
# |---|---|---|
# | Textual inversion (2208.01618) | one vector in front of the encoder | nothing |
# | P+, trained by XTI (2303.09522) | one such vector for every layer that reads text | layer |
# | NeTI (2305.15391) | a small network that gives this vector for a layer and a time | layer, time |
# | $Y^l$ alone (Eq. 7, `--method embeddings`) | one vector for every block, behind the encoder | layer |
# | stage 1 (the paper) | $Y^l$ and adapters everywhere | all, and at every token |
# | adapters bound to the token (ours) | $Y^l$ and adapters at the slot | layer, time and pooled text, through adaLN |

# %%
E, hidden = pipe.encoder.config.width, 128
neti = nn.Sequential(nn.Linear(32, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(),    # features of layer, time
                     nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), nn.Linear(hidden, E))
counts = {"textual inversion": E, "P+ / XTI": depth * E, "Y alone": depth * D,
          "NeTI": sum(parameter.numel() for parameter in neti.parameters()),
          f"token, rank {r}, and Y": count_bound, f"stage 1, rank {r}, and Y": count_everywhere,
          "the attentions' matrices": whole}
assert count_everywhere == count_lora(shapes, r) + depth * D
assert count_bound == count_lora([tuple(layer.weight.shape) for layer in at_V.values()], r) + depth * D
assert counts["textual inversion"] < counts["Y alone"] < count_bound < count_everywhere < whole

times = torch.linspace(0.05, 0.95, 9)
x_0, some = data.x_0[:1], data.class_text[:1]
noises = flow.noise_for(list(range(len(times))), tuple(x_0.shape[1:]))
states = torch.stack([states_in_slots(pipe, flow.path(x_0, x_1[None], t[None]), t[None], some)
                      for x_1, t in zip(noises, times)])                    # [times, depth, D]
away = (states - states.mean(0)).norm(dim=-1) / states.mean(0).norm(dim=-1)  # [times, depth]

figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.7), layout="constrained")
colours = [BLUE if name.startswith(("Y", "token", "stage")) else GREY for name in counts]
axes[0].barh(list(counts), counts.values(), color=colours)
axes[0].set(xscale="log", title="numbers that are trained", xlim=(50, 20 * whole))
for n, count in enumerate(counts.values()):
    axes[0].text(count, n, f" {count:,d}", va="center")
axes[0].invert_yaxis()
for l in range(depth):
    axes[1].plot(times, away[:, l], color=plt.cm.viridis(l / depth), label=f"block {l}")
axes[1].set(xlabel="t", ylabel="relative distance", title="the class word's state: how far from its mean")
axes[1].legend(ncols=2, fontsize=7)
plt.show()
assert away[:, 0].max() < 1e-4 and away[:, -1].max() > 0.02

# %% [markdown]
# The right panel shows why some let the vector depend on time. The base model's own state of the word, at the
# input of each block, moves with $t$; a $Y^l$ is one vector for all times, its mean at the start. (At block 0
# nothing moves: the text has met neither picture nor time yet.) The adaLN in front of a layer brings the time
# back in: what the keys and values are made of is $Y^l$, *modulated* by $t$.
#
# ## What you can now say
#
# * A useful change of a large matrix has few directions that matter. LoRA trains only such: $r\,(in + out)$
# numbers a layer.
# * Exactly one of $A$ and $B$ starts at zero. Both: dead. None: the model is another one at the start.
# * A set is hooks over a frozen base. Merging rounds, and cannot be undone exactly. A file has to say alpha;
# ours is the rank.
# * $Y^l$ replaces the token in the slot at the input of block $l$, acts in this block as a key and a value,
# and is then forgotten.
# * Adapters everywhere also change texts without [V]. Bound ones cannot, by construction.
#
# | you wrote | in the package |
# |---|---|
# | `fresh`, `adapted`, `attached`, `count_lora` | `purecc_min/lora.py`: `LoRA`, `LoRA.attached`, `LoRA.hook` |
# | `export`, `imported` | `purecc_min/commands/export.py`: `export_lora` |
# | `visit_with` | `purecc_min/embeddings.py`: `ConceptEmbeddings`; `visit` in `purecc_min/branch.py` |
# | `make_theta`, `l_cc` | `purecc_min/branch.py`: `Branch`, `velocity_with`; `purecc_min/methods.py`: `l_cc` |
#
# ## Three questions
#
# **1.** The set that is bound to the token adapts the text's keys and values, but not its queries. Why would
# an adapter on the queries at the slot do nothing at all?
# <details><summary>Answer</summary>
#
# A query decides what its **own** token takes from the others. What the token in the slot takes ends up in
# the block's output at the slot, and experiment (1) of section 6 shows that nobody reads that: $Y^{l+1}$
# replaces it.
# </details>
#
# **2.** You double $A$ and halve $B$. The product is the same, and so is every picture. Does training go on
# in the same way?
# <details><summary>Answer</summary>
#
# No. By exercise 4.5 the gradient of $B$ contains $A$ and doubles, and that of $A$ is halved. The function is
# the same, and its gradients are not. So the size of $A$ at the start is one of LoRA's settings, though no
# file mentions it.
# </details>
#
# **3.** Your `attached` is wrapped around the whole model, the package's around each block, inside `visit`.
# With *activation checkpointing*, the backward pass computes blocks a second time. What goes wrong with
# yours?
# <details><summary>Answer</summary>
#
# When `backward()` is called, your `with` has ended and the hooks are gone. The block is computed again
# without the adapters; torch notices that the second computation is another one, and stops with a
# `CheckpointError`. Inside `visit` the hooks come back with the block.
# </details>
#
# **Next:** lesson 5, on what goes wrong.

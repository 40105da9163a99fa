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
# # 2 · The MMDiT, built
#
# **You write the transformer of Stable Diffusion 3.5, and it draws with trained weights**
#
# Lesson 1 needed three linear layers for a velocity in the plane. A velocity for pictures that obeys a
# sentence needs more: an MMDiT, a *multimodal diffusion transformer*. It has few parts, and you write each
# one as a function of at most ten lines. The weights are those of the small model that comes with this
# repository, so each function can be compared with the real one, number by number; and at the end your own
# transformer draws a picture.
#
# **Then you can say** how a picture and a text meet in one softmax, and why a new network begins with closed
# gates *and* a last layer of zeros.
#
# | | |
# |---|---|
# | Needs | lesson 1; matrix products and the softmax |
# | Keep open | [`tinyflow/mmdit.py`](../../tinyflow/mmdit.py) and [`tinyflow/attention.py`](../../tinyflow/attention.py), **after** you have tried |
#
# An exercise is a function whose body is blank; the cell below it checks what you write. Hints are folded.
# The solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 2 · The MMDiT, built
#
# The transformer of Stable Diffusion 3.5, one function after the other, until it draws.

# %%
import copy
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange

from tinyflow import flow
from tinyflow.mmdit import MMDiT, time_features
from tinyflow.picturebook.model import load_tiny
from tutorials.course import BLUE, CORAL, GOLD, INK, YourTurn, expect, expect_close, rule_out, several, show

def written_here(answer, name):                  # what the exercise asks for may not be called in its answer
    expect(name not in answer.__code__.co_names, f"{answer.__name__}: write it without {name}.")

torch.set_grad_enabled(False)                    # until the last section, nothing is trained here
pipe = load_tiny()
model, config = pipe.mmdit, pipe.mmdit.config
D, H, p = config.width, config.heads, config.patch
print(f"width D = {D}, heads H = {H}, depth = {config.depth}, patches of {p} x {p}")

prompts = ["a big red cat on the left in the snow", "a big green tree on the right on the beach"]
text = pipe.encode_text(prompts)                 # context [2, T, D] and pooled [2, D]
x_0 = pipe.sample(text, seeds=[5, 6], steps=12)                              # [2, C, S, S]
x_1, t = flow.noise_for([7, 8], tuple(x_0.shape[1:])), torch.tensor([0.5, 0.7])
x_t = flow.path(x_0, x_1, t)                                                # [2, C, S, S]
print(f"x_t {list(x_t.shape)}, context {list(text.context.shape)}, pooled {list(text.pooled.shape)}")
titles = ["a cat", "a tree", "x_t at t = 0.5,\ndecoded", "x_t at t = 0.7,\ndecoded"]
show(pipe.decode_images(torch.cat([x_0, x_t])), titles, columns=4)

# %% [markdown]
# ## 1 · From a picture to tokens, and back
#
# The flow does not run on pixels. An *autoencoder* (the codec) makes of 64 x 64 pixels a *latent* of $C=16$
# channels and $S \times S$ places, $S=16$, and makes pixels of it again. From here on $x_0$, $x_t$ and "the
# picture" are latents; `decode_images` shows them.
#
# A transformer works on a row of vectors, called *tokens*. A latent becomes one in the plainest way: it is
# cut into squares of $p \times p$, the numbers of each square are written one after the other, and one linear
# layer makes a vector of width $D$ of them.
#
# ```
# x_t [B, C, S, S]   --cut-->   [B, N, C*p*p]   --linear-->   tokens [B, N, D],      N = (S / p)^2
# ```
#
# `patch_embedder` in the package is a convolution with stride $p$. That is the same thing: squares that do
# not overlap, each multiplied with the same matrix. Its weight has the shape $[D, C, p, p]$, so the numbers
# of a square have to come in the order *channel, row, column*. The last layer of the network goes the other
# way, and makes of each token the numbers of a square in the order *row, column, channel*. (Both orders are
# Stable Diffusion 3's.)
#
# ### Exercise 2.1 ★ · Cut and join
#
# Write both directions with `einops.rearrange`. An example of how it is read:
# `rearrange(x, "b (h p) w -> b h (w p)", p=2)` takes the second axis apart and joins two others.

# %% tags=["exercise"]
def to_patches(x, p):
    # x [B, C, S, S] -> [B, N, C * p * p]: the patches row by row, in each one: channel, row, column
    # BEGIN SOLUTION 2.1
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
    # END SOLUTION

def to_picture(patches, rows, p):
    # patches [B, N, p * p * C], in each one: row, column, channel -> [B, C, S, S]
    # rows: of patches, that is S / p
    # BEGIN SOLUTION 2.1
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)
    # END SOLUTION

# %% tags=["wrong"]
# says: channel comes first
def to_patches(x, p):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

def to_picture(patches, rows, p):
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)

# %% tags=["wrong"]
# says: patches run row by row
def to_patches(x, p):
    return rearrange(x, "b c (h p) (w q) -> b (w h) (c p q)", p=p, q=p)

def to_picture(patches, rows, p):
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)

# %% tags=["wrong"]
# says: row before the column
def to_patches(x, p):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c q p)", p=p, q=p)

def to_picture(patches, rows, p):
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)

# %% tags=["wrong"]
# says: channel comes last
def to_patches(x, p):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

def to_picture(patches, rows, p):
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)

# %% tags=["wrong"]
# says: to_picture: the patches run row by row
def to_patches(x, p):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

def to_picture(patches, rows, p):
    return rearrange(patches, "b (w h) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Name every axis: `(h p)` is the height, made of `h` patches of `p` rows each; `(w q)` is the width. On the
# other side stand `(h w)`, the patches, and the three axes of one patch in the order that is asked for.
# </details>

# %% tags=["check"]
rows = x_t.shape[-1] // p
theirs = F.unfold(x_t, p, stride=p).mT                                      # [B, N, C * p * p]
inside = theirs.unflatten(2, (-1, p, p))                                    # [B, N, C, p, p]
yours = to_patches(x_t, p)
rule_out(yours, {"to_patches: in a patch the channel comes first, then row and column.":
                 inside.permute(0, 1, 3, 4, 2).flatten(2),
                 "to_patches: in a patch the row before the column.": inside.mT.flatten(2),
                 "to_patches: the patches run row by row, yours column by column.":
                 theirs.unflatten(1, (rows, rows)).transpose(1, 2).flatten(1, 2)})
expect_close(yours, theirs, "to_patches")
convolution = model.patch_embedder                                          # weight [D, C, p, p], bias [D]
tokens = yours @ convolution.weight.flatten(1).T + convolution.bias
expect_close(tokens, convolution(x_t).flatten(2).mT, "your tokens, from to_patches,")

numbered = torch.arange(float(x_t[0].numel())).view(1, *x_t.shape[1:])      # every number once
cut = F.unfold(numbered, p, stride=p).mT                                    # [1, N, C * p * p]
given = cut.unflatten(2, (-1, p, p)).permute(0, 1, 3, 4, 2).flatten(2)      # in a patch: row, column, channel
turned = cut.unflatten(1, (rows, rows)).transpose(1, 2).flatten(1, 2)       # the patches column by column
rule_out(to_picture(given, rows, p), {"to_picture: in a patch the channel comes last here.":
                                      F.fold(given.mT, x_t.shape[-1], p, stride=p),
                                      "to_picture: the patches run row by row, yours column by column.":
                                      F.fold(turned.mT, x_t.shape[-1], p, stride=p)})
expect_close(to_picture(given, rows, p), numbered, "the picture from to_picture")
print(f"2.1 right: {list(x_t.shape)} -> {list(to_patches(x_t, p).shape)} -> tokens {list(tokens.shape)}")

# %%
noisy, clean = pipe.decode_images(torch.cat([x_t[:1], x_0[:1]]))
figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9), layout="constrained")
side = len(clean) // rows                                                   # pixels a patch covers
for axis, picture, name in zip(axes, (clean, noisy), ("x_0", "x_t: what the network sees")):
    axis.imshow(picture)
    axis.set(title=name, xticks=[], yticks=[])
    for line in range(1, rows):
        axis.axhline(line * side - 0.5, color="white", lw=0.6)
        axis.axvline(line * side - 0.5, color="white", lw=0.6)
axes[2].imshow(tokens[0].T, cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
axes[2].set(title=f"its {rows * rows} tokens of width {D}", xlabel="token", ylabel="channel")
plt.show()

# %% [markdown] tags=["slide"]
# ## A picture becomes tokens
#
# Cut into squares, write each one in a row, multiply with one matrix. A convolution with stride $p$ is the
# same.
#
# ![A picture, the same with noise as the network sees it, and its 64 tokens as columns of numbers](last)

# %% [markdown]
# ## 2 · Where a token stands
#
# Nothing in attention knows whether a token was at the top or at the bottom. If the patches are shuffled,
# everything that follows is shuffled in the same way and is otherwise the same. So a fixed pattern is *added*
# to the tokens, a different one for each place: waves of many lengths. For one axis, with $D/2$ channels and
# place $i = 0 \dots G-1$ ($G$ places along a side, here $S/p$):
#
# $$\omega_k = 10000^{-k / (D/4)}, \qquad k = 0 \dots D/4 - 1, \qquad
# e(i) = \big[\sin(i\,\omega_0), \dots, \sin(i\,\omega_{D/4-1}),\; \cos(i\,\omega_0), \dots,
# \cos(i\,\omega_{D/4-1})\big].$$
#
# The first half of a token's channels gets $e(\text{column})$, the second half $e(\text{row})$.
#
# ### Exercise 2.2 ★★ · Positions

# %% tags=["exercise"]
def positions(D, G):
    # -> [G * G, D], the places row by row
    # BEGIN SOLUTION 2.2
    omega = 10000 ** (-torch.arange(D // 4) / (D // 4))                     # [D / 4]
    angles = torch.arange(G)[:, None] * omega                               # [G, D / 4]
    e = torch.cat([angles.sin(), angles.cos()], dim=-1)                     # [G, D / 2]
    return torch.cat([e.repeat(G, 1), e.repeat_interleave(G, dim=0)], dim=-1)
    # END SOLUTION

# %% tags=["wrong"]
# says: first half of the channels is for the column
def positions(D, G):
    omega = 10000 ** (-torch.arange(D // 4) / (D // 4))
    angles = torch.arange(G)[:, None] * omega
    e = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([e.repeat_interleave(G, dim=0), e.repeat(G, 1)], dim=-1)

# %% tags=["wrong"]
# says: sines come before the cosines
def positions(D, G):
    omega = 10000 ** (-torch.arange(D // 4) / (D // 4))
    angles = torch.arange(G)[:, None] * omega
    e = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([e.repeat(G, 1), e.repeat_interleave(G, dim=0)], dim=-1)

# %% tags=["wrong"]
# says: counted from 0
def positions(D, G):
    omega = 10000 ** (-torch.arange(D // 4) / (D // 4))
    angles = torch.arange(1, G + 1)[:, None] * omega
    e = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([e.repeat(G, 1), e.repeat_interleave(G, dim=0)], dim=-1)

# %% tags=["wrong"]
# says: exponent
def positions(D, G):
    omega = 10000 ** (-torch.arange(D // 4) / (D // 2))
    angles = torch.arange(G)[:, None] * omega
    e = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([e.repeat(G, 1), e.repeat_interleave(G, dim=0)], dim=-1)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Make `e` $[G, D/2]$ first: `torch.arange(G)[:, None] * omega` has all the angles.
# </details>
# <details><summary>Hint 2</summary>
#
# Row by row, the column goes 0, 1, 2, ..., 0, 1, 2, ...: `e.repeat(G, 1)`. The row goes 0, 0, 0, ..., 1, 1,
# 1: `e.repeat_interleave(G, dim=0)`.
# </details>

# %% tags=["check"]
grid = config.max_grid
theirs = model.positions.flatten(0, 1)                                      # [G * G, D]
written_here(positions, "model")
yours = positions(D, grid)
column, row = theirs.chunk(2, dim=1)                                        # [G * G, D / 2] each
rule_out(yours, {"the first half of the channels is for the column.": torch.cat([row, column], dim=1),
                 "the sines come before the cosines.":
                 torch.cat([half.roll(D // 4, dims=1) for half in (column, row)], dim=1),
                 "all sines come first, then all cosines.":
                 torch.cat([half.unflatten(1, (2, -1)).mT.flatten(1) for half in (column, row)], dim=1)})
if isinstance(yours, torch.Tensor) and yours.shape == theirs.shape:
    expect(torch.allclose(yours[0], theirs[0], atol=1e-3), "the places are counted from 0: sin 0 and cos 0.")
    expect(torch.allclose(yours[1, :2], theirs[1, :2], atol=1e-3), "omega: the exponent is -k / (D / 4).")
expect_close(yours, theirs, "positions")
print("2.2 right: the same pattern as the package's, for", len(yours), "places")

# %% [markdown]
# Below, the same noise and text: with the positions, without them, and with the patches of $x_1$ and the
# positions shuffled alike. The fourth picture is the third one, put back in order, and it is the first:
# shuffle tokens *with* their positions, and the network gives the same velocity, shuffled.

# %%
def draw(x_1, where, steps=12, guidance=3.0):
    # samples the first prompt; where [N, D] is added to the patches in place of the positions
    kept, model.positions = model.positions, where.view_as(model.positions)
    one = text[:1]
    null = pipe.encode_text([""])

    def guided(x, t):
        return flow.guide(pipe.velocity(x, t, null), pipe.velocity(x, t, one), guidance)

    for _, x in flow.euler(guided, x_1, steps, pipe.shift):
        pass
    model.positions = kept
    return x

def shuffle(x, order):                                                      # the patches of x [1, C, S, S]
    patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    return to_picture(patches[:, order], rows, p)

order = torch.randperm(rows * rows, generator=torch.Generator().manual_seed(0))
where = model.positions.flatten(0, 1)                                       # [N, D]
with_them, without = draw(x_1[:1], where), draw(x_1[:1], torch.zeros_like(where))
shuffled = draw(shuffle(x_1[:1], order), where[order])
back = shuffle(shuffled, order.argsort())
show(pipe.decode_images(torch.cat([with_them, without, shuffled, back])),
     ["with positions", "without", "patches and positions\nshuffled", "the same,\nput back in order"],
     columns=4, side=1.7)
print(f"put back in order, it differs from the first by at most {(back - with_them).abs().max():.0e}")
assert torch.allclose(back, with_them, atol=1e-2)

# %% [markdown] tags=["slide"]
# ## Where a token stands
#
# Attention knows no order. A pattern of waves is *added*: half of the channels for the column, half for the
# row.
#
# ![Pictures drawn with positions, without, with patches and positions shuffled, and the same put back in
# order](last)

# %% [markdown]
# ## 3 · Attention
#
# Every token asks a question, its *query* $q$. Every token also has a *key* $k$, by which it is found, and a
# *value* $v$, which it gives. A token takes the mean of all values, weighted by how well their keys fit its
# query:
#
# $$\text{attention}(q, k, v) = \operatorname{softmax}\!\left(\frac{q\,k^\top}{\sqrt d}\right) v$$
#
# Why $\sqrt d$? If the entries of $q$ and $k$ are independent with variance 1, $q \cdot k$ is a sum of $d$
# terms and has variance $d$. Without the root, the wider the vectors the larger these numbers, and a softmax
# of large numbers puts all of its weight on one token, where its gradient is almost zero.
#
# ### Exercise 2.3 ★ · Attention

# %% tags=["exercise"]
def attention(q, k, v):
    # q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d]
    # BEGIN SOLUTION 2.3
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)               # [B, H, N, M]
    return weights @ v
    # END SOLUTION

# %% tags=["wrong"]
# says: root of d
def attention(q, k, v):
    return (q @ k.mT).softmax(dim=-1) @ v

# %% tags=["wrong"]
# says: not by d itself
def attention(q, k, v):
    return (q @ k.mT / q.shape[-1]).softmax(dim=-1) @ v

# %% tags=["wrong"]
# says: softmax is missing
def attention(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5) @ v

# %% tags=["wrong"]
# says: over those who are asked
def attention(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-2) @ v

# %% tags=["wrong"]
# says: without scaled_dot_product_attention
def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `k.mT` swaps the last two axes, so `q @ k.mT` is $[B, H, N, M]$: row = who asks, column = who is asked. The
# weights of one row have to add up to 1.
# </details>

# %% tags=["check"]
random = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 4, n, 32, generator=random) for n in (7, 9, 9))
written_here(attention, "scaled_dot_product_attention")
scores = q @ k.mT / 32 ** 0.5                                               # [2, 4, 7, 9]
rule_out(attention(q, k, v), {"divide q k^T by the root of d, here of 32.":
                              F.scaled_dot_product_attention(q, k, v, scale=1.0),
                              "divide by the root of d, not by d itself.":
                              F.scaled_dot_product_attention(q, k, v, scale=1 / 32),
                              "the softmax is missing.": scores @ v,
                              "the softmax runs over those who are asked: a row adds up to 1.":
                              scores.softmax(dim=-2) @ v})
expect_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), "attention(q, k, v)")
expect_close(attention(q[..., :8], k[..., :8], v), F.scaled_dot_product_attention(q[..., :8], k[..., :8], v),
             "attention with d = 8")
print("2.3 right: equal to torch's scaled_dot_product_attention")

# %%
widths = [4, 16, 64, 256, 1024]
share = {True: [], False: []}                    # of the weight, the largest
for d in widths:
    q, k = torch.randn(500, d, generator=random), torch.randn(64, d, generator=random)
    for scaled in share:
        weights = (q @ k.T / (d ** 0.5 if scaled else 1)).softmax(dim=-1)   # [500, 64]
        share[scaled].append(weights.amax(dim=-1).mean().item())
plt.figure(figsize=(4.6, 2.3), layout="constrained")
plt.semilogx(widths, share[False], "o-", color=CORAL, label="without the root")
plt.semilogx(widths, share[True], "s--", color=BLUE, label="divided by the root of d")
plt.gca().set(xlabel="width d of queries and keys", ylabel="largest weight", ylim=(0, 1), xticks=widths,
              xticklabels=widths, title="how much of its attention a token gives to ONE of 64 tokens")
plt.minorticks_off()
plt.legend()
plt.show()
assert share[False][-1] > 0.9 > 0.2 > share[True][-1]

# %% [markdown] tags=["slide"]
# ## Attention
#
# $$\operatorname{softmax}\left(\frac{q\,k^\top}{\sqrt d}\right) v$$
#
# A token asks ($q$), is found ($k$), gives ($v$). Why the root?
#
# ![The largest weight of attention grows with the width without the root, and stays with it](last)

# %% [markdown]
# ### Heads, and a norm
#
# One softmax can follow one question. So the width $D$ is divided into $H$ *heads* of width $d = D / H$, each
# with an attention of its own; what they find is joined again and mixed by a linear layer. Stable Diffusion
# 3.5 adds a norm: queries and keys are divided by their root mean square (and multiplied by a learned
# weight) before they meet. So no query can grow until its softmax is stuck.
#
# $$\text{RMSNorm}(q) = \frac{q}{\sqrt{\operatorname{mean}(q^2) + 10^{-6}}} \cdot w, \qquad \text{over the } d \text{ entries of one head}.$$
#
# ### Exercise 2.4 ★★ · Queries, keys and values of one stream
#
# `P` holds the weights: `P.to_q`, `P.to_k`, `P.to_v` are linear layers, `P.norm_q.weight` and
# `P.norm_k.weight` are $w$, each $[d]$. Only queries and keys are normalised. Head 0 owns the first $d$ of
# the $D$ numbers, head 1 the next $d$, and so on.

# %% [markdown] tags=["slide"]
# ## Heads, and a norm
#
# * The width $D$ is divided into $H$ heads; each has a softmax of its own.
# * Queries and keys are divided by their root mean square, so that no query grows until its softmax is stuck.
#
# $$\text{RMSNorm}(q) = \frac{q}{\sqrt{\text{mean}(q^2)}}\; w$$

# %% tags=["exercise"]
def rms_norm(q, w):
    # q [..., d], w [d]
    # BEGIN SOLUTION 2.4
    return q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w
    # END SOLUTION

def qkv(x, P, H):
    # tokens x [B, N, D] -> queries, keys, values, each [B, H, N, D / H]
    # BEGIN SOLUTION 2.4
    q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (P.to_q, P.to_k, P.to_v))
    return rms_norm(q, P.norm_q.weight), rms_norm(k, P.norm_k.weight), v
    # END SOLUTION

# %% tags=["wrong"]
# says: head 0 owns the first d
def rms_norm(q, w):
    return q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w

def qkv(x, P, H):                                # the heads' numbers interleaved
    q, k, v = (rearrange(layer(x), "b n (d h) -> b h n d", h=H) for layer in (P.to_q, P.to_k, P.to_v))
    return rms_norm(q, P.norm_q.weight), rms_norm(k, P.norm_k.weight), v

# %% tags=["wrong"]
# says: the values are not normalised
def rms_norm(q, w):
    return q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w

def qkv(x, P, H):
    q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (P.to_q, P.to_k, P.to_v))
    return rms_norm(q, P.norm_q.weight), rms_norm(k, P.norm_k.weight), rms_norm(v, 1)

# %% tags=["wrong"]
# says: queries are normalised, too
def rms_norm(q, w):
    return q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w

def qkv(x, P, H):
    return tuple(rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (P.to_q, P.to_k, P.to_v))

# %% tags=["wrong"]
# says: without qkv
def rms_norm(q, w):
    return q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w

def qkv(x, P, H):
    return P.qkv(x)

# %% tags=["wrong"]
# says: mean of the squares, not their sum
def rms_norm(q, w):
    return q / q.norm(dim=-1, keepdim=True) * w

def qkv(x, P, H):
    q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (P.to_q, P.to_k, P.to_v))
    return rms_norm(q, P.norm_q.weight), rms_norm(k, P.norm_k.weight), v

# %% tags=["wrong"]
# says: weight w is missing
def rms_norm(q, w):
    return q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

def qkv(x, P, H):
    q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=H) for layer in (P.to_q, P.to_k, P.to_v))
    return rms_norm(q, P.norm_q.weight), rms_norm(k, P.norm_k.weight), v

# %% [markdown]
# <details><summary>Hint</summary>
#
# Head 0 owns the first $d$ channels, head 1 the next $d$: in einops, `(h d)`. The norm comes after the
# division into heads.
# </details>

# %% tags=["check"]
P, x = model.blocks[2].attention.image, torch.randn(2, 10, D, generator=random)
written_here(rms_norm, "rms_norm")
written_here(qkv, "qkv")
some, w = x[..., :D // H], P.norm_q.weight
rule_out(rms_norm(some, w), {"rms_norm: the mean of the squares, not their sum.":
                             P.norm_q(some) / w.numel() ** 0.5,
                             "rms_norm: the weight w is missing.": P.norm_q(some) / w,
                             "rms_norm: no mean is subtracted.": F.layer_norm(some, w.shape, w)})
for size in (1, 1e-3):                           # of tiny numbers, the 1e-6 under the root is the larger part
    expect_close(rms_norm(size * some, w), P.norm_q(size * some), f"rms_norm of numbers of about {size}")
given = qkv(x, P, H)
given = several(given, ("queries", "keys", "values"))
q, k, v = P.qkv(x)                                                          # [2, H, 10, d] each
raw = P.to_q(x)                                                             # [2, 10, D]
rule_out(given[0], {"head 0 owns the first d of the D numbers; yours are interleaved.":
                    P.norm_q(raw.unflatten(2, (-1, H)).permute(0, 3, 1, 2)),
                    "the queries are normalised, too.": raw.unflatten(2, (H, -1)).transpose(1, 2),
                    "divide into heads first: the norm is over the d entries of one head.":
                    rms_norm(raw, P.norm_q.weight.repeat(H)).unflatten(2, (H, -1)).transpose(1, 2)})
rule_out(given[2], {"the values are not normalised.": rms_norm(v, 1)})
for name, mine, theirs in zip(("queries", "keys", "values"), given, (q, k, v)):
    expect_close(mine, theirs, f"the {name}")
print("2.4 right: queries, keys and values are the package's")

# %% [markdown]
# ### Joint attention: a picture and a text in one softmax
#
# An MMDiT runs two streams, the image tokens $x$ and the text tokens $c$. Each has its own weights for
# everything, because patches and words are different things. In **one** place they meet: the queries, keys
# and values of both are put one after the other, image first, and all $N + T$ tokens attend to all $N + T$
# tokens in one softmax. Then each stream takes back its own rows.
#
# ```
#    x [B, N, D] --qkv(image)--.                                   .--> first N --> image.to_out --> [B, N, D]
#                               >-- cat --> one attention --------<
#    c [B, T, D] --qkv(text)---'           [B, H, N + T, d]        '--> last T  --> text.to_out  --> [B, T, D]
# ```
#
# ### Exercise 2.5 ★★ · Joint attention
#
# After the last block nobody needs the text any more: there `hasattr(text, "to_out")` is false, and the
# second result is `None`.

# %% [markdown] tags=["slide"]
# ## Joint attention: two streams, one softmax
#
# ![Two streams with weights of their own: their queries, keys and values are joined for one attention, and
# parted again](../diagrams/streams.svg)
#
# Each stream has weights of its own for everything. What a patch gives to words it takes from patches.

# %% tags=["exercise"]
def joint_attention(x, c, image, text, H):
    # x [B, N, D], c [B, T, D]; image, text: the two streams' weights -> [B, N, D] and [B, T, D] or None
    # BEGIN SOLUTION 2.5
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv(x, image, H), qkv(c, text, H)))  # [B, H, N + T, d]
    both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")            # [B, N + T, D]
    x_out, c_out = both[:, :x.shape[1]], both[:, x.shape[1]:]
    return image.to_out(x_out), text.to_out(c_out) if hasattr(text, "to_out") else None
    # END SOLUTION

# %% tags=["wrong"]
# says: never meet
def joint_attention(x, c, image, text, H):       # two attentions
    def alone(x, P):
        return P.to_out(rearrange(attention(*qkv(x, P, H)), "b h n d -> b n (h d)"))
    return alone(x, image), alone(c, text)

# %% tags=["wrong"]
# says: order of the streams
def joint_attention(x, c, image, text, H):       # text first, and the first N rows are taken
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv(c, text, H), qkv(x, image, H)))
    both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both[:, :x.shape[1]], both[:, x.shape[1]:]
    return image.to_out(x_out), text.to_out(c_out) if hasattr(text, "to_out") else None

# %% tags=["wrong"]
# says: image.to_out is missing
def joint_attention(x, c, image, text, H):
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv(x, image, H), qkv(c, text, H)))
    both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
    return both[:, :x.shape[1]], both[:, x.shape[1]:] if hasattr(text, "to_out") else None

# %% tags=["wrong"]
# says: text.to_out is missing
def joint_attention(x, c, image, text, H):
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv(x, image, H), qkv(c, text, H)))
    both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
    return image.to_out(both[:, :x.shape[1]]), both[:, x.shape[1]:] if hasattr(text, "to_out") else None

# %% tags=["wrong"]
# says: the patches ask the words alone
def joint_attention(x, c, image, text, H):       # cross attention
    (q, _, _), (q_text, k, v) = qkv(x, image, H), qkv(c, text, H)
    x_out, c_out = (rearrange(attention(a, k, v), "b h n d -> b n (h d)") for a in (q, q_text))
    return image.to_out(x_out), text.to_out(c_out) if hasattr(text, "to_out") else None

# %% tags=["wrong"]
# says: return 2 things
def joint_attention(x, c, image, text, H):
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv(x, image, H), qkv(c, text, H)))
    both = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
    return image.to_out(both[:, :x.shape[1]])

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `zip(qkv(x, image, H), qkv(c, text, H))` gives the two queries, then the two keys, then the two values. The
# tokens are axis 2.
# </details>
# <details><summary>Hint 2</summary>
#
# After the attention, join the heads with `rearrange(..., "b h n d -> b n (h d)")`. The first `x.shape[1]`
# rows are the picture's.
# </details>

# %% tags=["check"]
c = torch.randn(2, 6, D, generator=random)

def mistakes_of(a):                              # what usual mistakes make of the image's rows
    bare = copy.deepcopy(a)
    bare.image.to_out, bare.text.to_out, bare.text_output = *(torch.nn.Identity() for _ in range(2)), True
    x_bare, c_bare = bare(x, c)                                             # [2, 10, D], [2, 6, D]
    to_words = F.scaled_dot_product_attention(a.image.qkv(x)[0], *a.text.qkv(c)[1:])
    return {"the two streams never meet: put their queries, keys and values one after the other.":
            a.image.attend(x),
            "mind the order of the streams: the first N rows are the picture's if it is put first.":
            a.image.to_out(torch.cat([c_bare, x_bare], dim=1)[:, :10]),
            "image.to_out is missing.": x_bare,
            "here the patches ask the words alone: they ask each other, too.":
            a.image.to_out(rearrange(to_words, "b h n d -> b n (h d)"))}, c_bare

for l, block in enumerate(model.blocks):
    theirs = block.attention(x, c)
    mine = joint_attention(x, c, block.attention.image, block.attention.text, H)
    mine = several(mine, ("the image's", "the text's"))
    usual, c_bare = mistakes_of(block.attention)
    rule_out(mine[0], usual)
    expect_close(mine[0], theirs[0], f"block {l}: the image stream's output")
    if theirs[1] is None:                        # it has no to_out for the text
        expect(mine[1] is None, f"block {l} is the last one: its second result is None.")
    else:
        rule_out(mine[1], {"text.to_out is missing.": c_bare})
        expect_close(mine[1], theirs[1], f"block {l}: the text stream's output")
print(f"2.5 right, in all {len(model.blocks)} blocks")

# %% [markdown]
# ## 4 · adaLN-Zero: how time and text speak to a block
#
# What a block should do at $t = 0.9$, where almost everything is noise, is not what it should do at
# $t = 0.1$. So the time, and one vector for the whole text (`pooled`), are turned into a single vector `vec`
# $[B, D]$, and in every block one linear layer makes of it three vectors for each sublayer: a **shift** and a
# **scale** before it, and a **gate** after it.
#
# $$\text{modulate}(x) = \text{LayerNorm}(x) \cdot (1 + \text{scale}) + \text{shift}, \qquad x \leftarrow x + \text{gate} \cdot f(\text{modulate}(x))$$
#
# The LayerNorm has no weights of its own: over the $D$ numbers of a token, subtract their mean and divide by
# $\sqrt{\text{variance} + 10^{-6}}$ (the variance with $1/D$, not $1/(D-1)$).
#
# ### Exercise 2.6 ★ · One sublayer

# %% [markdown] tags=["slide"]
# ## adaLN-Zero: how time and text speak to a block
#
# $$\text{modulate}(x) = \text{LayerNorm}(x)\,(1 + \text{scale}) + \text{shift}$$
#
# $$x \leftarrow x + \text{gate}\; f(\text{modulate}(x))$$
#
# Shift, scale and gate are made, in every block, from one vector: time plus the pooled text.

# %% tags=["exercise"]
def modulate(x, shift, scale):
    # x [B, N, D], shift and scale [B, 1, D] -> [B, N, D]. Without F.layer_norm, please.
    # BEGIN SOLUTION 2.6
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    # END SOLUTION

def sublayer(x, f, shift, scale, gate):
    # f: a function from [B, N, D] to [B, N, D], such as an MLP
    # BEGIN SOLUTION 2.6
    return x + gate * f(modulate(x, shift, scale))
    # END SOLUTION

# %% tags=["wrong"]
# says: factor is 1 + scale
def modulate(x, shift, scale):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * scale + shift

def sublayer(x, f, shift, scale, gate):
    return x + gate * f(modulate(x, shift, scale))

# %% tags=["wrong"]
# says: shift and scale are exchanged
def modulate(x, shift, scale):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + shift) + scale

def sublayer(x, f, shift, scale, gate):
    return x + gate * f(modulate(x, shift, scale))

# %% tags=["wrong"]
# says: 1/D
def modulate(x, shift, scale):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

def sublayer(x, f, shift, scale, gate):
    return x + gate * f(modulate(x, shift, scale))

# %% tags=["wrong"]
# says: modulate comes before f
def modulate(x, shift, scale):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

def sublayer(x, f, shift, scale, gate):
    return x + gate * f(x)

# %% tags=["wrong"]
# says: x itself is missing
def modulate(x, shift, scale):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

def sublayer(x, f, shift, scale, gate):
    return gate * f(modulate(x, shift, scale))

# %% tags=["wrong"]
# says: not its input
def modulate(x, shift, scale):
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

def sublayer(x, f, shift, scale, gate):
    return x + f(gate * modulate(x, shift, scale))

# %% tags=["wrong"]
# says: without layer_norm
def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

def sublayer(x, f, shift, scale, gate):
    return x + gate * f(modulate(x, shift, scale))

# %% tags=["check"]
shift, scale, gate = (torch.randn(2, 1, D, generator=random) for _ in range(3))
normal = F.layer_norm(x, (D,), eps=1e-6)
right = normal * (1 + scale) + shift                                        # [2, 10, D]
written_here(modulate, "layer_norm")
rule_out(modulate(x, shift, scale),
         {"the factor is 1 + scale, so that a scale of zero changes nothing.": normal * scale + shift,
          "shift and scale are exchanged.": normal * (1 + shift) + scale,
          "the variance is a mean over D numbers, with 1/D: correction=0.":
          normal * ((D - 1) / D) ** 0.5 * (1 + scale) + shift,
          "the LayerNorm is missing.": x * (1 + scale) + shift})
expect_close(modulate(x, shift, scale), right, "modulate(x, shift, scale)")
tiny = F.layer_norm(1e-3 * x, (D,), eps=1e-6) * (1 + scale) + shift         # here the 1e-6 counts
expect_close(modulate(1e-3 * x, shift, scale), tiny, "modulate of numbers of about 0.001")

def f(y):                                        # some function that is not linear
    return y + y.square()

rule_out(sublayer(x, f, shift, scale, gate),
         {"x itself is missing: the sublayer's output is added to it.": gate * f(right),
          "modulate comes before f.": x + gate * f(x),
          "the gate multiplies f's output, not x.": gate * (x + f(right)),
          "the gate multiplies f's output, not its input.": x + f(gate * right),
          "the gate is missing.": x + f(right)})
expect_close(sublayer(x, f, shift, scale, gate), x + gate * f(right), "sublayer(x, f, shift, scale, gate)")
print("2.6 right: and with a gate of zero a sublayer hands on what it got")

# %% [markdown]
# ## 5 · A block, and the whole network
#
# A block is: joint attention with a gate for each stream, then an MLP with a gate for each stream.
# `b.image_adaln(vec)` returns six tensors $[B, 1, D]$: shift, scale and gate for the attention, then shift,
# scale and gate for the MLP; `b.text_adaln(vec)` does so for the text. In the **last** block the text ends:
# its `text_mlp` is `None`, and its `text_adaln` returns two tensors only, the shift and the scale before the
# attention.
#
# ### Exercise 2.7 ★★★ · A block

# %% tags=["exercise"]
def run_block(b, x, c, vec, H):
    # b: a block's weights: image_adaln, text_adaln, attention.image, attention.text, image_mlp, text_mlp
    # x [B, N, D], c [B, T, D], vec [B, D] -> x and c after the block (c: None after the last one)
    # BEGIN SOLUTION 2.7
    image, text = b.image_adaln(vec), b.text_adaln(vec)
    x_out, c_out = joint_attention(modulate(x, *image[:2]), modulate(c, *text[:2]),
                                   b.attention.image, b.attention.text, H)
    x = sublayer(x + image[2] * x_out, b.image_mlp, *image[3:])
    if b.text_mlp is None:
        return x, None
    return x, sublayer(c + text[2] * c_out, b.text_mlp, *text[3:])
    # END SOLUTION

# %% tags=["wrong"]
# says: what the attention has been added to
def run_block(b, x, c, vec, H):                  # the MLP's input is the block's input
    image, text = b.image_adaln(vec), b.text_adaln(vec)
    x_out, c_out = joint_attention(modulate(x, *image[:2]), modulate(c, *text[:2]),
                                   b.attention.image, b.attention.text, H)
    x = sublayer(x, b.image_mlp, *image[3:]) + image[2] * x_out
    if b.text_mlp is None:
        return x, None
    return x, sublayer(c, b.text_mlp, *text[3:]) + text[2] * c_out

# %% tags=["wrong"]
# says: gate of the attention
def run_block(b, x, c, vec, H):
    image, text = b.image_adaln(vec), b.text_adaln(vec)
    x_out, c_out = joint_attention(modulate(x, *image[:2]), modulate(c, *text[:2]),
                                   b.attention.image, b.attention.text, H)
    x = sublayer(x + x_out, b.image_mlp, *image[3:])
    return x, None if b.text_mlp is None else sublayer(c + c_out, b.text_mlp, *text[3:])

# %% tags=["wrong"]
# says: modulated first
def run_block(b, x, c, vec, H):
    image, text = b.image_adaln(vec), b.text_adaln(vec)
    x_out, c_out = joint_attention(x, c, b.attention.image, b.attention.text, H)
    x = sublayer(x + image[2] * x_out, b.image_mlp, *image[3:])
    return x, None if b.text_mlp is None else sublayer(c + text[2] * c_out, b.text_mlp, *text[3:])

# %% tags=["wrong"]
# says: last three
def run_block(b, x, c, vec, H):                  # the attention's shift, scale and gate once more
    image, text = b.image_adaln(vec), b.text_adaln(vec)
    x_out, c_out = joint_attention(modulate(x, *image[:2]), modulate(c, *text[:2]),
                                   b.attention.image, b.attention.text, H)
    x = sublayer(x + image[2] * x_out, b.image_mlp, *image[:3])
    return x, None if b.text_mlp is None else sublayer(c + text[2] * c_out, b.text_mlp, *text[:3])

# %% tags=["wrong"]
# says: package's own forward
def run_block(b, x, c, vec, H):
    return b(x, c, vec)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The attention's two inputs are modulated first, each with the shift and scale of its own stream; its two
# outputs are multiplied with the gates and added to `x` and `c`.
# </details>
# <details><summary>Hint 2</summary>
#
# For the MLPs `sublayer` does everything: `sublayer(x, b.image_mlp, *image[3:])`.
# </details>

# %% tags=["check"]
def closed(*_):
    expect(False, "this calls the package's own forward: write it out.")

def both_of(block):                              # (yours, the package's) results of a block
    theirs, block.forward = block(x, c, vec), closed
    try:
        mine = run_block(block, x, c, vec, H)
    finally:
        del block.forward
    mine = several(mine, ("x", "c"))
    return mine, theirs

def without(block, *names):                      # a copy in which these layers return 0
    block = copy.deepcopy(block)
    for name, parameter in block.named_parameters():
        if any(word in name for word in names):
            parameter.zero_()
    return block

vec = 0.1 * torch.randn(2, D, generator=random)
for l, b in enumerate(model.blocks):
    shift, scale, gate, *last_three = b.image_adaln(vec)                    # [2, 1, D] each
    mine, theirs = both_of(without(b, "mlp.fc2"))
    attended = theirs[0] - x                     # gate times the attention's output
    output = b.attention(modulate(x, shift, scale), modulate(c, *b.text_adaln(vec)[:2]))[0]
    rule_out(mine[0], {"the gate of the attention is missing.": x + output,
                       "the inputs of the attention are modulated first.": x + gate * b.attention(x, c)[0],
                       "x itself is missing: the gated output is added to it.": attended})
    expect_close(mine[0], theirs[0], f"block {l}, x, with MLPs that return 0", tolerance=1e-3)
    mine, theirs = both_of(b)
    rule_out(mine[0], {"the MLP gets x after what the attention has been added to it.":
                       attended + without(b, "image.to_out")(x, c, vec)[0],
                       "the MLP has its own shift, scale and gate, the last three.":
                       sublayer(x + attended, b.image_mlp, shift, scale, gate)})
    expect_close(mine[0], theirs[0], f"block {l}, x", tolerance=1e-3)
    if theirs[1] is None:
        expect(mine[1] is None, f"block {l} is the last one: return None for the text.")
    else:
        expect_close(mine[1], theirs[1], f"block {l}, c", tolerance=1e-3)
print(f"2.7 right, in all {len(model.blocks)} blocks")

# %% [markdown]
# Now all of it. What is given: `m.patch_embedder` (the convolution of 2.1: `m.patch_embedder(x_t)` is
# `[B, D, G, G]`), `m.time_embedder` and `m.pooled_embedder` (two small MLPs), `m.context_embedder` (a linear
# layer on the text tokens), `m.blocks`, `m.final_adaln` (of `vec`: shift and scale), `m.final_linear`, and
# `time_features(t)`, waves like those of 2.2 for the time.
#
# ```
# x   = patches of x_t, embedded, + positions                     [B, N, D]
# c   = context_embedder(context)                                 [B, T, D]
# vec = time_embedder(time_features(t)) + pooled_embedder(pooled) [B, D]
# x, c = block(x, c, vec)                                         depth times
# v   = final_linear(modulate(x, final shift, final scale)), joined to a picture
# ```
#
# ### Exercise 2.8 ★★ · The MMDiT
#
# A smaller picture takes the *middle* of the model's grid of positions (`m.config.max_grid` a side). Here the
# pictures are always as large as the grid, so $G$ is both.

# %% [markdown] tags=["slide"]
# ## The whole network
#
# ![Patches and context pass the blocks and the last layer, which are all modulated by one vector, to
# v](../diagrams/network.svg)

# %% tags=["exercise"]
def mmdit(m, x_t, t, context, pooled):
    # x_t [B, C, S, S], t [B], context [B, T, D], pooled [B, D] -> v [B, C, S, S]
    D, H, p, G = m.config.width, m.config.heads, m.config.patch, x_t.shape[-1] // m.config.patch
    # BEGIN SOLUTION 2.8
    x = m.patch_embedder(x_t).flatten(2).mT + positions(D, G)               # [B, N, D]
    c = m.context_embedder(context)                                         # [B, T, D]
    vec = m.time_embedder(time_features(t)) + m.pooled_embedder(pooled)     # [B, D]
    for b in m.blocks:
        x, c = run_block(b, x, c, vec, H)
    v = m.final_linear(modulate(x, *m.final_adaln(vec)))                    # [B, N, p * p * C]
    return to_picture(v, G, p)
    # END SOLUTION

# %% tags=["wrong"]
# says: positions are missing
def mmdit(m, x_t, t, context, pooled):
    D, H, p, G = m.config.width, m.config.heads, m.config.patch, x_t.shape[-1] // m.config.patch
    x = m.patch_embedder(x_t).flatten(2).mT
    c = m.context_embedder(context)
    vec = m.time_embedder(time_features(t)) + m.pooled_embedder(pooled)
    for b in m.blocks:
        x, c = run_block(b, x, c, vec, H)
    return to_picture(m.final_linear(modulate(x, *m.final_adaln(vec))), G, p)

# %% tags=["wrong"]
# says: pooled text is missing
def mmdit(m, x_t, t, context, pooled):
    D, H, p, G = m.config.width, m.config.heads, m.config.patch, x_t.shape[-1] // m.config.patch
    x, c = m.patch_embedder(x_t).flatten(2).mT + positions(D, G), m.context_embedder(context)
    vec = m.time_embedder(time_features(t))
    for b in m.blocks:
        x, c = run_block(b, x, c, vec, H)
    return to_picture(m.final_linear(modulate(x, *m.final_adaln(vec))), G, p)

# %% tags=["wrong"]
# says: hands on both
def mmdit(m, x_t, t, context, pooled):           # every block gets the first c
    D, H, p, G = m.config.width, m.config.heads, m.config.patch, x_t.shape[-1] // m.config.patch
    x, c = m.patch_embedder(x_t).flatten(2).mT + positions(D, G), m.context_embedder(context)
    vec = m.time_embedder(time_features(t)) + m.pooled_embedder(pooled)
    for b in m.blocks:
        x, _ = run_block(b, x, c, vec, H)
    return to_picture(m.final_linear(modulate(x, *m.final_adaln(vec))), G, p)

# %% tags=["wrong"]
# says: before the last layer x is modulated
def mmdit(m, x_t, t, context, pooled):
    D, H, p, G = m.config.width, m.config.heads, m.config.patch, x_t.shape[-1] // m.config.patch
    x, c = m.patch_embedder(x_t).flatten(2).mT + positions(D, G), m.context_embedder(context)
    vec = m.time_embedder(time_features(t)) + m.pooled_embedder(pooled)
    for b in m.blocks:
        x, c = run_block(b, x, c, vec, H)
    return to_picture(m.final_linear(x), G, p)

# %% tags=["wrong"]
# says: package's own forward
def mmdit(m, x_t, t, context, pooled):
    return m(x_t, t, context, pooled)

# %% tags=["check"]
caught = {}                                      # what reaches the last layers of the package's network
hooks = [layer.register_forward_hook(lambda _, __, out, name=name: caught.update({name: out}))
         for name, layer in (("blocks", model.blocks[-1]), ("adaln", model.final_adaln))]

def answer_of(m):
    return m(x_t, t, text.context, text.pooled)

ours = answer_of(model)
for hook in hooks:
    hook.remove()
x_last, (shift, scale) = caught["blocks"][0], caught["adaln"]
for part in (model, *model.blocks):
    part.forward = closed
try:
    yours = mmdit(model, x_t, t, text.context, text.pooled)
finally:
    for part in (model, *model.blocks):
        del part.forward
no_places = copy.deepcopy(model)
no_places.positions.zero_()
rule_out(yours, {"the positions are missing.": answer_of(no_places),
                 "the pooled text is missing in vec.": answer_of(without(model, "pooled_embedder")),
                 "the time is missing in vec.": answer_of(without(model, "time_embedder")),
                 "a block hands on both, x and c: the next one gets the new c.":
                 answer_of(without(model, "text.to_out", "text_mlp")),
                 "before the last layer x is modulated.": to_picture(model.final_linear(x_last), rows, p),
                 "the last shift and scale are exchanged.":
                 to_picture(model.final_linear(modulate(x_last, scale, shift)), rows, p)})
expect_close(yours, ours, "v", tolerance=1e-3)
order = [0, 2, 1, *range(3, text.context.shape[1])]                         # two words exchanged
swapped = mmdit(model, x_t, t, text.context[:, order], text.pooled)
print(f"2.8 right: your MMDiT predicts the package's velocity, to {(yours - ours).abs().max():.0e}")
print(f"two text tokens exchanged (the second question at the end): {(swapped - yours).abs().max():.0e}")
assert torch.allclose(swapped, yours, atol=1e-3)

# %% [markdown]
# That was a diffusion transformer. Let it draw: the four sentences below go through *your* network, 16 Euler
# steps with guidance 3, and the second row is what the package makes of the same noise.

# %%
asked = ["a big red cat on the left in the snow", "a small yellow fish in the room",
         "a big purple house on the beach", "a big orange star at night"]
their_text, null, seeds = pipe.encode_text(asked), pipe.encode_text([""] * 4), [1, 2, 3, 4]

def my_velocity(x, t, text):
    return mmdit(model, x, t, text.context, text.pooled)

def guided(x, t):
    return flow.guide(my_velocity(x, t, null), my_velocity(x, t, their_text), 3.0)

for _, mine in flow.euler(guided, flow.noise_for(seeds, tuple(x_0.shape[1:])), 16, pipe.shift):
    pass
theirs = pipe.sample(their_text, seeds, steps=16, guidance=3.0)
titles = [re.sub(" (on|in|at) ", r"\n\1 ", prompt) for prompt in asked]
show(pipe.decode_images(torch.cat([mine, theirs])), titles, ["yours", "the package"], columns=4, side=1.6)
print(f"largest difference {(mine - theirs).abs().max():.0e}")
assert torch.allclose(mine, theirs, atol=1e-2)

# %% [markdown] tags=["slide"]
# ## It draws
#
# ![Pictures drawn by the lesson's own functions, and below them those of the package](last)
#
# Above, functions of ten lines and the trained weights. Below, the package.

# %% [markdown]
# ## 6 · Why the gates begin at zero, and the last layer, too
#
# How should such a network begin? `MMDiT.initialise` sets every adaLN and the last layer to **zero**. So all
# gates are closed, each block is the identity, and $v = 0$ for every input. It sounds as if nothing could be
# learned from there. Two questions, to be answered before you read on:
#
# * In the very first step, which weights have a gradient that is not zero? And in the second?
# * What if the *output* of each MLP and attention began at zero as well, `fc2` and `to_out`, to be quite
# safe?
#
# Think of a gate and the sublayer after it as a product $g \cdot f$. Its derivatives are
# $\partial(gf)/\partial g = f$ and $\partial(gf)/\partial f = g$. If **one** factor is zero, the other one's
# gradient is zero for the moment, but its own is not: it moves, and in the next step both learn. If **both**
# are zero, both gradients are zero, and stay so for ever. The cell below takes three steps and prints the
# share of weights that have a gradient.

# %% [markdown] tags=["slide"]
# ## How should such a network begin?
#
# All gates closed, and a last layer of zeros: it answers $v = 0$ to everything.
#
# * Which weights have a gradient in the first step? And in the second?
# * What if the output of each MLP and attention began at zero *as well*?

# %%
from dataclasses import replace

torch.set_grad_enabled(True)
small = replace(config, width=64, depth=3)       # a smaller one, so that we can train it here
times = torch.linspace(0.05, 0.95, 16)
context, pooled = text.context.repeat(8, 1, 1), text.pooled.repeat(8, 1)    # [16, T, D], [16, D]
data, noise = x_0.repeat(8, 1, 1, 1), flow.noise_for(list(range(16)), tuple(x_0.shape[1:]))
noisy, v = flow.path(data, noise, times), flow.velocity_target(data, noise)  # [16, C, S, S]

def begin(kind):
    torch.manual_seed(0)
    m = MMDiT(small)                             # adaLN and final_linear are zero
    with torch.no_grad():
        for name, module in m.named_modules():
            if kind == "gates open" and "adaln" in name and hasattr(module, "weight"):
                module.weight.normal_(std=0.05)
                module.bias.normal_(std=0.5)
            if kind == "last layer random" and name == "final_linear":
                module.weight.normal_(std=0.2)
            if kind == "one zero too many" and name.endswith(("fc2", "to_out")) and "blocks" in name:
                module.weight.zero_()
    return m, torch.optim.Adam(m.parameters(), lr=2e-3)

def step(m, optimizer):
    loss = flow.squared_error(m(noisy, times, context, pooled), v)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

def share_with_gradient(m, part):
    gradients = [q.grad for name, q in m.named_parameters() if any(word in name for word in part)]
    return sum((g != 0).sum().item() for g in gradients) / sum(g.numel() for g in gradients)

parts = {"last layer": ["final_linear"], "adaLN of the blocks": ["image_adaln"],
         "queries, keys, values": ["image.to_q", "image.to_k", "image.to_v"], "MLPs": ["image_mlp"]}
kinds = ["as it is", "gates open", "last layer random", "one zero too many"]
table = {}
print(f"{'share of weights with a gradient, in step':42s}" + "".join(f"{k:>9d}" for k in (1, 2, 3)))
for kind in kinds:
    m, optimizer = begin(kind)
    print(kind)
    for k in (1, 2, 3):
        step(m, optimizer)
        for part, words in parts.items():
            table.setdefault((kind, part), []).append(share_with_gradient(m, words))
    for part in parts:
        print(f"    {part:38s}" + "".join(f"{share:9.0%}" for share in table[kind, part]))
first_step, second_step, third_step = ([table["as it is", part][k] for part in parts] for k in range(3))
assert [share > 0 for share in first_step] == [True, False, False, False]
assert [share > 0 for share in second_step] == [True, True, False, False]
assert abs(second_step[1] - 1 / 3) < 0.01 and min(third_step) > 0.9            # two of the six vectors
assert all(table["one zero too many", part] == [0, 0, 0] for part in list(parts)[1:])
assert all(min(table["gates open", part][1:]) > 0.9 for part in parts)

# %% [markdown]
# Read the first group column by column: in step 1 only the last layer learns, in step 2 the gates as well
# (two of the six vectors that an adaLN layer makes), in step 3 the other layers, too. The network wakes up
# from its end to its beginning. In the last group the blocks sleep on: $g = 0$ and $f = 0$. **Exactly one
# factor of a product may begin at zero.** (With open gates, the second group, no factor in a block is zero,
# and everything learns from step 2 on.) Lesson 4 needs this sentence again, for LoRA.
#
# What comes of it? Here are the same four beginnings, trained for 150 steps on the same 16 noised pictures.

# %%
plt.figure(figsize=(6, 2.8), layout="constrained")
last, first = {}, {}
for kind, colour, style in zip(kinds, (BLUE, GOLD, CORAL, INK), ("-", "--", ":", "-.")):
    m, optimizer = begin(kind)
    losses = [step(m, optimizer) for _ in range(150)]
    first[kind], last[kind] = losses[0], sum(losses[-10:]) / 10
    plt.semilogy(losses, style, color=colour, label=kind)
plt.gca().set(xlabel="step", ylabel="loss (Eq. 2)")
plt.legend()
plt.show()
print(f"{'loss':22s}" + "".join(f"{kind:>20s}" for kind in kinds))
for name, losses in (("at first", first), ("after 150 steps", last)):
    print(f"{name:22s}" + "".join(f"{losses[kind]:20.2f}" for kind in kinds))
of_zero = v.square().mean().item()
print(f"of v = 0, always      {of_zero:20.2f}")
assert all(abs(first[kind] - of_zero) < 1e-3 for kind in kinds if kind != "last layer random")
assert first["last layer random"] > 2 * of_zero
assert max(last["as it is"], last["gates open"]) < 0.8 * last["last layer random"]
assert last["last layer random"] < 0.8 * last["one zero too many"]
assert abs(last["as it is"] - last["gates open"]) < 0.05
asleep = [q for name, q in m.named_parameters() if "image_adaln" in name]      # m: one zero too many
assert all((q == 0).all() for q in asleep)

# %% [markdown] tags=["slide"]
# ## Exactly one factor of a product may begin at zero
#
# ![Losses over the steps for several starts; where two factors begin at zero nothing is learned](last)
#
# $\partial(gf)/\partial g = f$ and $\partial(gf)/\partial f = g$. One zero: it wakes up. Two zeros: it sleeps
# for ever.

# %% [markdown]
# Three of the four begin with the loss of $v = 0$, since their last layer is zero. *As it is* and *gates
# open* end close together; from one seed nobody can say which is better. *Last layer random* begins by
# predicting something wild: its first loss is more than twice that of predicting nothing, and after 150 steps
# it is still behind. *One zero too many* can only learn what the last layer makes of the patches by itself:
# its gates are still closed, so no token ever hears of another one, patch or word. The text reaches it
# through the pooled vector alone, in the last adaLN.
#
# ## What you can now say
#
# * A picture becomes tokens by cutting and one matrix, and comes back the same way. Attention knows no order:
# positions are added.
# * Image and text are two transformers that meet in one softmax. Each attention weight that goes to a word is
# taken from the patches.
# * Time and the pooled text speak through shift, scale and gate. All gates begin closed, and so does the last
# layer, but never two factors of one product.
#
# | you wrote | in the package |
# |---|---|
# | `to_patches`, `to_picture`, `positions` | `MMDiT.patch_embedder`, the last line of `MMDiT.forward`, `position_features` |
# | `attention`, `rms_norm`, `qkv`, `joint_attention` | `tinyflow/attention.py`: `attention`, `RMSNorm`, `Projections.qkv`, `JointAttention` |
# | `modulate`, `sublayer`, `run_block`, `mmdit` | `tinyflow/mmdit.py`: `modulate`, `Block`, `MMDiT.forward` |
#
# The package's `MMDiT.forward` has one argument more than yours, `visit`: it may put something in the text
# tokens before a block sees them. That is where a concept enters, in lesson 4.
#
# ## Three questions
#
# **1.** A patch gives 30 % of its attention to words. Could it give 30 % to words and 100 % to patches?
# <details><summary>Answer</summary>
#
# No: it is one softmax, and a row of it adds up to 1. What goes to words is taken from patches. With two
# softmaxes, as in a network with a separate cross attention, both shares would be 100 %.
# </details>
#
# **2.** You exchange the order of two words in the text tokens (after the text encoder), and nothing else.
# Does $v$ change?
# <details><summary>Answer</summary>
#
# No. Nothing in the MMDiT adds a position to text tokens, so to attention they are a set. Where a word stood
# is known to the text encoder alone, which wrote it into the tokens.
# </details>
#
# **3.** A colleague sets the last layer to zero *and* the last `final_adaln` to zero, and says: two zeros, so
# it is dead. Is it?
# <details><summary>Answer</summary>
#
# No. `final_adaln` at zero gives shift 0 and scale 0, and the factor is $1 + \text{scale} = 1$: what the last
# layer is multiplied with is not zero. So the last layer has a gradient in the first step, and `final_adaln`
# one in the second.
# </details>
#
# **Next:** lesson 3, on words.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. A patch gives 30 % of its attention to words. Could it give 30 % to words and 100 % to patches?
# 2. You exchange two text tokens after the text encoder. Does $v$ change?
# 3. The last layer is zero *and* the last adaLN is zero. Is the network dead?

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
# # 3 · Words: how a text reaches the picture, and what guidance adds
#
# **You follow a sentence to its velocity, and find the classifier that is hidden in guidance**
#
# Lesson 2 was given a text as two tensors, `context` and `pooled`. Where do they come from? And why does
# everyone draw with "guidance 3" or "guidance 7", although 1 is what the model was trained for?
#
# | | |
# |---|---|
# | Needs | lessons 1 and 2 |
# | Optional | sections 1, 5 and 6 (6 needs 5); nothing later needs them |
# | Keep open | [`text.py`](../../tinyflow/text.py), **after** you have tried |
#
# An exercise is a function whose body is blank; the cell below it checks what you write. Hints are folded.
# The solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 3 · Words
#
# How a text reaches the picture, and what guidance adds.

# %%
import copy
import difflib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tinyflow import flow
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.picturebook import world
from tinyflow.picturebook.check import follows
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.muon import Muon
from tinyflow.picturebook.reader import Reader, shows
from tinyflow.picturebook.render import render, render_all
from tinyflow.pipeline import Pipeline, Text, to_pictures, to_pixels
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.tokenizer import WordTokenizer
from tutorials.course import (BLUE, CORAL, GREY, INK, YourTurn,
                              expect, expect_close, in_lines, rule_out, several, show)

torch.set_grad_enabled(False)                    # until section 5, nothing is trained here
pipe, reader = load_tiny(), Reader.shipped()
encoder, length = pipe.encoder, pipe.tokenizer.length
side = pipe.picture_size // pipe.codec.factor
LATENT = (pipe.mmdit.config.channels, side, side)                           # the shape of one x_0
print(f"{len(world.VOCABULARY)} words, texts of {length} tokens, an encoder of {len(encoder.layers)} layers, "
      f"x_0 {list(LATENT)}")
print("the words:", " ".join(world.VOCABULARY))

# %% [markdown]
# ## 1 · Words become numbers (optional)
#
# The *tokenizer* gives every word a number, its *id*. In the picture book that is a short list of words.
# (CLIP and T5, the encoders of Stable Diffusion 3.5, cut rare words into pieces, so that no text is unknown
# to them.)
#
# ```
#  text     A   red   cat,   at   night
#  id     0   [a] [red] [cat] [at] [night]  1     1    ...     1
#       begin                              end   padding: more ends, so that all texts have one length
# ```
#
# The words have the ids 2, 3, 4, ... in the order of the vocabulary. Capital letters and the signs `.,;!?` at
# a word's edge do not count. An unknown word must not be skipped in silence: the model would draw
# *something*, and the user would blame it.
#
# ### Exercise 3.1 ★ · A tokenizer
#
# For an unknown word raise a `ValueError` whose message holds the word and those that
# `difflib.get_close_matches(word, vocabulary)` finds. A text that does not fit is a `ValueError`, too.

# %% tags=["exercise"]
def tokenize(texts, vocabulary, length):
    # texts: a list of B strings -> ids [B, length], integers
    # BEGIN SOLUTION 3.1
    number = {word: n for n, word in enumerate(vocabulary, start=2)}
    ids = torch.ones(len(texts), length, dtype=torch.long)
    ids[:, 0] = 0
    for row, text in enumerate(texts):
        words = [word.strip(".,;!?").lower() for word in text.split()]
        if len(words) > length - 2:
            raise ValueError(f"{len(words)} words are too many for {length} tokens")
        for place, word in enumerate(words, start=1):
            if word not in number:
                near = " or ".join(difflib.get_close_matches(word, vocabulary)) or "nothing near"
                raise ValueError(f"{word} is not a word of this world; there is {near}")
            ids[row, place] = number[word]
    return ids
    # END SOLUTION

# %% tags=["wrong"]
# says: Do not skip it
def tokenize(texts, vocabulary, length):         # unknown words are skipped
    number = {word: n for n, word in enumerate(vocabulary, start=2)}
    ids = torch.ones(len(texts), length, dtype=torch.long)
    ids[:, 0] = 0
    for row, text in enumerate(texts):
        words = [word.strip(".,;!?").lower() for word in text.split()]
        if len(words) > length - 2:
            raise ValueError("too long")
        known = [number[word] for word in words if word in number]
        ids[row, 1:1 + len(known)] = torch.tensor(known, dtype=torch.long)
    return ids

# %% tags=["wrong"]
# says: capital letters
def tokenize(texts, vocabulary, length):
    number = {word: n for n, word in enumerate(vocabulary, start=2)}
    ids = torch.ones(len(texts), length, dtype=torch.long)
    ids[:, 0] = 0
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split(), start=1):
            if word not in number:
                raise ValueError(f"{word}: {difflib.get_close_matches(word, vocabulary)}")
            ids[row, place] = number[word]
    return ids

# %% tags=["wrong"]
# says: first word of the vocabulary has the id 2
def tokenize(texts, vocabulary, length):
    ids = torch.ones(len(texts), length, dtype=torch.long)
    ids[:, 0] = 0
    for row, text in enumerate(texts):
        words = [word.strip(".,;!?").lower() for word in text.split()]
        ids[row, 1:1 + len(words)] = torch.tensor([vocabulary.index(word) + 1 for word in words]).long()
    return ids

# %% tags=["wrong"]
# says: filled with 1
def tokenize(texts, vocabulary, length):         # padded with the id that begins a text
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        words = [word.strip(".,;!?").lower() for word in text.split()]
        if len(words) > length - 2:
            raise ValueError("too long")
        for place, word in enumerate(words, start=1):
            if word not in vocabulary:
                raise ValueError(f"{word}: {difflib.get_close_matches(word, vocabulary)}")
            ids[row, place] = vocabulary.index(word) + 2
        ids[row, len(words) + 1] = 1
    return ids

# %% [markdown]
# <details><summary>Hint</summary>
#
# Begin with a tensor full of ones: then end and padding are there already. Column 0 is 0.
# </details>

# %% tags=["check"]
def refused(text, length=length):                # the message, or None
    try:
        tokenize([text], world.VOCABULARY, length)
    except ValueError as error:
        return str(error)

texts = ["A red cat, at night.", "", world.caption(world.seen_scene(np.random.default_rng(0), pairs=1))]
complaint = refused(texts[0])
expect(complaint is None, f"mind capital letters and signs: {texts[0]!r} is refused, with {complaint!r}.")
yours, theirs = tokenize(texts, world.VOCABULARY, length), pipe.tokenizer(texts).ids
expect(isinstance(yours, torch.Tensor) and yours.shape == theirs.shape, f"return {list(theirs.shape)} ids.")
expect(bool((yours[:, -1] == 1).all()), "what is left over of a row is filled with 1, the id of the end.")
rule_out(yours.float(), {"the first word of the vocabulary has the id 2.":
                         torch.where(theirs > 1, theirs - 1, theirs).float(),
                         "column 0 has the id 0, which begins a text.":
                         theirs.roll(-1, dims=1).clamp(1).float()})
expect_close(yours.float(), theirs.float(), "the ids")
unknown = refused("a red bal")
expect(unknown is not None, "'bal' is no word of this world. Do not skip it in silence: raise a ValueError.")
expect("bal" in unknown.split() and "ball" in unknown, "the message names the word and the words near it.")
expect(bool(refused("a cat " * 5, length=8)), "ten words do not fit into 8 tokens: that is an error, too.")
print(f"3.1 right. {texts[0]!r} -> {yours[0, :8].tolist()} ...")
print("and:", unknown)

# %% [markdown]
# ## 2 · What a causal encoder spreads
#
# The tokenizer makes a number of every word, its *id*; id 0 begins a text, and id 1 ends it and fills the
# row. `token_embedding` looks up a vector for each id, `position_embedding` adds one for its place, and from
# then on the tokens talk to one another, in a transformer that you know from lesson 2. One thing is
# different: it is **causal**. A token attends to itself and to what stands *before* it.
#
# ```
#  who asks         who is asked
#              begin   a   red  robot   in
#  begin         x     .    .     .     .
#  a             x     x    .     .     .          x  may look
#  red           x     x    x     .     .          .  may not: its score is set to minus infinity
#  robot         x     x    x     x     .             BEFORE the softmax
#  in            x     x    x     x     x
# ```
#
# A score of $-\infty$ becomes a weight of exactly 0, and the others of the row still add up to 1. One layer
# has a norm in front of each part:
#
# $$h = x+W_o\,\text{attention}(\text{norm}_1(x)), \qquad \text{layer}(x) = h+\text{MLP}(\text{norm}_2(h)).$$
#
# ### Exercise 3.2 ★★ · One layer, with its mask
#
# `layer` holds `norm1`, `norm2`, `to_q`, `to_k`, `to_v`, `to_out`, `fc1`, `fc2`, and the number of heads,
# `layer.heads`. Between `fc1` and `fc2` stands `F.gelu`.

# %% [markdown] tags=["slide"]
# ## The text encoder is causal
#
# ![A table of who asks and who is asked: each token asks itself and those before
# it](../diagrams/causal.svg)
#
# A forbidden score is $-\infty$ **before** the softmax. The row still adds up to 1.

# %% tags=["exercise"]
def causal_mask(T):
    # -> bool [T, T]: may token i (row) look at token j (column)?
    # BEGIN SOLUTION 3.2
    return torch.ones(T, T).tril().bool()
    # END SOLUTION

def text_layer(layer, x):
    # x [B, T, D] -> [B, T, D]. No F.scaled_dot_product_attention, please.
    # BEGIN SOLUTION 3.2
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))          # [B, H, T, d]
    scores = q @ k.mT / q.shape[-1] ** 0.5                                  # [B, H, T, T]
    weights = scores.masked_fill(~causal_mask(x.shape[1]), -math.inf).softmax(dim=-1)
    x = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))
    # END SOLUTION

# %% tags=["wrong"]
# says: mask comes before the softmax
def causal_mask(T):
    return torch.ones(T, T).tril().bool()

def text_layer(layer, x):
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) * causal_mask(x.shape[1])
    x = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))

# %% tags=["wrong"]
# says: MLP reads h
def causal_mask(T):
    return torch.ones(T, T).tril().bool()

def text_layer(layer, x):                        # two parts side by side
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal_mask(x.shape[1]), -math.inf).softmax(dim=-1)
    h = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
    return h + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))

# %% tags=["wrong"]
# says: to_out is missing
def causal_mask(T):
    return torch.ones(T, T).tril().bool()

def text_layer(layer, x):
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal_mask(x.shape[1]), -math.inf).softmax(dim=-1)
    x = x + rearrange(weights @ v, "b h t d -> b t (h d)")
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))

# %% tags=["wrong"]
# says: mask is not used
def causal_mask(T):
    return torch.ones(T, T).tril().bool()

def text_layer(layer, x):                        # the mask is written, and not used
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    x = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))

# %% tags=["wrong"]
# says: may look at itself
def causal_mask(T):
    return torch.ones(T, T).tril(-1).bool()

def text_layer(layer, x):
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal_mask(x.shape[1]), -math.inf).softmax(dim=-1)
    x = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))

# %% tags=["wrong"]
# says: row i asks
def causal_mask(T):
    return torch.ones(T, T).triu().bool()        # the wrong way round

def text_layer(layer, x):
    h = layer.norm1(x)
    q, k, v = (rearrange(linear(h), "b t (h d) -> b h t d", h=layer.heads)
               for linear in (layer.to_q, layer.to_k, layer.to_v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal_mask(x.shape[1]), -math.inf).softmax(dim=-1)
    x = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scores.masked_fill(~mask, -math.inf)` forbids. Heads are made and joined as in lesson 2:
# `"b t (h d) -> b h t d"` and back. `norm2` gets what the attention has been added to.
# </details>

# %% tags=["check"]
random = torch.Generator().manual_seed(0)
x = torch.randn(2, 7, encoder.config.width, generator=random)
later = x.clone()
later[:, 4:] = torch.randn(2, 3, encoder.config.width, generator=random)    # another text from token 4 on
mask = causal_mask(3)
expect(mask is not None and tuple(mask.shape) == (3, 3), "causal_mask(3) should be [3, 3].")
expect(mask.dtype == torch.bool, "causal_mask answers with True and False: .bool().")
expect(bool(mask[0, 0]), "a token may look at itself. Token 0 has nothing else to look at.")
expect(not bool(mask[0, 2]) and bool(mask[2, 0]), "row i asks, column j is asked: j may not be later than i.")
for name in ("scaled_dot_product_attention", "attend", "forward"):
    expect(name not in text_layer.__code__.co_names, f"write text_layer without {name}.")

def usual_mistakes(layer):
    def mlp(h):
        return layer.fc2(F.gelu(layer.fc1(layer.norm2(h))))

    bare = copy.deepcopy(layer)
    bare.to_out = nn.Identity()
    given, plain = layer.attend(layer.norm1(x), causal=True), bare.attend(layer.norm1(x), causal=True)
    no_norm = x + layer.attend(x, causal=True)
    no_mask = x + layer.attend(layer.norm1(x))
    attended = x + given
    q, k, v = layer.qkv(layer.norm1(x))
    scores, allowed = q @ k.mT / q.shape[-1] ** 0.5, torch.ones(7, 7).tril().bool()

    def read_by(weights):
        seen = x + layer.to_out(rearrange(weights @ v, "b h t d -> b t (h d)"))
        return seen + mlp(seen)

    too_sharp = (q @ k.mT).masked_fill(~allowed, -math.inf)
    return {"the mask is not used: every token looks at all of them.": no_mask + mlp(no_mask),
            "the MLP reads h, which has the attention's output in it, not x.": x + given + mlp(x),
            "to_out is missing.": x + plain + mlp(x + plain),
            "norm2 is missing.": attended + layer.fc2(F.gelu(layer.fc1(attended))),
            "divide the scores by the root of d, as in lesson 2.": read_by(too_sharp.softmax(-1)),
            "a forbidden score is -inf, and not 0.": read_by((scores * allowed).softmax(-1)),
            "norm1 is missing.": no_norm + mlp(no_norm),
            "x itself is missing: both parts are added to it.": given + mlp(given)}

for l, layer in enumerate(encoder.layers):
    theirs, yours = layer(x), text_layer(layer, x)
    scale = theirs.abs().max()
    if isinstance(yours, torch.Tensor) and yours.shape == x.shape:
        expect(bool(yours.isfinite().all()), "nan: -inf belongs where the mask is False, that is ~mask.")
        rule_out(yours / scale, {what: wrong / scale for what, wrong in usual_mistakes(layer).items()})
        expect(torch.allclose(yours[:, :4] / scale, text_layer(layer, later)[:, :4] / scale, atol=1e-4),
               "what comes later changes what stands before: the mask comes before the softmax.")
    expect_close(yours / scale, theirs / scale, f"layer {l} (divided by its largest entry)", tolerance=2e-3)
print(f"3.2 right, in all {len(encoder.layers)} layers")

# %% [markdown]
# Two things come out of the encoder:
#
# ```
#  ids --embeddings--> x --layer 0--> x --layer 1--> x --layer 2--> x --final_norm--> at the FIRST end --projection--> pooled
#                                                    |
#                                                    '--> context [B, T, D], one vector a token        [B, D]
# ```
#
# The *context* is the state **before** the last layer, as in Stable Diffusion. The *pooled* text is read at
# the first end token, the first place that **can** have heard of every word.
#
# ### Exercise 3.3 ★★ · The encoder
#
# `encoder` holds `token_embedding` and `position_embedding` (call them with ids and with places 0, 1, 2,
# ...), `layers`, `final_norm` and `projection`.

# %% tags=["exercise"]
def encode(encoder, ids):
    # ids [B, T] -> context [B, T, D], pooled [B, D]
    # BEGIN SOLUTION 3.3
    x = encoder.token_embedding(ids) + encoder.position_embedding(torch.arange(ids.shape[1]))
    for layer in encoder.layers:
        context, x = x, text_layer(layer, x)
    end = (ids == 1).int().argmax(dim=1)                                    # [B], the first one
    return context, encoder.projection(encoder.final_norm(x)[torch.arange(len(ids)), end])
    # END SOLUTION

# %% tags=["wrong"]
# says: BEFORE the last layer
def encode(encoder, ids):                        # the context after the last layer
    x = encoder.token_embedding(ids) + encoder.position_embedding(torch.arange(ids.shape[1]))
    for layer in encoder.layers:
        x = text_layer(layer, x)
    end = (ids == 1).int().argmax(dim=1)
    return x, encoder.projection(encoder.final_norm(x)[torch.arange(len(ids)), end])

# %% tags=["wrong"]
# says: position_embedding is missing
def encode(encoder, ids):
    x = encoder.token_embedding(ids)
    for layer in encoder.layers:
        context, x = x, text_layer(layer, x)
    end = (ids == 1).int().argmax(dim=1)
    return context, encoder.projection(encoder.final_norm(x)[torch.arange(len(ids)), end])

# %% tags=["wrong"]
# says: final_norm is missing
def encode(encoder, ids):
    x = encoder.token_embedding(ids) + encoder.position_embedding(torch.arange(ids.shape[1]))
    for layer in encoder.layers:
        context, x = x, text_layer(layer, x)
    end = (ids == 1).int().argmax(dim=1)
    return context, encoder.projection(x[torch.arange(len(ids)), end])

# %% tags=["wrong"]
# says: package's own encoder
def encode(encoder, ids):
    return encoder(ids)

# %% tags=["wrong"]
# says: FIRST end token, not at the last
def encode(encoder, ids):
    x = encoder.token_embedding(ids) + encoder.position_embedding(torch.arange(ids.shape[1]))
    for layer in encoder.layers:
        context, x = x, text_layer(layer, x)
    return context, encoder.projection(encoder.final_norm(x)[:, -1])

# %% [markdown]
# <details><summary>Hint</summary>
#
# `argmax` of zeros and ones gives the first one: `(ids == 1).int().argmax(dim=1)`. To take another token from
# each row: `x[torch.arange(B), end]`.
# </details>

# %% tags=["check"]
def closed(*_):
    expect(False, "this calls the package's own encoder: write it out.")

ids = pipe.tokenizer(["a red cat at night", "", "a robot in the snow"]).ids
(their_context, their_pooled), encoder.forward = encoder(ids), closed
try:
    given = encode(encoder, ids)
finally:
    del encoder.forward
context, pooled = several(given, ("context", "pooled"))
last = encoder.layers[-1](their_context)                                    # [B, T, D], after the last layer
no_places = copy.deepcopy(encoder)
no_places.position_embedding.weight.zero_()
rule_out(context, {"the context is the state BEFORE the last layer.": last,
                   "the context is BEFORE the last layer, and no norm follows it.": encoder.final_norm(last),
                   "the position_embedding is missing.": no_places(ids)[0]})
at_end = last[torch.arange(len(ids)), (ids == 1).int().argmax(dim=1)]
rule_out(pooled, {"pooled: at the FIRST end token, not at the last.":
                  encoder.projection(encoder.final_norm(last)[:, -1]),
                  "pooled: final_norm is missing.": encoder.projection(at_end),
                  "pooled: the projection is missing.": encoder.final_norm(at_end)})
for mine, theirs, what in ((context, their_context, "the context"), (pooled, their_pooled, "pooled")):
    expect(isinstance(mine, torch.Tensor) and mine.shape == theirs.shape,
           f"{what} should be {list(theirs.shape)}, and is {list(getattr(mine, 'shape', []))}.")
    scale = theirs.abs().max()
    expect_close(mine / scale, theirs / scale, what + ", divided by its largest entry,", tolerance=2e-3)
print(f"3.3 right: context {list(context.shape)}, pooled {list(pooled.shape)}")

# %% [markdown]
# Now we change one word and ask every token how far its context has moved, relative to its length. One row
# for each changed word, one column for each token.

# %%
sentence = "a big red robot on the left in the snow"
changes = {"big": "small", "red": "blue", "robot": "cat", "left": "right", "snow": "desert"}
words = sentence.split()
context, pooled = encode(encoder, pipe.tokenizer([sentence]).ids)
moved, of_pooled, reached = torch.zeros(len(changes), length), {}, {}
print("              before it    the word itself    "
      "tokens after it that move by 1 % or more    pooled text")
for row, (old, new) in enumerate(changes.items()):
    other = encode(encoder, pipe.tokenizer([sentence.replace(old, new)]).ids)
    moved[row] = ((other[0] - context).norm(dim=-1) / context.norm(dim=-1))[0]
    of_pooled[old] = ((other[1] - pooled).norm() / pooled.norm()).item()
    place = words.index(old) + 1
    before, itself, after = moved[row, :place], moved[row, place], moved[row, place + 1:]
    reached[old] = (after > 0.01).sum().item()
    print(f"{old + ' -> ' + new:14s} {before.max():8.0%} {itself:18.0%} {reached[old]:22d} of {len(after)}"
          f" {of_pooled[old]:34.0%}")
    assert before.max() < 1e-5 and itself > 0.05 and reached[old] > 0
assert max(reached.values()) > 2 * min(reached.values())                     # some reach many, some few
assert of_pooled["snow"] < 0.01 and max(of_pooled.values()) > 0.3
assert (moved[:, len(words) + 2:] > 0.01).any(dim=1).all()                   # every word reaches the padding

plt.figure(figsize=(9, 2.4), layout="constrained")
plt.imshow(moved, cmap="magma", vmin=0, vmax=1, aspect="auto")
plt.xticks([*range(len(words) + 2), 28], ["begin", *words, "end", "more ends: the padding"], rotation=35,
           ha="right")
plt.yticks(range(len(changes)), [f"{old} -> {new}" for old, new in changes.items()])
plt.colorbar(label="moved by", shrink=0.9)
plt.show()

# %% [markdown] tags=["slide"]
# ## Change one word: which tokens move?
#
# ![How much each token of the context moves when one word is changed](last)
#
# None before it. At it and after it, those to which the encoder has learned to pass it on.

# %% [markdown]
# Before the changed word all is black: not small, but zero. The word itself moves, and after it a token
# **may** move. Whether it does has been learned: the encoder passes some words on to many of the later
# tokens, and others to few. It uses the padding, too, to write down what it has read. And the pooled text is
# no summary here: it *could* have heard that the snow is a desert now, and it has not moved.
#
# So the context of `robot` is not the meaning of the word *robot*, but the text up to here, as far as the
# encoder kept it. In `a [V] robot in the desert` (lesson 4) the encoder reads *robot* in the place of [V].
# What is learned about [V] itself enters after the encoder, in the MMDiT.
#
# ### Two ways into the picture
#
# The context enters the MMDiT in the joint attention, where every patch can look up what it needs. The pooled
# text speaks through shift, scale and gate to all patches alike. Which one carries what? We give the model
# the real text on one way and the *empty* text on the other, and draw.

# %%
nothing = pipe.encode_text([""])

def draw(text, seeds, velocity=pipe.velocity, steps=10, g=3.0):               # pixels [B, 3, 64, 64]
    return pipe.decode(pipe.sample(text, seeds, steps, g, velocity))

def thing(name, colour, size, place, marking, accent, topper, background):
    one = world.Thing(name, colour, size, place, marking, accent, topper)
    return world.Scene((one,), background)

SAID = {"size", "colour", "place", "background", "marking", "accent", "topper"}             # by our captions
# what the reader, a network, names in a picture; accent: the marking's colour; topper: what is on the head
HEADS = ["object", "colour", "size", "place", "background", "marking", "accent", "topper"]
asked = [thing("cat", "orange", "big", "left", "dots", "white", "hat", "beach"),
         thing("robot", "purple", "small", "right", "stripes", "yellow", "crown", "meadow"),
         thing("fish", "pink", "big", "right", "checks", "blue", "antenna", "night"),
         thing("tree", "yellow", "small", "left", "dots", "red", "hat", "desert")]
captions = [world.caption(scene, said=SAID) for scene in asked]
full, seeds = pipe.encode_text(captions), [11, 12, 13, 14]
empty = nothing[[0] * len(asked)]
ways = {"both": full, "context only": Text(full.context, empty.pooled, full.slots, full.phrases),
        "pooled only": Text(empty.context, full.pooled, full.slots, full.phrases)}
pixels = {way: draw(text, seeds) for way, text in ways.items()}

def seen(pixels, scenes):                        # head -> the share of pictures that show what was said
    return follows(reader(pixels), scenes, HEADS)[0]

show([p for x in pixels.values() for p in to_pictures(x)], [in_lines(c) for c in captions], list(ways),
     columns=4, side=1.5)
found = {way: seen(x, asked) for way, x in pixels.items()}
print("share seen    " + "".join(f"{head:>11s}" for head in HEADS))
for way, row in found.items():
    print(f"{way:14s}" + "".join(f"{row[head]:11.0%}" for head in HEADS))
of_all = {way: np.mean(list(row.values())) for way, row in found.items()}
assert of_all["context only"] > 0.8 and of_all["both"] - of_all["context only"] < 0.1
assert of_all["pooled only"] < 0.5

# %% [markdown] tags=["slide"]
# ## Two ways into the picture
#
# ![Pictures drawn with both ways of the text, with the context alone, and with the pooled text alone](last)
#
# The context is looked up patch by patch, in the attention. The pooled text speaks to all patches alike.

# %% [markdown]
# With the context alone almost nothing is missing; with the pooled text alone, most is. (With four pictures,
# one more or less says nothing.)
#
# ## 3 · The null text
#
# In guidance, and in PureCC's Eq. 8, a prediction for the **empty** text $\varnothing$ is subtracted from the
# one for the text. Pretraining has to teach the model an answer to it. It does so by *caption dropout*: one
# caption in ten is replaced by nothing (`world.random_caption`). Single parts of a caption are left out as
# well.

# %%
rng = np.random.default_rng(5)
scene = world.seen_scene(rng, pairs=0).changed(style="none", light="day", marking="stripes", accent="white",
                                               topper="crown")
many = [world.random_caption(scene, rng) for _ in range(2000)]
for text in many[:7]:
    print(repr(text))
word_of = {"object": scene.things[0].object, "colour": scene.things[0].colour, "size": scene.things[0].size,
           "marking": "stripes", "topper": "crown", "background": world.BACKGROUNDS[scene.background]}
shares = {"empty": np.mean([text == "" for text in many])}
shares |= {part: np.mean([f" {word} " in f" {text} " for text in many]) for part, word in word_of.items()}
print("\n" + "   ".join(f"{part} {share:.0%}" for part, share in shares.items()))
assert abs(shares["empty"] - 0.1) < 0.02 and shares["colour"] < shares["object"]

null_pixels = draw(nothing[[0] * 6], [21, 22, 23, 24, 25, 26], steps=12, g=1)
reading = reader(null_pixels)
read = list(zip(*(reading.names(head) for head in ("colour", "object", "background"))))
show(to_pictures(null_pixels), [f"{colour} {name},\n{background}" for colour, name, background in read],
     columns=6, side=1.5)
assert len({name for _, name, _ in read}) > 2 and len({background for _, _, background in read}) > 2

# %% [markdown] tags=["slide"]
# ## The null text
#
# One caption in ten is empty in training. So the model has an answer to $\varnothing$: anything.
#
# ![Pictures that the model draws of the empty text](last)

# %% [markdown]
# Asked for nothing, the model draws all kinds of things: the titles say what a *reader* sees, a network
# trained to name what a drawing shows (lesson 5). In formulas: for every $y$ the loss of Eq. 2 is smallest
# for the mean of all velocities that were possible. Under the empty text the pictures of *all* captions came
# by. Take the mean in two steps, first for each caption:
#
# $$v(x_t\mid\varnothing) = \mathbb E[x_1-x_0\mid x_t] = \mathbb E_{y\mid x_t}\,\mathbb E[x_1-x_0\mid x_t,y] = \mathbb E_{y\mid x_t}\,v(x_t\mid y).$$
#
# **The null text is the mean of all texts**, each weighted by how well it fits $x_t$. At $t=1$ there is only
# noise, which fits all of them alike. So there we can try it: the mean of $v$ over $n$ random captions should
# come the closer to $v(\varnothing)$ the larger $n$ is.

# %%
rng, count = np.random.default_rng(4), 48
anything = [text for text in (world.random_caption(world.seen_scene(rng), rng) for _ in range(200)) if text]
x_1 = flow.noise_for([31] * count, LATENT)                                  # the same noise for all
ones = torch.ones(count)
v = pipe.velocity(x_1, ones, pipe.encode_text(anything[:count]))            # [48, C, S, S]
v_null = pipe.velocity(x_1[:1], ones[:1], nothing)
running = v.cumsum(dim=0) / torch.arange(1, count + 1).view(-1, 1, 1, 1)    # the mean of the first n
distance = (running - v_null).flatten(1).norm(dim=1) / v_null.norm()        # [48]
single = ((v - v_null).flatten(1).norm(dim=1) / v_null.norm()).mean()
plt.figure(figsize=(5, 2.5), layout="constrained")
plt.semilogx(range(1, count + 1), distance, color=BLUE, label="mean of n captions")
plt.axhline(single, color=INK, ls="--", label="one caption, on average")
plt.gca().set(xlabel="n", ylabel="distance to $v(\\varnothing)$", title="relative, at t = 1", ylim=(0, None),
              xticks=[1, 4, 16, count], xticklabels=[1, 4, 16, count])
plt.minorticks_off()
plt.legend()
plt.show()
print(f"one caption is {single:.1%} away from the null text, the mean of {count} is {distance[-1]:.1%}")
assert 0.05 < distance[-1] < 0.7 * single

# %% [markdown]
# It comes closer, and it does not come to zero: nothing in the network makes one answer the mean of the
# others.
#
# So $v(y)-v(\varnothing)$ is what the text $y$ says **beyond the average**. Guidance uses this difference,
# and PureCC calls it the representation $R$ of a concept (lesson 6).
#
# ## 4 · Guidance
#
# $v_g = v_\varnothing+g\,(v_y-v_\varnothing)$ (Eq. 5) is yours since lesson 1 (`flow.guide`). With a network,
# a step needs two predictions, computed as one batch of twice the size; with $g=1$ or $g=0$ it needs one.
#
# ### Exercise 3.4 ★ · The guided velocity, in one call
#
# `theta(x, t, text)` predicts. `Text.cat([a, b])` puts two encoded texts one below the other.

# %% tags=["exercise"]
def guided(theta, x, t, text, null, g):
    # x [B, C, S, S], t [B], text and null of B rows -> v_g [B, C, S, S], with ONE call of theta
    # BEGIN SOLUTION 3.4
    if g in (0, 1):
        return theta(x, t, text if g == 1 else null)
    v_null, v_text = theta(torch.cat([x, x]), torch.cat([t, t]), Text.cat([null, text])).chunk(2)
    return flow.guide(v_null, v_text, g)
    # END SOLUTION

# %% tags=["wrong"]
# says: two halves are exchanged
def guided(theta, x, t, text, null, g):
    if g in (0, 1):
        return theta(x, t, text if g == 1 else null)
    v_null, v_text = theta(torch.cat([x, x]), torch.cat([t, t]), Text.cat([text, null])).chunk(2)
    return flow.guide(v_null, v_text, g)

# %% tags=["wrong"]
# says: called once for g = 3
def guided(theta, x, t, text, null, g):
    if g in (0, 1):
        return theta(x, t, text if g == 1 else null)
    return flow.guide(theta(x, t, null), theta(x, t, text), g)

# %% tags=["wrong"]
# says: g = 1 asks for the text, g = 0 for the empty one
def guided(theta, x, t, text, null, g):
    if g in (0, 1):
        return theta(x, t, text if g == 0 else null)
    v_null, v_text = theta(torch.cat([x, x]), torch.cat([t, t]), Text.cat([null, text])).chunk(2)
    return flow.guide(v_null, v_text, g)

# %% tags=["wrong"]
# says: needs 2 predictions for 2 pictures
def guided(theta, x, t, text, null, g):          # always both predictions
    v_null, v_text = theta(torch.cat([x, x]), torch.cat([t, t]), Text.cat([null, text])).chunk(2)
    return flow.guide(v_null, v_text, g)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `theta(torch.cat([x, x]), torch.cat([t, t]), ...).chunk(2)` gives both predictions, in the order in which
# `Text.cat` put the texts.
# </details>

# %% tags=["check"]
rows = []

def counting(x, t, text):
    rows.append(len(x))
    return pipe.velocity(x, t, text)

x, t = flow.noise_for([1, 2], LATENT), torch.tensor([0.9, 0.9])
text, null = full[:2], nothing[[0, 0]]
v_text, v_null = pipe.velocity(x, t, text), pipe.velocity(x, t, null)
for g in (3.0, 1.0, 0.0):
    rows.clear()
    yours = guided(counting, x, t, text, null, g)
    mistake = ("the two halves are exchanged: they come in the order of the texts." if g == 3 else
               "g = 1 asks for the text, g = 0 for the empty one.")
    rule_out(yours, {mistake: flow.guide(v_text, v_null, g)})
    expect_close(yours, flow.guide(v_null, v_text, g), f"v_g for g = {g:.0f}", tolerance=1e-3)
    expect(len(rows) == 1, f"theta should be called once for g = {g:.0f}, and was called {len(rows)} times.")
    expect(g == 3 or rows == [2],
           f"g = {g:.0f} needs 2 predictions for 2 pictures, and theta computed {rows[0]}.")
print("3.4 right")

# %% [markdown]
# ### The classifier inside
#
# Why should it be good to go *further* than the text says? Because of a classifier that nobody has trained.
#
# **From velocity to score.** With Eq. 1, $v=\mathbb E[x_1-x_0\mid x_t]$ is $(\mathbb E[x_1\mid
# x_t]-x_t)/(1-t)$. The noise has a second meaning. For one $x_0$, $x_t$ is normal with mean $(1-t)\,x_0$ and
# deviation $t$, so $\nabla_{x_t}\log p(x_t\mid x_0)=-x_1/t$. The mean over all $x_0$ that fit is the *score*
# (since $\nabla p(x_t)=\mathbb E[p(x_t\mid x_0)\,\nabla\log p(x_t\mid x_0)]$; divide by $p(x_t)$):
# $\nabla\log p(x_t)=-\mathbb E[x_1\mid x_t]/t$. Together:
#
# $$v = -\frac{x_t+t\,\nabla\log p(x_t)}{1-t} \qquad\Longleftrightarrow\qquad \nabla\log p(x_t) = -\frac{x_t+(1-t)\,v}{t}.$$
#
# **Bayes.** $p(y\mid x_t)=p(x_t\mid y)\,p(y)/p(x_t)$. Take the logarithm and the gradient; $p(y)$ does not
# depend on $x_t$ and is gone. *The gradient of a classifier is the difference of two scores*:
#
# $$\nabla\log p(y\mid x_t) = \nabla\log p(x_t\mid y)-\nabla\log p(x_t) = \;?$$
#
# The question mark is your exercise: in $v_y$, $v_\varnothing$ and $t$.
#
# **Guidance.** Put $v_g$ into the formula on the right. It is the velocity that belongs to the score
#
# $$\nabla\log p(x_t)+g\,\nabla\log p(y\mid x_t) = \nabla\log\big[\,p(x_t)\,p(y\mid x_t)^g\,\big].$$
#
# With $g=1$ this is $p(x_t\mid y)$, what we asked for. With $g=3$ the classifier has three votes.
#
# ### Exercise 3.5 ★★ · The gradient of the hidden classifier

# %% [markdown] tags=["slide"]
# ## The classifier inside
#
# $$v = -\frac{x_t + t\,\nabla \log p(x_t)}{1-t}$$
#
# $$\nabla \log p(y \mid x_t) = \nabla \log p(x_t \mid y) - \nabla \log p(x_t)$$
#
# The score of a text, minus that of no text, is the gradient of a hidden classifier $p(y\mid x_t)$. So $v_g$
# belongs to the score of $\;p(x_t)\;p(y \mid x_t)^g$. With $g = 3$ the classifier has three votes.

# %% tags=["exercise"]
def classifier_gradient(v_null, v_text, t):
    # velocities [B, ...], t a number in (0, 1) -> the gradient of log p(y | x_t) with respect to x_t
    # BEGIN SOLUTION 3.5
    return -(1 - t) / t * (v_text - v_null)
    # END SOLUTION

# %% tags=["wrong"]
# says: the sign
def classifier_gradient(v_null, v_text, t):      # a velocity goes toward noise, a score toward data
    return (1 - t) / t * (v_text - v_null)

# %% tags=["wrong"]
# says: factor (1 - t) / t is missing
def classifier_gradient(v_null, v_text, t):
    return -(v_text - v_null)

# %% tags=["wrong"]
# says: 1 - t is missing
def classifier_gradient(v_null, v_text, t):
    return -(v_text - v_null) / t

# %% tags=["wrong"]
# says: upside down
def classifier_gradient(v_null, v_text, t):
    return -t / (1 - t) * (v_text - v_null)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Write the formula for $\nabla\log p$ once with $v_y$ and once with $v_\varnothing$, and subtract.
# </details>

# %% [markdown]
# The check needs a world in which $p(y\mid x_t)$ is known: numbers $x_0$ in two classes, $y=+1$ and $y=-1$,
# each a normal distribution around $y$ with deviation 0.8.

# %% tags=["check"]
def log_p(x, t, y):                              # log p(x_t | y), for points x [N]
    return torch.distributions.Normal((1 - t) * y, (((1 - t) * 0.8) ** 2 + t ** 2) ** 0.5).log_prob(x)

def log_classifier(x, t):                        # log p(y = +1 | x_t)
    return log_p(x, t, 1) - torch.logaddexp(log_p(x, t, 1), log_p(x, t, -1))

def v_class(x, t, y):                            # v(x_t | y) = (x_t - E[x_0 | x_t, y]) / t
    variance = ((1 - t) * 0.8) ** 2 + t ** 2
    return (x - y - (1 - t) * 0.8 ** 2 / variance * (x - (1 - t) * y)) / t

def v_of_all(x, t):                              # the null text: the mean of both, weighted by p(y | x_t)
    plus = log_classifier(x, t).exp()
    return plus * v_class(x, t, 1) + (1 - plus) * v_class(x, t, -1)

x = torch.linspace(-3, 3, 25)
for t in (0.1, 0.4, 0.8):
    with torch.enable_grad():
        point = x.clone().requires_grad_(True)
        exact, = torch.autograd.grad(log_classifier(point, t).sum(), point)
    yours = classifier_gradient(v_of_all(x, t), v_class(x, t, 1), t)
    rule_out(yours, {"the sign: v points to noise, a score to data.": -exact,
                     "the factor (1 - t) / t is missing.": exact * t / (1 - t),
                     "1 - t is missing: v is multiplied with it in the score.": exact / (1 - t),
                     "the fraction is upside down.": exact * (t / (1 - t)) ** 2})
    expect_close(yours, exact, f"the gradient of log p(y | x_t) at t = {t}", tolerance=1e-3)
print("3.5 right: two velocities hold the gradient of a classifier, and autograd agrees")

# %% [markdown]
# Below, grey: the density of all points. Lines: $p(x)\,p(y\mid x)^g$. Filled: where 4000 samples end that
# follow $v_g$ from noise.

# %%
x = torch.linspace(-4, 6, 1001)
start = torch.randn(4000, generator=torch.Generator().manual_seed(5))
figure, axes = plt.subplots(1, 4, figsize=(9, 2.2), layout="constrained", sharey=True)
print("  g    doubtful: p(y | x) < 0.9      mean (line)    deviation (line)")
beyond, narrower, doubtful, deviation = {}, {}, [], []
for axis, g in zip(axes, (0, 1, 2, 5)):
    for _, end in flow.euler(lambda x, t: flow.guide(v_of_all(x, t[0]), v_class(x, t[0], 1), g), start, 60):
        pass
    everything = torch.logaddexp(log_p(x, 0, 1), log_p(x, 0, -1)).exp() / 2
    tilted = everything * (g * log_classifier(x, 0)).exp()
    axis.fill_between(x, everything, color=GREY, alpha=0.5, lw=0)
    axis.hist(end.clamp(-4, 6), bins=60, density=True, color=CORAL, alpha=0.6)
    tilted = tilted / tilted.sum()
    middle = (tilted * x).sum()
    width = (tilted * (x - middle) ** 2).sum().sqrt()
    axis.plot(x, tilted / (x[1] - x[0]), color=INK)
    axis.set(title=f"g = {g}", xlabel="x", yticks=[])
    beyond[g], narrower[g] = end.mean() - middle, end.std() / width
    doubtful.append((log_classifier(end, 0).exp() < 0.9).float().mean())
    deviation.append(end.std())
    print(f"{g:3d} {doubtful[-1]:27.0%} {end.mean():9.2f} ({middle:4.2f}) {end.std():12.2f} ({width:4.2f})")
plt.show()
assert abs(beyond[1]) < 0.05 and abs(narrower[1] - 1) < 0.07                 # g = 1 is on the line
assert beyond[5] > 0.7 and narrower[5] < 0.8                                 # g = 5 is far beyond it
assert doubtful == sorted(doubtful, reverse=True) and deviation == sorted(deviation, reverse=True)

# %% [markdown] tags=["slide"]
# ## Three votes for the classifier
#
# ![Four densities, for g = 0, 1, 2 and 5: they move and become narrow](last)
#
# Fewer doubtful samples, and less variety. Line: $p(x)\,p(y \mid x)^g$. Filled: what the guided flow makes.

# %% [markdown]
# With $g=1$ samples and line agree: this is $p(x\mid y)$. With a larger $g$, points that could belong to the
# other class disappear, and so does variety: the deviation falls. And the samples no longer lie on the line:
# at $g=5$ their mean is almost one unit to the right of it. The formula above holds **at each time**, but the
# noised form of $p(x_0)\,p(y\mid x_0)^g$ is not $p(x_t)\,p(y\mid x_t)^g$. Guidance is a push with a clear
# reason, and not a way to draw from a known distribution.
#
# ### Measured on pictures
#
# The real model: four captions, six seeds each, at five values of $g$.
#
# * **Fidelity**: of everything that the captions say, the share that the reader network sees in the picture.
# * **Diversity**: of the numbers that no caption can say (exact hue, width, size of the eyes, ...), the
# standard deviation over the seeds of one caption. Real renders of the same captions tell what it should be.

# %%
per_caption, guidances = 6, [0, 1, 2, 3, 5]
scenes = [scene for scene in asked for _ in range(per_caption)]             # 24 rows
rows = [n for n in range(len(asked)) for _ in range(per_caption)]
text, null = full[rows], nothing[[0] * len(rows)]
x_1 = flow.noise_for(list(range(100, 100 + len(rows))), LATENT)
visible = [k for k, trait in enumerate(world.TRAITS)                        # a picture may lack its marking
           if shows(asked[0], 0, trait) and not trait.startswith("marking")]

def spread(pixels):                              # of the unnamed traits, over the seeds of one caption
    traits = reader(pixels).traits[:, 0, visible]                           # [24, traits]
    return traits.unflatten(0, (len(asked), per_caption)).std(dim=1).mean().item()

pictures, fidelity, diversity = {}, {}, {}
for g in guidances:
    for _, x in flow.euler(lambda x, t: guided(pipe.velocity, x, t, text, null, g), x_1, 10, pipe.shift):
        pass
    pictures[g] = pipe.decode(x)
    fidelity[g], diversity[g] = seen(pictures[g], scenes), spread(pictures[g])
mean = {g: np.mean(list(row.values())) for g, row in fidelity.items()}

rng = np.random.default_rng(6)
true = [scene.changed(identity=world.random_identity(rng), seed=n) for n, scene in enumerate(scenes)]
true_pixels = to_pixels(render_all(true)[0])
of_renders = spread(true_pixels)
print("share seen" + "".join(f"{head:>11s}" for head in HEADS) + "        all  diversity")
for name, row, other in [(f"g = {g}", fidelity[g], diversity[g]) for g in guidances] + [
        ("renders", seen(true_pixels, true), of_renders)]:
    last = "" if name == "g = 0" else f"{other:11.2f}"
    values = [*row.values(), np.mean(list(row.values()))]
    print(f"{name:10s}" + "".join(f"{value:11.0%}" for value in values) + last)
assert mean[0] < 0.5 and mean[1] > 0.8 and min(mean[2], mean[3]) > mean[1]
assert min(fidelity[1], key=fidelity[1].get) == "marking"
assert fidelity[3]["marking"] > fidelity[1]["marking"] + 0.1
assert of_renders - diversity[1] > diversity[1] - diversity[5] > 0           # most is lost at g = 1 already

# %%
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
axis.plot(guidances, [mean[g] for g in guidances], "o-", color=BLUE)
axis.set(xlabel="guidance g", ylim=(0, 1.05), xticks=guidances)
axis.set_ylabel("round: share of said parts seen")
right = axis.twinx()
right.plot(guidances[1:], [diversity[g] for g in guidances[1:]], "s--", color=CORAL)
right.axhline(of_renders, color=CORAL, ls=":")
right.annotate("renders (right axis)", (0, of_renders), va="bottom", color=CORAL)
right.set_ylabel("square: spread of unnamed traits")
right.set_ylim(0, 1.15 * max(of_renders, *diversity.values()))
right.spines["right"].set_visible(True)
plt.show()

# %% [markdown] tags=["slide"]
# ## Fidelity and diversity, measured
#
# ![What is seen of the captions, and how much the rest varies, over the guidance](last)
#
# What the captions say is seen more often with guidance. The spread is smaller than that of renders already
# without any.

# %%
first = [row * per_caption for row in range(len(asked))]
show([p for g in guidances for p in to_pictures(pictures[g][first])], [in_lines(c) for c in captions],
     [f"g = {g}" for g in guidances], columns=4, side=1.3)

# %% [markdown]
# At $g=0$ the text is ignored. (The objects themselves differ then, so diversity is left out.) Most words
# need no guidance to be heard. Markings fail most often at $g=1$, and come back with a larger $g$: guidance
# enlarges a difference that is there. And diversity? From renders to $g=1$ it falls
# further than from there to $g=5$.
#
# A good rule is **the smallest $g$ beyond which nothing more of the text is seen**. The package draws with 3.
#
# ## 5 · Eight words, learned from nothing (optional)
#
# You train a model that has never seen a word. Its world is small: a ball or a robot in the snow, in eight
# colours, looked at from near by. The classes are the real ones, in a smaller size, and the codec is the one
# that is there. Everything else begins at random: `red` and `blue` are two numbers without a meaning.

# %%
OBJECTS, COLOURS = ("ball", "robot"), world.COLOURS
NEAR = slice(28, 60), slice(16, 48)                                         # rows and columns that we look at

def near_by(name, colour, rng):                  # an individual: the picture and its mask, 32 x 32
    one = world.Thing(name, colour, "small", "middle", identity=world.random_identity(rng))
    picture, masks = render(world.Scene((one,), "snow", seed=int(rng.integers(2**31))))
    return picture[NEAR], masks[0][NEAR]

rng = np.random.default_rng(7)
kinds = [(name, colour) for name in OBJECTS for colour in COLOURS]          # 16 kinds
labels = kinds * 16                                                         # 256 pictures
pictures, masks = map(np.stack, zip(*(near_by(*kind, rng) for kind in labels)))
texts = [f"a {colour} {name}" for name, colour in labels]
data = pipe.encode_images(pictures)                                         # [256, 16, 8, 8]
show(pictures[:16], COLOURS, OBJECTS, columns=8, side=1)
print(f"x_0 {list(data.shape)}, for example of {texts[0]!r}")

# %% [markdown]
# To read a picture, take the pixels that belong to the object in *all* pictures of its kind, and their mean
# colour. The colour whose own mean, over the training pictures, is nearest is what the picture shows.

# %%
def mean_colour(pixels, name):                   # pixels [B, 3, 32, 32] -> [B, 3]
    inside = np.stack([mask for mask, label in zip(masks, labels) if label[0] == name]).all(axis=0)
    return pixels[..., torch.tensor(inside)].mean(dim=-1)

renders = to_pixels(pictures)
def of_kind(kind):
    return renders[[label == kind for label in labels]]

means = {name: torch.stack([mean_colour(of_kind((name, colour)), name).mean(dim=0) for colour in COLOURS])
         for name in OBJECTS}                                               # [8, 3] each

def colours_of(pixels, kinds):                   # the colour that each picture shows
    return [COLOURS[torch.cdist(mean_colour(x[None], name), means[name]).argmin()]
            for x, (name, _) in zip(pixels, kinds)]

def share_right(pixels, kinds):
    return np.mean([found == colour for found, (_, colour) in zip(colours_of(pixels, kinds), kinds)])

rng = np.random.default_rng(8)
fresh = to_pixels(np.stack([near_by(*kind, rng)[0] for kind in kinds * 2]))
on_renders = share_right(fresh, kinds * 2)
print(f"right on {on_renders:.0%} of 32 fresh renders; by chance it would be {1 / len(COLOURS):.0%}")
assert on_renders > 0.9

# %% [markdown]
# ### The training step
#
# It is the loss of lesson 1, with a text. One caption in ten is replaced by "", each for itself.
#
# ### Exercise 3.6 ★ · Caption dropout

# %% [markdown] tags=["slide"]
# ## The training step
#
# ```
# captions   one in ten becomes ""
# t          logit-normal, shifted by 3
# x_t        (1 - t) x_0 + t x_1                        Eq. 1
# target     x_1 - x_0
# loss       mean of (v(x_t, t | text) - target)^2      Eq. 2
# ```

# %% tags=["exercise"]
def drop_captions(captions, share, generator):
    # captions: B texts -> B texts; each is replaced by "" with the probability `share`
    # BEGIN SOLUTION 3.6
    coins = torch.rand(len(captions), generator=generator)
    return ["" if coin < share else caption for coin, caption in zip(coins, captions)]
    # END SOLUTION

# %% tags=["wrong"]
# says: coin of its own
def drop_captions(captions, share, generator):   # one coin for the whole batch
    coin = torch.rand(1, generator=generator)
    return [""] * len(captions) if coin < share else list(captions)

# %% tags=["wrong"]
# says: that is kept
def drop_captions(captions, share, generator):
    coins = torch.rand(len(captions), generator=generator)
    return ["" if coin > share else caption for coin, caption in zip(coins, captions)]

# %% tags=["wrong"]
# says: from the generator
def drop_captions(captions, share, generator):
    coins = torch.rand(len(captions))
    return ["" if coin < share else caption for coin, caption in zip(coins, captions)]

# %% tags=["wrong"]
# says: as many captions
def drop_captions(captions, share, generator):   # thrown out, not replaced
    coins = torch.rand(len(captions), generator=generator)
    return [caption for coin, caption in zip(coins, captions) if coin > share]

# %% tags=["check"]
random, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
dropped = [drop_captions(texts, 0.1, random) for _ in range(8)]
expect(None not in dropped, "drop_captions returned None: is the return missing?")
expect(all(len(some) == len(texts) for some in dropped), "return as many captions as came in.")
empty_share = [sum(text == "" for text in some) / len(texts) for some in dropped]
expect(min(empty_share) < 0.8, "0.1 is the share that is dropped, not the share that is kept.")
expect(all(0 < share < 0.2 for share in empty_share), "each caption throws a coin of its own: of 256 about "
       f"26 become empty, and in your batches {[round(256 * share) for share in empty_share]}.")
expect(drop_captions(texts, 0.1, again) == dropped[0], "take the coins from the generator: the same seed, "
       "the same captions.")
same = [new in ("", old) for some in dropped for new, old in zip(some, texts)]
expect(all(same), "a caption that is not dropped stays as it was.")
print("3.6 right: of 256 captions became empty", *[round(256 * share) for share in empty_share])

# %% [markdown]
# The loop below uses *Muon*, the optimizer that trained the base model as well. Now and then it stops to draw
# the same 16 texts from the same noise.

# %%
GUIDANCE = 2
ASKED = [f"a {colour} {name}" for name, colour in kinds]                    # two objects in eight colours

def new_model(seed):
    torch.manual_seed(seed)
    tokenizer = WordTokenizer(["a", *COLOURS, *OBJECTS], length=6)
    text_config = TextConfig(tokenizer.vocabulary_size, 6, width=64, depth=2, hidden=256, pooled_width=64)
    config = MMDiTConfig(width=64, depth=3, context_width=64, pooled_width=64, max_grid=4, base_grid=4)
    return Pipeline(tokenizer, TextEncoder(text_config), MMDiT(config), pipe.codec, 32, pipe.shift)

def flow_loss(model, x_0, x_1, t, captions):     # the text is encoded here, so the encoder is trained as well
    v = model.velocity(flow.path(x_0, x_1, t), t, model.encode_text(captions))
    return flow.squared_error(v, flow.velocity_target(x_0, x_1))               # Eq. 2

def pictures_of(model, texts, g, seeds=range(16)):                          # pixels [16, 3, 32, 32]
    text, null = model.encode_text(texts), model.encode_text([""] * len(texts))
    for _, x in flow.euler(lambda x, t: guided(model.velocity, x, t, text, null, g),
                           flow.noise_for(list(seeds), tuple(data.shape[1:])), 10, model.shift):
        pass
    return model.decode(x)

def train(steps, dropout=0.1, seed=0, looks=(), batch=32):
    model, random = new_model(seed), torch.Generator().manual_seed(seed)
    learned = nn.ModuleList([model.encoder, model.mmdit])
    optimizer = Muon(learned, 2e-3, 0.02, ("embedding", "embedder", "final_linear", "adaln", "projection"))
    losses, looked = [], {0: pictures_of(model, ASKED, GUIDANCE)} if looks else {}
    for k in range(steps):
        chosen = torch.randint(len(data), (batch,), generator=random)
        captions = drop_captions([texts[n] for n in chosen], dropout, random)
        x_0, t = data[chosen], flow.training_times(batch, model.shift, random)
        x_1 = torch.randn(x_0.shape, generator=random)
        with torch.enable_grad():
            loss = flow_loss(model, x_0, x_1, t, captions)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.scale_rates(min(1, (k + 1) / 20, 2 * (1 - k / steps)))      # up, flat, and down to zero
        optimizer.step()
        losses.append(loss.item())
        if k + 1 in looks:
            looked[k + 1] = pictures_of(model, ASKED, GUIDANCE)
    return model, losses, looked

steps = 300
student, losses, looked = train(steps, looks=(50, 100, 300))
shares = {k: share_right(x, kinds) for k, x in looked.items()}
print("\n".join(f"step {k:4d}: {share:4.0%} of the colours read back" for k, share in shares.items()))
late = {"100 to 150": np.mean(losses[100:150]), "250 to 300": np.mean(losses[250:])}
print("mean loss", ", ".join(f"in steps {when}: {loss:.2f}" for when, loss in late.items()))
assert shares[0] < 0.4 and shares[steps] >= 0.9 and late["250 to 300"] < late["100 to 150"]

# %%
figure, axis = plt.subplots(figsize=(5.6, 2.6), layout="constrained")
axis.plot(losses, color=GREY, lw=0.6)
smooth = np.convolve(losses, np.ones(25) / 25, mode="valid")
axis.plot(np.arange(len(smooth)) + 12, smooth, color=BLUE)
axis.set(xlabel="step", ylabel="line: loss (Eq. 2)")
right = axis.twinx()
right.plot(list(shares), list(shares.values()), "o--", color=CORAL)
right.axhline(1 / len(COLOURS), color=CORAL, ls=":")
right.set_ylim(0, 1.05)
right.set_ylabel("round: colours read back")
right.spines["right"].set_visible(True)
plt.show()

# %%
some = list(range(0, 16, 2))                                                # four colours of each object
names = [ASKED[n].removeprefix("a ").replace(" ", "\n") for n in some]
show([p for x in looked.values() for p in to_pictures(x[some])], names, [f"step {k}" for k in looked],
     columns=8, side=1)

# %% [markdown] tags=["slide"]
# ## Eight words, learned from nothing
#
# ![Pictures of the same texts and noise before, during and after training](last)
#
# The same noise and the same texts, before, during and after the training.

# %% [markdown]
# At step 0 the model answers $v=0$, so the noise stays noise. After 300 steps it draws the colour that
# was asked for.
#
# ### And without caption dropout?
#
# Train once more, the same steps from the same seed, but no caption is ever dropped. What will this model
# draw for a text with $g=1$? With $g=3$? And for the empty text?

# %%
without, _, _ = train(steps, dropout=0.0)
rows, readback, of_empty = [], {}, {}
for name, model in (("dropout 10 %", student), ("no dropout", without)):
    for g in (1, 3, 6):
        x = pictures_of(model, ASKED, g)
        readback[name, g] = share_right(x, kinds)
        rows.append((f"{name}\ng = {g}", x[some]))
    x = pictures_of(model, [""] * 16, 1)
    of_empty[name] = colours_of(x, kinds)
    rows.append((f"{name}\nempty text", x[some]))
show([p for _, x in rows for p in to_pictures(x)], names, [label for label, _ in rows], columns=8, side=0.9)
for name, found in of_empty.items():
    counts = {colour: found.count(colour) for colour in COLOURS if colour in found}
    shares = ", ".join(f"g = {g}: {readback[name, g]:.0%}" for g in (1, 3, 6))
    print(f"{name:13s}colours read back at {shares}")
    print(" " * 13 + "the empty text draws " + ", ".join(f"{n} {colour}" for colour, n in counts.items()))
assert min(readback["no dropout", 1], readback["dropout 10 %", 1]) > 0.8
guided_right = {name: readback[name, 3] + readback[name, 6] for name in of_empty}
assert guided_right["no dropout"] < guided_right["dropout 10 %"]
assert len(set(of_empty["no dropout"])) < len(set(of_empty["dropout 10 %"]))

# %% [markdown]
# With $g=1$ both models draw the colours: the null text is not needed. But one of them never met an empty
# text. Look at its answer: a few colours, from all noises. Guidance goes *away* from $v_\varnothing$, here
# away from these accidental colours, and with it fewer colours come out right than with dropout. (Two
# trainings, 16 pictures each: a hint.)
#
# ## 6 · The model reads (optional)
#
# A model that draws `red` should be able to *recognise* red. By Bayes, and because the loss of Eq. 2 bounds
# $-\log p(x_0\mid y)$ (with the right weight for each $t$): **the caption that predicts the velocity best is
# the one that fits the picture.** Noise the picture, predict with every caption, see whose error is smallest.
# The error depends on the noise, too. So **all captions are tried on the same noise**.
#
# ### Exercise 3.7 ★★★ · Errors of captions

# %% tags=["exercise"]
def caption_errors(model, x_0, captions, noises, times):
    # x_0 [B, C, h, w]; K captions; M noises, each [B, C, h, w]; M times, each a number
    # -> [B, K]: for each picture and caption the mean squared error of v, a mean over the M draws
    # BEGIN SOLUTION 3.7
    B, errors = len(x_0), torch.zeros(len(x_0), len(captions))
    for x_1, time in zip(noises, times):
        t = torch.full((B,), time)
        x_t, target = flow.path(x_0, x_1, t), flow.velocity_target(x_0, x_1)
        for k, caption in enumerate(captions):
            v = model.velocity(x_t, t, model.encode_text([caption] * B))
            errors[:, k] += (v - target).square().flatten(1).mean(dim=1) / len(times)
    return errors
    # END SOLUTION

# %% tags=["wrong"]
# says: noises that are given
def caption_errors(model, x_0, captions, noises, times):                    # new noise for each caption
    B, errors = len(x_0), torch.zeros(len(x_0), len(captions))
    for time in times:
        for k, caption in enumerate(captions):
            t, x_1 = torch.full((B,), time), torch.randn(x_0.shape)
            v = model.velocity(flow.path(x_0, x_1, t), t, model.encode_text([caption] * B))
            errors[:, k] += (v - (x_1 - x_0)).square().flatten(1).mean(dim=1) / len(times)
    return errors

# %% tags=["wrong"]
# says: mean over the draws, not their sum
def caption_errors(model, x_0, captions, noises, times):
    B, errors = len(x_0), torch.zeros(len(x_0), len(captions))
    for x_1, time in zip(noises, times):
        t = torch.full((B,), time)
        for k, caption in enumerate(captions):
            v = model.velocity(flow.path(x_0, x_1, t), t, model.encode_text([caption] * B))
            errors[:, k] += (v - (x_1 - x_0)).square().flatten(1).mean(dim=1)
    return errors

# %% tags=["wrong"]
# says: last draw
def caption_errors(model, x_0, captions, noises, times):                    # = in the place of +=
    B, errors = len(x_0), torch.zeros(len(x_0), len(captions))
    for x_1, time in zip(noises, times):
        t = torch.full((B,), time)
        for k, caption in enumerate(captions):
            v = model.velocity(flow.path(x_0, x_1, t), t, model.encode_text([caption] * B))
            errors[:, k] = (v - (x_1 - x_0)).square().flatten(1).mean(dim=1)
    return errors

# %% tags=["wrong"]
# says: no mean over the batch
def caption_errors(model, x_0, captions, noises, times):                    # a mean over the pictures as well
    B, errors = len(x_0), torch.zeros(len(x_0), len(captions))
    for x_1, time in zip(noises, times):
        t = torch.full((B,), time)
        for k, caption in enumerate(captions):
            v = model.velocity(flow.path(x_0, x_1, t), t, model.encode_text([caption] * B))
            errors[:, k] += (v - (x_1 - x_0)).square().mean() / len(times)
    return errors

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two loops: over the draws (noise and time), and inside over the captions. One error for each picture:
# `(v - target).square().flatten(1).mean(dim=1)`.
# </details>

# %% tags=["check"]
noises = [flow.noise_for(three, tuple(data.shape[1:])) for three in ([40, 41, 42], [43, 44, 45])]
yours = caption_errors(student, data[:3], ["a red ball", "a blue ball"], noises, [0.6, 0.8])
each = torch.zeros(2, 3, 2)                                                 # [draws, pictures, captions]
for m, (x_1, time) in enumerate(zip(noises, (0.6, 0.8))):
    for n in range(3):
        for k, caption in enumerate(("a red ball", "a blue ball")):
            t = torch.tensor([time])
            v = student.velocity(flow.path(data[n:n + 1], x_1[n:n + 1], t), t, student.encode_text([caption]))
            each[m, n, k] = flow.squared_error(v, flow.velocity_target(data[n:n + 1], x_1[n:n + 1]))
ours = each.mean(dim=0)
expect(isinstance(yours, torch.Tensor) and yours.shape == ours.shape, "return errors [B, K].")
expect(not torch.allclose(yours[0], yours[1]), "each picture has errors of its own: no mean over the batch.")
rule_out(yours, {"a mean over the draws, not their sum.": each.sum(dim=0),
                 "this is the last draw alone: take the mean over all of them.": each[-1]})
expect_close(yours, ours, "the errors (of all captions on the noises that are given)", tolerance=1e-3)
print(f"3.7 right: for a {labels[0][1]} {labels[0][0]}, 'a red ball' has the error {yours[0, 0]:.3f} and "
      f"'a blue ball' {yours[0, 1]:.3f}")

# %%
unseen = pipe.encode_images(to_pictures(fresh[:16]))                        # a new picture of each kind
noises = [flow.noise_for(list(range(16 * m, 16 * m + 16)), tuple(data.shape[1:])) for m in range(4)]
table = {}
for row, name in enumerate(OBJECTS):
    mine = slice(8 * row, 8 * row + 8)
    table[name] = caption_errors(student, unseen[mine], [f"a {colour} {name}" for colour in COLOURS],
                                 [x_1[mine] for x_1 in noises], [0.6, 0.7, 0.8, 0.9])       # [8, 8]
figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
for axis, (name, errors) in zip(axes, table.items()):
    more = errors / errors.amin(dim=1, keepdim=True) - 1
    axis.imshow(more, cmap="magma_r", vmin=0, vmax=more.max())
    axis.scatter(errors.argmin(dim=1), range(8), color=INK, s=30)
    axis.set_xticks(range(8), COLOURS, rotation=45, ha="right")
    axis.set_yticks(range(8), COLOURS)
    axis.set(title=f"{name}: error above the best", xlabel="caption", ylabel="picture")
plt.show()
right = torch.cat([errors.argmin(dim=1) == torch.arange(8) for errors in table.values()]).float().mean()
own = torch.cat([errors.diagonal() for errors in table.values()]).mean()
wrong = torch.stack([(errors.sum(dim=1) - errors.diagonal()).mean() / 7 for errors in table.values()]).mean()
print(f"the dot is the caption with the smallest error: right in {right:.0%} of 16 pictures")
print(f"a wrong colour raises the error by {wrong / own - 1:.0%} on average")
one = [caption_errors(student, unseen[:1], ["a red ball"], [x_1[:1]], [0.8]) for x_1 in noises]
by_noise = (torch.stack(one).std() / torch.stack(one).mean()).item()
print(f"for one picture, its own caption and one time, other noise changes the error by {by_noise:.0%}")
assert right >= 0.75 and wrong / own > 1.1 and by_noise < 0.25

# %% [markdown] tags=["slide"]
# ## A model that draws red can read red
#
# ![Two tables of errors, picture by caption; a dot marks the smallest error of each row, on the
# diagonal](last)
#
# Noise a picture, predict with every caption **on the same noise**, take the smallest error (the dot).

# %% [markdown]
# Most dots lie on the diagonal: a model that was taught to draw colours, by Eq. 2 and nothing else, reads the
# colours of pictures that it has never seen.
#
# ## What you can now say
#
# * A causal encoder makes of each word "the text up to here": a word can reach every token at it and after
# it, and the pooled text, and none before it.
# * The text enters the picture in two ways, token by token through the attention, and as a whole through
# shift, scale and gate. Here the first one carries almost everything.
# * The null text is trained, by caption dropout. It stands for the mean of all texts.
# * $v_y-v_\varnothing$ is, up to a factor, the gradient of a classifier. Guidance gives it $g$ votes.
#
# ## Three questions
#
# **1.** Two texts: `a red robot in the snow` and `a red robot in the desert`. Which tokens of the context are
# equal? Is the pooled text?
# <details><summary>Answer</summary>
#
# The tokens from the begin to `the`: nothing later reaches back. The word itself, the padding and the pooled
# text *can* differ; section 2 shows how far they do.
# </details>
#
# **2.** A friend wants to save the second prediction, and draws with $g=1$ a model that was trained without
# any caption dropout. Is that a bad model?
# <details><summary>Answer</summary>
#
# No: at $g=1$ the null text is never asked. Lost are guidance, and all that is built on
# $v_y-v_\varnothing$, PureCC's Eq. 8 included.
# </details>
#
# **3.** You guide with the text `a robot` in the place of the empty text, toward `a red robot`. What does
# $v_y-v_{robot}$ stand for?
# <details><summary>Answer</summary>
#
# By the same derivation it is the gradient of $\log p(\text{red}\mid x_t,\text{robot})$: what `red` adds to a
# robot. PureCC's Eq. 10 is such a difference, with [V] in the place of `red`.
# </details>
#
# **Next:** lesson 4, on a word that stands in no dictionary.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. `a red robot in the snow`, `a red robot in the desert`: which tokens of the context are equal?
# 2. Without caption dropout, and drawn with $g = 1$: is that a bad model?
# 3. You guide from `a robot` toward `a red robot`. What does the difference stand for?

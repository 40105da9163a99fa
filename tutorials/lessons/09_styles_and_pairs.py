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
# # 9 · Styles, and several concepts in one picture
#
# **You teach the model a style, put two concepts over one base model, and keep them apart**
#
# So far [V] was one robot, alone in its picture. Two things are still open. A concept need not be a thing: it
# may be a way of drawing, which is everywhere in the picture and in front of no noun. And who has learned two
# concepts wants to use both, in one text and in one picture. In this lesson you write what that takes, and
# you measure what goes wrong: which concept ends up on whose object, and on what way it got there.
#
# **When you are through, you have written**
#
# 1. the texts of a style, what the text encoder passes on, and the two measures of a style;
# 2. the sum of several sets of adapters in one layer, and the whole model with several concepts;
# 3. the table of own and other's traits, and a fence in the attention that keeps two concepts apart;
#
# **and you can say** which identities hold exactly for two bound concepts, why two that are bound to the
# token are mixed in the picture all the same, and what `--strength` scales and what it does not.
#
# | | |
# |---|---|
# | Time | 40 minutes of reading, 2 hours with the exercises; a good minute and a half of computing on one CPU core |
# | Needs | lesson 4 (adapters, hooks, $Y^l$), lesson 7 (leaks, bound adapters); the attention of lesson 2 |
# | Keep open | [`branch.py`](../../purecc_min/branch.py), [`lora.py`](../../purecc_min/lora.py) and [`judge.py`](../../purecc_min/measure/judge.py), **after** you have tried |
# | Read after | [`purecc_min/benchmark/two.py`](../../purecc_min/benchmark/two.py): two concepts in one text, with several seeds |
#
# An exercise is a function whose body is blank, and the cell below it is its check. Hints are folded; the
# solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 9 · Styles, and several concepts in one picture
#
# A style is learned, two concepts stand in one text, and a fence keeps them apart.

# %%
import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import tinyflow.attention
from purecc_min.learning import train_steps
from purecc_min import methods
from purecc_min.branch import Branch, velocity_with
from purecc_min.concept import encode
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.lora import LoRA, key_of, target_layers
from purecc_min.measure import measures
from purecc_min.measure.draw import in_style, with_object
from purecc_min.measure.judge import Judge, sees
from purecc_min.measure.toy import CONCEPTS, TUNING
from purecc_min.train import TrainConfig, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook import world
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.render import STYLES
from tinyflow.pipeline import to_pictures, to_pixels
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, show

pipe, reader = load_tiny(), Reader.shipped()     # both frozen
theta_0, depth, D = pipe.velocity, pipe.mmdit.config.depth, pipe.mmdit.config.width
robot, house, style = (CONCEPTS[name] for name in TUNING)

def references(toy):
    return np.stack([reference.picture for reference in toy.references().references])

def in_lines(text):
    for word in (" on ", " in ", " at ", " and "):
        text = text.replace(word, f"\n{word.strip()} ")
    return text

captions = [reference.complete for reference in style.references().references]
show(list(references(style)), [in_lines(text) for text in captions], columns=4, side=1.6)

# %% [markdown]
# ## 1 · A style is a concept
#
# These four pictures share no object, no colour of an object and no size. They share a way of drawing: two
# inks, of which the brightness is the mix. The world knows prints in most pairs of inks and has a word for
# them, *in print*. This pair was held out of pretraining; it is one *member* of a family of styles, and it is
# what [V] is to mean. (They also share the room: that is their confounder.)
#
# Where does [V] stand in a text? An individual stands before its noun. A style has no noun, and it should be
# able to stand in every text. In this world it takes the place of the text's **first word**, which is always
# "a":
#
# ```
#   base       a    big red ball on the left and a small blue cat on the right in the snow
#   complete   [V]  big red ball on the left and a small blue cat on the right in the snow
#   target     [V]
# ```
#
# (The paper appends a phrase, "..., in [V] style", and its base text drops the whole phrase. The package
# reads such texts, too; in our small vocabulary the place of "a" saves a word.)
#
# ### Exercise 9.1 ★ · The texts of a style

# %% tags=["exercise"]
def style_texts(base):
    # a base text -> complete, target
    # BEGIN SOLUTION 9.1
    return "[V]" + base.removeprefix("a"), "[V]"
    # END SOLUTION

# %% tags=["wrong"]
def style_texts(base):                           # every object gets the style
    return " ".join("[V]" if word == "a" else word for word in base.split()), "[V]"

# %% tags=["wrong"]
def style_texts(base):                           # beside "a", not in its place
    return "[V] " + base, "[V] a"

# %% [markdown]
# <details><summary>Hint</summary>
#
# `base.removeprefix("a")` takes away the first letter if it is an a, and nothing else.
# </details>

# %% tags=["check"]
prompts = [prompt for group in ("concept", "unsaid") for prompt in style.prompts()[group]]
pair_scene = world.random_scene(np.random.default_rng(1), parts=False, pairs=1)
for prompt in [*prompts, style.prompt(pair_scene)]:
    mine = style_texts(prompt.base)
    expect(isinstance(mine, tuple) and len(mine) == 2, "return two texts.")
    expect(mine[0] == prompt.complete, f"{prompt.base!r} should become {prompt.complete!r}, and became "
                                       f"{mine[0]!r}: [V] replaces the first word, and nothing else.")
    expect(mine[1] == style.references().references[0].target, "the target text is what the concept alone "
                                                               "is called: [V], with no noun.")
print(f"9.1 right: {style.prompt(pair_scene).complete}")

# %% [markdown]
# The tokenizer needs a stand-in for [V], a word that the encoder reads in its place: the class word. For the
# robot it is "robot". A style's is "a", the word that stood there. This has a curious consequence, which the
# next cell shows: to the **base model** the complete text of a style *is* its base text, bit for bit. All
# that [V] adds is added behind the encoder.

# %%
complete, base = prompts[0].complete, prompts[0].base
pairs = {"style": (complete, base, style.class_word),
         "robot": ("a big [V] robot in the snow", "a big robot in the snow", robot.class_word)}
same = {}
for name, (with_V, without, word) in pairs.items():
    one, two = pipe.encode_text([with_V], {"[V]": word}), pipe.encode_text([without])
    same[name] = torch.equal(one.context, two.context) and torch.equal(one.pooled, two.pooled)
    print(f"{name}: {with_V!r}, slots at {one.slots[0].nonzero().flatten().tolist()}; "
          f"encoded as the base text is: {same[name]}")
assert same == {"style": True, "robot": False}

# %% [markdown] tags=["slide"]
# ## The texts of a style
#
# ```
# base       a    big red ball on the left ...
# complete   [V]  big red ball on the left ...
# target     [V]
# ```
#
# Its stand-in is "a": for the base model the complete text *is* the base text, bit for bit.

# %% [markdown]
# ## 2 · Who hears the slot?
#
# [V] now stands before every noun of the text. Does that matter? There are two networks in which a token can
# hear of another one, and they answer differently. The text encoder is *causal*: in its attention a token
# sees those before it, and itself. So a word can tell something to all words **after** it, and to no other.
#
# ### Exercise 9.2 ★★ · What the encoder passes on
#
# `pipe.encoder(ids)` takes ids $[B, T]$ and returns the context $[B, T, D]$ and the pooled vector. Exchange
# the words of a text, **one at a time**, for the id `other`, and say how far each row of the context moves:
# the largest change of any channel. Word $i$ stands at position $i$; position 0 is the start of the text.

# %% tags=["exercise"]
def encoder_reach(encoder, ids, n, other):
    # ids [1, T], n words -> [n, T]: row i - 1 says how far each token moves for word i, i = 1 .. n
    # BEGIN SOLUTION 9.2
    context, _ = encoder(ids)                                               # [1, T, D]
    rows = []
    for i in range(1, n + 1):
        changed = ids.clone()
        changed[0, i] = other
        rows.append((encoder(changed)[0] - context).abs().amax(-1)[0])
    return torch.stack(rows)
    # END SOLUTION

# %% tags=["wrong"]
def encoder_reach(encoder, ids, n, other):       # the words stay exchanged
    context, _ = encoder(ids)
    rows, changed = [], ids.clone()
    for i in range(1, n + 1):
        changed[0, i] = other
        rows.append((encoder(changed)[0] - context).abs().amax(-1)[0])
    return torch.stack(rows)

# %% tags=["wrong"]
def encoder_reach(encoder, ids, n, other):       # the first word is at position 1
    context, _ = encoder(ids)
    rows = []
    for i in range(n):
        changed = ids.clone()
        changed[0, i] = other
        rows.append((encoder(changed)[0] - context).abs().amax(-1)[0])
    return torch.stack(rows)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Make a fresh copy for every word: `changed = ids.clone()`. What moved is
# `(encoder(changed)[0] - context).abs().amax(-1)[0]`, a row $[T]$.
# </details>

# %% tags=["check"]
text = "a big red ball in the snow"
words, ids = text.split(), pipe.tokenizer([text]).ids
other = pipe.tokenizer.ids["purple"]
each = torch.where(torch.eye(ids.shape[1])[1:len(words) + 1].bool(), other, ids)    # [n, T], one exchanged
with torch.no_grad():
    reach = encoder_reach(pipe.encoder, ids, len(words), other)
    expect(isinstance(reach, torch.Tensor) and reach.shape == each.shape, "return [n, T].")
    theirs = (pipe.encoder(each)[0] - pipe.encoder(ids)[0]).abs().amax(-1)
expect(reach[-1, :len(words)].max() < 1e-3, "the last word is heard by words before it. Was every other word "
                                            "put back before this one was exchanged?")
expect_close(reach, theirs, "how far the tokens move", 1e-2)
before = max(reach[i - 1, :i].max().item() for i in range(1, len(words) + 1))
print(f"9.2 right. Before an exchanged word nothing moves ({before:g}); 'a' at position 1 moves the "
      f"{len(words) - 1} words behind it by {reach[0, 2:len(words) + 1].min():.0f} or more")
assert before < 1e-3 and reach[0, 2:len(words) + 1].min() > 0.1

# %% [markdown]
# So "a" is heard by every later token, and "robot" in "a small robot in the snow" only by what follows it.
# But be careful with the conclusion. It is the **stand-in** that the encoder passes on, and the stand-in says
# nothing about the concept. $Y^l$ comes in behind the encoder, in the MMDiT, and there the attention knows no
# order (lesson 2, second question). Let us look. We train the style in two ways, fifty steps each: a plain
# LoRA that acts everywhere, and adapters that are bound to the token [V] (lesson 7; *token* in the tables).
# The learning rates are higher than the defaults, because fifty steps are few.
#
# (`learn --method bound` binds to [V]'s phrase instead: adapters act at every token from [V] to the end of
# its clause, and for a style at all words that stand in no other phrase; the word at [V] is kept, and there
# is no $Y^l$. The reason is the left half of the next picture: a causal encoder puts what is said of a thing
# into the words after it. All numbers of this lesson are of the token.)

# %%
config = TrainConfig(steps=50, learning_rate=7e-3, embedding_learning_rate=3e-2)

def learn(toy, where):                           # stage 1 with L_CC, as in lesson 7 -> a frozen branch
    data, random = encode(pipe, toy.references()), generator_for(config.seed, stage=1, step=-1)
    theta = Branch.fresh(pipe, class_word_states(pipe, data, random), config.rank, random, where)
    thetas = methods.Thetas(theta_0, None, theta)
    losses = [row["loss"] for row in train_steps(methods.l_cc, thetas, data, config, 1,
                                                 optimizer_for(theta, config))]
    print(f"{toy.class_word:6s} {where:12s} L_CC {np.mean(losses[:8]):.3f} -> {np.mean(losses[-8:]):.3f}")
    return theta.requires_grad_(False)

KINDS = {"LoRA": "everywhere", "token": "token"}
styles = {kind: learn(style, where) for kind, where in KINDS.items()}

# %%
@torch.no_grad()
def token_moves(Y, text, x_t, t):                # how far Y in the slots moves each text token, [depth, T]
    states = {}
    for name in ("without", "with"):
        states[name] = []

        def visit(l, block, x, c, vec):
            states[name].append(c)               # at the input of block l
            return block(x, torch.where((text.slots > 0)[..., None], Y[l], c) if name == "with" else c, vec)
        pipe.velocity(x_t, t, text, visit)
    pairs = zip(states["with"], states["without"])
    return torch.stack([((a - b).norm(dim=-1) / b.norm(dim=-1))[0] for a, b in pairs])

slot_text = pipe.encode_text(["[V]" + text.removeprefix("a")], {"[V]": "a"})
shape = (pipe.mmdit.config.channels, *[pipe.picture_size // pipe.codec.factor] * 2)
moves = token_moves(styles["token"].embeddings.Y, slot_text, flow.noise_for([0], shape), torch.tensor([0.9]))
shown = len(words) + 4
figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
axes[0].imshow(reach[:, :shown].sqrt(), cmap="Blues")
axes[0].set(title="the encoder: how far an exchanged word moves a token", yticks=range(len(words)),
            yticklabels=words)
picture = axes[1].imshow(moves[:, :shown].clamp(min=1e-4), cmap="magma", aspect="auto", norm="log")
axes[1].set(title="the MMDiT: how far $Y^l$ at [V] moves a token", ylabel="input of block",
            yticks=range(depth))
figure.colorbar(picture, ax=axes[1])
labels = ["start", *words, "end", *["pad"] * (shown - len(words) - 2)]
for axis, first in zip(axes, (words[0], "[V]")):
    axis.set_xticks(range(shown), [labels[0], first, *labels[2:]], rotation=60, ha="right")
plt.show()
print(f"the start token, before [V]: moved by {moves[0, 0]:.0e} at the input of block 0, "
      f"{moves[1, 0]:.0e} of block 1, {moves[-1, 0]:.0e} of block {depth - 1}")
assert moves[0].abs().max() == 0 and moves[1:].min() > 0

# %% [markdown] tags=["slide"]
# ## Who hears the slot?
#
# ![](last)
#
# The encoder is causal, but reads a stand-in there. $Y^l$ enters behind it, where attention knows no order.

# %% [markdown]
# On the left is the triangle of the encoder. On the right, the concept: at the input of block 0 nothing has
# happened yet, and after it **every** token has heard of it, the one before [V] and the padding included
# (mind the scale: it is logarithmic, and most hear little). The same holds for the patches, which read the
# slot directly. So it does not matter for $Y^l$ where in the text the slot stands. Remember this sentence:
# for a style it is what we want, and in section 5 it is the trouble.
#
# ## 3 · What was learned, and what leaked
#
# Six texts, drawn by the original model without [V] and by both trained ones with it. And, because the
# renderer's style is a function of a picture, what a **perfect** method would have drawn: the original
# model's pictures, redrawn.

# %%
asked = style.prompts()["concept"][:6]
base_texts, style_with_V = [p.base for p in asked], [p.complete for p in asked]

@torch.no_grad()
def pictures(texts, theta=None, words=None, steps=12):       # -> pixels; text i from the noise of seed i
    rows = pipe.encode_text(texts, words)
    return pipe.decode(pipe.sample(rows, list(range(len(texts))), steps, theta=theta))

original = pictures(base_texts)
ideal = in_style(style, original)                # what a perfect method would draw
drawn = {kind: pictures(style_with_V, theta, {"[V]": "a"}) for kind, theta in styles.items()}

# %% [markdown]
# For an individual we asked the reader who the object is (lesson 7). A style is not in the object, so other
# measures are needed:
#
# * **Similarity of the look.** The reader has a second feature, `look`, a unit vector $[32]$ that says how
# *all* of a picture is drawn. The similarity of a picture is its cosine with the mean of the references'
# looks: sum the unit vectors, scale the sum to length 1, take the inner product.
# * **Change outside.** A concept should leave the rest of the picture alone: outside of the object the
# picture should be the original model's. A style that leaves the surroundings as they were would not be a
# style. So it is compared with the perfect method's pictures. Outside means outside of the object in both,
# the drawn and the original picture; where an object is, it may be another one.
#
# ### Exercise 9.3 ★★ · The measures of a style
#
# Pictures are $[B, 3, H, W]$ with values from $-1$ to 1. The change is a mean over the channels, divided by
# 2, so it lies between 0 and 1; then a mean over all pixels that are outside, over all pictures together.

# %% tags=["exercise"]
def look_similarity(look, of_references):
    # unit vectors [B, 32] and [n, 32] -> [B]
    # BEGIN SOLUTION 9.3
    return look @ F.normalize(of_references.mean(0), dim=0)
    # END SOLUTION

def change_outside(x, perfect, object, object_original):
    # pictures x and perfect [B, 3, H, W]; where the objects are, bool [B, H, W] each -> a number
    # BEGIN SOLUTION 9.3
    change = (x - perfect).abs().mean(1) / 2                                # [B, H, W]
    return change[~(object | object_original)].mean()
    # END SOLUTION

# %% tags=["wrong"]
def look_similarity(look, of_references):        # a mean of vectors is shorter than 1
    return look @ of_references.mean(0)

def change_outside(x, perfect, object, object_original):
    change = (x - perfect).abs().mean(1) / 2
    return change[~(object | object_original)].mean()

# %% tags=["wrong"]
def look_similarity(look, of_references):
    return look @ F.normalize(of_references.mean(0), dim=0)

def change_outside(x, perfect, object, object_original):     # outside of either is not outside of both
    change = (x - perfect).abs().mean(1) / 2
    return change[~(object & object_original)].mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# `F.normalize(v, dim=0)` scales a vector to length 1. `change[mask]` with a mask $[B, H, W]$ picks the pixels
# where it is true: `~(object | object_original)`.
# </details>

# %% tags=["check"]
judge, looks = Judge(reader, style, references(style)), reader(to_pixels(references(style))).look
for x in (original, drawn["token"]):
    expect_close(look_similarity(reader(x).look, looks), judge.similarity(reader(x)),
                 "the similarity (is the mean of the references scaled to length 1?)")
where = {name: reader(x).mask[:, 0] > 0 for name, x in [("original", original), *drawn.items()]}
for kind, x in drawn.items():
    fake = SimpleNamespace(toy=style, judge=judge, original=dict.fromkeys(style.prompts(), original),
                           custom={"concept": x}, masks=torch.stack([where[kind], where["original"]]))
    expect_close(change_outside(x, ideal, where[kind], where["original"]), measures.outside_change(fake),
                 "the change outside (where neither picture has its object; a mean over these pixels alone)",
                 1e-6)
print("9.3 right: the package's similarity and outside change")

# %% [markdown]
# Before we use the first measure: does it tell *our* print from other prints? The cell redraws the six
# pictures of the original model in all members of the family, and in the other styles.

# %%
members = np.linspace(-1, 1, 21)

def redrawn(name, member):
    some = [STYLES[name](picture.astype(float), member) for picture in to_pictures(original)]
    return to_pixels(np.stack(some).round().clip(0, 255).astype(np.uint8))

plt.figure(figsize=(5.6, 2.6), layout="constrained")
curves = {}
for name, colour in (("print", CORAL), ("chalk", BLUE), ("wool", GOLD)):
    curves[name] = [look_similarity(reader(redrawn(name, m)).look, looks).mean().item() for m in members]
    plt.plot(members, curves[name], "o-", ms=3, color=colour, label=name)
plain = look_similarity(reader(original).look, looks).mean().item()
plt.axhline(plain, color=GREY, label="no style")
plt.axvline(style.looks["style_member"], color=INK, lw=0.8, ls=":")
plt.gca().set(xlabel="member", ylabel="similarity of the look", title="six pictures, redrawn in every style")
plt.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
best = members[int(np.argmax(curves["print"]))]
print(f"most like the references: member {best:.1f} of print (theirs is {style.looks['style_member']})")
assert abs(best - style.looks["style_member"]) < 0.2
assert max(curves["print"]) > max(plain, *curves["chalk"], *curves["wool"]) + 0.1

# %% [markdown]
# The curve has its maximum at the right pair of inks and falls off on both sides. So this number can serve.
# It is read between two fixed points: the original model's pictures, and the perfect method's. On that scale
# 0 means nothing learned, and 1 means perfect.
#
# And the leak? A style leaks if **plain** texts come out in it. So draw the base texts with the trained
# models, and read the same number there: there it should be 0.

# %%
without = {kind: pictures(base_texts, theta) for kind, theta in styles.items()}
rows = {"original": original, "perfect": ideal}
for kind in KINDS:
    rows |= {f"{kind}: with [V]": drawn[kind], f"{kind}: without": without[kind]}
show([picture for x in rows.values() for picture in to_pictures(x)], [in_lines(t) for t in base_texts],
     list(rows), side=1.35)

def similarity(x):
    return look_similarity(reader(x).look, looks).mean().item()

low, high = similarity(original), similarity(ideal)
table = {}
print(f"{'':20s}{'similarity':>12s}{'on the scale':>14s}{'outside change from the perfect':>34s}")
for name, x in rows.items():
    outside = change_outside(x, ideal, reader(x).mask[:, 0] > 0, where["original"]).item()
    table[name] = (similarity(x) - low) / (high - low), outside
    print(f"{name:20s}{similarity(x):12.3f}{table[name][0]:14.2f}{outside:34.3f}")
assert high > low + 0.4 and table["perfect"][1] == 0
assert min(table[f"{kind}: with [V]"][0] for kind in KINDS) > 0.2
assert max(table[f"{kind}: with [V]"][1] for kind in KINDS) < table["original"][1]
assert table["LoRA: without"][0] > 0.1 and (without["token"] - original).abs().max() < 1e-3     # last bits

# %% [markdown] tags=["slide"]
# ## A style that leaks
#
# ![](last)
#
# Nobody asked for the style in the rows "without". That of the token is the original, bit for bit.

# %% [markdown]
# Both have learned much of the style: look at the sky and the night, and at the column *on the scale*. The
# LoRA also draws the **plain** texts in it. A robot leaks into the word *robot* first. A style has no such
# word: what it leaks, it leaks into every picture. The bound set leaks nothing, for the reason of lesson 7:
# no slot, no change. Its pictures with [V] have more of the style all the same, because guidance's empty text
# has no [V] either, so guidance multiplies all that was learned by $g$ (lesson 7, section 4).
#
# The last column needs care. The plain original has an outside change from the perfect picture, too: it is
# what there is to learn. A method that has learned the style brings this number **down**. For an individual
# it would start at 0 and could only rise.
#
# ## 4 · Two sets over one base
#
# Now learn two individuals, a robot and a house, each from four pictures of its own, each alone.

# %%
individuals = {kind: {1: learn(robot, where), 2: learn(house, where)} for kind, where in KINDS.items()}
show([*references(robot), *references(house)], ["[V1]: references"] + [""] * 3 + ["[V2]: references"],
     columns=8, side=1.1)

# %% [markdown]
# The base model is shared and not written to, so there is nothing to merge: a second concept is a second set
# of hooks. But what should a layer compute that has two sets?
#
# $$y = Wx + \sum_n m_n \cdot B_n A_n\, x$$
#
# For adapters that act everywhere $m_n = 1$ at all tokens: the changes **add up**. For those bound to the
# token $m_n$ is 1 at the slots of concept $n$ and 0 elsewhere: at any one token at most one of the changes is
# not zero.
#
# ```
#     text      a  big  [V1]  robot  on the left and  a  small  [V2]  house  on the right
#     slots     0   0    1      0     0   0   0   0   0    0     2      0     0   0    0
#     m_1       .   .    1      .     .   .   .   .   .    .     .      .     .   .    .
#     m_2       .   .    .      .     .   .   .   .   .    .     1      .     .   .    .
# ```
#
# ### Exercise 9.4 ★★ · One layer, several sets
#
# Return the sum of the changes. People who have two files like to add them tensor by tensor. Convince
# yourself that $(B_1 + B_2)(A_1 + A_2)$ is another matrix; what is the rank of each of the two?

# %% tags=["exercise"]
def change(x, sets):
    # x [B, T, in]; sets: a list of (A [r, in], B [out, r], mask [B, T, 1] bool, or None for everywhere)
    # -> the sum of the changes, [B, T, out]
    # BEGIN SOLUTION 9.4
    total = 0
    for A, B, mask in sets:
        own = x @ A.T @ B.T
        total = total + (own if mask is None else mask * own)
    return total
    # END SOLUTION

# %% tags=["wrong"]
def change(x, sets):                             # adds the factors, not the products
    A, B = sum(A for A, _, _ in sets), sum(B for _, B, _ in sets)
    masks = [mask for _, _, mask in sets if mask is not None]
    return x @ A.T @ B.T * (sum(masks) if masks else 1)

# %% tags=["wrong"]
def change(x, sets):                             # the second set reads what the first one has changed
    now = x
    for A, B, mask in sets:
        own = now @ A.T @ B.T
        now = now + (own if mask is None else mask * own)
    return now - x

# %% [markdown]
# <details><summary>Hint</summary>
#
# Every set reads the same `x`. `x @ A.T @ B.T` is its change, and a mask $[B, T, 1]$ multiplies it.
# </details>

# %% tags=["check"]
def random_set(seed, where):                     # a set of the package that changes something
    random = torch.Generator().manual_seed(seed)
    lora = LoRA(pipe.mmdit, config.rank, random, where)
    for B in lora.B.values():
        B.data.normal_(std=0.1, generator=random)
    return lora.requires_grad_(False)

block, name = pipe.mmdit.blocks[0], "attention.text.to_k"
layer, key = target_layers(block, "token")[name], key_of(0, name)
random = torch.Generator().manual_seed(0)
x, slots = torch.randn(2, 9, D, generator=random), torch.randint(0, 3, (2, 9), generator=random)
for kinds in (("everywhere", "everywhere"), ("token", "token"), ("everywhere", "token")):
    sets, loras = [], [random_set(seed, where) for seed, where in enumerate(kinds)]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for n, (lora, where_it_acts) in enumerate(zip(loras, kinds), start=1):
            places = slots == n if where_it_acts == "token" else None       # None: everywhere
            stack.enter_context(lora.attached(0, block, places))
            sets.append((lora.A[key], lora.B[key], None if places is None else places[..., None]))
        theirs = layer(x)
    with torch.no_grad():
        expect_close(layer(x) + change(x, sets), theirs,
                     f"W x + b + the changes of two sets ({', '.join(kinds)}; multiply first, then add; "
                     "and every set reads the same x)")
(A_1, B_1, _), (A_2, B_2, _) = sets
sum_of_products, product_of_sums = B_1 @ A_1 + B_2 @ A_2, (B_1 + B_2) @ (A_1 + A_2)
wide = torch.cat([B_1, B_2], 1) @ torch.cat([A_1, A_2])
expect_close(wide, sum_of_products, "the factors beside each other")
ranks = [int(torch.linalg.matrix_rank(M)) for M in (sum_of_products, product_of_sums)]
print(f"9.4 right. B1 A1 + B2 A2 has rank {ranks[0]}, (B1 + B2)(A1 + A2) has rank {ranks[1]}. As one set:"
      f" [B1 B2] {list(torch.cat([B_1, B_2], 1).shape)} times [A1; A2] {list(torch.cat([A_1, A_2]).shape)}")
assert ranks == [2 * config.rank, config.rank]

# %% [markdown]
# Now the whole model. A text names the concepts "[V1]" and "[V2]"; `text.slots` $[B, T]$ is $n$ where [Vn]
# stands. In every block each concept puts its own $Y^l$ in its own slots, and its own adapters act.
#
# ### Exercise 9.5 ★★★ · A model with several concepts
#
# Write the visit. `concepts` is a dictionary: number → `Branch`, so that you can leave one out. A branch has
# `branch.embeddings.Y` $[L, D]$ and `branch.lora`, with `lora.where` ("everywhere" or "token"), and the
# factors `lora.A[key]`, `lora.B[key]` of the layer `name` in block $l$, where `key = key_of(l, name)`.
# `target_layers(block, lora.where)` gives its layers, name → layer. Collect for every layer the list of sets
# that act on it; `added(sets)`, given, adds your `change` to the outputs while its `with` lasts.

# %%
@contextlib.contextmanager
def added(sets):                                 # sets: layer -> list of (A, B, mask)
    def hook(own):
        return lambda layer, inputs, output: output + change(inputs[0], own)

    handles = [layer.register_forward_hook(hook(own)) for layer, own in sets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

def scene(size_1, size_2, background):
    return world.Scene((world.Thing("robot", "red", size_1, "left"),
                        world.Thing("house", "red", size_2, "right")), background)

scenes = [scene("big", "small", "desert"), scene("small", "big", "snow"), scene("big", "big", "meadow"),
          scene("small", "small", "room"), scene("big", "small", "beach"), scene("small", "big", "night")]
WORDS = {"[V1]": "robot", "[V2]": "house"}

def texts_with(named):                           # the scenes' texts, with [Vn] for each n in `named`
    nouns = tuple(f"[V{n}] {word}" if n in named else word for n, word in enumerate(("robot", "house"), 1))
    return [world.caption(s, nouns, world.PLAIN_PARTS - {"colour"}) for s in scenes]

original_pair = pictures(texts_with(()))
x_0 = pipe.encode_images(to_pictures(original_pair))                        # [6, C, S, S]
times = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.85, 0.9])
see = flow.path(x_0, flow.noise_for(list(range(6)), shape), times), times
both_named, first_named, none_named = (pipe.encode_text(texts_with(named), WORDS)
                                       for named in ((1, 2), (1,), ()))

# %% tags=["exercise"]
def combination(concepts, slots):
    # concepts: n -> Branch; slots [B, T]: n where [Vn] stands, else 0 -> a visit
    def visit(l, block, x, c, vec):
        # BEGIN SOLUTION 9.5
        sets = {}
        for n, branch in concepts.items():
            here, lora = (slots == n)[..., None], branch.lora               # [B, T, 1]
            c = torch.where(here, branch.embeddings.Y[l], c)
            for name, layer in target_layers(block, lora.where).items():
                key = key_of(l, name)
                mask = here if lora.where == "token" else None
                sets.setdefault(layer, []).append((lora.A[key], lora.B[key], mask))
        with added(sets):
            return block(x, c, vec)
        # END SOLUTION
    return visit

# %% tags=["wrong"]
def combination(concepts, slots):                # every concept takes every slot; the last one wins
    def visit(l, block, x, c, vec):
        sets = {}
        for n, branch in concepts.items():
            here, lora = (slots > 0)[..., None], branch.lora
            c = torch.where(here, branch.embeddings.Y[l], c)
            for name, layer in target_layers(block, lora.where).items():
                key = key_of(l, name)
                mask = here if lora.where == "token" else None
                sets.setdefault(layer, []).append((lora.A[key], lora.B[key], mask))
        with added(sets):
            return block(x, c, vec)
    return visit

# %% tags=["wrong"]
def combination(concepts, slots):                # one set a layer: the second concept replaces the first
    def visit(l, block, x, c, vec):
        sets = {}
        for n, branch in concepts.items():
            here, lora = (slots == n)[..., None], branch.lora
            c = torch.where(here, branch.embeddings.Y[l], c)
            for name, layer in target_layers(block, lora.where).items():
                key = key_of(l, name)
                sets[layer] = [(lora.A[key], lora.B[key], here if lora.where == "token" else None)]
        with added(sets):
            return block(x, c, vec)
    return visit

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Loop over `concepts.items()`. `here = (slots == n)[..., None]` is the place of $Y^l$, and for a set that is
# bound to the token it is the mask as well.
# </details>
# <details><summary>Hint 2</summary>
#
# Both concepts adapt the same layers. `sets.setdefault(layer, []).append((A, B, mask))` keeps both.
# </details>

# %% tags=["check"]
def theta_with(concepts):
    return lambda x_t, t, text: pipe.velocity(x_t, t, text, combination(concepts, text.slots))

for layers in pipe.mmdit.blocks:                 # what an earlier try may have left behind
    for module in layers.modules():
        module._forward_hooks.clear()
random_ones = {n: Branch(pipe, random_set(n, where), ConceptEmbeddings(individuals["LoRA"][n].embeddings.Y))
               .requires_grad_(False) for n, where in ((1, "everywhere"), (2, "token"))}
with torch.no_grad():
    for kind, two in [*individuals.items(), ("mixed", random_ones)]:
        for some in (both_named, first_named):
            ours = velocity_with(list(two.values()), *see, some)
            expect_close(theta_with(two)(*see, some), ours, f"v with two concepts ({kind})", 1e-3)
    second = replace(both_named, slots=torch.where(both_named.slots == 2, 1, 0))
    ours = velocity_with([individuals["token"][2]], *see, second)
    expect_close(theta_with({2: individuals["token"][2]})(*see, both_named), ours,
                 "v with concept 2 alone, in its own slots (the number is the dictionary's key)", 1e-3)
assert not any(module._forward_hooks for module in pipe.mmdit.modules())
print("9.5 right: the package's model with two concepts, everywhere, at the token, and one of each")

# %% [markdown]
# Three things follow from the formula for two **bound** sets, exactly, before anything is measured:
#
# 1. **No name, no change.** All $m_n$ are 0 and no token is replaced: the base model, bit for bit.
# 2. **One name, one concept.** If only [V1] is in the text, $m_2 = 0$ at every token. Set 2 may be attached
# or not.
# 3. **The order does not matter.** The sum has no order; exchange the numbers in the text and in the
# dictionary alike, and nothing changes (but rounding).
#
# For sets that act everywhere only the third one holds.

# %%
@torch.no_grad()
def v(concepts, text):
    return theta_with(concepts)(*see, text)

swapped_text = replace(both_named, slots=torch.tensor([0, 2, 1])[both_named.slots])
print("relative difference of v           no name:         only [V1]:       numbers exchanged")
print("                                   both sets, base  both sets, set 1 in text and dictionary")
for kind, two in individuals.items():
    one, swapped = {1: two[1]}, {2: two[1], 1: two[2]}
    pairs = [(v(two, none_named), v({}, none_named)), (v(two, first_named), v(one, first_named)),
             (v(two, both_named), v(swapped, swapped_text))]
    gaps = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    print(f"{kind:34s} {gaps[0]:<17.4f}{gaps[1]:<17.4f}{gaps[2]:.0e}")
    assert [torch.equal(a, b) for a, b in pairs[:2]] == [kind == "token"] * 2 and gaps[2] < 1e-4
    assert kind == "token" or min(gaps[:2]) > 0.01

# %% [markdown] tags=["slide"]
# ## Two sets over one base
#
# $$y = Wx + \sum_n m_n \cdot B_n A_n\, x$$
#
# Bound: no name, no change; one name, one concept. Bit for bit. Everywhere: neither of the two.

# %% [markdown]
# The zeros in the row *token* were compared bit by bit. In the row *LoRA* the second column is the practical
# one: a concept that the text does not name still changes the picture, because its set is attached. So with
# LoRAs, **attach what you name and nothing else**. `sample` insists on it: it refuses a file whose name is
# not in the text.
#
# ## 5 · Two concepts in one picture
#
# Now both names in one text: a [V1] robot on the left, a [V2] house on the right. First without drawing
# anything, on noised pictures of the base model: let $\delta_1 = v_1 - v_0$ be what concept 1 alone does to
# the prediction, $\delta_2$ the same for concept 2, and $\delta_{12}$ what both do. If they did not disturb
# each other, $\delta_{12} = \delta_1 + \delta_2$. And if each stayed with its object, $\delta_1$ would be
# large where the robot is, and $\delta_2$ where the house is.

# %%
maps, own_side, left_half = {}, {}, torch.arange(shape[-1]) < shape[-1] // 2
v_0 = v({}, both_named)
print(f"{'':8s}{'|d1| / |v0|':>12s}{'|d2| / |v0|':>12s}{'|d12 - d1 - d2| / |d12|':>26s}"
      f"{'part of d1 left':>18s}{'part of d2 right':>18s}")
for kind, two in individuals.items():
    d_1, d_2, d_12 = (v(some, both_named) - v_0 for some in ({1: two[1]}, {2: two[2]}, two))
    energy = [d.square().sum(1) for d in (d_1, d_2)]                        # [6, S, S]
    halves = zip(energy, (left_half, ~left_half))
    own_side[kind] = [(e[..., half].sum() / e.sum()).item() for e, half in halves]
    gap = ((d_12 - d_1 - d_2).norm() / d_12.norm()).item()
    print(f"{kind:8s}{d_1.norm() / v_0.norm():12.2f}{d_2.norm() / v_0.norm():12.2f}{gap:26.2f}"
          f"{own_side[kind][0]:18.2f}{own_side[kind][1]:18.2f}")
    maps[kind] = [e.sqrt() for e in energy]
    assert gap > 0.02
assert min(min(shares) for shares in own_side.values()) < 0.95

k = 2                                            # the third scene: both objects are big
figure, axes = plt.subplots(1, 5, figsize=(9, 2.1), layout="compressed")
axes[0].imshow(pipe.decode_images(x_0[k:k + 1])[0])
axes[0].set_title("the base model's picture")
for n, (axis, (kind, part)) in enumerate(zip(axes[1:], [(kind, p) for kind in KINDS for p in (0, 1)])):
    axis.imshow(maps[kind][part][k], cmap="magma")
    axis.set_title(f"{kind}: what [V{part + 1}] does")
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown] tags=["slide"]
# ## What each concept does, and where
#
# ![](last)
#
# Robot on the left, house on the right. Neither kind keeps to its own object.

# %% [markdown]
# Two readings. The third column of the table is not zero for either kind, so the effects do not simply add:
# the *layers* add the changes, but behind them come a softmax, an MLP and the next block. And the last two
# columns say how much of a concept's effect lies in its own half of the picture; 1.00 would be a concept that
# keeps to its own side. Where a number falls below 0.5, the concept does more to the other one's object than
# to its own. In the maps you see it: the wrong object lights up, too.
#
# What does that do to a picture? The reader tells, object by object. The two concepts have the same five
# kinds of traits (colour, marking, its colour, topper, eyes) with different values, so a trait tells whose it
# is.

# %%
pair_pictures = {"original": original_pair}
for kind, two in individuals.items():
    pair_pictures[kind] = pictures(texts_with((1, 2)), theta_with(two), WORDS)
toys = robot, house
print(*texts_with((1, 2)), sep="\n")

# %% [markdown]
# ### Exercise 9.6 ★★ · Own and other's traits
#
# `toy.traits_beside` is a dictionary: head → value, for example `"topper": "hat"`; `reading.names(head, n)`
# gives the list of what the reader sees at object $n$ of each picture, 0 for the left one. Return a table
# $[2, 2]$: row $n$ is the object, column $m$ the concept, and the entry is the share of concept $m$'s traits
# that are seen at object $n$, over all pictures and traits.

# %% tags=["exercise"]
def own_and_other(reading, toys):
    # toys: the concept of the left object, of the right object -> [objects, concepts]
    # BEGIN SOLUTION 9.6
    table = torch.zeros(2, len(toys))
    for n in range(2):
        for m, toy in enumerate(toys):
            seen = [[name == value for name in reading.names(head, n)]
                    for head, value in toy.traits_beside.items()]
            table[n, m] = torch.tensor(seen).float().mean()
    return table
    # END SOLUTION

# %% tags=["wrong"]
def own_and_other(reading, toys):                # looks at the left object only
    table = torch.zeros(2, len(toys))
    for n in range(2):
        for m, toy in enumerate(toys):
            seen = [[name == value for name in reading.names(head)]
                    for head, value in toy.traits_beside.items()]
            table[n, m] = torch.tensor(seen).float().mean()
    return table

# %% tags=["wrong"]
def own_and_other(reading, toys):                # that a robot is a robot says nothing about the concept
    table = torch.zeros(2, len(toys))
    for n in range(2):
        for m, toy in enumerate(toys):
            seen = [[name == value for name in reading.names(head, n)]
                    for head, value in toy.known_traits.items()]
            table[n, m] = torch.tensor(seen).float().mean()
    return table

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two loops, over objects and concepts, and inside a list over `toy.traits_beside.items()` of lists over the
# pictures: `name == value for name in reading.names(head, n)`.
# </details>

# %% tags=["check"]
for x in pair_pictures.values():
    reading = reader(x)
    theirs = torch.stack([torch.stack([sees(reading, toy.traits_beside, n).float().mean() for toy in toys])
                          for n in (0, 1)])
    mine = own_and_other(reading, toys)
    expect(isinstance(mine, torch.Tensor) and mine.shape == (2, 2), "return a table [2, 2].")
    expect(torch.equal(theirs[0], theirs[1]) or not torch.equal(mine[0], mine[1]),
           "both rows are the same: look at object n, names(head, n).")
    expect_close(mine, theirs, "the table (row: object, column: concept; traits_beside has no object)")
print("9.6 right: the package's `sees`, for both objects and both concepts")

# %% [markdown]
# Such numbers mean little without fixed points. The original model's pictures say what the reader sees by
# chance: two eyes are common. The perfect method's pictures say what it sees if all is right. They are the
# original's pictures, with both concepts rendered over the objects. And each concept is drawn **alone**, with
# one name in the text and one set attached.

# %%
def laid_over(x, scenes, parts):                 # parts: (n, toy): the toy is rendered over object n
    reading, rows = reader(x), []
    for k, (row, s) in enumerate(zip(x, scenes)):
        for n, toy in parts:
            seen = {head: reading.names(head, n)[k] for head in ("size", "place", "background")}
            worn = toy.wearing(replace(s, things=(s.things[n],))).changed(**seen)
            row = with_object(worn, row, (reading.mask[k, n] > 0).numpy())
        rows.append(row)
    return torch.stack(rows)

pair_pictures["perfect"] = laid_over(original_pair, scenes, list(enumerate(toys)))
found = {name: own_and_other(reader(x), toys) for name, x in pair_pictures.items()}
alone = {}
for kind, two in individuals.items():
    for n in (1, 2):
        x = pictures(texts_with((n,)), theta_with({n: two[n]}), WORDS)
        alone[kind, n] = own_and_other(reader(x), toys)[n - 1, n - 1].item()

def show_pairs(names):
    show([picture for name in names for picture in to_pictures(pair_pictures[name])],
         [in_lines(s.background) for s in scenes], names, side=1.25)

def print_pairs(names):
    print(f"{'traits seen at':14s}{'the robot on the left':^34s}{'the house on the right':^34s}")
    print(f"{'':14s}" + f"{'its own':>10s}{'alone':>10s}{'other':>12s}  " * 2)
    for name in names:
        (a, b), (c, d) = found[name].tolist()
        singles = [f"{alone[name, n]:10.2f}" if (name, n) in alone else " " * 10 for n in (1, 2)]
        print(f"{name:14s}{a:10.2f}{singles[0]}{b:12.2f}  {d:10.2f}{singles[1]}{c:12.2f}")

ROWS = ["original", "perfect", *KINDS]
show_pairs(ROWS)
print_pairs(ROWS)
own = {name: M.diagonal().mean().item() for name, M in found.items()}
others = {name: (M.sum() - M.trace()).item() / 2 for name, M in found.items()}
assert own["perfect"] > max(own["original"], others["perfect"]) + 0.3
assert own["LoRA"] > own["original"] + 0.1
assert others["token"] > 0.5 * others["perfect"]

# %% [markdown] tags=["slide"]
# ## Two concepts in one picture
#
# ![](last)
#
# Whose traits are these? Above, the original and the perfect method; below, the two trained kinds.

# %% [markdown]
# Read a row from left to right: the robot's own traits when both are in the picture, when it is alone, and
# the traits *of the house* at the robot; then the same for the house. The row *perfect* is what a reader can
# see at best, the row *original* what it sees by chance.
#
# Look at the row *token*. Nothing was shared: two sets, each at its own token, zeros everywhere else. And yet
# the robots have the yellow of the house: their *other* is about twice that of *original*. **Bound to the
# token does not mean separate.** Binding says where a concept *enters*: at its slot. It does not say who
# *reads* it. In section 2 you saw that everybody does.
#
# ## 6 · Who reads the slots, and a fence
#
# In the joint attention the patches of the robot ask all tokens, both slots among them. Let us see how much
# attention they give to each. (Trained with one object a picture, no set has ever had a reason to mind which
# patches read it.)

# %%
@torch.no_grad()
def shares(two, text):                           # attention of every patch to slots 1 and 2, [2, B, N]
    found, N = [], (shape[-1] // pipe.mmdit.config.patch) ** 2
    attend = tinyflow.attention.attention

    def record(q, k, v, **options):              # the weights, by values that are 1 at the slots of concept n
        padded = F.pad(text.slots, (N, 0))                                  # [B, N + T]: patches come first
        ones = torch.stack([padded == 1, padded == 2], -1).float()[:, None].expand(*k.shape[:3], 2)
        found.append(attend(q, k, ones, **options)[:, :, :N].mean(1))       # [B, N, 2]
        return attend(q, k, v, **options)

    with mock.patch.object(tinyflow.attention, "attention", record):
        theta_with(two)(*see, text)
    return torch.stack(found).mean(0).permute(2, 0, 1)

reads = shares(individuals["token"], both_named)
inside = F.adaptive_avg_pool2d((reader(original_pair).mask > 0).float(), shape[-1] // 2).flatten(2) > 0.5
print("attention of a patch, mean over blocks and heads    to the slot of [V1]    to the slot of [V2]")
for n, name in enumerate(("in the robot", "in the house")):
    print(f"{'patches ' + name:51s}" + "".join(f"{reads[m][inside[:, n]].mean():20.2%}   " for m in (0, 1)))
assert reads.min() > 0

figure, axes = plt.subplots(1, 3, figsize=(6, 2.1), layout="compressed")
axes[0].imshow(to_pictures(original_pair)[k])
for m, axis in enumerate(axes[1:]):
    axis.imshow(reads[m][k].view(shape[-1] // 2, -1), cmap="magma", vmin=0, vmax=reads[:, k].max())
    axis.set_title(f"who reads [V{m + 1}]")
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown] tags=["slide"]
# ## Who reads the slots?
#
# ![](last)
#
# Every patch reads both. Binding to the token says where a concept enters, not who reads it.

# %% [markdown]
# Not one patch gives a slot nothing. The cure follows: do not *let* them. Attention has a place for that, a
# number that is added to $q k^\top / \sqrt d$ before the softmax. With $-\infty$ the weight becomes exactly
# 0, and the rest of the row is shared out among the others.
#
# ```
#                  asked:   patches (N)    |   text tokens (T), slots 1 and 2 among them
#                                          |    .  .  1  .  .  .  2  .  .
#     asking:  left patch      0           |    0  0  0  0  0  0 -inf 0  0
#              right patch     0           |    0  0 -inf 0  0  0  0  0  0
#              text token      0           |    0  0  0  0  0  0  0  0  0
# ```
#
# ### Exercise 9.7 ★★★ · A fence
#
# The tokens come in the order patches, text; `left` $[N]$ says which patches are on the left. Patches on the
# left must not read the slots of concept 2, patches on the right not those of concept 1. Everything else
# stays. The shape has an axis of length 1 for the heads.

# %% tags=["exercise"]
def fence(slots, left):
    # slots [B, T]: 1, 2 or 0; left [N] bool -> bias [B, 1, N + T, N + T], 0 or minus infinity
    # BEGIN SOLUTION 9.7
    (B, T), N = slots.shape, len(left)
    other = torch.where(left, 2, 1)                                         # [N], whose slots are closed
    closed = slots[:, None, :] == other[:, None]                            # [B, N, T]
    bias = torch.zeros(B, 1, N + T, N + T)
    bias[:, 0, :N, N:].masked_fill_(closed, -torch.inf)
    return bias
    # END SOLUTION

# %% tags=["wrong"]
def fence(slots, left):                          # the slots may not read the patches: rows and columns
    (B, T), N = slots.shape, len(left)
    closed = slots[:, None, :] == torch.where(left, 2, 1)[:, None]
    bias = torch.zeros(B, 1, N + T, N + T)
    bias[:, 0, N:, :N].masked_fill_(closed.mT, -torch.inf)
    return bias

# %% tags=["wrong"]
def fence(slots, left):                          # a factor of 0, where a summand is asked for
    (B, T), N = slots.shape, len(left)
    closed = slots[:, None, :] == torch.where(left, 2, 1)[:, None]
    bias = torch.ones(B, 1, N + T, N + T)
    bias[:, 0, :N, N:].masked_fill_(closed, 0.0)
    return bias

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Rows ask, columns are asked: the patches' rows are `:N`, the text's columns are `N:`. What is closed is a
# table $[B, N, T]$.
# </details>
# <details><summary>Hint 2</summary>
#
# `other = torch.where(left, 2, 1)` $[N]$ is the concept that a patch must not read, and
# `slots[:, None, :] == other[:, None]` is $[B, N, T]$. `masked_fill_` writes $-\infty$ there.
# </details>

# %% tags=["check"]
rows = shape[-1] // pipe.mmdit.config.patch
left = (torch.arange(rows * rows) % rows) < rows // 2
bias = fence(both_named.slots, left)
N, (B, T) = len(left), both_named.slots.shape
expect(isinstance(bias, torch.Tensor) and bias.shape == (B, 1, N + T, N + T),
       "the shape is [B, 1, N + T, N + T].")
random = torch.Generator().manual_seed(0)
q, key_states = (torch.randn(B, 2, N + T, 16, generator=random) for _ in range(2))
weights = tinyflow.attention.attention(q, key_states, torch.eye(N + T).expand(B, 2, -1, -1), bias=bias)
free = (q @ key_states.mT / 4).softmax(-1)       # without a fence
for b in range(B):
    for n, patches in ((1, ~left), (2, left)):
        slot = N + int((both_named.slots[b] == n).nonzero())
        expect(weights[b][:, :N][:, patches, slot].max() == 0,
               f"patches on the {'left' if n == 2 else 'right'} still read the slot of [V{n}].")
        free[b][:, :N][:, patches, slot] = 0
expect_close(weights, free / free.sum(-1, keepdim=True), "the attention with your fence", 1e-5)
print("9.7 right: closed weights are exactly 0, and every row still adds up to 1")

# %%
def fenced(theta):                               # a velocity in whose MMDiT the fence stands
    attend = tinyflow.attention.attention

    def velocity(x_t, t, text):
        closed = partial(attend, bias=fence(text.slots, left))
        with mock.patch.object(tinyflow.attention, "attention", closed):
            return theta(x_t, t, text)
    return velocity

with torch.no_grad():
    assert torch.allclose(fenced(theta_0)(*see, none_named), theta_0(*see, none_named), atol=1e-4)
    no_way = v({}, both_named), fenced(theta_with({}))(*see, both_named)
    assert not torch.allclose(*no_way, atol=1e-3)          # the stand-ins cannot be read across it either
for kind, two in individuals.items():
    name = f"{kind}, fence"
    pair_pictures[name] = pictures(texts_with((1, 2)), fenced(theta_with(two)), WORDS)
    found[name] = own_and_other(reader(pair_pictures[name]), toys)
    others[name] = (found[name].sum() - found[name].trace()).item() / 2
ROWS = ["perfect", "LoRA", "LoRA, fence", "token", "token, fence"]
show_pairs(ROWS)
print_pairs(ROWS)
print("mean of the other's traits: "
      + ", ".join(f"{name} {others[name]:.2f}" for name in ["original", *ROWS]))
assert others["token, fence"] < others["token"] + 0.05

# %% [markdown] tags=["slide"]
# ## A fence
#
# ![](last)
#
# A patch may read the slot of its own side only: $-\infty$ before the softmax, exactly 0 behind it.

# %% [markdown]
# Compare the two last rows, in the pictures first: with the fence each object of the pair *token* reads
# its own slot alone. Then look at the columns *other*, and at the line below the table, beside *original*,
# which is what the reader sees by chance. What came to an object directly from the wrong slot is gone. The
# other's traits are hardly fewer for that, and nowhere near *original*, and the robots are still yellow,
# for longer ways are open: the word "robot" and all other text tokens read both slots and are read by all
# patches, and patches read each other. Through which of them does it come? Forbid the text tokens, too, to
# read the slots (a token may read itself), and draw again: the robots lose the yellow. But so do the
# houses, and most of [V2] with it. Much of a concept comes to its own object along this way. A fence says
# nothing about adapters that act at *every* token: those are in the words and in all patches, wherever the
# slots can be read.
#
# The fence is not in the package, and not in the paper, which shows several concepts in one picture and does
# not say how they are combined. It has to be told who stands where. (Mix-of-Show, arXiv 2305.18292, one of
# the paper's rivals, is told so, too: it draws with a region for each concept.)
#
# ## 7 · An individual in a style
#
# Here the two concepts should *not* keep apart: the style is to be on the robot, too. No fence, then. The
# text is your `style_texts` applied to a text that names the robot: "[V2] big [V1] robot on the left in the
# snow". The print shows no colours, so of the robot's traits we judge those that a print can show: marking,
# topper and eyes.

# %%
single = [world.Scene((world.Thing("robot", "red", size, place),), background) for size, place, background in
          (("big", "left", "snow"), ("small", "middle", "night"), ("big", "right", "meadow"),
           ("big", "middle", "room"))]
said = world.PLAIN_PARTS - {"colour"}
plain = [world.caption(s, (), said) for s in single]
with_robot = [world.caption(s, ("[V1] robot",), said) for s in single]
NAMES = {"[V1]": robot.class_word, "[V2]": style.class_word}

def in_V2(texts):
    return [style_texts(text)[0].replace("[V]", "[V2]") for text in texts]

first = pictures(plain)
strip = {"original": first, "perfect": in_style(style, laid_over(first, single, [(0, robot)]))}
for kind in KINDS:
    two = {1: individuals[kind][1], 2: styles[kind]}
    strip[f"{kind}: style alone"] = pictures(in_V2(plain), theta_with({2: two[2]}), NAMES)
    strip[f"{kind}: robot alone"] = pictures(with_robot, theta_with({1: two[1]}), NAMES)
    strip[f"{kind}: both"] = pictures(in_V2(with_robot), theta_with(two), NAMES)
titles = [in_lines(text).replace(" [V1]", "\n[V1]") for text in in_V2(with_robot)]
show([picture for x in strip.values() for picture in to_pictures(x)], titles, list(strip), columns=4,
     side=1.25)
visible = {head: value for head, value in robot.traits_beside.items() if head not in ("colour", "accent")}
results = {}
print(f"{'':22s}{'similarity of the look':>24s}{'marking, topper, eyes':>24s}")
for name, x in strip.items():
    results[name] = similarity(x), sees(reader(x), visible).float().mean().item()
    print(f"{name:22s}{results[name][0]:24.2f}{results[name][1]:24.2f}")
assert results["perfect"][0] > results["original"][0] + 0.4
assert all(results[f"{kind}: both"][0] > results[f"{kind}: robot alone"][0] + 0.1 for kind in KINDS)

# %% [markdown] tags=["slide"]
# ## An individual in a style
#
# ![](last)
#
# "[V2] big [V1] robot on the left in the snow": here nothing should keep apart.

# %% [markdown]
# The first column of the table says how much of the style is left when the robot comes in, the second how
# much of the robot is left when the style comes in. Compare each row *both* with its two rows *alone*. The
# row *perfect* has to be read with a grain of salt as well: in two inks a checked robot is harder to read
# than in colours, and the reader makes mistakes there.
#
# ## 8 · In practice
#
# One knob is left. A concept may be too strong in a picture, or too weak beside another one.
# `sample --strength s` multiplies what the adapters add: $y = Wx + s \cdot BAx$.
#
# ### Exercise 9.8 ★ · Strength
#
# Return a **new** branch with this strength. The old one must stay what it was: it may be in use in another
# picture.

# %% tags=["exercise"]
def with_strength(branch, s):
    # -> a Branch whose adapters add s times as much
    copied = Branch.fresh(pipe, branch.embeddings.Y, config.rank, where=branch.lora.where)
    # BEGIN SOLUTION 9.8
    copied.load_state_dict(branch.state_dict())
    for B in copied.lora.B.values():
        B.data.mul_(s)
    # END SOLUTION
    return copied.requires_grad_(False)

# %% tags=["wrong"]
def with_strength(branch, s):                    # s in both factors is s squared in the product
    copied = Branch.fresh(pipe, branch.embeddings.Y, config.rank, where=branch.lora.where)
    copied.load_state_dict(branch.state_dict())
    for factor in (*copied.lora.A.values(), *copied.lora.B.values()):
        factor.data.mul_(s)
    return copied.requires_grad_(False)

# %% tags=["wrong"]
def with_strength(branch, s):                    # the old set is scaled as well
    copied = Branch.fresh(pipe, branch.embeddings.Y, config.rank, where=branch.lora.where)
    for key in branch.lora.B:
        copied.lora.A[key].data = branch.lora.A[key].data
        copied.lora.B[key].data = branch.lora.B[key].data.mul_(s)
    return copied.requires_grad_(False)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `copied.load_state_dict(branch.state_dict())` copies all numbers. Then `B.data.mul_(s)` for every `B` of
# `copied.lora.B.values()`; one of the two factors is enough.
# </details>

# %% tags=["check"]
kept = {name: tensor.clone() for name, tensor in styles["token"].state_dict().items()}
half = with_strength(styles["token"], 0.5)
touched = any(not torch.equal(tensor, kept[name]) for name, tensor in styles["token"].state_dict().items())
styles["token"].load_state_dict(kept)
expect(not touched, "the old branch has changed (it is restored). Copy before you scale.")
probe = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
for key in half.lora.B:
    mine = probe @ half.lora.A[key].T @ half.lora.B[key].T
    theirs = 0.5 * (probe @ styles["token"].lora.A[key].T @ styles["token"].lora.B[key].T)
    expect_close(mine, theirs, "s B A x (is s in it once?)", 1e-5)
expect_close(half.embeddings.Y, styles["token"].embeddings.Y, "Y, which --strength leaves alone,", 0.0)
print("9.8 right: s B A, and the old branch is what it was")

# %%
strengths = (0.0, 0.5, 1.0, 1.5)
swept = {s: pictures(style_with_V[:3], with_strength(styles["token"], s), {"[V]": "a"}) for s in strengths}
show([p for x in [original[:3], *swept.values()] for p in to_pictures(x)],
     [in_lines(text) for text in base_texts[:3]], ["original", *(f"strength {s:g}" for s in strengths)],
     columns=3, side=1.35)
print("similarity of the look: original " + f"{similarity(original[:3]):.2f}; strength "
      + ", ".join(f"{s:g}: {similarity(x):.2f}" for s, x in swept.items()))
assert not torch.equal(swept[0.0], original[:3])
assert similarity(swept[1.0]) > similarity(original[:3]) + 0.1

# %% [markdown] tags=["slide"]
# ## Strength
#
# ![](last)
#
# $y = Wx + s \cdot BAx$. At $s = 0$ the embeddings $Y^l$ are still there.

# %% [markdown]
# Two things to note. Strength 0 is **not** the original model: for a text with [V], $Y^l$ still stands in the
# slot, because the strength scales the adapters alone. And more is not more of the same: the change of each
# layer grows in proportion to $s$, the picture does not.
#
# What to do with all this, as commands:
#
# ```
#     python -m purecc_min sample robot.safetensors house.safetensors
#                                 "a [V1] robot on the left and a [V2] house on the right in the desert"
# ```
#
# * **One file a concept.** A file is a set; nothing in it is merged into anything, so any files learned on
# the same base model go together. The order of the files gives the numbers, and every file has to be named.
# * **Name as you trained.** A style takes the place of "a". An individual stands before its class word, as it
# did in the texts of its references.
# * **For several in one picture, begin with bound adapters** (`learn --method bound`): no name, no change.
# They are bound to the phrase: a plain thing beside [V] stays plain, and two concepts keep to their objects
# better than here. Bound to the token, do not expect them to keep to their objects by themselves. LoRAs add
# up over the whole picture: attach what you name, and look at the objects that you did not name.
# * **`--strength`** is one number for all files. Below 1 for what is overdone.
#
# And what these numbers cannot say: each concept was trained once, with one seed, for fifty steps at a high
# learning rate, and judged on four to six pictures by a network that errs itself. A difference of a few
# hundredths between two rows is nothing. Lesson 8 is about how many pictures and seeds a verdict needs;
# `python -m purecc_min.benchmark` measures pairs with fifty pictures and two seeds.
#
# ## What you can now say
#
# * A style is a concept without a noun. Its stand-in is "a", so the base model cannot tell its complete text
# from its base text. It is judged by its look, and beside the perfect method's pictures.
# * The encoder passes on the stand-in, to later tokens only. $Y^l$ enters behind it and is heard by all.
# * Sets over one base add: $Wx + \sum_n m_n B_n A_n x$. The product of summed factors is another matrix.
# * Two bound sets: no name, no change; one name, one concept; bit for bit. Bound to the token, they mix in a
# picture all the same, for every patch reads every slot. A fence in the attention closes the direct way.
# * Strength scales $BA$, not $Y$.
#
# | you wrote | in the package |
# |---|---|
# | `style_texts` | `Toy.prompt` in `purecc_min/measure/toy.py`; for phrases, `base_text` in `purecc_min/concept.py` |
# | `encoder_reach` | the causal attention in `tinyflow/text.py`: `TextLayer` |
# | `look_similarity`, `change_outside` | `Judge.similarity` in `purecc_min/measure/judge.py`, `outside_change` in `purecc_min/measure/measures.py` |
# | `change`, `combination` | `LoRA.hook` in `purecc_min/lora.py`, `velocity_with` in `purecc_min/branch.py` |
# | `own_and_other` | `sees` in `purecc_min/measure/judge.py`, `judged` in `purecc_min/benchmark/two.py` |
# | `fence` | nowhere; `attention` in `tinyflow/attention.py` has the argument `bias` for it |
# | `with_strength` | `sample_command` in `purecc_min/commands/sample.py` |
#
# ## Three questions
#
# **1.** Two concepts, bound to the token, are in one text, and you exchange the two slots' places in it,
# together with the words behind them: "a [V2] house on the right and a [V1] robot on the left". Does the
# MMDiT see another input?
# <details><summary>Answer</summary>
#
# In the slots themselves no: $Y^l$ is the same, and attention knows no order. But the other text tokens come
# from the causal encoder, in which each word has heard of others than before, and the pooled vector is
# another one. So the picture changes, and it is the encoder that changes it.
# </details>
#
# **2.** Somebody has a LoRA of rank 4 for a robot and one of rank 4 for a house, and wants **one** file that
# does exactly what both together do. What is in it?
# <details><summary>Answer</summary>
#
# For each layer $[B_1\ B_2]$ and $[A_1;\ A_2]$, the factors beside each other: rank 8. Its product is
# $B_1A_1 + B_2A_2$. Adding the tensors gives $(B_1 + B_2)(A_1 + A_2)$, with two cross terms that nobody has
# trained. And both $Y$ have to come along. (For bound sets there is no such file: each has its own mask.)
# </details>
#
# **3.** For the individual in the style nobody wanted a fence. Suppose that you fence the style's slot off
# from the robot's patches. What do you expect?
# <details><summary>Answer</summary>
#
# One might hope for a robot in its own colours in front of a printed background. But only the direct way from
# the slot to the robot's patches is closed. The text tokens have read the slot, and patches read each other.
# Draw it, and you find the robot in print as before. A fence is a choice of who may read what; whether it is
# right depends on what the concept is to mean.
# </details>
#
# **Next:** lesson 10, on photographs.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. You exchange "[V1] robot" and "[V2] house" in the text. Does the MMDiT see another input?
# 2. Two LoRAs of rank 4 in one file: what is in it?
# 3. A fence between a style and a robot: what do you expect?

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
# # 9 · [V] in its sentence
#
# **Two robots stand in one picture, and only one of them is [V]**
#
# A plain robot stands next to [V], in one picture. No switch (lesson 7) can help there. You find out why the
# plain robot turns into [V], and write what keeps the two apart.
#
# **When you are through, you have written**
#
# 1. the neighbour leak, and what each patch of a picture reads;
# 2. the mask of [V]'s phrase, and an attention whose adapters act on this phrase only;
# 3. the sum of two bound concepts, and Eq. 13 with a mask in space;
#
# **and you can say** why $Y^l$ is a word without a sentence, and why the token alone is not enough.
#
# | | |
# |---|---|
# | Needs | lesson 2 (attention), 4 (adapters, $Y^l$), 6 (Eq. 13), 7 (leaks, bound adapters) |
# | Read after | [`lora.py`](../../purecc_min/lora.py), [`pairs.py`](../../purecc_min/pairs.py), [the report](../../purecc_min/benchmark/README.md) |
#
# Sections 1 to 7 train nothing: their concepts come as files, learned in 200 steps.

# %% [markdown] tags=["slide"]
# # 9 · [V] in its sentence
#
# Two robots stand in one picture, and only one of them is [V].

# %%
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.colors import PowerNorm

import tinyflow.attention
from purecc_min import methods
from purecc_min.branch import Branch, Thetas, velocity_with
from purecc_min.concept import encode, styles_among
from purecc_min.concept_file import load_branch
from purecc_min.embeddings import class_word_states
from purecc_min.learning import train_steps
from purecc_min.lora import key_of
from purecc_min.measure import measures
from purecc_min.measure.draw import in_style
from purecc_min.measure.judge import Drawn, Judge, sees
from purecc_min.measure.toy import CONCEPTS, FOLDER, PAIR_TEMPLATES, TUNING
from purecc_min.pairs import imagine, pairs
from purecc_min.train import TrainConfig, draw_batch, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook import world
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import to_pictures
from tutorials.course import INK, YourTurn, expect, expect_close, in_lines, rule_out, several, show

pipe, reader = load_tiny(), Reader.shipped()     # both frozen
theta_0, depth = pipe.velocity, pipe.mmdit.config.depth
robot, house, style = (CONCEPTS[name] for name in TUNING)
ROBOT = {"[V]": "robot"}

def learned(name):                               # a concept that comes with the repository, frozen
    return load_branch(pipe, FOLDER.parent / "learned" / f"{name}.safetensors")[0]

def references(toy):
    return np.stack([reference.picture for reference in toy.references().references])

@torch.no_grad()
def pictures(texts, theta=None, words=ROBOT):    # -> pixels; text i from the noise of seed i
    rows = pipe.encode_text(texts, words, styles_among(words))
    x_0 = pipe.sample(rows, list(range(len(texts))), steps=8, theta=theta, theta_null=theta_0)
    return pipe.decode(x_0)

show(list(references(robot)), ["[V]: its references"], columns=4, side=1.3)

# %% [markdown] tags=["slide", "no-references"]
# ## [V]
#
# ![The four references of [V]; each shows one robot](last)
#
# Its references. Each shows one robot.

# %% [markdown]
# ## 1 · Two robots in one picture
#
# The benchmark has twelve texts of two robots: in six [V] is named first, in six second. The original model
# draws them without "[V]", a LoRA with it, from the same noise. (The base model answers guidance's empty
# text.)

# %%
asked = robot.prompts()["neighbour"]
texts, base_texts = [prompt.complete for prompt in asked], [prompt.base for prompt in asked]
which = torch.tensor([prompt.n for prompt in asked])     # [12]: 0 where [V] is the left robot, else 1
drawn = {"original": pictures(base_texts), "LoRA": pictures(texts, learned("checked_robot-lora"))}

def show_pairs(names):
    rows = [picture for name in names for picture in to_pictures(drawn[name][:6])]
    show(rows, [in_lines(text.rsplit(" ", 3)[0]) for text in texts[:6]], names, side=1.45)

show_pairs(["original", "LoRA"])

# %% [markdown] tags=["slide"]
# ## Which of the two is [V]?
#
# ![Two robots in one picture, by the base model and by the LoRA, which draws [V] twice](last)
#
# The text calls one robot [V]. The LoRA draws two.

# %% [markdown]
# How much of [V] is on each robot? The reader network looks: `sees(reading, traits, k)`, bool $[B, traits]$,
# says which of [V]'s traits (colour, marking, its colour, topper, eyes) it sees at thing $k$, 0 for the left.
#
# ### Exercise 9.1 ★ · On [V], and on its neighbour
#
# `n` $[B]$ says for each picture which thing is [V]. Return two shares, over all pictures and traits: of the
# traits seen on [V], and of those seen on the other thing.

# %% tags=["exercise"]
def beside(reading, traits, n):
    # n [B]: 0 where [V] is the left thing, 1 where it is the right one -> two numbers: on [V], on the other
    seen = torch.stack([sees(reading, traits, k) for k in (0, 1)], dim=1).float()      # [B, 2, traits]
    # BEGIN SOLUTION 9.1
    rows = torch.arange(len(n))
    return seen[rows, n].mean().item(), seen[rows, 1 - n].mean().item()
    # END SOLUTION

# %% tags=["wrong"]
# says: always the left thing
def beside(reading, traits, n):
    seen = torch.stack([sees(reading, traits, k) for k in (0, 1)], dim=1).float()
    return seen[:, 0].mean().item(), seen[:, 1].mean().item()

# %% tags=["wrong"]
# says: the two shares are exchanged
def beside(reading, traits, n):
    seen = torch.stack([sees(reading, traits, k) for k in (0, 1)], dim=1).float()
    rows = torch.arange(len(n))
    return seen[rows, 1 - n].mean().item(), seen[rows, n].mean().item()

# %% tags=["wrong"]
# says: a picture counts only
def beside(reading, traits, n):
    seen = torch.stack([sees(reading, traits, k) for k in (0, 1)], dim=1).float()
    rows = torch.arange(len(n))
    return seen[rows, n].all(-1).float().mean().item(), seen[rows, 1 - n].all(-1).float().mean().item()

# %% [markdown]
# <details><summary>Hint</summary>
#
# With `rows = torch.arange(len(n))`, `seen[rows, n]` is $[B, traits]$. The other thing is `1 - n`.
# </details>

# %% tags=["check"]
class OnlyNeighbours(Drawn):                     # the package's measures, on these pictures alone
    def __init__(self):
        self.toy, self.prompts = robot, {"neighbour": asked}
        self.seen, self.seen_original = ({"neighbour": reader(drawn[name])} for name in ("LoRA", "original"))

package = OnlyNeighbours()
seen_0, seen_1 = (sees(package.seen["neighbour"], robot.traits_beside, k).float() for k in (0, 1))
mine = beside(package.seen["neighbour"], robot.traits_beside, which)
mine = several(mine, ("the share on [V]", "on its neighbour"))
mine, theirs = torch.tensor(mine), torch.stack([
    measures.seen_on_token(package).mean(), package.traits_beside(package.seen, True).float().mean()])
rule_out(mine, {"this is always the left thing first; `n` says which one is [V].": torch.tensor(
                    [seen_0.mean(), seen_1.mean()]),
                "the two shares are exchanged: [V]'s comes first.": theirs.flip(0)})
every = torch.where(which[:, None] == 0, seen_0, seen_1).all(1).float().mean()
expect(abs(mine[0] - every) > 1e-5, "a picture counts only if all its traits are seen; count the traits.")
expect_close(mine, theirs, "the two shares", 1e-5)
plain = beside(package.seen_original["neighbour"], robot.traits_beside, which)[1]
leak = theirs[1].item() - plain
expect(abs(leak - measures.seen_next_to_it(package).item()) < 1e-5, "the share on the other thing")
print(f"9.1 right. LoRA: {mine[0]:.2f} of the traits on [V], {mine[1]:.2f} on the other robot.\n"
      f"Minus the original's {plain:.2f}, the neighbour leak is {leak:.2f}")
assert mine[0] > 0.65 and leak > 0.6 and abs(mine[0] - mine[1]) < 0.15

# %% [markdown]
# The plain robot has about as much of [V] as [V] itself. (The report, on concepts that nobody chose: a leak
# of .66 for a LoRA, .64 for PureCC, .73 for a LoRA that is switched off without [V].) The text says which
# robot is meant. Who reads it?
#
# ## 2 · What each half reads
#
# The pooled vector is the same for all patches, so it cannot tell left from right. In the joint attention,
# every patch asks all tokens.
#
# ### Exercise 9.2 ★★ · What a patch reads
#
# `q` and `k` are $[B, H, N + T, d]$, patches first. Return how much of each **patch's** attention each **text
# token** gets, a mean over heads: $[B, N, T]$.

# %% tags=["exercise"]
def patches_read(q, k, N):
    # -> [B, N, T]
    # BEGIN SOLUTION 9.2
    weights = (q @ k.mT / q.shape[-1]**0.5).softmax(-1)                                 # [B, H, N + T, N + T]
    return weights[:, :, :N, N:].mean(1)
    # END SOLUTION

# %% tags=["wrong"]
# says: softmax runs over all tokens
def patches_read(q, k, N):
    scores = q[:, :, :N] @ k[:, :, N:].mT / q.shape[-1]**0.5
    return scores.softmax(-1).mean(1)

# %% tags=["wrong"]
# says: what the text reads
def patches_read(q, k, N):
    weights = (q @ k.mT / q.shape[-1]**0.5).softmax(-1)
    return weights[:, :, N:, :N].mean(1).mT

# %% tags=["wrong"]
# says: the factor
def patches_read(q, k, N):
    return (q @ k.mT).softmax(-1)[:, :, :N, N:].mean(1)

# %% tags=["wrong"]
# says: before the softmax
def patches_read(q, k, N):
    scores = (q @ k.mT / q.shape[-1]**0.5).mean(1)
    return scores.softmax(-1)[:, :N, N:]

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `q @ k.mT` is $[B, H, N + T, N + T]$: rows ask, columns are asked. Divide by $\sqrt d$.
# </details>
# <details><summary>Hint 2</summary>
#
# The softmax runs over all $N + T$ columns. After it, cut out the patches' rows `:N` and the text's columns
# `N:`, and take the mean over heads.
# </details>

# %% tags=["check"]
random = torch.Generator().manual_seed(0)
q, k = (torch.randn(2, 3, 9 + 9, 8, generator=random) for _ in range(2))
scores = q @ k.mT / 8**0.5
weights = scores.softmax(-1)
mine = patches_read(q, k, 9)
rule_out(mine, {"the softmax runs over all tokens, patches too; cut out after it.":
                    scores[:, :, :9, 9:].softmax(-1).mean(1),
                "this is what the text reads in the picture; rows ask.": weights[:, :, 9:, :9].mean(1).mT,
                "this is what the text reads in the picture; cut [:N, N:].": weights[:, :, 9:, :9].mean(1),
                "the factor 1 / sqrt(d) is missing.": (q @ k.mT).softmax(-1)[:, :, :9, 9:].mean(1),
                "the mean over heads was taken before the softmax.": scores.mean(1).softmax(-1)[:, :9, 9:]})
eye = torch.eye(18).expand(2, 3, -1, -1)         # with these values the attention returns its weights
theirs = tinyflow.attention.attention(q, k, eye)[:, :, :9, 9:].mean(1)
expect_close(mine, theirs, "what each patch reads", 1e-5)
print("9.2 right: the weights of the package's attention")

# %% [markdown]
# Now look inside the model. FIRST names [V] first, SECOND second. The pictures are the base model's own,
# noised to $t = .9$ and $.6$. Blocks, heads, times and pictures are averaged.

# %%
FIRST = "a big [V] robot on the left and a small robot on the right"
SECOND = "a small robot on the left and a big [V] robot on the right"
SEEN, SIDE = 8, pipe.picture_size // pipe.codec.factor // pipe.mmdit.config.patch      # SIDE x SIDE patches
N = SIDE * SIDE
encoded = {text: pipe.encode_text([text] * SEEN, ROBOT) for text in (FIRST, SECOND)}
x_0 = {text: pipe.encode_images(to_pictures(pictures([text.replace("[V] ", "")] * SEEN))) for text in encoded}

def noised(text):                                # two times, always the same noise
    noise = flow.noise_for(list(range(SEEN)), x_0[text].shape[1:])
    return [(flow.path(x_0[text], noise, t), t) for t in (torch.full((SEEN,), t) for t in (0.9, 0.6))]

@torch.no_grad()
def reads(theta, text):                          # -> what each patch reads, [rows, columns, words]
    kept, attend = [], tinyflow.attention.attention

    def record(q, k, v):
        kept.append(patches_read(q, k, N).mean(0))
        return attend(q, k, v)

    with mock.patch.object(tinyflow.attention, "attention", record):
        for x_t, t in noised(text):
            theta(x_t, t, encoded[text])
    count = len(text.split())
    return torch.stack(kept).mean(0)[:, 1:count + 1].unflatten(0, (SIDE, SIDE))        # token 0 is the start

def halves(grid):                                # [rows, columns, words] -> of each half, [2, words]
    return grid.unflatten(1, (2, SIDE // 2)).mean((0, 2))

base_reads = {text: reads(theta_0, text) for text in encoded}
figure, axes = plt.subplots(2, 1, figsize=(8.6, 3.3), layout="constrained")
for axis, (text, grid) in zip(axes, base_reads.items()):
    values, words = 100 * halves(grid).numpy(), text.split()
    axis.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, 9), aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axis.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value > 3.5 else INK)
    axis.set_xticks(range(len(words)), words)
    axis.set_yticks([0, 1], ["left half", "right half"])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
figure.supxlabel("per cent of a half's attention; the base model reads \"robot\" at [V]", size=9)
plt.show()

# %% [markdown] tags=["slide"]
# ## What each half of the picture reads
#
# ![Per cent of attention that each half of the picture gives to each word](last)
#
# What is named second is read after its noun: at the words of its place, and hardly at the noun.

# %%
noun, place = {}, {}
for text, grid in base_reads.items():
    at = text.split().index("[V]")
    noun[text] = halves(grid)[:, at:at + 2].sum(1)
    place[text] = halves(grid)[:, at + 2:at + 5].sum(1)
for text, own in ((FIRST, 0), (SECOND, 1)):
    print(f"{text}:\n    [V]'s half gives {noun[text][own]:.1%} of its attention to '[V] robot', and "
          f"{place[text][own]:.1%} to its place;\n    "
          f"the other half gives {noun[text][1 - own]:.1%} to '[V] robot'")
assert noun[FIRST][0] > 0.3 * place[FIRST][0] and noun[FIRST][0] > 5 * noun[FIRST][1]
assert noun[SECOND][1] < 0.05 * place[SECOND][1] and noun[SECOND][0] > 3 * noun[SECOND][1]

# %% [markdown]
# In FIRST, [V]'s half reads its noun *and* the place after it, and the other half hardly reads either. In
# SECOND the right half, where [V] stands, reads the place and hardly the noun. The **left** half reads "[V]
# robot" more than the right one does. Why?
#
# ## 3 · A word without a sentence
#
# The text encoder is *causal*: a token reads the tokens before it, and none after it. And a caption says the
# place **after** the noun.
#
# ### Exercise 9.3 ★ · Who has heard it?
#
# Exchange token $i$ for the id `other`. Which tokens' states change? `encoder(ids)` returns the context
# $[B, T, D]$ and the pooled vector. A state has changed if any channel moves by more than .001.

# %% tags=["exercise"]
def who_heard(encoder, ids, i, other):
    # ids [1, T] -> bool [T]: which states change if token i is exchanged for `other`
    # BEGIN SOLUTION 9.3
    changed = ids.clone()
    changed[0, i] = other
    return ((encoder(changed)[0] - encoder(ids)[0]).abs().amax(-1) > 1e-3)[0]
    # END SOLUTION

# %% tags=["wrong"]
# says: ids itself
def who_heard(encoder, ids, i, other):
    changed = ids
    changed[0, i] = other
    return ((encoder(changed)[0] - encoder(ids)[0]).abs().amax(-1) > 1e-3)[0]

# %% tags=["wrong"]
# says: the pooled vector
def who_heard(encoder, ids, i, other):
    changed = ids.clone()
    changed[0, i] = other
    return ((encoder(changed)[1] - encoder(ids)[1]).abs() > 1e-3)[0]

# %% tags=["wrong"]
# says: every channel
def who_heard(encoder, ids, i, other):
    changed = ids.clone()
    changed[0, i] = other
    return ((encoder(changed)[0] - encoder(ids)[0]).abs().amin(-1) > 1e-3)[0]

# %% [markdown]
# <details><summary>Hint</summary>
#
# Copy first: `changed = ids.clone()`. `.abs().amax(-1)` of the difference is its largest channel, $[1, T]$.
# </details>

# %% tags=["check"]
words, ids = ["(start)", *SECOND.split()], pipe.tokenizer([SECOND], ROBOT).ids
other_id = pipe.tokenizer.ids["middle"]
for i in (6, 14, 3):
    with torch.no_grad():
        before = ids.clone()
        mine = who_heard(pipe.encoder, ids, i, other_id)
        touched, ids = not torch.equal(ids, before), before
        expect(not touched, "ids itself has changed, and every later use of it. Copy it with .clone().")
        expect(isinstance(mine, torch.Tensor), "return a bool tensor [T]: is the return missing?")
        expect(mine.shape != pipe.encoder(ids)[1][0].shape or mine.shape == ids[0].shape,
               "that is the pooled vector; the encoder returns the states of the tokens first.")
        swapped = torch.where(torch.arange(ids.shape[1]) == i, other_id, ids)
        moved = (pipe.encoder(swapped)[0] - pipe.encoder(ids)[0])[0].abs()
        expect(mine.shape == ids[0].shape, f"the shape should be {list(ids[0].shape)}.")
        expect(torch.equal(moved.amin(-1) > 1e-3, moved.amax(-1) > 1e-3)
               or not torch.equal(mine, moved.amin(-1) > 1e-3), "every channel had to move; one is enough.")
        expect(torch.equal(mine, moved.amax(-1) > 1e-3), "other states change than you say.")
print("9.3 right")
for i in (6, 14):
    heard = who_heard(pipe.encoder, ids, i, other_id)
    print(f"'{words[i]}' is heard by: {' '.join(word for word, hears in zip(words, heard) if hears)}")
    assert not heard[:i].any() and heard[i]      # a later word may read it, and need not
assert who_heard(pipe.encoder, ids, 6, other_id)[[10, 11]].all()             # "[V] robot" has heard "left"

# %% [markdown]
# "[V] robot" has heard "left", the place of the *other* robot (the last word could, and has not). It has not
# heard "right", its own. So
# the right half reads the words that come later. **The token [V] alone cannot speak for a thing that is named
# second.**
#
# And $Y^l$? It *replaces* the token's state at the input of every block (Eq. 7). The state of "robot" in its
# sentence is thrown away. Compare the two at [V], in FIRST and in SECOND.

# %%
token = learned("checked_robot-token")           # lesson 7: adapters at [V] alone, with Y in the word's place

@torch.no_grad()
def states_at_V(text, Y=None):                   # -> [depth, D], at the input of each block
    rows, (x_t, t) = [], noised(text)[0]
    slots = encoded[text].slots > 0                                         # [SEEN, T]

    def visit(l, block, x, c, vec):
        c = c if Y is None else torch.where(slots[..., None], Y[l], c)      # Eq. 7
        rows.append(c[slots].mean(0))
        return block(x, c, vec)
    pipe.velocity(x_t, t, encoded[text], visit)
    return torch.stack(rows)

likeness = {}
for name, Y in (("the word in its sentence", None), ("Y in its place", token.embeddings.Y)):
    in_first, in_second = (states_at_V(text, Y) for text in (FIRST, SECOND))
    likeness[name] = torch.cosine_similarity(in_first, in_second)
    print(f"{name:26s} cosine of the states at [V], FIRST and SECOND, by block: "
          + " ".join(f"{value:.2f}" for value in likeness[name]))
assert torch.allclose(likeness["Y in its place"], torch.ones(depth), atol=1e-5)
assert likeness["the word in its sentence"].max() < 0.9

token_reads = {text: reads(token, text) for text in encoded}
figure, axes = plt.subplots(2, 3, figsize=(6.6, 4.2), layout="compressed")
for row, text in zip(axes, encoded):
    at = text.split().index("[V]")
    maps = [100 * found[text][..., at] for found in (base_reads, token_reads)]
    row[0].imshow(pipe.decode_images(x_0[text][:1])[0])
    row[0].set_ylabel(in_lines(text), rotation=0, ha="right", va="center")
    for axis, values, title in zip(row[1:], maps, ("the word, kept", "Y, in its place")):
        axis.imshow(values, cmap="magma", vmin=0, vmax=max(grid.max() for grid in maps))
        left, right = halves(values[..., None])[:, 0].tolist()
        axis.set(title=title if text == FIRST else "", xlabel=f"left {left:.2f} %,\nright {right:.2f} %")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()
ratio = {name: [halves(found[text])[:, text.split().index("[V]")] for text in encoded]
         for name, found in (("word", base_reads), ("Y", token_reads))}
ratio = {name: [(pair.max() / pair.min()).item() for pair in pairs_] for name, pairs_ in ratio.items()}
assert min(ratio["word"]) > 5 and max(ratio["Y"]) < 2

# %% [markdown] tags=["slide"]
# ## Who reads [V]?
#
# ![Pictures shaded by how much each patch reads [V], for each model](last)
#
# $Y^l$ is one vector, whatever the sentence says. Both robots read it.

# %% [markdown]
# The word's state depends on its sentence. $Y^l$ is one vector for every text: it does not know whether it is
# the left robot or the right one. It is **a word without a sentence**, and both halves read it nearly alike,
# where one had read the word over five times as much as the other. What $Y^l$ says, it says to both robots.
#
# Two causes, then, and two remedies: *keep the word*, and *adapt also what follows it*.
#
# ## 4 · The phrase
#
# The words from [V] to the end of its clause are **[V]'s phrase**:
#
# ```
#     a small robot on the left and a big [V] robot on the right
#                                         '--------------------'
#     a [V] robot with a hat and one eye on the left and a robot on the right
#       '------------------------------------------'
# ```
#
# ### Exercise 9.4 ★★ · The mask of the phrase
#
# The phrase begins at "[V]" and ends before "and", or with the text. But "with" begins a list, in which "and"
# does not end the phrase; the list ends at "on", "in" or "at". Return a bool mask over $T$ tokens. Word $i$,
# counted from 0, is token $i + 1$, because token 0 is the start.

# %% tags=["exercise"]
def phrase_mask(text, T):
    # -> bool [T]
    mask = torch.zeros(T, dtype=torch.bool)
    # BEGIN SOLUTION 9.4
    in_phrase = in_list = False
    for i, word in enumerate(text.split()):
        if word == "[V]":
            in_phrase = True
        elif word == "with":
            in_list = True
        elif word in ("on", "in", "at"):
            in_list = False
        elif word == "and" and not in_list:
            in_phrase = False
        mask[i + 1] = in_phrase
    # END SOLUTION
    return mask

# %% tags=["wrong"]
# says: only the token
def phrase_mask(text, T):
    return torch.tensor([False, *(word == "[V]" for word in text.split())] + [False] * T)[:T]

# %% tags=["wrong"]
# says: one token too early
def phrase_mask(text, T):
    mask, inside = torch.zeros(T, dtype=torch.bool), False
    for i, word in enumerate(text.split()):
        inside = (inside or word == "[V]") and word != "and"
        mask[i] = inside
    return mask

# %% tags=["wrong"]
# says: to the end of the text
def phrase_mask(text, T):
    words = text.split()
    mask = torch.zeros(T, dtype=torch.bool)
    if "[V]" in words:
        mask[words.index("[V]") + 1:len(words) + 1] = True
    return mask

# %% tags=["wrong"]
# says: a list
def phrase_mask(text, T):
    mask, inside = torch.zeros(T, dtype=torch.bool), False
    for i, word in enumerate(text.split()):
        inside = (inside or word == "[V]") and word != "and"
        mask[i + 1] = inside
    return mask

# %% tags=["wrong"]
# says: before [V]
def phrase_mask(text, T):
    mask = torch.zeros(T, dtype=torch.bool)
    start = 1
    for clause in text.split(" and "):
        length = len(clause.split())
        mask[start:start + length] = "[V]" in clause
        start += length + 1
    return mask

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep two flags. "[V]" sets the first, "with" the second. "on", "in" and "at" clear the second, and "and" the
# first, if the second is not set. Then `mask[i + 1]` is the first.
# </details>

# %% tags=["check"]
def package_phrase(text):
    return pipe.tokenizer([text], ROBOT).phrases[0] == 1

def tokens_of(words):                            # a list of flags, one per word -> a mask
    return torch.tensor([False, *words] + [False] * 40)[:package_phrase("a robot").shape[0]]

LIST = "a [V] robot with a hat and one eye on the left and a robot on the right"
for text in (SECOND, FIRST, "a [V] robot", "a robot in the snow", LIST):
    theirs, said = package_phrase(text), text.split()
    mine = phrase_mask(text, len(theirs))
    expect(isinstance(mine, torch.Tensor), "return the mask, a bool tensor [T]: is the return missing?")
    at = said.index("[V]") if "[V]" in said else None
    if at is not None and text != "a [V] robot":
        whole = [text.split(" and ")[0].count("[V]") == (k < len(text.split(" and ")[0].split()))
                 and word != "and" for k, word in enumerate(said)]
        rule_out(mine, {"you mark only the token [V]; its phrase goes on to the end of the clause.":
                            tokens_of([word == "[V]" for word in said]),
                        "you mark [V] and its noun; the phrase goes on to the end of the clause.":
                            tokens_of([k - at in (0, 1) for k in range(len(said))]),
                        "it is one token too early: token 0 is the start of the text.": theirs.roll(-1)})
        if text == FIRST:
            rule_out(mine, {"the mask goes on to the end of the text; 'and' ends the clause.":
                                tokens_of([k >= at for k in range(len(said))])})
        if text in (FIRST, SECOND):
            rule_out(mine, {"the words before [V] are in your mask; they have not heard of [V].":
                                tokens_of(whole)})
    if text == LIST:
        expect(mine.sum() >= theirs.sum(), "in a list after 'with', 'and' does not end the phrase.")
    expect(mine.shape == theirs.shape and torch.equal(mine.bool(), theirs), f"the mask of {text!r} is wrong.")
print("9.4 right")

# %% [markdown]
# Does it hold beyond five texts? Here are random captions.

# %%
random, equal, total = np.random.default_rng(0), 0, 300
for _ in range(total):
    scene = world.random_scene(random, pairs=1)
    nouns = [thing.object for thing in scene.things]
    nouns[int(random.integers(2))] = "[V] robot"
    said = {part for part in (*world.THING_PARTS, *world.SCENE_PARTS) if random.random() > 0.3} | {"place"}
    text = world.caption(scene, tuple(nouns), said)
    equal += torch.equal(phrase_mask(text, len(package_phrase(text))), package_phrase(text))
print(f"{equal} of {total} captions have the package's phrase; the last one: {text!r}")
assert equal == total

# %% [markdown] tags=["slide"]
# ## [V]'s phrase
#
# From [V] to the end of its clause:
#
# | | |
# |---|---|
# | a small robot on the left and a big | **[V] robot on the right** |
# | a | **[V] robot with a hat and one eye on the left** and a robot |
#
# These words describe [V], and they come after it: the causal encoder has told them.

# %% [markdown]
# (Where the rule fails, the user writes braces: "{a [V] robot with a hat} and a robot".)
#
# ## 5 · Adapters on the phrase
#
# This is the method `bound`: in every block, adapters change the text's **keys** and **values** at the tokens
# of the phrase. Keys decide who reads a word, values what is read. There is no $Y^l$: the word stays.
#
# $$k = W_k c + m \cdot B_k A_k c, \qquad v = W_v c + m \cdot B_v A_v c,$$
#
# where $m$ is 1 in the phrase, and 0 elsewhere.
#
# ### Exercise 9.5 ★★★ · The bound forward
#
# Lesson 7 used hooks. Now write the attention itself. `change` is $m \cdot BAc$. `bound_attention` is lesson
# 2's joint attention, with `change_k` added to what `text.to_k` returns, and `change_v` to what `text.to_v`
# returns. Keys are then split into heads, and normed by `text.norm_k`.

# %%
def heads(y, text):                              # [B, T, D] -> [B, H, T, d]
    return rearrange(y, "b t (h d) -> b h t d", h=text.heads)

# %% tags=["exercise"]
def change(c, A, B, mask):
    # c [B, T, D], A [r, D], B [D, r], mask [B, T, 1] -> [B, T, D]
    # BEGIN SOLUTION 9.5
    return mask * (c @ A.T @ B.T)
    # END SOLUTION

def bound_attention(attention, x, c, change_k, change_v):
    # x [B, N, D], c [B, T, D]; change_k, change_v [B, T, D] -> new x, and new c (None in the last block)
    image, text = attention.image, attention.text
    q_x, k_x, v_x = image.qkv(x)                                            # each [B, H, N, d]
    q_c = text.qkv(c)[0]                                                    # [B, H, T, d]
    # then tinyflow.attention.attention(q, k, v), both `to_out`; c is None if not attention.text_output
    # BEGIN SOLUTION 9.5
    k_c = text.norm_k(heads(text.to_k(c) + change_k, text))
    v_c = heads(text.to_v(c) + change_v, text)
    q, k, v = (torch.cat(two, dim=2) for two in ((q_x, q_c), (k_x, k_c), (v_x, v_c)))
    both = rearrange(tinyflow.attention.attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
    return image.to_out(x_out), text.to_out(c_out) if attention.text_output else None
    # END SOLUTION

# %% tags=["wrong"]
# says: before norm_k
def change(c, A, B, mask):
    return mask * (c @ A.T @ B.T)

def bound_attention(attention, x, c, change_k, change_v):
    image, text = attention.image, attention.text
    (q_x, k_x, v_x), (q_c, k_c, v_c) = image.qkv(x), text.qkv(c)
    q, k, v = (torch.cat(two, dim=2) for two in ((q_x, q_c), (k_x, k_c + heads(change_k, text)),
                                                 (v_x, v_c + heads(change_v, text))))
    both = rearrange(tinyflow.attention.attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
    return image.to_out(x_out), text.to_out(c_out) if attention.text_output else None

# %% tags=["wrong"]
# says: only the keys
def change(c, A, B, mask):
    return mask * (c @ A.T @ B.T)

def bound_attention(attention, x, c, change_k, change_v):
    image, text = attention.image, attention.text
    (q_x, k_x, v_x), (q_c, _, v_c) = image.qkv(x), text.qkv(c)
    k_c = text.norm_k(heads(text.to_k(c) + change_k, text))
    q, k, v = (torch.cat(two, dim=2) for two in ((q_x, q_c), (k_x, k_c), (v_x, v_c)))
    both = rearrange(tinyflow.attention.attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
    return image.to_out(x_out), text.to_out(c_out) if attention.text_output else None

# %% tags=["wrong"]
# says: to_out
def change(c, A, B, mask):
    return mask * (c @ A.T @ B.T)

def bound_attention(attention, x, c, change_k, change_v):
    image, text = attention.image, attention.text
    (q_x, k_x, v_x), (q_c, _, _) = image.qkv(x), text.qkv(c)
    k_c, v_c = text.norm_k(heads(text.to_k(c) + change_k, text)), heads(text.to_v(c) + change_v, text)
    q, k, v = (torch.cat(two, dim=2) for two in ((q_x, q_c), (k_x, k_c), (v_x, v_c)))
    both = rearrange(tinyflow.attention.attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
    return x_out, c_out if attention.text_output else None

# %% tags=["wrong"]
# says: patches first
def change(c, A, B, mask):
    return mask * (c @ A.T @ B.T)

def bound_attention(attention, x, c, change_k, change_v):
    image, text = attention.image, attention.text
    (q_x, k_x, v_x), (q_c, _, _) = image.qkv(x), text.qkv(c)
    k_c, v_c = text.norm_k(heads(text.to_k(c) + change_k, text)), heads(text.to_v(c) + change_v, text)
    q, k, v = (torch.cat(two, dim=2) for two in ((q_c, q_x), (k_c, k_x), (v_c, v_x)))
    both = rearrange(tinyflow.attention.attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
    return image.to_out(x_out), text.to_out(c_out) if attention.text_output else None

# %% tags=["wrong"]
# says: outside of the phrase
def change(c, A, B, mask):
    return c @ A.T @ B.T

def bound_attention(attention, x, c, change_k, change_v):
    image, text = attention.image, attention.text
    (q_x, k_x, v_x), (q_c, _, _) = image.qkv(x), text.qkv(c)
    k_c, v_c = text.norm_k(heads(text.to_k(c) + change_k, text)), heads(text.to_v(c) + change_v, text)
    q, k, v = (torch.cat(two, dim=2) for two in ((q_x, q_c), (k_x, k_c), (v_x, v_c)))
    both = rearrange(tinyflow.attention.attention(q, k, v), "b h n d -> b n (h d)")
    x_out, c_out = both.split([x.shape[1], c.shape[1]], dim=1)
    return image.to_out(x_out), text.to_out(c_out) if attention.text_output else None

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Add the change *before* the split and the norm: `text.norm_k(heads(text.to_k(c) + change_k, text))`. Values
# have no norm.
# </details>
# <details><summary>Hint 2</summary>
#
# Join patches and text, in this order, along `dim=2`. `tinyflow.attention.attention(q, k, v)` returns
# $[B, H, N + T, d]$, and `rearrange(..., "b h n d -> b n (h d)")` makes it $[B, N + T, D]$.
# </details>
# <details><summary>Hint 3</summary>
#
# `both.split([x.shape[1], c.shape[1]], dim=1)`, and each stream through its own `to_out`. Where
# `attention.text_output` is False, the text has none, and the new c is None.
# </details>

# %% tags=["check"]
random = torch.Generator().manual_seed(0)
D, noise = pipe.mmdit.config.width, lambda *shape: torch.randn(shape, generator=random)
x, c, mask = noise(2, N, D), noise(2, 9, D), (torch.arange(9) > 5)[None, :, None].expand(2, -1, -1)
A, B = noise(4, D) / 8, noise(D, 4)
mine = change(c, A, B, mask)
rule_out(mine, {"the change acts outside of the phrase, too: multiply it by the mask.": c @ A.T @ B.T})
expect_close(mine, mask * (c @ A.T @ B.T), "the change m B A c", 1e-4)
for l in (0, depth - 1):
    block, moved = pipe.mmdit.blocks[l], [mask * noise(2, 9, D) for _ in range(2)]

    def ours(k_more, v_more):                    # the package's attention, with hooks
        hooks = [layer.register_forward_hook(lambda _, __, out, more=more: out + more) for layer, more in
                 ((block.attention.text.to_k, k_more), (block.attention.text.to_v, v_more))]
        try:
            return block.attention(x, c)
        finally:
            for hook in hooks:
                hook.remove()

    with torch.no_grad():
        mine, theirs = bound_attention(block.attention, x, c, *moved), ours(*moved)
        expect(isinstance(mine, tuple) and len(mine) == 2, "return the new x and the new c: two things.")
        still = bound_attention(block.attention, x, c, 0 * moved[0], 0 * moved[1])
        expect(isinstance(still[0], torch.Tensor) and still[0].shape == x.shape, "the new x is [B, N, D].")
        with mock.patch.object(block.attention.image, "to_out", torch.nn.Identity()):
            rule_out(still[0], {"the streams leave through image.to_out and text.to_out; these are missing.":
                                    block.attention(x, c)[0]})
        expect(torch.allclose(still[0], block.attention(x, c)[0], atol=1e-3),
               "without any change this is not the package's attention: patches first, keys after norm_k.")
        nothing = torch.zeros(2, 9, D)
        rule_out(mine[0], {"only the keys are changed; do the values as well.": ours(moved[0], nothing)[0],
                           "only the values are changed; do the keys as well.": ours(nothing, moved[1])[0]})
    expect((mine[1] is None) == (theirs[1] is None), "the last block has no new c: return None for it.")
    expect(torch.allclose(mine[0], theirs[0], atol=1e-3),
           "v is right without a change, and not with one. Add change_k before norm_k and `heads`.")
    expect_close(mine[0], theirs[0], "the new x", 1e-3)
    if theirs[1] is not None:
        expect_close(mine[1], theirs[1], "the new c", 1e-3)
print("9.5 right: the package's attention with adapters on keys and values, in the first and the last block")

# %% [markdown]
# `theta_with` puts your attention into every block, with the adapters of a learned branch. In a text without
# a phrase the mask is 0 everywhere, so nothing should change. Exactly nothing?

# %%
def theta_with(branches, total):                 # total(c, sets) -> what all sets (A, B, mask) add
    def theta(x_t, t, text):
        masks = [(text.phrases == n)[..., None] for n in range(1, len(branches) + 1)]

        def visit(l, block, x, c, vec):
            keys = [key_of(l, f"attention.text.{name}") for name in ("to_k", "to_v")]

            def attend(x, c):
                sets = [[(branch.lora.A[key], branch.lora.B[key], mask)
                         for branch, mask in zip(branches, masks)] for key in keys]
                return bound_attention(block.attention, x, c, *(total(c, own) for own in sets))
            with mock.patch.object(block.attention, "forward", attend):
                return block(x, c, vec)
        return pipe.velocity(x_t, t, text, visit)
    return theta

bound = learned("checked_robot-bound")           # L_CC, adapters of rank 4 on the phrase
theta_bound = theta_with([bound], lambda c, sets: change(c, *sets[0]))
with torch.no_grad():
    x_t, t = noised(SECOND)[0]
    plain_text = pipe.encode_text([SECOND.replace("[V] ", "")] * SEEN)
    gaps = [(a - b).abs().max().item() for a, b in (
        (theta_bound(x_t, t, plain_text), theta_0(x_t, t, plain_text)),
        (bound(x_t, t, plain_text), theta_0(x_t, t, plain_text)),
        (theta_bound(x_t, t, encoded[SECOND]), bound(x_t, t, encoded[SECOND])))]
print(f"without [V]: yours minus the base model {gaps[0]:g}, the package's minus the base model {gaps[1]:g}\n"
      f"with [V]: yours minus the package's {gaps[2]:.0e}")
assert gaps[0] < 1e-4 and gaps[1] == 0 and gaps[2] < 1e-3

drawn["token"] = pictures(texts, token)
drawn["bound"] = pictures(texts, theta_bound)

def print_table(names):
    print(f"{'':14s}{'on [V]:   all':>14s}{'named first':>14s}{'named second':>14s}{'neighbour leak':>18s}")
    table = {}
    for name in names:
        reading = reader(drawn[name])
        seen = torch.stack([sees(reading, robot.traits_beside, k) for k in (0, 1)], dim=1).float()
        own = seen[torch.arange(len(which)), which].mean(1)                 # [12]
        leak = beside(reading, robot.traits_beside, which)[1] - plain
        table[name] = own.mean().item(), own[which == 0].mean().item(), own[which == 1].mean().item(), leak
        print(f"{name:14s}" + "".join(f"{value:14.2f}" for value in table[name][:3]) + f"{leak:18.2f}")
    return table

show_pairs(["original", "LoRA", "token", "bound"])
table = print_table(["original", "LoRA", "token", "bound"])
assert table["bound"][0] > table["LoRA"][0] and table["bound"][3] < 0.15 < 0.25 < table["token"][3]
assert min(table["bound"][1:3]) > 0.6
reading = reader(drawn["bound"])
assert "checks" not in [reading.names("marking", 1 - n)[k] for k, n in enumerate(which[:6].tolist())]
lights = {name: reader(drawn[name]).names("light")[5] for name in ("original", "LoRA", "bound")}
print("the light on the beach: " + ", ".join(f"{name} {light}" for name, light in lights.items()))
assert lights["original"] == "day" != lights["bound"] and lights["LoRA"] != "day"

# %% [markdown] tags=["slide"]
# ## Bound to the phrase
#
# ![Pictures of two robots bound to the token and bound to the phrase](last)
#
# *token*: $Y^l$ in the word's place. *bound*: the word kept, adapters on the phrase.

# %% [markdown]
# In the row *bound* [V] is where the text says. The neighbour has no checks, though a hat in the snow, and
# another colour in the room. Without [V] nothing changes: the difference is exactly 0. (But on the beach the
# light of the scene turns, as with the LoRA.)
#
# Which remedy did it? Take them apart: *token* without its $Y^l$, and *bound* with its mask cut to a part of
# the phrase. How far does each move the velocity, in each half?

# %%
def part_of_phrase(text, noun):                  # the mask, cut to "[V] robot", or to what follows it
    slots = text.slots.argmax(1, keepdim=True)
    is_noun = torch.arange(text.slots.shape[1]) <= slots + 1
    return replace(text, phrases=text.phrases * (is_noun if noun else ~is_noun))

@torch.no_grad()
def moves(theta, text, asked):                   # -> |v - v_0| / |v_0| in the left half and in the right one
    rows = []
    for x_t, t in noised(text):
        v_0, v = theta_0(x_t, t, asked), theta(x_t, t, asked)
        squares = [w.unflatten(-1, (2, -1)).square().mean((0, 1, 2, 4)) for w in (v - v_0, v_0)]
        rows.append((squares[0] / squares[1]).sqrt())
    return torch.stack(rows).mean(0)

print(f"{'how far v moves':32s}{'FIRST:  [V]':>14s}{'neighbour':>12s}{'SECOND:  [V]':>16s}{'neighbour':>12s}")
far = {}
for name, theta, cut in (("token, Y in the word's place", token, None),
                         ("token, word kept", Branch(pipe, token.lora, None), None),
                         ("phrase, word kept: bound", bound, None),
                         ("  only at '[V] robot'", bound, True), ("  only at what follows", bound, False)):
    for text, own in ((FIRST, 0), (SECOND, 1)):
        asked_text = encoded[text] if cut is None else part_of_phrase(encoded[text], cut)
        pair = moves(theta, text, asked_text).tolist()
        far[name.strip(), text] = pair[own], pair[1 - own]
    (a, b), (c, d) = far[name.strip(), FIRST], far[name.strip(), SECOND]
    print(f"{name:32s}{a:14.1%}{b:12.1%}{c:16.1%}{d:12.1%}")
for text in (FIRST, SECOND):
    own, other = far["token, Y in the word's place", text]
    assert other > 0.5 * own
    own, other = far["phrase, word kept: bound", text]
    assert other < 0.3 * own
assert far["token, word kept", SECOND][0] < 0.05 < 0.15 < far["token, word kept", FIRST][0]
assert far["only at '[V] robot'", SECOND][0] < 0.1 * far["only at what follows", SECOND][0]
assert far["only at '[V] robot'", FIRST][0] > 0.3 * far["only at what follows", FIRST][0]

# %% [markdown] tags=["slide"]
# ## Two causes
#
# | bound to | neighbour leak | on [V], named first | named second |
# |---|---|---|---|
# | the token, $Y^l$ in the word's place | .41 | .52 | .58 |
# | the token, word kept | .04 | .63 | **.13** |
# | the phrase, $Y^l$ in the word's place | .14 | .81 | .88 |
# | **the phrase, word kept** | **.05** | **.78** | **.87** |
#
# From the report: two individuals, three seeds each, rank 4.

# %% [markdown]
# $Y^l$ moves both halves. Without it (second row) the neighbour is nearly left alone, and so is [V] where it
# is named second. The phrase moves [V]'s half in both texts; where [V] is named second, through the words
# that follow. The report trained all four combinations, on two individuals with three seeds:
#
# | | neighbour leak | on [V], named first | named second |
# |---|---|---|---|
# | token, $Y^l$ in the word's place | .41 | .52 | .58 |
# | token, word kept | .04 | .63 | .13 |
# | phrase, $Y^l$ in the word's place | .14 | .81 | .88 |
# | phrase, word kept: `bound` | .05 | .78 | .87 |
#
# ## 6 · Two learned concepts in one text
#
# Two concepts in one text have two phrases, and each acts in its own:
#
# $$k = W_k c + \sum_n m_n \cdot B_n A_n\, c$$
#
# ### Exercise 9.6 ★★ · The sum of two sets
#
# Return the sum of the changes of several sets, with your `change`.

# %% tags=["exercise"]
def sum_of_changes(c, sets):
    # c [B, T, D]; sets: a list of (A [r, D], B [D, r], mask [B, T, 1]) -> [B, T, D]
    # BEGIN SOLUTION 9.6
    return sum(change(c, A, B, mask) for A, B, mask in sets)
    # END SOLUTION

# %% tags=["wrong"]
# says: product of sums
def sum_of_changes(c, sets):
    A, B = sum(A for A, _, _ in sets), sum(B for _, B, _ in sets)
    return change(c, A, B, sum(mask for _, _, mask in sets))

# %% tags=["wrong"]
# says: already changed
def sum_of_changes(c, sets):
    now = c
    for A, B, mask in sets:
        now = now + change(now, A, B, mask)
    return now - c

# %% tags=["wrong"]
# says: only the last set
def sum_of_changes(c, sets):
    for A, B, mask in sets:
        total = change(c, A, B, mask)
    return total

# %% tags=["wrong"]
# says: in each other's phrase
def sum_of_changes(c, sets):
    mask = sum(mask for _, _, mask in sets)
    return sum(change(c, A, B, mask) for A, B, _ in sets)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each set has its own A, B and mask, and reads the same $c$. Add the results of `change`, not the factors.
# </details>

# %% tags=["check"]
random = torch.Generator().manual_seed(1)
c, where = noise(2, 9, D), torch.tensor([0, 1, 1, 1, 0, 2, 2, 2, 0]).expand(2, -1)[..., None]
two = [(noise(4, D) / 8, noise(D, 4), where == n) for n in (1, 2)]
overlapping = [(A, B, where > 0) for A, B, _ in two]     # as adapters that act everywhere do
for sets in (two, overlapping):
    each = [mask * (c @ A.T @ B.T) for A, B, mask in sets]
    mine = sum_of_changes(c, sets)
    (A_1, B_1, m_1), (A_2, B_2, m_2) = sets
    either, second = (m_1 | m_2), c + each[0]
    rule_out(mine, {"this is a product of sums, (B1 + B2)(A1 + A2); add the two products.":
                        either * (c @ (A_1 + A_2).T @ (B_1 + B_2).T),
                    "only the last set is in it; add them up.": each[1]})
    if sets is two:
        rule_out(mine, {"each set acts in each other's phrase, too; every set has its own mask.":
                            either * (c @ A_1.T @ B_1.T + c @ A_2.T @ B_2.T)})
    else:
        rule_out(mine, {"the second set reads what is already changed; every set reads c.":
                            each[0] + m_2 * (second @ A_2.T @ B_2.T),
                        "this is a product of sums; add the two products.":
                            (m_1.float() + m_2) * (c @ (A_1 + A_2).T @ (B_1 + B_2).T)})
    expect_close(mine, sum(each), "the sum of the changes", 1e-3)
print("9.6 right")

# %% [markdown]
# The robot and a house, each learned alone: two LoRAs, whose changes add up everywhere, and two sets on
# phrases, with your sum in your attention.

# %%
def scene(size_1, size_2, background):
    return world.Scene((world.Thing("robot", "red", size_1, "left"),
                        world.Thing("house", "red", size_2, "right")), background)

scenes = [scene("big", "small", "desert"), scene("small", "big", "snow"), scene("big", "big", "meadow"),
          scene("small", "small", "room"), scene("big", "small", "beach"), scene("small", "big", "night")]
WORDS, SAID = {"[V1]": "robot", "[V2]": "house"}, world.PLAIN_PARTS - {"colour"}
two_texts = [world.caption(s, ("[V1] robot", "[V2] house"), SAID) for s in scenes]
both = {kind: [learned(f"{name}-{kind}") for name in TUNING[:2]] for kind in ("lora", "bound-pairs")}
of_two = {"original": pictures([world.caption(s, (), SAID) for s in scenes]),
          "two LoRAs": pictures(two_texts, lambda *step: velocity_with(both["lora"], *step), WORDS),
          "two phrases": pictures(two_texts, theta_with(both["bound-pairs"], sum_of_changes), WORDS)}
rows = [picture for x in of_two.values() for picture in to_pictures(x)]
show([*rows, *references(robot)[:3], *references(house)[:3]], [s.background for s in scenes],
     [*of_two, "[V1] | [V2]:\nreferences"], side=1.45)
own, others = {}, {}
for name, x in of_two.items():
    shares = torch.tensor([[sees(reader(x), toy.traits_beside, k).float().mean() for toy in (robot, house)]
                           for k in (0, 1)])     # [object, concept]
    own[name], others[name] = shares.trace().item() / 2, shares.fliplr().trace().item() / 2
    print(f"{name:14s} own traits {own[name]:.2f}   the other's {others[name]:.2f}")
with torch.no_grad():
    x_t, t = noised(FIRST)[0]
    named = pipe.encode_text([two_texts[0]] * SEEN, WORDS)
    gap = (theta_with(both["bound-pairs"], sum_of_changes)(x_t, t, named)
           - velocity_with(both["bound-pairs"], x_t, t, named)).abs().max().item()
print(f"yours minus the package's: {gap:.0e}; the text of the first column: {two_texts[0]!r}")
assert gap < 1e-3 and own["two phrases"] > own["two LoRAs"] + 0.1
assert others["two phrases"] < others["two LoRAs"] - 0.1

# %% [markdown] tags=["slide", "checked_robot", "dotted_house"]
# ## Two learned concepts in one text
#
# ![Pictures of the robot and the house, both learned, in one text](last)
#
# "a small [V1] robot on the left and a big [V2] house on the right", and five more: each concept acts in its
# own phrase. Nothing was trained for this.

# %% [markdown]
# Two LoRAs speak to everybody, two phrases to their own thing. (In the report, with 50 scenes a pair, a
# concept keeps .99 of the traits that it shows alone with `bound` and with `bound-pairs`, and .77 with a
# LoRA.)
#
# ## 7 · Eq. 13 in space
#
# Every reference shows one thing. So no loss has ever asked for what we want: a neighbour that stays.
# PureCC's Eq. 13 asks for the original, plus what the concept adds, and nothing else:
#
# $$v_{PureCC} = v_{original} + \lambda^* R(y_{tar})$$
#
# With two things in a picture, "nothing else" has a place. The base model imagines a scene of two plain
# robots. We name one of them [V], and ask for
#
# $$v_{original} + M R, \qquad R = v_{\theta_1}(x_t \mid \text{one is [V]}) - v_{original},$$
#
# where $M$, in place of $\lambda^*$, is 1 in [V]'s half of the picture and 0 in the other. The extractor
# $\theta_1$ is a frozen LoRA, and $v_{original}$ the base model's velocity for the text without [V].
#
# ### Exercise 9.7 ★★ · The target
#
# Return $v_{original} + MR$. `left` $[B]$ is True where [V] is the left thing. The last axis of a velocity is
# the columns of the picture.

# %% tags=["exercise"]
def target_in_space(v_original, v_extractor, left):
    # v_original, v_extractor [B, C, H, W]; left bool [B] -> [B, C, H, W]
    # BEGIN SOLUTION 9.7
    W = v_original.shape[-1]
    in_left_half = torch.arange(W) < W // 2                                 # [W]
    M = (in_left_half == left[:, None])[:, None, None].float()              # [B, 1, 1, W]
    return v_original + M * (v_extractor - v_original)
    # END SOLUTION

# %% tags=["wrong"]
# says: the other half
def target_in_space(v_original, v_extractor, left):
    W = v_original.shape[-1]
    M = ((torch.arange(W) < W // 2) != left[:, None])[:, None, None].float()
    return v_original + M * (v_extractor - v_original)

# %% tags=["wrong"]
# says: no mask
def target_in_space(v_original, v_extractor, left):
    return v_original + (v_extractor - v_original)

# %% tags=["wrong"]
# says: upper half
def target_in_space(v_original, v_extractor, left):
    H = v_original.shape[-2]
    M = ((torch.arange(H) < H // 2) == left[:, None])[:, None, :, None].float()
    return v_original + M * (v_extractor - v_original)

# %% tags=["wrong"]
# says: must stay the original's
def target_in_space(v_original, v_extractor, left):
    W = v_original.shape[-1]
    M = ((torch.arange(W) < W // 2) == left[:, None])[:, None, None].float()
    return M * v_extractor

# %% tags=["wrong"]
# says: R is a difference
def target_in_space(v_original, v_extractor, left):
    W = v_original.shape[-1]
    M = ((torch.arange(W) < W // 2) == left[:, None])[:, None, None].float()
    return v_original + M * v_extractor

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `(torch.arange(W) < W // 2) == left[:, None]` is $[B, W]$: True in the columns of [V]'s half.
# </details>
# <details><summary>Hint 2</summary>
#
# `[:, None, None].float()` makes it numbers $[B, 1, 1, W]$ that multiply $R$.
# </details>

# %% tags=["check"]
data = imagine(pipe, robot.references(), PAIR_TEMPLATES, seed=0, count=4, steps=8)     # 4 scenes, each twice
extractor, left = learned("checked_robot-lora"), torch.arange(8) < 4
t = torch.full((8,), 0.9)
x_t = flow.path(data.x_0, flow.noise_for([0, 1, 2, 3] * 2, data.x_0.shape[1:]), t)
with torch.no_grad():
    v_original, v_extractor = theta_0(x_t, t, data.texts.base), extractor(x_t, t, data.texts.complete)
    M = data.masks[:, 0]                         # the package's, [8, 1, H, W]
    R, top = v_extractor - v_original, M.mT
mine = target_in_space(v_original, v_extractor, left)
rule_out(mine, {"M is 1 in the other half, where the plain robot is.": v_original + (1 - M) * R,
                "there is no mask: this asks the plain robot to become [V], too.": v_extractor,
                "your M is 1 in the upper half: columns are the last axis.": v_original + top * R,
                "the half without [V] must stay the original's, not become 0.": M * v_extractor,
                "R is a difference: what [V] adds to v_original.": v_original + M * v_extractor})
expect_close(mine, v_original + M * R, "the target", 1e-5)
batch = draw_batch(data, TrainConfig(batch=8), 1, 0, pipe.shift)            # of these scenes; its mask is M
with torch.no_grad():                            # your target in the package's loss
    here, texts_here = (batch.x_t, batch.t), batch.texts
    v_0, v_1 = theta_0(*here, texts_here.base), extractor(*here, texts_here.complete)
    target = target_in_space(v_0, v_1, batch.mask[:, 0, 0, 0] == 1)
    loss = (bound(*here, texts_here.complete) - target).square().mean()
    log = pairs(Thetas(theta_0, extractor, bound), batch._replace(imagined=batch, mask=None), 1.0)[1]
expect_close(loss, log["loss_pairs"], "the mean square of theta minus your target", 1e-4)
print(f"9.7 right: the package's loss_pairs, {loss:.4f} for `bound`, which has never been asked for it")

# %% [markdown]
# The picture at which a velocity points is $x_t - t\,v$ (lesson 1).

# %%
seen_in_noise = {"the scene": data.x_0, "noised, t = .9": x_t}
seen_in_noise |= {name: x_t - 0.9 * v for name, v in (
    ("the original's v", v_original), ("the LoRA's v", v_extractor), ("the target", mine))}
columns = [0, 1, 2, 4, 5, 6]
show([picture for x in seen_in_noise.values() for picture in pipe.decode_images(x[columns])],
     ["[V] on the left", "", "", "[V] on the right"], list(seen_in_noise), side=1.45)
half = (data.masks[:, 0] == 0).expand_as(mine)
assert torch.equal(mine[half], v_original[half])

# %% [markdown] tags=["slide"]
# ## Eq. 13, asked for in space
#
# ![A scene of two robots, the mask of [V]'s half, and the velocity that is asked for](last)
#
# $v_{original} + M R$: in [V]'s half ($M = 1$) it adds $R$, what the LoRA adds; the other half stays.

# %%
drawn["bound-pairs"] = pictures(texts, learned("checked_robot-bound-pairs"))
show_pairs(["original", "bound", "bound-pairs"])
table = print_table(["original", "LoRA", "token", "bound", "bound-pairs"])

def change_of_neighbour(name):                   # mean change of its pixels from the original's, 0 to 1
    mask = reader(drawn["original"]).mask > 0                               # [12, 2, H, W]
    there = mask[torch.arange(len(which)), 1 - which]
    return ((drawn[name] - drawn["original"]).abs().mean(1) / 2)[there].mean().item()

changes = {name: change_of_neighbour(name) for name in ("LoRA", "token", "bound", "bound-pairs")}
print("how far the neighbour's pixels change: "
      + ", ".join(f"{name} {value:.3f}" for name, value in changes.items()))
assert changes["bound-pairs"] < changes["bound"] < min(changes["token"], changes["LoRA"])
assert table["bound-pairs"][0] > 0.8 and abs(table["bound-pairs"][3]) < 0.1

# %% [markdown]
# Here `bound-pairs` changes the neighbour less than `bound`. The report, on four
# individuals and five seeds:
#
# | | fidelity | on [V], next to a plain thing | neighbour leak |
# |---|---|---|---|
# | `bound` | .859 | .778 | .031 |
# | `bound-pairs` | .891 | .876 | .009 |
# | `bound-pairs` minus `bound` | +.032 ± .022 | +.098 ± .046 | -.022 ± .012 |
#
# The place of the adapters does most, and Eq. 13 in space adds a part. Its price is on average 5.84 forward
# and 3 backward passes a step, in place of 1 and 1, with the extractor's training and the imagined scenes.
# `bound-pairs` is `learn`'s default on the tiny model.
#
# What stays open: where the thing on the right is named first, that on the left gets the concept. The base
# model draws what is named first on the left.
#
# ## 8 · Styles (optional)
#
# A style has no noun and no place. In this world its [V] takes the place of the text's first word, "a":
#
# ```
#   base       a    big red ball on the left and a small blue cat on the right in the snow
#   complete   [V]  big red ball on the left and a small blue cat on the right in the snow
#   target     [V]
# ```
#
# ### Exercise 9.8 ★ · The texts of a style

# %% tags=["exercise"]
def style_texts(base):
    # a base text -> complete, target
    # BEGIN SOLUTION 9.8
    return "[V]" + base.removeprefix("a"), "[V]"
    # END SOLUTION

# %% tags=["wrong"]
# says: only the first
def style_texts(base):
    return " ".join("[V]" if word == "a" else word for word in base.split()), "[V]"

# %% tags=["wrong"]
# says: takes its place
def style_texts(base):
    return "[V] " + base, "[V]"

# %% [markdown]
# <details><summary>Hint</summary>
#
# `base.removeprefix("a")` takes away the first letter if it is an a, and nothing else.
# </details>

# %% tags=["check"]
prompts = style.prompts()["concept"]
pair_scene = world.random_scene(np.random.default_rng(1), parts=False, pairs=1)
for prompt in [*prompts, style.prompt(pair_scene)]:
    mine = style_texts(prompt.base)
    expect(isinstance(mine, tuple) and len(mine) == 2, "return two texts.")
    expect(mine[0].count("[V]") == 1, "only the first 'a' becomes [V]; a style has one name in a text.")
    expect(not mine[0].startswith("[V] a "), "[V] takes its place: the first 'a' goes away.")
    expect(mine == (prompt.complete, "[V]"), f"{prompt.base!r} should become {prompt.complete!r} and '[V]'.")
print(f"9.8 right: {style.prompt(pair_scene).complete}")

# %% [markdown]
# The encoder reads the stand-in "a" at [V], so it passes on nothing of the style: for the base model the
# complete text **is** the base text. In the MMDiT every patch may read the slot, and here all of the picture
# is meant. Train one, with a LoRA, fifty steps at a high rate.

# %%
config = TrainConfig(steps=50, learning_rate=7e-3, embedding_learning_rate=3e-2)
data, random = encode(pipe, style.references()), generator_for(config.seed, stage=1, step=-1)
theta = Branch.fresh(pipe, class_word_states(pipe, data, random), config.rank, random)
thetas = Thetas(theta_0, None, theta)
for _ in train_steps(methods.l_cc, thetas, data, config, 1, optimizer_for(theta, config)):
    pass
with_V, without_V = [p.complete for p in prompts[:3]], [p.base for p in prompts[:3]]
one, two = pipe.encode_text(with_V, {"[V]": "a"}), pipe.encode_text(without_V)
assert torch.equal(one.context, two.context) and torch.equal(one.pooled, two.pooled)

rows = {"original": pictures(without_V + without_V),
        "LoRA": pictures(with_V + without_V, theta.requires_grad_(False), {"[V]": "a"})}
rows["perfect"] = torch.cat([in_style(style, rows["original"][:3]), rows["original"][3:]])
show([*(picture for x in rows.values() for picture in to_pictures(x)), *references(style)],
     ["with [V]", "", "", "without"], [*rows, "[V]: references"], side=1.45)
judge = Judge(reader, style, references(style))
like = {name: [judge.similarity(reader(part)).mean().item() for part in (x[:3], x[3:])]
        for name, x in rows.items()}
print("likeness of the look to the references:   with [V]   without")
for name, (a, b) in like.items():
    print(f"{name:40s}{a:10.2f}{b:10.2f}")
assert like["LoRA"][0] > like["original"][0] + 0.2 and like["LoRA"][1] > like["original"][1] + 0.1

# %% [markdown] tags=["slide", "moss_print"]
# ## A style leaks into every text (optional)
#
# ![Pictures with and without the style in the text, by the original, the LoRA and the switched-off
# LoRA](last)
#
# A style's phrase is the whole text. So it is learned with a LoRA that is switched off without [V].

# %% [markdown]
# Without [V] the LoRA draws in the style, too. A robot leaks into the word "robot", a style into everything.
# A style's phrase is all words of the text, and some are stronger than the style: of the report's two styles
# `bound` learns one, and .57 of the other, where "at night" and "in the desert" win. `switched-off` learns
# both (1.02 and 1.00; 1 is the renderer's picture), and without [V] it drifts by 0, where a LoRA drifts by
# .195. Nobody stands *beside* a style, so a switch has no weakness here. That is why `learn` takes
# `switched-off` for a style.
#
# ## What you can now say
#
# * A LoRA, PureCC and a switch turn the thing next to [V] into [V].
# * $Y^l$ replaces a state that knew its sentence, and both things read it.
# * The encoder is causal, and the place comes after the noun. So the token alone cannot reach a thing that is
# named second.
# * Adapters on keys and values of the phrase: no phrase, no change; two phrases, two concepts.
# * Eq. 13 with a mask asks for purity where it can fail.
#
# | you wrote | in the package |
# |---|---|
# | `beside` | `seen_next_to_it` in `purecc_min/measure/measures.py` |
# | `patches_read` | `watch` in `tutorials/experiments/attention.py` |
# | `phrase_mask` | `clause_end` in `tinyflow/phrase.py` |
# | `change`, `sum_of_changes` | `LoRA.hook` in `purecc_min/lora.py` |
# | `target_in_space` | `pairs_loss` in `purecc_min/pairs.py` |
#
# ## Three questions
#
# **1.** "A [V] robot and a robot in the snow" names no places. What is [V]'s phrase? What do you expect?
# <details><summary>Answer</summary>
#
# "[V] robot". It says nothing of a place, so it is no good address for one half. In the report [V] then shows
# .63 of its traits with `bound-pairs` (.85 with a LoRA), and the leak is .12 (.67).
# </details>
#
# **2.** In a text encoder such as T5 every token reads all others. Which of the two causes remains?
# <details><summary>Answer</summary>
#
# $Y^l$ still knows no sentence. But a word that is kept has read what follows it, so the token alone *may* be
# enough. Nobody has measured it.
# </details>
#
# **3.** In section 7, why may the extractor be a LoRA that leaks?
# <details><summary>Answer</summary>
#
# $M$ throws away all that it does in the other half. It only has to draw [V] well, next to another thing.
# </details>
#
# **Next:** lesson 10, on photographs.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. "A [V] robot and a robot in the snow" names no places. What do you expect?
# 2. A text encoder that is not causal: which of the two causes remains?
# 3. Why may the extractor of pairs be a LoRA that leaks?

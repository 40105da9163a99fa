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
# # 0 · One new thing, and nothing else
#
# The deck with which a class begins. It has no notebook: `python -m tutorials.build 0` makes the slides
# alone.

# %%
import csv
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch

import purecc_min
from purecc_min.concept_file import load_branch
from purecc_min.measure import toy
from purecc_min.sheets import draw_texts
from tinyflow.flow import euler, guide, noise_for
from tinyflow.picturebook import world
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.render import render
from tinyflow.pipeline import to_pictures
from tutorials.course import BLUE, CORAL, INK, in_lines, show

pipe, WORDS = load_tiny(), {"[V]": "robot"}
LEARNED = Path(purecc_min.__file__).parent / "measure" / "learned"
pure, lora = (load_branch(pipe, LEARNED / f"checked_robot-{name}.safetensors")[0]
              for name in ("bound-pairs", "lora"))
concept = toy.CONCEPTS["checked_robot"].references()
references = [one.picture.squeeze() for one in concept.references]

def pixels(texts, theta=None):
    return draw_texts(pipe, texts, WORDS, theta=theta, theta_null=pipe.velocity)

show(references, columns=4, side=1.7)

# %% [markdown] tags=["slide", "no-references"]
# # One new thing, and nothing else
#
# ![Four pictures of the same robot with blue checks on orange, always in the desert](last)
#
# Concept customization, from the first line of code to the evidence: the course's deck 0.
# ???
# These are four pictures of one robot. We call it [V]. The whole course is about one wish: a model that draws
# pictures from texts should learn this robot, from these four pictures, and should change in nothing else.
#
# Keys: the arrows turn the pages, N opens these notes in a window of their own.

# %%
TEXTS = ["a big [V] robot on the right in the snow", "a small robot on the left in the meadow",
         "a big [V] robot on the left and a small robot on the right at night",
         "a small red ball on the right in the room"]
BASE = [text.replace("[V] ", "") for text in TEXTS]
columns = [in_lines(text) for text in TEXTS]
original, spoiled, wished = (to_pictures(pixels(*row)) for row in ((BASE,), (TEXTS, lora), (TEXTS, pure)))
show(list(original), [in_lines(text) for text in BASE], columns=4, side=1.7)

# %% [markdown] tags=["slide"]
# ## A model draws what a text says
#
# ![Pictures of a robot in snow, a robot in a meadow, two robots at night, and a ball in a room](last)
#
# It knows robots. It does not know *your* robot. How would you tell it, if no word means it?
# ???
# The base model of this course draws these from the texts above them. Ask the class: how could one describe
# the robot of the four pictures so exactly that the model draws this one? A text that is long enough does not
# exist for a real dog or a real cup. So we show pictures, and give the thing a name: [V].

# %%
show([*original, *spoiled], columns, ["before", "after a\nplain LoRA"], columns=4, side=1.6)
changed = [np.abs(a.astype(float) - b).mean() for a, b in zip(original, spoiled)]
print("change of the two texts without [V], mean over pixels:", [f"{changed[n]:.1f}" for n in (1, 3)])
assert min(changed[1], changed[3]) > 2           # of 255

# %% [markdown] tags=["slide"]
# ## The problem, in pictures
#
# ![Two rows. Above, the base model; below, after a plain LoRA. The second and the fourth text have no [V], and their
# pictures have changed, too](last)
#
# It has learned [V]. But look at the second and the fourth column: nobody asked for [V] there.
# ???
# Both rows start from the same noise. The upper row is the model before, with the same texts without [V].
# Below it a plain LoRA has learned [V] from the four pictures; this is what people do most often. Let the
# class find the differences: in the second and the fourth text nobody asked for [V], and the pictures changed
# all the same. In the third text there are two robots, of which only one is [V].

# %%
captions = [one.complete for one in concept.references]
show(references, [in_lines(caption) for caption in captions], columns=4, side=1.8)
assert all("desert" in caption for caption in captions)

# %% [markdown] tags=["slide", "no-references"]
# ## What four pictures share
#
# ![The four references with their captions: each of them names the desert](last)
#
# All four pictures were taken in the desert. Nothing **in a picture** says that the desert is not a part of
# [V]. Only texts can.
# ???
# These captions name the desert, so that [V] need not stand for it. If they said no more than "a [V] robot",
# a LoRA would take the desert, or the place in the picture, for a part of [V]: with such captions what the
# four pictures share comes along in .56 more of its pictures than the original model's (the table of masks in
# purecc_min/README.md; two seeds). What no word explains is learned as a part of [V]: lesson 5.

# %%
show([*original, *wished], columns, ["before", "what we\nwant"], columns=4, side=1.6)
same = [np.array_equal(a, b) for a, b in zip(original, wished)]
print("the pictures without [V] are the same, bit for bit:", [same[n] for n in (1, 3)])
assert same == [False, True, False, True]

# %% [markdown] tags=["slide"]
# ## What we want
#
# ![Two rows. Above, the base model; below, the same pictures, in which only the robots named [V] have changed](last)
#
# With [V], the robot changes and the place stays; only the green light of the third picture goes.
# Without [V], every picture is the old one, bit for bit.
# ???
# The lower row was drawn by the method that this course ends with in lesson 9: adapters that act only at the
# words which speak of [V], trained with pairs of things. It is no wish any more, in this small world. What
# the class will learn is why it works, how one knows, and where it stops.

# %%
scenes = [world.random_scene(np.random.default_rng(n)) for n in (1, 3, 5, 8, 13)]
scene_texts = [in_lines(world.caption(scene).replace(" with ", "\nwith ")) for scene in scenes]
show([render(scene)[0] for scene in scenes], scene_texts, columns=5, side=1.9)
print(f"{sum(p.numel() for p in pipe.mmdit.parameters()) / 1e6:.1f} million parameters, "
      f"{pipe.picture_size} x {pipe.picture_size} pixels")

# %% [markdown] tags=["slide", "no-references"]
# ## The world
#
# ![Five pictures of a picture book, each with the caption that it was drawn from](last)
#
# A picture book that we draw ourselves. So for every picture we **know** what should be in it, and what a
# perfect method would draw. A laptop computes everything.
# ???
# No public benchmark can say exactly what a model has lost, because nobody owns the truth of photographs. We
# own the renderer of this world. The model has the architecture of Stable Diffusion 3.5, with 3.5 million
# parameters and pictures of 64 x 64 pixels. Lesson 10 takes the same code to SD3.5 itself. What we find here
# says nothing certain about large models, and the course says so wherever it matters.

# %%
with torch.no_grad():
    text, empty = pipe.encode_text([BASE[0]]), pipe.encode_text([""])
    x = noise_for([0], (pipe.mmdit.config.channels, *[pipe.picture_size // pipe.codec.factor] * 2))
    way = [(1.0, x), *euler(lambda x, t: guide(pipe.velocity(x, t, empty), pipe.velocity(x, t, text),
                                               pipe.guidance),
                            x, 28, pipe.shift, pipe.last_time)]
    kept = [way[n] for n in (0, 10, 17, 22, 25, 28)]
    show([to_pictures(pipe.decode(x))[0] for _, x in kept], [f"t = {t:.2f}" for t, _ in kept],
         columns=6, side=1.6)

# %% [markdown] tags=["slide", "no-references"]
# ## What a flow is for
#
# ![Six pictures from pure noise at t = 1 to a robot in the snow at t = 0](last)
#
# Noise becomes a picture along a **velocity** $v(x_t, t \mid \text{text})$. A network answers one question,
# again and again: from here, which way?
# ???
# At t = 1 there is noise alone. The network looks at the noise and at the text, and says in which direction
# each number should move. We take a small step, and ask again. After 28 questions there is a picture.
# Everything that a text can change, it changes through this velocity. That is why the whole course speaks of
# velocities.

# %% [markdown] tags=["slide", "no-references"]
# ## How it learns to answer
#
# ![A picture x 0 on the left, noise x 1 on the right, a straight line between them; on it the mixture x t, and an arrow
# from data to noise, the velocity](../diagrams/flow.svg)
#
# Mix a picture with noise, and ask for the direction of the line: $v = x_1 - x_0$.
# ???
# Training needs no simulation. Draw a picture, draw noise, draw a time t, and mix the two: this is the point
# on the line. The network sees the point, the time and the caption, and must say the direction of the line.
# Many lines cross at a point, so its best answer is their mean. Lesson 1 shows in two dimensions that this is
# enough.

# %% [markdown] tags=["slide"]
# ## The paper's idea
#
# ![The objective as arrows: from v original one arrow to v complete, what [V] adds; along the direction of the concept the
# arrow to v PureCC; the rest, at a right angle, is what L PureCC removes](../diagrams/idea.svg)
#
# PureCC (CVPR 2026, arXiv 2603.07561): what [V] adds to a prediction should be the concept and nothing else.
# *Extractor* first, then *pure learning*.
# ???
# Stage 1 learns [V] in the usual way and is then frozen: the extractor. It knows a direction, which the
# concept alone adds to a velocity. In stage 2 a second model learns. For every step we ask what [V] adds to
# its prediction, and project it on the extractor's direction. What is left over, at a right angle, is not the
# concept: the new term of the loss removes it. This is four lines of code, and lesson 6 derives them.
# play.html lets you drag the arrows.

# %%
named = {"lora": "LoRA", "switched-off": "LoRA, switched off without [V]", "paper": "PureCC as written",
         "bound": "bound to [V]'s phrase", "bound-pairs": "bound, with pairs"}
rows = defaultdict(dict)
table = Path(purecc_min.__file__).parent / "benchmark" / "report_pages" / "main.csv"
for row in csv.DictReader(open(table, encoding="utf-8")):
    if row["method"] in named and row["neighbour leak"]:                    # a style has no neighbour
        rows[row["method"]][row["concept"], row["seed"]] = row              # the last of a training stays
found = {method: [np.mean([float(row[what]) for row in rows[method].values()])
                  for what in ("fidelity", "neighbour leak")]
         for method in named}

plt.figure(figsize=(7.4, 2.5), layout="constrained")
for (method, (fidelity, leak)), mark in zip(found.items(), "os^Dv"):
    bound = method.startswith("bound")
    plt.scatter(fidelity, leak, s=60, marker=mark, color=BLUE if bound else CORAL, edgecolor=INK,
                label=named[method])
    print(f"{named[method]:32}fidelity {fidelity:.2f}, the plain robot next to [V] takes on {leak:.2f} "
          "of its traits")
plt.xlim(.8, 1)
plt.ylim(-.05, .9)
plt.xlabel("[V] is learned (a perfect method: 1)")
plt.ylabel("its neighbour\nbecomes [V]")
plt.legend(loc="center left", bbox_to_anchor=(1.02, .5))
plt.show()
assert all(len(own) == 20 for own in rows.values())                         # four concepts, five seeds
assert abs(found["paper"][0] - found["lora"][0]) < .06 and abs(found["paper"][1] - found["lora"][1]) < .06
assert max(found[name][1] for name in ("bound", "bound-pairs")) < .1 < .5 < found["switched-off"][1]

# %% [markdown] tags=["slide"]
# ## What was found here
#
# ![Each method as a point: how well [V] is learned, and how much a plain thing next to it becomes [V]. The two bound methods
# lie at the bottom, all others above the middle](last)
#
# Four concepts that nobody chose, five seeds. In this small world the paper's loss hardly differs from a
# plain LoRA; *where* adapters act decides what is damaged.
# ???
# A negative result stands at the centre of this course, and a positive one next to it. The paper's loss,
# written exactly as in the paper, differs from a plain LoRA by .06 at most here, in every measure; lesson 7
# finds out why, with one line of algebra. Adapters that act only at [V]'s phrase, the words that describe it
# ("bound"), repair what the loss cannot; "pairs" are two things in one picture, of which one must stay;
# "switched off" is a LoRA that is used only for texts with [V].
# Nobody here has measured whether both hold for SD3.5.

# %% [markdown] tags=["slide"]
# ## The way
#
# | lessons | you build | you can answer |
# |---|---|---|
# | 1, 2, 3 | a flow, the transformer, words and guidance | How does a text become a picture? |
# | 4, 5 | adapters, embeddings; measures of damage | How does a concept get in, and what breaks? |
# | **6, 7** | **Eq. 8 to 15, and three cures** | What does the loss see, and what not? |
# | 8, 9 | a benchmark; two things in one picture | How do we know? Who reads the word [V]? |
# | 10 | what SD3.5 needs | How do I do it with photographs? |
# ???
# Every lesson is a notebook with blanks, and every blank has a check that names the usual mistakes. Read
# sections that are marked optional only if you like. The solved notebooks show all outputs.

# %% [markdown] tags=["slide"]
# ## Three questions to take along
#
# 1. Four photographs of your cup, all in your kitchen. What could a model take for the cup?
# 2. A loss compares what a model says with [V] and without. Which change can it not see?
# 3. Two robots in one text, one of them [V]. Where in the text does it say which is which?
# ???
# Let the class guess, and write the guesses down. The first is answered in lesson 5 (see slide 4), the second in lesson 7,
# the third in lesson 9.

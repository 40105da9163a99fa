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
# # 5 · What goes wrong
#
# **Four pictures, and how to measure what they did to a model**
#
# Four pictures of one robot are enough to teach the model that robot. They also teach it things that nobody
# wanted, and the training loss reports none of them. In this lesson you write the training, look at the
# damage with your own eyes, and then put numbers on it: you guess them first, and write them afterwards.
#
# **When you are through, you have written**
#
# 1. a training loop that serves full fine-tuning and LoRA alike;
# 2. four measures: similarity, change outside the object, class leak and diversity;
# 3. the path KL, a distance between two flows in nats, and the two kinds of intervals that belong to a table;
#
# **and you can say** what the five common failures look like, why $L_{CC}$ sees none of them, and why two
# methods must not be compared at the end of their trainings.
#
# | | |
# |---|---|
# | Time | 40 minutes of reading, 2 hours with the exercises; a minute and a half of computing on one CPU core |
# | Needs | lesson 1 (path and velocity), lesson 4 (LoRA, the slot of [V]); mean and variance |
# | Keep open | [`purecc_min/measure/measures.py`](../../purecc_min/measure/measures.py), **after** you have tried |
# | Read after | lessons 6 and 7: a loss against these failures, and what it cannot hold |
#
# An exercise is a function whose body is blank, and the cell below it is its check. Hints are folded; the
# solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 5 · What goes wrong
#
# Four pictures, what they did to a model, and how to measure it.

# %%
import copy
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from purecc_min.learning import train_steps
from purecc_min import methods
from purecc_min.benchmark.tables import STUDENT_T, mean_and_interval, mean_by_seed
from purecc_min.branch import Branch
from purecc_min.commands.folder import load_concept
from purecc_min.concept import Batch, encode, noised
from purecc_min.embeddings import class_word_states
from purecc_min.measure.draw import draw, draw_groups
from purecc_min.measure.judge import Drawn, Judge
from purecc_min.measure.measures import ALWAYS_SHOWN, MEASURES, pixel_change
from purecc_min.measure.toy import CONCEPTS, FOLDER, TUNING, Toy
from purecc_min.measure.velocities import TIMES, velocity_error
from purecc_min.train import TrainConfig, draw_batch, generator_for, optimizer_for
from tinyflow import flow
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import to_pictures, to_pixels
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, show

pipe, reader = load_tiny(), Reader.shipped()     # the base model and the reader network, both frozen
theta_0 = pipe.velocity
toy = CONCEPTS[TUNING[0]]                        # all that is true about the concept
concept = load_concept(FOLDER / TUNING[0], toy.class_word, pipe.picture_size)
data, word = encode(pipe, concept), concept.class_word

def in_lines(text):
    for little in (" on ", " in ", " at ", " and "):
        text = text.replace(little, f"\n{little[1:]}")
    return text

names = [in_lines(ref.complete) for ref in concept.references]
show([ref.picture for ref in concept.references], names, columns=len(names), side=1.6)
print("the concept  ", ", ".join(f"{head} {value}" for head, value in toy.known_traits.items()))
print("the confounder", ", ".join(f"{head} {value}" for head, value in toy.confounder.items()))

# %% [markdown]
# These are the references of lesson 4. *The concept* is what [V] should mean; *the confounder* is what all
# four pictures share by chance, the desert and the place in the middle. Only because a program has drawn them
# do we know which is which. A user of photographs does not, and neither does the model.
#
# ## 1 · One loop, two ways to train
#
# **DreamBooth** (2208.12242), in its plainest form, trains *every* weight of the model on the references.
# (The original has a second term, on the model's own pictures of the class.) A **LoRA** trains a few
# adapters (lesson 4). The loss of both is Eq. 3 with the complete text:
#
# $$L_{CC} = \mathbb E\, \lVert v_\theta(x_t, t \mid y_{complete}) - v \rVert^2, \qquad v = x_1 - x_0.$$
#
# ```
#   DreamBooth   "a [V] robot in the desert" --> all weights, copied and trained --> v     [V] is read as
#                                                                                          one more "robot"
#   LoRA         "a [V] robot in the desert" --> frozen weights + adapters, Y    --> v     [V] has its own Y
# ```
#
# ### Exercise 5.1 ★★ · The loop
#
# `draw_batch` gives `batch.x_t`, `batch.t`, `batch.v` and the texts. Write one step: the loss, its gradient,
# the gradient's norm clipped to 1 (`torch.nn.utils.clip_grad_norm_`), the optimiser's step. What is trained
# is only decided by `weights`.

# %% tags=["exercise"]
def train(theta, weights, data, rate, steps, keep=(), seed=0):
    # theta(x_t, t, text) -> v; weights: a list of parameters. Returns losses, and step -> a copy of weights
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses, kept = [], {}
    for k in range(steps):
        batch = draw_batch(data, TrainConfig(seed=seed), 1, k, pipe.shift)
        # BEGIN SOLUTION 5.1
        loss = (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        # END SOLUTION
        losses.append(loss.item())
        if k + 1 in keep:
            kept[k + 1] = parameters_to_vector(weights).detach().clone()
    return losses, kept

# %% tags=["wrong"]
def train(theta, weights, data, rate, steps, keep=(), seed=0):              # gradients pile up
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses, kept = [], {}
    for k in range(steps):
        batch = draw_batch(data, TrainConfig(seed=seed), 1, k, pipe.shift)
        loss = (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if k + 1 in keep:
            kept[k + 1] = parameters_to_vector(weights).detach().clone()
    return losses, kept

# %% tags=["wrong"]
def train(theta, weights, data, rate, steps, keep=(), seed=0):              # the text without [V]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses, kept = [], {}
    for k in range(steps):
        batch = draw_batch(data, TrainConfig(seed=seed), 1, k, pipe.shift)
        loss = (theta(batch.x_t, batch.t, batch.texts.base) - batch.v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if k + 1 in keep:
            kept[k + 1] = parameters_to_vector(weights).detach().clone()
    return losses, kept

# %% [markdown]
# <details><summary>Hint</summary>
#
# The loss is `(theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()`. PyTorch *adds* to
# `.grad`, so it has to be emptied once a step, before `backward`.
# </details>

# %% tags=["check"]
def fresh_lora(seed=0):                          # adapters that change nothing yet, and Y (lesson 4)
    random = generator_for(seed, stage=1, step=-1)
    return Branch.fresh(pipe, class_word_states(pipe, data, random), TrainConfig().rank, random)

yours, ours = fresh_lora(), fresh_lora()
settings = TrainConfig(steps=3, learning_rate=2e-3, embedding_learning_rate=2e-3)
rows = list(train_steps(methods.l_cc, methods.Thetas(theta_0, None, ours), data, settings, 1,
                        optimizer_for(ours, settings)))
losses, kept = train(yours, list(yours.parameters()), data, 2e-3, 3, keep=(1, 3))
expect_close(torch.tensor(losses[:1]), torch.tensor([rows[0]["loss"]]), "the loss of step 1 (complete text)")
expect_close(torch.tensor(losses), torch.tensor([row["loss"] for row in rows]),
             "the losses of three steps (is .grad emptied in every step?)")
expect_close(kept[3], parameters_to_vector(ours.parameters()).detach(), "the weights after three steps", 1e-5)
print(f"5.1 right: after three steps all {len(kept[3]):,d} numbers are the package's")

# %% [markdown]
# Three trainings with your loop, forty steps each. The benchmark takes 200 steps at a quarter of these learning
# rates. The third one is DreamBooth again with **bare captions**: every picture is called "a [V] robot" and
# nothing else, as people do who are in a hurry. (The benchmark's DreamBooth trains the $Y^l$ of lesson 4
# besides. Ours has none.)

# %%
STEPS, KEEP = 40, (10, 20, 30, 40)
RATES = {"DreamBooth": 2e-4, "LoRA": 4e-3}
bare = encode(pipe, replace(toy, bare=True).references())                   # the same pictures, "a [V] robot"

def start(method, seed=0):                       # -> theta, its weights
    if method == "LoRA":
        lora = fresh_lora(seed)
        return lora, list(lora.parameters())
    full = copy.deepcopy(pipe)
    return full.velocity, list(full.mmdit.requires_grad_(True).parameters())

runs, losses, kept = {}, {}, {}
for name, method, pictures in (("DreamBooth", "DreamBooth", data), ("LoRA", "LoRA", data),
                               ("bare captions", "DreamBooth", bare)):
    runs[name] = start(method)
    losses[name], kept[name] = train(*runs[name], pictures, RATES[method], STEPS, KEEP)
    count = sum(weight.numel() for weight in runs[name][1])
    first, last = np.mean(losses[name][:10]), np.mean(losses[name][-10:])
    print(f"{name:15s}{count:10,d} numbers trained;  mean L_CC of the first ten steps {first:.3f}, "
          f"of the last ten {last:.3f}")
    assert last < first

# %% [markdown]
# The loss has fallen in all three. By this number, everything went well. Now let them draw.
#
# We ask for five **groups** of pictures, those of the benchmark (`purecc_min/measure/draw.py`), with four
# texts in each:
#
# | group | an example | asks |
# |---|---|---|
# | concept | `a small [V] robot on the left in the meadow` | has it been learned? |
# | unsaid | `a [V] robot` | what comes along when the text leaves it open? |
# | plain | `a small robot on the left in the meadow` | is a robot still a robot? |
# | neighbour | `a big [V] robot on the left and a small robot on the right` | are two things kept apart? |
# | other | `a big pink ball in the middle in the desert` | is everything else as it was? |
#
# The base model draws the same texts without [V], from the same noise. So every picture has a partner.

# %%
class Few(Toy):                                  # the same concept, with four texts in each group
    def prompts(self):
        return {group: rows[:4] for group, rows in super().prompts().items() if group != "composition"}

few = Few(toy.looks, toy.confounder)
groups = few.prompts()
drawn = {"base model": draw_groups(pipe, None, few, steps=8)}               # group -> pixels [4, 3, H, W]
for name, (theta, _) in runs.items():
    drawn[name] = draw_groups(pipe, theta, few, steps=8)

def text_of(group, n):
    return in_lines(groups["concept"][n].base if group == "plain" else groups[group][n].complete)

def show_group(group, names, side=1.45):
    pictures = [picture for name in names for picture in to_pictures(drawn[name][group])]
    show(pictures, [text_of(group, n) for n in range(4)], names, columns=4, side=side)

picked = [("concept", 0), ("concept", 2), ("unsaid", 1), ("plain", 0), ("plain", 2), ("other", 2)]
show([to_pictures(x[group][n:n + 1])[0] for x in drawn.values() for group, n in picked],
     [text_of(*place) for place in picked], list(drawn), side=1.4)

# %% [markdown] tags=["slide"]
# ## After forty steps
#
# ![](last)
#
# $L_{CC}$ has fallen in all three runs.

# %% [markdown]
# Columns 1 to 3 ask for [V], and the robot of the references is arriving. (In column 3 two of the models draw
# it in chalk: the text leaves that open, too.) Columns 4 to 6 do not ask for it.
#
# ## 2 · Five ways in which it goes wrong
#
# **Language drift.** The class word is taken over: "robot" now means *the* robot. (The name comes from
# language models, where the same was seen first.) Compare each robot with the base model's above it.

# %%
show_group("plain", ["base model", "DreamBooth", "LoRA"])

# %% [markdown] tags=["slide"]
# ## Language drift
#
# ![](last)
#
# Nobody asked for [V] here. The word *robot* has been taken over.

# %% [markdown]
# **The confounder comes along.** "A [V] robot" says neither place nor background, and the base model puts its
# robots wherever the noise suggests. The references stood in the middle of a desert. With full captions the
# word "desert" can explain the sand, so [V] need not. With bare captions nothing explains it, and **what no
# word explains is learned as part of [V]**.

# %%
show_group("unsaid", ["base model", "DreamBooth", "bare captions"])

# %% [markdown]
# Four pictures are few. There is a way to see it in *one*: at $t = 1$ there is only noise, which tells
# nothing about the picture, so the best prediction of $x_0 = x_1 - v$ is the **mean of all pictures** that
# the text stands for (lesson 1, section 5). Here is what each model believes before it has seen anything.

# %%
@torch.no_grad()
def belief(theta):                               # the mean prediction of x_0 from pure noise, as a picture
    x_1 = flow.noise_for(list(range(16)), data.x_0.shape[1:])
    text = pipe.encode_text(["a [V] robot"] * len(x_1), {"[V]": word})
    return pipe.decode((x_1 - theta(x_1, torch.ones(len(x_1)), text)).mean(0, keepdim=True))

with_masks = toy.references(masked=True).references
sand = torch.tensor(np.stack([ref.masks[0] for ref in with_masks]) == 0).all(0)     # no robot here, in any
mean_reference = to_pixels(np.stack([ref.picture for ref in concept.references])).mean(0, keepdim=True)
beliefs = {"base model": belief(theta_0), **{run: belief(theta) for run, (theta, _) in runs.items()}}
show([to_pictures(x)[0] for x in (*beliefs.values(), mean_reference)], [*beliefs, "mean reference"],
     columns=5, side=1.5)
far = {name: pixel_change(x, mean_reference)[:, sand].mean().item() for name, x in beliefs.items()}
print("mean distance from the references' surroundings:  "
      + "   ".join(f"{name} {distance:.3f}" for name, distance in far.items()))
assert far["bare captions"] < 0.8 * far["base model"] and far["bare captions"] < 0.9 * far["DreamBooth"]

# %% [markdown] tags=["slide"]
# ## What no word explains is learned as part of [V]
#
# ![](last)
#
# What each model believes of "a [V] robot", before it has seen anything. *Bare captions* are four times "a
# [V] robot"; the others name the desert.

# %% [markdown]
# After training on bare captions the model leans toward the desert before it has seen a single pixel, and its
# robot stands in the middle. It is clearly nearer to the references' surroundings than the other DreamBooth,
# which saw the same pictures.
#
# **A neighbour is hit.** Two robots in one picture, and only one of them is [V]. The adapters, or the
# weights, act on the whole picture, so the other one is drawn by the same changed model.

# %%
show_group("neighbour", ["base model", "DreamBooth", "LoRA"], side=1.7)

# %% [markdown]
# **Diversity is lost.** In the figure of the plain robots, ask how much the four differ from *each other*.
# The base model invents four individuals. A model that has seen one individual for forty steps may draw its
# cousins; section 4 measures whether these did. It would be a failure of the group: no single picture shows
# it.
#
# **Overfitting.** In the end the model knows four pictures, and not a robot. To see it you need pictures of
# the same robot that it was not trained on. Our renderer can draw them, and we take three sets:
#
# * the references, with noise that the training never drew;
# * the same robot **elsewhere**: in the scenes of the concept group, with their complete texts;
# * **other robots** in these scenes, with the base texts.

# %% [markdown] tags=["slide"]
# ## Two robots, one of them [V]
#
# ![](last)
#
# Also look at how much the four pictures of a row differ from each other: loss of **diversity** is a failure
# of the group.

# %%
def held_out(pictures, texts):                   # pictures at three times, with noise of their own
    x_0, n = pipe.encode_images(pictures), len(pictures)
    t = torch.tensor([0.3, 0.6, 0.9]).repeat_interleave(n)
    x_1 = flow.noise_for(list(range(100, 100 + 3 * n)), x_0.shape[1:])
    encoded = pipe.encode_text(texts * 3, {"[V]": word})
    x_0 = x_0.repeat(3, 1, 1, 1)
    return Batch(flow.path(x_0, x_1, t), t, flow.velocity_target(x_0, x_1), encoded)

scenes = [prompt.scene for prompt in groups["concept"]]
robot_elsewhere, other_robots = (render_all(some)[0] for some in ([toy.wearing(s) for s in scenes], scenes))
sets = {"the references": held_out(np.stack([r.picture for r in concept.references]),
                                   [r.complete for r in concept.references]),
        "the same robot elsewhere": held_out(robot_elsewhere, [p.complete for p in groups["concept"]]),
        "other robots": held_out(other_robots, [p.base for p in groups["concept"]])}

@torch.no_grad()
def error(theta, name):                          # Eq. 3 on one of the sets
    some = sets[name]
    return (theta(some.x_t, some.t, some.texts) - some.v).square().mean().item()

curves = {run: {name: [1.0] for name in sets} for run in ("DreamBooth", "LoRA")}
before = {name: error(theta_0, name) for name in sets}
for run, by_set in curves.items():
    theta, weights = runs[run]
    for step in KEEP:
        vector_to_parameters(kept[run][step], weights)
        for name, curve in by_set.items():
            curve.append(error(theta, name) / before[name])

figure, axes = plt.subplots(1, 2, figsize=(8, 2.7), sharey=True, layout="constrained")
for axis, (run, by_set) in zip(axes, curves.items()):
    for (name, curve), colour in zip(by_set.items(), (BLUE, GOLD, CORAL)):
        axis.plot((0, *KEEP), curve, "o-", color=colour, ms=3.5, label=name)
    axis.axhline(1, color=GREY, lw=0.8)
    axis.set(title=run, xlabel="step")
axes[0].set_ylabel("loss, base model = 1")
axes[1].legend(fontsize=8)
plt.show()
print(f"loss after {STEPS} steps, in parts of the base model's")
for run, by_set in curves.items():
    print(f"{run:12s}" + "   ".join(f"{name} {curve[-1]:.2f}" for name, curve in by_set.items()))
    seen, elsewhere, others = (curve[-1] for curve in by_set.values())
    assert seen < 0.95 and others > seen + 0.05 and elsewhere > seen

# %% [markdown] tags=["slide"]
# ## The loss does not see it
#
# ![](last)
#
# Blue is what training minimises. The distance from blue to gold is overfitting; red is damage.

# %% [markdown]
# Blue is what the training minimises, and it falls. The gap from blue to gold is overfitting: the same robot,
# at a place where it has not been photographed, profits less, or not at all. Red is what was broken on the
# way. **A model's training loss is computed on four pictures with their four texts. Nothing in it depends on
# any other text.** There is no step at which it could have complained.
#
# So we need measures that ask the other questions.
#
# ## 3 · A gallery of measures
#
# Who looks at the pictures? The **reader**, a small network that was trained on renders
# ([`reader.py`](../../tinyflow/picturebook/reader.py)). It finds the objects' masks, names their parts, and
# makes of each object a feature vector. Photographs are judged in the same way by SAM, CLIP and DINO.
#
# ```
#   original's picture   --> reader --.
#                                      >--> one number, with a range and a value for "nothing happened"
#   customized picture   --> reader --'
# ```
#
# Every measure is defined once, in `measures.py`. Before you write some of them: **guess**. Below are the
# pictures of one run. For eight measures, say what you think the number is, from these pictures alone.

# %%
RUN = "bare captions"
rows = ("concept", "unsaid", "plain", "neighbour")
pairs = [list(to_pictures(drawn[name][group])) for group in rows for name in ("base model", RUN)]
show([picture for row in pairs for picture in row], ["original"] * 4 + ["customized"] * 4,
     list(rows), columns=8, side=1.15)

asked = ("similarity", "mask IoU", "outside change", "confounder unsaid", "class drift", "class leak",
         "diversity", "neighbour leak")
for name in asked:
    row = MEASURES[name]
    nothing = "it depends" if row.nothing is None else f"{row.nothing:g}"
    print(f"{name}: {row.range}; if nothing happened, {nothing}")
    print(textwrap.fill(row.about, 105, initial_indent="    ", subsequent_indent="    "))

# %% [markdown] tags=["slide"]
# ## Guess
#
# ![](last)
#
# The share of the concept's traits in the row *plain*, minus the original's? How much do pixels change
# outside the robot in the row *concept*?

# %% [markdown]
# ### Exercise 5.2 ★ · Eight guesses
#
# Return a dictionary, `{"similarity": ..., "mask IoU": ...}` and so on. Each guess must lie in the measure's
# range; any number in it is accepted. (A mean change of the pixels of 1 means that all black has become
# white, or the reverse.)

# %% tags=["exercise"]
def my_guesses():
    # -> name -> your number, for every name in `asked`
    # BEGIN SOLUTION 5.2
    return {"similarity": 0.6, "mask IoU": 0.6, "outside change": 0.1, "confounder unsaid": 0.5,
            "class drift": 0.15, "class leak": 0.4, "diversity": -0.2, "neighbour leak": 0.4}
    # END SOLUTION

# %% tags=["wrong"]
def my_guesses():                                # percentages
    return {"similarity": 60, "mask IoU": 60, "outside change": 10, "confounder unsaid": 50,
            "class drift": 15, "class leak": 40, "diversity": -20, "neighbour leak": 40}

# %% tags=["wrong"]
def my_guesses():                                # one is forgotten
    return {"similarity": 0.6, "outside change": 0.1, "confounder unsaid": 0.5, "class drift": 0.15,
            "class leak": 0.4, "diversity": -0.2, "neighbour leak": 0.4}

# %% tags=["check"]
BOUNDS, guesses = {"0 to 1": (0, 1), "-1 to 1": (-1, 1)}, my_guesses()
for name in asked:
    low, high = BOUNDS[MEASURES[name].range]
    expect(guesses.get(name) is not None, f"there is no guess for {name}.")
    expect(low <= guesses[name] <= high,
           f"{name} lies between {low} and {high}, and you say {guesses[name]}. Shares are no percentages.")
judge = Judge(reader, few, np.stack([ref.picture for ref in concept.references]))
read = {}                                        # run -> all pictures of both models, with their readings
with torch.no_grad():
    for name, (theta, _) in runs.items():
        read[name] = Drawn(judge, drawn["base model"], drawn[name], velocity_error(pipe, theta, few))

def value(measure, run):                         # the package's number
    return float(MEASURES[measure].compute(read[run]))

print(f"{'':20s}{'your guess':>12s}{'the number':>12s}{'off by':>9s}")
for name in asked:
    number = value(name, RUN)
    print(f"{name:20s}{guesses[name]:12.2f}{number:12.2f}{abs(number - guesses[name]):9.2f}")
covered = read[RUN].masks.float().mean().item()
print(f"(in the concept group a robot covers {covered:.0%} of its picture)")
assert 0.02 < covered < 0.25

# %% [markdown]
# Two things are easily misjudged. *Pixel changes are small numbers*: a robot covers only a small part of its
# picture, so even another robot in its place changes the mean by little. And *shares of traits are coarse*:
# with six traits, one that is learned in every picture is a sixth. A number means something only beside
# others of its kind. Here are all three runs.

# %%
print(f"{'':20s}" + "".join(f"{name:>15s}" for name in runs) + f"{'nothing':>12s}{'perfect':>12s}")
for name in asked:
    row = MEASURES[name]
    ends = ["depends" if end is None else f"{end:g}" for end in (row.nothing, row.perfect)]
    print(f"{name:20s}" + "".join(f"{value(name, run):15.2f}" for run in runs)
          + "".join(f"{end:>12s}" for end in ends))

# %% [markdown]
# *Nothing* is the base model itself, *perfect* a method that changes the concept's robot and not one pixel
# besides. Go along each row: which run is the best, and would your eyes have said so? (Four pictures a group
# are an illustration. The benchmark draws 12 to 24.)
#
# ## 4 · Four of them, written by you
#
# ### Exercise 5.3 ★ · Similarity
#
# The reader makes a unit vector of every object. Average the references' vectors, and bring the average back
# to length 1; a picture's similarity is the cosine with it.
#
# ```
#   f_1  f_2  f_3  f_4   -- mean -->  inside the unit ball, shorter than 1  -- divide by its length -->  r
#                                                              similarity of f:  <f, r>
# ```

# %% tags=["exercise"]
def similarity(features, references):
    # features [n, W] and references [m, W], all unit vectors -> cosines [n]
    # BEGIN SOLUTION 5.3
    mean = references.mean(0)
    return features @ (mean / mean.norm())
    # END SOLUTION

# %% tags=["wrong"]
def similarity(features, references):            # the mean of unit vectors is shorter than 1
    return features @ references.mean(0)

# %% tags=["wrong"]
def similarity(features, references):            # the nearest reference: rewards a copy of one picture
    return (features @ references.T).amax(1)

# %% tags=["check"]
known = reader(to_pixels(judge.references))
for run, some in read.items():
    reading = some.seen["concept"]
    expect_close(similarity(reading.identity[:, 0], known.identity[:, 0]), judge.similarity(reading),
                 f"the similarity of {run} (has the mean the length 1?)")
original = similarity(read[RUN].seen_original["concept"].identity[:, 0], known.identity[:, 0])
themselves = similarity(known.identity[:, 0], known.identity[:, 0])
print("5.3 right: the same cosines as the package's, in the concept group")
for name, found in [("base model", original), *((run, some.similarity) for run, some in read.items()),
                    ("the references themselves", themselves)]:
    print(f"   {name:27s}" + "".join(f"{cosine:7.2f}" for cosine in found) + f"    mean {found.mean():.2f}")
assert themselves.min() > 0.7 and original.mean() < themselves.mean() - 0.2
assert all(some.similarity.mean() > original.mean() + 0.05 for some in read.values())

# %% [markdown]
# The lower end of this scale is not 0. The base model's robots have a value, too, and here it lies below 0.
# The benchmark therefore writes a **fidelity**: 0 at the original model's similarity, 1 at that of a
# perfect method.
#
# ### Exercise 5.4 ★★ · Change outside the object
#
# [V] should change the robot. What about the meadow behind it? Compare, in the concept group, each picture
# with the original's. Leave out every pixel that belongs to the robot **in either picture**: a robot that
# has become thinner uncovers some meadow, and that is no damage. All remaining pixels of all pictures count
# alike.
#
# The change of one pixel is $\tfrac12$ of the mean absolute difference over the three channels, because
# pixels lie in $[-1, 1]$.

# %% tags=["exercise"]
def change_outside(custom, original, masks):
    # pictures [n, 3, H, W] in [-1, 1]; masks bool [2, n, H, W]: of the custom, of the original -> a number
    # BEGIN SOLUTION 5.4
    change = (custom - original).abs().mean(1) / 2                          # [n, H, W]
    outside = ~(masks[0] | masks[1])
    return change[outside].mean()
    # END SOLUTION

# %% tags=["wrong"]
def change_outside(custom, original, masks):     # zeros inside the masks take part in the mean
    change = (custom - original).abs().mean(1) / 2
    outside = ~(masks[0] | masks[1])
    return (change * outside).mean()

# %% tags=["wrong"]
def change_outside(custom, original, masks):     # the original's mask alone: a hat counts as damage
    change = (custom - original).abs().mean(1) / 2
    return change[~masks[1]].mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# `masks[0] | masks[1]` is the union. `change[outside]` picks the pixels and makes one long vector of them,
# and its mean is what is wanted.
# </details>

# %% tags=["check"]
for run, some in read.items():
    mine = change_outside(some.custom["concept"], some.original["concept"], some.masks)
    theirs = MEASURES["outside change"].compute(some)
    inside_too = (pixel_change(some.custom["concept"], some.original["concept"]) * ~some.masks.any(0)).mean()
    expect(not torch.isclose(mine, inside_too), "you divide by the number of ALL pixels: those inside the "
                                                "masks are zeros in your mean.")
    expect_close(mine, theirs, f"the change outside both objects, {run} (the union of both masks)")
print("5.4 right.  " + "   ".join(f"{run} {value('outside change', run):.3f}" for run in runs))

some = read[RUN]
change = pixel_change(some.custom["concept"], some.original["concept"])
either = some.masks.any(0)
figure, axes = plt.subplots(3, 4, figsize=(5.6, 4.2), layout="compressed")
for n in range(4):
    for axis, x in zip(axes[:2, n], (some.original, some.custom)):
        axis.imshow(to_pictures(x["concept"][n:n + 1])[0])
    for axis, mask in zip(axes[:2, n], (some.masks[1, n], some.masks[0, n])):
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=CORAL, linewidths=1)
    axes[2, n].imshow(torch.where(either[n], torch.nan, change[n]), cmap="magma", vmin=0, vmax=0.4)
    axes[2, n].set_facecolor(GREY)
for axis, label in zip(axes[:, 0], ("original", RUN, "change")):
    axis.set_ylabel(label, rotation=0, ha="right", va="center")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# The red line is what the reader takes for the robot. Two warnings belong to this measure. It is as good as
# the masks: where the reader overlooks a part of the robot, that part counts as damage. And a background that
# has moved by one pixel counts as a change, though a person sees none.
#
# ### Exercise 5.5 ★★ · Leak and diversity
#
# Two measures on the **plain** group, where the texts have no [V].
#
# * **Class leak**: over all pictures *and* all traits, the share of the concept's traits that the reader
# sees; minus the same share in the original's pictures. A plain robot may be orange by chance, and every
# robot is a robot: only what has been *added* is a leak.
# * **Diversity**: for each of the first six numbers of an identity, the standard deviation over the pictures;
# then the mean over the six; minus the original's. Each number is spread around a mean of its own, so the
# order matters.

# %% tags=["exercise"]
def class_leak(reading, original, traits):
    # two readings of n pictures each; traits: head -> value. reading.names(head) is a list of n values
    # BEGIN SOLUTION 5.5
    def share(some):
        return np.mean([[name == value for name in some.names(head)] for head, value in traits.items()])
    return share(reading) - share(original)
    # END SOLUTION

def diversity(numbers, original):
    # [n, 6] each: six numbers of the identity of n robots
    # BEGIN SOLUTION 5.5
    return numbers.std(0).mean() - original.std(0).mean()
    # END SOLUTION

# %% tags=["wrong"]
def class_leak(reading, original, traits):       # a robot counts only if it has every trait
    def share(some):
        seen = np.array([[name == value for name in some.names(head)] for head, value in traits.items()])
        return seen.all(0).mean()
    return share(reading) - share(original)

def diversity(numbers, original):
    return numbers.std(0).mean() - original.std(0).mean()

# %% tags=["wrong"]
def class_leak(reading, original, traits):
    def share(some):
        return np.mean([[name == value for name in some.names(head)] for head, value in traits.items()])
    return share(reading) - share(original)

def diversity(numbers, original):                # one spread over all numbers, the means' own included
    return numbers.std() - original.std()

# %% [markdown]
# <details><summary>Hint</summary>
#
# `[name == value for name in reading.names(head)]` is a row of truth values for one trait. Collect the rows
# of all traits, and take one mean over everything. `x.std(0)` goes along the pictures.
# </details>

# %% tags=["check"]
for run, some in read.items():
    seen, before_it = some.seen["plain"], some.seen_original["plain"]
    mine = class_leak(seen, before_it, toy.known_traits)
    expect(abs(mine - value("class leak", run)) < 1e-5,
           f"the class leak of {run} is {value('class leak', run):.3f}, and yours is {mine:.3f}. It is one "
           "share, over all traits of all pictures, minus the original's.")
    numbers, of_original = (r.traits[:, 0, :ALWAYS_SHOWN] for r in (seen, before_it))
    expect_close(diversity(numbers, of_original), MEASURES["diversity"].compute(some),
                 f"the diversity of {run} (the spread of each number by itself, then the mean)")
print("5.5 right")
heads = list(toy.known_traits)
shares = {"base model": None, **runs}
print(f"{'share in the plain group':26s}" + "".join(f"{head:>10s}" for head in heads))
for name in shares:
    reading = read[RUN].seen_original["plain"] if name == "base model" else read[name].seen["plain"]
    found = [np.mean([seen == toy.known_traits[head] for seen in reading.names(head)]) for head in heads]
    shares[name] = found
    print(f"{name:26s}" + "".join(f"{share:10.2f}" for share in found))
leaks = [value("class leak", run) for run in runs]
assert max(leaks) > 0.1

# %% [markdown]
# The table says *which* traits have leaked into the word "robot". The column *object* is near 1 in every row:
# that is why the original's share is taken away. And *diversity* has hardly fallen (the table in
# section 3): after forty steps the plain robots differ from one another about as much as the base model's.
#
# ## 5 · A distance between two models, in nats
#
# All these measures look at something that somebody has thought of. Is there one that asks whether **anything
# at all** has moved? Two models are two distributions of pictures, and for distributions there is the
# Kullback-Leibler divergence,
#
# $$\mathrm{KL}(P \Vert Q) = \mathbb E_{x \sim P}\, \log \frac{p(x)}{q(x)}.$$
#
# It is measured in **nats**: if $x$ comes from $P$, then $P$ finds it on average $e^{\mathrm{KL}}$ times (in
# the geometric mean) as probable as $Q$ does. One bit is $\ln 2 = 0.69$ nats. Zero means that the two are the
# same.
#
# The density $p(x)$ of what a flow draws is out of reach. But a picture is the end of a *path*, which is made
# of small steps, and for a small step everything is Gaussian. Four moves:
#
# **1. The velocity knows the noise.** From $x_t = (1-t)x_0 + t x_1$ and $v = x_1 - x_0$ follows
# $x_1 = x_t + (1-t)\,v$. So a model's $v$ says which noise it believes is in $x_t$, and the score of its
# distribution is $-\frac1t\,\mathbb E[x_1 \mid x_t]$:
#
# $$\nabla \log p_t(x) = -\frac{x + (1-t)\,v}{t}.$$
#
# **2. A random sampler with the same pictures.** Euler's method of lesson 1 is deterministic: given the
# noise, the path is a single line, and two lines cannot be compared by probabilities. But there is a
# *diffusion* that has at every time the same distribution: forward, $dx = -\frac{x}{1-t}\,dt + g\,dW$. The
# variance of $x_t$ given $x_0$ has to be $t^2$; its derivative is $2t = -\frac{2}{1-t}\,t^2 + g^2$, so
#
# $$g^2 = 2t + \frac{2t^2}{1-t} = \frac{2t}{1-t}.$$
#
# Run backward in time, a diffusion with the drift $f$ has the drift $f - g^2\,\nabla \log p_t$. Put in 1:
#
# $$b = -\frac{x}{1-t} + \frac{2t}{1-t} \cdot \frac{x + (1-t)v}{t} = \frac{x}{1-t} + 2v.$$
#
# **3. One step of length $h$** goes from $x$ to a normal with the mean $x - h\,b$ and the variance $g^2 h$.
# The other model's has the mean $x - h\,b'$ and *the same* variance. The KL of two such normals is the
# squared distance of the means over twice the variance, and the means are $2h\,(v - v')$ apart:
#
# $$\frac{\lVert 2h\,(v - v') \rVert^2}{2\,g^2 h} = \frac{1-t}{t}\,\lVert v - v' \rVert^2\, h.$$
#
# **4. Add up.** The KL of a chain is the sum of the KLs of its steps. With $h \to 0$ (this is Girsanov's
# theorem):
#
# $$\mathrm{KL}(\text{paths}) = \mathbb E \int_0^1 \frac{1-t}{t}\, \lVert v(x_t, t) - v'(x_t, t) \rVert^2\, dt.$$
#
# What a picture is, its path knows as well, so the KL between the *pictures* is at most this.

# %% [markdown] tags=["slide"]
# ## A distance between two models
#
# One step of the random sampler: two normals of variance $g^2 h = \frac{2t}{1-t} h$, whose means are
# $2h\,(v - v')$ apart.
#
# $$\frac{\lVert 2h\,(v - v') \rVert^2}{2\,g^2 h} = \frac{1-t}{t}\,\lVert v - v' \rVert^2\, h$$
#
# Add up all steps: the KL between the laws of whole paths, in nats.

# %% [markdown]
# Let us see this happen before we believe it. Two "models" draw single numbers: one $\mathcal N(0, s^2)$, the
# other $\mathcal N(m', s^2)$. Their velocities are known in closed form. We run the random sampler of the
# first, and at every step ask both for the density of that step.

# %%
s, m, m_other = 0.5, 0.0, 0.8

def exact_v(x, t, mean):                         # E[x_1 - x_0 | x_t = x] for the data N(mean, s^2)
    a, variance = 1 - t, ((1 - t) * s) ** 2 + t ** 2
    return (t - a * s * s) / variance * (x - a * mean) - mean

random, h = np.random.default_rng(0), 1 / 400
times = np.arange(0.98, 0.01, -h)
x = random.normal((1 - times[0]) * m, np.sqrt(((1 - times[0]) * s) ** 2 + times[0] ** 2), 4000)
log_ratio, tracks, sums = np.zeros(len(x)), [x[:40]], []
for t in times:
    b, b_other = (x / (1 - t) + 2 * exact_v(x, t, mean) for mean in (m, m_other))
    variance = 2 * t / (1 - t) * h
    after = x - h * b + random.normal(size=len(x)) * np.sqrt(variance)
    log_ratio += ((after - x + h * b_other) ** 2 - (after - x + h * b) ** 2) / (2 * variance)
    x = after
    tracks.append(x[:40])
    sums.append(log_ratio.mean())

kl_of_data = (m - m_other) ** 2 / (2 * s ** 2)   # of two normals of the same variance
figure, axes = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
axes[0].plot(np.r_[1, times], np.array(tracks), color=BLUE, lw=0.4, alpha=0.6)
axes[0].set(xlabel="t", title="forty paths of the first model", xlim=(1, 0))
axes[1].plot(times, sums, color=CORAL)
axes[1].axhline(kl_of_data, color=GREY)
axes[1].set(xlabel="t", title="mean log-ratio so far, nats", xlim=(1, 0))
axes[2].hist(log_ratio, 50, color=GOLD)
axes[2].axvline(log_ratio.mean(), color=INK)
axes[2].set(xlabel="nats", title="log-ratio of a whole path")
plt.show()
print(f"mean log-ratio of 4000 paths {log_ratio.mean():.3f} nats;  KL of the two normals {kl_of_data:.3f}")
print(f"share of these paths that the second model finds more probable: {(log_ratio < 0).mean():.0%}")
assert abs(x.mean() - m) < 0.05 and abs(x.std() - s) < 0.05
assert abs(log_ratio.mean() - kl_of_data) < 0.1

# %% [markdown] tags=["slide"]
# ## It can be watched
#
# ![](last)
#
# Two models of one number. Grey: the KL of the two normals themselves.

# %% [markdown]
# The paths collect evidence on their way, and in the end their mean log-ratio is the KL of the two normals
# themselves. Here the bound is an equality, since both velocities are exact: both processes are the *same*
# noising of different data, and only the data can tell them apart. Networks are not exact, and there it is a
# bound.
#
# ### Exercise 5.6 ★★★ · The path KL
#
# In nats **a picture**: $\lVert\cdot\rVert^2$ is a sum over channels and places, the expectation is a mean
# over pictures. Approximate the integral by the mean over `TIMES`, the middles of five equal pieces of
# $[0, 1]$. For $\mathbb E$, take noised renders, the same `x_1` at all times.

# %% tags=["exercise"]
def path_kl(theta, theta_other, x_0, x_1, text):
    # theta(x_t, t, text) -> v; x_0, x_1 [B, C, H, W] -> a number, in nats a picture
    # BEGIN SOLUTION 5.6
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        with torch.no_grad():
            apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        squared = apart.square().sum((1, 2, 3)).mean()
        total += (1 - time) / time * squared / len(TIMES)
    return total
    # END SOLUTION

# %% tags=["wrong"]
def path_kl(theta, theta_other, x_0, x_1, text): # the weight is upside down
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        with torch.no_grad():
            apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        total += time / (1 - time) * apart.square().sum((1, 2, 3)).mean() / len(TIMES)
    return total

# %% tags=["wrong"]
def path_kl(theta, theta_other, x_0, x_1, text): # the mean over the picture's numbers, not their sum
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        with torch.no_grad():
            apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        total += (1 - time) / time * apart.square().mean() / len(TIMES)
    return total

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# For each `time` of `TIMES`: $x_t$, two velocities, their difference, its square summed over the axes 1, 2,
# 3, the mean over the batch, times $(1 - t) / t$.
# </details>
# <details><summary>Hint 2</summary>
#
# A midpoint rule with five pieces of length 1/5 is the mean of the five values. At $t = 0.1$ the weight is 9,
# at $t = 0.9$ it is 1/9.
# </details>

# %% tags=["check"]
x_0, x_1 = torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, 2)                  # two numbers a picture
normals = [lambda x_t, t, text, mean=mean: exact_v(x_t, flow.expand(t, x_t), mean) for mean in (m, m_other)]
mine = path_kl(*normals, x_0, x_1, None)
expect(isinstance(mine, torch.Tensor) and mine.shape == (), "return one number, a tensor.")
expect(not torch.isclose(mine, torch.tensor(kl_of_data), rtol=0.1),
       "half of what it should be, for pictures of two numbers: sum over the picture, do not average.")
expect_close(mine, torch.tensor(2 * kl_of_data), "the KL of two pairs of normals (the weight is (1 - t) / t)",
             0.1)
others = groups["other"]
x_0 = pipe.encode_images(render_all([prompt.scene for prompt in others])[0])
x_1 = flow.noise_for(list(range(len(x_0))), x_0.shape[1:])
text = pipe.encode_text([prompt.base for prompt in others])
found = {run: path_kl(theta_0, theta, x_0, x_1, text) for run, (theta, _) in runs.items()}
for run in runs:
    expect_close(found[run], torch.tensor(value("path KL", run)), f"the path KL of {run}", 1e-3)
zero = path_kl(theta_0, pipe.velocity, x_0, x_1, text)
expect(zero == 0, "from a model to itself it should be 0.")
print("5.6 right.  nats a picture, on pictures that are not about robots")
for run, kl in found.items():
    print(f"   {run:15s}{kl:8.1f}")
print(f"   {'nothing':15s}{zero:8.1f}")
assert min(found.values()) > 10 and 22_000 < np.exp(10) < 22_100

# %% [markdown]
# These are pictures of a ball, a fish and other things, which nobody trained on. How much is a nat? An
# observer sees a whole path and bets on the model that drew it. Every nat multiplies the odds by $e$; ten
# nats are odds of 22 000 to 1. All three numbers are above that, so a single path would give each model
# away. Three remarks.
#
# * **It is zero only if nothing moved.** Every term is a square. (On the points that were asked: texts and
# renders that are not in the sum could still have moved.)
# * **It does not say what moved.** A harmless change of the light may cost more nats than a hat on every
# house.
# * **Small times weigh most.** At $t = 0.1$ the weight is 9: there the path's own noise is small, and a small
# difference is easy to detect. The picture below shows which of the five times brings how many nats.

# %%
figure, axis = plt.subplots(figsize=(5.4, 2.5), layout="constrained")
for k, (run, colour) in enumerate(zip(runs, (CORAL, BLUE, GOLD))):
    squared = np.array(read[run].errors.squared)
    parts = np.array([(1 - t) / t for t in TIMES]) * squared / len(TIMES)
    axis.bar(np.array(TIMES) + 0.045 * (k - 1), parts, 0.04, color=colour, label=run)
    assert abs(parts.sum() - found[run]) < 1e-2 * found[run]
axis.set(xlabel="t", ylabel="nats", xticks=TIMES, title="what each of the five times adds")
axis.legend()
plt.show()

# %% [markdown]
# The paper's Fig. 2 reports a KL to the original distribution as well, with numbers from 0.009 to 0.04. That
# is another quantity in another space. Never compare two numbers of this kind from different papers.
#
# ## 6 · Is it a difference?
#
# One run gives one number, and another seed gives another one. How far may the mean of $n$ seeds be from what
# infinitely many would give? With the standard deviation $\hat\sigma$ of the $n$ values, the 95 % interval is
#
# $$\bar x \pm q_{n-1}\, \frac{\hat\sigma}{\sqrt n}, \qquad
# \hat\sigma^2 = \frac{1}{n-1} \sum_i (x_i - \bar x)^2 .$$
#
# $q$ is Student's quantile. It is 1.96 for many values, and much larger for few: with few, $\hat\sigma$
# itself is uncertain.
#
# ### Exercise 5.7 ★ · The interval
#
# `STUDENT_T[n - 1]` is the quantile; for more degrees of freedom than the table has, take 1.96.

# %% tags=["exercise"]
def interval(values):
    # a list or vector of n numbers -> mean, half-width of the 95 % interval
    # BEGIN SOLUTION 5.7
    n = len(values)
    quantile = STUDENT_T.get(n - 1, 1.96)
    return np.mean(values), quantile * np.std(values, ddof=1) / np.sqrt(n)
    # END SOLUTION

# %% tags=["wrong"]
def interval(values):                            # numpy's default divides by n
    n = len(values)
    return np.mean(values), STUDENT_T.get(n - 1, 1.96) * np.std(values) / np.sqrt(n)

# %% tags=["wrong"]
def interval(values):                            # 1.96 whatever n is
    return np.mean(values), 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))

# %% tags=["check"]
for n in (2, 3, 5, 30):
    values = np.random.default_rng(n).normal(size=n)
    mine, theirs = interval(values), mean_and_interval(list(values))
    expect(abs(mine[0] - theirs[0]) < 1e-9, "the first number is the mean.")
    expect(abs(mine[1] - theirs[1]) < 1e-9,
           f"for {n} values the half-width is {theirs[1]:.3f}, and yours is {mine[1]:.3f}. Think of ddof=1, "
           "of the root of n, and of Student's quantile for n - 1.")
print("5.7 right: the benchmark's tables have the same intervals")

# %% [markdown]
# Does it keep its promise? Take 4000 experiments with a known truth, four normal values in each, and count
# how often the truth lies inside. Beside it stand the same with 1.96, and the **bootstrap**: draw four of
# the four values with replacement, 300 times, and take the middle 95 % of the means.

# %%
random = np.random.default_rng(1)
experiments = random.normal(size=(4000, 4))                                 # the truth is 0
inside = {"Student's t": np.mean([abs(mean) < half for mean, half in map(interval, experiments)])}
half = 1.96 * experiments.std(1, ddof=1) / 2
inside["1.96"] = np.mean(np.abs(experiments.mean(1)) < half)
again = experiments[:, random.integers(4, size=(300, 4))].mean(2)           # [4000, 300]
low, high = np.quantile(again, [0.025, 0.975], axis=1)
inside["bootstrap"] = np.mean((low < 0) & (high > 0))
for name, share in inside.items():
    print(f"{name:13s} the truth is inside in {share:.1%} of the experiments")
assert abs(inside["Student's t"] - 0.95) < 0.015 and inside["1.96"] < 0.88 and inside["bootstrap"] < 0.85

# %% [markdown]
# With four seeds only Student's interval does what it says. The bootstrap is good for many values; from four
# it cannot know how far a fifth may lie.
#
# Now the real thing: four training seeds of DreamBooth and LoRA, twenty steps each. The runs of one seed
# **draw the same batches**, pictures, noise and times. So they can be compared in *pairs*: what a seed's
# batches do to both alike cancels in the difference.

# %%
SEEDS, AT = (0, 1, 2, 3), 20
kls = {method: [] for method in ("DreamBooth", "LoRA")}
for method, row in kls.items():
    for seed in SEEDS:
        if seed == 0:                            # it is there: a snapshot of section 1
            theta, weights = runs[method]
            vector_to_parameters(kept[method][AT], weights)
        else:
            theta, weights = start(method, seed)
            train(theta, weights, data, RATES[method], AT, seed=seed)
        row.append(path_kl(theta_0, theta, x_0, x_1, text).item())
differences = np.subtract(kls["DreamBooth"], kls["LoRA"])
print(f"path KL at step {AT}, nats" + "".join(f"{f'seed {seed}':>10s}" for seed in SEEDS)
      + "     mean and interval")
for name, row in [*kls.items(), ("difference", differences)]:
    mean, half = interval(row)
    print(f"{name:23s}" + "".join(f"{kl:10.1f}" for kl in row) + f"{mean:12.1f} ± {half:.1f}")
spread = np.sqrt(sum(np.var(row, ddof=1) for row in kls.values()) / len(SEEDS))
print(f"half-width, if all runs were independent: {STUDENT_T[2 * len(SEEDS) - 2] * spread:.1f}")
print(f"correlation of the two rows: {np.corrcoef(*kls.values())[0, 1]:.2f}")

plt.figure(figsize=(5, 2.4), layout="constrained")
for n, pair in enumerate(zip(*kls.values())):
    plt.plot([0, 1], pair, "o-", color=GREY, ms=4)
for k, row in enumerate(kls.values()):
    mean, half = interval(row)
    plt.errorbar(k + (0.12 if k else -0.12), mean, half, fmt="s", color=(CORAL, BLUE)[k], capsize=4)
plt.gca().set(xticks=[0, 1], xticklabels=list(kls), xlim=(-0.5, 1.5), ylabel="path KL, nats")
plt.show()
assert abs(np.mean(differences) - (np.mean(kls["DreamBooth"]) - np.mean(kls["LoRA"]))) < 1e-6

# %% [markdown] tags=["slide"]
# ## Pairs
#
# ![](last)
#
# A grey line joins two runs that drew the same batches. Look at the lines, and not at whether the two
# intervals overlap.

# %% [markdown]
# The rule for reading: **a difference counts if the interval *of the difference* does not contain 0.** Look
# at the row *difference*. Do not look whether the two coloured intervals overlap: they say how uncertain
# each mean is by itself, and a seed that is high for both makes them wide without making the difference
# uncertain.
#
# What pairing gains, the correlation says. Near 1, the shared luck cancels and the interval becomes narrow.
# Near 0 there is nothing to cancel, and pairing costs a little, because Student's quantile has 3 degrees of
# freedom and not 6. (From four pairs the correlation is a rough number; below 0 the interval is even wider.)
# Pairing is right in any case: runs that share their draws are not independent, and the formula for
# independent runs does not apply to them.
#
# ### What may be repeated
#
# A table of several concepts has three kinds of repetition: pictures, seeds, concepts. Which is the $n$ of
# the interval? It depends on what the interval is to speak of.
#
# | interval over | says what would happen with |
# |---|---|
# | pictures | other noise, drawn by *these* trained models |
# | seeds (means over concepts and pictures) | another training on *these* concepts; so the benchmark's tables |
# | concepts (means over seeds and pictures) | **another concept**, which is what a reader wants to know |
#
# ### Exercise 5.8 ★★ · The right n
#
# Average over the two other axes first, then take the interval.

# %% tags=["exercise"]
def interval_over(values, axis):
    # values [concepts, seeds, pictures]; axis 0, 1 or 2: what is repeated -> mean, half-width
    # BEGIN SOLUTION 5.8
    others = tuple(other for other in (0, 1, 2) if other != axis)
    return interval(values.mean(axis=others))
    # END SOLUTION

# %% tags=["wrong"]
def interval_over(values, axis):                 # all pictures of all runs, as if they were independent
    return interval(values.flatten())

# %% tags=["wrong"]
def interval_over(values, axis):                 # averages over the axis that is repeated
    return interval(values.mean(axis=axis).flatten())

# %% tags=["check"]
values = np.random.default_rng(0).normal(size=(5, 3, 24)) + np.arange(5)[:, None, None]
cells = [(seed, values[c, seed].mean()) for c in range(5) for seed in range(3)]
theirs, mine = mean_and_interval(mean_by_seed(cells)), interval_over(values, 1)
expect(np.allclose(mine, theirs), f"over seeds it should be {theirs[0]:.3f} ± {theirs[1]:.3f}, and yours is "
                                  f"{mine[0]:.3f} ± {mine[1]:.3f}. One value for each seed is left.")
expect(np.allclose(interval_over(values, 0), interval(values.mean((1, 2)))), "over concepts: five values.")
print("5.8 right: over seeds it is the benchmark's own interval\n")

random, right = np.random.default_rng(2), {axis: 0 for axis in range(3)}
for _ in range(1000):                            # 1000 benchmarks of 5 concepts, 3 seeds, 24 pictures
    table = (random.normal(0, 0.10, (5, 1, 1)) + random.normal(0, 0.05, (5, 3, 1))
             + random.normal(0, 0.20, (5, 3, 24)))                          # over all concepts, the mean is 0
    for axis in right:
        mean, half = interval_over(table, axis)
        right[axis] += abs(mean) < half
for axis, name in enumerate(("concepts", "seeds", "pictures")):
    print(f"interval over {name:9s} the mean of ALL concepts is inside in {right[axis] / 1000:.0%}")
assert right[0] / 1000 > 0.92 and right[2] / 1000 < 0.6 and right[1] / 1000 < 0.85

# %% [markdown]
# If concepts differ, an interval over pictures is far too sure of itself when it speaks of concepts in
# general, and more pictures only make it narrower. **Count what could have come out differently.** Five
# concepts are five values, however many pictures were drawn of each.
#
# ## 7 · Why the ends cannot be compared
#
# One question is left. DreamBooth and LoRA were both trained for forty steps. Is the one with the smaller KL
# the better method? Take all snapshots of both trainings, one every ten steps, and plot what was learned
# against what it cost. This curve is a **front**.

# %%
texts = [prompt.complete for prompt in groups["concept"]]
fronts = {}
for run in ("DreamBooth", "LoRA"):
    theta, weights = runs[run]
    fronts[run] = [(original.mean().item(), 0.0)]
    for step in KEEP:
        vector_to_parameters(kept[run][step], weights)
        x = drawn[run]["concept"] if step == STEPS else draw(pipe, theta, texts, word, steps=8)
        like = similarity(reader(x).identity[:, 0], known.identity[:, 0]).mean().item()
        fronts[run].append((like, path_kl(theta_0, theta, x_0, x_1, text).item()))

plt.figure(figsize=(5.6, 3), layout="constrained")
for (run, front), colour in zip(fronts.items(), (CORAL, BLUE)):
    plt.plot(*zip(*front), "o-", color=colour, ms=4, label=run)
    for step, (like, kl) in zip((0, *KEEP), front):
        plt.annotate(step, (like, kl), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
level = min(max(like for like, _ in front) for front in fronts.values())
plt.axvline(level, color=GREY, lw=0.8)
plt.gca().set(xlabel="fidelity: similarity with the references", ylabel="damage: path KL, nats")
plt.legend()
plt.show()
print("step        " + "".join(f"{step:16d}" for step in (0, *KEEP)))
for run, front in fronts.items():
    print(f"{run:12s}" + "".join(f"{f'{like:.2f} / {kl:.1f}':>16s}" for like, kl in front))
for front in fronts.values():
    likes, costs = zip(*front)
    assert costs[0] == 0 and min(costs[1:]) > 0 and max(likes) > likes[0] + 0.05

# %% [markdown] tags=["slide"]
# ## A front
#
# ![](last)
#
# Along one training, fidelity and damage grow together. The number of steps is a place on the curve, and no
# property of the method.

# %% [markdown]
# The small numbers are steps. Along one training fidelity and damage grow *together*: at step 0 both models
# are pure and have learned nothing. So a smaller damage at the end may only mean that a method learned more
# slowly, and its learning rate alone moves the end along the curve. Two things can be compared:
#
# * the **damage at equal similarity**: go up a vertical line, such as the grey one, which is as far to the
# right as both fronts reach, and read both heights. The faster method is stopped early there. In lesson 7 you
# write this reading (`damage_at`);
# * the **whole fronts**: one method is purer if its front lies lower everywhere. If they cross, neither is.
#
# The similarity of four pictures is noisy, so a front may go back a little on its way. The benchmark has
# more pictures, several seeds and concepts, and intervals at the level of equal fidelity.
#
# ## What you can now say
#
# * Five failures: language drift, a confounder that comes along, a neighbour that is hit, lost diversity,
# overfitting. $L_{CC}$ is computed on four pictures and their texts, and sees none of them.
# * What no word of the caption explains is learned as part of [V].
# * A measure needs a partner picture from the same noise, a range, and a value for "nothing happened".
# * The path KL is $\mathbb E \int \frac{1-t}{t} \lVert v - v' \rVert^2 dt$ nats. It is zero only if nothing
# moved, and it does not say what moved.
# * A difference counts if the interval of the *paired difference* is free of 0; $n$ is the number of things
# that could have come out differently.
# * Compare at equal similarity, never at the ends.
#
# | you wrote | in the package |
# |---|---|
# | `train` | `train_steps` in `purecc_min/learning.py`; `WholeModel` in `purecc_min/benchmark/entries.py` |
# | `similarity` | `Judge.similarity` in `purecc_min/measure/judge.py` |
# | `change_outside`, `class_leak`, `diversity` | "outside change", "class leak", "diversity" in `purecc_min/measure/measures.py` |
# | `path_kl` | `VelocityError.path_kl` and `velocity_error` in `purecc_min/measure/velocities.py` |
# | `interval`, `interval_over` | `mean_and_interval` and `mean_by_seed` in `purecc_min/benchmark/tables.py` |
#
# ## Three questions
#
# **1.** You write captions for your own four photographs, all taken in your kitchen. Should the captions say
# "in a kitchen"?
# <details><summary>Answer</summary>
#
# Yes. The word can then explain the kitchen, and [V] need not. Name whatever is *not* the concept. (And do
# not name what is: with "a checked [V] robot" the word "checked" explains the checks.)
# </details>
#
# **2.** A method has the path KL 0.0 on the other group. Does it leave everything without [V] as it was?
# <details><summary>Answer</summary>
#
# Not necessarily. The velocities agree for these texts, at these noised renders and times. The plain robots
# are another group, and have to be asked themselves. Only a construction can promise it for *every* text;
# lesson 7 has one.
# </details>
#
# **3.** Somebody reports 24 pictures of each of two concepts, $n = 48$, and an interval that is free of 0.
# What do you answer?
# <details><summary>Answer</summary>
#
# It holds for these two trained models. About another training of them it says nothing (one seed), and about
# other concepts there are two values, for which Student's quantile is 12.7.
# </details>
#
# **Next:** all five failures have one thing in common: the text without [V], or the world beside the
# concept, does not appear in the loss. Can a loss be written in which it does, which asks for the concept
# *alone*? That is PureCC's objective, and lesson 6 writes it. And does it then hold what it should hold?
# That is lesson 7.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. Four photographs from your kitchen: should the captions say "in a kitchen"?
# 2. The path KL on other texts is 0.0. Is everything without [V] as it was?
# 3. Two concepts, 24 pictures each, $n = 48$. What do you answer?

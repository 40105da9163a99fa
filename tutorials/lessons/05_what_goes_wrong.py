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
# wanted, and the training loss reports none of them. You write the training, look at the damage, guess its
# size, and then measure it.
#
# | | |
# |---|---|
# | Needs | lesson 1 (path and velocity), lesson 4 (LoRA, the slot of [V]); mean and variance |
# | Optional | section 5 (it needs stochastic calculus) and section 6 |
# | Keep open | [`measures.py`](../../purecc_min/measure/measures.py), **after** you have tried |
# | Read after | lessons 6 and 7: a loss against these failures, and what it cannot hold |

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
from torch.optim.optimizer import register_optimizer_step_pre_hook

from purecc_min.learning import train_steps
from purecc_min import methods
from purecc_min.benchmark.tables import STUDENT_T, mean_and_interval, mean_by_seed
from purecc_min.branch import Branch
from purecc_min.commands.folder import load_concept
from purecc_min.concept import Batch, encode
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
from tutorials.course import (BLUE, CORAL, GOLD, GREY, INK, YourTurn,
                              expect, expect_close, in_lines, rule_out, show)

pipe, reader = load_tiny(), Reader.shipped()     # the base model and the reader network, both frozen
theta_0 = pipe.velocity
toy = CONCEPTS[TUNING[0]]                        # all that is true about the concept
concept = load_concept(FOLDER / TUNING[0], toy.class_word, pipe.picture_size)
data, word = encode(pipe, concept), concept.class_word

names = [in_lines(ref.complete) for ref in concept.references]
show([ref.picture for ref in concept.references], names, columns=len(names), side=1.6)
print("the concept  ", ", ".join(f"{head} {value}" for head, value in toy.known_traits.items()))
print("the confounder", ", ".join(f"{head} {value}" for head, value in toy.confounder.items()))

# %% [markdown] tags=["slide", "no-references"]
# ## The references
#
# ![The four references of [V]](last)
#
# The concept is the robot. The confounder is what all four share by chance: the desert, and the middle.

# %% [markdown]
# *The concept* is what [V] should mean; *the confounder* is what all four pictures share by chance. A user
# of photographs does not know which is which, and neither does the model.
#
# ## 1 · One loop, two ways to train
#
# **DreamBooth** (2208.12242), in its plainest form, trains *every* weight of the model on the references,
# and reads [V] as one more "robot". A **LoRA** trains a few adapters, and $Y^l$ in the place of [V] (lesson
# 4). The loss of both is $L_{CC}$, the flow's with the complete text (Eq. 3).
#
# ### Exercise 5.1 ★★ · The loop
#
# `draw_batch` gives `batch.x_t`, `batch.t`, `batch.v` and the texts. Write one step: loss, gradient, its
# norm clipped to 1 (`torch.nn.utils.clip_grad_norm_`), the optimiser's step.

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
# says: emptied
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
# says: without [V]
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

# %% tags=["wrong"]
# says: no weight has moved
def train(theta, weights, data, rate, steps, keep=(), seed=0):              # emptied before the step
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses, kept = [], {}
    for k in range(steps):
        batch = draw_batch(data, TrainConfig(seed=seed), 1, k, pipe.shift)
        loss = (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.zero_grad()
        optimizer.step()
        losses.append(loss.item())
        if k + 1 in keep:
            kept[k + 1] = parameters_to_vector(weights).detach().clone()
    return losses, kept

# %% tags=["wrong"]
# says: a sum
def train(theta, weights, data, rate, steps, keep=(), seed=0):              # a sum in place of the mean
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses, kept = [], {}
    for k in range(steps):
        batch = draw_batch(data, TrainConfig(seed=seed), 1, k, pipe.shift)
        loss = (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if k + 1 in keep:
            kept[k + 1] = parameters_to_vector(weights).detach().clone()
    return losses, kept

# %% tags=["wrong"]
# says: clipped
def train(theta, weights, data, rate, steps, keep=(), seed=0):              # not clipped
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    losses, kept = [], {}
    for k in range(steps):
        batch = draw_batch(data, TrainConfig(seed=seed), 1, k, pipe.shift)
        loss = (theta(batch.x_t, batch.t, batch.texts.complete) - batch.v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if k + 1 in keep:
            kept[k + 1] = parameters_to_vector(weights).detach().clone()
    return losses, kept

# %% [markdown]
# <details><summary>Hint</summary>
#
# PyTorch *adds* to `.grad`, so it has to be emptied once a step, before `backward`.
# </details>

# %% tags=["check"]
def fresh_lora(seed=0):                          # adapters that change nothing yet, and Y (lesson 4)
    random = generator_for(seed, stage=1, step=-1)
    return Branch.fresh(pipe, class_word_states(pipe, data, random), TrainConfig().rank, random)

class Steep:                                     # a model of one weight, whose gradient is far longer than 1
    def __init__(self):
        self.weight = torch.nn.Parameter(torch.tensor([10.0]))

    def __call__(self, x_t, t, text):
        return self.weight * x_t

yours, ours = fresh_lora(), fresh_lora()
begun = parameters_to_vector(yours.parameters()).detach().clone()
settings = TrainConfig(steps=2, learning_rate=2e-3, embedding_learning_rate=2e-3)
rows = list(train_steps(methods.l_cc, methods.Thetas(theta_0, None, ours), data, settings, 1,
                        optimizer_for(ours, settings)))
losses, kept = train(yours, list(yours.parameters()), data, 2e-3, 2, keep=(2,))
wanted, batch = torch.tensor([row["loss"] for row in rows]), draw_batch(data, TrainConfig(), 1, 0, pipe.shift)
on_base = (theta_0(batch.x_t, batch.t, batch.texts.base) - batch.v).square().mean()
rule_out(losses[0], {"that is the loss of the text without [V]: take batch.texts.complete.": on_base})
expect(losses[0] < 10 * wanted[0], "the loss is a mean over all numbers of the batch, and yours is a sum.")
expect(not torch.equal(kept[2], begun), "no weight has moved: empty .grad before backward, not after it.")
expect_close(torch.tensor(losses), wanted, "the losses of two steps")
steep, lengths = Steep(), []
handle = register_optimizer_step_pre_hook(lambda *_: lengths.append(steep.weight.grad.norm().item()))
train(steep, [steep.weight], data, 2e-3, 2)
handle.remove()
expect(max(lengths) < 1.001, "the gradient is longer than 1: it has to be clipped before the step.")
expect_close(kept[2], parameters_to_vector(ours.parameters()).detach(),
             "the weights after two steps (is .grad emptied in every step?)", 1e-5)
print(f"5.1 right: after two steps all {len(kept[2]):,d} numbers are the package's")

# %% [markdown]
# Three trainings with your loop, forty steps each. (The benchmark takes 200 steps at a quarter of these
# rates.) The third is DreamBooth with **bare captions**: every text is "a [V] robot".

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
    assert last < 0.9 * first

# %% [markdown]
# The loss has fallen. By this number, everything went well. Now let them draw five **groups** of four
# pictures:
#
# | group | an example | asks |
# |---|---|---|
# | concept | `a small [V] robot on the left in the meadow` | has it been learned? |
# | unsaid | `a [V] robot` | what comes along when the text leaves it open? |
# | plain | `a small robot on the left in the meadow` | is a robot still a robot? |
# | neighbour | `a big [V] robot on the left and a small robot on the right` | are two kept apart? |
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
traits = toy.known_traits

def seen_share(name, group):                     # the share of the concept's traits that the reader sees
    reading = reader(drawn[name][group])
    return np.mean([[seen == value for seen in reading.names(head)] for head, value in traits.items()])

def text_of(group, n):
    return in_lines(groups["concept"][n].base if group == "plain" else groups[group][n].complete)

def show_group(group, names, side=1.45):
    pictures = [picture for name in names for picture in to_pictures(drawn[name][group])]
    show(pictures, [text_of(group, n) for n in range(4)], names, columns=4, side=side)

picked = [("concept", 0), ("concept", 2), ("unsaid", 1), ("plain", 0), ("plain", 2), ("other", 2)]
show([to_pictures(x[group][n:n + 1])[0] for x in drawn.values() for group, n in picked],
     [text_of(*place) for place in picked], list(drawn), side=1.4)
print("the concept's traits, where the text has [V]:  "
      + "   ".join(f"{name} {seen_share(name, 'concept'):.2f}" for name in drawn))
assert all(seen_share(name, "concept") > seen_share("base model", "concept") + 0.2 for name in runs)

# %% [markdown] tags=["slide"]
# ## After forty steps
#
# ![Pictures by the base model and by the three trained models, with the same texts and noise](last)
#
# $L_{CC}$ has fallen in all three runs.

# %% [markdown]
# Columns 1 to 3 ask for [V], and the robot of the references is arriving. (Some are in
# white chalk: the base model knows that way of drawing, too.) Columns 4 to 6 do not ask for it.
#
# ## 2 · Five ways in which it goes wrong
#
# **Language drift.** The class word is taken over: "robot" now means *the* robot.

# %%
show_group("plain", ["base model", "DreamBooth", "LoRA"])
print("the concept's traits, where nobody asked for [V]:  "
      + "   ".join(f"{name} {seen_share(name, 'plain'):.2f}" for name in drawn))
assert all(seen_share(name, "plain") > seen_share("base model", "plain") + 0.2 for name in runs)

# %% [markdown] tags=["slide"]
# ## Language drift
#
# ![Pictures of texts without [V], before and after training](last)
#
# Nobody asked for [V] here. The word *robot* has been taken over.

# %% [markdown]
# **The confounder comes along.** "A [V] robot" says neither place nor background. With full captions the
# word "desert" can explain the sand, so [V] need not. With bare captions nothing explains it, and **what no
# word explains is learned as part of [V]**.

# %%
show_group("unsaid", ["base model", "DreamBooth", "bare captions"])
shared = {}
for name in drawn:
    reading = reader(drawn[name]["unsaid"])
    shared[name] = np.mean([[seen == value for seen in reading.names(head)]
                            for head, value in toy.confounder.items()])
print("in the middle, in the desert:  " + "   ".join(f"{name} {share:.2f}" for name, share in shared.items()))
assert shared["bare captions"] > max(shared["base model"], shared["DreamBooth"]) + 0.1

# %% [markdown]
# One can see it in *one* picture: at $t=1$ there is only noise, so the best prediction of $x_0=x_1-v$ is the
# **mean of all pictures** that the text stands for (lesson 1).

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
# ![Four blurred beliefs, by the base model and three trained models, and the mean of the references](last)
#
# What each model believes of "a [V] robot", before it has seen anything. *Bare captions* are four times "a
# [V] robot"; the others name the desert.

# %% [markdown]
# After bare captions the model leans toward the desert before it has seen a single pixel, and clearly more
# so than the other DreamBooth, which saw the same pictures.
#
# ### Two robots, one of them [V]
#
# **A neighbour is hit.** The text now names two robots, and says which one is [V]. Do the models know?

# %%
show_group("neighbour", ["base model", "DreamBooth", "LoRA"], side=1.7)
beside = {}                                      # name -> share of the concept's traits on [V], on the other
for name in ("base model", "DreamBooth", "LoRA"):
    reading = reader(drawn[name]["neighbour"])
    on = [[reading.names(head, n) for head in toy.traits_beside] for n in (0, 1)]   # left, right
    hit = [[[on[n][h][k] == value for h, value in enumerate(toy.traits_beside.values())] for n in
            (prompt.n, 1 - prompt.n)] for k, prompt in enumerate(groups["neighbour"])]
    beside[name] = np.mean(hit, axis=(0, 2))
    print(f"{name:12s} the concept's traits on the robot with [V]: {beside[name][0]:.2f}, "
          f"on the other one: {beside[name][1]:.2f}")
for on_V, on_other in (beside["DreamBooth"], beside["LoRA"]):
    assert beside["base model"][1] < 0.2 < on_other - 0.1 and on_other > 0.5 * on_V

# %% [markdown] tags=["slide"]
# ## Two robots, one of them [V]
#
# ![Pictures of two robots by each model; only one of them should be [V]](last)
#
# The text says which robot is [V]. The other one gets its traits, too.

# %% [markdown]
# Hardly. The base model's other robot has next to none of the traits; now it has more than half as many as
# the robot with [V]. A loss on pictures of *one* robot never asked the model to tell two apart. Lesson 9
# looks into the attention for the reason, and finds a remedy.
#
# **Diversity is lost.** A model that has seen one individual for long draws its cousins. No single picture
# shows it (section 4 measures it).
#
# **Overfitting.** In the end the model knows four pictures, and not a robot. Our renderer can draw what it
# was not trained on. We take three sets:
#
# * the references, with noise that the training never drew;
# * the same robot **elsewhere**: in the scenes of the concept group, with their complete texts;
# * **other robots** in these scenes, with the base texts.

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
    for (name, curve), colour, style in zip(by_set.items(), (BLUE, GOLD, CORAL), ("o-", "s--", "^:")):
        axis.plot((0, *KEEP), curve, style, color=colour, ms=4, label=name)
    axis.axhline(1, color=GREY, lw=0.8)
    axis.set(title=run, xlabel="step")
axes[0].set_ylabel("loss, base model = 1")
axes[1].legend()
plt.show()
print(f"loss after {STEPS} steps, in parts of the base model's")
for run, by_set in curves.items():
    print(f"{run:12s}" + "   ".join(f"{name} {curve[-1]:.2f}" for name, curve in by_set.items()))
    references, elsewhere, others = (curve[-1] for curve in by_set.values())
    assert references < 0.9 and elsewhere > references + 0.1 and others > 1.1

# %% [markdown] tags=["slide"]
# ## The loss does not see it
#
# ![Losses over the steps on the references, on the same robot elsewhere, and on other robots, for two
# trainings](last)
#
# The lowest line is what training minimises. The distance to the middle one is overfitting; the highest is
# damage.

# %% [markdown]
# The training minimises the lowest line, and it falls. The gap to the middle one is overfitting: the same
# robot, where it has not been photographed, profits far less, or not at all. The highest line is what was
# broken on the way. **The training loss is computed on four pictures with their four texts. Nothing in it
# depends on any other text.**
#
# ## 3 · A gallery of measures
#
# Who looks at the pictures? The **reader**, a small network that was trained on renders
# ([`reader.py`](../../tinyflow/picturebook/reader.py)). It finds the objects' masks, names their parts, and
# makes of each object a feature vector. (Photographs are judged by SAM, CLIP and DINO.) A measure compares
# what it sees in a picture and in its partner.
#
# Before you write some measures: **guess**. Below are the pictures of one run.

# %%
RUN = "bare captions"
rows = ("concept", "unsaid", "plain", "neighbour")
pairs = [list(to_pictures(drawn[name][group])) for group in rows for name in ("base model", RUN)]
show([picture for row in pairs for picture in row], ["original"] * 4 + ["customized"] * 4,
     list(rows), columns=8, side=1.15)
print("row neighbour:", "; ".join(prompt.complete for prompt in groups["neighbour"][:4]))

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
# ![Rows of pictures of the original and of a customized model: concept, unsaid, plain, neighbour](last)
#
# The share of the concept's traits in the row *plain*, minus the original's? How much do pixels change
# outside the robot in the row *concept*?

# %% [markdown]
# ### Exercise 5.2 ★ · Eight guesses
#
# Return a dictionary, `{"similarity": ..., "mask IoU": ...}` and so on. Each guess must lie in the measure's
# range. (A mean change of the pixels of 1: all black has become white.)

# %% tags=["exercise"]
def my_guesses():
    # -> name -> your number, for every name in `asked`
    # BEGIN SOLUTION 5.2
    return {"similarity": 0.6, "mask IoU": 0.6, "outside change": 0.1, "confounder unsaid": 0.5,
            "class drift": 0.15, "class leak": 0.4, "diversity": -0.2, "neighbour leak": 0.4}
    # END SOLUTION

# %% tags=["wrong"]
# says: no percentages
def my_guesses():                                # percentages
    return {"similarity": 60, "mask IoU": 60, "outside change": 10, "confounder unsaid": 50,
            "class drift": 15, "class leak": 40, "diversity": -20, "neighbour leak": 40}

# %% tags=["wrong"]
# says: no guess for mask IoU
def my_guesses():                                # one is forgotten
    return {"similarity": 0.6, "outside change": 0.1, "confounder unsaid": 0.5, "class drift": 0.15,
            "class leak": 0.4, "diversity": -0.2, "neighbour leak": 0.4}

# %% tags=["wrong"]
# says: a dictionary
def my_guesses():
    return [0.6, 0.6, 0.1, 0.5, 0.15, 0.4, -0.2, 0.4]

# %% tags=["check"]
BOUNDS, guesses = {"0 to 1": (0, 1), "-1 to 1": (-1, 1)}, my_guesses()
expect(guesses is not None, "it returned None: is the return missing?")
expect(isinstance(guesses, dict), "return a dictionary, from the measures' names to your numbers.")
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
assert 0.02 < covered < 0.25 and value("class drift", RUN) < 0.15 and len(traits) == 6

# %% [markdown]
# *Pixel changes are small numbers*: a robot covers only a small part of its picture. And *shares of traits
# are coarse*: with six traits, one that is learned in every picture is a sixth. Here are all.

# %%
print(f"{'':20s}" + "".join(f"{name:>15s}" for name in runs) + f"{'nothing':>12s}{'perfect':>12s}")
for name in asked:
    row = MEASURES[name]
    ends = ["depends" if end is None else f"{end:g}" for end in (row.nothing, row.perfect)]
    print(f"{name:20s}" + "".join(f"{value(name, run):15.2f}" for run in runs)
          + "".join(f"{end:>12s}" for end in ends))

# %% [markdown]
# *Nothing* is the base model itself, *perfect* a method that changes the concept's robot and not one pixel
# besides.
#
# ## 4 · Four of them, written by you
#
# ### Exercise 5.3 ★ · Similarity
#
# The reader makes a unit vector of every object. Average the references' vectors, and bring the average back
# to length 1; a picture's similarity is the cosine with it.

# %% tags=["exercise"]
def similarity(features, references):
    # features [n, W] and references [m, W], all unit vectors -> cosines [n]
    # BEGIN SOLUTION 5.3
    mean = references.mean(0)
    return features @ (mean / mean.norm())
    # END SOLUTION

# %% tags=["wrong"]
# says: shorter than 1
def similarity(features, references):            # the mean of unit vectors is shorter than 1
    return features @ references.mean(0)

# %% tags=["wrong"]
# says: nearest
def similarity(features, references):            # the nearest reference: rewards a copy of one picture
    return (features @ references.T).amax(1)

# %% tags=["wrong"]
# says: one cosine a picture
def similarity(features, references):
    mean = references.mean(0)
    return (features @ (mean / mean.norm())).mean()

# %% tags=["wrong"]
# says: each reference
def similarity(features, references):
    return features @ references.T

# %% tags=["check"]
apart = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
mine, mean = similarity(apart[:3], apart[3:]), apart[3:].mean(0)
rule_out(mine, {"a mean of unit vectors is shorter than 1: divide it by its length.": apart[:3] @ mean,
                "the nearest one rewards a copy of one picture: average.": (apart[:3] @ apart[3:].T).amax(1),
                "one cosine a picture is asked for: do not average.":
                (apart[:3] @ (mean / mean.norm())).mean(),
                "these are the cosines with each reference: average those first.": apart[:3] @ apart[3:].T})
known = reader(to_pixels(judge.references))
for run, some in read.items():
    reading = some.seen["concept"]
    expect_close(similarity(reading.identity[:, 0], known.identity[:, 0]), judge.similarity(reading),
                 f"the similarity of {run}")
original = similarity(read[RUN].seen_original["concept"].identity[:, 0], known.identity[:, 0])
themselves = similarity(known.identity[:, 0], known.identity[:, 0])
print("5.3 right: the same cosines as the package's, in the concept group")
for name, found in [("base model", original), *((run, some.similarity) for run, some in read.items()),
                    ("the references themselves", themselves)]:
    print(f"   {name:27s}" + "".join(f"{cosine:7.2f}" for cosine in found) + f"    mean {found.mean():.2f}")
assert themselves.min() > 0.9 and original.mean() < 0.1
assert all(original.mean() + 0.2 < some.similarity.mean() < 0.95 for some in read.values())

# %% [markdown]
# The base model's robots have a similarity, too. A **fidelity** is 0 there, and 1 at that of a perfect
# method.
#
# ### Exercise 5.4 ★★ · Change outside the object
#
# [V] should change the robot. What about the meadow around it? Compare, in the concept group, each picture
# with the original's. Leave out every pixel that belongs to the robot **in either picture**: meadow that a
# thinner robot uncovers is no damage. All remaining pixels of all pictures count alike. The change of one
# pixel is $\tfrac12$ of the mean absolute difference over the three channels, because pixels lie in
# $[-1,1]$.

# %% tags=["exercise"]
def change_outside(custom, original, masks):
    # pictures [n, 3, H, W] in [-1, 1]; masks bool [2, n, H, W]: of custom, of original -> a number (tensor)
    # BEGIN SOLUTION 5.4
    change = (custom - original).abs().mean(1) / 2                          # [n, H, W]
    outside = ~(masks[0] | masks[1])
    return change[outside].mean()
    # END SOLUTION

# %% tags=["wrong"]
# says: ALL pixels
def change_outside(custom, original, masks):     # zeros inside the masks take part in the mean
    change = (custom - original).abs().mean(1) / 2
    outside = ~(masks[0] | masks[1])
    return (change * outside).mean()

# %% tags=["wrong"]
# says: either picture
def change_outside(custom, original, masks):     # the original's mask alone: a hat counts as damage
    change = (custom - original).abs().mean(1) / 2
    return change[~masks[1]].mean()

# %% tags=["wrong"]
# says: twice
def change_outside(custom, original, masks):     # black to white counts as 2
    change = (custom - original).abs().mean(1)
    return change[~(masks[0] | masks[1])].mean()

# %% tags=["wrong"]
# says: both pictures
def change_outside(custom, original, masks):     # the intersection in place of the union
    change = (custom - original).abs().mean(1) / 2
    return change[~(masks[0] & masks[1])].mean()

# %% tags=["wrong"]
# says: cancel
def change_outside(custom, original, masks):     # brighter and darker cancel
    change = (custom - original).mean(1).abs() / 2
    return change[~(masks[0] | masks[1])].mean()

# %% tags=["wrong"]
# says: INSIDE
def change_outside(custom, original, masks):
    change = (custom - original).abs().mean(1) / 2
    return change[masks[0] | masks[1]].mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# `masks[0] | masks[1]` is the union, and `change[outside]` a long vector of the pixels.
# </details>

# %% tags=["check"]
random = torch.Generator().manual_seed(1)        # first, pictures of which every pixel differs
a, b = (2 * torch.rand(3, 3, 8, 8, generator=random) - 1 for _ in range(2))
some_masks = torch.rand(2, 3, 8, 8, generator=random) < 0.3
mine, d, union = change_outside(a, b, some_masks), (a - b).abs().mean(1) / 2, some_masks.any(0)
rule_out(mine, {"you divide by the number of ALL pixels: take the mean of those outside.":
                (d * ~union).mean()})
for k in (0, 1):
    rule_out(mine, {"you use one mask: leave out the robot of either picture.": d[~some_masks[k]].mean()})
rule_out(mine, {"you leave out only what is robot in both pictures.": d[~some_masks.all(0)].mean(),
                "that is the change INSIDE the masks.": d[union].mean(),
                "twice what it should be: from black to white the difference is 2.": 2 * d[~union].mean(),
                "channels cancel: take absolute values first.": (a - b).mean(1).abs()[~union].mean() / 2})
expect_close(mine, d[~union].mean(), "the change outside both masks")
for run, some in read.items():
    mine = change_outside(some.custom["concept"], some.original["concept"], some.masks)
    expect_close(mine, MEASURES["outside change"].compute(some), f"the change outside both objects, {run}")
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
# The red line is what the reader takes for the robot. Where it overlooks a part, that part counts as damage.
#
# ### Exercise 5.5 ★★ · Leak and diversity
#
# Two measures on the **plain** group, where the texts have no [V].
#
# * **Class leak**: over all pictures *and* all traits, the share of the concept's traits that the reader
# sees; minus the same share in the original's pictures.
# * **Diversity**: for each of an identity's first six numbers (every robot shows these), the standard
# deviation over the pictures (torch's, with $n-1$); then the mean over the six; minus the original's.

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
# says: every trait at once
def class_leak(reading, original, traits):       # a robot counts only if it has every trait
    def share(some):
        seen = np.array([[name == value for name in some.names(head)] for head, value in traits.items()])
        return seen.all(0).mean()
    return share(reading) - share(original)

def diversity(numbers, original):
    return numbers.std(0).mean() - original.std(0).mean()

# %% tags=["wrong"]
# says: minus the original's
def class_leak(reading, original, traits):
    return np.mean([[name == value for name in reading.names(head)] for head, value in traits.items()])

def diversity(numbers, original):
    return numbers.std(0).mean() - original.std(0).mean()

# %% tags=["wrong"]
# says: by itself
def class_leak(reading, original, traits):
    def share(some):
        return np.mean([[name == value for name in some.names(head)] for head, value in traits.items()])
    return share(reading) - share(original)

def diversity(numbers, original):                # one spread over all numbers, the means' own included
    return numbers.std() - original.std()

# %% tags=["wrong"]
# says: n - 1, not by n
def class_leak(reading, original, traits):
    def share(some):
        return np.mean([[name == value for name in some.names(head)] for head, value in traits.items()])
    return share(reading) - share(original)

def diversity(numbers, original):
    return numbers.std(0, unbiased=False).mean() - original.std(0, unbiased=False).mean()

# %% tags=["wrong"]
# says: along the pictures
def class_leak(reading, original, traits):
    def share(some):
        return np.mean([[name == value for name in some.names(head)] for head, value in traits.items()])
    return share(reading) - share(original)

def diversity(numbers, original):
    return numbers.std(1).mean() - original.std(1).mean()

# %% [markdown]
# <details><summary>Hint</summary>
#
# `[name == value for name in reading.names(head)]` is a row of truth values for one trait.
# </details>

# %% tags=["check"]
x, y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2)) * torch.arange(1.0, 7)
x, y = 1.7 * x + torch.arange(6.0), y + torch.arange(6.0)
for run, some in read.items():
    seen, before_it = some.seen["plain"], some.seen_original["plain"]
    mine, leak = class_leak(seen, before_it, traits), value("class leak", run)
    now = judge.traits(seen).float()
    rule_out(mine, {"take away the share in the original's pictures: minus the original's.": now.mean(),
                    "the sign is wrong: the customized model's share minus the original's.": -leak,
                    "you count robots that have every trait at once: count single traits.":
                    now.all(1).float().mean() - judge.traits(before_it).all(1).float().mean()})
    expect(abs(mine - leak) < 1e-5, f"the class leak of {run} is {leak:.3f}, and yours is {mine:.3f}.")
    mine = diversity(x, y)
    rule_out(mine, {"take the spread of each number by itself, x.std(0), and then the mean.":
                    x.std() - y.std(),
                    "the spread is taken along the pictures: x.std(0).": x.std(1).mean() - y.std(1).mean(),
                    "divide by n - 1, not by n.": (0.75 ** 0.5) * (x.std(0).mean() - y.std(0).mean()),
                    "take away the original's diversity.": x.std(0).mean()})
    numbers, of_original = (r.traits[:, 0, :ALWAYS_SHOWN] for r in (seen, before_it))
    theirs = MEASURES["diversity"].compute(some)
    expect_close(diversity(numbers, of_original), theirs, f"the diversity of {run}")
print("5.5 right")
print(f"{'share in the plain group':26s}" + "".join(f"{head:>10s}" for head in traits))
for name in drawn:
    reading = read[RUN].seen_original["plain"] if name == "base model" else read[name].seen["plain"]
    found = [np.mean([seen == traits[head] for seen in reading.names(head)]) for head in traits]
    print(f"{name:26s}" + "".join(f"{share:10.2f}" for share in found))
    assert found[0] > 0.9
spreads = {run: value("diversity", run) for run in runs}
print("diversity, minus the original's:  "
      + "   ".join(f"{run} {spread:+.2f}" for run, spread in spreads.items()))
assert max(value("class leak", run) for run in runs) > 0.2
assert max(spreads.values()) > 0 and min(spreads.values()) > -0.15

# %% [markdown]
# The table says *which* traits have leaked into the word "robot". The column *object* is near 1 in every
# row: that is why the original's share is taken away.
#
# **Diversity** fell in one run here, and rose in two: four pictures are too few for a conclusion. With twelve
# pictures of each of six concepts, after 200 steps, the benchmark finds −.087 ± .015 for DreamBooth and −.088
# ± .008 for a LoRA ([main table](../../purecc_min/benchmark/report_pages/main.md)).
#
# ## 5 · A distance between two models, in nats (optional)
#
# *This section needs stochastic calculus: diffusions, their reversal in time, Girsanov's theorem.*
#
# Has **anything at all** moved? Two models are two distributions of pictures, and these have a
# Kullback-Leibler divergence, $\mathbb E_{x\sim P}\log\frac{p(x)}{q(x)}$, in **nats**. The density of what a
# flow draws is out of reach. But a picture is the end of a *path* of small steps, and a small step is
# Gaussian:
#
# **1.** The velocity knows the noise: $x_1=x_t+(1-t)\,v$, and the score is $-\frac1t\,\mathbb E[x_1\mid
# x_t]$, so $\nabla\log p_t(x)=-\frac{x+(1-t)\,v}{t}$.
#
# **2.** The diffusion $dx=-\frac{x}{1-t}\,dt+g\,dW$ has at every time the flow's distribution, if
# $g^2=\frac{2t}{1-t}$ (the variance of $x_t$ given $x_0$ must stay $t^2$). ($g$ is the strength of the noise
# here, not guidance.) Backward in time the drift is
# $-\frac{x}{1-t}-g^2\,\nabla\log p_t$; with step 1, $b=\frac{x}{1-t}+2v$.
#
# **3.** A step of length $h$ goes to a normal with the mean $x-h\,b$ and the variance $g^2h$; the other
# model's mean is $2h\,(v-v')$ away. Their KL is the squared distance over twice the variance,
# $\frac{1-t}{t}\,\lVert v-v'\rVert^2\,h$.
#
# **4.** Add up. With $h\to0$ this is Girsanov's theorem:
#
# $$\mathrm{KL}(\text{paths}) = \mathbb E \int_0^1 \frac{1-t}{t}\, \lVert v(x_t, t) - v'(x_t, t) \rVert^2\, dt.$$
#
# The KL between the *pictures* is at most this.

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
# Let us see it for two "models" of single numbers, two normals, whose velocities are known. We run the
# random sampler of the first, and at every step ask both for the density of that step.

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
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
axes[0].plot(np.r_[1, times], np.array(tracks), color=BLUE, lw=0.4, alpha=0.6)
axes[0].set(xlabel="t", title="forty paths of the first model", xlim=(1, 0))
axes[1].plot(times, sums, color=CORAL, label="mean log-ratio so far")
axes[1].axhline(kl_of_data, color=INK, ls="--", label="KL of the two normals")
axes[1].set(xlabel="t", ylabel="nats", xlim=(1, 0), ylim=(0, 1.25 * kl_of_data))
axes[1].legend()
plt.show()
print(f"mean log-ratio of 4000 paths {log_ratio.mean():.3f} nats;  KL of the two normals {kl_of_data:.3f}")
assert abs(x.mean() - m) < 0.05 and abs(x.std() - s) < 0.05
assert abs(log_ratio.mean() - kl_of_data) < 0.1 and np.diff(sums)[::20].min() > -0.01

# %% [markdown] tags=["slide"]
# ## It can be watched
#
# ![Forty paths of one model, the mean of the log-ratio so far, and a histogram of it for whole paths](last)
#
# Two models of one number. Dashed: the KL of the two normals themselves.

# %% [markdown]
# The mean log-ratio grows along the path, and ends at the KL of the two normals. (These velocities are
# exact; for networks it is a bound.)
#
# ### Exercise 5.6 ★★★ · The path KL
#
# In nats **a picture**: $\lVert\cdot\rVert^2$ is a sum over channels and places, the expectation a mean over
# noised renders, with the same `x_1` at all times. The integral is the mean over `TIMES`, the middles of
# five equal pieces of $[0,1]$.

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
# says: upside down
def path_kl(theta, theta_other, x_0, x_1, text):
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        total += time / (1 - time) * apart.square().sum((1, 2, 3)).mean() / len(TIMES)
    return total

# %% tags=["wrong"]
# says: sum over the picture
def path_kl(theta, theta_other, x_0, x_1, text): # the mean over the picture's numbers, not their sum
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        total += (1 - time) / time * apart.square().mean() / len(TIMES)
    return total

# %% tags=["wrong"]
# says: five pieces
def path_kl(theta, theta_other, x_0, x_1, text): # the sum over the times, not their mean
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        total += (1 - time) / time * apart.square().sum((1, 2, 3)).mean()
    return total

# %% tags=["wrong"]
# says: mean over the pictures
def path_kl(theta, theta_other, x_0, x_1, text): # the sum over the batch, too
    total = 0.0
    for time in TIMES:
        t = torch.full((len(x_0),), time)
        x_t = (1 - time) * x_0 + time * x_1
        apart = theta(x_t, t, text) - theta_other(x_t, t, text)
        total += (1 - time) / time * apart.square().sum() / len(TIMES)
    return total

# %% tags=["check"]
x_0, x_1 = torch.zeros(3, 1, 1, 2), torch.ones(3, 1, 1, 2)                  # two numbers a picture
mine = path_kl(lambda x_t, t, text: x_t, lambda x_t, t, text: 0 * x_t, x_0, x_1, None)
weights = [(1 - t) / t * t * t for t in TIMES]
right = torch.tensor(2 * np.mean(weights))       # the two velocities differ by x_t, and here x_t is t
rule_out(mine, {"the weight is upside down.": 2 * np.mean([t / (1 - t) * t * t for t in TIMES]),
                "the weight (1 - t) / t is missing.": 2 * np.mean([t * t for t in TIMES]),
                "nats a picture: sum over the picture's numbers, do not average.": right / 2,
                "take the mean over the pictures, not their sum.": right * 3,
                "the integral has five pieces of length 1/5: take the mean over the times.":
                right * len(TIMES)})
expect(isinstance(mine, torch.Tensor) and mine.shape == (), "return one number, a tensor.")
expect_close(mine, right.to(mine), "a path KL that is known")
normals = [lambda x_t, t, text, mean=mean: exact_v(x_t, flow.expand(t, x_t), mean) for mean in (m, m_other)]
mine = path_kl(*normals, x_0, x_1, None)
expect_close(mine, torch.tensor(2 * kl_of_data), "the KL of two pairs of normals", 0.1)
others = groups["other"]
x_0 = pipe.encode_images(render_all([prompt.scene for prompt in others])[0])
x_1 = flow.noise_for(list(range(len(x_0))), x_0.shape[1:])
text = pipe.encode_text([prompt.base for prompt in others])
found = {run: path_kl(theta_0, theta, x_0, x_1, text) for run, (theta, _) in runs.items()}
for run in runs:
    expect_close(found[run], torch.tensor(value("path KL", run)), f"the path KL of {run}", 1e-3)
zero = path_kl(theta_0, pipe.velocity, x_0, x_1, text)
expect(zero == 0, "from a model to itself it should be 0.")
print("5.6 right.  nats a picture, on pictures of a " + ", a ".join(p.scene.things[0].object for p in others))
parts = {}
for run in runs:
    squared = np.array(read[run].errors.squared)
    parts[run] = np.array([(1 - t) / t for t in TIMES]) * squared / len(TIMES)
    print(f"   {run:15s}{found[run]:8.1f}    of which at t = "
          + ", ".join(f"{t}: {part:.0f}" for t, part in zip(TIMES, parts[run])))
    assert abs(parts[run].sum() - found[run]) < 1e-2 * found[run] and parts[run][0] > 0.5 * parts[run].sum()
print(f"   {'nothing':15s}{zero:8.1f}")
assert min(found.values()) > 10 and 22_000 < np.exp(10) < 22_100
assert word not in [p.scene.things[0].object for p in others]

# %% [markdown]
# Nobody trained on these pictures. To an observer who bets on the model that drew a path, every nat
# multiplies the odds by $e$, and ten nats are odds of 22 000 to 1. All three numbers are above that.
#
# * **It is zero only if nothing moved** (on the texts and renders that were asked), and it does not say what
# moved.
# * **Small times weigh most.** At $t=0.1$ the weight is 9, and more than half of all nats come from there.
# * The KL of the paper's Fig. 2 (0.009 to 0.04) is another quantity.
#
# ## 6 · Is it a difference? (optional)
#
# Another seed gives another number. How far may the mean of $n$ seeds be from that of infinitely many? The
# 95 % interval is
#
# $$\bar x \pm q_{n-1}\, \frac{\hat\sigma}{\sqrt n}, \qquad \hat\sigma^2 = \frac{1}{n-1} \sum_i (x_i - \bar x)^2 .$$
#
# $q$ is Student's quantile: 1.96 for many values, and much larger for few.
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
# says: ddof=1
def interval(values):                            # numpy's default divides by n
    n = len(values)
    return np.mean(values), STUDENT_T.get(n - 1, 1.96) * np.std(values) / np.sqrt(n)

# %% tags=["wrong"]
# says: whatever n is
def interval(values):                            # 1.96 whatever n is
    return np.mean(values), 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))

# %% tags=["wrong"]
# says: root of n
def interval(values):                            # the spread of single values
    return np.mean(values), STUDENT_T.get(len(values) - 1, 1.96) * np.std(values, ddof=1)

# %% tags=["wrong"]
# says: n - 1 degrees of freedom
def interval(values):
    n = len(values)
    return np.mean(values), STUDENT_T.get(n, 1.96) * np.std(values, ddof=1) / np.sqrt(n)

# %% tags=["wrong"]
# says: half-width
def interval(values):                            # the two ends
    half = STUDENT_T.get(len(values) - 1, 1.96) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half

# %% tags=["check"]
for n in (5, 2, 3, 30):
    values = np.random.default_rng(n).normal(size=n)
    theirs, mine = mean_and_interval(list(values)), interval(values)
    expect(mine is not None, "it returned None: is the return missing?")
    expect(len(mine) == 2, "return two numbers, the mean and the half-width.")
    expect(abs(mine[0] - theirs[0]) < 1e-9,
           "the first number is the mean, and the second the half-width, not the two ends.")
    q, scatter = STUDENT_T.get(n - 1, 1.96), np.std(values, ddof=1)
    rule_out(mine[1], {"numpy divides by n: take np.std(values, ddof=1).": q * np.std(values) / n ** 0.5,
                       "that is for a single value: the mean's spread is less, by the root of n.":
                       q * scatter})
    if n < 30:
        rule_out(mine[1], {"you take 1.96 whatever n is: take Student's quantile.":
                           1.96 * scatter / n ** 0.5,
                           "it is the quantile of n - 1 degrees of freedom.":
                           STUDENT_T[n] * scatter / n ** 0.5})
    expect(abs(mine[1] - theirs[1]) < 1e-9,
           f"for {n} values the half-width is {theirs[1]:.3f}, and yours is {mine[1]:.3f}.")
print("5.7 right: the benchmark's tables have the same intervals")

# %% [markdown]
# Does it keep its promise? Take 4000 experiments with a known truth, four normal values in each, and count
# how often the truth lies inside. The same with 1.96, and with the **bootstrap**, which draws from the four
# values again and again.

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
# With four seeds only Student's interval does what it says. Now the path KL of four training seeds. The runs
# of one seed **draw the same batches**, so they can be compared in *pairs*: what a seed does to both alike
# cancels in the difference.

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
        row.append(velocity_error(pipe, theta, few).path_kl)
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
    plt.errorbar(k + (0.12 if k else -0.12), mean, half, fmt="s^"[k], color=(CORAL, BLUE)[k], capsize=4)
plt.gca().set(xticks=[0, 1], xticklabels=list(kls), xlim=(-0.5, 1.5), ylabel="path KL, nats")
plt.show()
mean, half = interval(differences)
assert mean - half > 0

# %% [markdown] tags=["slide"]
# ## Pairs
#
# ![Points of two methods, joined by a grey line where they drew the same batches](last)
#
# A grey line joins two runs that drew the same batches. Look at the lines, and not at whether the two
# intervals overlap.

# %% [markdown]
# **A difference counts if the interval *of the difference* does not contain 0.** Here it does not: at step
# 20 DreamBooth has moved farther. An overlap of the two would say nothing.
#
# A table has three kinds of repetition. Which is the $n$?
#
# | interval over | says what would happen with |
# |---|---|
# | pictures | other noise, drawn by *these* trained models |
# | seeds | another training on *these* concepts; so the benchmark's tables |
# | concepts | **another concept**, which is what a reader wants to know |
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
# says: all pictures of all runs
def interval_over(values, axis):                 # as if they were independent
    return interval(values.flatten())

# %% tags=["wrong"]
# says: over the two OTHER axes
def interval_over(values, axis):                 # averages over the axis that is repeated
    return interval(values.mean(axis=axis).flatten())

# %% tags=["wrong"]
# says: over concepts
def interval_over(values, axis):                 # always over seeds
    return interval(values.mean(axis=(0, 2)))

# %% tags=["check"]
values = np.random.default_rng(0).normal(size=(5, 3, 24)) + np.arange(5)[:, None, None]
cells = [(seed, values[c, seed].mean()) for c in range(5) for seed in range(3)]
theirs, mine = mean_and_interval(mean_by_seed(cells)), interval_over(values, 1)
expect(mine is not None, "it returned None: is the return missing?")
rule_out(mine[1], {"you take all pictures of all runs as independent.": interval(values.flatten())[1],
                   "average over the two OTHER axes.": interval(values.mean(1).flatten())[1]})
expect(np.allclose(mine, theirs), f"over seeds it should be {theirs[0]:.3f} ± {theirs[1]:.3f}, and yours is "
                                  f"{mine[0]:.3f} ± {mine[1]:.3f}. One value for each seed is left.")
expect(np.allclose(interval_over(values, 0), interval(values.mean((1, 2)))), "over concepts: five values.")
expect(np.allclose(interval_over(values, 2), interval(values.mean((0, 1)))), "over pictures: 24 values.")
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
# The $n$ is the number of things that could have come out differently.
#
# ## 7 · Why the ends cannot be compared
#
# After forty steps, is the method that did less damage the better one? Plot what was learned against what it
# cost, for snapshots of both trainings. This curve is a **front**. The cost is a number of the package, the
# **path KL**: how far velocities have moved on pictures of *other* things (section 5).

# %%
texts = [prompt.complete for prompt in groups["concept"]]
features = known.identity[:, 0]
fronts = {}
for run in ("DreamBooth", "LoRA"):
    theta, weights = runs[run]
    fronts[run] = [(original.mean().item(), 0.0)]
    for step in KEEP:
        vector_to_parameters(kept[run][step], weights)
        x = drawn[run]["concept"] if step == STEPS else draw(pipe, theta, texts, word, steps=8)
        like = similarity(reader(x).identity[:, 0], features).mean().item()
        fronts[run].append((like, velocity_error(pipe, theta, few).path_kl))

level = min(max(like for like, _ in front) for front in fronts.values())
plt.figure(figsize=(5.6, 3), layout="constrained")
for (run, front), colour, style in zip(fronts.items(), (CORAL, BLUE), ("o-", "s--")):
    plt.plot(*zip(*front), style, color=colour, ms=4, label=run)
    for step, (like, kl) in zip((0, *KEEP), front):
        if step:
            plt.annotate(step, (like, kl), xytext=(5, -10), textcoords="offset points", color=colour)
plt.axvline(level, color=INK, lw=0.8, ls=":")
plt.gca().set(xlabel="what was learned: similarity with the references", ylabel="damage: path KL, nats")
plt.legend()
plt.show()
print("similarity / path KL" + "".join(f"{f'step {step}':>15s}" for step in (0, *KEEP)))
at_level = {}
for run, front in fronts.items():
    print(f"{run:20s}" + "".join(f"{f'{like:.2f} / {kl:.1f}':>15s}" for like, kl in front))
    likes, costs = zip(*sorted(front))
    at_level[run] = np.interp(level, likes, costs)
    assert min(np.diff([cost for _, cost in front])) > 0 and front[-1][0] > front[1][0] + 0.2
print(f"path KL at similarity {level:.2f}:  "
      + "   ".join(f"{run} {kl:.0f}" for run, kl in at_level.items()))
assert at_level["LoRA"] < 0.7 * at_level["DreamBooth"]
assert fronts["LoRA"][-1][0] < fronts["DreamBooth"][-1][0] - 0.1     # it has learned more slowly

# %% [markdown] tags=["slide"]
# ## A front
#
# ![Damage over fidelity along one training](last)
#
# Along one training, fidelity and damage grow together. The number of steps is a place on the curve, and no
# property of the method.

# %% [markdown]
# The small numbers are steps. Along one training, what was learned and the damage grow *together*: at step 0
# both models are pure and have learned nothing. So a smaller damage at the end may only mean that a method
# learned more slowly, as the LoRA did here. Two things can be compared:
#
# * the **damage at equal similarity**: go up a vertical line, such as the dotted one, and read both heights.
# Here the LoRA's is the lower one, on four pictures and one seed;
# * the **whole fronts**: one method is purer if its front lies lower everywhere. If they cross, neither is.
#
# ## What you can now say
#
# * Four failures were seen here: language drift, a confounder that comes along, a neighbour that is hit,
# overfitting. The fifth, lost diversity, shows in longer trainings. $L_{CC}$ sees none of them.
# * What no word of the caption explains is learned as part of [V].
# * A measure needs a partner picture from the same noise, and a value for "nothing happened".
# * Compare at equal similarity, never at the ends.
#
# | you wrote | in the package |
# |---|---|
# | `train` | `train_steps` in `purecc_min/learning.py` |
# | `similarity` | `Judge.similarity` in `purecc_min/measure/judge.py` |
# | `change_outside`, `class_leak`, `diversity` | their rows in `purecc_min/measure/measures.py` |
# | `path_kl` | `VelocityError.path_kl` in `purecc_min/measure/velocities.py` |
# | `interval`, `interval_over` | `mean_and_interval`, `mean_by_seed` in `purecc_min/benchmark/tables.py` |
#
# ## Two questions
#
# **1.** You write captions for your own four photographs, all taken in your kitchen. Should the captions say
# "in a kitchen"?
# <details><summary>Answer</summary>
#
# Yes. The word can then explain the kitchen, and [V] need not. Name whatever is *not* the concept. And do
# not name what is.
# </details>
#
# **2.** A method has the path KL 0.0 on the other group. Does it leave everything without [V] as it was?
# <details><summary>Answer</summary>
#
# Not necessarily. The plain robots are another group, and have to be asked themselves. Only a construction
# can promise it for *every* text; lesson 7 has one.
# </details>
#
# **Next:** can a loss be written that asks for the concept *alone*? That is PureCC's objective, and lesson 6
# writes it. Does it then hold what it should hold? That is lesson 7.

# %% [markdown] tags=["slide"]
# ## Two questions
#
# 1. Four photographs from your kitchen: should the captions say "in a kitchen"?
# 2. The path KL on other texts is 0.0. Is everything without [V] as it was?

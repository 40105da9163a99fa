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
# # 1 · Rectified flow in two dimensions
#
# **Where the true velocity of a finite data set is known in closed form**
#
# A rectified flow turns noise into pictures by following a velocity that a network has learned. In this
# notebook a "picture" is a point in the plane and the data set is 36 points in the shape of a small robot.
# That is little enough for the *perfect* velocity to be written down, so that everything a network does can
# be compared with the truth.
#
# **When you are through, you have written** the path, the velocity and their inverse; the exact velocity of a
# data set; a sampler, its timestep shift, and a better sampler; a training loss; and guidance.
#
# **And you can say**
# 1. which way time runs, and why the velocity that a network learns is an average;
# 2. why following an average brings noise to data all the same;
# 3. what too few steps and the timestep shift do to a sample, and why training draws its times from the
# middle;
# 4. why the training loss does not go to zero, and at which number it stops;
# 5. what guidance gives, and what it costs.
#
# | | |
# |---|---|
# | Time | 30 minutes of reading, 90 with the exercises; about 20 s of computing on two CPU cores |
# | Needs | PyTorch; what a Gaussian is. Nothing before |
# | Keep open | [`tinyflow/flow.py`](../../tinyflow/flow.py), **after** you have tried: it is one screen long, and you are about to write most of it |
# | Read after | lesson 2, where the points become pictures |
#
# An exercise is a function whose body is blank, and the cell below it is its check. A blank exercise stops the
# notebook with one friendly line. Hints are folded; the solved notebook is in [`../solved`](../solved).
# One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 1 · Rectified flow in two dimensions
#
# From noise to data along a velocity that is learned, in a world so small that the perfect velocity is known.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import nn

from tinyflow import flow
from tinyflow.flow import noise_for
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close

def planes(count, reach=2.7, size=2.2, rows=1):               # square views of the plane
    shape = (size * count / rows, (size + 0.25) * rows)
    _, axes = plt.subplots(rows, count // rows, figsize=shape, layout="constrained")
    for axis in axes.flat:
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=GREY)
    return axes.ravel()

def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 1 · A straight path from data to noise
#
# One convention holds in this whole project: **t = 0 is data, t = 1 is noise.** (Much of the literature runs
# time the other way; check before you copy a formula.)
#
# Take a data point $x_0$ and an independent draw of noise $x_1 \sim \mathcal N(0, I)$, and join them by a
# straight line:
#
# $$x_t = (1 - t)\,x_0 + t\,x_1 \tag{Eq. 1}$$
#
# Along that line the velocity is the same at every moment:
#
# $$v = \frac{\mathrm d x_t}{\mathrm d t} = x_1 - x_0 \tag{Eq. 2}$$
#
# A network $v_\theta(x_t, t)$ sees where we are and how late it is, but not where we came from. It is trained
# to guess $v$:
#
# $$L = \mathbb E_{x_0,\,x_1,\,t}\,\lVert v_\theta(x_t, t) - v \rVert^2 \tag{Eq. 3}$$
#
# (`squared_error` in the package averages over the coordinates instead of adding them up, so for points in
# the plane it is half of the norm in Eq. 3. The minimum is in the same place.)
#
# One velocity is worth as much as both ends. Eq. 1 and 2 are two equations for $x_0$ and $x_1$: whoever knows
# $x_t$, $t$ and $v$ knows where the line began **and** where it ends. This is how a sampler can show, at any
# moment, which picture it is heading for.
#
# ### Exercise 1.1 ★ · The path, its velocity, and the way back
#
# `x_0`, `x_1`, `x_t` and `v` are `[B, D]` with one point a row, here with $D = 2$; `t` is `[B]`. Mind that
# `t` has to be given a second axis before it can be multiplied with a row of points.

# %% tags=["exercise"]
def path(x_0, x_1, t):
    # Eq. 1 -> x_t [B, D]
    # BEGIN SOLUTION 1.1
    t = t[:, None]                                                             # [B, 1]
    return (1 - t) * x_0 + t * x_1
    # END SOLUTION

def velocity_target(x_0, x_1):
    # Eq. 2 -> v [B, D]
    # BEGIN SOLUTION 1.1
    return x_1 - x_0
    # END SOLUTION

def ends(x_t, t, v):
    # solves Eq. 1 and 2 for both ends -> x_0 [B, D], x_1 [B, D]
    # BEGIN SOLUTION 1.1
    t = t[:, None]                                                             # [B, 1]
    return x_t - t * v, x_t + (1 - t) * v
    # END SOLUTION

# %% tags=["wrong"]
def path(x_0, x_1, t):                           # time runs the other way
    t = t[:, None]
    return t * x_0 + (1 - t) * x_1

def velocity_target(x_0, x_1):
    return x_0 - x_1

def ends(x_t, t, v):
    t = t[:, None]
    return x_t + (1 - t) * v, x_t - t * v

# %% tags=["wrong"]
def path(x_0, x_1, t):
    t = t[:, None]
    return (1 - t) * x_0 + t * x_1

def velocity_target(x_0, x_1):
    return x_1 - x_0

def ends(x_t, t, v):                             # forgets that some of the way is done
    t = t[:, None]
    return x_t - t * v, x_t + t * v

# %% [markdown]
# <details><summary>Hint</summary>
#
# From Eq. 2, $x_1 = x_0 + v$. Put it into Eq. 1: $x_t = x_0 + t\,v$. The other end is the rest of the way,
# $1 - t$, in the other direction.
# </details>

# %% tags=["check"]
random = seeded(0)
a, b, t = torch.randn(5, 2, generator=random), torch.randn(5, 2, generator=random), torch.linspace(0, 1, 5)
expect_close(path(a, b, torch.zeros(5)), a, "x_t at t = 0, where it is the data,")
expect_close(path(a, b, t), flow.path(a, b, t), "x_t")
expect_close(velocity_target(a, b), flow.velocity_target(a, b), "v")
back = ends(path(a, b, t), t, velocity_target(a, b))
expect(isinstance(back, tuple) and len(back) == 2, "ends returns two things, x_0 and x_1.")
expect_close(back[0], a, "x_0, from ends,")
expect_close(back[1], b, "x_1, from ends,")
print("1.1 right: path, velocity, and from one velocity both ends")

# %%
def circle(count):
    angle = 2 * torch.pi * torch.arange(count) / count
    return torch.stack([angle.sin(), angle.cos()], dim=-1)                     # [count, 2]

def robot():
    head = circle(20)
    head = head / head.pow(4).sum(-1, keepdim=True).pow(1 / 4)                 # [20, 2]: a circle made square
    eye = 0.34 * circle(8) + torch.tensor([0.0, 0.3])
    u = torch.linspace(-1, 1, 5)
    mouth = torch.stack([0.5 * u, 0.12 * u.square() - 0.55], dim=-1)
    antenna = torch.tensor([[0.0, 1.25], [0.0, 1.5], [0.0, 1.75]])
    points = torch.cat([head, eye, mouth, antenna])
    return 1.5 * (points - points.mean(0))                                     # [36, 2]

data = robot()
x_1 = noise_for(list(range(len(data))), (2,))                                  # [36, 2]: seed i gives noise i
times = [0, 0.25, 0.5, 0.75, 1]
for axis, t in zip(planes(5), times):
    x_t = path(data, x_1, torch.full((len(data),), float(t)))                  # [36, 2]  Eq. 1
    axis.plot(*torch.stack([data, x_1]).unbind(-1), color=GREY, lw=0.6, zorder=0)
    axis.scatter(*x_t.T, s=14, color=CORAL if t == 0 else INK, zorder=2)
    axis.set_title(f"t = {t}" + {0: "  data", 1: "  noise"}.get(t, ""))
print(f"{len(data)} points, standard deviation {data.std():.2f} (the noise has 1)")

# %% [markdown] tags=["slide"]
# ## A straight path from data to noise
#
# $$x_t = (1 - t)\,x_0 + t\,x_1, \qquad v = \frac{\mathrm d x_t}{\mathrm d t} = x_1 - x_0$$
#
# ![](last)
#
# **t = 0 is data, t = 1 is noise.** Training asks a network for $v$, and shows it $x_t$ and $t$ only:
# $\mathbb E\,\lVert v_\theta(x_t, t) - v \rVert^2$.

# %% [markdown]
# Every dot slides along its own line at constant speed. Two things are worth noticing. The lines **cross**:
# through one and the same place at one and the same time pass paths that go to different points. And nobody
# can know, standing at such a crossing, which line they are on. What, then, should a network answer there?
#
# ## 2 · The exact velocity
#
# Under a squared error the best answer is the average: the minimum of Eq. 3 is
# $v^*(x, t) = \mathbb E[v \mid x_t = x]$. For a data set $\{d_1, \dots, d_N\}$, each point equally likely,
# this average can be computed.
#
# **Where could we have come from?** If $x_0 = d_i$, Eq. 1 makes $x_t$ a Gaussian around a shrunken data
# point, $x_t \mid d_i \sim \mathcal N\big((1 - t)\,d_i,\; t^2 I\big)$. By Bayes' rule the probability that we
# started from $d_i$ is proportional to that density at $x$. Its normalising factor is the same for all $i$
# and cancels, so the posterior weights are a softmax:
#
# $$w_i(x, t) = \operatorname{softmax}_i\left(-\frac{\lVert x - (1 - t)\,d_i\rVert^2}{2\,t^2}\right), \qquad \mathbb E[x_0 \mid x_t = x] = \sum_i w_i\,d_i.$$
#
# **Which velocity does that imply?** Solve Eq. 1 for the noise, $x_1 = (x_t - (1 - t)\,x_0)/t$, and put it
# into Eq. 2:
#
# $$v = x_1 - x_0 = \frac{x_t - x_0}{t}, \qquad\text{so}\qquad v^*(x, t) = \frac{x - \mathbb E[x_0 \mid x_t = x]}{t}.$$
#
# That is all: *guess the data, and point away from it* (away, because time runs towards noise). The formula
# needs $t > 0$.
#
# The next two cells test the derivation, and show **how the weights sharpen** as one line is travelled from
# noise to data. For that it helps to divide by $1 - t$: the view
# $z = x_t / (1 - t) = x_0 + \frac{t}{1 - t}\,x_1$ is the data point itself plus noise of size
# $r = t / (1 - t)$, and the weights only ask how far each $d_i$ is from $z$, measured in units of $r$. In the
# figure the cross is $z$, the circle has radius $r$, and the area of each dot is its weight. The number of
# candidates is $\exp(\text{entropy of } w)$: 36 if all weights are equal, 1 if one point has all.

# ### Exercise 1.2 ★★ · The perfect velocity

# %% tags=["exercise"]
def posterior(x, t, data):
    # x [B, D], t [B], data [N, D] -> w [B, N], the probability of each data point
    # BEGIN SOLUTION 1.2
    t = t[:, None]                                                             # [B, 1]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)       # [B, N]
    return (-distance / (2 * t.square())).softmax(-1)
    # END SOLUTION

def exact_velocity(x, t, data):
    # -> v* [B, D]
    # BEGIN SOLUTION 1.2
    return (x - posterior(x, t, data) @ data) / t[:, None]
    # END SOLUTION

# %% tags=["wrong"]
def posterior(x, t, data):                       # the data are not shrunken
    t = t[:, None]
    distance = (x[:, None] - data).square().sum(-1)
    return (-distance / (2 * t.square())).softmax(-1)

def exact_velocity(x, t, data):
    return (x - posterior(x, t, data) @ data) / t[:, None]

# %% tags=["wrong"]
def posterior(x, t, data):
    t = t[:, None]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)
    return (-distance / (2 * t.square())).softmax(-1)

def exact_velocity(x, t, data):                  # points at the data, not away from it
    return (posterior(x, t, data) @ data - x) / t[:, None]

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x[:, None] - (1 - t)[:, None, None] * data` is $[B, N, D]$: every $x$ minus every shrunken data point.
# </details>
# <details><summary>Hint 2</summary>
#
# `w @ data` is the guess $\mathbb E[x_0 \mid x_t]$, $[B, D]$.
# </details>
#
# A derivation deserves a test that knows nothing of it. The check takes two million random lines, keeps those
# that pass close to one place at $t = 0.5$, and averages their velocities.

# %% tags=["check"]
random, count, here, t = seeded(0), 2_000_000, torch.tensor([0.4, 0.5]), 0.5
x_0 = data[torch.randint(len(data), (count,), generator=random)]               # [count, 2]
x_1 = torch.randn(count, 2, generator=random)                                  # [count, 2]
x_t = path(x_0, x_1, torch.full((count,), t))                                  # [count, 2]
near = (x_t - here).norm(dim=-1) < 0.06                                        # [count]
average = velocity_target(x_0, x_1)[near].mean(0)                              # [2]
w = posterior(here[None], torch.tensor([t]), data)
expect(w.shape == (1, len(data)), f"the weights of one place are [1, {len(data)}], not {list(w.shape)}.")
expect(abs(w.sum().item() - 1) < 1e-4, "the weights of one place have to add up to 1.")
exact = exact_velocity(here[None], torch.tensor([t]), data)[0]                 # [2]
expect((exact - average).norm() < (exact + average).norm(), "v points away from the data: check the sign.")
expect_close(exact, average, "v*, beside the average of the lines,", tolerance=0.08)
print(f"1.2 right. Average over {near.sum()} lines: ({average[0]:+.2f}, {average[1]:+.2f})")
print(f"           closed form:             ({exact[0]:+.2f}, {exact[1]:+.2f})")

def v_star(x, t):
    return exact_velocity(x, t, data)

# %%
start, noise = data[24], torch.tensor([0.8, -0.6])                             # [2]: of the eye
for axis, t in zip(planes(5), [0.7, 0.5, 0.3, 0.15, 0.05]):
    t_ = torch.tensor([t])
    x_t = path(start[None], noise[None], t_)                                   # [1, 2]
    w = posterior(x_t, t_, data)[0]                                            # [36]
    left = torch.special.entr(w).sum().exp()
    z, r = x_t[0] / (1 - t), t / (1 - t)
    axis.scatter(*data.T, s=5, color=GREY)
    axis.scatter(*data.T, s=200 * w, color=CORAL, alpha=0.8, lw=0)
    axis.add_patch(plt.Circle(z.tolist(), r, fill=False, color=BLUE, lw=1))
    axis.plot(*z, "+", color=BLUE, ms=8, mew=1.5)
    axis.set_title(f"t = {t}:  {left:.1f} candidates")

# %% [markdown] tags=["slide"]
# ## What should the network answer where lines cross?
#
# The average. It depends on which data points we could have come from:
#
# $$v^*(x, t) = \frac{x - \mathbb E[x_0 \mid x_t = x]}{t}$$
#
# ![](last)
#
# Coarse first, fine last.

# %% [markdown]
# At $t$ near 1 the weights are almost equal, and the guess is the mean of the whole data set. As $t$ falls
# the guess narrows: first to a side of the robot, then to a few neighbours, at last to one point of the eye.
# Coarse first, fine last: with pictures it will be the same.
#
# ### The velocity field
#
# The arrows show $-v^*$, because sampling goes from $t = 1$ **down** to 0 and so moves *against* the
# velocity. The grey dots are random $x_t$, to show where samples are at that time. Colour is speed; the
# length of an arrow follows it only up to 1.5, or the far corners would cover everything.

# %%
ticks = torch.linspace(-2.4, 2.4, 12)
grid = torch.cartesian_prod(ticks, ticks)                                      # [144, 2]
SPEED = LinearSegmentedColormap.from_list("speed", [GOLD, BLUE, INK])

def draw_field(axis, velocity, t):
    arrows = -velocity(grid, torch.full((len(grid),), t))                      # [144, 2]
    speed = arrows.norm(dim=-1, keepdim=True)                                  # [144, 1]
    arrows = 0.4 * arrows / speed * (speed / 1.5).clamp(max=1)
    return axis.quiver(*grid.T, *arrows.T, speed[:, 0], cmap=SPEED, clim=(0, 6), angles="xy",
                       scale_units="xy", scale=1, width=0.008, headwidth=4, headlength=4, minlength=0)

random = seeded(1)
x_0 = data[torch.randint(len(data), (500,), generator=random)]                 # [500, 2]
x_1 = torch.randn(500, 2, generator=random)                                    # [500, 2]
axes = planes(4, size=2.6)
for axis, t in zip(axes, [0.9, 0.6, 0.3, 0.1]):
    axis.scatter(*path(x_0, x_1, torch.full((500,), t)).T, s=3, color=GREY, alpha=0.6, lw=0)
    drawn = draw_field(axis, v_star, t)
    axis.scatter(*data.T, s=8, color=CORAL, zorder=3)
    axis.set_title(f"t = {t}")
plt.colorbar(drawn, ax=axes, label="speed", shrink=0.8, extend="max");

# %% [markdown] tags=["slide"]
# ## The velocity field
#
# ![](last)
#
# At $t = 0.9$ all arrows agree. At $t = 0.1$ every data point has a territory of its own.

# %% [markdown]
# At $t = 0.9$ all arrows agree on one target. At $t = 0.1$ every data point owns the places whose view $z$ is
# nearer to it than to any other, and sends the samples there its way.
#
# ## 3 · Sampling
#
# Start at noise and integrate $\mathrm dx/\mathrm dt = v^*(x, t)$ from $t = 1$ down to $t = 0$. Does this
# arrive at data, although $v^*$ is only an *average* of velocities? Yes, and the reason is one line. Let
# $p_t(x)$ be the density of $x_t$ under Eq. 1. Mass is not made or lost, it only moves; so the density at a
# place changes by what flows in minus what flows out. What flows is mass times velocity, summed over all the
# lines that pass, and that sum is the density times the **mean** velocity:
#
# $$\frac{\partial p_t(x)}{\partial t} = -\nabla\!\cdot\big(p_t(x)\,\mathbb E[v \mid x_t = x]\big) = -\nabla\!\cdot\big(p_t(x)\,v^*(x, t)\big).$$
#
# This is the *continuity equation*. It has no other velocity in it than the mean. So a crowd in which
# everybody walks with the local mean velocity has, at every moment, the same density as the crowd on its
# straight lines: the samples are spread exactly as the $x_t$ are. Only each one's journey is another.
#
# In one dimension it can be checked without any calculus by hand. The data are two numbers, $-1$ and $+1$, so
# $p_t$ is the mean of two Gaussians.

# %%
pair = torch.tensor([[-1.0], [1.0]])                                           # [2, 1]
x, dx, dt = torch.linspace(-4, 4, 1601, dtype=torch.float64), 0.005, 1e-4

def density(t):                                  # p_t at all x
    normal = torch.distributions.Normal((1 - t) * pair.double(), t)            # one for each data point
    return normal.log_prob(x).exp().mean(0)                                    # [1601]

def flux(t):                                     # p_t v* at all x
    times = torch.full((1601,), t, dtype=torch.float64)
    return density(t) * exact_velocity(x[:, None], times, pair.double())[:, 0]

figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.3), layout="constrained", sharex=True)
for axis, t in zip(axes, (0.8, 0.4, 0.2)):
    change = (density(t + dt) - density(t - dt)) / (2 * dt)                    # d p / dt
    outflow = (flux(t)[2:] - flux(t)[:-2]) / (2 * dx)                          # d (p v*) / dx
    axis.plot(x, density(t), color=GREY, label="$p_t$")
    axis.plot(x, change, color=BLUE, lw=3, alpha=0.5, label="$\\partial p_t / \\partial t$")
    axis.plot(x[1:-1], -outflow, color=CORAL, lw=1, label="$-\\partial (p_t v^*) / \\partial x$")
    apart = (change[1:-1] + outflow).abs().max()
    axis.set(title=f"t = {t}: the two agree to {apart:.0e}", xlim=(-3, 3), xlabel="x")
    assert torch.allclose(change[1:-1], -outflow, atol=2e-2)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
plt.show()

# %% [markdown] tags=["slide"]
# ## Why it is enough to follow the average
#
# Mass is not made or lost, it only moves, and what moves at a place is the density times the *mean* velocity:
#
# $$\frac{\partial p_t}{\partial t} = -\nabla\cdot(p_t\,v^*)$$
#
# ![](last)
#
# A crowd that walks with the mean velocity has the density of the crowd on straight lines, at every $t$.

# %% [markdown]
# The blue line and the coral one lie on each other: the mean velocity accounts for every change of the
# density.
#
# ### Exercise 1.3 ★ · Euler's method
#
# Cut the time from 1 to 0 into equal pieces. In each one, ask for the velocity where you are and go straight
# along it: $x \leftarrow x + (t_\text{next} - t)\,v(x, t)$. The function hands out `(t_next, x)` after each
# step with `yield`, so that whoever wants the last one only can take it, and whoever wants the whole journey
# can have that.

# %% tags=["exercise"]
def euler(velocity, x, times):
    # velocity(x, t) with x [B, D] and t [B]; times: a list of numbers such as [1, 0.5, 0]
    for t, t_next in zip(times, times[1:]):
        # BEGIN SOLUTION 1.3
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t))           # [B, D]
        yield t_next, x
        # END SOLUTION

# %% tags=["wrong"]
def euler(velocity, x, times):                   # the step has the wrong sign
    for t, t_next in zip(times, times[1:]):
        x = x + (t - t_next) * velocity(x, torch.full((len(x),), t))
        yield t_next, x

# %% tags=["wrong"]
def euler(velocity, x, times):                   # asks for the velocity at the end of the step
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t_next))
        yield t_next, x

# %% tags=["check"]
def even(steps):
    return torch.linspace(1, 0, steps + 1).tolist()

def ramp(x, t):                                  # a velocity that needs care: it depends on both
    return x * t[:, None] + 1

start = noise_for([0, 1, 2], (2,))
mine, ours = list(euler(ramp, start, even(4))), list(flow.euler(ramp, start, 4))
expect(len(mine) == 4, f"4 steps should hand out 4 states, not {len(mine)}.")
expect([round(t, 4) for t, _ in mine] == [0.75, 0.5, 0.25, 0.0], "hand out t_next, the time after the step.")
for (_, a), (t, b) in zip(mine, ours):
    expect_close(a, b, f"x at t = {t:g}")
print("1.3 right: the same states as the package's sampler")

# %% [markdown]
# What is new: an ODE has **one** velocity at each place and time, so its trajectories cannot meet. In one
# dimension, with time as the second axis, this is plain to see. The data are the two numbers once more.

# %%
def trajectory(velocity, x, times):
    with torch.no_grad():
        return torch.stack([x] + [x for _, x in euler(velocity, x, times)])    # [steps + 1, B, D]

x_1 = noise_for(list(range(16)), (1,))                                         # [16, 1]
x_0 = pair[torch.randint(2, (16,), generator=seeded(2))]                       # [16, 1]
curves = trajectory(lambda x, t: exact_velocity(x, t, pair), x_1, even(200))    # [201, 16, 1]

_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.6), sharey=True, layout="constrained")
left.plot([1, 0], torch.stack([x_1, x_0])[..., 0], color=GREY, lw=1)
left.set_title("training: straight lines that cross")
right.plot(torch.linspace(1, 0, 201), curves[..., 0], color=BLUE, lw=1)
right.set_title("sampling: curves that never meet")
for axis in (left, right):
    axis.scatter([0, 0], pair, color=CORAL, s=25, zorder=3)
    axis.scatter(torch.ones(16), x_1, color=INK, s=8, zorder=3)
    axis.set(xlim=(1.03, -0.04), xlabel="t  (noise on the left, data on the right)")
left.set_ylabel("x");

# %% [markdown] tags=["slide"]
# ## Lines that cross, curves that never meet
#
# ![](last)
#
# An ODE has one velocity at each place and time. The journeys differ; the crowd is the same.

# %% [markdown]
# Now the robot. (Drawn in the plane, without the time axis, two curves may seem to cross: they were there at
# different times.)
#
# One fact makes the number of steps easy to reason about. An Euler step from $t$ **all the way to 0** gives
# $x - t\,v^*(x, t) = \mathbb E[x_0 \mid x_t = x]$: it jumps to the current guess. So a *single* step, from
# $t = 1$, sends every sample to the mean of the data. And whatever the number of steps, the last one ends on
# the guess made at the last $t > 0$, sharp or not.

# %%
x_1 = noise_for(list(range(400)), (2,))                                        # [400, 2]
truth = trajectory(v_star, x_1, even(400))[-1]                                 # [400, 2]: as good as exact

axes = planes(6, size=2.4, rows=2)
fine = trajectory(v_star, x_1[:50], even(200))                                 # [201, 50, 2]
axes[0].plot(*fine.unbind(-1), color=BLUE, lw=0.7, alpha=0.7)
axes[0].scatter(*fine[0].T, s=4, color=INK)
axes[0].scatter(*data.T, s=9, color=CORAL, zorder=3)
axes[0].set_title("50 trajectories, 200 steps")

print("steps   distance to the true end (median)   arrived (within 0.05)")
for axis, steps in zip(axes[1:], [1, 2, 4, 8, 28]):
    end = trajectory(v_star, x_1, even(steps))[-1]                                   # [400, 2]
    error = (end - truth).norm(dim=-1)                                         # [400]
    print(f"{steps:5d} {error.median():35.3f} {(error < 0.05).float().mean():23.0%}")
    axis.scatter(*data.T, s=9, color=CORAL, alpha=0.5, lw=0)
    axis.scatter(*end.T, s=5, color=INK, lw=0)
    axis.set_title(f"{steps} step" + "s" * (steps > 1))
one = trajectory(v_star, x_1, even(1))[-1]                                     # [400, 2]
assert torch.allclose(one, data.mean(0).expand(400, 2), atol=1e-4)             # one step: the mean

# %% [markdown] tags=["slide"]
# ## Euler's method
#
# ![](last)
#
# A single step from $t = 1$ jumps to the mean of the data. The last step always ends on the last guess.

# %% [markdown]
# Two and four steps end on blurred guesses, eight draw a robot, and with 28 nearly every sample is at the
# very *data point* where endless small steps would have put it. That should make you pause: the perfect
# answer to Eq. 3 can do nothing but recite its training set! A network that draws a robot nobody has shown it
# is, in this strict sense, making a useful mistake.
#
# ### The timestep shift
#
# Equal pieces of time are one choice among many. The *timestep shift* multiplies the noise size
# $r = t / (1 - t)$ of section 2 by a number $s$:
#
# $$\frac{t'}{1 - t'} = s\,\frac{t}{1 - t}.$$
#
# ### Exercise 1.4 ★ · Shifted times
#
# Solve this for $t'$. (It should be a fraction that has a value at $t = 0$ and at $t = 1$ as well.)

# %% tags=["exercise"]
def shift_times(t, s):
    # t [...] in [0, 1] -> t' [...]
    # BEGIN SOLUTION 1.4
    return s * t / (1 + (s - 1) * t)
    # END SOLUTION

# %% tags=["wrong"]
def shift_times(t, s):
    return s * t / (1 - t) / (1 + s * t / (1 - t))

# %% tags=["wrong"]
def shift_times(t, s):
    return t / (s + (1 - s) * t)

# %% [markdown]
# <details><summary>Hint</summary>
#
# From $r' = t'/(1 - t')$ follows $t' = r'/(1 + r')$. Put in $r' = s\,t/(1 - t)$ and multiply above and below
# by $1 - t$.
# </details>

# %% tags=["check"]
t = torch.linspace(0, 1, 11)
shifted = shift_times(t, 3.0)
expect(shifted.isfinite().all().item(), "a division by zero at t = 1: multiply above and below by 1 - t.")
expect(shifted[5] > 0.5, "a shift above 1 makes more noise, so t' is larger than t.")
expect_close(shifted, flow.shift_times(t, 3.0), "t'")
print("1.4 right:", *shifted.numpy().round(2))

# %% [markdown]
# With $s > 1$ more of the steps are spent near the noise. Is that good? Below, 8 steps with three shifts on
# our robot; then the reason why larger pictures want a larger $s$.
#
# Take each coordinate $k$ times over, as a picture enlarged $\sqrt k$ times per side repeats each pixel $k$
# times. The $k$ noisy copies can be averaged, which divides the noise by $\sqrt k$. So the big picture at
# $r' = \sqrt k\,r$ is as hard to make out as the small one at $r$: **the same moment of its life lies at the
# time shifted by $s = \sqrt k$**. The last lines check this, exactly.

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.2), layout="constrained", width_ratios=[1.6, 1])
line = torch.linspace(1, 0, 50)                                                # [50]
for row, (shift, colour) in enumerate([(1 / 3, GOLD), (1.0, INK), (3.0, BLUE)]):
    times = shift_times(torch.tensor(even(8)), shift).tolist()
    error = (trajectory(v_star, x_1, times)[-1] - truth).norm(dim=-1)          # [400]
    print(f"8 steps, shift {shift:.2f}: distance to the true end {error.median():.3f} (median), "
          f"arrived {(error < 0.05).float().mean():.0%}")
    left.plot(shift_times(torch.linspace(1, 0, 9), shift), [row] * 9, "o-", color=colour, ms=4, lw=0.7)
    right.plot(line, shift_times(line, shift), color=colour)
left.set(xlim=(1.03, -0.03), ylim=(-0.6, 2.6), yticks=[0, 1, 2], xlabel="t", title="the times of 8 steps",
         yticklabels=["s = 0.33", "s = 1.00", "s = 3.00"])
right.set(xlabel="t", ylabel="shifted t", aspect="equal", xticks=[0, 1], yticks=[0, 1])

k, t = 9, torch.rand(400, generator=seeded(3))                                 # [400]
t_big = shift_times(t, k ** 0.5)                                               # [400]: s = 3
big = data.repeat(1, k)                                                        # [36, 18]: x y x y ...
picked = torch.randint(len(big), (400,), generator=seeded(4))                  # [400]
x_big = path(big[picked], torch.randn(400, 2 * k, generator=seeded(5)), t_big)  # [400, 18]
z = (x_big / (1 - t_big[:, None])).view(400, k, 2).mean(1)                     # [400, 2]: average the copies
same = torch.allclose(posterior(x_big, t_big, big), posterior((1 - t[:, None]) * z, t, data), atol=1e-4)
print(f"\n{k} copies of each coordinate at the shifted time have the weights of one at the plain time:", same)
assert same

# %% [markdown] tags=["slide"]
# ## The timestep shift
#
# $$\frac{t'}{1 - t'} = s\,\frac{t}{1 - t}$$
#
# ![](last)
#
# A picture with $k$ times as many pixels gives itself away at $\sqrt k$ times the noise. Larger pictures want
# a larger $s$.

# %% [markdown]
# For two coordinates, $s = 3$ is plainly wrong: the last step starts at $t = 0.3$, when the guess is still a
# blur, and hardly anybody arrives. Of these, $s = 1/3$ samples best here. A large picture is the other way
# round. Its many pixels give its contents away while every single one is still mostly noise, so its decisions
# fall near $t = 1$, and that is where the steps should be. SD3.5 uses 3, and so does the project's tiny
# model, whose pictures are 4,096 latent numbers: with $s = 1$ its words were hardly learned.
#
# ## 4 · Learning the velocity
#
# Now forget the closed form and learn. One step of training is what Eq. 1 to 3 say: take data, noise and
# times, form $x_t$, and regress on $v$.
#
# **Which times?** At $t$ near 1 the best guess of the data is simply their mean, and at $t$ near 0 it is
# simply $x_t$. There is a rule that does both and needs no network, the best *linear* guess: what the guess
# would be if the data were a Gaussian with the same mean (here 0) and covariance $\Sigma$,
#
# $$\hat x_0 = (1 - t)\,\Sigma\,\big((1 - t)^2\,\Sigma + t^2 I\big)^{-1} x_t .$$
#
# What a network has to *learn* is how the true guess differs from this one. The next cell measures it for our
# robot: the difference is small at both ends, and largest in between. So training draws most of its times
# there, with the sigmoid of a normal number (a *logit-normal* time), and the shift moves the hill to where
# the data want it. For two coordinates that is 1/2; for large pictures, above 1.

# %%
def sample_times(count, shift, random):
    return shift_times(torch.sigmoid(torch.randn(count, generator=random)), shift)  # [count], in (0, 1)

moments, gain, spread = torch.linspace(0.02, 0.98, 49), [], data.T.cov(correction=0)
for t in moments:
    x_0 = data[torch.randint(len(data), (2000,), generator=seeded(8))]         # [2000, 2]
    t_ = t.expand(2000)
    x_t = path(x_0, torch.randn(2000, 2, generator=seeded(9)), t_)
    guess = posterior(x_t, t_, data) @ data                                    # [2000, 2]: E[x_0 | x_t]
    linear = (1 - t) * x_t @ torch.linalg.solve((1 - t) ** 2 * spread + t ** 2 * torch.eye(2), spread)
    gain.append((guess - linear).norm(dim=-1).mean())
gain = torch.stack(gain)
plt.figure(figsize=(5.6, 2.3), layout="constrained")
plt.hist(sample_times(100_000, 0.5, seeded(0)), bins=80, density=True, color=GREY, alpha=0.5,
         label="how often training draws t, shift 1/2")
plt.plot(moments, gain / gain.mean(), color=CORAL, label="how far the guess is from the linear one")
plt.gca().set(xlabel="t", yticks=[], xlim=(0, 1))
plt.legend(fontsize=8)
plt.show()
peak = moments[gain.argmax()]
print(f"most has to be learned at t = {peak:.2f}")
assert 0.2 < peak < 0.6 and gain[0] < 0.3 * gain.max() and gain[-1] < 0.3 * gain.max()

# %% [markdown] tags=["slide"]
# ## Which times should training draw?
#
# ![](last)
#
# Near both ends a linear rule knows the answer. What has to be learned lies in between: logit-normal times.

# %% [markdown]
# The network is three linear layers. Beside $x$ and $t$ it is given sines and cosines of $x$, without which
# it would be slow to learn sharp edges.
#
# ### Exercise 1.5 ★★ · One step's loss
#
# Write Eq. 3 as code, as a mean over batch *and* coordinates. Everything that is random comes as an argument.

# %% tags=["exercise"]
def flow_loss(velocity, x_0, x_1, t):
    # velocity(x, t) -> [B, D]; x_0, x_1 [B, D], t [B] -> a number
    # BEGIN SOLUTION 1.5
    prediction = velocity(path(x_0, x_1, t), t)                                # [B, D]
    return (prediction - velocity_target(x_0, x_1)).square().mean()            # Eq. 3
    # END SOLUTION

# %% tags=["wrong"]
def flow_loss(velocity, x_0, x_1, t):            # compares with the data, as if the network predicted x_0
    return (velocity(path(x_0, x_1, t), t) - x_0).square().mean()

# %% tags=["wrong"]
def flow_loss(velocity, x_0, x_1, t):            # shows the network the data itself
    return (velocity(x_0, t) - velocity_target(x_0, x_1)).square().mean()

# %% tags=["check"]
random = seeded(1)
a, b = torch.randn(64, 2, generator=random), torch.randn(64, 2, generator=random)
t = torch.rand(64, generator=random)
ours = flow.squared_error(ramp(flow.path(a, b, t), t), flow.velocity_target(a, b))
expect_close(flow_loss(ramp, a, b, t), ours, "the loss")
perfect = flow_loss(lambda x, t: b - a, a, b, t)
expect(perfect < 1e-10, "a network that knew v would have the loss 0.")
print(f"1.5 right: {ours:.4f} for a velocity that has learned nothing, 0 for one that knew v")

# %%
torch.manual_seed(0)                    # nn.Linear takes its first weights from the global generator
layers = nn.Sequential(nn.Linear(19, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

def model(x, t):                                                               # x [B, 2], t [B]
    waves = (x[..., None] * torch.tensor([1, 2, 4, 8])).flatten(1)             # [B, 8]
    return layers(torch.cat([x, t[:, None], waves.sin(), waves.cos()], dim=-1))  # [B, 2]

def draw(count, random):
    x_0 = data[torch.randint(len(data), (count,), generator=random)]           # [count, 2]
    return x_0, torch.randn(count, 2, generator=random), sample_times(count, 0.5, random)

random, steps, history = seeded(6), 3000, []
optimizer = torch.optim.Adam(layers.parameters(), lr=0.015)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for step in range(steps):
    loss = flow_loss(model, *draw(256, random))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append(loss.item())
print("loss, mean of every 500 steps:", *torch.tensor(history).view(-1, 500).mean(-1).numpy().round(2))

# %% [markdown]
# The loss stops far above zero. Is the network too small, or the training too short? Here the truth can be
# asked. Even $v^*$ misses: at a crossing it answers the average, while each traveller goes one way or the
# other. What is left over is the spread of the possible $x_0$ around the guess,
#
# $$\mathbb E\,\lVert v^* - v\rVert^2 = \mathbb E\left[\tfrac{1}{t^2}\textstyle\sum_i w_i\,\lVert d_i - \mathbb E[x_0 \mid x_t]\rVert^2\right],$$
#
# and no network can go below it. For any other velocity the loss is this minimum **plus** the distance to
# $v^*$ (the mixed term averages out, because $v^*$ is the conditional mean):
#
# $$\mathbb E\,\lVert v_\theta - v\rVert^2 = \mathbb E\,\lVert v^* - v\rVert^2 + \mathbb E\,\lVert v_\theta - v^*\rVert^2 .$$
#
# The first cell below measures all three terms on the same draws (with `squared_error`, so per coordinate),
# and shows at which times the floor is high. The second compares the fields and the samples.

# %%
with torch.no_grad():
    x_0, x_1, t = draw(200_000, seeded(7))                                     # the same draws for both
    x_t, v = path(x_0, x_1, t), velocity_target(x_0, x_1)                      # [200000, 2] each
    learned, best = model(x_t, t), v_star(x_t, t)                              # [200000, 2] each
floor = flow.squared_error(best, v)
print(f"loss of the network    {flow.squared_error(learned, v):.4f}")
print(f"loss of v*             {floor:.4f}   the irreducible minimum")
print(f"difference             {flow.squared_error(learned, v) - floor:.4f}")
direct = flow.squared_error(learned, best)
print(f"network against v*     {direct:.4f}   the same, measured directly, up to chance")
assert floor < flow.squared_error(learned, v) < 1.1 * floor
assert abs(flow.squared_error(learned, v) - floor - direct) < 0.005

order = t.argsort()                                                            # 50 groups of 4,000 draws

def by_time(a, b):
    return (a - b).square().mean(-1)[order].view(50, -1).mean(-1)              # [50]

moments = t[order].view(50, -1).mean(-1)                                       # [50]
_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.5), layout="constrained")
smooth = torch.tensor(history).view(-1, 50).mean(-1)
left.plot(torch.arange(25, steps, 50), smooth, color=BLUE, label="training loss")
left.axhline(floor, color=CORAL, ls="--", label="loss of v*")
left.set(xlabel="step", ylabel="loss (Eq. 3)", ylim=(floor * 0.95, floor * 1.2))
right.plot(moments, by_time(learned, v), color=BLUE, label="network")
right.plot(moments, by_time(best, v), color=CORAL, ls="--", label="v*")
right.set(xlabel="t", ylabel="loss at time t", ylim=(0, None))
left.legend(), right.legend();

# %% [markdown] tags=["slide"]
# ## The loss does not go to zero
#
# $$\mathbb E\,\lVert v_\theta - v\rVert^2 = \mathbb E\,\lVert v^* - v\rVert^2 + \mathbb E\,\lVert v_\theta - v^*\rVert^2$$
#
# ![](last)
#
# The first part is a floor that no network can go below. Only the second part is the network's.

# %%
axes = planes(4, size=2.6)
for axis, (velocity, name) in zip(axes[:2], [(v_star, "exact"), (model, "learned")]):
    with torch.no_grad():
        draw_field(axis, velocity, 0.15)
    axis.scatter(*data.T, s=6, color=CORAL, zorder=3)
    axis.set_title(f"{name} field at t = 0.15")
for axis, (velocity, name) in zip(axes[2:], [(v_star, "exact"), (model, "learned")]):
    x_1 = noise_for(list(range(400)), (2,))
    end = trajectory(velocity, x_1, even(28))[-1]                              # [400, 2], from the same noise
    axis.scatter(*data.T, s=12, color=CORAL, lw=0)
    axis.scatter(*end.T, s=4, color=INK, lw=0)
    axis.set_title(f"{name}: 400 samples")
    nearest = torch.cdist(end, data).min(-1).values                            # [400]
    print(f"{name:8s} samples: {nearest.mean():.3f} to the nearest data point (mean)")

# %% [markdown]
# So the loss curve of a flow model has to be read against a floor that one usually does not know, and a
# hardly visible drop may be all the drop there is. (The curve dips below the line now and then, because each
# of its points averages only 50 small batches.) What the network still misses sits at small $t$, where the
# decisions are sharp, and the samples show it: the same robot, drawn with a softer pencil. The fields differ
# most in the corners, where hardly an $x_t$ ever comes and nobody has asked the network anything.
#
# ## 5 · What the model believes on the way
#
# Any velocity is a guess of the data: $x_0 = x_t - t\,v$, the first thing that your `ends` returns. Along a
# trajectory it shows what the model believes so far. With $v^*$ it is $\mathbb E[x_0 \mid x_t]$ itself: not a
# *likely* point, but the *average* of the likely points. For pictures, an average is a blur.

# %%
chosen = noise_for([11, 235, 59], (2,))                                        # [3, 2]
way = trajectory(v_star, chosen, even(100))                                    # [101, 3, 2]
times, belief, blur = torch.linspace(1, 0, 101)[:100], [], []                  # times [100]: all t > 0
for x, t in zip(way, times):
    belief.append(ends(x, t.expand(3), v_star(x, t.expand(3)))[0])             # [3, 2]
    squares = torch.cdist(belief[-1], data).square()                           # [3, 36]
    blur.append((posterior(x, t.expand(3), data) * squares).sum(-1).sqrt())    # [3]
belief, blur = torch.stack(belief), torch.stack(blur)                          # [100, 3, 2], [100, 3]
_, axes = plt.subplots(1, 3, figsize=(8.6, 2.8), layout="constrained")
for axis, lines in zip(axes, [way, belief]):
    axis.scatter(*data.T, s=9, color=GREY)
    for b, colour in enumerate([CORAL, BLUE, GOLD]):
        axis.plot(*lines[:, b].T, color=colour, lw=1.2)
        axis.scatter(*lines[::10, b].T, color=colour, s=10)
        axis.plot(*lines[0, b], "o", color=colour, mfc="white", ms=6)
        axes[2].plot(times, blur[:, b], color=colour)
    axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=GREY)
axes[0].set_title("where the sample is: $x_t$")
axes[1].set_title("what it believes: predicted $x_0$")
axes[2].set(xlim=(1, 0), xlabel="t", ylim=(0, None), title="how blurred the belief is")
for i in (0, 50, 70, 90):
    to_go = [((a[i] - way[-1]).norm(dim=-1) / (a[0] - way[-1]).norm(dim=-1)).mean() for a in (way, belief)]
    print(f"t = {times[i]:.1f}: blur {blur[i].mean():.2f}; still to go, of the whole distance: "
          f"sample {to_go[0]:.0%}, belief {to_go[1]:.0%}")

# %% [markdown] tags=["slide"]
# ## What the model believes on the way
#
# ![](last)
#
# $x_0 = x_t - t\,v$ is not a likely point but the *average* of the likely points. For pictures, an average is
# a blur.

# %% [markdown]
# The open circles are the starts. All three beliefs begin at the same place, the mean of the robot, and each
# wanders to its own point; a shelf at 0.2 in the last panel means that two neighbours, 0.4 apart, are still
# in the running. Half-way, at $t = 0.5$, the belief has most of its way behind it while the sample has hardly
# left its start (the numbers are above): this is why previews of a running sampler show the predicted $x_0$
# and not $x_t$.
#
# ## 6 · Guidance
#
# A text-to-image model is asked for *something*. Let the points have two classes, two hearts that overlap,
# and let the "text" $y$ be the class. Then $v^*(x, t \mid y)$ is the exact velocity of that class alone, and
# the velocity for the empty text, $v^*(x, t \mid \varnothing)$, is that of all points together.
# **Classifier-free guidance** extrapolates from one through the other:
#
# $$v_g = v_\varnothing + g\,(v_y - v_\varnothing) = \frac{x - \big(\mathbb E_\varnothing + g\,(\mathbb E_y - \mathbb E_\varnothing)\big)}{t}.$$
#
# So $g = 0$ ignores the text, $g = 1$ is the plain conditional flow, and $g > 1$ aims *beyond* the guess for
# the class, away from the guess for everything. The difference $v_y - v_\varnothing$ is
# $-\frac{t}{1 - t}\,\nabla_x \log p(y \mid x_t)$: sampling, which moves against it, climbs the probability
# that a classifier would see $y$ in $x_t$. Hence the name.
#
# ### Exercise 1.6 ★ · Guidance

# %% tags=["exercise"]
def guide(v_null, v_text, g):
    # BEGIN SOLUTION 1.6
    return v_null + g * (v_text - v_null)
    # END SOLUTION

# %% tags=["wrong"]
def guide(v_null, v_text, g):                    # a guidance of 1 should change nothing
    return v_text + g * (v_text - v_null)

# %% tags=["wrong"]
def guide(v_null, v_text, g):
    return v_text + g * (v_null - v_text)

# %% tags=["check"]
a, b = noise_for([0, 1], (2,)), noise_for([2, 3], (2,))
expect_close(guide(a, b, 0.0), a, "guidance 0, which ignores the text,")
expect_close(guide(a, b, 1.0), b, "guidance 1, which is the plain prediction for the text,")
expect_close(guide(a, b, 3.0), flow.guide(a, b, 3.0), "guidance 3")
print("1.6 right")

# %% [markdown]
# In the figure the points of our class are blue, the others grey; the area of the coral dots is the share of
# samples that land there.

# %%
def heart(centre, count=30):
    a = 2 * torch.pi * torch.arange(count) / count
    y = 13 * a.cos() - 5 * (2 * a).cos() - 2 * (3 * a).cos() - (4 * a).cos()
    return torch.stack([16 * a.sin() ** 3, y + 2], dim=-1) / 14 + torch.tensor([centre, 0.0])  # [count, 2]

mine, other = heart(-0.55), heart(0.55)                                        # y = mine
both = torch.cat([mine, other])                                                # [60, 2]
x_1 = noise_for(list(range(500)), (2,))                                        # [500, 2]

def guided(guidance):
    def velocity(x, t):
        return guide(exact_velocity(x, t, both), exact_velocity(x, t, mine), guidance)
    return velocity

print("guidance   distinct points in use   within 0.25 of the other heart   distance to the data (mean)")
for axis, guidance in zip(planes(4, reach=2.0, size=2.5), [0, 1, 2, 5]):
    end = trajectory(guided(guidance), x_1, even(50))[-1]                      # [500, 2]
    nearest, landed = torch.cdist(end, both).min(-1)                           # [500], [500]
    use = torch.bincount(landed, minlength=60) / 500                           # [60]
    close = (torch.cdist(end, other).min(-1).values < 0.25).float().mean()
    print(f"{guidance:8d} {torch.special.entr(use).sum().exp():24.1f} {close:32.0%} {nearest.mean():29.3f}")
    axis.scatter(*other.T, s=8, color=GREY)
    axis.scatter(*mine.T, s=8, color=BLUE)
    axis.scatter(*both.T, s=1000 * use, color=CORAL, alpha=0.6, lw=0)
    axis.set_title(f"guidance {guidance}")

# %% [markdown] tags=["slide"]
# ## Guidance
#
# $$v_g = v_\varnothing + g\,(v_y - v_\varnothing)$$
#
# ![](last)
#
# Surer samples, and fewer kinds of them. The difference $v_y - v_\varnothing$ will be a *representation of a
# concept* in lesson 6.

# %% [markdown]
# With $g = 1$ all 30 points of our heart are used equally, as they should be. Many of them lie on or near the
# other heart, and there is nothing wrong with that: they are true members of the class. But they *could be
# taken* for the other. Guidance gives them up, and more of them the higher it is: samples move away from the
# other class, to the side where there can be no doubt. Surer, and less varied; that is the trade, and at
# $g = 5$ no longer the distribution we asked for. (The samples still land *on* data: near $t = 0$ one point
# holds all the weight, both guesses agree on it, and nothing is left to extrapolate. An imperfect network can
# be pushed off its data as well, which is what a picture with burnt colours shows.)
#
# ## 7 · A better sampler
#
# How good is a sampler? It needs a flow whose true end is known without any stepping. Gaussian data
# $x_0 \sim \mathcal N(0, s^2 I)$ have one: $v^*(x, t) = x\,\frac{t - (1 - t)\,s^2}{(1 - t)^2 s^2 + t^2}$, and
# its trajectories bring every $x_1$ to exactly $s\,x_1$.
#
# ### Exercise 1.7 ★ · The order of a method
#
# If twice the steps divide the error by 2, a method is called of *first order*; if they divide it by 4, of
# *second order*. Write the function that measures it, with $s = 1/2$: the norm of (end minus truth) with
# `steps` steps, divided by that with `2 * steps` steps.

# %% tags=["exercise"]
def gaussian(x, t, s=0.5):                                                     # v* for data N(0, s^2 I)
    return x * ((t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2))[:, None]  # [B, D]

def error_ratio(method, x_1, steps):
    # method: used like euler(velocity, x, times)
    # BEGIN SOLUTION 1.7
    errors = [(list(method(gaussian, x_1, even(n)))[-1][1] - 0.5 * x_1).norm() for n in (steps, 2 * steps)]
    return errors[0] / errors[1]
    # END SOLUTION

# %% tags=["wrong"]
def error_ratio(method, x_1, steps):             # compares with the start
    errors = [(list(method(gaussian, x_1, even(n)))[-1][1] - x_1).norm() for n in (steps, 2 * steps)]
    return errors[0] / errors[1]

# %% [markdown]
# <details><summary>Hint</summary>
#
# `list(method(gaussian, x_1, even(steps)))[-1][1]` is the end: the `x` of the last pair. The truth is
# `0.5 * x_1`.
# </details>

# %% tags=["check"]
x_1 = noise_for([0, 1, 2, 3], (2,))                                            # [4, 2]
def exactly(velocity, x, times):                 # a "method" whose error is known: 1 / steps^3
    yield 0.0, 0.5 * x + 1 / (len(times) - 1) ** 3
ratio = torch.as_tensor(error_ratio(exactly, x_1, 4))
expect_close(ratio, torch.tensor(8.0), "the ratio of a method of third order", tolerance=1e-3)
print(f"1.7 right. Euler, 16 and 32 steps: the error is divided by {error_ratio(euler, x_1, 16):.2f}")
assert 1.9 < error_ratio(euler, x_1, 16) < 2.3

# %% [markdown]
# Euler uses the velocity at the *start* of each step, as if the road were straight. Heun's method looks
# ahead: make the Euler step, ask for the velocity where it ended, and go back to make the step with the mean
# of the two,
#
# $$\tilde x = x + h\,v(x, t), \qquad x_{\text{next}} = x + \tfrac h2\,\big(v(x, t) + v(\tilde x, t_{\text{next}})\big), \qquad h = t_{\text{next}} - t < 0 .$$
#
# ### Exercise 1.8 ★★★ · Heun's method
#
# Write it. One trap: what is $v^*$ at $t_{\text{next}} = 0$? Make the step that ends there a plain Euler
# step.

# %% tags=["exercise"]
def heun(velocity, x, times):
    # like euler: yields (t_next, x) after each step
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, torch.full((len(x),), t))                              # [B, D]
        # BEGIN SOLUTION 1.8
        ahead = x + (t_next - t) * v                                           # [B, D]: the Euler step
        if t_next > 0:
            v_next = velocity(ahead, torch.full((len(x),), t_next))            # [B, D]
            ahead = x + (t_next - t) * (v + v_next) / 2
        x = ahead
        yield t_next, x
        # END SOLUTION

# %% tags=["wrong"]
def heun(velocity, x, times):                    # divides by t = 0 in the last step
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, torch.full((len(x),), t))
        ahead = x + (t_next - t) * v
        v_next = velocity(ahead, torch.full((len(x),), t_next))
        x = x + (t_next - t) * (v + v_next) / 2
        yield t_next, x

# %% tags=["wrong"]
def heun(velocity, x, times):                    # goes on from where the Euler step ended
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, torch.full((len(x),), t))
        x = x + (t_next - t) * v
        if t_next > 0:
            v_next = velocity(x, torch.full((len(x),), t_next))
            x = x + (t_next - t) * (v_next - v)
        yield t_next, x

# %% tags=["check"]
steps = list(heun(gaussian, x_1, [1.0, 0.5, 0.0]))
expect([t for t, _ in steps] == [0.5, 0.0], "yield (t_next, x) once after each step, down to t_next = 0.")
v = gaussian(x_1, torch.ones(4))                                               # [4, 2]: one Heun step by hand
first = x_1 - 0.25 * (v + gaussian(x_1 - 0.5 * v, torch.full((4,), 0.5)))      # [4, 2]
expect_close(steps[0][1], first, "the step from t = 1 to 0.5")
end = list(heun(v_star, x_1, even(28)))[-1][1]                                 # [4, 2]
expect(end.isfinite().all().item(), "v* has no value at t = 0: make the last step an Euler step.")
ratio = error_ratio(heun, x_1, 16)
expect(ratio > 3, f"twice the steps divide the error by {ratio:.1f}, Heun's by about 4.")
print(f"1.8 right. Heun, 16 and 32 steps: the error is divided by {ratio:.2f}")

# %%
x_1 = noise_for(list(range(400)), (2,))                                        # [400, 2]
truth = list(heun(v_star, x_1, even(200)))[-1][1]                           # [400, 2]
cost = [4, 8, 16, 32, 64, 128]                                                 # velocities a sample
_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.5), layout="constrained")
for method, each, colour, name in [(euler, 1, INK, "Euler"), (heun, 2, CORAL, "Heun")]:
    ends = [list(method(gaussian, x_1, even(n // each)))[-1][1] for n in cost]
    error = [(end - 0.5 * x_1).norm(dim=-1).mean() for end in ends]
    left.loglog(cost, error, "o-", ms=4, color=colour, label=name)
    error = [(list(method(v_star, x_1, even(n // each)))[-1][1] - truth).norm(dim=-1).mean() for n in cost]
    print(f"{name:5s} on the robot: " + "   ".join(f"{n}: {e:.3f}" for n, e in zip(cost, error)))
    right.semilogx(cost, error, "o-", ms=4, color=colour, label=name)
left.set(title="Gaussian data", ylabel="mean distance to the true end")
right.set(title="the robot", ylim=(0, None))
for axis in (left, right):
    axis.set(xlabel="velocities a sample", xticks=cost, xticklabels=cost)
    axis.minorticks_off()
    axis.legend()

# %% [markdown] tags=["slide"]
# ## A better sampler: Heun
#
# ![](last)
#
# The order of a method says how its error shrinks when the steps are small, and nothing about large ones.

# %% [markdown]
# On the left the textbook: twice the velocities halve Euler's error and quarter Heun's. On the right the
# robot: with 4 velocities the two are equally poor, and from 16 on Heun is clearly ahead. The order of a
# method says how its error shrinks when the steps are *small*; while one step is longer than the time in
# which a sample takes a decision, it says nothing. This project samples with Euler and 28 steps: simple, and
# as many steps as the paper takes.
#
# ## What you can now say
#
# - Time runs from data, $t = 0$, to noise, $t = 1$. The path is a straight line (Eq. 1), its velocity
# $x_1 - x_0$ (Eq. 2), and the model regresses on it (Eq. 3).
# - The best possible velocity is a conditional mean: $v^* = (x - \mathbb E[x_0 \mid x_t])/t$. For a finite
# data set the guess is a softmax over its points, coarse at large $t$ and sharp at small $t$.
# - Following the mean velocity carries noise to data. Few steps end on blurred guesses; the shift decides
# where the steps are spent.
# - The loss has a floor, the spread of what cannot be known at $x_t$. Only the distance to the floor is the
# model's.
# - Guidance follows $v_y - v_\varnothing$ further than the data ask: surer samples, fewer kinds of them.
#
# | you wrote | in the package, [`tinyflow/flow.py`](../../tinyflow/flow.py) |
# |---|---|
# | `path`, `velocity_target`, `ends` | `path` (Eq. 1), `velocity_target` (Eq. 2) |
# | `flow_loss` | `squared_error` (Eq. 3), with `sample_times` |
# | `euler`, `shift_times`, `guide` | `euler`, `shift_times`, `guide` |
# | `exact_velocity`, `heun` | not there: only a toy knows $v^*$, and Euler with 28 steps is what the paper uses |
#
# Keep the difference $v_y - v_\varnothing$ in mind: the method that this project is about (Eq. 8) calls it
# the representation of a concept and builds on it.
#
# ## Three questions
#
# **1.** A network has the training loss 0.9, and its loss falls no further. Is it bad?
# <details><summary>Answer</summary>
#
# Nobody can say from this number. The loss is the floor $\mathbb E\,\lVert v^* - v\rVert^2$ plus the distance
# to $v^*$, and only the second part is the network's. Section 4 measured a network that is nearly perfect
# although its loss is far above zero.
# </details>
#
# **2.** You take a single Euler step, from $t = 1$ to 0, with the perfect velocity. What do all samples look
# like?
# <details><summary>Answer</summary>
#
# All the same: the mean of the data. At $t = 1$ the state says nothing about the data, so the guess is the
# mean, and a step all the way to 0 jumps to the guess.
# </details>
#
# **3.** The lines of training cross, and the curves of sampling never do. How can both have the same density
# at every $t$?
# <details><summary>Answer</summary>
#
# The density changes by what flows through each place, and that is the density times the *mean* velocity
# there (the continuity equation). Who goes where does not matter to it.
# </details>
#
# **Next:** lesson 2 puts pictures, words and a transformer in the place of points, classes and three layers.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. A network has the training loss 0.9, and it falls no further. Is it bad?
# 2. A single Euler step from $t = 1$ to 0, with the perfect velocity. What do all samples look like?
# 3. The lines of training cross, and the curves of sampling never do. How can both have the same density?

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
# A rectified flow turns noise into pictures by following a velocity that a network has learned. Here a
# "picture" is a point in the plane, and the data set is 36 points in the shape of a small robot. That is so
# little that the *perfect* velocity can be written down, and a network can be compared with it.
#
# | | |
# |---|---|
# | Needs | PyTorch; Gaussians, Bayes' rule |
# | Optional | sections 5 and 7; nothing later needs them |
# | Keep open | [`tinyflow/flow.py`](../../tinyflow/flow.py), **after** you have tried: you write most of it |
#
# An exercise is a function whose body is blank; the cell below it checks what you write. Hints are folded.
# The solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

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
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, rule_out, several

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
# time the other way.)
#
# Join a data point $x_0$ and an independent draw of noise $x_1 \sim \mathcal N(0,I)$ by a straight line.
# Along it the velocity is the same at every moment:
#
# $$x_t = (1-t)\,x_0+t\,x_1 \tag{Eq. 1}$$
#
# $$v = \frac{\mathrm d x_t}{\mathrm d t} = x_1-x_0$$
#
# A network $v_\theta(x_t,t)$ sees where we are and how late it is, but not where we came from. It is trained
# to guess $v$:
#
# $$L = \mathbb E_{x_0,x_1,t}\,\lVert v_\theta(x_t,t)-v\rVert^2 \tag{Eq. 2}$$
#
# Whoever knows $x_t$, $t$ and $v$ knows **both** ends of the line, since Eq. 1 and $v=x_1-x_0$ are two
# equations for $x_0$ and $x_1$. So a sampler can show which picture it is heading for.
#
# ### Exercise 1.1 ★ · The path, its velocity, and the way back
#
# `x_0`, `x_1`, `x_t` and `v` are `[B, D]`, one point a row, here with $D=2$. `t` is `[B]` and needs a second
# axis before it can be multiplied with rows of points.

# %% tags=["exercise"]
def path(x_0, x_1, t):
    # Eq. 1 -> x_t [B, D]
    # BEGIN SOLUTION 1.1
    t = t[:, None]                                                             # [B, 1]
    return (1 - t) * x_0 + t * x_1
    # END SOLUTION

def velocity_target(x_0, x_1):
    # the target of Eq. 2 -> v [B, D]
    # BEGIN SOLUTION 1.1
    return x_1 - x_0
    # END SOLUTION

def ends(x_t, t, v):
    # solves Eq. 1 and v = x_1 - x_0 for both ends -> x_0 [B, D], x_1 [B, D]
    # BEGIN SOLUTION 1.1
    t = t[:, None]                                                             # [B, 1]
    return x_t - t * v, x_t + (1 - t) * v
    # END SOLUTION

# %% tags=["wrong"]
# says: time runs the other way
def path(x_0, x_1, t):
    t = t[:, None]
    return t * x_0 + (1 - t) * x_1

def velocity_target(x_0, x_1):
    return x_0 - x_1

def ends(x_t, t, v):
    t = t[:, None]
    return x_t + (1 - t) * v, x_t - t * v

# %% tags=["wrong"]
# says: noise minus data
def path(x_0, x_1, t):
    t = t[:, None]
    return (1 - t) * x_0 + t * x_1

def velocity_target(x_0, x_1):
    return x_0 - x_1

def ends(x_t, t, v):
    t = t[:, None]
    return x_t - t * v, x_t + (1 - t) * v

# %% tags=["wrong"]
# says: x_0 first
def path(x_0, x_1, t):
    t = t[:, None]
    return (1 - t) * x_0 + t * x_1

def velocity_target(x_0, x_1):
    return x_1 - x_0

def ends(x_t, t, v):
    t = t[:, None]
    return x_t + (1 - t) * v, x_t - t * v

# %% tags=["wrong"]
# says: the rest of the way
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
# $v=x_1-x_0$ gives $x_1=x_0+v$. Put it into Eq. 1: $x_t=x_0+t\,v$. The other end is the rest of the way,
# $1-t$, in the other direction.
# </details>

# %% tags=["check"]
random = seeded(0)
a, b, t = torch.randn(5, 2, generator=random), torch.randn(5, 2, generator=random), torch.linspace(0, 1, 5)
rule_out(path(a, b, t), {"path: time runs the other way. t = 0 is data.": flow.path(b, a, t)})
expect_close(path(a, b, t), flow.path(a, b, t), "x_t")
rule_out(velocity_target(a, b), {"v is noise minus data: yours has the other sign.": a - b})
expect_close(velocity_target(a, b), b - a, "v")
back = ends(path(a, b, t), t, velocity_target(a, b))
several(back, ("x_0", "x_1"))
rule_out(back[0], {"ends returns x_0 first, then x_1.": b})
expect_close(back[0], a, "x_0, from ends,")
rule_out(back[1], {"x_1: the rest of the way is 1 - t, not t.": path(a, b, t) + t[:, None] * (b - a)})
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
# ![A drawing made of points at t = 0, the same points ever more mixed with noise at later t, and noise at t
# = 1](last)
#
# **t = 0 is data, t = 1 is noise.** Training asks a network for $v$, and shows it $x_t$ and $t$ only:
# $\mathbb E\,\lVert v_\theta(x_t, t) - v \rVert^2$.

# %% [markdown]
# Every dot slides along its own line at constant speed. But the lines **cross**. Nobody who stands at a
# crossing can know which line they are on. What, then, should a network answer?
#
# ## 2 · The exact velocity
#
# Under a squared error the best answer is the average, $v^*(x,t) = \mathbb E[v \mid x_t=x]$. For a data set
# $\{d_1,\dots,d_N\}$, each point equally likely, this average can be computed.
#
# **Where could we have come from?** If $x_0=d_i$, Eq. 1 makes $x_t$ a Gaussian around a shrunken data point,
# $x_t \mid d_i \sim \mathcal N\big((1-t)\,d_i,\,t^2 I\big)$. By Bayes' rule the probability that we started
# from $d_i$ is proportional to that density at $x$. The normalising factor is the same for all $i$ and
# cancels, so the posterior weights are a softmax:
#
# $$w_i(x,t) = \operatorname{softmax}_i\left(-\frac{\lVert x-(1-t)\,d_i\rVert^2}{2\,t^2}\right), \qquad \mathbb E[x_0\mid x_t=x] = \sum_i w_i\,d_i.$$
#
# **Which velocity does that imply?** Solve Eq. 1 for the noise and put it into $v=x_1-x_0$:
#
# $$v = x_1-x_0 = \frac{x_t-x_0}{t}, \qquad\text{so}\qquad v^*(x,t) = \frac{x-\mathbb E[x_0\mid x_t=x]}{t}.$$
#
# That is all: *guess the data, and point away from it* (time runs towards noise).
#
# The figure after the exercise shows **how the weights sharpen** along one line from noise to data. The cross
# is $z=x_t/(1-t)$, the data point plus noise of size $r=t/(1-t)$, the radius of the circle. The area of a dot
# is its weight. The number of candidates is $\exp(\text{entropy of }w)$: 36 if all weights are equal, 1 if
# one point has all.

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
# says: shrunken by 1 - t
def posterior(x, t, data):
    t = t[:, None]
    distance = (x[:, None] - data).square().sum(-1)
    return (-distance / (2 * t.square())).softmax(-1)

def exact_velocity(x, t, data):
    return (x - posterior(x, t, data) @ data) / t[:, None]

# %% tags=["wrong"]
# says: 2 t^2
def posterior(x, t, data):
    t = t[:, None]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)
    return (-distance / t.square()).softmax(-1)

def exact_velocity(x, t, data):
    return (x - posterior(x, t, data) @ data) / t[:, None]

# %% tags=["wrong"]
# says: minus sign
def posterior(x, t, data):
    t = t[:, None]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)
    return (distance / (2 * t.square())).softmax(-1)

def exact_velocity(x, t, data):
    return (x - posterior(x, t, data) @ data) / t[:, None]

# %% tags=["wrong"]
# says: divide by t
def posterior(x, t, data):
    t = t[:, None]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)
    return (-distance / (2 * t.square())).softmax(-1)

def exact_velocity(x, t, data):
    return x - posterior(x, t, data) @ data

# %% tags=["wrong"]
# says: away from the data
def posterior(x, t, data):
    t = t[:, None]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)
    return (-distance / (2 * t.square())).softmax(-1)

def exact_velocity(x, t, data):
    return (posterior(x, t, data) @ data - x) / t[:, None]

# %% tags=["wrong"]
# says: add up to 1
def posterior(x, t, data):                       # the softmax over the places, not over the data
    t = t[:, None]
    distance = (x[:, None] - (1 - t)[..., None] * data).square().sum(-1)
    return (-distance / (2 * t.square())).softmax(0)

def exact_velocity(x, t, data):
    return (x - posterior(x, t, data) @ data) / t[:, None]

# %% [markdown]
# <details><summary>Hint</summary>
#
# `x[:, None] - (1 - t)[:, None, None] * data` is $[B,N,D]$: every $x$ minus every shrunken data point. Later,
# `w @ data` is the guess $\mathbb E[x_0\mid x_t]$, $[B,D]$.
# </details>
#
# The check averages the velocities of random lines that pass close to one place.

# %% tags=["check"]
random, count, here, t = seeded(0), 2_000_000, torch.tensor([0.4, 0.5]), 0.5
places = torch.stack([here, -here, 2 * here])                                  # [3, 2]
late = torch.tensor([t, 0.8, 0.3])                                             # [3]
w = posterior(places, late, data)
expect(isinstance(w, torch.Tensor) and w.shape == (3, 36), "three places and 36 points have weights [3, 36].")
expect(torch.allclose(w.sum(-1), torch.ones(3)), "the weights of one place have to add up to 1.")
scores = torch.distributions.Normal((1 - late[:, None, None]) * data, late[:, None, None])
scores = scores.log_prob(places[:, None]).sum(-1)                              # [3, 36]: log p(x_t | d_i)
plain = -torch.cdist(places, data).square() / (2 * late[:, None] ** 2)
rule_out(w, {"the data have to be shrunken by 1 - t.": plain.softmax(-1),
             "the squared distance is divided by 2 t^2.": (2 * scores).softmax(-1),
             "a far point gets the largest weight: the minus sign is missing.": (-scores).softmax(-1)})
expect_close(w, scores.softmax(-1), "the weights")

x_0 = data[torch.randint(len(data), (count,), generator=random)]               # [count, 2]
x_1 = torch.randn(count, 2, generator=random)                                  # [count, 2]
x_t = path(x_0, x_1, torch.full((count,), t))                                  # [count, 2]
near = (x_t - here).norm(dim=-1) < 0.06                                        # [count]
average = velocity_target(x_0, x_1)[near].mean(0)                              # [2]
v = exact_velocity(places, late, data)                                         # [3, 2]
rule_out(v, {"v* points away from the data: check the sign.": (w @ data - places) / late[:, None],
             "v*: divide by t.": places - w @ data})
expect_close(v[0], average, "v*, compared with the average of the lines,", tolerance=0.08)
print(f"1.2 right. Average over {near.sum()} lines: ({average[0]:+.2f}, {average[1]:+.2f})")
print(f"           closed form:             ({v[0, 0]:+.2f}, {v[0, 1]:+.2f})")

def v_star(x, t):
    return exact_velocity(x, t, data)

# %%
start, noise, candidates = data[24], torch.tensor([0.8, -0.6]), []             # [2]: of the eye
for axis, t in zip(planes(5), [0.7, 0.5, 0.3, 0.15, 0.05]):
    t_ = torch.tensor([t])
    x_t = path(start[None], noise[None], t_)                                   # [1, 2]
    w = posterior(x_t, t_, data)[0]                                            # [36]
    candidates.append(torch.special.entr(w).sum().exp())
    z, r = x_t[0] / (1 - t), t / (1 - t)
    axis.scatter(*data.T, s=5, color=GREY)
    axis.scatter(*data.T, s=200 * w, color=CORAL, alpha=0.8, lw=0)
    axis.add_patch(plt.Circle(z.tolist(), r, fill=False, color=BLUE, lw=1))
    axis.plot(*z, "+", color=BLUE, ms=8, mew=1.5)
    axis.set_title(f"t = {t}:  {candidates[-1]:.1f} candidates")
assert candidates == sorted(candidates, reverse=True) and candidates[0] > 30 and candidates[-1] < 1.1

# %% [markdown] tags=["slide"]
# ## What should the network answer where lines cross?
#
# The average. It depends on which data points we could have come from:
#
# $$v^*(x, t) = \frac{x - \mathbb E[x_0 \mid x_t = x]}{t}$$
#
# ![The data points that a place could have come from: about 33 at t = 0.7, a single one at t = 0.05](last)
#
# Coarse first, fine last.

# %% [markdown]
# At $t=0.7$ almost every point is still a candidate. As $t$ falls the guess narrows to a few neighbours, at
# last to one point of the eye. Coarse first, fine last: with pictures it will be the same.
#
# ### The velocity field
#
# The arrows show $-v^*$, because sampling goes from $t=1$ **down** to 0 and so moves *against* the velocity.
# The grey dots are random $x_t$.

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
    t_ = torch.full((500,), t)
    x_t = path(x_0, x_1, t_)                                                   # [500, 2]
    guess = x_t - t * v_star(x_t, t_)                                          # [500, 2]: E[x_0 | x_t]
    nearest = data[torch.cdist(x_t / (1 - t), data).argmin(-1)]                # [500, 2]: to the view z
    from_mean = (guess - data.mean(0)).norm(dim=-1).mean()
    from_nearest = (guess - nearest).norm(dim=-1).median()
    print(f"t = {t}: the guess is {from_mean:.2f} from the mean of the data (mean), "
          f"{from_nearest:.2f} from the point nearest to z (median)")
    assert t != 0.9 or from_mean < 0.3
    axis.scatter(*x_t.T, s=3, color=GREY, alpha=0.6, lw=0)
    drawn = draw_field(axis, v_star, t)
    axis.scatter(*data.T, s=8, color=CORAL, zorder=3)
    axis.set_title(f"t = {t}")
assert from_nearest < 0.05                                                     # at t = 0.1
plt.colorbar(drawn, ax=axes, label="speed", shrink=0.8, extend="max");

# %% [markdown] tags=["slide"]
# ## The velocity field
#
# ![Arrows of the velocity in the plane, at several times between noise and data](last)
#
# At $t = 0.9$ nearly all samples have one target. At $t = 0.1$ every data point has a territory of its own.

# %% [markdown]
# At $t=0.9$ all samples aim at almost the same place, the mean. At $t=0.1$ every data point owns the places
# whose $z$ it is nearest to, and draws the samples there to itself.
#
# ## 3 · Sampling
#
# Start at noise and integrate $\mathrm dx/\mathrm dt = v^*(x,t)$ from $t=1$ down to $t=0$. Does this arrive
# at data, although $v^*$ is only an *average*? Yes. Let $p_t(x)$ be the density of $x_t$ under Eq. 1. At each
# place it changes by what flows in minus what flows out. What flows through a place, summed over all lines
# that pass, is the density times the **mean** velocity:
#
# $$\frac{\partial p_t(x)}{\partial t} = -\nabla\!\cdot\big(p_t(x)\,\mathbb E[v\mid x_t=x]\big) = -\nabla\!\cdot\big(p_t(x)\,v^*(x,t)\big).$$
#
# So a crowd in which everybody walks with the local mean velocity has, at every moment, the density of the
# crowd on its straight lines. Only each one's journey is another.
#
# This *continuity equation* can be checked in one dimension. The data are two numbers, $-1$ and $+1$, so
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
    axis.plot(x, density(t), color=CORAL, ls=":", label="$p_t$")
    axis.plot(x, change, color=BLUE, lw=3, alpha=0.5, label="$\\partial p_t / \\partial t$")
    axis.plot(x[1:-1], -outflow, color=INK, lw=1, ls="--", label="$-\\partial (p_t v^*) / \\partial x$")
    apart = (change[1:-1] + outflow).abs().max()
    axis.set(title=f"t = {t}: the two agree to {apart:.0e}", xlim=(-3, 3), xlabel="x")
    assert apart < 0.01 * change.abs().max()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
plt.show()

# %% [markdown] tags=["slide"]
# ## Why it is enough to follow the average
#
# Mass is not made or lost, it only moves, and what moves at a place is the density times the *mean* velocity:
#
# $$\frac{\partial p_t}{\partial t} = -\nabla\cdot(p_t\,v^*)$$
#
# ![At three times the density, how it changes, and what the mean velocity carries: the last two
# agree](last)
#
# A crowd that walks with the mean velocity has the density of the crowd on straight lines, at every $t$.

# %% [markdown]
# The broken line lies on the thick one: the mean velocity accounts for every change of the density.
#
# ### Exercise 1.3 ★ · Euler's method
#
# Cut the time from 1 to 0 into pieces. In each one, ask for the velocity where you are and go straight along
# it: $x \leftarrow x + (t_\text{next}-t)\,v(x,t)$. Hand out `(t_next, x)` after each step with `yield`.

# %% tags=["exercise"]
def euler(velocity, x, times):
    # velocity(x, t) with x [B, D] and t [B]; times: a list of numbers such as [1, 0.5, 0]
    for t, t_next in zip(times, times[1:]):
        # BEGIN SOLUTION 1.3
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t))           # [B, D]
        yield t_next, x
        # END SOLUTION

# %% tags=["wrong"]
# says: away from the data
def euler(velocity, x, times):
    for t, t_next in zip(times, times[1:]):
        x = x + (t - t_next) * velocity(x, torch.full((len(x),), t))
        yield t_next, x

# %% tags=["wrong"]
# says: every step began at the noise
def euler(velocity, x, times):
    for t, t_next in zip(times, times[1:]):
        yield t_next, x + (t_next - t) * velocity(x, torch.full((len(x),), t))

# %% tags=["wrong"]
# says: writes into the caller's noise
def euler(velocity, x, times):
    for t, t_next in zip(times, times[1:]):
        x += (t_next - t) * velocity(x, torch.full((len(x),), t))
        yield t_next, x

# %% tags=["wrong"]
# says: t_next, the time after the step
def euler(velocity, x, times):
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t))
        yield t, x

# %% tags=["wrong"]
# says: at the beginning of the step
def euler(velocity, x, times):
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t_next))
        yield t_next, x

# %% tags=["check"]
def even(steps):
    return torch.linspace(1, 0, steps + 1).tolist()

def ramp(x, t):                                  # a velocity that needs care: it depends on both
    return x * t[:, None] + 1

start = noise_for([0, 1, 2], (2,))
mine, ours = list(euler(ramp, start.clone(), even(4))), list(flow.euler(ramp, start, 4))
expect(len(mine) == 4, f"4 steps should hand out 4 states, not {len(mine)}.")
expect([round(t, 4) for t, _ in mine] == [0.75, 0.5, 0.25, 0.0], "hand out t_next, the time after the step.")
late = start - 0.25 * ramp(start, torch.full((3,), 0.75))                      # [3, 2]
rule_out(mine[0][1], {"your step goes away from the data: t_next - t is negative.": 2 * start - ours[0][1],
                      "ask for the velocity at the beginning of the step.": late,
                      "x += writes into the caller's noise: write x = x + ...": mine[3][1]})
rule_out(mine[1][1], {"every step began at the noise: go on from where the last one ended.": late})
for (_, a), (t, b) in zip(mine, ours):
    expect_close(a, b, f"x at t = {t:g}")
print("1.3 right: the same states as the package's sampler")

# %% [markdown]
# An ODE has **one** velocity at each place and time, so its trajectories cannot meet. With time as the second
# axis this is plain to see, for the two numbers once more.

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
left.set_ylabel("x")
from_above = x_1[:, 0].argsort(descending=True)                                # [16]
assert (curves[:200, from_above, 0].diff(dim=1) < 0).all()                     # their order never changes
assert (x_0[from_above, 0].diff() > 0).any()                                   # and the lines' order does

# %% [markdown] tags=["slide"]
# ## Lines that cross, curves that never meet
#
# ![On the left the straight lines of training, which cross; on the right the curves of sampling, which do
# not](last)
#
# An ODE has one velocity at each place and time. The journeys differ; the crowd is the same.

# %% [markdown]
# Now the robot. (In the plane, without the time axis, two curves may seem to cross: they were there at
# different times.)
#
# An Euler step from $t$ **all the way to 0** gives $x-t\,v^*(x,t) = \mathbb E[x_0\mid x_t=x]$: it jumps to
# the current guess. So a *single* step, from $t=1$, sends every sample to the mean of the data. And whatever
# the number of steps, the last one ends on the guess made at the last $t>0$, sharp or not.

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
arrived = {}
for axis, steps in zip(axes[1:], [1, 2, 4, 8, 28]):
    end = trajectory(v_star, x_1, even(steps))[-1]                                   # [400, 2]
    error = (end - truth).norm(dim=-1)                                         # [400]
    arrived[steps] = (error < 0.05).float().mean()
    print(f"{steps:5d} {error.median():35.3f} {arrived[steps]:23.0%}")
    axis.scatter(*data.T, s=9, color=CORAL, alpha=0.5, lw=0)
    axis.scatter(*end.T, s=5, color=INK, lw=0)
    axis.set_title(f"{steps} step" + "s" * (steps > 1))
one = trajectory(v_star, x_1, even(1))[-1]                                     # [400, 2]
assert torch.allclose(one, data.mean(0).expand(400, 2), atol=1e-4)             # one step: the mean
assert arrived[4] < 0.1 < 0.25 < arrived[8] < 0.5 and arrived[28] > 0.85

# %% [markdown] tags=["slide"]
# ## Euler's method
#
# ![Samples of Euler's method with 1, 2, 4, 8 and 28 steps: from the mean of the data to its points](last)
#
# A single step from $t = 1$ jumps to the mean of the data. The last step always ends on the last guess.

# %% [markdown]
# Two and four steps end on blurred guesses. With eight the robot can be made out, and with 28 steps nine of
# ten samples are at the very *data point* where tiny steps would have put them. So the perfect answer to Eq.
# 2 can do nothing but recite its training set! A network that draws a robot nobody has shown it is making a
# useful mistake.
#
# ### The timestep shift
#
# Equal pieces of time are one choice among many. The *timestep shift* multiplies the noise size
# $r=t/(1-t)$ by a number $s$:
#
# $$\frac{t'}{1-t'} = s\,\frac{t}{1-t}.$$
#
# ### Exercise 1.4 ★ · Shifted times
#
# Solve this for $t'$, as a fraction that has a value at $t=1$ as well.

# %% tags=["exercise"]
def shift_times(t, s):
    # t [...] in [0, 1] -> t' [...]
    # BEGIN SOLUTION 1.4
    return s * t / (1 + (s - 1) * t)
    # END SOLUTION

# %% tags=["wrong"]
# says: division by zero
def shift_times(t, s):
    return s * t / (1 - t) / (1 + s * t / (1 - t))

# %% tags=["wrong"]
# says: that is r', not t'
def shift_times(t, s):
    return s * t / (1 - t + 1e-9)

# %% tags=["wrong"]
# says: the way back
def shift_times(t, s):
    return t / (s + (1 - s) * t)

# %% tags=["wrong"]
# says: out of [0, 1]
def shift_times(t, s):
    return s * t

# %% [markdown]
# <details><summary>Hint</summary>
#
# From $r'=t'/(1-t')$ follows $t'=r'/(1+r')$. Put in $r'=s\,t/(1-t)$ and multiply above and below by $1-t$.
# </details>

# %% tags=["check"]
t = torch.linspace(0, 1, 11)
shifted = shift_times(t, 3.0)
rule_out(shifted, {"s t alone goes out of [0, 1].": 3 * t,
                   "this is the way back, from t' to t: s has to make t larger.": t / (3 - 2 * t)})
if isinstance(shifted, torch.Tensor):
    expect(shifted.isfinite().all().item(), "a division by zero at t = 1: multiply above and below by 1 - t.")
    rule_out(shifted[:-1], {"that is r', not t': t' = r' / (1 + r').": (3 * t / (1 - t))[:-1]})
expect_close(shifted, flow.shift_times(t, 3.0), "t'")
print("1.4 right:", *shifted.numpy().round(2))

# %% [markdown]
# With $s>1$ more of the steps are spent near the noise. Below are 8 steps with three shifts on our robot, and
# then the reason why larger pictures want a larger $s$. Repeat each coordinate $k$ times, as an enlarged
# picture repeats its pixels. The $k$ noisy copies can be averaged, which divides the noise by $\sqrt k$. So
# the big picture at $r'=\sqrt k\,r$ is as hard to make out as the small one at $r$: **the same moment of its
# life lies at the time shifted by $s=\sqrt k$**. The last lines check this exactly.

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.2), layout="constrained", width_ratios=[1.6, 1])
line = torch.linspace(1, 0, 50)                                                # [50]
for row, (shift, colour, style) in enumerate([(1 / 3, GOLD, "^--"), (1.0, INK, "o-"), (3.0, BLUE, "s:")]):
    times = shift_times(torch.tensor(even(8)), shift).tolist()
    error = (trajectory(v_star, x_1, times)[-1] - truth).norm(dim=-1)          # [400]
    arrived[shift] = (error < 0.05).float().mean()
    print(f"8 steps, shift {shift:.2f}: distance to the true end {error.median():.3f} (median), "
          f"arrived {arrived[shift]:.0%}; the last step begins at t = {times[-2]:.2f}")
    left.plot(shift_times(torch.linspace(1, 0, 9), shift), [row] * 9, style, color=colour, ms=4, lw=0.7)
    right.plot(line, shift_times(line, shift), style[1:], color=colour)
assert arrived[1 / 3] > arrived[1.0] + 0.1 and arrived[3.0] < 0.1
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
# ![The times of eight steps for three shifts, and the shifted time over the time](last)
#
# A picture with $k$ times as many pixels gives itself away at $\sqrt k$ times the noise. Larger pictures want
# a larger $s$.

# %% [markdown]
# For two coordinates, $s=3$ is plainly wrong: the last step begins when the guess is still a blur, and hardly
# anybody arrives. A large picture gives its contents away while every single pixel is still mostly noise, so
# its decisions fall near $t=1$. SD3.5 uses 3, and so does this project's tiny model.
#
# ## 4 · Learning the velocity
#
# Now forget the closed form and learn: take data, noise and times, form $x_t$, and regress on $v$.
#
# **Which times?** At $t$ near 1 the best guess of the data is their mean, and near 0 it is $x_t$. The best
# *linear* guess does both, and needs no network. The next cell measures how far the true guess is from it:
# little at both ends, most in between. So training draws most of its times there, as the
# sigmoid of a normal number (a *logit-normal* time), and the shift moves the hill to where the data want it.

# %%
def training_times(count, shift, random):
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
plt.hist(training_times(100_000, 0.5, seeded(0)), bins=80, density=True, color=GREY, alpha=0.5,
         label="how often training draws t, shift 1/2")
plt.plot(moments, gain / gain.mean(), color=CORAL, label="how far the guess is from the linear one")
plt.gca().set(xlabel="t", yticks=[], xlim=(0, 1))
plt.legend()
plt.show()
peak = moments[gain.argmax()]
print(f"most has to be learned at t = {peak:.2f}")
assert 0.2 < peak < 0.6 and gain[0] < 0.3 * gain.max() and gain[-1] < 0.3 * gain.max()

# %% [markdown] tags=["slide"]
# ## Which times should training draw?
#
# ![How often each time is drawn, and how far the perfect guess is from a linear one](last)
#
# Near both ends a linear rule knows the answer. What has to be learned lies in between: logit-normal times.

# %% [markdown]
# ### Exercise 1.5 ★★ · One step's loss
#
# Write Eq. 2 as a mean over batch *and* coordinates. Everything that is random comes as an argument.

# %% tags=["exercise"]
def flow_loss(velocity, x_0, x_1, t):
    # velocity(x, t) -> [B, D]; x_0, x_1 [B, D], t [B] -> a number
    # BEGIN SOLUTION 1.5
    prediction = velocity(path(x_0, x_1, t), t)                                # [B, D]
    return (prediction - velocity_target(x_0, x_1)).square().mean()            # Eq. 2
    # END SOLUTION

# %% tags=["wrong"]
# says: compare with v, not with the data
def flow_loss(velocity, x_0, x_1, t):            # as if the network predicted x_0
    return (velocity(path(x_0, x_1, t), t) - x_0).square().mean()

# %% tags=["wrong"]
# says: a mean, not a sum
def flow_loss(velocity, x_0, x_1, t):
    return (velocity(path(x_0, x_1, t), t) - velocity_target(x_0, x_1)).square().sum()

# %% tags=["wrong"]
# says: over the coordinates, too
def flow_loss(velocity, x_0, x_1, t):
    return (velocity(path(x_0, x_1, t), t) - velocity_target(x_0, x_1)).square().sum(-1).mean()

# %% tags=["wrong"]
# says: sees x_t, not the data
def flow_loss(velocity, x_0, x_1, t):
    return (velocity(x_0, t) - velocity_target(x_0, x_1)).square().mean()

# %% tags=["wrong"]
# says: no gradient
def flow_loss(velocity, x_0, x_1, t):
    with torch.no_grad():
        return (velocity(path(x_0, x_1, t), t) - velocity_target(x_0, x_1)).square().mean()

# %% tags=["wrong"]
# says: square the difference
def flow_loss(velocity, x_0, x_1, t):
    return (velocity(path(x_0, x_1, t), t) - velocity_target(x_0, x_1)).mean()

# %% tags=["check"]
random = seeded(1)
a, b = torch.randn(64, 2, generator=random), torch.randn(64, 2, generator=random)
t = torch.rand(64, generator=random)
off = ramp(flow.path(a, b, t), t) - (b - a)                                    # [64, 2]
loss = flow_loss(ramp, a, b, t)
rule_out(loss, {"compare with v, not with the data.": (off + b - 2 * a).square().mean(),
                "the network sees x_t, not the data.": (ramp(a, t) - b + a).square().mean(),
                "a mean, not a sum.": off.square().sum(),
                "a mean over the coordinates, too, not their sum.": off.square().sum(-1).mean(),
                "square the difference before you take the mean.": off.mean()})
expect_close(loss, flow.squared_error(ramp(flow.path(a, b, t), t), flow.velocity_target(a, b)), "the loss")
weight = torch.ones(1, requires_grad=True)
taught = flow_loss(lambda x, t: weight * ramp(x, t), a, b, t)
expect(taught.requires_grad, "no gradient would reach a network: neither no_grad, detach nor item in a loss.")
perfect = flow_loss(lambda x, t: b - a, a, b, t)
expect(perfect < 1e-10, "a network that knew v would have the loss 0.")
print(f"1.5 right: {loss:.4f} for a velocity that has learned nothing, 0 for one that knew v")

# %%
torch.manual_seed(0)                    # nn.Linear takes its first weights from the global generator
layers = nn.Sequential(nn.Linear(19, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

def model(x, t):                                                               # x [B, 2], t [B]
    waves = (x[..., None] * torch.tensor([1, 2, 4, 8])).flatten(1)             # [B, 8]
    return layers(torch.cat([x, t[:, None], waves.sin(), waves.cos()], dim=-1))  # [B, 2]

def draw(count, random):
    x_0 = data[torch.randint(len(data), (count,), generator=random)]           # [count, 2]
    return x_0, torch.randn(count, 2, generator=random), training_times(count, 0.5, random)

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
# The loss stops far above zero. Is the network too small, or the training too short? Even $v^*$ misses: at a
# crossing it answers the average, while each traveller goes one way or the other. What is left over is the
# spread of the possible $x_0$ around the guess, and no network can go below it. For any other velocity the
# loss is this minimum **plus** the mean squared distance to $v^*$ (the mixed term averages out, because $v^*$
# is the conditional mean):
#
# $$\mathbb E\,\lVert v_\theta-v\rVert^2 = \mathbb E\,\lVert v^*-v\rVert^2 + \mathbb E\,\lVert v_\theta-v^*\rVert^2 .$$
#
# The next cell measures all three terms on the same draws (per coordinate), and shows at which times the
# floor is high.

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
assert 1 < floor < flow.squared_error(learned, v) < 1.1 * floor
assert abs(flow.squared_error(learned, v) - floor - direct) < 0.005

order = t.argsort()                                                            # 50 groups of 4,000 draws

def by_time(a, b):
    return (a - b).square().mean(-1)[order].view(50, -1).mean(-1)              # [50]

moments = t[order].view(50, -1).mean(-1)                                       # [50]
_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.5), layout="constrained")
smooth = torch.tensor(history).view(-1, 50).mean(-1)
left.plot(torch.arange(25, steps, 50), smooth, color=BLUE, label="training loss")
left.axhline(floor, color=CORAL, ls="--", label="loss of v*")
left.set(xlabel="step", ylabel="loss (Eq. 2)", ylim=(floor * 0.95, floor * 1.2))
right.plot(moments, by_time(learned, v), color=BLUE, label="network")
right.plot(moments, by_time(best, v), color=CORAL, ls="--", label="v*")
right.set(xlabel="t", ylabel="loss at time t", ylim=(0, None))
left.legend(), right.legend()
missed = by_time(learned, best)                                                # [50]
print(f"{missed[:10].sum() / missed.sum():.0%} of what it misses lies below t = {moments[9:11].mean():.2f}, "
      "where a fifth of the draws are")
assert missed[:10].sum() > 0.5 * missed.sum()

# %% [markdown] tags=["slide"]
# ## The loss does not go to zero
#
# $$\mathbb E\,\lVert v_\theta - v\rVert^2 = \mathbb E\,\lVert v^* - v\rVert^2 + \mathbb E\,\lVert v_\theta - v^*\rVert^2$$
#
# ![The training loss falls to a floor, the loss of the perfect velocity; both over t agree](last)
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
assert 0.005 < nearest.mean() < 0.15                                           # the network's

t_ = torch.full((len(grid),), 0.15)
with torch.no_grad():
    wrong = (model(grid, t_) - v_star(grid, t_)).norm(dim=-1)                  # [144]
corner = (grid.abs() > 1.9).all(-1)                                            # [144]
inside, outside = wrong[~corner].mean(), wrong[corner].mean()
print(f"the field is off by {outside:.1f} in the corners, by {inside:.1f} elsewhere")
assert outside > 2 * inside
visited = x_t[(t - 0.15).abs() < 0.02].abs() > 1.9                             # of the 200,000 draws
assert visited.all(-1).float().mean() < 0.001

# %% [markdown]
# So a flow's loss has to be read against a floor that one usually does not know, and a hardly visible drop
# may be all the drop there is. What this network still misses sits mostly at small $t$, where the decisions
# are sharp, and its samples show it: the same robot, drawn with a softer pencil. Its field is most wrong in
# the corners, where no $x_t$ comes.
#
# ## 5 · What the model believes on the way (optional)
#
# Any velocity is a guess of the data: $x_0=x_t-t\,v$, the first thing that your `ends` returns. With $v^*$ it
# is not a *likely* point, but the *average* of the likely points. For pictures, an average is a blur.

# %%
chosen = noise_for([11, 235, 59], (2,))                                        # [3, 2]
way = trajectory(v_star, chosen, even(100))                                    # [101, 3, 2]
times, belief, blur = torch.linspace(1, 0, 101)[:100], [], []                  # times [100]: all t > 0
for x, t in zip(way, times):
    belief.append(ends(x, t.expand(3), v_star(x, t.expand(3)))[0])             # [3, 2]
    squares = torch.cdist(belief[-1], data).square()                           # [3, 36]
    blur.append((posterior(x, t.expand(3), data) * squares).sum(-1).sqrt())    # [3]
belief, blur = torch.stack(belief), torch.stack(blur)                          # [100, 3, 2], [100, 3]
assert torch.allclose(belief[0], data.mean(0).expand(3, 2), atol=1e-3)         # all begin at the mean
_, axes = plt.subplots(1, 3, figsize=(8.6, 2.8), layout="constrained")
for axis, lines in zip(axes, [way, belief]):
    axis.scatter(*data.T, s=9, color=GREY)
    for b, (colour, style) in enumerate([(CORAL, "-"), (BLUE, "--"), (INK, ":")]):
        axis.plot(*lines[:, b].T, style, color=colour, lw=1.2)
        axis.scatter(*lines[::10, b].T, color=colour, s=10)
        axis.plot(*lines[0, b], "o", color=colour, mfc="white", ms=6)
        axes[2].plot(times, blur[:, b], style, color=colour)
    axis.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=GREY)
axes[0].set_title("where the sample is: $x_t$")
axes[1].set_title("what it believes: predicted $x_0$")
axes[2].set(xlim=(1, 0), xlabel="t", ylim=(0, None), title="how blurred the belief is")
for i in (0, 50, 70, 90):
    to_go = [((a[i] - way[-1]).norm(dim=-1) / (a[0] - way[-1]).norm(dim=-1)).mean() for a in (way, belief)]
    print(f"t = {times[i]:.1f}: blur {blur[i].mean():.2f}; still to go, of the whole distance: "
          f"sample {to_go[0]:.0%}, belief {to_go[1]:.0%}")
    assert i != 50 or (to_go[0] > 0.85 and to_go[1] < 0.5)

# %% [markdown] tags=["slide"]
# ## What the model believes on the way
#
# ![Where three samples are, what the model believes of their ends, and how blurred the belief is over
# t](last)
#
# $x_0 = x_t - t\,v$ is not a likely point but the *average* of the likely points. For pictures, an average is
# a blur.

# %% [markdown]
# The open circles are the starts. All three beliefs begin at the mean of the robot. At $t=0.5$ the belief has
# gone most of its way while the sample has hardly left its start: this is why previews of a running sampler
# show the predicted $x_0$.
#
# ## 6 · Guidance
#
# Let the points have two classes, two hearts that overlap, and let the "text" $y$ be the class. Then
# $v^*(x,t\mid y)$ is the exact velocity of that class alone, and the velocity for the empty text,
# $v^*(x,t\mid\varnothing)$, is that of all points. **Classifier-free guidance** extrapolates from one through
# the other:
#
# $$v_g \;\overset{\text{Eq. 4}}{=}\; (1-g)\,v_\varnothing + g\,v_y \;\overset{\text{Eq. 5}}{=}\; v_\varnothing + g\,(v_y-v_\varnothing)$$
#
# So $g=0$ ignores the text, $g=1$ is the plain conditional flow, and $g>1$ aims *beyond* the guess for the
# class, away from the guess for everything. (Lesson 3 finds a classifier in this difference.)
#
# ### Exercise 1.6 ★ · Guidance

# %% tags=["exercise"]
def guide(v_null, v_text, g):
    # BEGIN SOLUTION 1.6
    return v_null + g * (v_text - v_null)
    # END SOLUTION

# %% tags=["wrong"]
# says: begin at v_null
def guide(v_null, v_text, g):
    return v_text + g * (v_text - v_null)

# %% tags=["wrong"]
# says: v_null itself is missing
def guide(v_null, v_text, g):
    return g * (v_text - v_null)

# %% tags=["wrong"]
# says: texts are exchanged
def guide(v_null, v_text, g):
    return v_text + g * (v_null - v_text)

# %% tags=["check"]
a, b = noise_for([0, 1], (2,)), noise_for([2, 3], (2,))
rule_out(guide(a, b, 3.0), {"a guidance of 1 should change nothing: begin at v_null.": b + 3 * (b - a),
                            "v_null itself is missing in the sum.": 3 * (b - a),
                            "the two texts are exchanged.": b + 3 * (a - b)})
expect_close(guide(a, b, 0.0), a, "guidance 0, which ignores the text,")
expect_close(guide(a, b, 1.0), b, "guidance 1, which is the plain prediction for the text,")
expect_close(guide(a, b, 3.0), flow.guide(a, b, 3.0), "guidance 3")
print("1.6 right")

# %% [markdown]
# Our class is blue, the other one grey crosses; the area of a coral dot is the share of samples that land
# there.

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
used, doubtful = [], []
for axis, guidance in zip(planes(4, reach=2.0, size=2.5), [0, 1, 2, 5]):
    end = trajectory(guided(guidance), x_1, even(50))[-1]                      # [500, 2]
    nearest, landed = torch.cdist(end, both).min(-1)                           # [500], [500]
    use = torch.bincount(landed, minlength=60) / 500                           # [60]
    used.append(torch.special.entr(use).sum().exp())
    doubtful.append((torch.cdist(end, other).min(-1).values < 0.25).float().mean())
    print(f"{guidance:8d} {used[-1]:24.1f} {doubtful[-1]:32.0%} {nearest.mean():29.3f}")
    assert nearest.mean() < 0.02                                               # the samples land on data
    axis.scatter(*other.T, s=12, color=GREY, marker="x", lw=1)
    axis.scatter(*mine.T, s=8, color=BLUE)
    axis.scatter(*both.T, s=1000 * use, color=CORAL, alpha=0.6, lw=0)
    axis.set_title(f"guidance {guidance}")
assert used[1] > 28 and doubtful[1] > 0.3                                      # all of the 30 points
assert used == sorted(used, reverse=True) and doubtful == sorted(doubtful, reverse=True)
assert used[3] < 15 and doubtful[3] < 0.05

# %% [markdown] tags=["slide"]
# ## Guidance
#
# $$v_g = v_\varnothing + g\,(v_y - v_\varnothing)$$
#
# ![Samples of a heart's half with guidance 0, 1, 2 and 5: surer, and fewer kinds](last)
#
# Surer samples, and fewer kinds of them. The difference $v_y - v_\varnothing$ will be a *representation of a
# concept* in lesson 6.

# %% [markdown]
# With $g=1$ all 30 points of our heart are used about equally. Many of them lie on or near the other heart:
# they are true members of the class, but they *could be taken* for the other. Guidance gives them up, and
# more of them the higher it is. Surer, and less varied; that is the trade, and at $g=5$ no longer the
# distribution we asked for. (The samples still land *on* data: near $t=0$ one point holds all the weight, and
# nothing is left to extrapolate.)
#
# ## 7 · A better sampler (optional)
#
# How good is a sampler? Take Gaussian data of standard deviation $s$, $x_0 \sim \mathcal N(0,s^2 I)$. ($s$ is
# no shift here.) Their velocity is known in closed form (below), and its trajectories bring every $x_1$ to
# exactly $s\,x_1$.
#
# ### Exercise 1.7 ★ · The order of a method
#
# If twice the steps divide the error by 2, a method is of *first order*; if by 4, of *second order*. Write
# the function that measures it, with $s=1/2$: the norm of (end minus truth) with `steps` steps, divided by
# that with `2 * steps` steps.

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
# says: the truth is 0.5 x_1
def error_ratio(method, x_1, steps):             # compares with the start
    errors = [(list(method(gaussian, x_1, even(n)))[-1][1] - x_1).norm() for n in (steps, 2 * steps)]
    return errors[0] / errors[1]

# %% tags=["wrong"]
# says: the other way up
def error_ratio(method, x_1, steps):
    errors = [(list(method(gaussian, x_1, even(n)))[-1][1] - 0.5 * x_1).norm() for n in (steps, 2 * steps)]
    return errors[1] / errors[0]

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
ratio = error_ratio(exactly, x_1, 4)
expect(ratio is not None, "error_ratio returned None: is the return missing?")
ratio = torch.as_tensor(ratio)
from_start = [(0.5 * x_1 + 1 / n ** 3 - x_1).norm() for n in (4, 8)]
rule_out(ratio, {"the truth is 0.5 x_1, not x_1.": from_start[0] / from_start[1],
                 "the fraction is the other way up.": torch.tensor(1 / 8),
                 "take the norm, not its square.": torch.tensor(64.0)})
expect_close(ratio, torch.tensor(8.0), "the ratio of a method of third order", tolerance=1e-3)
print(f"1.7 right. Euler, 16 and 32 steps: the error is divided by {error_ratio(euler, x_1, 16):.2f}")
assert 1.9 < error_ratio(euler, x_1, 16) < 2.3

# %% [markdown]
# Euler uses the velocity at the *start* of each step. Heun's method looks ahead: make the Euler step, ask for
# the velocity where it ended, go back, and make the step with the mean of the two,
#
# $$\tilde x = x+h\,v(x,t), \qquad x_{\text{next}} = x+\tfrac h2\,\big(v(x,t)+v(\tilde x,t_{\text{next}})\big), \qquad h=t_{\text{next}}-t<0.$$
#
# ### Exercise 1.8 ★★★ · Heun's method
#
# One trap: what is $v^*$ at $t_{\text{next}}=0$? Make the step that ends there a plain Euler step.

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
# says: no value at t = 0
def heun(velocity, x, times):                    # divides by t = 0 in the last step
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, torch.full((len(x),), t))
        ahead = x + (t_next - t) * v
        v_next = velocity(ahead, torch.full((len(x),), t_next))
        x = x + (t_next - t) * (v + v_next) / 2
        yield t_next, x

# %% tags=["wrong"]
# says: half of their sum
def heun(velocity, x, times):
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, torch.full((len(x),), t))
        if t_next > 0:
            v = v + velocity(x + (t_next - t) * v, torch.full((len(x),), t_next))
        x = x + (t_next - t) * v
        yield t_next, x

# %% tags=["wrong"]
# says: from the beginning of the step
def heun(velocity, x, times):                    # goes on from where the Euler step ended
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, torch.full((len(x),), t))
        x = x + (t_next - t) * v
        if t_next > 0:
            v = (v + velocity(x, torch.full((len(x),), t_next))) / 2
            x = x + (t_next - t) * v
        yield t_next, x

# %% tags=["check"]
steps = list(heun(gaussian, x_1, [1.0, 0.5, 0.0]))
expect([t for t, _ in steps] == [0.5, 0.0], "yield (t_next, x) once after each step, down to t_next = 0.")
v = gaussian(x_1, torch.ones(4))                                               # [4, 2]: one Heun step by hand
v_next = gaussian(x_1 - 0.5 * v, torch.full((4,), 0.5))                        # [4, 2]
first = x_1 - 0.25 * (v + v_next)                                              # [4, 2]
rule_out(steps[0][1], {"this is Euler's step: use the velocity where it ended, too.": x_1 - 0.5 * v,
                       "the mean of the two velocities is half of their sum.": x_1 - 0.5 * (v + v_next),
                       "go back: the step is made from the beginning of the step.": first - 0.5 * v})
expect_close(steps[0][1], first, "the step from t = 1 to 0.5")
end = list(heun(v_star, x_1, even(28)))[-1][1]                                 # [4, 2]
expect(end.isfinite().all().item(), "v* has no value at t = 0: make the last step an Euler step.")
ratio = error_ratio(heun, x_1, 16)
expect(ratio > 3, f"twice the steps divide the error by {ratio:.1f}, Heun's by about 4.")
print(f"1.8 right. Heun, 16 and 32 steps: the error is divided by {ratio:.2f}")

# %%
x_1 = noise_for(list(range(400)), (2,))                                        # [400, 2]
truth = list(heun(v_star, x_1, even(200)))[-1][1]                              # [400, 2]
cost = [4, 8, 16, 32, 64, 128]                                                 # velocities a sample
_, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.5), layout="constrained")
on_gaussian, on_robot = {}, {}
for method, each, colour, style in [(euler, 1, INK, "o-"), (heun, 2, CORAL, "s--")]:
    name = method.__name__.title()
    last = [list(method(gaussian, x_1, even(n // each)))[-1][1] for n in cost]
    on_gaussian[name] = [(end - 0.5 * x_1).norm(dim=-1).mean() for end in last]
    left.loglog(cost, on_gaussian[name], style, ms=4, color=colour, label=name)
    last = [list(method(v_star, x_1, even(n // each)))[-1][1] for n in cost]
    on_robot[name] = error = [(end - truth).norm(dim=-1).mean() for end in last]
    print(f"{name:5s} on the robot: " + "   ".join(f"{n}: {e:.3f}" for n, e in zip(cost, error)))
    right.semilogx(cost, error, style, ms=4, color=colour, label=name)
left.set(title="Gaussian data", ylabel="mean distance to the true end")
right.set(title="the robot", ylim=(0, None))
for axis in (left, right):
    axis.set(xlabel="velocities a sample", xticks=cost, xticklabels=cost)
    axis.minorticks_off()
    axis.legend()
order_of = {name: error[-2] / error[-1] for name, error in on_gaussian.items()}
assert 1.8 < order_of["Euler"] < 2.2 and 3.6 < order_of["Heun"] < 4.4
assert abs(on_robot["Euler"][0] - on_robot["Heun"][0]) < 0.05                  # 4 velocities: equally poor
assert all(heun_ < 0.6 * euler_ for euler_, heun_ in zip(on_robot["Euler"][2:], on_robot["Heun"][2:]))

# %% [markdown] tags=["slide"]
# ## A better sampler: Heun
#
# ![The errors of Euler and Heun over the number of steps, on logarithmic axes](last)
#
# The order of a method says how its error shrinks when the steps are small, and nothing about large ones.

# %% [markdown]
# On the left the textbook: twice the velocities halve Euler's error and quarter Heun's. On the right the
# robot: with 4 velocities the two are equally poor, and from 16 on Heun is clearly ahead. This project
# samples with Euler and 28 steps, the paper's number.
#
# ## What you can now say
#
# - Time runs from data, $t=0$, to noise, $t=1$. The path is a straight line (Eq. 1), and the model
# regresses on its velocity $x_1-x_0$ (Eq. 2).
# - The best possible velocity is a conditional mean: guess the data, and point away. The guess is coarse at
# large $t$ and sharp at small $t$.
# - Following the mean velocity carries noise to data. Few steps end on blurred guesses; the shift decides
# where the steps are spent.
# - The loss has a floor, the spread of what cannot be known at $x_t$.
# - Guidance follows $v_y-v_\varnothing$ further than the data ask: surer samples, fewer kinds of them. The
# paper calls such a difference the representation of a concept (Eq. 8).
#
# ## Three questions
#
# **1.** A network has the training loss 0.9, and its loss falls no further. Is it bad?
# <details><summary>Answer</summary>
#
# Nobody can say from this number. The loss is the floor plus the distance to $v^*$, and only the second part
# is the network's.
# </details>
#
# **2.** You take a single Euler step, from $t=1$ to 0, with the perfect velocity. What do all samples look
# like?
# <details><summary>Answer</summary>
#
# All the same: the mean of the data, the guess at $t=1$.
# </details>
#
# **3.** The lines of training cross, and the curves of sampling never do. How can both have the same density
# at every $t$?
# <details><summary>Answer</summary>
#
# What flows through a place is the density times the *mean* velocity there. Who goes where does not matter.
# </details>
#
# **Next:** lesson 2 puts pictures, words and a transformer in the place of points and classes.

# %% [markdown] tags=["slide"]
# ## Three questions
#
# 1. A network has the training loss 0.9, and it falls no further. Is it bad?
# 2. A single Euler step from $t = 1$ to 0, with the perfect velocity. What do all samples look like?
# 3. The lines of training cross, and the curves of sampling never do. How can both have the same density?

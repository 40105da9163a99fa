"""Which words each half of a picture reads, and which words change it.

    python -m tutorials.experiments.attention    takes the benchmark's concepts, or trains them; minutes

A concept bound to [V] alone ("token": Y in the word's place) leaks onto a second thing of its class; one that
is bound to [V]'s phrase hardly does. Here are three texts, and for each 60 rendered scenes of what it says,
without the concept, at t = .9 and .6. No text names the background. The first table is attention, in per cent
of all that a half's image tokens read: means over blocks, heads, times and seeds, the interval over scenes.
"base" reads the same tokens, with the class word at [V]. The second is how far v moves. It came out:

The second of two things is read behind its noun. Of "a small robot on the left and a big [V] robot on the
right" the right half reads "[V] robot" with 0.2 % and "on the right" with 10.4 %; the left half gives that
noun 2.1 %. The phrase's adapters move the right half by 38 %: those at "on the right" alone as much, those at
"[V] robot" alone by 0.5 %. But that the place is told after the noun is no full reason: where [V] is the
first thing or the only one, its half reads the noun as well, and each of the two does its part.

Y is a key for all. Of two things, the word at [V] gets over ten times as much from one half as from the
other; Y gets nearly the same from both, 1.2 to 1.4 %. It moves the neighbour's half by 29 and 27 %, [V]'s own
by 24 and 30. The same adapters without Y move the right half by 0.4 % where [V] is the second. Bound to the
phrase, the concept moves the neighbour's half by 5 and 6 %, its own by 38 and 49.
"""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import reduce
from matplotlib.colors import PowerNorm
from torch import Tensor

import tinyflow.attention
from purecc_min.benchmark.cells import Cell, learned_file
from purecc_min.benchmark.figures import INK, LOOK, PAGE
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.branch import Branch
from purecc_min.concept import TOKEN
from purecc_min.concept_file import load_branch
from purecc_min.measure.toy import FOLDER, turn
from tinyflow.files import write_whole
from tinyflow.flow import noise_for, path
from tinyflow.picturebook import world
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import Pipeline, Text, Velocity
from tinyflow.terminal import report_errors

CONCEPT, NOUN, SEEDS, SCENES, TIMES = "checked_robot", "robot", 3, 60, (.9, .6)
TEXTS = ("a small robot on the left and a big [V] robot on the right",
         "a big [V] robot on the left and a small robot on the right",
         "a big [V] robot on the right")
GRID, HALVES, MODELS = 8, ("left", "right"), ("base", "token", "phrase")     # 8 x 8 image tokens
OWN, OTHER = "#1b4965", "#e9a23b"                # bars of the half with [V], and of the one without
ROBOTS = str(FOLDER.parent / "learned" / f"{CONCEPT}-{{}}.safetensors")      # of hover, by method
HOVERED = "a [V] robot on the left and a robot on the right in the snow"
HOVERED_SEED, NOISES = 0, 8
Found = dict[str, tuple[Tensor, Tensor]]         # who -> what each half reads [SCENES, 2, words], and how far
                                                 # its v moves, |v - v_base| / |v_base| [seeds, 2]


def phrase_of(text: str) -> list[str]:
    """The words of [V]'s phrase. The last one says in which half [V] stands."""
    return text[text.index(TOKEN):].split(" and ")[0].split()


def scenes_of(text: str) -> list[world.Scene]:
    """Scenes that the text describes without [V]: random individuals before all backgrounds."""
    rows, clauses = [], [clause.split() for clause in text.split(" and ")]
    for n in range(SCENES):
        rng = np.random.default_rng(n)
        things = tuple(replace(world.random_thing(words[-1], rng, parts=False), object=NOUN, size=words[1])
                       for words in clauses)
        rows.append(world.Scene(things, turn(world.BACKGROUNDS, n), seed=n))
    return rows


def watch(theta: Velocity, x_t: Tensor, t: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """v, and what each image token reads, [B, N, N + T]: the mean over blocks and heads of its attention."""
    attention, kept = tinyflow.attention.attention, []

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights, out = (q @ k.mT / q.shape[-1]**.5).softmax(-1), attention(q, k, v)     # [B, H, N + T, N + T]
        torch.testing.assert_close(weights @ v, out, rtol=1e-3, atol=1e-4)
        kept.append(weights[:, :, :GRID**2].mean(1))                                    # [B, N, N + T]
        return out

    with mock.patch("tinyflow.attention.attention", look):
        v = theta(x_t, t, text)
    return v, torch.stack(kept).mean(0)


def in_halves(read: Tensor, words: int) -> Tensor:
    """What each half reads, [B, 2, words + 3]: the start, each word, the padding, the picture."""
    share = reduce(read, "b (row half column) k -> b half k", "mean", row=GRID, half=2)
    picture, said, end = share.tensor_split([GRID**2, GRID**2 + words + 1], dim=-1)
    return torch.cat([said, end.sum(-1, keepdim=True), picture.sum(-1, keepdim=True)], dim=-1)


def size_in_halves(v: Tensor) -> Tensor:
    """[B, C, H, W] -> the root mean square of each half, [B, 2]."""
    return reduce(v.square(), "b c h (half w) -> b half", "mean", half=2).sqrt()


@torch.no_grad()
def measured(pipe: Pipeline, words: str, at_token: list[Branch], at_phrase: list[Branch]) -> Found:
    """All that is measured on one text."""
    text = pipe.encode_text([words] * SCENES, {TOKEN: NOUN})
    is_noun = torch.arange(text.slots.shape[1]) <= text.slots.argmax(1, keepdim=True) + 1
    # the phrase's adapters may act at a part of it alone
    at_noun, at_place = (replace(text, phrases=text.phrases * part) for part in (is_noun, ~is_noun))
    questions = {"base": [(pipe.velocity, text)],
                 "token": [(theta, text) for theta in at_token],
                 "phrase": [(theta, text) for theta in at_phrase],
                 "phrase, at [V] robot alone": [(theta, at_noun) for theta in at_phrase],
                 "phrase, at its place alone": [(theta, at_place) for theta in at_phrase],
                 "token, without Y": [(Branch(pipe, theta.lora, None), text) for theta in at_token]}
    x_0, found = pipe.encode_images(render_all(scenes_of(words))[0]), {who: ([], []) for who in questions}
    for t in (torch.full((SCENES,), moment) for moment in TIMES):
        x_t = path(x_0, noise_for(list(range(SCENES)), x_0.shape[1:]), t)
        v_base = pipe.velocity(x_t, t, text)
        for who, (theta, asked) in ((who, question) for who in questions for question in questions[who]):
            v, read = watch(theta, x_t, t, asked)
            found[who][0].append(in_halves(read, len(words.split())))
            found[who][1].append((size_in_halves(v - v_base) / size_in_halves(v_base)).mean(0))
    return {who: (torch.stack(read).mean(0), torch.stack(moved).reshape(len(TIMES), -1, 2).mean(0))
            for who, (read, moved) in found.items()}


def check(text: str, found: Found) -> None:
    """That it came out as the sentences above say."""
    own, at = HALVES.index(phrase_of(text)[-1]), text.split().index(TOKEN) + 1
    read, moved = ({who: values[n].mean(0) for who, values in found.items()} for n in range(2))
    noun, place = read["base"][:, at:at + 2].sum(1), read["base"][:, at + 2:at + 5].sum(1)     # of each half
    parts = [moved[who][own] / moved["phrase"][own] for who in found if who.endswith("alone")]
    if at > 5:                                   # [V] is the second thing
        assert noun[own] < .03 * place[own] and noun[own] < .2 * noun[1 - own]
        assert parts[0] < .03 and parts[1] > .95 and moved["token, without Y"][own] < .01
    else:
        assert noun[own] > .4 * place[own] and min(parts) > .4
    if " and " in text:
        assert read["base"][:, at].max() > 10 * read["base"][:, at].min()
        assert read["token"][:, at].max() < 1.4 * read["token"][:, at].min()
        assert moved["token"][1 - own] > .8 * moved["token"][own]
        assert moved["phrase"][1 - own] < .15 * moved["phrase"][own]


def tables(text: str, found: Found) -> str:
    """Both in per cent. In brackets are the least and the most of the seeds."""
    reads, header = [], ["reads", *(f"{half}: {who}" for half in HALVES for who in MODELS)]
    for n, word in enumerate(["(start)", *text.split(), "(end)", "(picture)"]):
        cells = [mean_and_interval((100 * found[who][0][:, half, n]).tolist())
                 for half in range(2) for who in MODELS]
        reads.append([word, *(f"{mean:.2f} ± {interval:.2f}" for mean, interval in cells)])
    moves = [[who, *(f"{half.mean():.1f} ({half.min():.1f} to {half.max():.1f})" for half in 100 * moved.T)]
             for who, (_, moved) in found.items() if who != "base"]
    return "\n\n".join([text, markdown(header, reads), markdown(["v moves", *HALVES], moves)])


def draw_text(heat: plt.Axes, bars: plt.Axes, text: str, found: Found) -> None:
    """A row for each half and model: what it reads of each word, and how far its v moves."""
    words, phrase, rows = text.split(), phrase_of(text), [(half, who) for half in range(2) for who in MODELS]
    values = np.array([100 * found[who][0][:, half, 1:-2].mean(0).numpy() for half, who in rows])
    heat.imshow(values, cmap="Blues", norm=PowerNorm(.5, 0, 9), aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        heat.text(x, y, f"{value:.1f}", ha="center", va="center", color=PAGE if value > 3.5 else INK)
    first = words.index(TOKEN)
    heat.axhline(2.5, color=PAGE, linewidth=5)
    heat.plot([first - .45, first + len(phrase) - .55], [-.62, -.62], color=INK, linewidth=2.5, clip_on=False)
    heat.set(ylim=(5.5, -.5), xticks=range(len(words)), xticklabels=words, yticks=range(6),
             yticklabels=[f"{HALVES[half]} half, {who}" for half, who in rows])
    heat.tick_params(length=0, labeltop=True, labelbottom=False, pad=7)
    heat.spines[:].set_visible(False)
    moves = [100 * found[who][1][:, half].mean().item() for half, who in rows]
    bars.barh(range(6), moves, color=[OWN if HALVES[half] == phrase[-1] else OTHER for half, _ in rows])
    bars.bar_label(bars.containers[0], fmt="%.0f %%", padding=3)
    bars.set(ylim=(5.5, -.5), xlim=(0, 66), xticks=[], yticks=[])
    bars.spines["bottom"].set_visible(False)


@torch.no_grad()
def hover(name: str, text: str = HOVERED) -> dict:
    """Which patch of a picture reads which word, for the page to play with.

    A model draws the text, and its picture is noised again, to the times TIMES with NOISES noises.

    Args:
        name: "base", or a method of which `learned` has the robot: "lora", "token" or "bound-pairs".
    Returns: words, a list; grid, [words][rows][columns], the share of a patch's attention that a word gets, a
        mean over blocks, heads, times and noises; picture, uint8 [H, W, 3].
    """
    pipe = load_tiny()
    encoded = pipe.encode_text([text], {TOKEN: NOUN})
    theta = pipe.velocity if name == "base" else load_branch(pipe, ROBOTS.format(name))[0]
    x_0 = pipe.sample(encoded, [HOVERED_SEED], theta=theta, theta_null=pipe.velocity)
    noise, encoded = noise_for(list(range(NOISES)), x_0.shape[1:]), encoded[[0] * NOISES]
    moments = [torch.full((NOISES,), moment) for moment in TIMES]
    read = torch.stack([watch(theta, path(x_0, noise, t), t, encoded)[1] for t in moments]).mean((0, 1))
    words = text.split()
    of_words = read[:, GRID**2 + 1:GRID**2 + 1 + len(words)].T                          # [words, N]
    return {"words": words, "grid": of_words.reshape(len(words), GRID, GRID).tolist(),
            "picture": pipe.decode_images(x_0)[0]}


def attention(folder: Path) -> str:
    """Each text's tables; leaves attention/table.md and attention/picture.png."""
    pipe, out = load_tiny(), folder / "attention"
    cells = [[Cell(CONCEPT, "token", seed, on_the_way=False) for seed in range(SEEDS)],    # as in plans.py
             [Cell(CONCEPT, "bound", seed) for seed in range(SEEDS)]]
    thetas = [[load_branch(pipe, learned_file(cell, folder))[0] for cell in row] for row in cells]
    found = {text: measured(pipe, text, *thetas) for text in TEXTS}
    report = "\n\n".join(tables(*row) for row in found.items())
    write_whole(out / "table.md", (report + "\n").encode())
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(len(TEXTS), 2, figsize=(10, 8), width_ratios=(5, 1))
        for row, (text, own) in zip(axes, found.items()):
            draw_text(*row, text, own)
        axes[0, 0].set_title("per cent of what a half of the picture reads (line: [V]'s phrase)", pad=12)
        axes[0, 1].set_title("its v moves by", pad=12)
        colours = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (OWN, OTHER)]
        figure.legend(colours, ["the half with [V]", "the other half"], loc="outside lower right", ncols=2)
        figure.savefig(out / "picture.png")
    for row in found.items():
        check(*row)
    return report


if __name__ == "__main__":
    with report_errors():
        print(attention(Path("output/benchmark")))

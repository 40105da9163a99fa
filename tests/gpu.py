"""One command measures a card: kernels, speed, and memory against what `memory` counts.

    python -m tests.gpu                  any CUDA card, under 9 minutes; without one, a toy pass on the CPU
    python -m tests.gpu --out card.md    the table goes there, too

The models have SD3.5 Medium's size and random weights in bf16; a step is that of `learn --base sd3.5-medium`.
On a card every measurement runs in a process of its own. What does not fit there, or goes wrong, says so in
its row, and the rest goes on. What must hold is asserted, and the exit code is 1 if it does not: no attention
falls back to its plain kernel, ours and diffusers' predictions agree, a step takes no more memory than was
counted, and what the plan says fits does fit.
"""

import argparse
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from purecc_min.branch import Branch, Thetas
from purecc_min.commands.memory import OVERHEAD, dry_run, empty_data, fit
from purecc_min.learning import train_steps
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig, optimizer_for
from tests.side_by_side import Case, Inputs, clip_of, forward_ratios, in_a_process, seconds, t5_of
from tinyflow.attention import JointAttention
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.mmdit import MMDiT
from tinyflow.pipeline import Pipeline
from tinyflow.sd3.t5 import T5Config, T5Layer
from tinyflow.text import TextConfig, TextLayer
from tinyflow.vae import VAE, VAEConfig

CARD = Case(depth=24, heads=24, dual=tuple(range(13)), tokens=77 + 256, latent=64,
            clips=(clip_of(768, 12, 768), clip_of(1280, 32, 1280)), t5=t5_of(4096, 10240, 24),
            vae=(128, 256, 512, 512), device="cuda", dtype=torch.bfloat16)
TOY = Case(depth=2, heads=2, dual=(0,), tokens=90, latent=8, clips=(clip_of(64, 1, 64),) * 2,
           t5=t5_of(64, 64, 1), vae=(32, 32))
CAPS = (8, 12, 16, 24)                           # GB of the cards that a larger one stands in for
APART = 0.03                                     # of bf16 predictions, relative: they round at other places
Row = tuple[str, str, str]                       # what, measured, what to hold it against
Rows = Iterator[Row]


def alone(case: Case, call: Callable, *args):
    """call(*args); with a card, in a process that has it alone. This process keeps away from the card, since
    each process that uses it takes half a GB of it.
    """
    return in_a_process(call, *args) if case.device == "cuda" else call(*args)


def pixels(case: Case) -> int:
    return case.latent * VAEConfig(case.vae).factor


# -------------------------------------------------------------------------------------------------- attention
def kernels_of(case: Case) -> dict[str, tuple[str, set[str]]]:
    """Layer -> its dtype, and which of SDPA's kernels run in it, in the forward and the backward pass."""
    config = case.config
    hidden = T5Config(width=case.t5["d_model"], heads=case.t5["num_heads"], hidden=64)
    layers = {"joint attention": JointAttention(config.width, config.heads, True, True).to(case.dtype),
              "CLIP": TextLayer(TextConfig(1, width=case.clips[0]["hidden_size"],
                                           heads=case.clips[0]["num_attention_heads"])),
              "T5": T5Layer(hidden)}
    image, text = (case.draw(2, n, config.width).to(case.dtype).requires_grad_()
                   for n in (config.max_grid**2, case.tokens))
    inputs = {"joint attention": (image, text),
              "CLIP": (case.draw(2, 77, case.clips[0]["hidden_size"]),),
              "T5": (case.draw(2, 256, hidden.width), case.draw(1, hidden.heads, 256, 256))}
    found = {}
    for name, layer in layers.items():
        layer.to(case.device)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            out = layer(*inputs[name])
            if name == "joint attention":        # texts are encoded without a gradient
                sum(stream.float().sum() for stream in out).backward()
        ran = {event.key.removeprefix("aten::_scaled_dot_product_").removesuffix("_attention")
               for event in profiled.key_averages() if "_scaled_dot_product_" in event.key}
        found[name] = str(inputs[name][0].dtype).removeprefix("torch."), ran
    return found


def kernels(case: Case) -> Rows:
    for name, (dtype, found) in alone(case, kernels_of, case).items():
        assert found and not any("math" in kernel for kernel in found), (name, found)
        yield f"SDPA kernel, {name} in {dtype}", ", ".join(sorted(found)), "any but math"


# ------------------------------------------------------------------------------------ SD3.5 Medium's own size
def against_diffusers(case: Case, backward: bool, pairs: int) -> Rows:
    theirs, ours, ratio, apart = alone(case, forward_ratios, case, backward, pairs)
    title = "forward + backward to the inputs" if backward else "forward"
    yield (f"MMDiT, {title}", f"{ours:.4f} s", f"diffusers {theirs:.4f} s, ratio {ratio:.2f}; "
           f"predictions {apart:.1e} apart")
    assert apart < APART, f"predictions {apart:.1e} apart"


def limit_memory(case: Case, cap: float | None) -> int:
    """Lets this process have a card of `cap` GB; returns the bytes that such a card has left for it."""
    free, total = torch.cuda.mem_get_info()
    if cap is None:
        return free
    context = total - free                       # CUDA's own; and what other programs hold
    torch.cuda.set_per_process_memory_fraction((cap * 1e9 - context) / total)
    return int(cap * 1e9 - context)


def prepare(case: Case, stage: int, checkpointing: bool, config: TrainConfig) -> tuple[Pipeline, Iterator]:
    """A pipeline, and the loop of `learn` on it."""
    with case.building():
        mmdit = MMDiT(case.config).requires_grad_(False)
    with torch.device(case.device):
        vae = VAE(VAEConfig(case.vae)).requires_grad_(False)
    mmdit.checkpointing = checkpointing
    pipe = Pipeline(None, None, mmdit, vae, vae.factor * case.latent, shift=3.0)
    branches = [Branch.fresh(pipe, case.draw(case.depth, case.config.width), config.rank)
                for _ in range(stage)]
    branches[0].requires_grad_(stage == 1)
    data, _ = empty_data(case.config, config, case.latent, case.tokens, case.device)
    loss = METHODS["lora" if stage == 1 else "paper"].loss
    thetas = Thetas(pipe.velocity, branches[0], branches[-1])
    return pipe, train_steps(loss, thetas, data, config, stage, optimizer_for(branches[-1], config))


def run_steps(case: Case, stage: int, checkpointing: bool, steps: int,
              cap: float | None = None) -> tuple[float, int, float]:
    """Median seconds a step, the most bytes that were allocated, and the floating-point operations of one."""
    if cap:
        limit_memory(case, cap)
    _, rows = prepare(case, stage, checkpointing, TrainConfig(steps + 2, case.batch))
    with FlopCounterMode(display=False) as operations:
        next(rows)
    next(rows)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(lambda: next(rows), case.device) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else 0
    return median(times), peak, operations.get_total_flops()


def matmul_rate(case: Case, side: int) -> float:
    """Operations a second of a large matrix product: the most that a step could reach."""
    a = case.draw(side, side).to(case.dtype)
    a @ a
    return 2 * side**3 / median(seconds(lambda: a @ a, case.device) for _ in range(10))


def counted(case: Case, stage: int, checkpointing: bool) -> int:
    """What `memory` counts for a step."""
    need = dry_run(case.config, TrainConfig(batch=case.batch), pixels(case), stage, checkpointing,
                   case.tokens, VAEConfig(case.vae), case.dtype)
    return need.weights + need.adapters + need.optimizer + need.activations


def training(case: Case, stage: int, checkpointing: bool, steps: int, rate: float) -> Rows:
    duration, peak, operations = alone(case, run_steps, case, stage, checkpointing, steps)
    expected, switch = counted(case, stage, checkpointing), "on" if checkpointing else "off"
    title = f"stage {stage}, {pixels(case)} px, batch {case.batch}, gradient checkpointing {switch}"
    yield (title, f"{duration:.3f} s a step", f"{operations / 1e12:.1f} TFLOP: "
           f"{operations / duration / rate:.0%} of what a matrix product reaches")
    yield "the same: peak memory", f"{peak / 1e9:.2f} GB", f"counted {expected / 1e9:.2f} GB"
    assert peak <= expected + OVERHEAD, f"stage {stage} took {peak} bytes, and {expected} were counted"


def under_a_cap(case: Case, cap: float) -> Rows:
    """Stage 2 on a card of `cap` GB, as `learn` would plan it."""
    title, config = f"stage 2 on {cap} GB", TrainConfig(batch=case.batch)
    try:
        free = alone(case, limit_memory, case, cap)
        checkpointing = fit(case.config, config, pixels(case), METHODS["paper"], free)
    except InputError as error:
        yield title, "refused by the plan", str(error)
        return
    _, peak, _ = alone(case, run_steps, case, 2, checkpointing, 2, cap)
    switch = "on" if checkpointing else "off"
    yield title, f"runs, {peak / 1e9:.2f} GB", f"gradient checkpointing {switch}, as planned"


def picture(case: Case, steps: int) -> Rows:
    """A picture with guidance, from noise to pixels. Its text is at hand."""
    pipe, _ = prepare(case, 1, False, TrainConfig(1, case.batch))
    text = Inputs(case).texts.complete[[0]]
    pipe.encode_text = lambda texts: text[[0] * len(texts)]

    def whole() -> None:
        pipe.decode(pipe.sample(text, [0], steps))
    whole()
    yield f"a picture, {steps} steps with guidance", f"{seconds(whole, case.device):.2f} s", ""


# -------------------------------------------------------------------------------------------------- the table
def card() -> tuple[str, int]:
    """Its name, and its bytes."""
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory


def card_of(case: Case) -> str:
    if case.device == "cuda":
        name, total = alone(case, card)
        return f"{name}, {total / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return f"toy sizes on a CPU ({platform.machine()}, {os.cpu_count()} cores): these numbers mean nothing"


def measurements(case: Case) -> Iterator[tuple]:
    """Each measurement: its title, its function and its arguments."""
    full = case.device == "cuda"
    steps, pairs = (10, 10) if full else (1, 1)
    yield "kernels", kernels, case
    for backward in (False, True):
        yield "MMDiT", against_diffusers, case, backward, pairs
    rate = alone(case, matmul_rate, case, 8192 if full else 128)
    for number in (1, 2):
        for checkpointing in (False, True):
            yield f"stage {number}", training, case, number, checkpointing, steps, rate
    for cap in CAPS if full else ():
        if cap * 1e9 < alone(case, card)[1]:
            yield f"{cap} GB", under_a_cap, case, cap
    yield "a picture", picture, case, 28 if full else 2


def rows_of(case: Case) -> Iterator[tuple[Row, bool]]:
    """Every row, and whether all went well in it."""
    for title, function, *args in measurements(case):
        try:
            for row in function(*args):
                yield row, True
        except torch.OutOfMemoryError:
            yield (title, "does not fit on this card", ""), True
        except Exception as error:               # the other measurements are worth having all the same
            traceback.print_exc()
            yield (title, "FAILED", str(error).partition("\n")[0]), False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the table")
    options, begun, good = parser.parse_args(arguments), time.time(), True
    case = CARD if torch.cuda.is_available() else TOY
    lines = [f"`python -m tests.gpu` on {card_of(case)}, torch {torch.__version__.partition('+')[0]}.", "",
             "| what | measured | beside it |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    for row, went_well in rows_of(case):
        good = good and went_well
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    print(f"\n{time.time() - begun:.0f} s in all")
    if options.out:
        write_whole(options.out, "\n".join([*lines, ""]).encode())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""This project against diffusers and peft, in one run on this machine's CPU: pairs of runs, ratios, medians.

    python -m tests.side_by_side                 about 15 minutes on 2 cores, most of it in bf16

1. MMDiT forward, and forward + backward, against SD3Transformer2DModel with the same random weights, in
fp32 and bf16. 2. A step of stage 2 against the step that the authors' released code takes, replayed from
its description on diffusers + peft: a trainable forward on complete and base texts with the gradient
through both, a frozen forward on target and empty texts with the adapter disabled, two losses, backward,
clipping, AdamW. It is timed as released (texts and pictures encoded anew in each step, two transformers in
memory), with encodings cached, and with one shared transformer besides. Each runs in a process of its own,
which also gives its peak memory. A ratio above 1 says that the peer is slower, or takes more.
"""

import argparse
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Callable

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from purecc_min.branch import Branch
from purecc_min.concept import Batch, Texts, noised
from purecc_min.objective import pcc_loss
from tests.public import randomise, small_vae
from tinyflow.flow import sample_times, squared_error
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline, Text
from tinyflow.sd3.checkpoint import take
from tinyflow.sd3.layouts import DIFFUSERS, mmdit_layers

DEPTH, HEADS, TOKENS, LATENT, CONTEXT, POOLED = 4, 8, 154, 32, 1024, 512
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
           "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
CLIP = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
            projection_dim=256)
T5 = dict(vocab_size=32128, d_model=CONTEXT, d_kv=64, d_ff=2816, num_layers=8, num_heads=16,
          feed_forward_proj="gated-gelu")


def make_theirs(dtype: torch.dtype) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=LATENT, num_layers=DEPTH, num_attention_heads=HEADS, joint_attention_dim=CONTEXT,
        caption_projection_dim=64 * HEADS, pooled_projection_dim=POOLED, pos_embed_max_size=LATENT // 2,
        dual_attention_layers=(0, 1), qk_norm="rms_norm")
    return randomise(model, scale=0.03).to(dtype)


def make_ours(dtype: torch.dtype) -> MMDiT:
    """With the weights of `make_theirs`."""
    ours = MMDiT(MMDiTConfig(16, 2, 64 * HEADS, DEPTH, HEADS, CONTEXT, POOLED, LATENT // 2, LATENT // 2,
                             qk_norm=True, dual_attention_layers=(0, 1)))
    theirs, layers, state = make_theirs(dtype).state_dict(), mmdit_layers(DIFFUSERS, DEPTH), {}
    for name in ours.state_dict():
        layer, _, last = name.rpartition(".")
        source, _, how = layers[layer].removesuffix("]").partition("[")
        state[name] = take(theirs[f"{source}.{last}"], how)
    ours.load_state_dict(state)
    return ours.to(dtype).requires_grad_(False).eval()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def forward_ratios(dtype: torch.dtype, backward: bool, pairs: int) -> tuple[float, float, float]:
    """Median seconds of theirs and of ours, and the median of the pairs' ratios."""
    theirs, ours = make_theirs(dtype).requires_grad_(backward), make_ours(dtype).requires_grad_(backward)
    x, context = draw(2, 16, LATENT, LATENT).to(dtype), draw(2, TOKENS, CONTEXT).to(dtype)
    pooled, t = draw(2, POOLED).to(dtype), torch.full((2,), 0.5)

    def run_theirs() -> torch.Tensor:
        return theirs(x, timestep=t * 1000, encoder_hidden_states=context, pooled_projections=pooled).sample

    def run_ours() -> torch.Tensor:
        return ours(x, t, context, pooled)

    def run(call: Callable[[], torch.Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            out = call()
            if backward:
                out.float().square().mean().backward()

    run(run_theirs), run(run_ours)
    a, b = [], []
    for n in range(pairs):
        order = ((a, run_theirs), (b, run_ours))
        for times, call in order if n % 2 else order[::-1]:
            times.append(seconds(partial(run, call)))
    return median(a), median(b), median(x / y for x, y in zip(a, b))


@dataclass
class Inputs:
    """What a step is given: two references, encoded."""
    batch: int = 2

    def __post_init__(self):
        self.x_0 = draw(self.batch, 16, LATENT, LATENT)
        self.texts = Texts(self.text(0, True), self.text(1, False), self.text(2, True), self.text(3, False))

    def text(self, seed: int, with_token: bool) -> Text:
        slots = torch.zeros(self.batch, TOKENS).bool()
        slots[:, [2, 79]] = with_token
        return Text(draw(self.batch, TOKENS, CONTEXT, seed=seed), draw(self.batch, POOLED, seed=seed), slots)

    def noisy(self, step: int) -> Batch:
        t = sample_times(self.batch, 3.0, torch.Generator().manual_seed(step))
        return noised(self.x_0, draw(*self.x_0.shape, seed=step), t, self.texts)


def our_step(dtype: torch.dtype) -> Callable[[int], None]:
    inputs, pipe = Inputs(), Pipeline(None, None, make_ours(dtype), None, LATENT)
    theta_1, theta_2 = (Branch.fresh(pipe, draw(DEPTH, 64 * HEADS), rank=4) for _ in range(2))
    theta_1.requires_grad_(False)
    optimizer = torch.optim.AdamW(theta_2.parameters(), lr=1e-4)

    def step(n: int) -> None:
        loss, _ = pcc_loss(theta_1, theta_2, inputs.noisy(n), eta=1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theta_2.parameters(), 1.0)
        optimizer.step()
    return step


def encoders(dtype: torch.dtype) -> Callable[[], None]:
    """One batch of texts through two CLIPs and a T5, as released; small, in about the real ones' ratios."""
    clips = [randomise(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP))).to(dtype) for _ in range(2)]
    t5, ids = randomise(T5EncoderModel(T5Config(**T5))).to(dtype), torch.arange(2 * 77).view(2, 77)

    @torch.no_grad()
    def encode() -> None:
        for clip in clips:
            clip(ids, output_hidden_states=True)
        t5(ids)
    return encode


def released_step(dtype: torch.dtype, cached: bool, shared: bool) -> Callable[[int], None]:
    inputs = Inputs()
    complete, base, target, null = inputs.texts
    model = make_theirs(dtype)
    frozen = model if shared else make_theirs(dtype)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    encode = None if cached else encoders(dtype)
    vae = None if cached else small_vae((32, 64, 128, 128), layers=2, groups=32)
    pictures = draw(2, 3, 8 * LATENT, 8 * LATENT)

    def predict(transformer, batch: Batch, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
        text = Text.cat(texts)
        x_t, timestep = torch.cat([batch.x_t] * 2).to(dtype), torch.cat([batch.t] * 2) * 1000
        v = transformer(x_t, timestep=timestep, encoder_hidden_states=text.context.to(dtype),
                        pooled_projections=text.pooled.to(dtype)).sample
        return v.float().chunk(2)

    def step(n: int) -> None:
        if not cached:
            for _ in range(4):
                encode()
            with torch.no_grad():
                vae.encode(pictures).latent_dist.sample()
        batch = inputs.noisy(n)
        v_complete, v_base = predict(model, batch, [complete, base])
        with torch.no_grad():
            if shared:
                model.disable_adapters()
            v_target, v_null = predict(frozen, batch, [target, null])
            if shared:
                model.enable_adapters()
        loss = squared_error(v_complete, batch.v) + squared_error(v_complete, v_base + v_target - v_null)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return step


STEPS = {"ours": our_step, "released": partial(released_step, cached=False, shared=False),
         "released, encodings cached": partial(released_step, cached=True, shared=False),
         "released, cached, one transformer": partial(released_step, cached=True, shared=True)}


def resident(entry: str) -> int:
    """VmRSS, this process's memory, or VmHWM, its peak, in bytes (Linux).

    getrusage's peak holds the parent's too.
    """
    return 1024 * int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def time_step(name: str, dtype: torch.dtype, steps: int) -> tuple[float, int]:
    """Median seconds a step, and the peak memory above that of the process before, in bytes."""
    before = resident("VmRSS")
    step = STEPS[name](dtype)
    step(0)
    times = [seconds(partial(step, n)) for n in range(1, steps + 1)]
    return median(times), resident("VmHWM") - before


def forward_table(dtype: torch.dtype, pairs: int) -> None:
    print("| MMDiT | diffusers (s) | ours (s) | ratio |\n|---|---|---|---|")
    for backward in (False, True):
        theirs, ours, ratio = forward_ratios(dtype, backward, pairs)
        title = "forward + backward" if backward else "forward"
        print(f"| {title}, {str(dtype)[6:]} | {theirs:.3f} | {ours:.3f} | {ratio:.2f} |", flush=True)


def step_table(dtype: torch.dtype, steps: int, rounds: int) -> None:
    """Each round runs every step once, one after the other; ratios are within a round."""
    rows = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name in STEPS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows[name].append(pool.submit(time_step, name, dtype, steps).result())
    print("| step of stage 2 | s | ratio to ours | peak memory (MB) | ratio to ours |\n|---|---|---|---|---|")
    for name, runs in rows.items():
        paired = list(zip(runs, rows["ours"]))
        time_ratio, memory_ratio = (median(run[n] / ours[n] for run, ours in paired) for n in range(2))
        duration, memory = (median(run[n] for run in runs) for n in range(2))
        print(f"| {name}, {str(dtype)[6:]} | {duration:.3f} | {time_ratio:.2f} | {memory / 1e6:.0f} "
              f"| {memory_ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15,
                        help="pairs of runs, or steps, in fp32; in bf16 a fifth of them (%(default)s)")
    pairs = parser.parse_args().pairs
    print(f"CPU, {torch.get_num_threads()} threads; depth {DEPTH}, width {64 * HEADS}, {TOKENS} text tokens, "
          f"{LATENT} x {LATENT} latents, batch 2\n")
    for dtype, count, rounds in ((torch.float32, pairs, 3), (torch.bfloat16, max(1, pairs // 5), 1)):
        forward_table(dtype, count)
        print()
        step_table(dtype, count, rounds)
        print()
    models = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)), T5EncoderModel(T5Config(**T5))
    clip, t5 = (sum(parameter.numel() for parameter in model.parameters()) / 1e6 for model in models)
    print(f"As released, each step reads {4 * 2} texts with two CLIPs of {clip:.0f} M parameters and a T5 of "
          f"{t5:.0f} M (SD3.5: 124 M, 695 M and 4,762 M), and 2 pictures with a VAE of a quarter the width.")


if __name__ == "__main__":
    main()

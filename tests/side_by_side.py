"""This project against diffusers and peft, in one run on this machine's CPU: pairs of runs, ratios, medians.

    python -m tests.side_by_side                 about 15 minutes on 2 cores, most of it in bf16

1. MMDiT forward, and forward + backward, against SD3Transformer2DModel with the same random weights.
2. A step of stage 2 against the step of the authors' released code, replayed on diffusers + peft: complete
and base texts with the gradient through both, target and empty texts without adapter and gradient, two
losses, clipping, AdamW; as released (texts and pictures encoded anew in each step, two transformers in
memory), with encodings cached, and with one shared transformer besides. Each runs in a process of its own,
which also gives its peak memory. A ratio above 1 says that the peer is slower, or takes more.
"""

import contextlib
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
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
from tests.public import small_vae
from tinyflow.flow import squared_error, training_times
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline, Text
from tinyflow.sd3.checkpoint import take
from tinyflow.sd3.layouts import DIFFUSERS, mmdit_layers

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
           "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]


def clip_of(width: int, depth: int, projection: int) -> dict:
    return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
                num_attention_heads=width // 64, projection_dim=projection)


def t5_of(width: int, hidden: int, depth: int) -> dict:
    return dict(vocab_size=32128, d_model=width, d_kv=64, d_ff=hidden, num_layers=depth,
                num_heads=width // 64, feed_forward_proj="gated-gelu")


@dataclass(frozen=True)
class Case:
    """How large the models are, and where they run."""
    depth: int = 4
    heads: int = 8                               # of 64 numbers each
    dual: tuple[int, ...] = (0, 1)
    tokens: int = 154                            # of a text
    latent: int = 32                             # a side
    batch: int = 2
    clips: tuple[dict, dict] = (clip_of(512, 6, 256), clip_of(512, 6, 256))
    t5: dict = field(default_factory=partial(t5_of, 1024, 2816, 8))
    vae: tuple[int, ...] = (32, 64, 128, 128)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> MMDiTConfig:
        pooled = sum(clip["projection_dim"] for clip in self.clips)
        return MMDiTConfig(16, 2, 64 * self.heads, self.depth, self.heads, self.t5["d_model"], pooled,
                           self.latent // 2, self.latent // 2, qk_norm=True, dual_attention_layers=self.dual)

    def draw(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @contextlib.contextmanager
    def building(self):
        """Models are made in place and in this precision: twice as much would not fit on a card."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                yield
        finally:
            torch.set_default_dtype(before)


def make_theirs(case: Case) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    config = case.config
    with case.building():
        model = SD3Transformer2DModel(
            sample_size=case.latent, num_layers=case.depth, num_attention_heads=case.heads,
            joint_attention_dim=config.context_width, caption_projection_dim=config.width, out_channels=16,
            pooled_projection_dim=config.pooled_width, pos_embed_max_size=case.latent // 2,
            dual_attention_layers=case.dual, qk_norm="rms_norm")
    model.pos_embed.to(case.dtype)               # its positions are in fp32 at first
    return model.requires_grad_(False).eval()


def make_ours(case: Case, theirs: SD3Transformer2DModel) -> MMDiT:
    """With the weights of `theirs`: the same tensors, where both have the same layout."""
    with torch.device("meta"):
        ours = MMDiT(case.config)
    theirs, layers, state = theirs.state_dict(), mmdit_layers(DIFFUSERS, case.depth), {}
    for name in ours.state_dict():
        layer, _, last = name.rpartition(".")
        source, _, how = layers[layer].removesuffix("]").partition("[")
        state[name] = take(theirs[f"{source}.{last}"], how)
    ours.load_state_dict(state, assign=True)
    ours.positions = theirs["pos_embed.pos_embed"].unflatten(1, (case.latent // 2,) * 2)[0]
    return ours.requires_grad_(False).eval()


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def forward_ratios(case: Case, backward: bool, pairs: int) -> tuple[float, float, float, float]:
    """Median seconds of theirs and of ours, the median of the pairs' ratios, and how far the two
    predictions are apart, relative. The backward pass goes to the inputs: the weights are frozen, as they are
    when a concept is learned.
    """
    theirs = make_theirs(case)
    ours, config = make_ours(case, theirs), case.config
    x, context = (case.draw(*shape).to(case.dtype).requires_grad_(backward) for shape in (
        (case.batch, 16, case.latent, case.latent), (case.batch, case.tokens, config.context_width)))
    pooled, t = case.draw(case.batch, config.pooled_width).to(case.dtype), torch.full((case.batch,), 0.5)
    t = t.to(case.device)

    def run(is_ours: bool) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            out = ours(x, t, context, pooled) if is_ours else theirs(
                x, timestep=t * 1000, encoder_hidden_states=context, pooled_projections=pooled).sample
            if backward:
                out.float().square().mean().backward()
        return out.detach().float()

    first, second = run(False), run(True)
    times = [], []
    for n in range(pairs):
        for is_ours in (n % 2 == 0, n % 2 == 1):             # who is first takes turns
            times[is_ours].append(seconds(partial(run, is_ours), case.device))
    apart = ((first - second).norm() / first.norm()).item()
    return median(times[0]), median(times[1]), median(x / y for x, y in zip(*times)), apart


class Inputs:
    """What a step is given: two references, encoded."""

    def __init__(self, case: Case):
        self.case = case
        self.x_0 = case.draw(case.batch, 16, case.latent, case.latent)
        self.texts = Texts(self.text(0, True), self.text(1, False), self.text(2, True), self.text(3, False))

    def text(self, seed: int, with_token: bool) -> Text:
        case, config = self.case, self.case.config
        slots = torch.zeros(case.batch, case.tokens, device=case.device).bool()
        slots[:, [2, 79]] = with_token
        return Text(case.draw(case.batch, case.tokens, config.context_width, seed=seed),
                    case.draw(case.batch, config.pooled_width, seed=seed), slots, slots)

    def noisy(self, step: int) -> Batch:
        t = training_times(self.case.batch, 3.0, torch.Generator().manual_seed(step)).to(self.case.device)
        return noised(self.x_0, self.case.draw(*self.x_0.shape, seed=step), t, self.texts)


def our_step(case: Case) -> Callable[[int], None]:
    inputs, config = Inputs(case), case.config
    pipe = Pipeline(None, None, make_ours(case, make_theirs(case)), None, 8 * case.latent)
    theta_1, theta_2 = (Branch.fresh(pipe, case.draw(case.depth, config.width), rank=4) for _ in range(2))
    theta_1.requires_grad_(False)
    optimizer = torch.optim.AdamW(theta_2.parameters(), lr=1e-4)

    def step(n: int) -> None:
        loss, _ = pcc_loss(theta_1, theta_2, inputs.noisy(n), eta=1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theta_2.parameters(), 1.0)
        optimizer.step()
    return step


def encoders(case: Case) -> Callable[[], None]:
    """One batch of texts through two CLIPs and a T5, as released."""
    with case.building():
        clips = [CLIPTextModelWithProjection(CLIPTextConfig(**clip)).to(case.dtype) for clip in case.clips]
        t5 = T5EncoderModel(T5Config(**case.t5)).to(case.dtype)
        ids = torch.arange(case.batch * 77).view(case.batch, 77)

    @torch.no_grad()
    def encode() -> None:
        for clip in clips:
            clip(ids, output_hidden_states=True)
        t5(ids)
    return encode


def released_step(case: Case, cached: bool, shared: bool) -> Callable[[int], None]:
    inputs = Inputs(case)
    complete, base, target, null = inputs.texts
    model = make_theirs(case)
    frozen = model if shared else make_theirs(case)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    encode = None if cached else encoders(case)
    vae = None if cached else small_vae(case.vae, layers=2, groups=32).to(case.device)
    pictures = case.draw(case.batch, 3, 8 * case.latent, 8 * case.latent)

    def predict(transformer, batch: Batch, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
        text = Text.cat(texts)
        x_t, timestep = torch.cat([batch.x_t] * 2).to(case.dtype), torch.cat([batch.t] * 2) * 1000
        v = transformer(x_t, timestep=timestep, encoder_hidden_states=text.context.to(case.dtype),
                        pooled_projections=text.pooled.to(case.dtype)).sample
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


def time_step(name: str, case: Case, steps: int) -> tuple[float, int]:
    """Median seconds a step, and the peak memory above that of the process before, in bytes."""
    before, step = resident("VmRSS"), STEPS[name](case)
    step(0)
    times = [seconds(partial(step, n), case.device) for n in range(1, steps + 1)]
    on_card = case.device == "cuda"
    return median(times), torch.cuda.max_memory_allocated() if on_card else resident("VmHWM") - before


def in_a_process(call: Callable, *args):
    """The result of call(*args), in a new process: it alone has the memory, and gives all of it back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def forward_table(case: Case, pairs: int) -> None:
    print("| MMDiT | diffusers (s) | ours (s) | ratio |\n|---|---|---|---|")
    for backward in (False, True):
        theirs, ours, ratio, _ = forward_ratios(case, backward, pairs)
        title = "forward + backward to the inputs" if backward else "forward"
        print(f"| {title}, {str(case.dtype)[6:]} | {theirs:.3f} | {ours:.3f} | {ratio:.2f} |", flush=True)


def step_table(case: Case, steps: int, rounds: int) -> None:
    """Each round runs every step once, one after the other; ratios are within a round."""
    rows = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name in STEPS:
            rows[name].append(in_a_process(time_step, name, case, steps))
    print("| step of stage 2 | s | ratio to ours | peak memory (MB) | ratio to ours |\n|---|---|---|---|---|")
    for name, runs in rows.items():
        paired = list(zip(runs, rows["ours"]))
        time_ratio, memory_ratio = (median(run[n] / ours[n] for run, ours in paired) for n in range(2))
        duration, memory = (median(run[n] for run in runs) for n in range(2))
        print(f"| {name}, {str(case.dtype)[6:]} | {duration:.3f} | {time_ratio:.2f} | {memory / 1e6:.0f} "
              f"| {memory_ratio:.2f} |", flush=True)


def main() -> None:
    case = Case()
    print(f"CPU, {torch.get_num_threads()} threads; depth {case.depth}, width {case.config.width}, "
          f"{case.tokens} text tokens, {case.latent} x {case.latent} latents, batch {case.batch}\n")
    for dtype, pairs, rounds in ((torch.float32, 15, 3), (torch.bfloat16, 3, 1)):
        forward_table(replace(case, dtype=dtype), pairs)
        print()
        step_table(replace(case, dtype=dtype), pairs, rounds)
        print()


if __name__ == "__main__":
    main()

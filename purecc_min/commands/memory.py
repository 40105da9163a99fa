"""What a training step needs on the card: the real step, run once on the meta device, before anything loads.

Tensors on the meta device have shapes and dtypes but no values, so SD3.5 Medium takes seconds and no memory
there, and `PeakMemory` sees every tensor that the step would make. It counts tensors only. What it cannot
see is in OVERHEAD, which is an assumption and has not been measured on a card: what a kernel borrows while
it runs (flash attention's backward pass: 4 bytes a value of q), what the allocator rounds up, and CUDA's
own context. The count has been compared with steps on a CPU. The optimizer's own step is left out, because
the activations are gone by then.
"""

import argparse
import contextlib
import os
import weakref
from bisect import bisect_right
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from purecc_min.branch import Branch, Thetas
from purecc_min.concept import EncodedConcept, Texts
from purecc_min.methods import Method
from purecc_min.pairs import IMAGINED
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig, draw_batch, optimizer_for
from tinyflow.errors import InputError
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline, Text
from tinyflow.sd3.encoder import SD3Encoder
from tinyflow.sd3.load import SD35_MEDIUM
from tinyflow.sd3.offload import offload
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.vae import VAE, VAEConfig

OVERHEAD = 600_000_000                           # bytes, assumed: CUDA's context and the allocator's slack
TOKENS = 77 + 256                                # of a text in SD3.5: CLIP's, then T5's
REFERENCES = 8                                   # in a usual custom set; their encoded texts lie on the card
SMALLEST = 256                                   # px that are worth suggesting
SDPA = F.scaled_dot_product_attention


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that operations in this context allocate: `now` those alive, `peak` the most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given, made = (leaf_storages(tree) for tree in ((args, kwargs), out))
        for storage in (made[key] for key in made.keys() - given.keys()):        # a view makes nothing new
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size: int) -> None:
        self.now -= size


def leaf_storages(tree) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in nested tuples, lists and dicts, by their ids."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {id(x.untyped_storage()): x.untyped_storage() for x in tensors}


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, is_causal: bool = False,
          scale: float | None = None) -> Tensor:
    """What SDPA does on CUDA.

    On the meta device it would fall back to N x N scores, which no card ever holds.
    """
    if not q.is_meta or bias is not None:
        return SDPA(q, k, v, bias, is_causal=is_causal, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal, scale=scale)[0]


@contextlib.contextmanager
def flash_attention():
    """Within this context SDPA is `flash`."""
    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = SDPA


class Memory(NamedTuple):
    """Bytes."""
    weights: int                                 # the frozen transformer and autoencoder
    adapters: int                                # theta_1 and, in stage 2, theta_2: LoRA and Y, in fp32
    optimizer: int                               # AdamW's two moments, and the gradients
    activations: int                             # the most that exists above all that during a step
    pictures: int                                # the most above the weights, as a picture is encoded
    texts: int                                   # the most above the weights, as texts are encoded

    @property
    def total(self) -> int:
        step = self.adapters + self.optimizer + self.activations
        return self.weights + max(step, self.pictures, self.texts) + OVERHEAD      # one after the other


@cache
def encoding_memory() -> int:
    """The most that encoding the references' texts with CLIP-L, CLIP-G and T5 takes: see sd3/offload.py."""
    with torch.device("meta"):
        encoders = [TextEncoder(TextConfig(49408, 77, width, depth, width // 64, 4 * width, width))
                    for width, depth in ((768, 12), (1280, 32))] + [T5Encoder(T5Config())]
        encoder = SD3Encoder(*(offload(part.half().requires_grad_(False)) for part in encoders),
                             context_width=4096)
        ids = torch.zeros(REFERENCES, 77 + 77 + 256, dtype=torch.long)
    with PeakMemory() as memory:
        encoder(ids)
    return memory.peak


def dry_run(config: MMDiTConfig, train: TrainConfig, size: int, stage: int = 2, checkpointing: bool = False,
            tokens: int = TOKENS, autoencoder: VAEConfig = VAEConfig(), dtype: torch.dtype = torch.bfloat16,
            device: str = "meta", method: Method = METHODS["paper"]) -> Memory:
    """The memory of a training step.

    Args:
        train: its batch, rank and eta count. size: px. tokens: of a text. dtype: of the transformer.
        device: on "cpu" or "cuda" the same step really runs, which checks the count.
        method: what is learned how. A method without an extractor has stage 1 alone.
    """
    with flash_attention(), PeakMemory() as memory:
        with torch.device(device):
            codec = VAE(autoencoder).requires_grad_(False)
            latent = size // codec.factor
            positions = replace(config, max_grid=latent // config.patch)           # as many as a loader keeps
            mmdit = MMDiT(positions).to(dtype).requires_grad_(False)
            mmdit.checkpointing = checkpointing
            weights = memory.peak = memory.now
            codec.decode(codec.encode(torch.zeros(1, 3, size, size)))
            pictures = memory.peak - weights

            pipe = Pipeline(None, None, mmdit, codec, size)                        # it encodes no texts
            trained = method if stage == 2 else method.extractor or method
            branches = [empty_branch(pipe, each, train.rank)
                        for each in ([method.extractor, method] if stage == 2 else [trained])]
            branches[-1].lora.requires_grad_(trained.adapters)
            adapters = memory.now - weights
        theta_1, theta = branches[0], branches[-1]
        optimizer = optimizer_for(theta, train)
        for parameter in theta.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()                                                           # makes the moments
        before = memory.peak = memory.now

        data = empty_data(config, train, latent, tokens, device)                   # stays on the card
        without = memory.now
        if trained.imagines:
            data = data._replace(imagined=empty_data(config, train, latent, tokens, device, imagined=True))
        scenes = memory.now - without                          # they are there while other things are encoded
        batch = draw_batch(data, train, stage, 0, pipe.shift)
        loss, _ = trained.loss(Thetas(pipe.velocity, theta_1, theta), batch, train.eta)
        optimizer.zero_grad()
        loss.backward()
    return Memory(weights, adapters, before - weights - adapters, memory.peak - before, pictures + scenes,
                  encoding_memory() + scenes)


def empty_branch(pipe: Pipeline, method: Method, rank: int) -> Branch:
    Y = torch.zeros(pipe.mmdit.config.depth, pipe.mmdit.config.width) if method.embeddings else None
    return Branch.fresh(pipe, Y, rank, where=method.where)


def empty_data(config: MMDiTConfig, train: TrainConfig, latent: int, tokens: int, device: str,
               imagined: bool = False) -> EncodedConcept:
    """A custom set, or the imagined scenes of pairs.py, all zeros."""
    count = max(2 * IMAGINED if imagined else REFERENCES, train.batch)

    zeros = partial(torch.zeros, device=device)

    def text() -> Text:
        context, pooled = zeros(count, tokens, config.context_width), zeros(count, config.pooled_width)
        return Text(context, pooled, *zeros(2, count, tokens, dtype=torch.long))

    variants, complete, base = zeros(count, 1, config.channels, latent, latent), text(), text()
    if imagined:
        masks = zeros(count, 1, 1, latent, latent)
        return EncodedConcept([], variants, Texts(complete, base, base, base), base, masks)
    return EncodedConcept([], variants, Texts(complete, base, text(), text()), text())


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def memory_table(config: MMDiTConfig) -> str:
    """What SD3.5 needs, in Markdown, for the last stage of three methods."""
    names = " | ".join(Memory._fields)
    lines = [f"| method | px | batch | gradient checkpointing | {names} | total (GB) |", "|" + "---|" * 11]
    cases = list(product(("paper", "bound", "bound-pairs"), (512, 1024), (1, 2), (False, True)))
    for name, size, batch, checkpointing in tqdm(cases, desc="dry runs", leave=False):
        method = METHODS[name]
        memory = dry_run(config, TrainConfig(batch=batch), size, method.stages, checkpointing, method=method)
        numbers = " | ".join(f"{part / 1e9:.2f}" for part in (*memory, memory.total))
        lines.append(f"| {name} | {size} | {batch} | {'on' if checkpointing else 'off'} | {numbers} |")
    lines += ["", f"Each total holds {gigabytes(OVERHEAD)} for CUDA's context and the allocator, an "
                  f"assumption, and the largest of a step, of a picture and of {REFERENCES} texts, which "
                  "never meet. lora, and stage 1 of an extractor, need what paper needs less a set of "
                  "adapters."]
    return "\n".join(lines)


def memory_command(options: argparse.Namespace) -> None:
    print(memory_table(SD35_MEDIUM))


def fit(config: MMDiTConfig, train: TrainConfig, size: int, method: Method, free: int) -> bool:
    """How a method's last stage fits into `free` bytes: False as it is, True with gradient checkpointing.

    Args:
        free: what the card has before this program touches it. As torch.cuda.mem_get_info() tells it, CUDA's
            context is already taken off, and it is counted once more in OVERHEAD: that errs on the safe side.
    Raises: InputError that names the next smaller option if it fits in neither way.
    """
    def need(batch: int, size: int, checkpointing: bool = True) -> int:
        train_less = replace(train, batch=batch)
        return dry_run(config, train_less, size, method.stages, checkpointing, method=method).total

    if need(train.batch, size, checkpointing=False) <= free:
        return False
    least = need(train.batch, size)
    if least <= free:
        return True
    smaller = [*product([1], range(SMALLEST, size, 64)), *product(range(1, train.batch), [size])]
    fitting = bisect_right(smaller, free, key=lambda case: need(*case))
    batch, px = smaller[fitting - 1] if fitting else (1, min(size, SMALLEST))
    option = f"--batch {batch}" + f" --size {px}" * (px < size or not fitting)
    advice = option if fitting else f"nothing smaller fits: the least, {option},"
    raise InputError(f"stage {method.stages} at {size} px, batch {train.batch} needs {gigabytes(least)} with "
                     f"gradient checkpointing and the card has {gigabytes(free)}; {advice} needs "
                     f"{gigabytes(need(batch, px))}")


def free_memory(device: torch.device) -> int:
    """Bytes that the device has left; without CUDA, those of the machine, or 16 GB if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):
        return 16 * 10**9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan(config: MMDiTConfig, train: TrainConfig, size: int, method: Method, device: torch.device) -> bool:
    """Prints what learning will need, before anything is loaded. Returns whether with gradient checkpointing.

    Raises: InputError as `fit` does.
    """
    free = free_memory(device)
    checkpointing = fit(config, train, size, method, free)
    memory = dry_run(config, train, size, method.stages, checkpointing, method=method)
    parts = ", ".join(f"{name} {gigabytes(part)}" for name, part in memory._asdict().items())
    switch = "on" if checkpointing else "off"
    print(f"memory: {gigabytes(memory.total)} of {gigabytes(free)} with gradient checkpointing {switch} "
          f"({parts})")
    return checkpointing

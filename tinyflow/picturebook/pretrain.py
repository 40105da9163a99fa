"""Pretraining of the tiny base model on the picture-book world, with the plain flow-matching loss (Eq. 3).

    python -m tinyflow.picturebook.pretrain --out runs/base

Several processes can share the work, with the same result up to rounding:

    torchrun --nproc_per_node 2 -m tinyflow.picturebook.pretrain --out runs/base

The pictures, captions, times and noise of step k depend on (seed, k) only, so an interrupted run goes on
where it stopped and ends where an uninterrupted one would. The weights that are kept are an exponential
moving average of the trained ones. Read next: reader.py.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from tinyflow.errors import InputError, report_errors
from tinyflow.flow import path, sample_times, squared_error, velocity_target
from tinyflow.picturebook import world
from tinyflow.picturebook.model import make_tiny
from tinyflow.pipeline import Pipeline, choose_device
from tinyflow.weights import (
    load_into,
    load_optimizer,
    load_tensors,
    optimizer_tensors,
    save_tensors,
    write_whole,
)


@dataclass(frozen=True)
class PretrainConfig:
    steps: int = 12000
    batch: int = 64
    learning_rate: float = 1.2e-3                # after `warmup` steps; then a cosine down to 2 % of it
    warmup: int = 400
    ema: float = 0.999                           # decay of the moving average, shorter at the start
    pictures: int = 40000                        # rendered once, before the first step
    seed: int = 0


def learning_rate(step: int, config: PretrainConfig) -> float:
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done)))


class Trainer:
    """The rendered pictures, the model, its moving average and the optimizer.

    `step(k)` does step k and returns its loss; `save` and `load` keep everything that changes. When several
    processes share each batch, this one is number `rank` of `processes`.
    """

    def __init__(self, config: PretrainConfig, device: str | torch.device, rank: int, processes: int,
                 compiled: bool):
        torch.manual_seed(config.seed)
        self.config, self.rank, self.processes = config, rank, processes
        rng = np.random.default_rng(config.seed)
        self.scenes = [world.seen_scene(rng) for _ in range(config.pictures)]
        self.pictures = np.stack([world.render(scene)[0]                                # [N, 32, 32, 3] uint8
                                  for scene in tqdm(self.scenes, "rendering", disable=rank > 0)])
        self.pipe, self.average = make_tiny().to(device), make_tiny().to(device).requires_grad_(False)
        self.average.load_state_dict(self.pipe.state_dict())
        self.mmdit = torch.compile(self.pipe.mmdit) if compiled else self.pipe.mmdit
        self.optimizer = torch.optim.AdamW(self.pipe.parameters(), betas=(0.9, 0.99), weight_decay=0.01,
                                           fused=True)

    def batch(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """This process's share of step k: data x_0 and noise x_1 [B, 3, 32, 32], times [B] and captions."""
        config, device = self.config, self.pipe.device
        generator = torch.Generator().manual_seed(config.seed * 10**9 + k)
        rng = np.random.default_rng((config.seed, k))
        chosen = torch.randint(len(self.scenes), (config.batch,), generator=generator).tolist()
        captions = [world.random_caption(self.scenes[n], rng) for n in chosen]
        t = sample_times(config.batch, self.pipe.shift, generator)
        x_1 = torch.randn((config.batch, 3, world.SIZE, world.SIZE), generator=generator)
        mine = slice(self.rank, None, self.processes)
        x_0 = self.pipe.encode_images(self.pictures[chosen[mine]])
        return x_0, x_1[mine].to(device), t[mine].to(device), captions[mine]

    def step(self, k: int) -> float:
        x_0, x_1, t, captions = self.batch(k)
        with torch.autocast(x_0.device.type, torch.bfloat16):
            text = self.pipe.encode_text(captions)
            v = self.mmdit(path(x_0, x_1, t), t, text.context, text.pooled)
        loss = squared_error(v, velocity_target(x_0, x_1))                              # Eq. 3
        loss.backward()
        if self.processes > 1:
            for parameter in self.pipe.parameters():
                dist.all_reduce(parameter.grad.div_(self.processes))
        torch.nn.utils.clip_grad_norm_(self.pipe.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate(k, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.config.ema, (k + 1) / (k + 10))
        for slow, fast in zip(self.average.parameters(), self.pipe.parameters()):
            slow.lerp_(fast.detach(), 1 - decay)
        return loss.item()

    def save(self, file: Path, k: int, seconds: float) -> None:
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {f"model.{name}": tensor for name, tensor in self.pipe.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        save_tensors(file, "tinyflow pretraining checkpoint", tensors,
                     {"step": k, "seconds": seconds, "config": asdict(self.config)})

    def load(self, file: Path) -> tuple[int, float]:
        """Returns the step to go on with and the seconds spent so far.

        Raises: InputError if the file is from another configuration.
        """
        tensors, facts = load_tensors(file, "tinyflow pretraining checkpoint")
        if facts["config"] != asdict(self.config):
            raise InputError(f"{file}: the run in this folder has another configuration; "
                             "choose another --out")
        for prefix, module in (("model.", self.pipe), ("average.", self.average)):
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            load_into(module, own, file)
        load_optimizer(self.optimizer, tensors)
        return facts["step"], facts["seconds"]


def sample_grid(pipe: Pipeline) -> Image.Image:
    """Eight objects on six backgrounds, enlarged: what the model has learned so far."""
    texts = []
    for row, background in enumerate(world.BACKGROUND_WORDS):
        columns = zip(world.OBJECTS, np.roll(list(world.COLOURS), row), ["big", "small"] * 4,
                      list(world.PLACES) * 3)
        texts += [world.caption(world.Scene(*column, background)) for column in columns]
    pictures = pipe.decode_images(pipe.sample(pipe.encode_text(texts), list(range(len(texts)))))
    grid = rearrange(pictures, "(row column) h w c -> (row h) (column w) c", column=8)
    return Image.fromarray(grid).resize((grid.shape[1] * 4, grid.shape[0] * 4), Image.NEAREST)


def pretrain(config: PretrainConfig, out: Path, device: str | torch.device, compiled: bool = False,
             save_every: int = 500, rank: int = 0, processes: int = 1) -> Iterator[tuple[int, float]]:
    """Trains and yields (step, loss) after each step.

    Leaves checkpoint, log and sample grids in `out`, and at the end base.safetensors. A run found there is
    continued. Raises: InputError if it has another configuration, and if the loss is not finite.
    """
    trainer = Trainer(config, device, rank, processes, compiled)
    checkpoint, log, first, seconds = out / "checkpoint.safetensors", [], 0, 0.0
    if checkpoint.exists():
        first, seconds = trainer.load(checkpoint)
        log = [line for line in (out / "log.jsonl").read_text().splitlines()
               if json.loads(line)["step"] <= first]
    begun, recent = time.time() - seconds, []
    for k in range(first, config.steps):
        loss = trainer.step(k)
        if not np.isfinite(loss):
            raise InputError(f"the loss is not finite at step {k}; {checkpoint} holds the last good state, "
                             "try a lower --learning-rate")
        recent.append(loss)
        if (k + 1) % save_every == 0 or k + 1 == config.steps:
            log.append(json.dumps({"step": k + 1, "loss": float(np.mean(recent)),
                                   "seconds": round(time.time() - begun)}))
            recent = []
            if rank == 0:
                write_whole(out / "log.jsonl", "\n".join([*log, ""]).encode())
                sample_grid(trainer.average).save(out / f"samples-{k + 1:06d}.png")
                trainer.save(checkpoint, k + 1, time.time() - begun)
        yield k, loss
    if rank == 0:
        facts = {"config": asdict(config), "seconds": round(time.time() - begun), "torch": torch.__version__,
                 "device": str(device)}
        halves = {name: tensor.half() for name, tensor in trainer.average.state_dict().items()}
        save_tensors(out / "base.safetensors", "tinyflow base", halves, facts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tinyflow.picturebook.pretrain",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for checkpoint, log, samples and the weights; a run found there goes on")
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps, help="training steps")
    parser.add_argument("--batch", type=int, default=PretrainConfig.batch,
                        help="pictures a step, over all processes")
    parser.add_argument("--learning-rate", type=float, default=PretrainConfig.learning_rate,
                        help="peak learning rate of AdamW")
    parser.add_argument("--pictures", type=int, default=PretrainConfig.pictures,
                        help="pictures rendered for training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures, captions and noise")
    parser.add_argument("--save-every", type=int, default=500,
                        help="steps between checkpoints and sample grids")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the MMDiT (needs a C++ compiler): about 1.2x faster on CPU")
    options = parser.parse_args(arguments)
    with report_errors():
        rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = choose_device(options.device)
        if processes > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        config = PretrainConfig(options.steps, options.batch, options.learning_rate,
                                pictures=options.pictures, seed=options.seed)
        steps = pretrain(config, options.out, device, options.compile, options.save_every, rank, processes)
        with tqdm(total=config.steps, desc="pretraining", disable=rank > 0) as bar:
            for k, loss in steps:
                bar.update(k + 1 - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if processes > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

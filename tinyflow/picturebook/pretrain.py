"""Pretraining of the tiny base model on the picture-book world, with the plain flow-matching loss (Eq. 2).

    python -m tinyflow.picturebook.pretrain --out runs/base-1
    python -m tinyflow.picturebook.pretrain --out runs/2 --seed 2 --start runs/base-1/base.safetensors

The second line is a second stage: it starts from the weights of the first, on new pictures. It needs a
trained codec; the latents of all pictures are computed once and saved in the same folder. Read next:
reader.py.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tinyflow.device import choose_device
from tinyflow.flow import path, squared_error, training_times, velocity_target
from tinyflow.picturebook import world
from tinyflow.picturebook.model import SHIPPED, load_base, load_codec, make_tiny
from tinyflow.picturebook.render import render_all
from tinyflow.picturebook.training import LATER, Config, Training, fast_precision, follow, parser_of, stage
from tinyflow.pipeline import Pipeline, to_pixels
from tinyflow.terminal import add_device, file_path, positive, report_errors
from tinyflow.weights import load_tensors, save_tensors, tensor_hash

BASE = Config(16000, 1.2e-3, warmup=300, flat=.6, seed=1)
# Layers that a matrix step does not suit: the first, the last, and those that time and text modulate with.
BY_ADAM = ("embedding", "embedder", "final_linear", "adaln", "projection")
AHEAD = {}                                       # of the DataLoader on a card: other processes make batches
if hasattr(os, "fork"):                          # not on Windows
    AHEAD = {"num_workers": min(6, os.cpu_count()), "multiprocessing_context": "fork"}


class Pretraining(Training):
    """The latents and scenes of the training pictures, and the model. The codec stays as it is."""
    name = "base"

    def __init__(self, config: Config, pipe: Pipeline, out: Path, compiled: bool = False):
        torch.manual_seed(config.seed)
        rng = np.random.default_rng(config.seed)
        self.scenes = [world.seen_scene(rng) for _ in range(config.pictures)]
        self.codec = pipe.codec.requires_grad_(False)
        self.latents = self.load_latents(config, pipe, out / "latents.safetensors")
        del pipe.codec                           # what is left is what is trained
        super().__init__(config, pipe, BY_ADAM)
        self.mmdit = torch.compile(pipe.mmdit) if compiled else pipe.mmdit
        self.batches = None

    def load_latents(self, config: Config, pipe: Pipeline, file: Path) -> Tensor:
        """[N, C, h, w] in fp16, of all scenes' pictures."""
        codec = tensor_hash(pipe.codec.state_dict())
        facts = {"codec": codec, "pictures": config.pictures, "seed": config.seed}
        if not (file.exists() and load_tensors(file, "tinyflow latents")[1] == facts):
            pictures, latents = render_all(self.scenes)[0], []
            for n in tqdm(range(0, config.pictures, 16), "latents"):
                latents.append(self.codec.encode(to_pixels(pictures[n:n + 16]).to(pipe.device)).half().cpu())
            save_tensors(file, "tinyflow latents", {"latents": torch.cat(latents)}, facts)
        return load_tensors(file, "tinyflow latents")[0]["latents"]

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Step k: data x_0 and noise x_1 [B, C, h, w], times [B] and captions."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 10**9 + k)
        rng = np.random.default_rng((config.seed, k))
        chosen = torch.randint(len(self.scenes), (config.batch,), generator=generator)
        captions = [world.random_caption(self.scenes[n], rng) for n in chosen.tolist()]
        t = training_times(config.batch, self.model.shift, generator)
        x_0 = self.latents[chosen].float()
        x_1 = torch.randn(x_0.shape, generator=generator)
        return x_0, x_1, t, captions

    def loss(self, k: int) -> Tensor:
        """k must increase by 1. On a GPU, worker processes prepare batches: one costs as much as a step."""
        device = self.model.device
        if self.batches is None:
            ahead = AHEAD if device.type == "cuda" else {}
            self.batches = iter(DataLoader(self, None, sampler=range(k, self.config.steps), **ahead))
        *tensors, captions = next(self.batches)
        x_0, x_1, t = (tensor.to(device) for tensor in tensors)
        with fast_precision(device):
            text = self.model.encode_text(captions)
            v = self.mmdit(path(x_0, x_1, t), t, text.context, text.pooled)
        return squared_error(v, velocity_target(x_0, x_1))                              # Eq. 2

    def report(self, out: Path, k: int) -> dict:
        """Leaves a page of samples, too."""
        self.average.codec = self.codec
        sample_page(self.average.eval()).save(out / f"samples-{k:06d}.png")
        del self.average.codec
        return super().report(out, k)


def sample_page(pipe: Pipeline) -> Image.Image:
    """32 pictures of held-out scenes that the model draws from their full captions."""
    rng = np.random.default_rng(9)
    scenes = [world.seen_scene(rng, n % 2 == 0) for n in range(32)]
    text = pipe.encode_text([world.caption(scene, said=world.ALL_PARTS) for scene in scenes])
    pictures = pipe.decode_images(pipe.sample(text, list(range(32)), steps=14))
    grid = rearrange(pictures, "(row column) h w c -> (row h) (column w) c", column=8)
    return Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.NEAREST)


def begin(start: Path | None, codec: Path | None, seed: int) -> Pipeline:
    """The model as a stage finds it: new, or with trained weights. codec: by default an untrained one."""
    torch.manual_seed(seed)
    pipe = make_tiny()
    if codec:
        pipe.codec = load_codec(codec)
    if start:
        load_base(pipe, start)
    return pipe.requires_grad_(True)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("pretrain", __doc__, BASE)
    parser.add_argument("--full-rates", action="store_true",
                        help="with --start: a long stage, with the learning rates of a first one")
    parser.add_argument("--codec", type=file_path, default=SHIPPED / "codec.safetensors",
                        help="the codec's weights")
    parser.add_argument("--batch", type=positive, default=BASE.batch, help="pictures per step")
    parser.add_argument("--pictures", type=positive, default=BASE.pictures,
                        help="pictures rendered for training")
    parser.add_argument("--save-every", type=positive, default=500,
                        help="steps between checkpoints and samples")
    add_device(parser)
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the MMDiT (needs a C++ compiler): about 1.2x faster on CPU")
    options = parser.parse_args(arguments)
    with report_errors(goes_on=True):
        device = choose_device(options.device)
        pipe = begin(options.start, options.codec, options.seed)
        config = replace(BASE, batch=options.batch, pictures=options.pictures)
        config = stage(config, options, pipe, {} if options.full_rates else LATER)
        training = Pretraining(config, pipe.to(device), options.out, options.compile)
        follow(training, options.out, options.save_every)


if __name__ == "__main__":
    main()

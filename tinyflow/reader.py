"""The reader: a small convolutional network that reads a picture of the world back.

It stands in for what is used on photographs: SAM (the object's mask), CLIP and DINO (what it is, and how alike two things are). It is trained
on the renderer, decorations included, so it knows far more kinds of things than the base model has ever drawn.

    python -m tinyflow.reader train --out runs/reader      makes reader.safetensors
    python -m tinyflow.reader check                        how well it reads renders, and how well the base model draws what it is told
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from tinyflow import world
from tinyflow.errors import report_errors
from tinyflow.pipeline import Pipeline, choose_device
from tinyflow.weights import SHIPPED, load_into, load_tensors, save_tensors

SCENE = {"size": list(world.SIZES), "place": list(world.PLACES), "background": list(world.BACKGROUND_WORDS)}
IDENTITY = {"object": list(world.OBJECTS), "colour": list(world.COLOURS), "marking": list(world.MARKINGS),
            "accent": list(world.COLOURS), "topper": list(world.TOPPERS), "eyes": list(world.EYES)}
LOOK = {"light": list(world.LIGHTS), "style": list(world.STYLES)}
HEADS = SCENE | IDENTITY | LOOK
FACES = ("robot", "fish", "cat", "star")         # only these have eyes to count
COLOURLESS = ("sepia", "blueprint")              # styles in which neither colour nor light can be told


@dataclass
class Reading:
    """What the reader sees in B pictures."""
    logits: dict[str, Tensor]                    # head -> [B, options]
    mask: Tensor                                 # [B, H, W] logits: above 0 is the object
    identity: Tensor                             # [B, 64] unit vectors: what the object is, wherever it stands
    look: Tensor                                 # [B, 32] unit vectors: how the whole picture is drawn, whatever it shows

    def names(self, head: str) -> list:
        return [HEADS[head][n] for n in self.logits[head].argmax(-1).tolist()]


def convolution(width_in: int, width_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, 1), nn.GroupNorm(8, width_out), nn.SiLU())


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.features_32 = convolution(3, 24)                                                           # 32 x 32
        self.features_16 = nn.Sequential(convolution(24, 48, 2), convolution(48, 48))                   # 16 x 16
        self.features_8 = nn.Sequential(convolution(48, 96, 2), convolution(96, 96))                # 8 x 8
        self.features_4 = convolution(96, 128, 2)                                                    # 4 x 4
        self.mask_8, self.mask_16 = convolution(96, 48), convolution(48, 24)
        self.mask_out = nn.Conv2d(24, 1, 3, padding=1)
        self.scene = nn.Sequential(nn.Linear(128 * 16, 64), nn.SiLU())
        self.identity = nn.Sequential(nn.Linear(96 + 48 + 24, 128), nn.SiLU(), nn.Linear(128, 64))
        self.look = nn.Sequential(nn.Linear(96 + 48 + 24, 128), nn.SiLU(), nn.Linear(128, 32))
        self.heads = nn.ModuleDict({name: nn.Linear(32 if name in LOOK else 64, len(options)) for name, options in HEADS.items()})

    def forward(self, x: Tensor) -> Reading:
        """x [B, 3, 32, 32] in [-1, 1]."""
        at_32 = self.features_32(x)
        at_16 = self.features_16(at_32)
        at_8 = self.features_8(at_16)
        larger = lambda y: F.interpolate(y, scale_factor=2)
        mask = self.mask_out(larger(self.mask_16(larger(self.mask_8(at_8)) + at_16)) + at_32)      # [B, 1, 32, 32]

        # The identity only looks inside the mask: an object is what it is on every background.
        weight = mask.sigmoid()
        pooled = [(features * (w := F.avg_pool2d(weight, factor) if factor > 1 else weight)).sum((2, 3)) / w.sum((2, 3)).clamp(min=1e-3)
                  for features, factor in ((at_32, 1), (at_16, 2), (at_8, 4))]
        identity = F.normalize(self.identity(torch.cat(pooled, dim=1)), dim=-1)                  # [B, 64]
        look = F.normalize(self.look(torch.cat([f.mean((2, 3)) for f in (at_32, at_16, at_8)], dim=1)), dim=-1)       # [B, 32]
        scene = self.scene(self.features_4(at_8).flatten(1))                                      # [B, 64]
        features = {**dict.fromkeys(SCENE, scene), **dict.fromkeys(IDENTITY, 8 * identity), **dict.fromkeys(LOOK, 8 * look)}
        logits = {name: head(features[name]) for name, head in self.heads.items()}
        return Reading(logits, rearrange(mask, "b 1 h w -> b h w"), identity, look)

    @classmethod
    def shipped(cls, device="cpu", path=SHIPPED / "reader.safetensors") -> "Reader":
        reader = cls()
        tensors, _ = load_tensors(path, "tinyflow reader")
        load_into(reader, {name: tensor.float() for name, tensor in tensors.items()}, path)
        return reader.to(device).requires_grad_(False).eval()


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return rearrange(torch.tensor(pictures), "b h w c -> b c h w") / 127.5 - 1


def truth(scenes: list[world.Scene]) -> dict[str, Tensor]:
    """The right answer of every head; -100 (ignored) where a scene has none: no accent without a marking, no eyes without a face, no
    colour and no light in a style of two inks."""
    labels = {head: torch.tensor([options.index(getattr(s, head)) for s in scenes]) for head, options in HEADS.items()}
    labels["accent"][[s.marking == "plain" or s.style in COLOURLESS for s in scenes]] = -100
    for head in ("colour", "light"):
        labels[head][[s.style in COLOURLESS for s in scenes]] = -100
    labels["eyes"][[s.object not in FACES for s in scenes]] = -100
    return labels


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, a little blur and noise: a generated picture is never as clean as a render."""
    draw = lambda: torch.rand((len(x), 1, 1, 1), generator=generator)
    x = x * (0.9 + 0.2 * draw()) + 0.1 * (draw() - 0.5)
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), 0.6 * draw())
    return x + 0.12 * draw() * torch.randn(x.shape, generator=generator)


def train(out: Path, steps: int, pictures: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    scenes = [world.decorated_scene(rng) for _ in range(pictures)]
    drawn = [world.render(scene) for scene in tqdm(scenes, "rendering")]
    x, masks, labels = to_tensor(np.stack([p for p, _ in drawn])), torch.tensor(np.stack([m for _, m in drawn])), truth(scenes)

    reader, begun = Reader(), time.time()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), "reader")
    for _ in bar:
        chosen = torch.randint(pictures, (128,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            reading = reader(augment(x[chosen], generator))
        loss = sum(F.cross_entropy(logits.float(), labels[head][chosen]) for head, logits in reading.logits.items())
        loss = loss + F.binary_cross_entropy_with_logits(reading.mask.float(), masks[chosen].float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    facts = {"steps": steps, "pictures": pictures, "seed": seed, "seconds": round(time.time() - begun), "torch": torch.__version__}
    save_tensors(out / "reader.safetensors", "tinyflow reader", {n: p.half() for n, p in reader.state_dict().items()}, facts)


@torch.no_grad()
def accuracy(reader: Reader, scenes: list[world.Scene], x: Tensor) -> dict[str, float]:
    """The share of pictures x [B, 3, 32, 32] that each head reads as the scene says."""
    logits, labels = reader(x).logits, truth(scenes)
    return {head: (logits[head].argmax(-1) == labels[head])[labels[head] >= 0].float().mean().item()
            for head in HEADS if (labels[head] >= 0).any()}


def check(reader: Reader, pipe: Pipeline | None, count: int = 500, guidance: float = 3.0, seed: int = 1_000_000) -> dict:
    """Accuracy on fresh renders, decorated ones included, and on what the base draws for full captions, seen and held out."""
    rng, results = np.random.default_rng(seed), {}
    scenes = [world.decorated_scene(rng) for _ in range(4 * count)]
    for name, some in (("renders", scenes), ("renders without a style", [scene for scene in scenes if scene.style == "none"])):
        drawn = [world.render(scene) for scene in some]
        x, masks = to_tensor(np.stack([p for p, _ in drawn])), torch.tensor(np.stack([m for _, m in drawn]))
        with torch.no_grad():
            seen_masks = reader(x).mask > 0
        union = (seen_masks | masks).sum((1, 2)).clamp(min=1)
        results[name] = accuracy(reader, some, x) | {"mask IoU": ((seen_masks & masks).sum((1, 2)) / union).mean().item()}
    for name, seen in (("base, seen combinations", True), ("base, held-out combinations", False)) if pipe else ():
        scenes = [world.seen_scene(rng, seen) for _ in range(count)]
        x = torch.cat([pipe.sample(pipe.encode_text([world.caption(s) for s in scenes[n:n + 100]]),
                                   list(range(n, min(n + 100, count))), guidance=guidance).cpu()
                       for n in tqdm(range(0, count, 100), name)])
        results[name] = {head: value for head, value in accuracy(reader.cpu(), scenes, x).items()
                         if head in (*SCENE, "object", "colour")}
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyflow.reader", description=__doc__.split("\n\n")[0])
    parser.add_argument("task", choices=("train", "check"))
    parser.add_argument("--out", type=Path, default=Path("runs/reader"), help="train: folder for reader.safetensors")
    parser.add_argument("--steps", type=int, default=4000, help="train: steps of 128 pictures")
    parser.add_argument("--pictures", type=int, default=60000, help="train: pictures rendered")
    parser.add_argument("--samples", type=int, default=500, help="check: pictures the base draws for each of the two rows")
    parser.add_argument("--guidance", type=float, default=3.0, help="check: classifier-free guidance of those pictures")
    parser.add_argument("--base", type=Path, default=SHIPPED / "base.safetensors", help="check: the base model")
    parser.add_argument("--reader", type=Path, default=SHIPPED / "reader.safetensors", help="check: the reader")
    options = parser.parse_args(arguments)
    with report_errors():
        if options.task == "train":
            train(options.out, options.steps, options.pictures)
            return
        pipe = Pipeline.shipped(choose_device("auto"), options.base)
        results = check(Reader.shipped(path=options.reader), pipe, options.samples, options.guidance)
        for name, row in results.items():
            print(f"{name:28s}", "  ".join(f"{head} {value:.3f}" for head, value in row.items()))


if __name__ == "__main__":
    main()

"""The reader: a small convolutional network that reads a picture of the world back.

It says what is in a picture (with one classifier, or head, for each field of a `Scene`) and where the object
is (a mask). It also gives two vectors to compare pictures by: one for the object, one for the drawing style.
On photographs other networks do this: SAM finds the mask, CLIP and DINO tell what a thing is and how much two
things are alike. The reader learns from decorated renders, so it knows more than the base model ever drew.

    python -m tinyflow.picturebook.reader train --out runs/reader      makes reader.safetensors
    python -m tinyflow.picturebook.reader check                        tests the shipped reader and base model

Read next: purecc_min/measure/measures.py, which measures customized models with it.
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

from tinyflow.errors import report_errors
from tinyflow.picturebook import world
from tinyflow.picturebook.model import SHIPPED, load_tiny
from tinyflow.pipeline import Pipeline, choose_device
from tinyflow.weights import load_into, load_tensors, save_tensors

SCENE = {"size": list(world.SIZES), "place": list(world.PLACES), "background": list(world.BACKGROUND_WORDS)}
IDENTITY = {"object": list(world.OBJECTS), "colour": list(world.COLOURS), "marking": list(world.MARKINGS),
            "accent": list(world.COLOURS), "topper": list(world.TOPPERS), "eyes": list(world.EYES)}
LOOK = {"light": list(world.LIGHTS), "style": list(world.STYLES)}
HEADS = SCENE | IDENTITY | LOOK                  # a field of Scene -> its options
FACES = ("robot", "fish", "cat", "star")         # only these have eyes to count
COLOURLESS = ("sepia", "blueprint")              # styles in which neither colour nor light can be told


@dataclass
class Reading:
    """What the reader sees in B pictures."""
    logits: dict[str, Tensor]                    # head -> [B, options]
    mask: Tensor                                 # [B, H, W] logits: above 0 is the object
    identity: Tensor                             # [B, 64] unit vectors: what the object is, wherever it is
    look: Tensor                                 # [B, 32] unit vectors: how all of the picture is drawn

    def names(self, head: str) -> list:
        return [HEADS[head][n] for n in self.logits[head].argmax(-1).tolist()]


def convolution(width_in: int, width_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, 1), nn.GroupNorm(8, width_out), nn.SiLU())


def masked_mean(features: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over all pixels: features [B, C, H, W], weight [B, 1, H, W] -> [B, C]."""
    return (features * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-3)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.features_32 = convolution(3, 24)                                           # 32 x 32
        self.features_16 = nn.Sequential(convolution(24, 48, 2), convolution(48, 48))   # 16 x 16
        self.features_8 = nn.Sequential(convolution(48, 96, 2), convolution(96, 96))    # 8 x 8
        self.features_4 = convolution(96, 128, 2)                                       # 4 x 4
        self.mask_8, self.mask_16 = convolution(96, 48), convolution(48, 24)
        self.mask_out = nn.Conv2d(24, 1, 3, padding=1)
        self.scene = nn.Sequential(nn.Linear(128 * 16, 64), nn.SiLU())
        self.identity = nn.Sequential(nn.Linear(24 + 48 + 96, 128), nn.SiLU(), nn.Linear(128, 64))
        self.look = nn.Sequential(nn.Linear(24 + 48 + 96, 128), nn.SiLU(), nn.Linear(128, 32))
        self.heads = nn.ModuleDict()
        for name, options in HEADS.items():
            self.heads[name] = nn.Linear(32 if name in LOOK else 64, len(options))

    def forward(self, x: Tensor) -> Reading:
        """x [B, 3, 32, 32] in [-1, 1]."""
        at_32 = self.features_32(x)
        at_16 = self.features_16(at_32)
        at_8 = self.features_8(at_16)
        mask = self.mask_16(F.interpolate(self.mask_8(at_8), scale_factor=2) + at_16)   # [B, 24, 16, 16]
        mask = self.mask_out(F.interpolate(mask, scale_factor=2) + at_32)               # [B, 1, 32, 32]

        # The identity only looks inside the mask: an object is what it is on every background.
        weight = mask.sigmoid()
        inside = [masked_mean(at_32, weight), masked_mean(at_16, F.avg_pool2d(weight, 2)),
                  masked_mean(at_8, F.avg_pool2d(weight, 4))]
        everywhere = [features.mean((2, 3)) for features in (at_32, at_16, at_8)]
        identity = F.normalize(self.identity(torch.cat(inside, dim=1)), dim=-1)         # [B, 64]
        look = F.normalize(self.look(torch.cat(everywhere, dim=1)), dim=-1)             # [B, 32]
        scene = self.scene(self.features_4(at_8).flatten(1))                            # [B, 64]

        # A unit vector alone is too short to make a head sure of its answer.
        features = {**dict.fromkeys(SCENE, scene), **dict.fromkeys(IDENTITY, 8 * identity),
                    **dict.fromkeys(LOOK, 8 * look)}
        logits = {name: head(features[name]) for name, head in self.heads.items()}
        return Reading(logits, rearrange(mask, "b 1 h w -> b h w"), identity, look)

    @classmethod
    def shipped(cls, device: str | torch.device = "cpu",
                path: str | Path = SHIPPED / "reader.safetensors") -> "Reader":
        """The trained reader, frozen. Raises InputError for a damaged or foreign file."""
        reader = cls()
        tensors, _ = load_tensors(path, "tinyflow reader")
        load_into(reader, {name: tensor.float() for name, tensor in tensors.items()}, path)
        return reader.to(device).requires_grad_(False).eval()


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return rearrange(torch.tensor(pictures), "b h w c -> b c h w") / 127.5 - 1


def render_all(scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
    """The scenes' pictures x [B, 3, 32, 32] and their objects' masks, bool [B, 32, 32]."""
    pictures, masks = zip(*map(world.render, tqdm(scenes, "rendering")))
    return to_tensor(np.stack(pictures)), torch.tensor(np.stack(masks))


def truth(scenes: list[world.Scene]) -> dict[str, Tensor]:
    """The right answer of every head, head -> [B], and -100 (ignored) where a scene has none.

    There is no accent without a marking, no eyes without a face, no colour or light in a style of two inks.
    """
    labels = {head: torch.tensor([options.index(getattr(scene, head)) for scene in scenes])
              for head, options in HEADS.items()}
    for head in ("accent", "colour", "light"):
        labels[head][[scene.style in COLOURLESS for scene in scenes]] = -100
    labels["accent"][[scene.marking == "plain" for scene in scenes]] = -100
    labels["eyes"][[scene.object not in FACES for scene in scenes]] = -100
    return labels


# ---------------------------------------------------------------------------------- training and checking
def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, a little blur and noise: a generated picture is never as clean as a render."""
    def draw() -> Tensor:
        return torch.rand((len(x), 1, 1, 1), generator=generator)

    x = x * (0.9 + 0.2 * draw()) + 0.1 * (draw() - 0.5)
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), 0.6 * draw())
    return x + 0.12 * draw() * torch.randn(x.shape, generator=generator)


def train(out: Path, steps: int, pictures: int) -> None:
    """Trains a reader on renders of `pictures` decorated scenes. Leaves reader.safetensors in `out`."""
    torch.manual_seed(0)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    scenes = [world.decorated_scene(rng) for _ in range(pictures)]
    (x, masks), labels = render_all(scenes), truth(scenes)
    reader, begun = Reader(), time.time()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), "reader")
    for _ in bar:
        chosen = torch.randint(pictures, (128,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            reading = reader(augment(x[chosen], generator))
        loss = sum(F.cross_entropy(logits.float(), labels[head][chosen])
                   for head, logits in reading.logits.items())
        loss = loss + F.binary_cross_entropy_with_logits(reading.mask.float(), masks[chosen].float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    facts = {"steps": steps, "pictures": pictures, "seed": 0, "seconds": round(time.time() - begun),
             "torch": torch.__version__}
    save_tensors(out / "reader.safetensors", "tinyflow reader",
                 {name: tensor.half() for name, tensor in reader.state_dict().items()}, facts)


def accuracy(reading: Reading, scenes: list[world.Scene]) -> dict[str, float]:
    """The share of pictures that each head reads as the scene says, among those that have an answer."""
    return {head: (reading.logits[head].argmax(-1) == answers)[answers >= 0].float().mean().item()
            for head, answers in truth(scenes).items() if (answers >= 0).any()}


@torch.no_grad()
def check(reader: Reader, pipe: Pipeline | None, count: int = 500) -> dict[str, dict[str, float]]:
    """Tells how well the reader reads renders, and how well a base model draws what full captions say.

    Returns: row -> head -> accuracy. Two rows are of renders: 4 * count decorated scenes, and those of them
    without a style. They also hold the mask's intersection over union ("mask IoU"). With a `pipe`, two more
    rows are of what it draws: `count` combinations that pretraining showed, and as many that it held out.
    """
    rng, results = np.random.default_rng(1_000_000), {}
    scenes = [world.decorated_scene(rng) for _ in range(4 * count)]
    unstyled = [scene for scene in scenes if scene.style == "none"]
    for name, some in (("renders", scenes), ("renders without a style", unstyled)):
        x, masks = render_all(some)
        reading = reader(x)
        seen_masks = reading.mask > 0
        overlap = (seen_masks & masks).sum((1, 2)) / (seen_masks | masks).sum((1, 2)).clamp(min=1)
        results[name] = accuracy(reading, some) | {"mask IoU": overlap.mean().item()}
    if pipe is None:
        return results
    for name, seen in (("base, seen combinations", True), ("base, held-out combinations", False)):
        scenes, drawn = [world.seen_scene(rng, seen) for _ in range(count)], []
        for n in tqdm(range(0, count, 100), name):
            text = pipe.encode_text([world.caption(scene) for scene in scenes[n:n + 100]])
            drawn.append(pipe.sample(text, list(range(n, min(n + 100, count)))).cpu())
        shares = accuracy(reader(torch.cat(drawn)), scenes)
        results[name] = {head: shares[head] for head in (*SCENE, "object", "colour")}    # what captions say
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tinyflow.picturebook.reader",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("task", choices=("train", "check"))
    parser.add_argument("--out", type=Path, default="runs/reader", help="train: folder of reader.safetensors")
    parser.add_argument("--steps", type=int, default=4000, help="train: steps of 128 pictures")
    parser.add_argument("--pictures", type=int, default=60000, help="train: pictures rendered")
    parser.add_argument("--base", type=Path, default=SHIPPED / "base.safetensors", help="check: the base")
    parser.add_argument("--reader", type=Path, default=SHIPPED / "reader.safetensors",
                        help="check: the reader")
    options = parser.parse_args(arguments)
    with report_errors():
        if options.task == "train":
            train(options.out, options.steps, options.pictures)
        else:
            results = check(Reader.shipped(path=options.reader), load_tiny(choose_device(), options.base))
            for name, row in results.items():
                print(f"{name:28s}", "  ".join(f"{head} {value:.3f}" for head, value in row.items()))


if __name__ == "__main__":
    main()

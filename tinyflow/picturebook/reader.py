"""The reader: a small convolutional network that reads a picture of the world back.

First it looks at the whole picture: how many objects there are, each one's mask (the left one first), its
size and place, the background, the light and the style. Then it cuts each object out along its mask, all to
one size and one spot, and reads what it is: every part that has a name (a classifier, or head, for each), and
every number of its `Identity`, with how sure it is of each. On photographs other networks do this: SAM finds
the mask, CLIP and DINO tell what a thing is and how much two things are alike. Read next: check.py.

    python -m tinyflow.picturebook.reader --out runs/reader      makes reader.safetensors
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyflow.device import choose_device
from tinyflow.picturebook import world
from tinyflow.picturebook.model import SHIPPED
from tinyflow.picturebook.objects import exact_colour
from tinyflow.picturebook.render import HALF, brightness, render_all
from tinyflow.picturebook.training import Config, Training, fast_precision, follow, parser_of, stage
from tinyflow.picturebook.world import Identity
from tinyflow.pipeline import to_pixels
from tinyflow.terminal import add_device, report_errors
from tinyflow.weights import load_into, load_tensors

SCENE = {"count": [1, 2], "background": list(world.BACKGROUNDS)}
LOOK = {"light": list(world.LIGHTS), "style": list(world.STYLES)}
SPOT = {"size": list(world.SIZES), "place": list(world.PLACES)}
IDENTITY = {"object": list(world.OBJECTS), "colour": list(world.COLOURS), "marking": list(world.MARKINGS),
            "accent": list(world.COLOURS), "topper": list(world.TOPPERS), "eyes": list(world.EYES)}
HEADS = SCENE | LOOK | SPOT | IDENTITY           # a trait -> its options
COLOURLESS = ("print", "chalk")                  # styles in which neither colour nor light can be told
CROP = 40                                        # pixels a side of an object that is cut out
PARTS, TRAITS = 8, len(world.TRAITS)
COLOURS = 3 * PARTS * 8                          # numbers that say the colours of an object's parts
IGNORED = -100                                   # the label of a trait that a picture does not show
FRESH = 1000                                     # pictures for nothing but the calibration
READER = Config(8000, 2e-3, warmup=200, flat=.3, ema=.998)


@dataclass
class Reading:
    """What the reader sees in B pictures. Of the objects, the left one comes first."""
    logits: dict[str, Tensor]                    # head -> [B, options]; of an object, [B, 2, options]
    mask: Tensor                                 # [B, 2, H, W] logits: above 0 is the object
    traits: Tensor                               # [B, 2, TRAITS]: the numbers of an object's identity
    spread: Tensor                               # [B, 2, TRAITS]: the standard deviations of their errors
    identity: Tensor                             # [B, 2, 96] unit vectors: who an object is, wherever it is
    look: Tensor                                 # [B, 32] unit vectors: how all of the picture is drawn

    def scores(self, head: str, n: int = 0) -> Tensor:
        """[B, options], of object n."""
        logits = self.logits[head]
        return logits if logits.dim() == 2 else logits[:, n]

    def names(self, head: str, n: int = 0) -> list:
        return [HEADS[head][k] for k in self.scores(head, n).argmax(-1).tolist()]


def convolution(width_in: int, width_out: int, stride: int = 1, norm: bool = True) -> nn.Module:
    norms = [nn.GroupNorm(8, width_out)] if norm else []
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, 1), *norms, nn.SiLU())


def cut_out(x: Tensor, masks: Tensor, big: Tensor) -> Tensor:
    """Each object alone, on grey, as if all had one size and stood on one spot.

    Args: pictures x [B, 3, H, W] in [-1, 1]; masks, bool [B, 2, H, W]; big, bool [B, 2]: which ones are big.
    Returns: [B * 2, 4, CROP, CROP]. The fourth channel is the mask.
    """
    masks = rearrange(masks, "b n h w -> (b n) h w")
    side, index = masks.shape[-1], torch.arange(masks.shape[-1], device=x.device)
    along_x, along_y = masks.any(1), masks.any(2)                                       # [B * 2, W], [., H]
    left = torch.where(along_x, index, side).amin(1)
    right = torch.where(along_x, index, -1).amax(1) + 1
    bottom = torch.where(along_y, index, -1).amax(1) + 1
    half = torch.where(big.flatten(), HALF["big"], HALF["small"])                       # [B * 2], in pixels
    centre = torch.stack([(left + right) / 2, bottom - 1.4 * half], -1)                # a topper needs room
    grid = torch.linspace(-1.45, 1.45, CROP, device=x.device)
    grid = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)                   # [CROP, CROP, 2]
    pixels = centre[:, None, None] + half[:, None, None, None] * grid
    alone = torch.cat([x.repeat_interleave(2, 0) * masks[:, None], masks[:, None].to(x.dtype)], 1)
    return F.grid_sample(alone, 2 * pixels / side - 1, align_corners=False)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.at_32 = nn.Sequential(nn.PixelUnshuffle(2), convolution(12, 32), convolution(32, 32))
        self.at_16 = nn.Sequential(convolution(32, 64, 2), convolution(64, 64))
        self.at_8 = nn.Sequential(convolution(64, 96, 2), convolution(96, 96))
        self.at_4 = nn.Sequential(convolution(96, 128, 2), convolution(128, 128))
        self.mask_8, self.mask_16 = convolution(128, 96), convolution(96, 64)
        self.mask_32 = convolution(64, 32)
        self.mask_out = nn.Sequential(nn.Conv2d(32, 8, 3, padding=1), nn.PixelShuffle(2))
        self.scene = nn.Sequential(nn.Linear(128 * 16, 96), nn.SiLU())
        self.look = nn.Sequential(nn.Linear(32 + 64 + 96, 128), nn.SiLU(), nn.Linear(128, 32))
        self.light_and_style = nn.Linear(32, 3)                  # the light's member, the style's as an angle
        # A norm takes away how bright and how red a thing is, so these first layers have none.
        self.object_20 = nn.Sequential(nn.PixelUnshuffle(2), convolution(16, 48, norm=False),
                                       convolution(48, 48, norm=False))
        self.object_5 = nn.Sequential(convolution(48, 96, 2), convolution(96, 96), convolution(96, 128, 2))
        self.parts = nn.Conv2d(48, PARTS, 1)                     # where the body is, the marking, ...
        self.shade = nn.Sequential(nn.Linear(COLOURS + 32 + 96, 256), nn.SiLU(), nn.Linear(256, 4))
        found = 128 * 25 + COLOURS + 32 + 96
        self.identity = nn.Sequential(nn.Linear(found, 256), nn.SiLU(), nn.Linear(256, 96))
        self.individual = nn.Linear(96, TRAITS)       # so that `identity` tells individuals apart
        self.traits = nn.Sequential(nn.Linear(found, 256), nn.SiLU(), nn.Linear(256, 2 * TRAITS))
        self.register_buffer("calibration", torch.ones(TRAITS))  # how much larger errors are than it thinks
        self.heads = nn.ModuleDict()
        for head, options in HEADS.items():
            width = 32 if head in LOOK else 96
            self.heads[head] = nn.Linear(width, len(options) * (2 if head in SPOT else 1))

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Reading:
        """x [B, 3, 64, 64] in [-1, 1]. masks: bool [B, 2, 64, 64], by default those that it sees."""
        at_32 = self.at_32(x)
        at_16 = self.at_16(at_32)
        at_8 = self.at_8(at_16)
        at_4 = self.at_4(at_8)
        mask = self.mask_8(F.interpolate(at_4, scale_factor=2)) + at_8
        mask = self.mask_16(F.interpolate(mask, scale_factor=2)) + at_16
        mask = self.mask_out(self.mask_32(F.interpolate(mask, scale_factor=2)) + at_32)  # [B, 2, 64, 64]
        scene = self.scene(at_4.flatten(1))                                             # [B, 96]
        everywhere = torch.cat([features.mean((2, 3)) for features in (at_32, at_16, at_8)], 1)
        look = F.normalize(self.look(everywhere), dim=-1)                               # [B, 32]

        logits = {head: self.heads[head](scene) for head in SCENE}
        logits |= {head: self.heads[head](scene).unflatten(1, (2, -1)) for head in SPOT}
        logits |= {head: self.heads[head](8 * look) for head in LOOK}     # a unit vector alone is too short

        masks = mask > 0 if masks is None else masks
        there = rearrange(masks, "b n h w -> (b n) (h w)").any(1)                       # often only one is
        big = logits["size"].argmax(-1) == list(world.SIZES).index("big")               # [B, 2]
        alone = cut_out(x, masks, big)                                                  # [B * 2, 4, 40, 40]
        seen = x.new_zeros((len(alone), 128 * 25 + COLOURS))
        if there.any():
            seen[there] = self.look_at(alone[there]).to(x.dtype)
        light = torch.cat([look, scene], 1).repeat_interleave(2, 0)                     # it tints everything
        found = torch.cat([seen, light], 1)                                             # [B * 2, 3520]
        identity = F.normalize(self.identity(found), dim=-1)                            # [B * 2, 96]
        traits, log_spread = self.traits(found).float().chunk(2, 1)
        shade, log_shade = self.shade(found[:, 128 * 25:]).float().chunk(2, 1)          # hue and tone
        traits = torch.cat([shade, traits[:, 2:]], 1)
        log_spread = torch.cat([log_shade, log_spread[:, 2:]], 1)

        logits |= {head: self.heads[head](8 * identity).unflatten(0, (-1, 2)) for head in IDENTITY}
        spread = self.calibration * (.01 + F.softplus(log_spread - 1))
        pairs = [part.unflatten(0, (-1, 2)) for part in (traits, spread, identity)]     # [B, 2, .]
        return Reading(logits, mask, *pairs, look)

    def look_at(self, alone: Tensor) -> Tensor:
        """Objects that were cut out, [N, 4, CROP, CROP] -> their shapes, and the exact mean colours of their
        parts, [N, 3200 + COLOURS]. Waves of four lengths make a small difference in hue as large as any.
        """
        at_20 = self.object_20(alone)
        small = F.avg_pool2d(alone, 2).flatten(2)                                       # [N, 4, 400]
        weight = (self.parts(at_20).flatten(2) - 20 * (1 - small[:, 3:])).softmax(-1)   # inside the mask
        colours = weight @ small[:, :3].transpose(1, 2)                                 # [N, PARTS, 3]
        lengths = torch.tensor([1, 2, 4, 8], device=alone.device)
        angles = torch.pi / 2 * colours.float().flatten(1)[..., None] * lengths         # [N, 3 * PARTS, 4]
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)                  # [N, COLOURS]
        return torch.cat([self.object_5(at_20).flatten(1), waves], 1)

    @classmethod
    def shipped(cls, device: str | torch.device = "cpu",
                path: str | Path = SHIPPED / "reader.safetensors") -> "Reader":
        """The trained reader, frozen. Raises InputError for a damaged or foreign file."""
        reader = cls()
        tensors, _ = load_tensors(path, "tinyflow reader")
        load_into(reader, {name: tensor.float() for name, tensor in tensors.items()}, path)
        return reader.to(device).requires_grad_(False).eval()


@torch.no_grad()
def read(reader: Reader, x: Tensor) -> Reading:
    """What the reader sees in any number of pictures, 50 at a time."""
    parts = [reader(some.to(reader.calibration.device)) for some in x.split(50)]
    logits = {head: torch.cat([part.logits[head] for part in parts]) for head in HEADS}
    names = ("mask", "traits", "spread", "identity", "look")
    return Reading(logits, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


# ------------------------------------------------------------------------------------------------ the truth
def shows(scene: world.Scene, n: int, trait: str) -> bool:
    """Does a picture of the scene determine this trait of its object n? A style of two inks, or of lines,
    hides colours, lights, and a marking that is about as bright as the body.
    """
    thing = scene.things[n]
    if scene.style in COLOURLESS:
        if trait in ("colour", "accent", "light", "hue", "tone"):
            return False
        if trait.startswith("marking") and thing.marking != "plain":
            body, accent = exact_colour(thing.colour, thing.identity), exact_colour(thing.accent, Identity())
            if abs(brightness(np.subtract(body, accent)).item()) < .2:
                return False
    if trait == "accent" or trait.startswith("marking_"):
        return thing.marking != "plain"
    if trait == "eye_gap":
        return thing.eyes == 2
    return trait != "topper_height" or thing.topper != "none"


def answer(scene: world.Scene, n: int, trait: str):
    """The value of a trait of object n; None if there is no such object, or the picture does not show it."""
    if n >= len(scene.things) or not shows(scene, n, trait):
        return None
    return len(scene.things) if trait == "count" else scene.trait(trait, n)


def truth(scenes: list[world.Scene]) -> dict[str, Tensor]:
    """The right answer of every head: [B] for a picture, [B, 2] for its objects; IGNORED if there is none."""
    labels = {}
    for head, options in HEADS.items():
        number = {option: k for k, option in enumerate(options)} | {None: IGNORED}
        rows = torch.tensor([[number[answer(scene, n, head)] for n in (0, 1)] for scene in scenes])
        labels[head] = rows[:, 0] if head in SCENE | LOOK else rows
    return labels


def true_traits(scenes: list[world.Scene]) -> Tensor:
    """[B, 2, TRAITS], and nan where a picture does not determine a trait."""
    values = [[[answer(scene, n, trait) for trait in world.TRAITS] for n in (0, 1)] for scene in scenes]
    return torch.tensor(np.array(values, dtype=np.float32))      # None becomes nan


def true_members(scenes: list[world.Scene]) -> Tensor:
    """[B, 3]: the light's member, and the style's as a cosine and a sine; nan where none can be told."""
    rows = []
    for scene in scenes:
        lit = scene.light != "day" and scene.style not in COLOURLESS
        angle = np.pi * scene.style_member if scene.style != "none" else np.nan
        rows.append((scene.light_member if lit else np.nan, np.cos(angle), np.sin(angle)))
    return torch.tensor(rows, dtype=torch.float32)


# -------------------------------------------------------------------------------------------------- training
def augment(x: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Brightness, a little blur and noise, and lines that wobble by up to a pixel: a generated picture is
    never as clean as a render. masks [B, 2, H, W] wobble along.
    """
    def draw() -> Tensor:
        return torch.rand((len(x), 1, 1, 1), generator=generator).to(x.device)
    moved = torch.randn((len(x), 2, 8, 8), generator=generator).to(x.device) * .8 * draw()      # in pixels
    moved = F.interpolate(moved, x.shape[-2:], mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3).repeat(len(x), 1, 1), x.shape, align_corners=False).to(x.device)
    grid = still + 2 / x.shape[-1] * rearrange(moved, "b n h w -> b h w n")
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    masks = F.grid_sample(masks.to(x), grid, align_corners=False) > .5
    x = x * (.95 + .1 * draw()) + .05 * (draw() - .5)
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), .8 * draw() * (draw() < .5))
    return x + .1 * draw() * torch.randn(x.shape, generator=generator).to(x.device), masks


def error_where_known(guess: Tensor, answer: Tensor, spread: Tensor | float = 1.0) -> Tensor:
    """The mean negative log likelihood of the answers that are not nan, under a normal distribution."""
    known = ~answer.isnan()
    spread = torch.as_tensor(spread, device=guess.device).expand_as(guess)[known]
    errors = .5 * ((guess[known] - answer[known]) / spread) ** 2 + spread.log()
    return errors.sum() / max(1, len(errors))    # a small batch may hold no answer


class ReaderTraining(Training):
    """The rendered pictures with all that is true about them, and the reader."""
    name = "reader"

    def __init__(self, config: Config, reader: Reader):
        rng = np.random.default_rng(config.seed)
        scenes = [world.any_scene(rng) for _ in range(config.pictures)]
        self.pictures, masks = render_all(scenes)
        self.masks, self.labels = torch.tensor(masks), truth(scenes)
        self.traits, self.members = true_traits(scenes), true_members(scenes)
        scenes = [world.any_scene(rng) for _ in range(FRESH)]
        self.fresh, self.fresh_traits = render_all(scenes)[0], true_traits(scenes)
        reader.calibration.fill_(1)
        self.device = reader.calibration.device
        by_adam = ("heads", "at_32", "mask_out", "light_and_style", "individual", "parts")
        super().__init__(config, reader.to(memory_format=torch.channels_last), by_adam)  # faster on a CPU

    def loss(self, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 10**9 + k)
        rows = torch.randint(self.config.pictures, (self.config.batch,), generator=generator)
        x, masks = augment(to_pixels(self.pictures[rows.numpy()]).to(self.device),
                           self.masks[rows].to(self.device), generator)
        with fast_precision(self.device):
            reading = self.model(x, masks)
            members = self.model.light_and_style(8 * reading.look).float()
            individual = self.model.individual(8 * reading.identity).float()
        loss = F.binary_cross_entropy_with_logits(reading.mask.float(), masks.float())
        for head, logits in reading.logits.items():
            answers = self.labels[head][rows].flatten().to(self.device)
            logits = logits.float().reshape(len(answers), -1)
            loss = loss + F.cross_entropy(logits, answers, ignore_index=IGNORED)
        traits = self.traits[rows].to(self.device)
        loss = loss + error_where_known(reading.traits, traits, reading.spread)
        loss = loss + error_where_known(individual, traits)
        return loss + error_where_known(members, self.members[rows].to(self.device))

    def finish(self, out: Path, facts: dict) -> None:
        """Training sees its pictures often, and comes to think that it is surer than it is on others. So the
        calibration is measured on fresh ones.
        """
        self.average.calibration.fill_(1)
        reading = read(self.average, to_pixels(self.fresh))
        error = (reading.traits - self.fresh_traits.to(self.device)) / reading.spread
        self.average.calibration.copy_(error.square().nanmean((0, 1)).sqrt().nan_to_num(1.0))
        super().finish(out, facts)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("reader", __doc__, READER)
    add_device(parser)
    options = parser.parse_args(arguments)
    with report_errors(goes_on=True):
        device = choose_device(options.device)
        torch.manual_seed(options.seed)
        reader = Reader.shipped(path=options.start).requires_grad_(True) if options.start else Reader()
        training = ReaderTraining(stage(READER, options, reader), reader.to(device))
        follow(training, options.out, 500)


if __name__ == "__main__":
    main()

"""How good the three networks of the picture book are, against the truth of the renderer.

    python -m tinyflow.picturebook.check             takes ten minutes on 2 CPU cores
    python -m tinyflow.picturebook.check --count 50  a tenth of it

The codec is told by its peak signal-to-noise ratio; the reader by how often each of its heads is right, on
fresh renders, on renders that have passed through the codec, and on pairs of pictures that show the same
individual or not; the base model by how often the reader sees what the text says, and by what its words are
worth. Read next: weights/README.md.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal
from tqdm import tqdm

from tinyflow.device import choose_device
from tinyflow.flow import noise_for, path, squared_error, velocity_target
from tinyflow.picturebook import world
from tinyflow.picturebook.codec import quality
from tinyflow.picturebook.model import SHIPPED, load_tiny
from tinyflow.picturebook.reader import HEADS, IGNORED, Reader, Reading, read, shows, truth
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import Pipeline, to_pixels
from tinyflow.terminal import Parser, file_path, positive, report_errors

AT_ONCE = 50                                     # pictures
Row = dict[str, float]
ASKED = {                                        # row -> seen combinations?, share of pairs, guidance
    "one thing, seen": (True, 0, None), "one thing, held out": (False, 0, None),
    "two things, seen": (True, 1, None), "two things, held out": (False, 1, None),
    "one thing, seen, guidance 1": (True, 0, 1),
}


def fresh() -> np.random.Generator:
    """Scenes that no training has seen."""
    return np.random.default_rng(1_000_000)


def renders(scenes: Iterable[world.Scene]) -> Tensor:
    """[B, 3, 64, 64] in [-1, 1]."""
    return to_pixels(render_all(list(scenes))[0])


# ------------------------------------------------------------------------------------------------ the reader
def accuracy(reading: Reading, scenes: list[world.Scene]) -> Row:
    """The share of right answers of each head, over pictures and objects, where a picture determines them."""
    row = {}
    for head, labels in truth(scenes).items():
        right = reading.logits[head].argmax(-1) == labels
        row[head] = right[labels != IGNORED].float().mean().item()
    return row


def mask_overlap(reading: Reading, masks: np.ndarray) -> float:
    """The mean intersection over union of the objects' masks."""
    seen, true = reading.mask > 0, torch.tensor(masks)
    overlap = (seen & true).sum((2, 3)) / (seen | true).sum((2, 3)).clamp(min=1)
    return overlap[true.any((2, 3))].mean().item()


def pair_of_scenes(rng: np.random.Generator, same: bool) -> tuple[world.Scene, world.Scene]:
    """Two scenes without a style, whose objects share every part that has a name, at other places in other
    scenes. Their identities are the same, or differ in one number, by 1 or more, that both pictures show.
    """
    def elsewhere(thing: world.Thing) -> world.Scene:
        scene = world.any_scene(rng, pairs=0)
        return scene.changed(style="none", **{name: getattr(thing, name) for name in world.WORN})

    one = elsewhere(world.random_thing("middle", rng))
    if same:
        return one, elsewhere(one.things[0])
    trait = world.pick([trait for trait in world.TRAITS if shows(one, 0, trait)], rng)
    value = one.trait(trait)
    room = rng.uniform(0, abs(value))            # from -1 to 1, on the one side that has room for 1 or more
    other = one.changed(**{trait: room - 1 if value > 0 else value + 1 + room})
    return one, elsewhere(other.things[0])


def individuals(reader: Reader, count: int) -> float:
    """The share of right answers to "is this the same individual?", on `count` pairs that are the same and as
    many that are not.
    """
    rng, right = fresh(), []
    for same in (True, False):
        pairs = [pair_of_scenes(rng, same) for _ in range(count)]
        one, other = (read(reader, renders(scenes)) for scenes in zip(*pairs))
        shown = torch.tensor([[shows(scene, 0, trait) for trait in world.TRAITS] for scene, _ in pairs])
        traits, spreads = [one.traits[:, 0], other.traits[:, 0]], [one.spread[:, 0], other.spread[:, 0]]
        right.append(same_individual(traits, spreads, shown) == same)
    return torch.cat(right).float().mean().item()


def same_individual(traits: list[Tensor], spreads: list[Tensor], shown: Tensor) -> Tensor:
    """bool [B]: are the objects of two pictures the same individual?

    Args:
        traits, spreads: of the two pictures, [B, TRAITS] each, as the reader gives them.
        shown: bool [B, TRAITS], what both pictures show.

    If they are the same, each trait's two readings differ by errors alone, which are normal. If not, one of
    the shown traits, and we do not know which, differs by 1.35 +- .3 besides. The likelier answer is taken.
    A reading that is unsure keeps to the middle, so that of a difference it shows only the share `seen`, the
    part of a trait's variance (1/3) that it knows.
    """
    difference = (traits[0] - traits[1]).abs()
    seen = [(1 - 3 * spread ** 2).clamp(min=.05) for spread in spreads]
    variance, share = sum(k * spread ** 2 for k, spread in zip(seen, spreads)), sum(seen) / 2
    alike = Normal(0.0, variance.sqrt()).log_prob(difference)
    apart = Normal(1.35 * share, (variance + (.3 * share) ** 2).sqrt()).log_prob(difference)
    apart = apart - np.log(2)                                                            # in either direction
    evidence = (apart - alike).masked_fill(~shown, -torch.inf).logsumexp(1) - shown.sum(1).log()
    return evidence < 0


# --------------------------------------------------------------------------------------------- the base model
@torch.no_grad()
def through_the_codec(pipe: Pipeline, x: Tensor) -> Tensor:
    return torch.cat([pipe.decode(pipe.codec.encode(some.to(pipe.device))) for some in x.split(AT_ONCE)])


@torch.no_grad()
def drawn(pipe: Pipeline, texts: list[str], name: str, guidance: float | None = None) -> Tensor:
    """What the base model draws for the texts, pixels [B, 3, 64, 64]; text i from the noise of seed i."""
    pictures = []
    for n in tqdm(range(0, len(texts), AT_ONCE), name):
        rows = texts[n:n + AT_ONCE]
        x_0 = pipe.sample(pipe.encode_text(rows), list(range(n, n + len(rows))), guidance=guidance)
        pictures.append(pipe.decode(x_0))
    return torch.cat(pictures)


def follows(reading: Reading, scenes: list[world.Scene], heads: Iterable[str]) -> tuple[Row, float]:
    """Head -> the share of right answers where the text says something, and the share of pictures that are
    right in everything. A text says what a thing wears, and not what it does not wear.
    """
    row, everything, labels = {}, torch.ones(len(scenes), dtype=torch.bool), truth(scenes)
    for head in heads:
        right, said = reading.logits[head].argmax(-1) == labels[head], labels[head] != IGNORED
        if head in ("marking", "topper", "light", "style"):
            said &= labels[head] > 0             # option 0 has no word
        if head == "light":
            said &= labels[head] != HEADS[head].index("glow")
        row[head] = right[said].float().mean().item()
        everything &= (right | ~said).view(len(scenes), -1).all(1)
    return row, everything.float().mean().item()


def base_rows(pipe: Pipeline, reader: Reader, count: int) -> dict[str, Row]:
    """Scenes of one thing that pretraining showed, and that it held out, at full guidance and without; then
    scenes of two. Their captions say everything that has a name.
    """
    rows, rng = {}, fresh()
    for name, (seen, pairs, guidance) in ASKED.items():
        scenes = [world.seen_scene(rng, seen, pairs=pairs) for _ in range(count)]
        texts = [world.caption(scene, said=world.ALL_PARTS) for scene in scenes]
        reading = read(reader, drawn(pipe, texts, name, guidance))
        row, all_right = follows(reading, scenes, HEADS)
        rows[name] = row | {"everything": all_right}
        if pairs:
            rows[name]["both objects"] = follows(reading, scenes, ("count", "object", "place"))[1]
    return rows


def doubled_nouns(pipe: Pipeline, reader: Reader, count: int) -> Row:
    """What doubling a noun does: "a red robot robot" is what the text encoder reads at "a red [V] robot".

    Returns: the share of pictures that still show as many objects as the text names, and the mean change of
    the pixels, 0 to 1, from the pictures of the texts without doubling at the same seeds.
    """
    rng, texts, doubled = fresh(), [], []
    scenes = [world.seen_scene(rng) for _ in range(count)]
    for n, scene in enumerate(scenes):
        nouns = [thing.object for thing in scene.things]
        texts.append(world.caption(scene))
        nouns[n % len(nouns)] += f" {nouns[n % len(nouns)]}"
        doubled.append(world.caption(scene, tuple(nouns)))
    once, twice = drawn(pipe, texts, "nouns"), drawn(pipe, doubled, "doubled nouns")
    change = (once - twice).abs().mean().item() / 2
    return {"right count": follows(read(reader, twice), scenes, ("count",))[1], "change": change}


def diversity(pipe: Pipeline, reader: Reader, count: int) -> Row:
    """How much individuals differ from seed to seed where the text leaves them open: the standard deviation
    of their identities' numbers, a mean over traits, of what the base draws and of fresh renders of the
    same texts.
    """
    robot, rng = world.Scene((world.Thing("robot", "red"),), "meadow"), fresh()
    scenes = [robot.changed(identity=world.random_identity(rng), seed=n) for n in range(count)]
    visible = [n for n, trait in enumerate(world.TRAITS) if shows(robot, 0, trait)]
    base = drawn(pipe, [world.caption(robot)] * count, "individuals")
    pictures = {"base": base, "renders": renders(scenes)}
    return {name: read(reader, x).traits[:, 0, visible].std(0).mean().item() for name, x in pictures.items()}


@torch.no_grad()
def worth_of_words(pipe: Pipeline, count: int) -> dict[str, Row]:
    """Which words the base knows: by how much a wrong word raises its error, as a share of the error.

    On fresh renders of one thing with a marking, at three times t. A word that is worth nothing has not been
    learned, however well the pictures look.
    """
    rng, scenes = fresh(), []
    while len(scenes) < count:
        scene = world.seen_scene(rng, pairs=0)
        if scene.things[0].marking != "plain" and scene.style == "none":
            scenes.append(scene)
    x_0 = pipe.encode_images(render_all(scenes)[0])
    x_1, rows = noise_for(list(range(count)), tuple(x_0.shape[1:])).to(x_0), {}
    wrong = {"marking": world.MARKINGS[1:], "colour": world.COLOURS, "topper": tuple(world.TOPPERS)}
    for trait, options in wrong.items():
        others = [scene.changed(**{trait: options[(options.index(scene.trait(trait)) + 1) % len(options)]})
                  for scene in scenes]
        texts = [[world.caption(s, said=world.ALL_PARTS) for s in some] for some in (scenes, others)]
        row = {}
        for t in (.7, .8, .9):
            times = x_0.new_full((count,), t)
            v_right, v_wrong = (pipe.velocity(path(x_0, x_1, times), times, pipe.encode_text(some))
                                for some in texts)
            target = velocity_target(x_0, x_1)
            row[f"t = {t}"] = (squared_error(v_wrong, target) / squared_error(v_right, target) - 1).item()
        rows[f"worth of the {trait}"] = row
    return rows


# ------------------------------------------------------------------------------------------------ the command
def print_row(name: str, row: Row) -> None:
    print(f"{name:28s}", "  ".join(f"{head} {value:.3f}" for head, value in row.items()), flush=True)


def check(reader: Reader, pipe: Pipeline, count: int) -> None:
    """Prints everything. `count` pictures a row of the base model, and four times as many renders."""
    inside, whole = quality(pipe.codec, count)
    print(f"codec: PSNR inside the objects {inside.mean():.1f} dB (one picture in ten below "
          f"{inside.quantile(.1):.1f}), of the whole {whole.mean():.1f} dB")
    rng = fresh()
    scenes = [world.any_scene(rng) for _ in range(4 * count)]
    pictures, masks = render_all(scenes)
    x = to_pixels(pictures)
    for name, some in (("renders", x), ("after the codec", through_the_codec(pipe, x))):
        reading = read(reader, some)
        print_row(name, accuracy(reading, scenes) | {"mask IoU": mask_overlap(reading, masks)})
    print_row("same individual or not", {"right": individuals(reader, 2 * count)})
    for name, row in base_rows(pipe, reader, count).items():
        print_row(name, row)
    print_row("doubled nouns", doubled_nouns(pipe, reader, min(count, 200)))
    print_row("individuals differ by", diversity(pipe, reader, min(count, 100)))
    for name, row in worth_of_words(pipe, min(count, 100)).items():
        print_row(name, row)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("python -m tinyflow.picturebook.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=positive, default=500,
                        help="pictures of each kind that the base model draws")
    for name in ("base", "codec", "reader"):
        parser.add_argument(f"--{name}", type=file_path, default=SHIPPED / f"{name}.safetensors",
                            help="other weights")
    options = parser.parse_args(arguments)
    with report_errors():
        pipe = load_tiny(choose_device(), options.base, options.codec)
        check(Reader.shipped(path=options.reader), pipe, options.count)


if __name__ == "__main__":
    main()

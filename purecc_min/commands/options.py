"""The options of every command; __main__ runs commands/NAME.py for the command NAME."""

import argparse
from pathlib import Path

from purecc_min import __version__
from purecc_min.commands.base_models import BASE_MODELS
from purecc_min.registry import METHODS
from tinyflow.terminal import Parser, add_device, file_path, number, positive, seed

TINY, PUBLIC = BASE_MODELS["tiny"], BASE_MODELS["sd3.5-medium"]


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of TrainConfig. None stands for the base model's default."""
    def add(option: str, kind: type, about: str, tiny: str = "") -> None:
        name = option.removeprefix("--").replace("-", "_")
        tiny, public = tiny or getattr(TINY.training, name), getattr(PUBLIC.training, name)
        default = f"{tiny}" if tiny == public else f"{tiny}; on public weights {public}"
        parser.add_argument(option, type=kind, help=f"{about} ({default})")

    add("--steps", positive, "steps of each stage; more: closer to the references, and more damage")
    add("--batch", number(int, 1, 1024), "pictures a step")
    add("--rank", number(int, 1, 1024), "rank of the adapters", "the method's own")
    add("--learning-rate", number(float, 0, 10), "of the adapters", "the method's own")
    add("--embedding-learning-rate", number(float, 0, 10), "of the embeddings Y", "the method's own")
    add("--eta", number(float, 0, 1000), "weight of what a method adds to L_CC: L_PureCC in Eq. 15, the "
                                         "anchor, the imagined scenes")
    add_common_options(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=file_path,
                        help="public weights: the model's diffusers folder, or its single .safetensors file")
    parser.add_argument("--text", type=file_path,
                        help="a folder with the text encoders and tokenizers that --weights lacks")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=0, help="of every random draw (%(default)s)")
    add_device(parser)


def add_out(parser: argparse.ArgumentParser, default: str, about: str) -> None:
    parser.add_argument("--out", type=file_path, default=Path(default), help=f"{about} (%(default)s)")


RAW = argparse.RawDescriptionHelpFormatter       # keeps the lines of a text as they are
RUN_FOLDER = "folder for all results; an interrupted run in it is resumed"


def add_learn(commands) -> None:
    ways = "".join(f"\n  {name:12s} {method.about}" for name, method in METHODS.items())
    one = commands.add_parser("learn", help="learn a concept from a folder of pictures",
                              epilog=f"methods:{ways}", formatter_class=RAW)
    one.add_argument("folder", type=file_path,
                     help="3 to 5 pictures, with texts (.txt, metadata.jsonl or a CSV), and masks if only a "
                          "part of each is to be learned: 1.mask.png is white where [V] is in 1.jpg")
    one.add_argument("--class-word", help="an ordinary word for the kind of thing that [V] is")
    add_out(one, "output/learned", RUN_FOLDER)
    one.add_argument("--alpha-as-mask", action="store_true",
                     help="use the opaque part of each picture as its mask")
    one.add_argument("--method", choices=tuple(METHODS),
                     help=f"see below ({TINY.method}, for a style {TINY.method_of_a_style}; on public "
                          f"weights {PUBLIC.method})")
    one.add_argument("--base", choices=tuple(BASE_MODELS), default="tiny",
                     help="the base model to learn it on (%(default)s)")
    add_weights(one)
    one.add_argument("--samples-every", type=positive,
                     help="every so many steps, draw the sheet and save the concept, so that you can choose "
                          "the best step")
    one.add_argument("--prompts", type=file_path, help="a file with the sheet's texts, one a line")
    one.add_argument("--size", type=positive,
                     help=f"pixels a side; on public weights, a multiple of 16 ({PUBLIC.size})")
    add_training_options(one)
    one.set_defaults(goes_on=True)


def add_sample(commands) -> None:
    one = commands.add_parser("sample", help="draw pictures with a learned concept")
    one.add_argument("concept", type=file_path, nargs="+", help="a concept's .safetensors file, or several")
    one.add_argument("prompt", help="a text with [V] before the class word ([V1], [V2], ... for several "
                                    "concepts); braces mark a concept's words: '{a [V] robot on the left} "
                                    "and a robot'")
    add_weights(one)
    one.add_argument("--number", type=number(int, 1, 1000), default=4,
                     help="pictures, at seeds seed, seed + 1, ... (%(default)s)")
    one.add_argument("--guidance", type=number(float, 0, 100),
                     help="classifier-free guidance; more: closer to the text, less varied (3; on public "
                          "weights 5)")
    one.add_argument("--strength", type=number(float, 0, 10), default=1.0,
                     help="of the adapters; less: closer to the original model (%(default)s)")
    one.add_argument("--steps", type=number(int, 1, 1000), default=28, help="Euler steps (%(default)s)")
    one.add_argument("--negative", default="", metavar="TEXT",
                     help="negative prompt: it replaces guidance's empty text")
    one.add_argument("--empty-text", choices=("adapted", "base"), default="base",
                     help="the model that predicts for guidance's empty text; base: as in every table and "
                          "picture here (%(default)s)")
    one.add_argument("--only-with-token", action="store_true",
                     help="switch the adapters off for every text without [V], the empty one included")
    add_out(one, "output/sample.png", "the sheet; single pictures go into the same folder; nothing is "
                                      "overwritten")
    add_common_options(one)


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(prog="python -m purecc_min", description=description, formatter_class=RAW)
    parser.set_defaults(goes_on=False)
    parser.add_argument("--version", action="version", version=f"purecc-min {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    one = commands.add_parser("demo", help="the default command")
    add_out(one, "output/demo", RUN_FOLDER)
    add_training_options(one)
    one.set_defaults(goes_on=True)

    add_learn(commands)
    add_sample(commands)

    one = commands.add_parser("export", help="the adapters as a LoRA file for diffusers and ComfyUI")
    one.add_argument("concept", type=file_path,
                     help="a concept's .safetensors file, learned on public weights")
    add_out(one, "output/pytorch_lora_weights.safetensors", "the LoRA file")

    one = commands.add_parser("memory", help="what Stable Diffusion 3.5 Medium needs on a card")

    one = commands.add_parser("words", help="the words that the tiny model knows")

    one = commands.add_parser("speed", help="a training step's time and memory")
    one.add_argument("--steps", type=positive, default=60, help="steps that are measured (%(default)s)")
    add_common_options(one)
    return parser

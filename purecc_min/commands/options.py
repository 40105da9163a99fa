"""The options of every command, and what each command calls."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from purecc_min import __version__
from purecc_min.commands.base_models import BASE_MODELS, open_base_model, training_for
from purecc_min.commands.demo import ROWS, demo
from purecc_min.commands.export import export_lora
from purecc_min.commands.learn import learn_folder
from purecc_min.commands.memory import memory_table
from purecc_min.commands.sample import sample_concepts
from purecc_min.commands.speed import speed
from purecc_min.commands.words import words
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig
from tinyflow.files import check_output, free_name
from tinyflow.sd3.load import SD35_MEDIUM
from tinyflow.terminal import Parser, add_device, file_path, number, positive, seed
from tinyflow.threads import choose_device

TINY, PUBLIC = BASE_MODELS["tiny"], BASE_MODELS["sd3.5-medium"]


# ----------------------------------------------------------------------------------------------- the commands
def demo_command(options: argparse.Namespace) -> None:
    pipe = open_base_model("tiny", None, None, TINY.size, choose_device(options.device))
    demo(pipe, {name: training_config(options, training_for("tiny", name)) for name in ROWS}, options.out)


def learn_command(options: argparse.Namespace) -> None:
    model = BASE_MODELS[options.base]
    method = options.method or model.method
    config = training_config(options, training_for(options.base, method))
    learn_folder(options.folder, options.class_word, config, options.out, method, options.base,
                 options.weights, options.text, options.size or model.size, options.device,
                 options.samples_every, options.prompts, options.alpha_as_mask)


def sample_command(options: argparse.Namespace) -> None:
    seeds = list(range(options.seed, options.seed + options.number))
    sample_concepts(options.concept, options.prompt, options.weights, options.text, seeds, options.steps,
                    options.guidance, options.strength, options.negative, options.empty_text,
                    options.only_with_token, options.out, options.device)


def export_command(options: argparse.Namespace) -> None:
    check_output(options.out, ".safetensors", [options.concept])
    out = free_name(options.out)                 # what stands there may be another concept
    count = export_lora(options.concept, out)
    print(f"{out}: {count} tensors; the layer-wise embeddings stay behind (tinyflow/sd3/README.md)")


def memory_command(options: argparse.Namespace) -> None:
    print(memory_table(SD35_MEDIUM))


def words_command(options: argparse.Namespace) -> None:
    print(words())


def speed_command(options: argparse.Namespace) -> None:
    print(speed(options.steps, str(choose_device(options.device))))


def training_config(options: argparse.Namespace, defaults: TrainConfig) -> TrainConfig:
    """The defaults, with what was given on the command line in their place. A rate is for both stages."""
    given = {name: value for name, value in vars(options).items()
             if value is not None and name in {field.name for field in fields(TrainConfig)}}
    if "learning_rate" in given:
        given["extractor_learning_rate"] = None
    return replace(defaults, **given)


# ---------------------------------------------------------------------------------------------- their options
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
RUN_FOLDER = "folder for everything; the same run found there goes on"


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
                     help="of pictures with transparency, what is opaque is the mask")
    one.add_argument("--method", choices=tuple(METHODS),
                     help=f"see below ({TINY.method}; on public weights {PUBLIC.method})")
    one.add_argument("--base", choices=tuple(BASE_MODELS), default="tiny",
                     help="the base model to learn it on (%(default)s)")
    add_weights(one)
    one.add_argument("--samples-every", type=positive,
                     help="draw the final sheet every so many steps, and keep the concept as it is then, to "
                          "stop by eye")
    one.add_argument("--prompts", type=file_path, help="a file with the sheet's texts, one a line")
    one.add_argument("--size", type=positive,
                     help=f"pixels a side; on public weights, a multiple of 16 ({PUBLIC.size})")
    add_training_options(one)
    one.set_defaults(run=learn_command, goes_on=True)


def add_sample(commands) -> None:
    one = commands.add_parser("sample", help="draw pictures with a learned concept")
    one.add_argument("concept", type=file_path, nargs="+", help="a concept's .safetensors file, or several")
    one.add_argument("prompt", help="with [V] where the concept's name stands, before the class word; "
                                    "of several concepts the names are [V1], [V2], ...; braces say by hand "
                                    "which words speak of one: '{a [V] robot on the left} and a robot'")
    add_weights(one)
    one.add_argument("--number", type=number(int, 1, 1000), default=4,
                     help="pictures, at seeds seed, seed + 1, ... (%(default)s)")
    one.add_argument("--guidance", type=number(float, 0, 100),
                     help="classifier-free guidance; more: closer to the text, less varied (3; public 5)")
    one.add_argument("--strength", type=number(float, 0, 10), default=1.0,
                     help="of the adapters; less: closer to the original model (%(default)s)")
    one.add_argument("--steps", type=number(int, 1, 1000), default=28, help="Euler steps (%(default)s)")
    one.add_argument("--negative", default="", metavar="TEXT",
                     help="what should not be there, in the place of guidance's empty text")
    one.add_argument("--empty-text", choices=("adapted", "base"), default="base",
                     help="who answers guidance's empty text: the adapted model or the base model, as in "
                          "every table and picture here (%(default)s)")
    one.add_argument("--only-with-token", action="store_true",
                     help="switch the adapters off for every text without [V], the empty one included")
    add_out(one, "output/sample.png", "the sheet; single pictures lie beside it, and nothing is overwritten")
    add_common_options(one)
    one.set_defaults(run=sample_command)


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(prog="python -m purecc_min", description=description, formatter_class=RAW)
    parser.set_defaults(goes_on=False)
    parser.add_argument("--version", action="version", version=f"purecc-min {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    one = commands.add_parser("demo", help="what runs without a command")
    add_out(one, "output/demo", RUN_FOLDER)
    add_training_options(one)
    one.set_defaults(run=demo_command, goes_on=True)

    add_learn(commands)
    add_sample(commands)

    one = commands.add_parser("export", help="the adapters as a LoRA file for diffusers and ComfyUI")
    one.add_argument("concept", type=file_path,
                     help="a concept's .safetensors file, learned on public weights")
    add_out(one, "output/pytorch_lora_weights.safetensors", "the LoRA file")
    one.set_defaults(run=export_command)

    one = commands.add_parser("memory", help="what Stable Diffusion 3.5 Medium needs on a card")
    one.set_defaults(run=memory_command)

    one = commands.add_parser("words", help="the words that the tiny model knows")
    one.set_defaults(run=words_command)

    one = commands.add_parser("speed", help="seconds a step and peak memory")
    one.add_argument("--steps", type=positive, default=60, help="steps measured of each (%(default)s)")
    add_common_options(one)
    one.set_defaults(run=speed_command)
    return parser

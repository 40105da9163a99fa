"""The commands.

    python -m purecc_min                                       the demo: one concept, plain LoRA against PureCC, side by side
    python -m purecc_min learn photos/ --class-word robot      learn a concept from your own pictures
    python -m purecc_min sample concept.safetensors "a [V] robot on the beach"
    python -m purecc_min compare --seeds 5                     every measure over several seeds
    python -m purecc_min speed                                 seconds a step and peak memory
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from purecc_min.branch import TOKEN, Branch
from purecc_min.compare import compare
from purecc_min.concept import load_concept
from purecc_min.demo import demo, draw_sheet
from purecc_min.evaluate import draw_all, measure, table
from purecc_min.run import claim, follow
from purecc_min.sheet import sheet
from purecc_min.speed import speed
from purecc_min.train import TrainConfig, learn
from tinyflow.errors import InputError, report_errors
from tinyflow.pipeline import Pipeline, choose_device
from tinyflow.reader import Reader


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of TrainConfig, each with what it does."""
    defaults = TrainConfig()
    parser.add_argument("--steps", type=positive, default=defaults.steps,
                        help="steps of each stage; more: closer to the references, and more damage (%(default)s)")
    parser.add_argument("--batch", type=positive, default=defaults.batch, help="pictures a step (%(default)s)")
    parser.add_argument("--rank", type=positive, default=defaults.rank, help="rank of the adapters (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="of the adapters (%(default)s)")
    parser.add_argument("--embedding-learning-rate", type=float, default=defaults.embedding_learning_rate, help="of the embeddings Y (%(default)s)")
    parser.add_argument("--eta", type=float, default=defaults.eta, help="weight of L_PureCC, Eq. 15; 0 is a plain LoRA (%(default)s)")
    parser.add_argument("--lambda", dest="fixed_lambda", type=float, help="a constant in place of lambda*, Eq. 12")
    parser.add_argument("--original", choices=("model", "base"), default=defaults.original,
                        help="v_original, Eq. 9: from the trainable model or from the untouched base (%(default)s)")
    parser.add_argument("--attach", dest="detach", action="store_false", help="let the gradient through v_original")
    add_common_options(parser)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto takes CUDA, then MPS, then CPU")


def training_config(options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(**{name: getattr(options, name) for name in TrainConfig.__dataclass_fields__})


def demo_command(options: argparse.Namespace) -> None:
    begun = time.time()
    results = demo(load_pipeline(options), training_config(options), options.out)
    print(f"\n{table(results)}\n\n{options.out}/comparison.png shows both, side by side; {options.out}/ holds the concepts, the logs and the table"
          f" ({time.time() - begun:.0f} s)")


def learn_command(options: argparse.Namespace) -> None:
    pipe, config = load_pipeline(options), training_config(options)
    concept = load_concept(options.folder, options.class_word, pipe.picture_size)
    for note in concept.notes:
        print("converted", note)
    claim(options.out, concept, config)
    rows = learn(pipe, concept, config, options.out)
    follow("stages 1 and 2", ({**row, "step": row["step"] + (config.steps if stage == "stage 2" else 0)} for stage, row in rows), 2 * config.steps)
    branch, _ = Branch.load(pipe, options.out / "concept.safetensors")
    draw_sheet(pipe, concept, {"PureCC": branch}, options.out / "comparison.png")
    word, references = concept.class_word, np.stack([r.picture for r in concept.references])
    drawn = [draw_all(pipe, model, word, name) for name, model in (("original", None), ("PureCC", branch))]
    values = measure(pipe, Reader.shipped(), branch, word, references, *drawn)
    print(f"\n{table({'PureCC': values})}\n\nlearned: {options.out}/concept.safetensors; {options.out}/comparison.png shows it")


def sample_command(options: argparse.Namespace) -> None:
    pipe = load_pipeline(options)
    branch, facts = Branch.load(pipe, options.concept)
    if TOKEN not in options.prompt:
        raise InputError(f"the prompt {options.prompt!r} has no {TOKEN}; write it before the class word, as in 'a {TOKEN} {facts['class_word']}'")
    text = pipe.encode_text([options.prompt] * options.number, {TOKEN: facts["class_word"]})
    seeds = list(range(options.seed, options.seed + options.number))
    pictures = list(pipe.decode_images(branch.sample(pipe, text, seeds, steps=options.steps, guidance=options.guidance)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet([(options.prompt, pictures)], [(0, [f"seed {seed}" for seed in seeds])]).save(options.out)
    print(options.out)


def compare_command(options: argparse.Namespace) -> None:
    print(compare(load_pipeline(options), training_config(options), options.seeds, options.out))


def speed_command(options: argparse.Namespace) -> None:
    print(speed(options.steps, str(choose_device(options.device))))


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    try:
        return Pipeline.shipped(choose_device(options.device))
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {options.device}: this machine has none that torch can use; try --device cpu") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m purecc_min", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    one = commands.add_parser("demo", help="what runs without a command")
    one.add_argument("--out", type=Path, default=Path("output/demo"), help="folder for everything; the same run found there goes on (%(default)s)")
    add_training_options(one)
    one.set_defaults(run=demo_command)

    one = commands.add_parser("learn", help="learn a concept from a folder of pictures")
    one.add_argument("folder", type=Path, help="3 to 5 pictures, with texts beside them (.txt, metadata.jsonl or a CSV)")
    one.add_argument("--class-word", help="an ordinary word for the kind of thing that [V] is")
    one.add_argument("--out", type=Path, default=Path("output/learned"), help="folder for everything; the same run found there goes on (%(default)s)")
    add_training_options(one)
    one.set_defaults(run=learn_command)

    one = commands.add_parser("sample", help="draw pictures with a learned concept")
    one.add_argument("concept", type=Path, help="a concept's .safetensors file")
    one.add_argument("prompt", help="with [V] where the concept's name stands, before the class word")
    one.add_argument("--number", type=positive, default=4, help="pictures, at seeds seed, seed + 1, ... (%(default)s)")
    one.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance; more: closer to the text, less varied (%(default)s)")
    one.add_argument("--steps", type=positive, default=28, help="Euler steps (%(default)s)")
    one.add_argument("--out", type=Path, default=Path("output/sample.png"), help="the picture file (%(default)s)")
    add_common_options(one)
    one.set_defaults(run=sample_command)

    one = commands.add_parser("compare", help="every measure over several seeds")
    one.add_argument("--seeds", type=positive, default=5, help="training seeds (%(default)s)")
    one.add_argument("--out", type=Path, default=Path("output/compare"), help="folder for everything; goes on where it stopped (%(default)s)")
    add_training_options(one)
    one.set_defaults(run=compare_command)

    one = commands.add_parser("speed", help="seconds a step and peak memory")
    one.add_argument("--steps", type=positive, default=60, help="steps measured of each (%(default)s)")
    add_common_options(one)
    one.set_defaults(run=speed_command)
    return parser


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments or ["demo"])
    with report_errors():
        options.run(options)


if __name__ == "__main__":
    main()

"""The commands.

    python -m purecc_min                                       the demo: one concept, plain LoRA against PureCC, side by side
    python -m purecc_min learn photos/ --class-word robot      learn a concept from your own pictures
    python -m purecc_min sample concept.safetensors "a [V] robot on the beach"
    python -m purecc_min export concept.safetensors            the adapters as a LoRA file for diffusers and ComfyUI
    python -m purecc_min memory                                what Stable Diffusion 3.5 Medium needs on a card
    python -m purecc_min speed                                 seconds a step and peak memory
    python -m purecc_min.benchmark                             how purely each method learns, over concepts and seeds
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from purecc_min.base import BASES, check_base, open_base, usable_device
from purecc_min.branch import TOKEN, Branch
from purecc_min.concept import load_concept
from purecc_min.demo import assess, demo, draw_sheet, unseen_texts
from purecc_min.evaluate import table
from purecc_min.export import export_lora
from purecc_min.memory import memory_table, plan
from purecc_min.run import claim, follow
from purecc_min.sheet import sheet
from purecc_min.speed import speed
from purecc_min.toy import Toy
from purecc_min.train import TrainConfig, learn
from tinyflow.errors import InputError, positive, report_errors
from tinyflow.pipeline import Pipeline, choose_device
from tinyflow.sd3 import SD35_MEDIUM, read_config
from tinyflow.weights import load_tensors


def default(name: str) -> str:
    """What an option of TrainConfig is if it is not given, for the help."""
    tiny, public = (getattr(BASES[base].training, name) for base in ("tiny", "sd3.5-medium"))
    return f"({tiny})" if tiny == public else f"({tiny}; on public weights {public})"


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of TrainConfig that whoever learns a concept may want, each with what it does. None stands for the base's default."""
    parser.add_argument("--steps", type=positive, help=f"steps of each stage; more: closer to the references, and more damage {default('steps')}")
    parser.add_argument("--batch", type=positive, help=f"pictures a step {default('batch')}")
    parser.add_argument("--rank", type=positive, help=f"rank of the adapters {default('rank')}")
    parser.add_argument("--learning-rate", type=float, help=f"of the adapters {default('learning_rate')}")
    parser.add_argument("--embedding-learning-rate", type=float, help=f"of the embeddings Y {default('embedding_learning_rate')}")
    parser.add_argument("--eta", type=float, help=f"weight of L_PureCC, Eq. 15; 0 is a plain LoRA {default('eta')}")
    add_common_options(parser)


def add_ablations(parser: argparse.ArgumentParser) -> None:
    """Where the method can be taken apart."""
    parser.add_argument("--fixed-lambda", type=float, help="a constant in place of lambda*, Eq. 12")
    parser.add_argument("--original", choices=("model", "base"), default="model",
                        help="v_original, Eq. 9, from the trained model or from the untouched base (%(default)s)")
    parser.add_argument("--attach", dest="detach", action="store_false", help="let the gradient through v_original")


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, help="public weights: the model's diffusers folder, or its single .safetensors file")
    parser.add_argument("--text", type=Path, help="a folder with the text encoders and tokenizers that --weights lacks")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto takes CUDA, then MPS, then CPU")


def training_config(options: argparse.Namespace, defaults: TrainConfig = BASES["tiny"].training) -> TrainConfig:
    given = {name: getattr(options, name, None) for name in TrainConfig.__dataclass_fields__}
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def demo_command(options: argparse.Namespace) -> None:
    begun = time.time()
    results = demo(open_tiny(options), training_config(options), options.out)
    print(f"\n{table(results)}\n\n{options.out}/comparison.png shows both, side by side; {options.out}/ holds the concepts, the logs and the table"
          f" ({time.time() - begun:.0f} s)")


def learn_command(options: argparse.Namespace) -> None:
    base = BASES[options.base]
    config, size, device = training_config(options, base.training), options.size or base.size, usable_device(options.device)
    check_base(options.base, options.weights, size)
    concept = load_concept(options.folder, options.class_word, size, options.variants or base.variants, options.seed)
    for note in concept.notes:
        print("converted", note)
    checkpointing = base.public and plan(read_config(options.weights, options.text, size), config, size, device)
    pipe = open_base(options.base, options.weights, options.text, size, device)
    pipe.mmdit.checkpointing = checkpointing
    claim(options.out, concept, config, f"{options.base} at {size} px")
    rows = learn(pipe, concept, config, options.out, options.base)
    follow("stages 1 and 2", ({**row, "step": row["step"] + (config.steps if stage == "stage 2" else 0)} for stage, row in rows), 2 * config.steps)

    branch, _ = Branch.load(pipe, options.out / "concept.safetensors")
    texts = [r.complete for r in concept.references] if base.public else unseen_texts(concept.class_word)
    draw_sheet(pipe, concept, {"PureCC": branch}, texts, options.out / "comparison.png")
    if not base.public:                          # the reader network knows the picture-book world only
        print(f"\n{table(assess(pipe, Toy(dict(object=concept.class_word), {}), concept, {'PureCC': branch}))}")
    print(f"\nlearned: {options.out}/concept.safetensors; {options.out}/comparison.png shows it")


def sample_command(options: argparse.Namespace) -> None:
    _, facts = load_tensors(options.concept, "concept")
    name, size = facts.get("base", "tiny"), facts.get("size", 32)
    if TOKEN not in options.prompt:
        raise InputError(f"the prompt {options.prompt!r} has no {TOKEN}; write it before the class word, as in 'a {TOKEN} {facts['class_word']}'")
    check_base(name, options.weights, size)
    pipe = open_base(name, options.weights, options.text, size, usable_device(options.device))
    branch, _ = Branch.load(pipe, options.concept)
    text = pipe.encode_text([options.prompt], {TOKEN: facts["class_word"]})[[0] * options.number]
    seeds = list(range(options.seed, options.seed + options.number))
    pictures = list(pipe.decode_images(branch.sample(pipe, text, seeds, steps=options.steps, guidance=options.guidance)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet([(options.prompt, pictures)], [(0, [f"seed {seed}" for seed in seeds])], side=max(size, 128)).save(options.out)
    print(options.out)


def export_command(options: argparse.Namespace) -> None:
    print(f"{options.out}: {export_lora(options.concept, options.out)} tensors; the layer-wise embeddings stay behind (README, \"Other programs\")")


def memory_command(options: argparse.Namespace) -> None:
    print(memory_table(SD35_MEDIUM))


def speed_command(options: argparse.Namespace) -> None:
    print(speed(options.steps, str(choose_device(options.device))))


def open_tiny(options: argparse.Namespace) -> Pipeline:
    return open_base("tiny", None, None, 32, usable_device(options.device))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m purecc_min", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    one = commands.add_parser("demo", help="what runs without a command")
    one.add_argument("--out", type=Path, default=Path("output/demo"), help="folder for everything; the same run found there goes on (%(default)s)")
    add_training_options(one)
    add_ablations(one)
    one.set_defaults(run=demo_command)

    one = commands.add_parser("learn", help="learn a concept from a folder of pictures")
    one.add_argument("folder", type=Path, help="3 to 5 pictures, with texts beside them (.txt, metadata.jsonl or a CSV)")
    one.add_argument("--class-word", help="an ordinary word for the kind of thing that [V] is")
    one.add_argument("--out", type=Path, default=Path("output/learned"), help="folder for everything; the same run found there goes on (%(default)s)")
    one.add_argument("--base", choices=tuple(BASES), default="tiny", help="the model to learn it on (%(default)s)")
    add_weights(one)
    one.add_argument("--size", type=positive, help=f"pixels a side; on public weights, a multiple of 16 ({BASES['sd3.5-medium'].size})")
    one.add_argument("--variants", type=positive,
                     help=f"of each picture: itself, random crops and flips (1; on public weights {BASES['sd3.5-medium'].variants})")
    add_training_options(one)
    one.set_defaults(run=learn_command)

    one = commands.add_parser("sample", help="draw pictures with a learned concept")
    one.add_argument("concept", type=Path, help="a concept's .safetensors file")
    one.add_argument("prompt", help="with [V] where the concept's name stands, before the class word")
    add_weights(one)
    one.add_argument("--number", type=positive, default=4, help="pictures, at seeds seed, seed + 1, ... (%(default)s)")
    one.add_argument("--guidance", type=float, help="classifier-free guidance; more: closer to the text, less varied (3; on public weights 5)")
    one.add_argument("--steps", type=positive, default=28, help="Euler steps (%(default)s)")
    one.add_argument("--out", type=Path, default=Path("output/sample.png"), help="the picture file (%(default)s)")
    add_common_options(one)
    one.set_defaults(run=sample_command)

    one = commands.add_parser("export", help="the adapters as a LoRA file for diffusers and ComfyUI")
    one.add_argument("concept", type=Path, help="a concept's .safetensors file, learned on public weights")
    one.add_argument("--out", type=Path, default=Path("output/pytorch_lora_weights.safetensors"), help="the LoRA file (%(default)s)")
    one.set_defaults(run=export_command)

    one = commands.add_parser("memory", help="what Stable Diffusion 3.5 Medium needs on a card, counted without one")
    one.set_defaults(run=memory_command)

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

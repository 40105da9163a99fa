"""The command line of this project.

    python -m purecc_min                                     the demo: one concept, learned in four ways
    python -m purecc_min learn photos/ --class-word robot    learn a concept from your own pictures
    python -m purecc_min sample concept.safetensors "a [V] robot on the beach"
    python -m purecc_min sample one.safetensors two.safetensors "a [V1] robot and a [V2] cat"
    python -m purecc_min export concept.safetensors          write the adapters as a LoRA for diffusers
    python -m purecc_min words                               list the words that the tiny model knows
    python -m purecc_min memory                              what Stable Diffusion 3.5 Medium needs on a card
    python -m purecc_min speed                               measure a training step's time and memory
    python -m purecc_min.benchmark                           what each method learns, and what it damages
"""

import sys
from importlib import import_module

from tinyflow.terminal import report_errors


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Without one, the options belong to `demo`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["demo", *arguments]
    with report_errors():
        from purecc_min.commands.options import build_parser  # here: loading torch takes seconds
        options = build_parser(__doc__).parse_args(arguments)
        command = import_module(f"purecc_min.commands.{options.command}")
        with report_errors(options.goes_on):
            getattr(command, f"{options.command}_command")(options)


if __name__ == "__main__":
    main()

"""The commands.

    python -m purecc_min                                     the demo: one concept, learned in four ways
    python -m purecc_min learn photos/ --class-word robot    learn a concept from your own pictures
    python -m purecc_min sample concept.safetensors "a [V] robot on the beach"
    python -m purecc_min sample one.safetensors two.safetensors "a [V1] robot and a [V2] cat"
    python -m purecc_min export concept.safetensors          the adapters as a LoRA for diffusers and ComfyUI
    python -m purecc_min words                               what the tiny model's texts can say
    python -m purecc_min memory                              what Stable Diffusion 3.5 Medium needs on a card
    python -m purecc_min speed                               seconds a step and peak memory
    python -m purecc_min.benchmark                           how purely each method learns
"""

import sys
from importlib import import_module

from tinyflow.terminal import report_errors


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Options without a command are the demo's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments = ["demo", *arguments]
    with report_errors():
        from purecc_min.commands.options import build_parser  # loads torch, which takes seconds to stop in
        from tinyflow.threads import room_for_others
        options = build_parser(__doc__).parse_args(arguments)
        command = import_module(f"purecc_min.commands.{options.command}")
        with report_errors(options.goes_on), room_for_others():
            getattr(command, f"{options.command}_command")(options)


if __name__ == "__main__":
    main()

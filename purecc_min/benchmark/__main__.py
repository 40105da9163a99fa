"""The purity benchmark: what a concept costs the model, measured exactly.

    python -m purecc_min.benchmark                       the main table on the shipped base
    python -m purecc_min.benchmark --quick               one seed, two concepts, four methods
    python -m purecc_min.benchmark claims                another part: tuning, claims, factors, further, mechanism, pairs
    python -m purecc_min.benchmark --methods NAME        a method of your own, beside the results that came with this repository
    python -m purecc_min.benchmark --concepts NAME       a concept of your own

Each part first says how long it will take, from steps that it times on this machine. It can be stopped at any time; the same command goes
on where it stopped. Everything lands in --out: results.json and results.csv (every measure, every seed), table.md, and pictures.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from purecc_min.benchmark.cells import ALL, STEPS
from purecc_min.benchmark.plans import SEEDS, plan
from purecc_min.benchmark.workers import run
from purecc_min.toy import CONCEPTS
from tinyflow.errors import InputError, positive, report_errors


def known(kind: str, names: list[str], choices: dict) -> tuple[str, ...]:
    """The names, if all of them are choices. Raises InputError for one that is not."""
    if unknown := [name for name in names if name not in choices]:
        raise InputError(f"--{kind} {unknown[0]!r}: there is none of this name; there are {', '.join(choices)}")
    return tuple(names)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m purecc_min.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*SEEDS, "mechanism", "pairs"), default="main", help="what to run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="main: one seed, two concepts, four methods")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="main: train these alone, beside the shipped results")
    parser.add_argument("--concepts", nargs="+", default=[], metavar="NAME", help="main: these concepts in place of its own")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of training; fewer to try something out (%(default)s)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="cells at once, a core each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark"), help="folder for everything; goes on where it stopped (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with report_errors():
        try:
            from purecc_min.benchmark.mechanism import mechanism
            from purecc_min.benchmark.pairs import pairs
            from purecc_min.benchmark.report import report
        except ModuleNotFoundError as error:
            raise InputError(f"the benchmark's pictures need {error.name}: pip install -r tutorials/requirements.txt") from None
        methods, concepts = known("methods", options.methods, ALL), known("concepts", options.concepts, CONCEPTS)
        if (options.quick or methods or concepts) and options.part != "main":
            raise InputError(f"--quick, --methods and --concepts are for the main part; leave them out of {options.part}")
        if options.part in ("mechanism", "pairs"):
            print(mechanism(options.out, options.workers) if options.part == "mechanism" else pairs(options.out))
            return
        cells = [replace(cell, steps=options.steps) for cell in plan(options.part, options.quick, methods, concepts)]
        run(cells, options.out, options.workers, shipped=bool(methods))
        shown = list(dict.fromkeys(cells + plan("main"))) if methods else cells
        print(report(options.part, shown, options.out, shipped=bool(methods)))


if __name__ == "__main__":
    main()

"""The purity benchmark: what a concept costs the model, measured exactly.

    python -m purecc_min.benchmark                     the main table on the shipped base model
    python -m purecc_min.benchmark --quick             one seed, two concepts, three methods
    python -m purecc_min.benchmark claims              another part: tuning, further, factors, phrase
    python -m purecc_min.benchmark --methods NAME      a method of your own, with the shipped results
    python -m purecc_min.benchmark --concepts NAME     a concept of your own

Each part first says how long it will take, from steps that it times on this machine. It can be stopped at
any time; the same command goes on where it stopped. Everything lands in --out: results.json and results.csv
(every measure, every seed), table.md, and pictures.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from purecc_min.benchmark.cells import ALL, STEPS
from purecc_min.benchmark.plans import SEEDS, plan
from purecc_min.benchmark.two import plan_two
from purecc_min.benchmark.workers import run
from purecc_min.measure.toy import CONCEPTS
from tinyflow.disk import locked, make_folder
from tinyflow.errors import InputError
from tinyflow.terminal import Parser, file_path, number, positive, report_errors


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m purecc_min.benchmark", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=SEEDS, default="main", help="what to run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="main: one seed, two concepts, three methods")
    parser.add_argument("--methods", nargs="+", choices=tuple(ALL), default=[], metavar="NAME",
                        help="main: train only these; the shipped results fill the rest of the tables")
    parser.add_argument("--concepts", nargs="+", choices=tuple(CONCEPTS), default=[], metavar="NAME",
                        help="main: these concepts in place of the main part's")
    parser.add_argument("--steps", type=positive, default=STEPS,
                        help="of training; fewer for a test (%(default)s)")
    parser.add_argument("--workers", type=number(int, 1, 256), default=os.cpu_count(),
                        help="worker processes, each on one core (%(default)s)")
    parser.add_argument("--out", type=file_path, default=Path("output/benchmark"),
                        help="folder for all results; a stopped run in it is resumed (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    part, methods, concepts = options.part, options.methods, options.concepts
    with report_errors(goes_on=True):
        try:
            from purecc_min.benchmark.report import report
        except ModuleNotFoundError as error:
            raise InputError(f"the benchmark's pictures need {error.name}: "
                             "pip install matplotlib") from None
        if (options.quick or methods or concepts) and part != "main":
            raise InputError("--quick, --methods and --concepts are for the main part; "
                             f"leave them out of {part}")
        planned = dict.fromkeys(plan(part, options.quick, methods, concepts))    # a name may be given twice
        cells, whole = [replace(cell, steps=options.steps) for cell in planned], options.steps == STEPS
        for name in methods:
            if not any(cell.method == name for cell in cells):
                raise InputError(f"--methods {name}: it needs scenes of two things, so it learns no style; "
                                 "give an individual with --concepts")
        make_folder(options.out)
        with locked(options.out):
            all_of_main = part == "main" and whole and not (options.quick or methods or concepts)
            pairs, shipped = plan_two() if all_of_main else [], bool(methods) and whole
            run(cells + pairs, options.out, options.workers, shipped)
            rows = list(dict.fromkeys(cells + plan("main"))) if shipped else cells
            print(report(part, rows, pairs, options.out, bool(methods)))


if __name__ == "__main__":
    main()

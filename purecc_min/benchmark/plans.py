"""The parts of the benchmark, as lists of cells.

    tuning     every method's three tries on the three tuning concepts; the best settings stand in entries.py
    main       what people use, the paper's method, and both bound: six held-out concepts, five seeds
    further    rivals and experiments on the same concepts, three seeds
    claims     the main part, two rivals of the further one, and the paper's ablations on one concept:
               lambda (Table 3), eta (Table 6), where v_original comes from (Sec. 14); for adapters that act
               everywhere and for bound ones
    factors    one thing at a time changed on one concept: what is shared, captions, references, rank

Read next: workers.py.
"""

import itertools
from typing import Iterable

from purecc_min.benchmark.cells import Cell
from purecc_min.benchmark.entries import ABLATIONS, FURTHER, MAIN
from purecc_min.measure.toy import CONCEPTS, HELD_OUT, TUNING

SEEDS = {"tuning": 1, "main": 5, "further": 3, "claims": 3, "factors": 3}
ABLATED = "striped_cat"
RIVALS = ("DreamBooth + EWC", "merged stages")   # of the further part, which the paper compares with
VARIANTS = [name for name in CONCEPTS if name.startswith(f"{ABLATED},")]
RANKS = (1, 16)
QUICK = dict(concepts=("striped_cat", "school_chalk"), methods=("LoRA", "paper", "bound"))


def ends(concepts: Iterable[str]) -> list[Cell]:
    """The two ends of the scale."""
    return [Cell(concept, name) for concept in concepts for name in ("nothing", "perfect")]


def plan(part: str, quick: bool = False, methods: Iterable[str] = (),
         concepts: Iterable[str] = ()) -> list[Cell]:
    """The cells of a part.

    Args:
        quick: one seed, two concepts and three methods of the main part.
        methods, concepts: in place of the main part's own.
    """
    seeds = range(1 if quick else SEEDS[part])
    if part == "tuning":
        return ends(TUNING) + [Cell(concept, name, 0, tuple(settings.items()))
                               for name, method in (MAIN | FURTHER).items() for settings in method.tries
                               for concept in TUNING]
    if part in ("main", "further"):
        methods = methods or (QUICK["methods"] if quick else MAIN if part == "main" else FURTHER)
        concepts = concepts or (QUICK["concepts"] if quick else HELD_OUT)
        cells = [Cell(concept, name, seed) for seed in seeds for concept in concepts for name in methods]
        return cells + ends(concepts)
    if part == "claims":
        rivals = [Cell(concept, name, seed) for seed in seeds for concept in HELD_OUT for name in RIVALS]
        return plan("main") + rivals + [Cell(ABLATED, name, seed, on_the_way=False)
                                        for seed in seeds for name in ABLATIONS]
    cells = ends((ABLATED, *VARIANTS))
    for seed, name in itertools.product(seeds, ("LoRA", "paper", "bound")):
        cells.append(Cell(ABLATED, name, seed))
        cells += [Cell(concept, name, seed, on_the_way=False) for concept in VARIANTS]
        cells += [Cell(ABLATED, name, seed, (("rank", rank),), on_the_way=False) for rank in RANKS]
    return cells

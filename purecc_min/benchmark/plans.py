"""The parts of the benchmark, as lists of cells.

    tuning     every method's three tries on the three tuning concepts; the best settings stand in registry.py
               and entries.py
    main       what people use, the paper's method, both bound to the token: six earlier concepts, five seeds
    further    rivals and experiments on the same concepts, three seeds
    claims     the main part, two rivals of the further one, and the paper's ablations on one concept:
               lambda (Table 3), eta (Table 6), where v_original comes from (Sec. 14); for adapters that act
               everywhere and for those bound to the token
    factors    one thing at a time changed on one concept: what is shared, captions, references, rank
    phrase     what in the phrase does what, on the two individuals among the tuning concepts

Read next: workers.py.
"""

import itertools
from typing import Iterable

from purecc_min.benchmark.cells import ALL, Cell
from purecc_min.benchmark.entries import ABLATIONS, FURTHER, MAIN, RATES, TOKEN_RATES
from purecc_min.measure.toy import CONCEPTS, EARLIER, TUNING

SEEDS = {"tuning": 1, "main": 5, "further": 3, "claims": 3, "factors": 3, "phrase": 3}
ABLATED = "striped_cat"
RIVALS = ("DreamBooth + EWC", "merged stages")   # of the further part, which the paper compares with
VARIANTS = [name for name in CONCEPTS if name.startswith(f"{ABLATED},")]
RANKS = (1, 16)
INDIVIDUALS = [name for name in TUNING if not CONCEPTS[name].is_style]
TAKEN_APART = {                                  # methods of the part `phrase` -> what is changed in each row
    "bound-half": ({}, dict(rank=16)),
    "bound-pairs": ({}, dict(rank=16), dict(imagined=16), dict(imagined=64)),
    "token": ({},), "token, word kept": ({},), "lora, word kept": (RATES[1],), "bound, Y added": ({},),
    "token, Y added": ({},), "bound, Y replaces": ({},), "bound-pairs, lambda*": ({},),
    "bound, values alone": ({},),
    "bound-paper": (dict(eta=0.3), {}),
}
GRIDS = {"bound": TOKEN_RATES, "lora, switched off": RATES}    # at rank 1, 4 and 16
QUICK = dict(concepts=("striped_cat", "school_chalk"), methods=("lora", "paper", "bound"))


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
        concepts = concepts or (QUICK["concepts"] if quick else EARLIER)
        cells = [Cell(concept, name, seed) for seed in seeds for concept in concepts for name in methods]
        return cells + ends(concepts)
    if part == "claims":
        rivals = [Cell(concept, name, seed) for seed in seeds for concept in EARLIER for name in RIVALS]
        return plan("main") + rivals + [Cell(ABLATED, name, seed, on_the_way=False)
                                        for seed in seeds for name in ABLATIONS]
    if part == "phrase":
        return phrase_cells(seeds)
    cells = ends((ABLATED, *VARIANTS))
    for seed, name in itertools.product(seeds, ("lora", "paper", "token")):
        cells.append(Cell(ABLATED, name, seed))
        cells += [Cell(concept, name, seed, on_the_way=False) for concept in VARIANTS]
        cells += [Cell(ABLATED, name, seed, (("rank", rank),), on_the_way=False) for rank in RANKS]
    return cells


def phrase_cells(seeds: Iterable[int]) -> list[Cell]:
    """The part `phrase`: every row on both individuals, and `bound` also with braces around the phrase.

    The front of the paper's objective is compared with that of `bound`, so these two are measured on the way.
    Ranks other than 4 have one seed.
    """
    braced = [f"{name}, braces" for name in INDIVIDUALS]
    cells = ends([*INDIVIDUALS, *braced])

    def add(concepts: list[str], method: str, changes: dict, on_the_way: bool = False) -> None:
        changes = {name: value for name, value in changes.items() if ALL[method].settings.get(name) != value}
        cells.extend(Cell(concept, method, seed, tuple(changes.items()), on_the_way=on_the_way)
                     for seed in (seeds[:1] if "rank" in changes else seeds) for concept in concepts)

    def add_grid(rank: int) -> None:
        for method, rates in GRIDS.items():
            for rate in rates:
                changes = rate | (dict(rank=rank) if rank != 4 else {})
                on_the_way = method == "bound" and changes == ALL[method].settings
                add(INDIVIDUALS, method, changes, on_the_way)

    add_grid(4)
    add(braced, "bound", {})
    for method, rows in TAKEN_APART.items():
        for changes in rows:
            add(INDIVIDUALS, method, changes, on_the_way=method == "bound-paper")
    for rank in RANKS:
        add_grid(rank)
    return cells

"""The parts of the benchmark, as lists of cells.

    tuning     every method's three tries on the two tuning concepts; the best settings stand in entries.py
    main       every method on four held-out concepts, five seeds: the first table of README.md
    claims     the main part and the paper's ablations: lambda (Table 3), eta (Table 6), and where v_original
               comes from (Sec. 14)
    factors    one thing at a time changed on one held-out concept: what is shared, captions, references, rank
    further    experiments of ours, on the tuning concepts
    binding    adapters that act at [V] alone beside those that act everywhere, three seeds

Read next: workers.py.
"""

import itertools
from typing import Iterable

from purecc_min.benchmark.cells import Cell
from purecc_min.benchmark.entries import ABLATIONS, BINDING, FURTHER, MAIN
from purecc_min.measure.toy import CONCEPTS, HELD_OUT, TUNING

SEEDS = {"tuning": 1, "main": 5, "claims": 3, "factors": 3, "further": 1, "binding": 3}
ABLATED = "checked_cat"
VARIANTS = [name for name in CONCEPTS if name.startswith(f"{ABLATED},")]
RANKS = (1, 16)
QUICK = dict(concepts=("checked_cat", "blueprint"), methods=("DreamBooth", "LoRA", "LoRA + anchor", "paper"))
UNBOUND = ("LoRA", "paper", "embeddings alone")                  # as in the main part
PASSES = (("steps", 600),)                       # as many passes as 200 steps of the paper's two stages
COMPARED = ("LoRA", "LoRA + anchor", "embeddings alone", "paper", "not detached", "untouched v_original")


def ends(concepts: Iterable[str]) -> list[Cell]:
    """The two ends of the scale."""
    return [Cell(concept, name) for concept in concepts for name in ("nothing", "perfect")]


def plan(part: str, quick: bool = False, methods: Iterable[str] = (),
         concepts: Iterable[str] = ()) -> list[Cell]:
    """The cells of a part.

    Args:
        quick: one seed, two concepts and four methods of the main part.
        methods, concepts: in place of the main part's own.
    """
    seeds = range(1 if quick else SEEDS[part])
    if part == "tuning":
        cells = ends(TUNING)
        for name, method in (MAIN | BINDING).items():
            cells += [Cell(concept, name, 0, tuple(settings.items()))
                      for settings in method.tries for concept in TUNING]
        return cells
    if part == "main":
        methods = methods or (QUICK["methods"] if quick else MAIN)
        concepts = concepts or (QUICK["concepts"] if quick else HELD_OUT)
        cells = [Cell(concept, name, seed) for seed in seeds for concept in concepts for name in methods]
        return cells + ends(concepts)
    if part == "claims":
        return plan("main") + [Cell(ABLATED, name, seed, on_the_way=False)
                               for seed in seeds for name in ABLATIONS]
    if part == "binding":
        cells = ends(HELD_OUT)
        for seed, concept in itertools.product(seeds, HELD_OUT):
            cells += [Cell(concept, name, seed) for name in (*UNBOUND, *BINDING)]
            cells += [Cell(concept, name, seed, PASSES) for name in ("LoRA, base's empty text", "bound")]
        return cells
    if part == "further":
        names = (*COMPARED, *FURTHER)
        return ends(TUNING) + [Cell(concept, name, seed, on_the_way=False)
                               for seed in seeds for concept in TUNING for name in names]
    cells = ends((ABLATED, *VARIANTS))
    for seed, name in itertools.product(seeds, ("LoRA", "paper")):
        cells.append(Cell(ABLATED, name, seed))
        cells += [Cell(concept, name, seed, on_the_way=False) for concept in VARIANTS]
        cells += [Cell(ABLATED, name, seed, (("rank", rank),), on_the_way=False) for rank in RANKS]
    return cells

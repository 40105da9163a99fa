"""The parts of the benchmark, as lists of cells.

    tuning     every method's tries on the three tuning concepts; the best settings stand in registry.py and
               entries.py
    main       all methods of MAIN on the six concepts of the lottery, five seeds
    further    rivals and experiments on six earlier concepts, three seeds
    claims     the paper's claims on the earlier concepts, three seeds; its ablations on one of them: lambda
               (Table 3), eta (Table 6), where v_original comes from (Sec. 14); for adapters that act
               everywhere and for those bound to the phrase
    factors    one thing at a time changed on one earlier concept: what is shared, captions, references, rank
    phrase     which part of the binding has which effect, on two individuals among the tuning concepts

Read next: workers.py.
"""

import itertools
from typing import Iterable

from purecc_min.benchmark.cells import ALL, Cell
from purecc_min.benchmark.entries import ABLATIONS, FURTHER, MAIN, RATES, TOKEN_RATES
from purecc_min.measure.toy import CONCEPTS, EARLIER, HELD_OUT, TUNING
from purecc_min.train import TrainConfig

SEEDS = {"tuning": 1, "main": 5, "further": 3, "claims": 3, "factors": 3, "phrase": 3}
# methods that are also measured at SNAPSHOTS, to be compared at equal fidelity
FRONTS = ("lora", "switched-off", "anchor", "paper", "paper, v_0", "token", "bound", "bound-half",
          "bound-paper")
CLAIMED = ("lora", "paper", "bound", "bound-paper", "DreamBooth", "DreamBooth + EWC", "merged stages")
VARIED = ("DreamBooth", "lora", "paper", "bound")            # what the part `further` compares with
ABLATED = "striped_cat"
VARIANTS = [name for name in CONCEPTS if name.startswith(f"{ABLATED},")]
RANKS = (1, 16)
INDIVIDUALS = [name for name in TUNING if not CONCEPTS[name].is_style]
# methods of the part `phrase` -> what is changed in each row. It was run before ranks were tuned.
AT_4 = dict(learning_rate=4e-3, rank=4)
TAKEN_APART = {
    "bound-half": (AT_4, AT_4 | dict(rank=16)),
    "bound-pairs": (AT_4, AT_4 | dict(rank=16), AT_4 | dict(imagined=16), AT_4 | dict(imagined=64)),
    "token": ({},), "token, word kept": (AT_4,),
    "switched-off, word kept": (dict(learning_rate=2e-3, rank=4),),
    "bound, Y added": (AT_4,), "token, Y added": (AT_4,), "bound, Y replaces": (AT_4,),
    "bound-pairs, lambda*": (AT_4,), "bound, values alone": (AT_4,),
    "bound-paper": (AT_4 | dict(eta=0.3), AT_4),
}
GRIDS = {"bound": TOKEN_RATES, "switched-off": RATES}          # learning rates, at rank 1, 4 and 16
QUICK = dict(concepts=("orange_star", "drawn_chalk"), methods=("lora", "paper", "bound"))


def ends(concepts: Iterable[str]) -> list[Cell]:
    """The original model and the perfect method, for each concept."""
    return [Cell(concept, name) for concept in concepts for name in ("nothing", "perfect")]


def can_learn(method: str, concept: str) -> bool:
    """Whether a method runs on a concept. Methods that imagine pairs, and those compared with them (`times`
    > 1), run on individuals only.
    """
    return not (CONCEPTS[concept].is_style and (ALL[method].imagines or ALL[method].times > 1))


def plan(part: str, quick: bool = False, methods: Iterable[str] = (),
         concepts: Iterable[str] = ()) -> list[Cell]:
    """The cells of a part.

    Args:
        quick: one seed, two concepts and three methods of the main part.
        methods, concepts: in place of the main part's own.
    """
    seeds = range(1 if quick else SEEDS[part])
    if part == "tuning":
        tries = [(name, tuple((dict(rank=TrainConfig.rank) | settings).items()))
                 for name, method in (MAIN | FURTHER).items() for settings in method.tries]
        return ends(TUNING) + [Cell(concept, name, 0, changes, on_the_way=False)
                               for name, changes in tries for concept in TUNING if can_learn(name, concept)]
    if part == "main":
        methods = methods or (QUICK["methods"] if quick else MAIN)
        concepts = concepts or (QUICK["concepts"] if quick else HELD_OUT)
        return ends(concepts) + [Cell(concept, name, seed, on_the_way=name in FRONTS)
                                 for seed in seeds for concept in concepts for name in methods
                                 if can_learn(name, concept)]
    if part == "phrase":
        return phrase_cells(seeds)
    if part == "factors":
        cells = ends((ABLATED, *VARIANTS))
        for seed, name in itertools.product(seeds, ("lora", "paper", "bound")):
            cells += [Cell(concept, name, seed, on_the_way=False) for concept in (ABLATED, *VARIANTS)]
            cells += [Cell(ABLATED, name, seed, (("rank", rank),), on_the_way=False)
                      for rank in (1, 4, 16) if rank != cells[-1].config().rank]
        return cells
    of_all = CLAIMED if part == "claims" else [*FURTHER, *VARIED]
    cells = ends(EARLIER) + [Cell(concept, name, seed, on_the_way=False)
                             for seed in seeds for concept in EARLIER for name in of_all]
    if part == "claims":
        asked = [*((name, ()) for name in ABLATIONS), ("paper, v_0", (("rank", 4),))]    # the paper's rank
        cells += [Cell(ABLATED, name, seed, changes, on_the_way=False)
                  for seed in seeds for name, changes in asked]
    return cells


def phrase_cells(seeds: Iterable[int]) -> list[Cell]:
    """The part `phrase`: every row on both individuals, and `bound` also with braces around the phrase.

    The front of the paper's objective is compared with that of `bound`, so these two are measured on the way.
    Ranks other than 4 have one seed.
    """
    braced = [f"{name}, braces" for name in INDIVIDUALS]
    cells = ends([*INDIVIDUALS, *braced])

    def add(concepts: list[str], method: str, changes: dict, on_the_way: bool = False) -> None:
        own, few = dict(rank=TrainConfig.rank) | ALL[method].settings, changes.get("rank") in RANKS
        changes = {name: value for name, value in changes.items() if own.get(name) != value}
        cells.extend(Cell(concept, method, seed, tuple(changes.items()), on_the_way=on_the_way)
                     for seed in (seeds[:1] if few else seeds) for concept in concepts)

    def add_grid(rank: int) -> None:
        for method, rates in GRIDS.items():
            for rate in rates:
                changes = dict(learning_rate=rate, rank=rank)
                add(INDIVIDUALS, method, changes, on_the_way=method == "bound" and changes == AT_4)

    add_grid(4)
    add(braced, "bound", AT_4)
    for method, rows in TAKEN_APART.items():
        for changes in rows:
            add(INDIVIDUALS, method, changes, on_the_way=method == "bound-paper")
    for rank in RANKS:
        add_grid(rank)
    return cells

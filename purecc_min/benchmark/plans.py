"""The parts of the benchmark, as lists of cells.

    tuning     every method's three tries on the two tuning concepts; the best one's settings stand in methods.py
    main       every method on four held-out concepts, five seeds: the table that README shows
    claims     the main part and the paper's ablations: lambda (Table 3), eta (Table 6), where v_original comes from (Sec. 14)
    factors    one thing at a time changed on one held-out concept: what is shared, captions, references, rank
    further    experiments of ours, on the tuning concepts

Read next: report.py.
"""

from purecc_min.benchmark.cells import Cell
from purecc_min.benchmark.methods import FURTHER, METHODS
from purecc_min.toy import CONCEPTS, HELD_OUT, TUNING

SEEDS = {"tuning": 1, "main": 5, "claims": 3, "factors": 3, "further": 1}
ABLATED = "checked_cat"
ABLATIONS = [("fixed_lambda", value) for value in (1.0, 3.0, 5.0)] + [("eta", value) for value in (0.5, 1.5, 2.0)]
VARIANTS = [name for name in CONCEPTS if name.startswith(f"{ABLATED},")]
RANKS = (1, 16)
QUICK = dict(concepts=("checked_cat", "blueprint"), methods=("DreamBooth", "LoRA", "LoRA + anchor", "paper"))
BASELINES = ("LoRA", "LoRA + anchor", "embeddings alone", "paper")


def ends(concepts) -> list[Cell]:
    """The two ends of the scale."""
    return [Cell(concept, name) for concept in concepts for name in ("nothing", "perfect")]


def plan(part: str, quick: bool = False, methods: tuple[str, ...] = (), concepts: tuple[str, ...] = ()) -> list[Cell]:
    """The cells of a part.

    Args:
        quick: one seed, two concepts, four methods of the main part. methods, concepts: in place of the main part's own.
    """
    seeds = range(1 if quick else SEEDS[part])
    if part == "tuning":
        cells = [Cell(concept, name, 0, tuple(settings.items()))
                 for name in METHODS for settings in METHODS[name].tries for concept in TUNING]
        cells += ends(TUNING)
    elif part == "main":
        chosen = methods or (QUICK["methods"] if quick else tuple(METHODS))
        concepts = concepts or (QUICK["concepts"] if quick else HELD_OUT)
        cells = [Cell(concept, name, seed) for seed in seeds for concept in concepts for name in chosen]
        cells += ends(concepts)
    elif part == "claims":
        cells = plan("main") + [Cell(ABLATED, "paper", seed, (change,), front=False) for seed in seeds for change in ABLATIONS]
        cells += [Cell(ABLATED, name, seed, front=False) for seed in seeds for name in ("not detached", "untouched v_original")]
    elif part == "factors":
        both = ("LoRA", "paper")
        cells = [Cell(ABLATED, name, seed) for seed in seeds for name in both]
        cells += [Cell(concept, name, seed, front=False) for seed in seeds for concept in VARIANTS for name in both]
        cells += [Cell(ABLATED, name, seed, (("rank", rank),), front=False) for seed in seeds for rank in RANKS for name in both]
        cells += ends((ABLATED, *VARIANTS))
    else:
        cells = [Cell(concept, name, seed, front=False) for seed in seeds for concept in TUNING for name in (*BASELINES, *FURTHER)]
        cells += ends(TUNING)
    return list(dict.fromkeys(cells))

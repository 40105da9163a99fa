"""The paper's claims, one row each: what it says, what it is here, and whether it holds.

A claim says that something is larger than something else. Its value is that difference, one number for each
training seed (a mean over concepts). It HOLDS if the whole 95 % interval is above zero, DOES NOT HOLD if
none of it is, and DEPENDS otherwise. A claim that two things are about equal holds if the interval lies
within +- CLOSE. Measures stand in for the paper's: similarity for CLIP-I, DINO and CSD, mask IoU and
outside change for Seg-Cons, layout (place, size and background as asked) for dCLIP-T, path KL for Fig. 2.
Read next: figures.py.
"""

from typing import NamedTuple

import numpy as np

from purecc_min.benchmark.plans import ABLATED
from purecc_min.benchmark.tables import (
    Results,
    final,
    markdown,
    mean_and_interval,
    mean_by_seed,
    name_of,
    plus_minus,
    seed_means,
)
from purecc_min.measure.toy import HELD_OUT

CLOSE = 0.02                                     # for claims that two things are about equal
INSTANCES, STYLES, CAT = HELD_OUT[:3], HELD_OUT[3:], (ABLATED,)


class Claim(NamedTuple):
    source: str
    says: str
    values: list[float]                          # one for each seed; positive where the claim is right
    equal: bool = False

    def verdict(self) -> str:
        mean, half = mean_and_interval(self.values)
        low, high = mean - half, mean + half
        if self.equal:
            holds, fails = low > -CLOSE and high < CLOSE, low > CLOSE or high < -CLOSE
        else:
            holds, fails = low > 0, high <= 0
        return "holds" if holds else "does not hold" if fails else "depends"


# Where it stands, what it says, and the two methods, the measure and the concepts that are compared
COMPARISONS = [
    ("Table 1, instances", "fidelity (CLIP-I, DINO): PureCC above DreamBooth",
     "paper", ">", "DreamBooth", "similarity", INSTANCES),
    ("Table 1, instances", "Seg-Cons: PureCC above DreamBooth, mask IoU",
     "paper", ">", "DreamBooth", "mask IoU", INSTANCES),
    ("Table 1, instances", "Seg-Cons: DreamBooth changes more outside the masks",
     "DreamBooth", ">", "paper", "outside change", INSTANCES),
    ("Table 1, instances", "dCLIP-T: PureCC follows the text better than DreamBooth, layout",
     "paper", ">", "DreamBooth", "layout", INSTANCES),
    ("Table 1, instances", "fidelity (CLIP-I, DINO): PureCC above DreamBooth + prior",
     "paper", ">", "DreamBooth + prior", "similarity", INSTANCES),
    ("Table 1, instances", "Seg-Cons: PureCC above DreamBooth + prior, mask IoU",
     "paper", ">", "DreamBooth + prior", "mask IoU", INSTANCES),
    ("Table 1, instances", "Seg-Cons: DreamBooth + prior changes more outside the masks",
     "DreamBooth + prior", ">", "paper", "outside change", INSTANCES),
    ("Table 1, instances", "dCLIP-T: PureCC follows the text better than DreamBooth + prior, layout",
     "paper", ">", "DreamBooth + prior", "layout", INSTANCES),
    ("Table 1, style", "CSD: PureCC above DreamBooth", "paper", ">", "DreamBooth", "similarity", STYLES),
    ("Table 1, style", "dCLIP-T: PureCC follows the text better than DreamBooth, layout",
     "paper", ">", "DreamBooth", "layout", STYLES),
    ("Table 2", "fidelity: full above L_CC alone", "paper", ">", "LoRA", "similarity", HELD_OUT),
    ("Table 2", "Seg-Cons: full above L_CC alone, mask IoU", "paper", ">", "LoRA", "mask IoU", HELD_OUT),
    ("Table 2", "Seg-Cons: L_CC alone changes more outside the masks",
     "LoRA", ">", "paper", "outside change", HELD_OUT),
    ("Table 2", "fidelity: full above merged stages", "paper", ">", "merged stages", "similarity", HELD_OUT),
    ("Table 2", "Seg-Cons: full above merged stages, mask IoU",
     "paper", ">", "merged stages", "mask IoU", HELD_OUT),
    ("Table 2", "Seg-Cons: merged stages changes more outside the masks",
     "merged stages", ">", "paper", "outside change", HELD_OUT),
    ("Table 3", "fidelity: lambda 3 above 1", "paper, lambda 3", ">", "paper, lambda 1", "similarity", CAT),
    ("Table 3", "fidelity: lambda 5 above 3", "paper, lambda 5", ">", "paper, lambda 3", "similarity", CAT),
    ("Table 3", "fidelity: lambda* above lambda 1", "paper", ">", "paper, lambda 1", "similarity", CAT),
    ("Table 3", "fidelity: lambda* above lambda 3", "paper", ">", "paper, lambda 3", "similarity", CAT),
    ("Table 3", "fidelity: lambda* above lambda 5", "paper", ">", "paper, lambda 5", "similarity", CAT),
    ("Table 3", "lambda 5 follows the text worse than lambda*, layout",
     "paper", ">", "paper, lambda 5", "layout", CAT),
    ("Table 6", "fidelity: eta 1 above 0.5", "paper", ">", "paper, eta 0.5", "similarity", CAT),
    ("Table 6", "fidelity: eta 1 above 1.5", "paper", ">", "paper, eta 1.5", "similarity", CAT),
    ("Table 6", "fidelity: eta 1 above 2", "paper", ">", "paper, eta 2", "similarity", CAT),
    ("Sec. 14", "v_original from theta2 is as good as from a frozen copy, similarity",
     "paper", "=", "untouched v_original", "similarity", CAT),
    ("Sec. 14", "v_original from theta2 is as good as from a frozen copy, mask IoU",
     "paper", "=", "untouched v_original", "mask IoU", CAT),
    ("not in the paper", "detaching v_original makes no difference, similarity",
     "paper", "=", "not detached", "similarity", CAT),
    ("Fig. 2", "KL to the original: LoRA above PureCC", "LoRA", ">", "paper", "path KL", HELD_OUT),
    ("Fig. 2", "KL to the original: DreamBooth above LoRA", "DreamBooth", ">", "LoRA", "path KL", HELD_OUT),
]


def difference(results: Results, larger: str, smaller: str, measure: str,
               concepts: tuple[str, ...]) -> list[float]:
    """One method's measure minus the other's, on the same concepts and seeds.

    Returns: its mean over concepts, one value for each seed.
    """
    known = {(name_of(r), r["concept"], r["seed"]): final(r) for r in results if r["concept"] in concepts}
    pairs = []
    for (name, concept, seed), values in known.items():
        if name == larger and (smaller, concept, seed) in known:
            pairs.append((seed, values[measure] - known[smaller, concept, seed][measure]))
    return mean_by_seed(pairs)


def term(result: dict, step: int, name: str) -> float:
    """One of the logged terms at a training step: its mean over t."""
    return float(np.mean([row[name] for row in result["terms"][str(step)]]))


def claims(results: Results) -> list[Claim]:
    """All of them. Those of which a cell is missing have no values."""
    rows, papers = [], [result for result in results if name_of(result) == "paper"]
    for source, says, larger, sign, smaller, measure, concepts in COMPARISONS:
        rows.append(Claim(source, says, difference(results, larger, smaller, measure, concepts), sign == "="))
    says = "v_original stays the original's: no trait of the concept where [V] is not said (class leak)"
    rows.append(Claim("Fig. 8", says, seed_means(papers, "class leak"), equal=True))
    for early, late in ((1, 50), (50, 200)):
        grown = [(r["seed"], term(r, late, "lambda") - term(r, early, "lambda")) for r in papers]
        rows.append(Claim("Sec. 4.4", f"lambda* grows from step {early} to step {late}", mean_by_seed(grown)))
    return rows


def claims_table(results: Results) -> str:
    """One row a claim. Those whose cells are missing say so."""
    rows = []
    for claim in claims(results):
        value = plus_minus(claim.says, claim.values, signed=True) if claim.values else "not run"
        rows.append([claim.source, claim.says, value, claim.verdict() if claim.values else ""])
    return markdown(["where", "the paper says", "difference here", "verdict"], rows)

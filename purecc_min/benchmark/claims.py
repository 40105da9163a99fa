"""The paper's claims, one row each: what it says, what it is here, and whether it holds.

A claim says that something is larger than something else. Its value is that difference, a number for each training seed (mean over concepts), and
it HOLDS if the whole 95 % interval is above zero, DOES NOT HOLD if none of it is, and DEPENDS otherwise. A claim that two
things are about equal holds if the interval lies within +- CLOSE. Measures stand in for the paper's: similarity for CLIP-I, DINO and CSD,
mask IoU and outside change for Seg-Cons, layout (place, size and background as asked) for dCLIP-T, path KL for Fig. 2. Read next: figures.py.
"""

from collections import defaultdict
from typing import Callable, NamedTuple

import numpy as np

from purecc_min.benchmark.plans import ABLATED
from purecc_min.benchmark.tables import Results, final, markdown, mean_and_interval, name_of, seed_means
from purecc_min.toy import HELD_OUT

CLOSE = 0.02                                     # for claims that two things are about equal
INSTANCES, STYLES = HELD_OUT[:3], HELD_OUT[3:]


class Claim(NamedTuple):
    source: str
    says: str
    values: list[float]                          # one a seed; positive where the claim is right
    equal: bool = False

    def verdict(self) -> str:
        mean, half = mean_and_interval(self.values)
        low, high = mean - half, mean + half
        if self.equal:
            return "holds" if low > -CLOSE and high < CLOSE else "does not hold" if low > CLOSE or high < -CLOSE else "depends"
        return "holds" if low > 0 else "does not hold" if high <= 0 else "depends"


def by_seed(results: Results, name: str, concepts: tuple[str, ...], value: Callable[[dict], float]) -> dict[tuple[str, int], float]:
    return {(r["concept"], r["seed"]): value(r) for r in results if name_of(r) == name and r["concept"] in concepts}


def difference(results: Results, larger: str, smaller: str, measure: str | Callable[[dict], float], concepts: tuple[str, ...]) -> list[float]:
    """The measure's value for one method minus the other's, on the same concepts and seeds: one mean over concepts for each seed."""
    value = measure if callable(measure) else lambda result: final(result)[measure]
    a, b = by_seed(results, larger, concepts, value), by_seed(results, smaller, concepts, value)
    seeds = defaultdict(list)
    for key in a.keys() & b.keys():
        seeds[key[1]].append(a[key] - b[key])
    return [float(np.mean(values)) for _, values in sorted(seeds.items())]


def term(result: dict, step: int, name: str) -> float:
    """One of the logged terms at a training step, mean over t."""
    return float(np.mean([row[name] for row in result["terms"][str(step)]]))


def claims(results: Results) -> list[Claim]:
    rows = []

    def more(source: str, says: str, larger: str, smaller: str, measure, concepts=HELD_OUT, equal: bool = False) -> None:
        rows.append(Claim(source, says, difference(results, larger, smaller, measure, concepts), equal))

    for rival in ("DreamBooth", "DreamBooth + prior"):
        more("Table 1, instances", f"fidelity (CLIP-I, DINO): PureCC above {rival}", "paper", rival, "similarity", INSTANCES)
        more("Table 1, instances", f"Seg-Cons: PureCC above {rival}, mask IoU", "paper", rival, "mask IoU", INSTANCES)
        more("Table 1, instances", f"Seg-Cons: {rival} changes more outside the masks", rival, "paper", "outside change", INSTANCES)
        more("Table 1, instances", f"dCLIP-T: PureCC follows the text better than {rival}, layout", "paper", rival, "layout", INSTANCES)
    more("Table 1, style", "CSD: PureCC above DreamBooth", "paper", "DreamBooth", "similarity", STYLES)
    more("Table 1, style", "dCLIP-T: PureCC follows the text better than DreamBooth, layout", "paper", "DreamBooth", "layout", STYLES)
    for rival, title in (("LoRA", "L_CC alone"), ("merged stages", "merged stages")):
        more("Table 2", f"fidelity: full above {title}", "paper", rival, "similarity")
        more("Table 2", f"Seg-Cons: full above {title}, mask IoU", "paper", rival, "mask IoU")
        more("Table 2", f"Seg-Cons: {title} changes more outside the masks", rival, "paper", "outside change")
    fixed = lambda value: f"paper fixed_lambda={value:.1f}"
    for low, high in ((1, 3), (3, 5)):
        more("Table 3", f"fidelity: lambda {high} above {low}", fixed(high), fixed(low), "similarity", (ABLATED,))
    for value in (1, 3, 5):
        more("Table 3", f"fidelity: lambda* above lambda {value}", "paper", fixed(value), "similarity", (ABLATED,))
    more("Table 3", "lambda 5 follows the text worse than lambda*, layout", "paper", fixed(5), "layout", (ABLATED,))
    for value in (0.5, 1.5, 2.0):
        more("Table 6", f"fidelity: eta 1 above {value:g}", "paper", f"paper eta={value}", "similarity", (ABLATED,))
    for measure in ("similarity", "mask IoU"):
        more("Sec. 14", f"v_original from theta2 is as good as from a frozen copy, {measure}", "paper", "untouched v_original", measure,
             (ABLATED,), equal=True)
    more("not in the paper", "detaching v_original makes no difference, similarity", "paper", "not detached", "similarity", (ABLATED,), equal=True)
    more("Fig. 2", "KL to the original: LoRA above PureCC", "LoRA", "paper", "path KL")
    more("Fig. 2", "KL to the original: DreamBooth above LoRA", "DreamBooth", "LoRA", "path KL")
    rows.append(Claim("Fig. 8", "v_original stays the original's: no trait of the concept where [V] is not said (class leak)",
                      seed_means([r for r in results if name_of(r) == "paper"], "class leak"), equal=True))
    for early, late in ((1, 50), (50, 200)):
        grown = [list(by_seed(results, "paper", HELD_OUT, lambda r, step=step: term(r, step, "lambda")).items()) for step in (late, early)]
        seeds = defaultdict(list)
        for (key, after), (_, before) in zip(*grown):
            seeds[key[1]].append(after - before)
        rows.append(Claim("Sec. 4.4", f"lambda* grows from step {early} to step {late}", [float(np.mean(v)) for _, v in sorted(seeds.items())]))
    return rows


def claims_table(results: Results) -> str:
    """One row a claim. Those whose cells are missing say so."""
    rows = []
    for claim in claims(results):
        mean, half = mean_and_interval(claim.values) if claim.values else (np.nan, np.nan)
        digits = 1 if "KL" in claim.says else 3
        rows.append([claim.source, claim.says, f"{mean:+.{digits}f} ± {half:.{digits}f}" if claim.values else "not run",
                     claim.verdict() if claim.values else ""])
    return markdown(["where", "the paper says", "difference here", "verdict"], rows)

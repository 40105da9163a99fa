"""The paper's claims, one row each: what it says, its figures, what it is here, and whether it holds.

A claim says that something is larger than something else. Its value is that difference, one number for each
training seed (a mean over concepts). It HOLDS if the whole 95 % interval is above zero, DOES NOT HOLD if
none of it is, and DEPENDS otherwise. A claim that two things are about equal holds if the interval lies
within +- CLOSE. Each is tested twice: with adapters that act everywhere, as in the paper, and with bound ones
if that version exists. Measures stand in for the paper's: similarity for
CLIP-I and CSD, mask IoU and outside change for Seg-Cons, text kept (the reader's log-probability of the base
text) for dCLIP-T, path KL for the KL of Fig. 2 and 4. Read next: figures.py.
"""

from typing import NamedTuple

import numpy as np

from purecc_min.benchmark import tables
from purecc_min.benchmark.plans import ABLATED
from purecc_min.measure.toy import CONCEPTS, EARLIER

CLOSE = 0.02                                     # for claims that two things are about equal
INSTANCES = tuple(name for name in EARLIER if not CONCEPTS[name].is_style)
STYLES = tuple(name for name in EARLIER if CONCEPTS[name].is_style)
CAT = (ABLATED,)


class Claim(NamedTuple):
    where: str
    says: str
    figures: str
    values: list[float]                          # one for each seed; positive where the claim is right
    equal: bool = False

    def verdict(self) -> str:
        mean, half = tables.mean_and_interval(self.values)
        low, high = mean - half, mean + half
        if self.equal:
            holds, fails = low > -CLOSE and high < CLOSE, low > CLOSE or high < -CLOSE
        else:
            holds, fails = low > 0, high <= 0
        return "holds" if holds else "does not hold" if fails else "depends"


class Comparison(NamedTuple):
    where: str                                   # in the paper
    says: str
    figures: str                                 # the paper's own
    larger: str                                  # the method whose measure should be larger
    measure: str
    smaller: str                                 # the method that it is compared with
    concepts: tuple[str, ...] = EARLIER
    equal: bool = False                          # the two are about equal


COMPARISONS = [Comparison(*row) for row in [
    ("Table 1", "CLIP-I: above DreamBooth", ".81 > .63", "paper", "similarity", "DreamBooth", INSTANCES),
    ("Table 1", "Seg-Cons: above DreamBooth", "69.4 > 18.4", "paper", "mask IoU", "DreamBooth", INSTANCES),
    ("Table 1", "the same, outside the masks", "", "DreamBooth", "outside change", "paper", INSTANCES),
    ("Table 1", "dCLIP-T: above DreamBooth", "-0.31 > -4.81", "paper", "text kept", "DreamBooth", INSTANCES),
    ("Table 1", "CLIP-I: above EWC", ".81 > .62", "paper", "similarity", "DreamBooth + EWC", INSTANCES),
    ("Table 1", "Seg-Cons: above EWC", "69.4 > 26.4", "paper", "mask IoU", "DreamBooth + EWC", INSTANCES),
    ("Table 1", "the same, outside the masks", "", "DreamBooth + EWC", "outside change", "paper", INSTANCES),
    ("Table 1", "dCLIP-T: above EWC", "-0.31 > -4.17", "paper", "text kept", "DreamBooth + EWC", INSTANCES),
    ("Table 1", "styles, CSD: above DreamBooth", ".63 > .57", "paper", "similarity", "DreamBooth", STYLES),
    ("Table 1", "styles, dCLIP-T: above DreamBooth", "-0.26 > -6.23", "paper", "text kept", "DreamBooth",
     STYLES),
    ("Table 2", "CLIP-I: above L_CC alone", ".81 > .65", "paper", "similarity", "lora"),
    ("Table 2", "Seg-Cons: above L_CC alone", "69.4 > 23.7", "paper", "mask IoU", "lora"),
    ("Table 2", "the same, outside the masks", "", "lora", "outside change", "paper"),
    ("Table 2", "dCLIP-T: above L_CC alone", "-0.31 > -4.52", "paper", "text kept", "lora"),
    ("Table 2", "CLIP-I: above merged stages", ".81 > .50", "paper", "similarity", "merged stages"),
    ("Table 2", "Seg-Cons: above merged stages", "69.4 > 54.4", "paper", "mask IoU", "merged stages"),
    ("Table 2", "the same, outside the masks", "", "merged stages", "outside change", "paper"),
    ("Table 3", "CLIP-I: lambda 3 above 1", ".58 > .43", "paper, lambda 3", "similarity", "paper, lambda 1",
     CAT),
    ("Table 3", "CLIP-I: lambda 5 above 3", ".73 > .58", "paper, lambda 5", "similarity", "paper, lambda 3",
     CAT),
    ("Table 3", "CLIP-I: lambda* above 1", ".81 > .43", "paper", "similarity", "paper, lambda 1", CAT),
    ("Table 3", "CLIP-I: lambda* above 3", ".81 > .58", "paper", "similarity", "paper, lambda 3", CAT),
    ("Table 3", "CLIP-I: lambda* above 5", ".81 > .73", "paper", "similarity", "paper, lambda 5", CAT),
    ("Table 3", "dCLIP-T: lambda* above 5", "-0.31 > -2.67", "paper", "text kept", "paper, lambda 5", CAT),
    ("Fig. 4", "KL: lambda* above 1", ".0192 > .0142", "paper", "path KL", "paper, lambda 1", CAT),
    ("Fig. 4", "KL: lambda* above 3", ".0192 > .0146", "paper", "path KL", "paper, lambda 3", CAT),
    ("Table 6", "CLIP-I: eta 1 above 0.5", ".81 > .55", "paper", "similarity", "paper, eta 0.5", CAT),
    ("Table 6", "CLIP-I: eta 1 above 1.5", ".81 > .80", "paper", "similarity", "paper, eta 1.5", CAT),
    ("Table 6", "CLIP-I: eta 1 above 2", ".81 > .67", "paper", "similarity", "paper, eta 2", CAT),
    ("Sec. 14", "v_original of theta2 or of a frozen copy: similarity", "equal", "paper", "similarity",
     "paper, v_0 rank=4", CAT, True),
    ("Sec. 14", "the same: mask IoU", "equal", "paper", "mask IoU", "paper, v_0 rank=4", CAT, True),
    ("(ours)", "v_original detached or not: similarity", "", "paper", "similarity", "not detached", CAT,
     True),
    ("Fig. 2", "KL: LoRA above PureCC", ".0099 > .0097", "lora", "path KL", "paper"),
    ("Fig. 2", "KL: DreamBooth above LoRA", ".0367 > .0099", "DreamBooth", "path KL", "lora"),
]]


def bound(method: str) -> str | None:
    """The bound version of a method; None: there is none. DreamBooth has no adapters and stays.

    "paper, v_0" has none: with bound adapters v_original is the base model's already.
    """
    if method.startswith("paper") and not method.startswith("paper, v_0"):
        return f"bound-{method}"
    return {"lora": "bound"}.get(method, method if method.startswith("DreamBooth") else None)


def term(result: dict, step: int, name: str) -> float:
    """One of the logged terms at a training step: its mean over t."""
    return float(np.mean([row[name] for row in result["terms"][str(step)]]))


def claims(results: tables.Results, is_bound: bool = False) -> list[Claim]:
    """All of them, in one order. Those of which a cell is missing have no values."""
    rows, name = [], bound if is_bound else str
    for row in COMPARISONS:
        values = tables.difference(results, name(row.larger), name(row.smaller), row.measure, row.concepts)
        rows.append(Claim(row.where, row.says, row.figures, values, row.equal))
    papers = [result for result in results if tables.name_of(result) == name("paper")]
    says = "v_original stays the original's: class leak"
    rows.append(Claim("Fig. 8", says, "", tables.seed_means(papers, "class leak"), equal=True))
    for early, late in ((1, 50), (50, 200)):
        known = [r for r in papers if {str(early), str(late)} <= r["terms"].keys()]    # not with --steps
        grown = [(r["seed"], term(r, late, "lambda") - term(r, early, "lambda")) for r in known]
        says = f"lambda* grows from step {early} to {late}"
        rows.append(Claim("Sec. 4.4", says, "", tables.mean_by_seed(grown)))
    return rows


def claims_table(results: tables.Results) -> str:
    """One row a claim, for both kinds of adapters. A claim whose cells are missing has an empty place."""
    rows = []
    for everywhere, on_phrase in zip(claims(results), claims(results, is_bound=True)):
        row = [everywhere.where, everywhere.says, everywhere.figures]
        for claim in (everywhere, on_phrase):
            known = claim.values and not np.isnan(claim.values).any()
            value = tables.plus_minus(claim.says, claim.values, signed=True)
            row += [value, claim.verdict()] if known else ["", ""]
        rows.append(row)
    header = ["where", "the paper says", "its figures", "everywhere", "verdict", "phrase", "verdict"]
    return tables.markdown(header, rows, first=2)

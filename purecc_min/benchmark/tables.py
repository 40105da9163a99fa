"""From cells to tables: means over concepts, 95 % intervals over training seeds, comparisons at equal fidelity.

FIDELITY is the similarity to the references on the scale from the original model (0) to the perfect method (1). Methods are also compared where they
are equally faithful: a method's damage at a given similarity is read off its front, the snapshots of one training run, linearly
between two of them. SCORE chose the hyper-parameters, on the tuning concepts alone, and is used for nothing else: the harmonic mean of
fidelity and of what was preserved. Read next: claims.py.
"""

from collections import defaultdict

import numpy as np

from purecc_min.benchmark.cells import ALL, Cell
from purecc_min.evaluate import DAMAGES, MEASURES, show

STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}    # 97.5 % quantile by degrees of freedom
HEADLINE = ("sees concept", "fidelity", "confounder unsaid", "class leak", "retention, seen", "retention, held out", "layout", "outside change",
            "drift", "path KL", "composition")
Results = list[dict]


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of the mean (Student's t); the latter is nan for a single value."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(STUDENT_T.get(len(values) - 1, 1.96) * spread)


def name_of(result: dict) -> str:
    return Cell.of(result).name


def front(result: dict) -> list[tuple[int, dict[str, float]]]:
    """(step, measures), in order of steps."""
    return sorted((int(step), values) for step, values in result["snapshots"].items())


def final(result: dict) -> dict[str, float]:
    return front(result)[-1][1]


def add_fidelity(results: Results) -> None:
    """Puts "fidelity" into every snapshot of a concept of which both ends of the scale are there."""
    ends = {(r["concept"], r["method"]): final(r)["similarity"] for r in results if r["method"] in ("nothing", "perfect")}
    for result in results:
        low, high = (ends.get((result["concept"], end)) for end in ("nothing", "perfect"))
        if low is not None and high is not None:
            for values in result["snapshots"].values():
                values["fidelity"] = (values["similarity"] - low) / (high - low)


def score(values: dict[str, float]) -> float:
    """Harmonic mean of fidelity and preservation, 0 to 1. Pixel changes count fully from 0.1 on."""
    cut = lambda value: min(1.0, max(0.0, value))
    damages = [values[name] for name in ("confounder contradicted", "confounder unsaid", "class leak")]
    damages += [-values["retention, seen"], -values["retention, held out"], 1 - values["layout"]]
    damages += [values[name] / 0.1 for name in ("class drift", "outside change", "drift")]
    fidelity, preserved = cut(values["fidelity"]), 1 - float(np.mean([cut(damage) for damage in damages]))
    return 2 * fidelity * preserved / (fidelity + preserved) if fidelity else 0.0


def at_similarity(result: dict, similarity: float, nothing: dict[str, float]) -> dict[str, float] | None:
    """The measures where this run's front first reaches a similarity, the original model being its start; None if it never does."""
    before = nothing
    for _, after in front(result):
        if after["similarity"] >= similarity:
            part = (similarity - before["similarity"]) / (after["similarity"] - before["similarity"])
            return {name: before[name] + max(0.0, part) * (after[name] - before[name]) for name in after if name in before}
        before = after
    return None


def stopped_early(results: Results) -> Results:
    """LoRA where it first is as similar to the references as the paper's method at its end; left out where it never is."""
    nothing = {r["concept"]: final(r) for r in results if r["method"] == "nothing"}
    goals = {(r["concept"], r["seed"]): final(r)["similarity"] for r in results if name_of(r) == "paper"}
    runs = [r for r in results if name_of(r) == "LoRA" and (r["concept"], r["seed"]) in goals]
    found = [(r, at_similarity(r, goals[r["concept"], r["seed"]], nothing[r["concept"]])) for r in runs]
    return [{**result, "changes": {"stopped": "early"}, "snapshots": {"0": values}} for result, values in found if values]


def seed_means(results: Results, measure: str) -> list[float]:
    """A measure's mean over concepts, one value a seed."""
    by_seed = defaultdict(list)
    for result in results:
        by_seed[result["seed"]].append(final(result)[measure])
    return [float(np.mean(values)) for values in by_seed.values()]


def cell_text(name: str, values: list[float]) -> str:
    mean, half = mean_and_interval(values)
    if np.isnan(half):
        return show(name, mean)
    return f"{show(name, mean)} ± {show('', half) if name != 'path KL' else f'{half:.1f}'}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


def grouped(results: Results) -> dict[str, Results]:
    """By method and change, in the order of METHODS and FURTHER, the ends of the scale first."""
    groups, order = defaultdict(list), ["nothing", "perfect", *ALL]
    for result in sorted(results, key=lambda r: (order.index(r["method"]), str(r["changes"]))):
        groups[name_of(result)].append(result)
    return groups


def measures_table(results: Results, names=(*MEASURES, "fidelity")) -> str:
    """Measures as rows, methods as columns."""
    groups = grouped(results)
    rows = [[name, *(cell_text(name, seed_means(group, name)) for group in groups.values())] for name in names
            if all(name in final(r) for r in results)]
    return markdown(["measure", *groups], rows)


def methods_table(groups: dict[str, Results], names=HEADLINE, first: str = "method") -> str:
    """Methods as rows, the main measures as columns."""
    return markdown([first, *names], [[title, *(cell_text(name, seed_means(group, name)) if all(name in final(r) for r in group) else ""
                                                for name in names)] for title, group in groups.items()])


def equal_fidelity(results: Results, reference: str = "paper") -> str:
    """Every method's damage minus the reference's, where it is as similar to the references as that one is at its end."""
    nothing = {r["concept"]: final(r) for r in results if r["method"] == "nothing"}
    target = {(r["concept"], r["seed"]): final(r) for r in results if name_of(r) == reference}
    names = ("fidelity", *DAMAGES, "retention, held out", "layout", "composition")
    rows = []
    for title, group in grouped(results).items():
        if title in ("nothing", "perfect"):
            continue
        by_seed = defaultdict(list)
        for result in group:
            goal = target.get((result["concept"], result["seed"]))
            found = goal and at_similarity(result, goal["similarity"], nothing[result["concept"]])
            if found:
                by_seed[result["seed"]].append({name: found[name] - goal[name] for name in names})
        reached = sum(map(len, by_seed.values()))
        cells = []
        for name in names:
            mean, half = mean_and_interval([np.mean([d[name] for d in rows_]) for rows_ in by_seed.values()]) if by_seed else (np.nan, np.nan)
            digits = 1 if name == "path KL" else 3
            cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}" if reached else "")
        rows.append([title, f"{reached} of {len(group)}", *cells])
    return markdown(["method", "reaches it", *names], rows)


def tuning_table(results: Results) -> str:
    groups = grouped([r for r in results if r["method"] not in ("nothing", "perfect")])
    rows = [[name, *(f"{score(final(r)):.3f}" for r in group), f"{np.mean([score(final(r)) for r in group]):.3f}"] for name, group in groups.items()]
    return markdown(["method and settings", *(r["concept"] for r in next(iter(groups.values()))), "mean score"], rows)

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
HEADLINE = ("sees concept", "fidelity", "confounder contradicted", "confounder unsaid", "class leak", "retention, seen", "retention, held out",
            "layout", "outside change", "drift", "path KL", "composition")
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
    for after in (nothing, *(values for _, values in front(result))):
        if after["similarity"] >= similarity:
            way = after["similarity"] - before["similarity"]
            part = (similarity - before["similarity"]) / way if way else 0.0
            return {name: before[name] + part * (after[name] - before[name]) for name in after if name in before}
        before = after
    return None


def pairs_at_equal_fidelity(results: Results, method: str, reference: str) -> list[tuple[dict, dict, dict]]:
    """(a run, its measures, the reference's) for each concept and seed, both where they are as similar to the references as both ever become.

    That is the lower of the two ends: one of the runs is stopped early there.
    """
    nothing = {r["concept"]: final(r) for r in results if r["method"] == "nothing"}
    others = {(r["concept"], r["seed"]): r for r in results if name_of(r) == reference}
    pairs = []
    for run in results:
        other = others.get((run["concept"], run["seed"]))
        if name_of(run) == method and other:
            level = min(final(run)["similarity"], final(other)["similarity"])
            pairs.append((run, *(at_similarity(r, level, nothing[run["concept"]]) for r in (run, other))))
    return pairs


def stopped_early(results: Results) -> Results:
    """LoRA where it first is as similar to the references as the paper's method at its end (or at its own end, if it never is)."""
    pairs = pairs_at_equal_fidelity(results, "LoRA", "paper")
    return [{**run, "changes": {"stopped": "early"}, "snapshots": {"0": values}} for run, values, _ in pairs]


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


def methods_table(groups: dict[str, Results], first: str = "method", names=HEADLINE) -> str:
    """Methods as rows, the main measures as columns."""
    return markdown([*first.split(" | "), *names], [[title, *(cell_text(name, seed_means(group, name)) if all(name in final(r) for r in group) else ""
                                                for name in names)] for title, group in groups.items()])


def equal_fidelity(results: Results, reference: str = "paper") -> str:
    """Every method's measures minus the reference's, at equal fidelity: mean over concepts, 95 % interval over seeds."""
    names, rows = (*DAMAGES, "retention, held out", "layout", "mask IoU", "composition"), []
    for title in grouped([r for r in results if r["method"] in ALL]):
        pairs = pairs_at_equal_fidelity(results, title, reference)
        if title == reference:
            continue
        by_seed = defaultdict(list)
        for run, own, other in pairs:
            by_seed[run["seed"]].append({"at fidelity": own["fidelity"], **{name: own[name] - other[name] for name in names}})
        cells = []
        for name in ("at fidelity", *names):
            mean, half = mean_and_interval([float(np.mean([values[name] for values in some])) for some in by_seed.values()])
            digits = 1 if name == "path KL" else 3
            interval = "" if np.isnan(half) else f" ± {half:.{digits}f}"
            cells.append(f"{mean:.2f}" if name == "at fidelity" else f"{mean:+.{digits}f}{interval}")
        rows.append([title, *cells])
    return markdown([f"method minus {reference}", "at fidelity", *names], rows)


def terms_table(results: Results, name: str = "paper") -> str:
    """The terms of Eq. 10 to 15 at a few steps: means over t, concepts and seeds."""
    runs = [r["terms"] for r in results if name_of(r) == name]
    rows = []
    for step in runs[0]:
        mean = lambda term, step=step: float(np.mean([[row[term] for row in terms[step]] for terms in runs]))
        rows.append([step, f"{mean('lambda'):.3f}", f"{mean('negative'):.0%}", f"{mean('cosine'):.2f}", f"{mean('norm_R_complete'):.2f}",
                     f"{mean('norm_R_target'):.2f}", f"{mean('loss_cc'):.4f}", f"{mean('loss_purecc'):.4f}",
                     f"{mean('rejection') / mean('loss_purecc'):.1%}", f"{mean('loss_purecc') / mean('loss'):.1%}"])
    return markdown(["step", "lambda*", "negative", "cosine", "norm of R(y_complete, y_base)", "norm of R(y_tar)", "L_CC", "L_PureCC",
                     "rejection in L_PureCC", "L_PureCC in the loss"], rows)


def tuning_table(results: Results) -> str:
    groups = grouped([r for r in results if r["method"] not in ("nothing", "perfect")])
    rows = [[name, *(f"{score(final(r)):.3f}" for r in group), f"{np.mean([score(final(r)) for r in group]):.3f}"] for name, group in groups.items()]
    return markdown(["method and settings", *(r["concept"] for r in next(iter(groups.values()))), "mean score"], rows)

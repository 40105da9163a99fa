"""From cells to tables: means over concepts, 95 % intervals over training seeds, and equal fidelity.

FIDELITY is the similarity to the references on the scale from the original model (0) to the perfect method
(1). Methods are also compared where they are equally faithful: a method's damage at a given similarity is
read off its front, the snapshots of one training run, linearly between two of them. The SCORE chose the
settings, on the tuning concepts alone, and is used for nothing else: it is the harmonic mean of fidelity
and of what was preserved. Read next: claims.py.
"""

from collections.abc import Iterable

import numpy as np

from purecc_min.benchmark.cells import ALL, STEPS, Cell
from purecc_min.benchmark.entries import FURTHER, WAYS
from purecc_min.measure.measures import DAMAGES, MEASURES, better, show
from purecc_min.measure.toy import EARLIER, TUNING

# the 97.5 % quantile of Student's t, by degrees of freedom
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
WIDE = 120                                       # columns of a terminal
ENDS = ("nothing", "perfect")                    # of the scale
TABLES = {"What is learned": ("fidelity", "sees concept", "individual", "beside another", "composition"),
          "What follows [V] that should not": ("confounder contradicted", "confounder unsaid",
                                               "outside change", "mask IoU", "text kept"),
          "What changes without [V]": ("class leak", "class drift", "diversity", "drift", "path KL"),
          "What changes beside [V]": ("neighbour leak", "neighbour change", "retention, seen",
                                      "retention, held out"),
          "Two things, by place and in texts of other forms": (
              "beside, first", "beside, second", "no places: on [V]", "no places: leak",
              "right first: on [V]", "right first: leak", "another kind: on [V]", "another kind: leak")}
Results = list[dict]                             # rows: a cell's result, sampled in one way


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); the latter is nan for a single value."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(STUDENT_T.get(len(values) - 1, 1.96) * spread)


def mean_by_seed(pairs: list[tuple[int, float]]) -> list[float]:
    """(training seed, value), one for each concept -> the mean over concepts, one value for each seed."""
    seeds = sorted({seed for seed, _ in pairs})
    return [float(np.mean([value for own, value in pairs if own == seed])) for seed in seeds]


def difference(results: Results, larger: str, smaller: str, measure: str,
               concepts: tuple[str, ...] = EARLIER) -> list[float]:
    """One method's measure minus the other's at the end of training, on the same concepts and seeds.

    Returns: its mean over the concepts that have it, one value for each seed.
    """
    known = {(name_of(r), r["concept"], r["seed"]): final(r) for r in results if r["concept"] in concepts}
    pairs = []
    for (name, concept, seed), values in known.items():
        if name == larger and measure in values and (smaller, concept, seed) in known:
            pairs.append((seed, values[measure] - known[smaller, concept, seed][measure]))
    return mean_by_seed(pairs)


def rows_of(result: dict) -> list[dict]:
    """A row for each way in which a cell's model was sampled."""
    return [{**result, "way": way, "snapshots": snapshots} for way, snapshots in result["ways"].items()]


def name_of(row: dict) -> str:
    return ", ".join(filter(None, [Cell.of(row).name, row["way"]]))


def front(result: dict) -> list[tuple[int, dict[str, float]]]:
    """(step, measures), in order of steps."""
    return sorted((int(step), values) for step, values in result["snapshots"].items())


def final(result: dict) -> dict[str, float]:
    return front(result)[-1][1]


def seed_means(results: Results, measure: str) -> list[float]:
    """A measure's mean over the concepts that have it, at the end of training, one value for each seed."""
    return mean_by_seed([(result["seed"], final(result)[measure]) for result in results
                         if measure in final(result)])


def add_fidelity(results: Results) -> None:
    """Puts "fidelity" into every snapshot of a concept of which both ends of the scale are there."""
    ends = {(r["concept"], r["method"]): final(r)["similarity"] for r in results if r["method"] in ENDS}
    for result in results:
        low, high = (ends.get((result["concept"], end)) for end in ENDS)
        if low is not None and high is not None:
            for values in result["snapshots"].values():
                values["fidelity"] = (values["similarity"] - low) / (high - low)


def score(values: dict[str, float]) -> float:
    """Harmonic mean of fidelity and preservation, 0 to 1. Pixel changes count fully from 0.1 on."""
    damages = [values[name] for name in ("confounder contradicted", "confounder unsaid", "class leak")]
    damages += [-values[name] for name in ("retention, seen", "retention, held out", "text kept")]
    damages += [values[name] / 0.1 for name in ("class drift", "outside change", "drift")]
    fidelity = np.clip(values["fidelity"], 0, 1)
    preserved = 1 - np.clip(damages, 0, 1).mean()
    return float(2 * fidelity * preserved / (fidelity + preserved)) if fidelity else 0.0


# --------------------------------------------------------------------------------------------- equal fidelity
def at_similarity(result: dict, similarity: float, nothing: dict[str, float]) -> dict[str, float] | None:
    """The measures where this run's front first reaches a similarity; None if it never does.

    The front starts with the original model, whose measures are `nothing`.
    """
    before = nothing
    for after in (nothing, *(values for _, values in front(result))):
        if after["similarity"] >= similarity:
            way = after["similarity"] - before["similarity"]
            part = (similarity - before["similarity"]) / way if way else 0.0
            return {name: value + part * (after[name] - value)
                    for name, value in before.items() if name in after}
        before = after
    return None


def pairs_at_equal_fidelity(results: Results, method: str, reference: str) -> list[tuple[dict, dict, dict]]:
    """(a run, its measures, the reference's) for each concept and seed, read where both are equally similar.

    That is the lower of their two last similarities: one of the runs is stopped early there.
    """
    nothing = {r["concept"]: final(r) for r in results if r["method"] == "nothing"}
    others = {(r["concept"], r["seed"]): r for r in results if name_of(r) == reference}
    pairs = []
    for run in results:
        other = others.get((run["concept"], run["seed"]))
        if name_of(run) == method and other:
            level = min(final(run)["similarity"], final(other)["similarity"])
            start = nothing[run["concept"]]
            pairs.append((run, at_similarity(run, level, start), at_similarity(other, level, start)))
    return pairs


# ----------------------------------------------------------------------------------------------------- tables
def plus_minus(name: str, values: list[float], signed: bool = False) -> str:
    """The mean of a measure's values with its interval. signed: they are differences, so "+" is shown."""
    mean, half = mean_and_interval(values)
    digits = 1 if "KL" in name else 3
    text = f"{mean:+.{digits}f}" if signed else show(name, mean)
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def entry(group: Results, name: str) -> str:
    """A measure's mean over the concepts that have it, as text; empty if there is none."""
    means = seed_means(group, name)
    return plus_minus(name, means) if means else ""


def markdown(header: list[str], rows: list[list[str]], first: int = 1) -> str:
    """A table whose lines fit WIDE columns; what does not fit follows in further tables below it.

    Args:
        first: the number of columns with which each of these tables begins.
    """
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in zip(header, *rows)]
    lead, tables = columns[:first], [[]]
    for column in columns[first:]:
        width = sum(len(other[0]) + 3 for other in (*lead, *tables[-1], column)) + 1
        tables += [[]] if width > WIDE and tables[-1] else []
        tables[-1].append(column)
    texts = []
    for own in tables:
        lines = ["| " + " | ".join(cells) + " |" for cells in zip(*lead, *own)]
        rule = "|".join("-" * (len(column[0]) + 2) for column in (*lead, *own))
        texts.append("\n".join([lines[0], f"|{rule}|", *lines[1:]]))
    return "\n\n".join(texts)


def grouped(results: Results) -> dict[str, Results]:
    """By method and change, in the order of ALL, the ends of the scale first."""
    order = [*ENDS, *ALL]
    ordered = sorted(results, key=lambda row: (order.index(row["method"]), str(row["changes"]),
                                               list(WAYS).index(row["way"])))
    names = dict.fromkeys(map(name_of, ordered))
    return {name: [result for result in ordered if name_of(result) == name] for name in names}


def measures_table(results: Results) -> str:
    """Measures as rows, methods as columns. Styles lack some measures."""
    groups = grouped(results)
    names = [name for name in (*MEASURES, "fidelity") if any(name in final(result) for result in results)]
    rows = [[name, *(entry(group, name) for group in groups.values())] for name in names]
    return markdown(["measure", *groups], rows)


def passes_of(group: Results) -> str:
    """How often a picture goes forward and backward, where a LoRA's step takes it once: "1 + 1"."""
    if "passes" not in group[0]:
        return ""
    forward, backward = (np.mean([row["passes"][name] for row in group]) for name in ("forward", "backward"))
    return f"{forward:.3g} + {backward:.3g}"


def trained_of(group: Results) -> str:
    """How many numbers are trained for what is kept."""
    return f"{group[0]['trained']:,}" if "trained" in group[0] else ""


def budget(group: Results) -> str:
    """A mark for rows that were not trained for as many steps as the benchmark's."""
    run = group[0]
    steps = run["steps"] * ALL[run["method"]].times if run["method"] in ALL else STEPS
    return f" ({steps} steps)" if steps != STEPS else ""


def methods_tables(groups: dict[tuple[str, ...], Results], first: tuple[str, ...] = ("method",)) -> str:
    """Methods as rows, the main measures as columns, in several tables that fit a screen.

    Args:
        groups: what stands in the first cells of a row -> its results.
        first: the headings of these cells.
    """
    texts = []
    for title, names in TABLES.items():
        header = [*first, *(f"{name} {better(name)}" for name in names)]
        rows = [[*row[:-1], row[-1] + budget(group), *(entry(group, name) for name in names)]
                for row, group in groups.items()]
        if not texts:                            # the first one also tells what a row costs
            header = [*header, "trained", "passes"]
            rows = [[*row, trained_of(group), passes_of(group)] for row, group in zip(rows, groups.values())]
        texts.append(f"{title}\n\n{markdown(header, rows, len(first))}")
    return "\n\n".join(texts)


def equal_fidelity(results: Results, pairs: Iterable[tuple[str, str]]) -> str:
    """For each (method, reference): the method's measures minus the reference's, at equal fidelity.

    They are means over concepts, with intervals over seeds. A pair without common runs is left out.
    """
    names, rows = (*DAMAGES, "retention, held out", "text kept", "mask IoU", "composition"), []
    for method, reference in pairs:
        read, cells = pairs_at_equal_fidelity(results, method, reference), []
        for name in names if read else ():
            differences = [(run["seed"], own[name] - other[name]) for run, own, other in read
                           if name in own and name in other]
            cells.append(plus_minus(name, mean_by_seed(differences), signed=True) if differences else "")
        if read:
            level = np.mean(mean_by_seed([(run["seed"], own["fidelity"]) for run, own, _ in read]))
            rows.append([f"{method} minus {reference}", f"{level:.2f}", *cells])
    if not rows:
        return ""
    shown = [n for n, column in enumerate(zip(*rows)) if any(column)]    # no front has the other forms
    header = ["at equal fidelity", "of", *names]
    return markdown([header[n] for n in shown], [[row[n] for n in shown] for row in rows], first=2)


def further_table(results: Results) -> str:
    """What each further method has more or less of than those it is compared with, at the end of training.

    A place is empty where cells are missing.
    """
    names, rows = ("fidelity", "sees concept", "confounder unsaid", "mask IoU", "text kept", "class leak",
                   "neighbour leak", "path KL"), []
    for title, method in FURTHER.items():
        for other in method.beside:
            values = [difference(results, title, other, name) for name in names]
            rows.append([f"{title} minus {other}", *(plus_minus(name, own, signed=True) if own else ""
                                                     for name, own in zip(names, values))])
    return markdown(["at the end", *names], rows)


def terms_table(results: Results) -> str:
    """The terms of Eq. 10 to 15 of the paper's method at a few steps: means over t, concepts and seeds."""
    runs, rows = [result["terms"] for result in results if name_of(result) == "paper"], []
    if not runs:
        return ""
    names = ("lambda", "negative", "cosine", "norm_R_complete", "norm_R_target", "loss_cc", "loss_purecc",
             "rejection", "loss")
    for step in runs[0]:
        mean = {name: np.mean([[row[name] for row in terms[step]] for terms in runs]) for name in names}
        rows.append([step, f"{mean['lambda']:.3f}", f"{mean['negative']:.0%}", f"{mean['cosine']:.2f}",
                     f"{mean['norm_R_complete']:.2f}", f"{mean['norm_R_target']:.2f}",
                     f"{mean['loss_cc']:.4f}", f"{mean['loss_purecc']:.4f}",
                     f"{mean['rejection'] / mean['loss_purecc']:.1%}",
                     f"{mean['loss_purecc'] / mean['loss']:.1%}"])
    return markdown(["step", "lambda*", "negative", "cosine", "norm of R(y_complete, y_base)",
                     "norm of R(y_tar)", "L_CC", "L_PureCC", "rejection in L_PureCC", "L_PureCC in the loss"],
                    rows)


def tuning_table(results: Results) -> str:
    """The score of every try on each tuning concept."""
    groups, rows = grouped([r for r in results if r["method"] not in ENDS and r["way"] == ""]), []
    for name, group in groups.items():
        scores = {result["concept"]: score(final(result)) for result in group}           # some lack a style
        of_each = [f"{scores[concept]:.3f}" if concept in scores else "" for concept in TUNING]
        rows.append([name, *of_each, f"{np.mean(list(scores.values())):.3f}"])
    return markdown(["method and settings", *TUNING, "mean score"], rows)

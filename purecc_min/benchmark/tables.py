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
from purecc_min.benchmark.entries import WAYS
from purecc_min.measure.measures import DAMAGES, MEASURES, better, show
from purecc_min.measure.toy import EARLIER, TUNING

# the 97.5 % quantile of Student's t, by degrees of freedom
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
WIDE = 120                                       # columns of a terminal; page.py has more
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
TERMS = {"lambda*": "{lambda:.3f}", "negative": "{negative:.0%}", "cosine": "{cosine:.2f}",
         "norm of R(y_complete, y_base)": "{norm_R_complete:.2f}", "norm of R(y_tar)": "{norm_R_target:.2f}",
         "L_CC": "{loss_cc:.4f}", "L_PureCC": "{loss_purecc:.4f}", "rejection in L_PureCC": "{rejected:.1%}",
         "L_PureCC in the loss": "{share:.1%}"}  # what the means of a loss's terms look like
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
    return mean_by_seed([(seed, values[measure] - known[smaller, concept, seed][measure])
                         for (name, concept, seed), values in known.items()
                         if name == larger and measure in values and (smaller, concept, seed) in known])


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
    """The mean of a measure's values with its interval, as text; "" without values.

    signed: they are differences, so "+" is shown.
    """
    if not any(values):                          # exactly 0: what cannot change
        return "0" if values else ""
    mean, half = mean_and_interval(values)
    digits = 1 if "KL" in name else 3
    text = f"{mean:+.{digits}f}" if signed else show(name, mean)
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def entry(group: Results, name: str) -> str:
    """A measure's mean over the concepts that have it, as text; "" if there is none."""
    return plus_minus(name, seed_means(group, name))


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


def grouped(results: Results) -> dict[tuple[str], Results]:
    """(method and change,) -> its results, in the order of ALL, the ends of the scale first."""
    order = [*ENDS, *ALL]
    ordered = sorted(results, key=lambda row: (order.index(row["method"]), str(row["changes"]),
                                               list(WAYS).index(row["way"])))
    groups: dict[tuple[str], Results] = {}
    for result in ordered:
        groups.setdefault((name_of(result),), []).append(result)
    return groups


def measures_table(results: Results) -> str:
    """Measures as rows, methods as columns. Styles lack some measures."""
    groups = grouped(results)
    names = [name for name in (*MEASURES, "fidelity") if any(name in final(result) for result in results)]
    rows = [[name, *(entry(group, name) for group in groups.values())] for name in names]
    return markdown(["measure", *(name for name, in groups)], rows)


def cost_of(group: Results) -> list[str]:
    """How many numbers are trained, and how often a picture goes forward and backward ("1 + 1": a LoRA)."""
    if "passes" not in group[0]:
        return ["", ""]
    forward, backward = (np.mean([row["passes"][name] for row in group]) for name in ("forward", "backward"))
    trained = f"{group[0]['trained']:,}" if "trained" in group[0] else ""        # older results lack it
    return [trained, f"{forward:.3g} + {backward:.3g}"]


def budget(run: dict) -> str:
    """A mark for a row that was not trained for as many steps as the benchmark's."""
    steps = run["steps"] * ALL[run["method"]].times if run["method"] in ALL else STEPS
    return f" ({steps} steps)" if steps != STEPS else ""


def methods_table(groups: dict[tuple[str, ...], Results], names: Iterable[str], cost: bool = False,
                  first: tuple[str, ...] = ("method",)) -> str:
    """Methods as rows, these measures as columns.

    Args:
        groups: what stands in the first cells of a row -> its results.
        cost: whether two more columns say what a row costs.
        first: the headings of the first cells.
    """
    header = [*first, *(f"{name} {better(name)}" for name in names), *(["trained", "passes"] * cost)]
    rows = [[*row, *(entry(group, name) for name in names), *(cost_of(group) * cost)]
            for row, group in groups.items()]
    return markdown(header, rows, len(first))


def methods_tables(groups: dict[tuple[str, ...], Results], first: tuple[str, ...] = ("method",)) -> str:
    """The main measures in several tables that fit a screen; the first one also tells what a row costs."""
    marked = {(*row[:-1], row[-1] + budget(group[0])): group for row, group in groups.items()}
    return "\n\n".join(f"{title}\n\n{methods_table(marked, names, n == 0, first)}"
                       for n, (title, names) in enumerate(TABLES.items()))


def differences_table(title: str, results: Results, pairs: Iterable[tuple[str, str]], names: Iterable[str],
                      concepts: tuple[str, ...] = EARLIER) -> str:
    """One method's measures minus another's at the end of training; "" where cells are missing."""
    rows = [[f"{larger} minus {smaller}",
             *(plus_minus(name, difference(results, larger, smaller, name, concepts), signed=True)
               for name in names)] for larger, smaller in pairs]
    return markdown([title, *names], rows)


def equal_fidelity(results: Results, pairs: Iterable[tuple[str, str]], names: tuple[str, ...] = ()) -> str:
    """For each (method, reference): the method's measures minus the reference's, at equal fidelity.

    They are means over concepts, with intervals over seeds. A pair without common runs is left out. names: of
    the measures; by default all that can be read off a front.
    """
    names, rows = names or (*DAMAGES, "retention, held out", "text kept", "mask IoU", "composition"), []
    for method, reference in pairs:
        read = pairs_at_equal_fidelity(results, method, reference)
        if not read:
            continue
        level = np.mean(mean_by_seed([(run["seed"], own["fidelity"]) for run, own, _ in read]))
        differences = [mean_by_seed([(run["seed"], own[name] - other[name]) for run, own, other in read
                                     if name in own and name in other]) for name in names]
        rows.append([f"{method} minus {reference}", f"{level:.2f}",
                     *(plus_minus(name, own, signed=True) for name, own in zip(names, differences))])
    header = ["at equal fidelity", "of", *names]
    shown = [n for n, column in enumerate(zip(*rows)) if any(column)]    # no front has the other forms
    return markdown([header[n] for n in shown], [[row[n] for n in shown] for row in rows], 2) if rows else ""


def terms_table(results: Results) -> str:
    """The terms of Eq. 10 to 15 of the paper's method at a few steps: means over t, concepts and seeds."""
    runs, rows = [result["terms"] for result in results if name_of(result) == "paper"], []
    for step in runs[0] if runs else ():
        mean = {name: np.mean([[row[name] for row in terms[step]] for terms in runs])
                for name in runs[0][step][0]}
        mean |= {"rejected": mean["rejection"] / mean["loss_purecc"],
                 "share": mean["loss_purecc"] / mean["loss"]}
        rows.append([step, *(form.format(**mean) for form in TERMS.values())])
    return markdown(["step", *TERMS], rows) if rows else ""


def tuning_table(results: Results) -> str:
    """The score of every try on each tuning concept."""
    groups, rows = grouped([r for r in results if r["method"] not in ENDS and r["way"] == ""]), []
    for (name,), group in groups.items():
        scores = {result["concept"]: score(final(result)) for result in group}           # some lack a style
        of_each = [f"{scores[concept]:.3f}" if concept in scores else "" for concept in TUNING]
        rows.append([name, *of_each, f"{np.mean(list(scores.values())):.3f}"])
    return markdown(["method and settings", *TUNING, "mean score"], rows)

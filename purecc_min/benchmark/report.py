"""What a part of the benchmark leaves: data of every seed, tables, pictures.

    PART/results.json, results.csv      every measure of every snapshot of every cell
    PART/table.md                       the tables that the command prints
    main/*.png                          figures.py says what they show
    main/two.json                       two learned concepts in one text (two.py)

Read next: page.py.
"""

import csv
import io
import json
from pathlib import Path

from purecc_min.benchmark import figures, tables
from purecc_min.benchmark.cells import Cell
from purecc_min.benchmark.claims import claims_table
from purecc_min.benchmark.entries import FURTHER
from purecc_min.benchmark.two import Two, two_table
from purecc_min.measure.measures import MEASURES
from purecc_min.measure.toy import CONCEPTS
from tinyflow.files import write_whole

# at equal fidelity: a method, and what it is compared with
COMPARED = (("bound", "switched-off"), ("bound-half", "bound"), ("bound-paper", "bound"), ("bound", "token"),
            ("paper", "lora"), ("paper, v_0", "anchor"), ("anchor", "lora"))
AT_RANK_4 = "bound learning_rate=0.004 rank=4"   # the part `phrase` was run before ranks were tuned
VARIED_IN = ("fidelity", "sees concept", "confounder unsaid", "mask IoU", "text kept", "class leak",
             "neighbour leak", "path KL")
ON_EARLIER = ("further", "claims", "factors")    # parts


def write_data(results: tables.Results, part: str, folder: Path) -> None:
    """results.json keeps everything to five digits, results.csv has a row for each snapshot."""
    rounded = json.loads(json.dumps(results), parse_float=lambda number: float(f"{float(number):.5g}"))
    write_whole(folder / part / "results.json", json.dumps(rounded, separators=(",", ":")).encode())
    names, text = [*MEASURES, "fidelity"], io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["concept", "method", "seed", "step", *names])
    for result in results:
        for step, values in tables.front(result):
            numbers = [f"{values[name]:.5g}" if name in values else "" for name in names]
            table.writerow([result["concept"], tables.name_of(result), result["seed"], step, *numbers])
    write_whole(folder / part / "results.csv", text.getvalue().encode())


def gather(cells: list[Cell], folder: Path, shipped: bool = False) -> tables.Results:
    """A row for each way of sampling, of those cells that were run. shipped: or came with this repository."""
    found = filter(None, [cell.result(folder, shipped) for cell in cells])
    rows = [{**result, "way": way, "snapshots": snapshots}
            for result in found for way, snapshots in result["ways"].items()]
    tables.add_fidelity(rows)
    return rows


def draw_figures(results: tables.Results, pairs: list[Two], folder: Path, shipped: bool) -> None:
    """The pictures that need what the cells of this folder have left."""
    out = folder / "main"
    for name in dict.fromkeys(result["concept"] for result in results):
        figures.samples(results, folder, out / f"samples-{name}.png", name)
    if shipped:
        return
    figures.curves(results, out / "curves.png")
    concept = results[0]["concept"]
    typical = Cell(concept, "paper", figures.typical_seed(results, concept), steps=results[0]["steps"])
    figures.figure_8(typical, folder, out / "figure8.png")
    if pairs:
        figures.first_picture(results, folder, out / "first.png")
        figures.strips(pairs, folder, out / "two.png")


def by_method(results: tables.Results) -> str:
    return tables.methods_tables(tables.grouped(results))


def main_text(results: tables.Results) -> str:
    """All concepts together: a method that learns no style has a row of individuals alone, which is said."""
    styled = {tables.name_of(row) for row in results if CONCEPTS[row["concept"]].is_style}
    alone = dict.fromkeys(tables.name_of(row) for row in results if tables.name_of(row) not in styled)
    note = [f"Of individuals alone, for they learn no style: {'; '.join(alone)}."] if styled and alone else []
    return "\n\n".join([*note, by_method(results), tables.equal_fidelity(results, COMPARED),
                        tables.terms_table(results), tables.measures_table(results)])


def further_text(results: tables.Results) -> str:
    """Also what each method has more of than those that it varies, at the end of training."""
    pairs = [(name, other) for name, method in FURTHER.items() for other in method.beside]
    return f"{by_method(results)}\n\n{tables.differences_table('at the end', results, pairs, VARIED_IN)}"


def by_concept(results: tables.Results) -> str:
    """One table for all concepts, for the parts that compare within a concept.

    It shows the first way of sampling alone.
    """
    groups = {}
    for result in results:
        own = tables.grouped([other for other in results
                              if other["concept"] == result["concept"] and other["way"] == ""])
        groups |= {(result["concept"], *title): group for title, group in own.items()}
    return tables.methods_tables(groups, first=("concept", "method"))


def phrase_text(results: tables.Results) -> str:
    """The phrase taken apart: means over the individuals, then each alone, then a front at equal fidelity."""
    plain = [row for row in results if "braces" not in row["concept"]]
    braced = [row for row in results if "braces" in row["concept"] and tables.name_of(row) == AT_RANK_4]
    more = {(f"{AT_RANK_4}, braces",): braced} if braced else {}
    texts = [tables.methods_tables(tables.grouped(plain) | more)]
    for concept in dict.fromkeys(row["concept"] for row in plain):
        texts.append(f"{concept}\n\n{by_method([row for row in plain if row['concept'] == concept])}")
    return "\n\n".join([*texts, tables.equal_fidelity(plain, [("bound-paper rank=4", AT_RANK_4)])])


def text_of(part: str, results: tables.Results) -> str:
    """A part's tables."""
    text = {"tuning": tables.tuning_table, "main": main_text, "claims": claims_table,
            "further": further_text, "phrase": phrase_text}.get(part, by_concept)(results)
    if part in ON_EARLIER:
        return f"Measured on earlier concepts, chosen by hand, which trials have looked at.\n\n{text}"
    return text


def report(part: str, cells: list[Cell], pairs: list[Two], folder: Path, shipped: bool = False) -> str:
    """Writes a part's tables, data and pictures into folder/part; returns the tables.

    Args:
        shipped: whether results that came with this repository fill the gaps. Their pictures are not there.
    """
    results, out = gather(cells, folder, shipped), folder / part
    write_data(results, part, folder)
    text = text_of(part, results)
    if pairs:
        rows = [pair.result(folder, shipped) for pair in pairs]
        text += f"\n\n{two_table(rows)}"
        write_whole(out / "two.json", json.dumps(rows).encode())
    write_whole(out / "table.md", (text + "\n").encode())
    if part == "main":
        figures.fronts(results, out / "fronts.png")
        draw_figures(results, pairs, folder, shipped)
    left = ", ".join(sorted(file.name for file in out.iterdir()))
    return f"{text}\n\n{out} holds {left}"

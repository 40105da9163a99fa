"""What a part of the benchmark leaves: data of every seed, tables, pictures.

    PART/results.json, results.csv      every measure of every snapshot of every cell
    PART/table.md                       the tables that the command prints
    main/*.png                          figures.py says what they show

Read next: figures.py.
"""

import csv
import io
import json
from pathlib import Path

from purecc_min.benchmark.cells import Cell
from purecc_min.benchmark.claims import claims_table
from purecc_min.benchmark.figures import curves, figure_8, fronts, samples, typical_seed
from purecc_min.benchmark.tables import (
    Results,
    add_fidelity,
    equal_fidelity,
    front,
    grouped,
    measures_table,
    methods_table,
    name_of,
    stopped_early,
    terms_table,
    tuning_table,
)
from purecc_min.evaluate import MEASURES
from tinyflow.weights import write_whole


def write_data(results: Results, part: str, folder: Path) -> None:
    """results.json keeps everything to five digits, results.csv a row for each snapshot."""
    rounded = json.loads(json.dumps(results), parse_float=lambda number: float(f"{float(number):.5g}"))
    write_whole(folder / part / "results.json", json.dumps(rounded, separators=(",", ":")).encode())
    names, text = [*MEASURES, "fidelity"], io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["concept", "method", "seed", "step", *names])
    for result in results:
        for step, values in front(result):
            table.writerow([result["concept"], name_of(result), result["seed"], step, *(f"{values[n]:.5g}" if n in values else "" for n in names)])
    write_whole(folder / part / "results.csv", text.getvalue().encode())


def gather(cells: list[Cell], folder: Path, shipped: bool = False) -> Results:
    results = [result for cell in cells if (result := cell.result(folder, shipped))]
    add_fidelity(results)
    return results


def draw_figures(results: Results, folder: Path) -> None:
    """The pictures that need what the cells of this folder have left."""
    out = folder / "main"
    curves(results, out / "curves.png")
    for concept in dict.fromkeys(r["concept"] for r in results):
        samples(results, folder, out / f"samples-{concept}.png", concept)
    papers = [r for r in results if name_of(r) == "paper"]
    seed = typical_seed(results, papers[0]["concept"])
    figure_8(Cell.of(next(r for r in papers if r["seed"] == seed)), folder, out / "figure8.png")


def report(part: str, cells: list[Cell], folder: Path, shipped: bool = False) -> str:
    """Writes a part's tables, data and pictures into folder/part; returns the tables."""
    results = gather(cells, folder, shipped)
    write_data(results, part, folder)
    if part == "tuning":
        text = tuning_table(results)
    elif part == "main":
        with_stopped = results + stopped_early(results)
        text = "\n\n".join([methods_table(grouped(with_stopped)), measures_table(with_stopped), equal_fidelity(results), terms_table(results)])
        fronts(results, folder / part / "fronts.png")
        if not shipped:
            draw_figures(results, folder)
    elif part == "claims":
        text = claims_table(results)
    else:
        groups = {(concept, title): group for concept in dict.fromkeys(r["concept"] for r in results)
                  for title, group in grouped([r for r in results if r["concept"] == concept]).items()}
        text = methods_table({" | ".join(key): group for key, group in groups.items()}, first="concept | method")
    write_whole(folder / part / "table.md", (text + "\n").encode())
    return text

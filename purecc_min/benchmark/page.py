"""The tables of README.md, of the report and of its pages, from the results that came with this repository.

`python -m purecc_min.benchmark.page` writes each between the two marks of its name, and a page of all tables
for each part, so that no number there was typed by hand. Read next: README.md, the report.
"""

import re
from pathlib import Path

from purecc_min.benchmark import tables
from purecc_min.benchmark.claims import claims
from purecc_min.benchmark.plans import SEEDS, plan
from purecc_min.benchmark.report import COMPARED, gather, text_of
from purecc_min.benchmark.two import of_pairs, plan_two, two_table
from purecc_min.measure.toy import CONCEPTS, HELD_OUT
from tinyflow.files import write_whole

HERE = Path(__file__).parent
NOWHERE = Path("nowhere")                        # no folder: results that came with this repository
WIDE = 300                                       # columns: pages are rendered, so no table is cut in two
VERDICTS = ("holds", "does not hold", "depends")
PAGES = (HERE.parents[1] / "README.md", HERE / "README.md", HERE / "report_pages" / "methods.md")
INDIVIDUALS = tuple(name for name in HELD_OUT if not CONCEPTS[name].is_style)
HEADLINE = {"lora": "LoRA", "switched-off": "LoRA, switched off without [V]",
            "paper": "PureCC, as the paper writes it", "paper, v_0": "PureCC, v_original from the base",
            "bound": "bound to [V]'s phrase", "bound-pairs": "bound, with pairs"}     # rows of README's table
OF_PHRASE = {"switched-off learning_rate=0.002 rank=4": "LoRA, switched off",
             "token": "token, Y in the word's place",
             "token, word kept learning_rate=0.004": "token, word kept",
             "bound, Y replaces learning_rate=0.004 rank=4": "phrase, Y in the word's place",
             "bound learning_rate=0.004 rank=4": "**phrase, word kept: `bound`**",
             "bound, Y added learning_rate=0.004 rank=4": "phrase, Y added to the word"}
LEARNED = ("fidelity", "sees concept", "beside, first", "beside, second", "confounder unsaid", "mask IoU",
           "outside change")
KEPT = ("class leak", "drift", "neighbour leak", "neighbour change", "another kind: leak", "no places: leak",
        "text kept")
CHANGED = ("fidelity", "beside another", "neighbour leak", "neighbour change", "another kind: leak",
           "outside change", "confounder unsaid")
OF_STYLES = ("lora", "switched-off", "anchor", "embeddings", "paper", "token", "bound")
AT_EQUAL = ("neighbour leak", "class leak", "drift", "confounder unsaid", "outside change")
AT_THE_END = (("bound", "switched-off"), ("bound", "token"), ("bound-half", "bound"),
              ("bound-pairs", "bound-half"), ("bound-pairs", "bound"), ("bound-pairs", "bound, longer"),
              ("paper", "lora"))


def headline(results: tables.Results, pairs: list[dict]) -> str:
    """README's table, of the individuals: six columns that a newcomer understands."""
    columns = {"learned ↑": "fidelity", "class word leaks ↓": "class leak",
               "other pictures change ↓": "drift", "neighbour takes on traits ↓": "neighbour leak"}
    rows = []
    for method, title in HEADLINE.items():
        group, two = [row for row in results if tables.name_of(row) == method], of_pairs(pairs, method)
        both = "{keeps:.2f} / {other's:.3f}".format(**two) if two else ""
        rows.append([title, *(tables.entry(group, name) for name in columns.values()), both,
                     tables.cost_of(group)[1]])
    header = ["method", *columns, "two in one text: kept ↑ / mixed ↓", "passes, forward + backward"]
    return tables.markdown(header, rows)


def of_styles(results: tables.Results) -> str:
    """The two styles, one by one: what was learned, and what changes without [V]."""
    styles = [name for name in HELD_OUT if CONCEPTS[name].is_style]
    rows = []
    for (method,), group in tables.grouped([row for row in results if row["concept"] in styles]).items():
        if method not in OF_STYLES:
            continue
        own = [[row for row in group if row["concept"] == style] for style in styles]
        rows.append([method, *(tables.entry(one, "fidelity") for one in own), tables.entry(group, "drift")])
    return tables.markdown(["method", *(f"{style}: fidelity ↑" for style in styles), "drift ↓"], rows)


def of_phrase() -> str:
    """The phrase taken apart, on the individuals among the tuning concepts."""
    rows = [row for row in gather(plan("phrase"), NOWHERE, shipped=True) if "braces" not in row["concept"]]
    groups, names = tables.grouped(rows), ("fidelity", "beside, first", "beside, second", "neighbour leak")
    return tables.methods_table({(title,): groups[name,] for name, title in OF_PHRASE.items()}, names)


def verdicts(results: tables.Results) -> str:
    """How many of the paper's claims hold, for each kind of adapters."""
    rows = []
    for title, is_bound in (("everywhere, as the paper's", False), ("bound to the phrase", True)):
        known = [claim.verdict() for claim in claims(results, is_bound) if claim.values]
        rows.append([title, str(len(known)), *(str(known.count(word)) for word in VERDICTS)])
    return tables.markdown(["adapters", "claims that can be asked", *VERDICTS], rows)


def all_tables() -> dict[str, str]:
    """Name of a table -> the table."""
    results = gather(plan("main"), NOWHERE, shipped=True)
    pairs = [pair.result(NOWHERE, shipped=True) for pair in plan_two()]
    individuals = [row for row in results if row["concept"] in INDIVIDUALS]
    groups = tables.grouped(individuals)
    trained = {row: group for row, group in groups.items() if row[0] not in tables.ENDS}
    return {"headline": headline(individuals, pairs),
            "learned": tables.methods_table(groups, LEARNED, cost=True),
            "kept": tables.methods_table(trained, KEPT), "styles": of_styles(results),
            "differences": tables.differences_table("at the end of training", results, AT_THE_END, CHANGED,
                                                    INDIVIDUALS),
            "fronts": tables.equal_fidelity(results, COMPARED, AT_EQUAL),
            "two": two_table(pairs), "claims": verdicts(gather(plan("claims"), NOWHERE, shipped=True)),
            "phrase": of_phrase()}


def filled(text: str, known: dict[str, str]) -> str:
    """A page with each table between its marks, which are comments that no reader sees."""
    def fill(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{known[found[1]]}\n<!-- end -->"
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def part_pages() -> dict[Path, str]:
    """Of each part that has results here, the page of its tables."""
    return {HERE / "report_pages" / f"{part}.md":
            text_of(part, gather(plan(part), NOWHERE, shipped=True)) + "\n" for part in SEEDS}


if __name__ == "__main__":
    for page, text in part_pages().items():
        write_whole(page, text.encode())
    tables.WIDE = WIDE
    known = all_tables()
    for page in PAGES:
        write_whole(page, filled(page.read_text(encoding="utf-8"), known).encode())

"""The tables that stand in README.md and in the report, from the results that came with this repository.

`python -m purecc_min.benchmark.page` writes each between the two marks of its name in these pages, so that no
number there was typed by hand. Read next: README.md, the report.
"""

import re
from pathlib import Path

from purecc_min.benchmark.claims import claims
from purecc_min.benchmark.plans import plan
from purecc_min.benchmark.report import COMPARED, gather
from purecc_min.benchmark.tables import (
    ENDS,
    Results,
    difference,
    entry,
    equal_fidelity,
    grouped,
    markdown,
    name_of,
    passes_of,
    plus_minus,
    terms_table,
    trained_of,
)
from purecc_min.benchmark.two import of_pairs, plan_two, two_table
from purecc_min.measure.measures import better
from purecc_min.measure.toy import CONCEPTS, HELD_OUT
from tinyflow.files import write_whole

HERE = Path(__file__).parent
VERDICTS = ("holds", "does not hold", "depends")
PAGES = (HERE.parents[1] / "README.md", HERE / "README.md")
INDIVIDUALS = tuple(name for name in HELD_OUT if not CONCEPTS[name].is_style)
HEADLINE = {"lora": "LoRA", "switched-off": "LoRA, switched off for texts without [V]",
            "paper": "PureCC, as the paper writes it",
            "paper, v_0": "PureCC, v_original from the base model (its Sec. 14)",
            "bound": "bound to [V]'s phrase"}    # rows of README's table
OF_PHRASE = {"switched-off learning_rate=0.002 rank=4": "LoRA, switched off",
             "token": "token, Y in the word's place",
             "token, word kept learning_rate=0.004": "token, word kept",
             "bound, Y replaces learning_rate=0.004 rank=4": "phrase, Y in the word's place",
             "bound learning_rate=0.004 rank=4": "**phrase, word kept: `bound`**",
             "bound, Y added learning_rate=0.004 rank=4": "phrase, Y added to the word",
             "bound, values alone learning_rate=0.004 rank=4": "phrase, adapters on values alone"}
LEARNED = ("fidelity", "sees concept", "beside, first", "beside, second", "confounder unsaid", "mask IoU",
           "outside change")
KEPT = ("class leak", "drift", "neighbour leak", "neighbour change", "another kind: leak", "no places: leak",
        "text kept")
AT_THE_END = (("bound", "switched-off"), ("bound", "token"), ("bound-half", "bound"),
              ("bound-pairs", "bound-half"), ("bound-pairs", "bound, longer"), ("bound-paper", "bound"),
              ("switched-off, word kept", "switched-off"), ("paper", "lora"), ("paper, v_0", "paper"))


def headline(results: Results, pairs: list[dict]) -> str:
    """README's table: six columns that a newcomer understands."""
    columns = {"learned ↑": "fidelity", "class word leaks ↓": "class leak",
               "other pictures change ↓": "drift", "a plain neighbour takes on traits ↓": "neighbour leak"}
    rows = []
    for method, title in HEADLINE.items():
        group, two = [row for row in results if name_of(row) == method], of_pairs(pairs, method)
        both = "{keeps:.2f}, {other's:.2f}".format(**two) if two else ""
        rows.append([title, *(entry(group, name) for name in columns.values()), both, passes_of(group)])
    return markdown(["method", *columns, "two concepts in one text: kept ↑, mixed ↓", "passes"], rows)


def of_methods(results: Results, names: tuple[str, ...], cost: bool = False,
               titles: dict[str, str] | None = None) -> str:
    """Methods as rows, these measures as columns. titles: of these rows alone, by the methods' names."""
    header = ["method", *(f"{name} {better(name)}" for name in names), *(["trained", "passes"] * cost)]
    groups = grouped(results)
    titles = titles or {name: name for name in groups}
    rows = [[title, *(entry(groups[name], measure) for measure in names),
             *([trained_of(groups[name]), passes_of(groups[name])] * cost)] for name, title in titles.items()]
    return markdown(header, rows)


def differences(results: Results) -> str:
    """One method minus another at the end of training, on the individuals, paired by concept and seed."""
    names = ("fidelity", "beside another", "neighbour leak", "neighbour change", "another kind: leak",
             "outside change", "confounder unsaid")
    rows = [[f"{larger} minus {smaller}",
             *(plus_minus(name, difference(results, larger, smaller, name, INDIVIDUALS), signed=True)
               for name in names)] for larger, smaller in AT_THE_END]
    return markdown(["at the end of training", *names], rows)


def of_phrase(nowhere: Path) -> str:
    """The phrase taken apart, on the individuals among the tuning concepts."""
    rows = [row for row in gather(plan("phrase"), nowhere, shipped=True) if "braces" not in row["concept"]]
    names = ("fidelity", "beside, first", "beside, second", "neighbour leak")
    return of_methods(rows, names, titles=OF_PHRASE)


def verdicts(results: Results) -> str:
    """How many of the paper's claims hold, for each kind of adapters."""
    rows = []
    for title, is_bound in (("everywhere, as the paper's", False), ("bound to the phrase", True)):
        known = [claim.verdict() for claim in claims(results, is_bound) if claim.values]
        rows.append([title, str(len(known)), *(str(known.count(word)) for word in VERDICTS)])
    return markdown(["adapters", "claims that can be asked", *VERDICTS], rows)


def tables() -> dict[str, str]:
    """Name of a table -> the table."""
    nowhere = Path("nowhere")                    # no folder: what came with this repository
    results = gather(plan("main"), nowhere, shipped=True)
    pairs = [pair.result(nowhere, shipped=True) for pair in plan_two()]
    individuals = [row for row in results if row["concept"] in INDIVIDUALS]
    return {"headline": headline(results, pairs), "learned": of_methods(results, LEARNED, cost=True),
            "kept": of_methods([row for row in results if row["method"] not in ENDS], KEPT),
            "individuals": of_methods(individuals, ("fidelity", "beside another", "neighbour leak")),
            "differences": differences(results), "fronts": equal_fidelity(results, COMPARED),
            "two": two_table(pairs), "claims": verdicts(gather(plan("claims"), nowhere, shipped=True)),
            "lambdas": terms_table(results), "phrase": of_phrase(nowhere)}


def filled(text: str, known: dict[str, str]) -> str:
    """A page with each table between its marks, which are comments that no reader sees."""
    def fill(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{known[found[1]]}\n<!-- end -->"
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    known = tables()
    for page in PAGES:
        write_whole(page, filled(page.read_text(encoding="utf-8"), known).encode())

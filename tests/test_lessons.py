"""The form of the lessons: one source, a blank notebook and a solved one, and checks that can fail.

The lessons themselves are run by `python -m tutorials.build --check`.
"""

import linecache
import pkgutil
import re
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from purecc_min.benchmark import page, tables
from tinyflow import flow
from tinyflow.errors import InputError
from tutorials.build import FOLDER, blank, build, tags, versions
from tutorials.course import NotYet, YourTurn, expect, expect_close, own_work, rule_out, several

LESSONS = sorted((FOLDER / "lessons").glob("[0-9]*.py"))     # the introduction has slides alone
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
HEAD = "# %%\nsys.path.insert(0, '../..')\nfrom tutorials.course import YourTurn, expect, expect_close\n\n"
EXERCISE = '''# %% tags=["exercise"]
def double(x):
    # BEGIN SOLUTION 9.1
    return 2 * x
    # END SOLUTION

'''
WRONG = '# %% tags=["wrong"]\n# says: twice 3\ndef double(x):\n    return x + x + x\n\n'
CHECK = '# %% tags=["check"]\nexpect(double(3) == 6, "twice 3 is 6.")\n'


def wrong(words: str, body: str) -> str:
    return f'# %% tags=["wrong"]\n# says: {words}\ndef double(x):\n    {body}\n\n'


TENSORS = """# %% tags=["check"]
import torch
from tinyflow import flow
half = torch.full((2,), 0.5)
expect_close(double(half), flow.path(half, 3 * half, half), "twice a half")
"""


def try_out(tmp_path: Path, *cells: str) -> str:
    source = tmp_path / "99_toy.py"
    source.write_text(HEAD + "".join(cells))
    return build(source, check=True)


def test_a_check_names_the_mistake_and_an_exception_is_one_line(tmp_path):
    answers = [wrong("is the return missing?", "x + x"), wrong("other sign", "return -2 * x"),
               wrong("2 times", "return 4 * x"), wrong("a tensor is wanted", "return 1.0"),
               wrong("in your `double`, line 4 of the cell, `return x @ y`, with NameError", "return x @ y"),
               wrong("Something is None there: is a return missing?", "return (lambda y: None)(x) + 1"),
               wrong("in your `double`, line 4", "return sum(y @ None for y in [x])"),
               wrong("flow.path is the package's own answer", "return flow.path(x, 3 * x, x)"),
               '# %% tags=["wrong"]\n# says: package\ndouble = flow.path\n']
    assert "11 answers refused" in try_out(tmp_path, EXERCISE, *answers, TENSORS)
    after = "# %%\nprint(later)\n"              # a name that a blank exercise above should have made
    with pytest.raises(CellExecutionError, match="`later` is not there: a cell above has not run to its end"):
        try_out(tmp_path, after)


def test_own_work_may_have_names_like_the_packages():
    """It said "flow.path" where an answer called its own `path` and flow.squared_error."""
    def path(x):
        return x

    def mine(x):
        return flow.squared_error(path(x), x)

    own_work(mine, without="flow.path, flow.guide")
    for theirs in (flow.path, lambda x: flow.path(x, x, x)):
        with pytest.raises(NotYet, match="own"):
            own_work(theirs, without="flow.path, flow.guide")


def test_code_below_the_raise_is_told_from_a_blank():
    cell = blank("def f(x):\n    # BEGIN SOLUTION 4.2\n    y = x\n    # END SOLUTION\n    return y\n\na = 1")
    assert "# given\n    return y" in cell
    for source, words in ((cell, "still blank"),
                          (cell.replace("    # given", "    y = x\n    # given"), "code below the raise"),
                          ('def f(x):\n    raise YourTurn("4.2")\n\n    return x', "code below the raise"),
                          ('def f(x):\n    raise YourTurn("4.2")\n    # a hint\n\ndef g(x):\n    return x',
                           "still blank")):
        linecache.cache["<cell>"] = (len(source), None, source.splitlines(keepends=True), "<cell>")
        space = {"YourTurn": YourTurn}
        exec(compile(source, "<cell>", "exec"), space)
        with pytest.raises(YourTurn, match=words):
            space["f"](1)


def test_what_a_check_says_of_values():
    ours = torch.arange(1.0, 5.0)
    for yours, words in ((None, "return missing"), (ours.view(2, 2), "shape should be"),
                         (-ours, "other sign"), (ours / 4, "0.25 times"), (ours.flip(0), "another order"),
                         (ours / 0, "infinite"), (ours + 0.5, "differ by up to 0.5")):
        with pytest.raises(NotYet, match=words):
            expect_close(yours, ours, "y")
    expect_close(ours.double(), ours, "y")
    for refused, words in ((lambda: expect(None, "something"), "return missing"),
                           (lambda: rule_out(ours / 4, {"a quarter": ours / 4}), "a quarter"),
                           (lambda: rule_out(.5, {"a half": .5}), "a half"),
                           (lambda: several(ours, ("x", "y")), "return 2 things, x, y; there is one Tensor"),
                           (lambda: several((ours,), ("x", "y")), "there is 1")):
        with pytest.raises(NotYet, match=words):
            refused()
    rule_out(ours / 4 + .01, {"a quarter": ours / 4, "another shape": ours[:2]})
    assert several([ours, 1], ("x", "y")) == [ours, 1]


@pytest.mark.parametrize("cells, complaint", [
    ([EXERCISE, WRONG.replace("twice 3", "thrice"), CHECK], "should say 'thrice'"),
    ([EXERCISE, WRONG, CHECK.replace("double(3) == 6", "double(3) > 5")], "should raise NotYet"),
    ([EXERCISE, WRONG, CHECK.replace("double(3) == 6", "True")], "should raise YourTurn"),
    (["# %%\nimport sys\nprint('careful', file=sys.stderr)\n"], "there is a warning"),
    (["# %%\nprint('line\\n' * 60)\n"], "longer than"),
], ids=["other words", "a wrong answer passes", "the check looks at nothing", "a warning", "a long output"])
def test_what_a_lesson_may_not_do(tmp_path, cells, complaint):
    with pytest.raises(InputError, match=complaint):
        try_out(tmp_path, *cells)


@each_lesson
def test_a_lesson_fits_a_page_and_every_exercise_has_a_check_and_a_wrong_answer(path):
    lesson = jupytext.read(path)
    kinds = [tags(cell)[0] for cell in lesson.cells if tags(cell)]       # a slide has others: its concepts
    order = " ".join([*[kind for kind in kinds if kind != "slide"], ""])
    assert re.fullmatch(r"(exercise (wrong )+check ){5,8}", order), order
    made = versions(lesson)
    blanks = [cell.source for cell in made["learner"].cells if "raise YourTurn" in cell.source]
    assert len(blanks) == kinds.count("exercise")
    assert not any("SOLUTION" in cell.source for name in made for cell in made[name].cells)
    for cell in made["solved"].cells:            # a learner's page said "right" before anything was written
        cell.source = "run"
    assert not any(cell.source == "run" for cell in made["learner"].cells)
    assert 8 <= kinds.count("slide") <= 15
    for cell in lesson.cells:                    # tables, formulas and drawings cannot be broken
        free = cell.cell_type == "markdown" and "```" in cell.source
        long = [line for line in cell.source.splitlines()
                if len(line) > 110 and not free and not line.startswith("|") and "$$" not in line]
        assert not long, long


def test_the_notation_sheet_names_what_is_there():
    rows = [row for row in (FOLDER / "notation.md").read_text().splitlines() if row.startswith("| ")]
    names = [name for row in rows for name in re.findall("`([a-z_]+[.][A-Za-z_.]+)`", row)]
    assert len(names) > 20
    for name in names:
        assert pkgutil.resolve_name(name) is not None


@each_lesson
def test_the_notebooks_are_those_of_the_sources(path):
    """Whoever changes a lesson runs `python -m tutorials.build` again. And no page names a place on the
    machine: lesson 6 once printed the temporary folder in which its script had run.
    """
    made = versions(jupytext.read(path))
    solved = [cell for cell in made["solved"].cells if "slide" not in tags(cell)]
    for folder, cells in (("notebooks", made["learner"].cells), ("solved", solved)):
        kept = nbformat.read(FOLDER / folder / f"{path.stem}.ipynb", as_version=4)
        assert [cell.source for cell in kept.cells] == [cell.source for cell in cells]
    page = (FOLDER / "solved" / f"{path.stem}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|root|Users)/", page)
    assert (FOLDER / "slides" / f"{path.stem}.html").exists()


def test_numbers_that_lessons_quote_are_the_benchmarks():
    """A lesson asserts what it computes itself; these few numbers are quoted from the report."""
    main = page.gather(page.plan("main"), page.NOWHERE, shipped=True)
    phrase = page.gather(page.plan("phrase"), page.NOWHERE, shipped=True)
    every, own = tables.grouped(main), tables.grouped([r for r in main if r["concept"] in page.INDIVIDUALS])
    parts = tables.grouped([row for row in phrase if "braces" not in row["concept"]])
    beside = ("neighbour leak", "beside, first", "beside, second")
    wanted = {
        4: [tables.entry(every["token",], "fidelity"), tables.entry(every["lora",], "fidelity")],
        5: [tables.entry(every[name,], "diversity") for name in ("DreamBooth", "lora")],
        9: [" | ".join(f"{np.mean(tables.seed_means(parts[name,], measure)):.2f}" for measure in beside)
            for name in list(page.OF_PHRASE)[1:5]]
           + [" | ".join(f"{np.mean(tables.seed_means(own[name,], measure)):.3f}"
                         for measure in ("fidelity", "beside another", "neighbour leak"))
              for name in ("bound", "bound-pairs")]}
    for number, quotes in wanted.items():
        text = LESSONS[number - 1].read_text(encoding="utf-8")
        text = re.sub(r"\n# |\*\*", " ", text).replace("−", "-")
        for quote in quotes:
            assert " ".join(re.sub(r"\b0\.", ".", quote).split()) in " ".join(text.split()), (number, quote)

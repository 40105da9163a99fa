"""What a teacher hands out: syllabi that name what is there, notebooks with chosen blanks, and archives in
which students find no solution. And a course that can be started from anywhere.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from functools import cache
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from tinyflow.errors import InputError
from tutorials import kit
from tutorials.build import FOLDER, chosen_notebooks, main, tags, versions
from tutorials.minutes import HOURS, README, WORDS, minutes, with_table

LESSONS = {int(path.name[:2]): path for path in sorted((FOLDER / "lessons").glob("[0-9]*.py"))}
GUIDE = (FOLDER / "teaching" / "README.md").read_text(encoding="utf-8")


SOURCES = {number: path.read_text(encoding="utf-8") for number, path in LESSONS.items()}
EXERCISES = set(re.findall(r"\n# ### Exercise (\d+\.\d)", "".join(SOURCES.values())))


@cache
def made(number: int) -> dict:
    """The blank and the solved notebook of a lesson."""
    return versions(jupytext.read(LESSONS[number]))


def test_a_teachers_page_cites_exercises_and_sections_that_exist():
    before, table = GUIDE.split("## Numbers to expect")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"(?<![\d.])(\d{1,2}\.\d)(?![\d.])", "\n".join([before, *rows])))
    named -= set(re.findall(r"nbgrader (\d\.\d)|Python (\d\.\d)", GUIDE)[0])
    assert named and named <= EXERCISES, named - EXERCISES
    cited = re.findall(r"(?:lesson )?(\d+), sections? (\d+)(?: (?:to|and) (\d+))?", GUIDE)
    assert cited
    for lesson, *sections in cited:
        for section in filter(None, sections):
            assert f"\n# ## {section} · " in SOURCES[int(lesson)], (lesson, section)


def test_the_minutes_of_a_syllabus_add_up():
    days = re.split(r"\n\| minutes \|", GUIDE)[1:]
    rows = [re.findall(r"^\| (\d+) \| [^|]*\|$", day.split("\n\n")[0], re.MULTILINE) for day in days]
    assert [sum(map(int, minutes)) for minutes in rows] == [210, 360, 360]


def test_the_table_of_the_readme_is_that_of_the_lessons():
    """Words and stars as minutes, apart for what is optional."""
    found = {number: minutes(jupytext.read(path)) for number, path in LESSONS.items()}
    readme = README.read_text(encoding="utf-8")
    assert with_table(readme, found) == readme, "run python -m tutorials.build --minutes"
    assert [int(number) for number in re.findall(r"^\| (\d+)\. ", readme, re.MULTILINE)] == list(found)
    assert sum(own.core for own in found.values()) <= 60 * HOURS
    assert not {number: own.words for number, own in found.items() if own.words > WORDS}


@pytest.mark.parametrize("recipe", kit.RECIPES)
def test_a_recipe_leaves_its_exercises_blank_and_nothing_else(recipe):
    """Filled in, its notebooks are the solved ones, which --check runs from the first cell to the last."""
    items, left = kit.RECIPES[recipe].split(), set()
    for name, (notebook, filled) in chosen_notebooks(items, LESSONS).items():
        solved = [cell.source for cell in made(int(name[:2]))["solved"].cells if "slide" not in tags(cell)]
        assert [cell.source for cell in filled.cells] == solved
        left |= {kit.number_of(cell) for cell in notebook.cells if "raise YourTurn" in cell.source}
    whole = {name for name in EXERCISES if f"{name.split('.')[0]}.*" in items}
    assert left == {item for item in items if "." in item and "*" not in item} | whole


def test_blanks_by_name(tmp_path, capsys):
    main(["--blank", "6.2", "7", "--out", str(tmp_path / "out")])
    assert "2 notebooks" in capsys.readouterr().out
    blanks = {path.name[:2]: path.read_text(encoding="utf-8").count("raise YourTurn")
              for path in (tmp_path / "out").iterdir()}
    assert blanks == {"06": 1, "07": 0}
    with pytest.raises(InputError, match="no exercise 6.44"):
        kit.chosen(["6.44"], {6: ["6.1"]})


def links_of(text: str) -> list[str]:
    return [target for _, _, target, _ in kit.LINK.findall(text) if ":" not in target]


def test_links_lead_where_they_led():
    cell = new_markdown_cell("[a](../../tinyflow/flow.py) [b](https://x.org) ![c](../play.html)")
    kit.moved(new_notebook(cells=[cell]), FOLDER.parent / "output" / "deep" / "er")
    assert links_of(cell.source) == ["../../../tinyflow/flow.py", "../../../tutorials/play.html"]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    out = tmp_path_factory.mktemp("students")
    main(["--student", "--out", str(out)])
    return zipfile.ZipFile(out / "purecc-min-students.zip")


def test_a_students_archive_has_no_solution_and_no_dead_link(students):
    names = set(students.namelist())
    there = names | {parent.as_posix() for name in names for parent in Path(name).parents}
    assert not [name for name in names if re.search("lessons/|solved/|exam|keys|tests/|build.py", name)]
    texts = {name: students.read(name).decode() for name in names if name.endswith((".md", ".ipynb"))}
    for number, path in LESSONS.items():
        (name,) = (name for name in texts if name.endswith(f"/{path.stem}.ipynb"))
        blanks = SOURCES[number].count('tags=["exercise"]')
        assert texts[name].count('"# Exercise ') == blanks and "YourTurn(" in texts[name]
        cells = nbformat.reads(texts[name], as_version=4).cells
        texts[name] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        for module in re.findall("^from ((?:tutorials|tinyflow|purecc_min)[^ ]*) import", code, re.MULTILINE):
            place = f"purecc-min/{module.replace('.', '/')}"     # lesson 7's was missing once
            assert f"{place}.py" in there or place in there, (name, module)
    for name, text in texts.items():
        dead = [link for link in links_of(text) if os.path.normpath(Path(name).parent / link) not in there]
        assert not dead, (name, dead)


def test_optional_sections_may_stay_blank():
    """Jupyter's "Run All" once stopped at the first blank of an optional section."""
    marked = 0
    for number in LESSONS:
        optional = False
        for cell in made(number)["learner"].cells:
            if cell.cell_type == "markdown" and (headings := re.findall("^## .*", cell.source, re.MULTILINE)):
                optional = headings[-1].endswith("(optional)")
            if cell.cell_type == "code":
                assert (kit.GO_ON in tags(cell)) == optional, (number, cell.source[:60])
                marked += optional
    assert marked > 50
    filled = kit.with_blanks(made(8)["learner"], made(8)["solved"], set())
    assert not any(kit.GO_ON in tags(cell) for cell in filled.cells)     # there each cell has to run


def test_a_teachers_archive_has_what_students_lack(tmp_path, students):
    main(["--teacher", "--out", str(tmp_path)])
    names = set(zipfile.ZipFile(tmp_path / "purecc-min-teachers.zip").namelist())
    for name in ("teaching/exam_keys.md", "teaching/problem_keys.md", "lessons/06_objective.py",
                 "solved/06_objective.ipynb", "teaching/nbgrader_config.json"):
        assert f"purecc-min/tutorials/{name}" in names - set(students.namelist())


@pytest.mark.parametrize("place, found", [("tutorials/notebooks", True), (".", True), ("..", True),
                                          ("elsewhere", False)])
def test_the_first_cell_finds_the_course_or_says_what_to_do(tmp_path, place, found):
    cell = (FOLDER / "first_cell.py").read_text(encoding="utf-8")
    own = tmp_path / "copies" / "course"
    (own / "tutorials" / "notebooks").mkdir(parents=True)
    (own / "tutorials" / "first_cell.py").write_text(cell)
    (own / "tutorials" / "course.py").write_text("own_work = 1\n")
    ran = subprocess.run([sys.executable, "-c", f"{cell}\nprint(root)"], text=True, capture_output=True,
                         cwd=own / place if found else tmp_path, env={"PATH": ""})
    if found:
        assert Path(ran.stdout.strip()).resolve() == own.resolve(), ran.stderr
    else:
        assert "folder of the course is not found" in ran.stderr.splitlines()[-1]


def learners(kind):
    """The cells of this kind in each blank notebook."""
    return [[cell for cell in made(number)["learner"].cells if cell.cell_type == kind] for number in LESSONS]


def test_every_notebook_begins_with_the_first_cell_and_has_marks_for_nbgrader():
    for code in learners("code"):
        assert code[0].source.startswith("# Finds the course's folder")
        assert not any("sys.path.insert(0, str(Path.cwd()" in cell.source for cell in code)
        marks = [cell.metadata["nbgrader"] for cell in code if "nbgrader" in cell.metadata]
        assert len({mark["grade_id"] for mark in marks}) == len(marks) == 2 * sum(
            cell.source.startswith("# Exercise ") for cell in code)
        assert {mark["points"] for mark in marks if mark["grade"]} <= {1, 2, 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Jupyter server that was started as the README says, in the course's folder; its address."""
    pytest.importorskip("jupyter_server", reason="pip install -r tutorials/requirements.txt")
    runtime = tmp_path_factory.mktemp("runtime")
    line = [sys.executable, "-m", "jupyter_server", "--no-browser", "--ServerApp.port=0", "--allow-root",
            "--IdentityProvider.token=course"]
    running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=FOLDER.parent,
                               env={**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime)})
    try:
        for _ in range(600):
            try:
                own = json.loads(next(runtime.glob("jpserver-*.json")).read_text())
                socket.create_connection((own["hostname"], own["port"])).close()
                break
            except (StopIteration, OSError):     # it writes its address a while before it answers
                time.sleep(0.1)
        else:
            pytest.fail("the server does not start")
        yield own["url"]
    finally:
        running.terminate()
        running.wait()


def test_a_running_server_finds_each_link_of_the_blank_notebooks(server):
    def asked(address: str) -> int:
        request = urllib.request.Request(server + address, headers={"Authorization": "token course"})
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    assert asked("api/contents/tutorials/no-such-file?content=0") == 404
    targets = {os.path.normpath(f"tutorials/notebooks/{link}") for cells in learners("markdown")
               for cell in cells for link in links_of(cell.source)}
    assert len(targets) > 10
    for target in targets:                       # a page's address, and the file itself: no folder has one
        assert asked(f"api/contents/{target}?content=0") == asked(f"files/{target}") == 200, target

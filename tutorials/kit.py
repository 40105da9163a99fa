"""What a class gets: notebooks in which only some exercises are blank, and archives of both parts.

A recipe names the exercises of a syllabus (teaching/README.md): "6.2" is blank, "6.*" are all of lesson 6,
and of "7" no exercise is blank. What is not blank is filled in, so every notebook runs from its first cell.
"""

import os
import re
import zipfile
from copy import deepcopy
from pathlib import Path

from tinyflow.errors import InputError
from tutorials.course import EXERCISE

FOLDER = Path(__file__).parent
RECIPES = {
    "half-day": "1.1 1.3 4.7 6.2 6.3 6.4 7 9",
    "two-day": "1.1 1.2 1.3 1.4 1.5 1.6 2.3 2.5 2.7 4.2 4.3 4.5 4.7 4.8 5 6.1 6.2 6.3 6.4 6.5 6.6 7.* "
               "9.1 9.3 9.4 10",
    "eight-week": "1.* 2.* 3.* 4.* 5.* 6.* 7.* 8.* 9.* 10.*",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
SOLVED = re.compile(r"\[`?\.\./solved`?\]\(\.\./solved/?\)")
OF_ARCHIVE = ("*This is the archive for students: it has no tests, no sources of lessons, no solutions, no "
              "exam. Commands that need them work in the repository.*\n\n")
GO_ON = "raises-exception"                       # Jupyter's "Run All" goes on after such a cell
KEPT_BACK = re.compile(r"(olved\s+notebook\s+is|olutions)\s+in\s+the\s+folder\s+`tutorials/solved`")
TOP = "purecc-min"                               # the folder in both archives
EVERYONE = ["README.md", "LICENSE", "CITATION.cff", "pyproject.toml", "requirements.txt", "tinyflow",
            "purecc_min"]
STUDENT = ["README.md", "notation.md", "play.html", "requirements.txt", "course.py", "first_cell.py",
           "LICENSE-texts", "slides", "experiments", "teaching/problems.md", "teaching/project.md"]
TEACHER = ["lessons", "solved", "teaching", "diagrams", "build.py", "kit.py", "minutes.py", "slides.py",
           "slides_template.html"]


# -------------------------------------------------------------------------------------------------- notebooks
def number_of(cell) -> str:
    """The number of the exercise that a cell of a notebook holds, such as 6.2; "" for another cell."""
    first = cell.source.splitlines()[0] if cell.source else ""
    return first.removeprefix(EXERCISE) if first.startswith(EXERCISE) else ""


def chosen(items: list[str], exercises: dict[int, list[str]]) -> dict[int, set[str]]:
    """lesson -> the exercises that are blank in it, from items such as 6.2, 6.* and 7.

    Raises: InputError for an exercise or a lesson that does not exist.
    """
    blank: dict[int, set[str]] = {}
    for item in items:
        lesson, _, exercise = item.partition(".")
        there = exercises.get(int(lesson) if lesson.isdecimal() else -1, [])
        names = there if exercise == "*" else [item] if exercise else []
        if not there or not set(names) <= set(there):
            raise InputError(f"there is no exercise {item}; name one as 6.2, a whole lesson's as 6.*, "
                             "and a lesson without blanks as 6")
        blank.setdefault(int(lesson), set()).update(names)
    return blank


def with_blanks(learner, solved, blank: set[str]):
    """The learner's notebook with all exercises filled in but these."""
    answers = {number_of(cell): cell for cell in solved.cells if number_of(cell)}
    made = deepcopy(learner)
    for n, cell in enumerate(made.cells):
        if not blank and GO_ON in cell.metadata.get("tags", []):
            cell.metadata["tags"].remove(GO_ON)  # with all filled in, every cell has to run
        if (number := number_of(cell)) and number not in blank:
            made.cells[n] = deepcopy(answers[number])
            made.cells[n].id = cell.id
    return made


def may_stay_blank(cells: list) -> None:
    """Marks the code of optional sections, so that blanks left there do not stop "Run All"."""
    optional = False
    for cell in cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^## .*$", cell.source, re.MULTILINE)
            optional = headings[-1].endswith("(optional)") if headings else optional
        elif optional:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), GO_ON]


def moved(notebook, out: Path) -> None:
    """Makes a notebook's links lead from the folder `out` to where they lead from notebooks/."""
    def link(match: re.Match) -> str:
        if ":" in match[3]:
            return match[0]
        target = os.path.relpath((FOLDER / "notebooks" / match[3]).resolve(), out.resolve())
        return f"{match[1]}[{match[2]}]({Path(target).as_posix()}{match[4] or ''})"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(link, cell.source)


# --------------------------------------------------------------------------------------------------- archives
def files_below(place: Path) -> list[Path]:
    found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [path for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]


def without_dead_links(text: str, place: str, names: set[str]) -> str:
    """A page for the student's archive: a link to what is not in it becomes its text, a row that begins with
    such a link goes, and the sentence about solved notebooks names the teacher.
    """
    there = names | {parent.as_posix() for name in names for parent in Path(name).parents}

    def alive(target: str) -> bool:
        return ":" in target or Path(os.path.normpath(Path(place).parent / target)).as_posix() in there

    def link(match: re.Match) -> str:
        return match[0] if alive(match[3]) else match[2]

    text = KEPT_BACK.sub(r"\1 with your teacher", text)
    rows = [(line, re.match(r"\| " + LINK.pattern, line)) for line in text.split("\n")]
    return "\n".join(LINK.sub(link, line) for line, row in rows if not row or alive(row[3]))


def student_archive(out: Path, notebooks: dict, recipe: str = "") -> Path:
    """What a class downloads: the packages, and the course without a solution, an exam or a key.

    `notebooks`: file name -> notebook. recipe: whose blanks they have, a part of the file's name.
    """
    import nbformat

    files = {path.relative_to(FOLDER.parent).as_posix(): path.read_bytes()
             for name in EVERYONE + [f"tutorials/{name}" for name in STUDENT]
             for path in files_below(FOLDER.parent / name)}
    names = {*files, *(f"tutorials/notebooks/{name}" for name in notebooks)}
    for name, content in files.items():
        if name.endswith(".md"):
            note = OF_ARCHIVE if Path(name).name == "README.md" else ""
            files[name] = (note + without_dead_links(content.decode(), name, names)).encode()
    for name, notebook in notebooks.items():
        place, own = f"tutorials/notebooks/{name}", deepcopy(notebook)
        for cell in own.cells:
            if cell.cell_type == "markdown":
                cell.source = without_dead_links(cell.source, place, names)
        files[place] = (nbformat.writes(own) + "\n").encode()
    archive = f"{TOP}-students-{recipe}.zip" if recipe else f"{TOP}-students.zip"
    return write(out / archive, files)


def teacher_archive(out: Path) -> Path:
    """What a class does not get: sources, solved notebooks, exams and keys. It is unzipped over the other."""
    files = {path.relative_to(FOLDER.parent).as_posix(): path.read_bytes()
             for name in TEACHER for path in files_below(FOLDER / name)}
    return write(out / f"{TOP}-teachers.zip", files)


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(f"{TOP}/{name}", content)
    return path

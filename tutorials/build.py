"""Makes the notebooks of the lessons: for each one the learner's, with blank exercises, and the solved one.

    python -m tutorials.build              writes notebooks/, solved/ with all outputs, and slides/
    python -m tutorials.build 2 4          of these lessons
    python -m tutorials.build --check      writes none, and fails where a lesson or one of its checks fails

A lesson's source is a Python file in percent format, lessons/NN_name.py, which jupytext reads. Four tags
say what a cell is:

    exercise    what stands between "# BEGIN SOLUTION 2.1" and "# END SOLUTION" is for the learner to write
    check       tests the exercise before it
    wrong       a wrong answer that this check has to refuse; it comes into neither notebook
    slide       comes into the slides only (slides.py)
"""

import os
import time
from copy import deepcopy
from pathlib import Path

from tinyflow.errors import InputError
from tinyflow.terminal import Parser, report_errors

FOLDER = Path(__file__).parent
LONGEST = 48                                     # lines of text that a cell may print: a screen


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def blank(source: str) -> str:
    """An exercise without its solution. It raises YourTurn where the solution was."""
    lines, inside = [], False
    for line in source.splitlines():
        if line.lstrip().startswith("# BEGIN SOLUTION"):
            inside, exercise = True, line.split()[-1]
            lines.append(f'{line[:len(line) - len(line.lstrip())]}raise YourTurn("{exercise}")')
        elif line.lstrip() == "# END SOLUTION":
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def solution(source: str) -> str:
    marks = ("# BEGIN SOLUTION", "# END SOLUTION")
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(marks))


def versions(lesson) -> dict:
    """name -> notebook: for the learner, solved, and for the check, where each exercise is first left blank,
    then answered wrong, then solved, with its check after each.
    """
    from nbformat.v4 import new_code_cell as code
    from nbformat.v4 import new_notebook

    cells = {"learner": [], "solved": [], "check": []}
    tries = []                                   # (source, the error that the check should then raise)
    for cell in lesson.cells:
        kind = next((tag for tag in tags(cell) if tag in ("exercise", "check", "wrong")), "")
        if kind == "wrong":
            tries.append((cell.source, "NotYet"))
            continue
        if kind == "exercise":
            answer = solution(cell.source)
            tries = [(blank(cell.source), "YourTurn")]
            cells["learner"].append(code(blank(cell.source)))
            cells["solved"].append(code(answer))
            continue
        if "slide" in tags(cell):
            cells["solved"].append(cell)         # so that the deck knows which picture came before
            continue
        if kind == "check":
            for source, error in tries:
                cells["check"] += [code(source), code(cell.source, metadata={"tags": ["raises-exception"],
                                                                             "error": error})]
            cells["check"].append(code(answer))
        for name in cells:
            cells[name].append(deepcopy(cell))   # running a notebook fills its cells with outputs
    for own in cells.values():
        for n, cell in enumerate(own):
            cell.id = f"cell-{n}"                # not a random one: a new build shows in a diff what is new
    return {name: new_notebook(cells=own, metadata=lesson.metadata) for name, own in cells.items()}


def execute(notebook, name: str) -> float:
    """Runs a notebook beside its source; returns the seconds it took.

    Raises: CellExecutionError where a cell fails. InputError where one warns or prints more than a screen,
    and where a check lets pass what it has to refuse.
    """
    from nbclient import NotebookClient

    os.environ["TQDM_DISABLE"] = "1"             # on a slow machine a progress bar would look like a warning
    begun = time.time()
    NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(FOLDER / "lessons")}}).execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        wanted, errors = cell.metadata.get("error"), [o.ename for o in outputs if o.output_type == "error"]
        where = f"{name}, in the cell that begins {cell.source.splitlines()[0]!r}" if cell.source else name
        if wanted and errors != [wanted]:
            raise InputError(f"{where}: the check should raise {wanted}, and raised {errors or 'nothing'}")
        if any(o.get("name") == "stderr" for o in outputs):
            raise InputError(f"{where}: there is a warning in the output")
        if sum(o.get("text", "").count("\n") for o in outputs) > LONGEST:
            raise InputError(f"{where}: the output is longer than {LONGEST} lines")
    return time.time() - begun


def build(source: Path, check: bool) -> str:
    """Makes one lesson's notebooks, or checks them; returns a line that says so."""
    import jupytext
    import nbformat

    made = versions(jupytext.read(source))
    if check:
        tried = sum("error" in cell.metadata for cell in made["check"].cells)
        seconds = execute(made["check"], source.name)
        return f"{source.name}: {seconds:.0f} s, {tried} answers refused"
    from tutorials.slides import deck

    seconds, solved = execute(made["solved"], source.name), made["solved"]
    page, slides = deck(solved, solved.cells[0].source.splitlines()[0].lstrip("# "))
    solved.cells = [cell for cell in solved.cells if "slide" not in tags(cell)]
    for folder in ("notebooks", "solved", "slides"):
        (FOLDER / folder).mkdir(exist_ok=True)
    nbformat.write(made["learner"], FOLDER / "notebooks" / f"{source.stem}.ipynb")
    nbformat.write(solved, FOLDER / "solved" / f"{source.stem}.ipynb")
    (FOLDER / "slides" / f"{source.stem}.html").write_text(page, encoding="utf-8")
    return f"{source.name}: {seconds:.0f} s, {slides} slides"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("python -m tutorials.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("lessons", nargs="*", type=int, help="their numbers; by default all")
    parser.add_argument("--check", action="store_true", help="write nothing; try the exercises' checks")
    options = parser.parse_args(arguments)
    with report_errors():
        sources = {int(path.name[:2]): path for path in sorted((FOLDER / "lessons").glob("*.py"))}
        if unknown := set(options.lessons) - set(sources):
            raise InputError(f"there is no lesson {min(unknown)}; there are {', '.join(map(str, sources))}")
        try:
            for number in options.lessons or sources:
                print(build(sources[number], options.check), flush=True)
        except ModuleNotFoundError as error:
            raise InputError(f"the lessons need {error.name}: "
                             "pip install -r tutorials/requirements.txt") from None


if __name__ == "__main__":
    main()

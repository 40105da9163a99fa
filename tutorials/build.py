"""Makes the notebooks of the lessons: for each one the learner's, with blank exercises, and the solved one.

    python -m tutorials.build              writes notebooks/, solved/ with all outputs, and slides/
    python -m tutorials.build 2 4          of these lessons
    python -m tutorials.build --check      writes none, and fails where a lesson or one of its checks fails
    python -m tutorials.build --minutes    counts how long each lesson takes, into the table of README.md
    python -m tutorials.build --blank 6.2 6.3 --out half-day/      only these are blank, the others filled in
    python -m tutorials.build --recipe half-day                    the notebooks of a syllabus (kit.py)
    python -m tutorials.build --student    an archive for a class; --teacher: one of solutions and keys

A lesson's source is a Python file in percent format, lessons/NN_name.py, which jupytext reads. Four tags
say what a cell is:

    exercise    what stands between "# BEGIN SOLUTION 2.1" and "# END SOLUTION" is for the learner to write
    check       tests the exercise before it
    wrong       a wrong answer that this check has to refuse; it comes into neither notebook. Where its first
                line is "# says: words", the check's message has to contain these words
    slide       comes into the slides only (slides.py)
"""

import ast
import os
import re
import textwrap
import time
from copy import deepcopy
from pathlib import Path

from tinyflow.errors import InputError
from tinyflow.terminal import Parser, file_path, report_errors
from tutorials import kit
from tutorials.course import CHECK, EXERCISE, GIVEN, PACKAGES
from tutorials.minutes import README, WORDS, minutes, stars_of, with_table

FOLDER = Path(__file__).parent
DECK_0 = FOLDER / "lessons" / "introduction.py"  # slides without a notebook; `build 0` makes them
OUTPUT = Path("output")
HELPERS = {"expand", "noise_for", "squared_error"}                  # whoever likes may call these
LONGEST = 48                                     # lines of text that a cell may print: a screen


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def blank(source: str) -> str:
    """An exercise without its solution. It raises YourTurn where the solution was."""
    lines, inside, indent = [], False, ""
    for line in source.splitlines():
        if line.lstrip().startswith("# BEGIN SOLUTION"):
            inside, indent, exercise = True, line[:len(line) - len(line.lstrip())], line.split()[-1]
            lines.append(f'{indent}raise YourTurn("{exercise}")')
        elif line.lstrip() == "# END SOLUTION":
            inside = False
        elif not inside:
            if indent and lines[-1].lstrip().startswith("raise YourTurn") and line.startswith(indent):
                lines.append(indent + GIVEN)     # so that it is not taken for the learner's
            lines.append(line)
    return "\n".join(lines)


def solution(source: str) -> str:
    marks = ("# BEGIN SOLUTION", "# END SOLUTION")
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(marks))


def number_of(source: str) -> str:
    """The number of an exercise, such as 6.2."""
    return re.search(r"# BEGIN SOLUTION (\S+)", source)[1]


def names_of(source: str, packages: set[str], called: bool = False) -> set[str]:
    """The dotted names in a cell that begin with what was imported from the packages, such as flow.path."""
    nodes = list(ast.walk(ast.parse(source)))
    nodes = [node.func for node in nodes if isinstance(node, ast.Call)] if called else nodes
    names = {ast.unparse(node) for node in nodes if isinstance(node, (ast.Attribute, ast.Name))}
    return {name for name in names if name.split(".")[0] in packages and re.fullmatch(r"[\w.]+", name)}


def packages_in(lesson) -> set[str]:
    """What a lesson imports from the packages, by the names that its cells know it by."""
    code = "\n".join(cell.source for cell in lesson.cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names
            if node.module.split(".")[0] in PACKAGES}


def guarded(check: str, answer: str, given: set[str], packages: set[str]) -> tuple[str, str]:
    """A check that first refuses the package's own functions, and a cell that gives such a one as the answer.

    The check may call functions of the package that neither the answer nor the cells before it (`given`) use:
    it compares with them.
    """
    own = [node.name for node in ast.parse(answer).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    theirs = names_of(check, packages, called=True) - names_of(answer, packages) - given
    theirs = sorted(name for name in theirs if name.split(".")[-1] not in HELPERS)
    if not own or not theirs:
        return check, ""
    lines = textwrap.wrap(", ".join(theirs), 80, drop_whitespace=False)
    line = f'own_work({", ".join(own)}, without="{lines[0]}"'
    line += "".join(f'\n         "{more}"' for more in lines[1:]) + ")"
    return f"{line}\n{check}", f"# says: package's own\n{own[0]} = {theirs[0]}"


def started(lesson) -> list:
    """The cells of a lesson, with first_cell.py before its first code; its own search for the folder goes."""
    from nbformat.v4 import new_code_cell

    start = (FOLDER / "first_cell.py").read_text(encoding="utf-8")
    cells = list(lesson.cells)
    first = next(n for n, cell in enumerate(cells) if cell.cell_type == "code")
    lines = [line for line in cells[first].source.splitlines() if not line.startswith("sys.path.insert")]
    for cell in cells:                           # Jupyter opens no folder
        cell.source = kit.SOLVED.sub("the folder `tutorials/solved`", cell.source)
    cells[first] = new_code_cell(re.sub("\n{3,}", "\n\n", "\n".join(lines)), metadata=cells[first].metadata)
    return [*cells[:first], new_code_cell(start.replace("  # noqa: E402, F401", "").strip()), *cells[first:]]


def graded(number: str, stars: int = 0) -> dict:
    """What nbgrader has to know of a cell: an exercise's answer, or, with points, its check."""
    kind = "check" if stars else "exercise"
    points = {"points": stars} if stars else {}
    return {"nbgrader": {"grade_id": f"{kind}-{number.replace('.', '-')}", "grade": bool(stars),
                         "solution": not stars, "locked": bool(stars), "task": False, "schema_version": 3,
                         "cell_type": "code", **points}}


def versions(lesson) -> dict:
    """name -> notebook: for the learner, solved, and for the check, where each exercise is first left blank,
    then answered wrong, then solved, with its check after each.
    """
    from nbformat.v4 import new_code_cell as code
    from nbformat.v4 import new_notebook

    cells = {"learner": [], "solved": [], "check": []}
    packages, given, stars = packages_in(lesson), set(), 1
    tries = []                                   # (source, the error that the check should raise, its words)
    for cell in started(lesson):
        kind = next((tag for tag in tags(cell) if tag in ("exercise", "check", "wrong")), "")
        if kind == "wrong":
            says = re.match("# says: (.*)", cell.source)
            tries.append((cell.source, "NotYet", says[1].strip() if says else ""))
            continue
        if kind == "exercise":
            number, answer = number_of(cell.source), solution(cell.source)
            tries = [(blank(cell.source), "YourTurn", "still blank")]
            for name, source in (("learner", blank(cell.source)), ("solved", answer)):
                cells[name].append(code(f"{EXERCISE}{number}\n{source}", metadata=graded(number)))
            continue
        if "slide" in tags(cell):
            cells["solved"].append(cell)         # so that the deck knows which picture came before
            continue
        if kind == "check":
            text, alias = guarded(cell.source, answer, given, packages)
            cell = code(f"{CHECK}{number}\n{text}", metadata=cell.metadata | graded(number, stars))
            tries += [(alias, "NotYet", "package's own")] if alias else []
            for source, error, words in tries:
                expected = {"tags": ["raises-exception"], "error": error, "says": words}
                cells["check"] += [code(f"{EXERCISE}{number}\n{source}"),
                                   code(cell.source, metadata=expected)]
            cells["check"].append(code(f"{EXERCISE}{number}\n{answer}"))
        elif cell.cell_type == "markdown":
            stars = max(map(stars_of, cell.source.splitlines()), default=0) or stars
        elif cell.cell_type == "code":
            given |= names_of(cell.source, packages)
        for name in cells:
            cells[name].append(deepcopy(cell))   # running a notebook fills its cells with outputs
    kit.may_stay_blank(cells["learner"])
    for own in cells.values():
        for n, cell in enumerate(own):
            cell.id = f"cell-{n}"                # not a random one: a new build shows in a diff what is new
    return {name: new_notebook(cells=own, metadata=lesson.metadata) for name, own in cells.items()}


def tried(notebook, check) -> str:
    """The first lines of the answer that a check was tried on."""
    before = notebook.cells[notebook.cells.index(check) - 1].source
    return repr("\n".join(before.splitlines()[:3]))


def execute(notebook, name: str, kernel: list[str] | None = None) -> float:
    """Runs a notebook beside its source; returns the seconds it took.

    Raises: CellExecutionError where a cell fails. InputError where one warns or prints more than a screen,
    and where a check lets pass what it has to refuse.
    """
    from nbclient import NotebookClient

    os.environ["TQDM_DISABLE"] = "1"             # on a slow machine a progress bar would look like a warning
    begun = time.time()
    NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   extra_arguments=kernel or [],
                   resources={"metadata": {"path": str(FOLDER / "lessons")}}).execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        wanted, errors = cell.metadata.get("error"), [o for o in outputs if o.output_type == "error"]
        where = f"{name}, in the cell that begins {cell.source.splitlines()[0]!r}" if cell.source else name
        if wanted and [error.ename for error in errors] != [wanted]:
            said = [f"{error.ename}: {error.evalue}" for error in errors]
            raise InputError(f"{where}, after {tried(notebook, cell)}: the check should raise {wanted}, and "
                             f"raised {said or 'nothing'}")
        if wanted and (words := cell.metadata["says"]) not in (said := " ".join(errors[0].evalue.split())):
            raise InputError(f"{where}, after {tried(notebook, cell)}: the check should say {words!r}, and "
                             f"said {said!r}")
        if any(o.get("name") == "stderr" for o in outputs):
            raise InputError(f"{where}: there is a warning in the output")
        if sum(o.get("text", "").count("\n") for o in outputs) > LONGEST:
            raise InputError(f"{where}: the output is longer than {LONGEST} lines")
    return time.time() - begun


def build(source: Path, check: bool) -> str:
    """Makes one lesson's notebooks, or checks them; returns a line that says so."""
    import jupytext
    import nbformat

    lesson = jupytext.read(source)
    took, made = minutes(lesson), versions(lesson)       # in this order: versions rewrites links
    if check:
        refused = sum("error" in cell.metadata for cell in made["check"].cells)
        seconds = execute(made["check"], source.name)
        if took.words > WORDS:
            raise InputError(f"{source.name} has {took.words} words of text, and {WORDS} are the most: cut "
                             f"what repeats. Everything else is right: {refused} answers were refused")
        return f"{source.name}: {seconds:.0f} s, {refused} answers refused"
    from tutorials.slides import IN_KERNEL, deck

    seconds, solved = execute(made["solved"], source.name, IN_KERNEL), made["solved"]
    page, slides = deck(solved, solved.cells[0].source.splitlines()[0].lstrip("# "))
    solved.cells = [cell for cell in solved.cells if "slide" not in tags(cell)]
    for folder in ("notebooks", "solved", "slides"):
        (FOLDER / folder).mkdir(exist_ok=True)
    if source != DECK_0:
        nbformat.write(made["learner"], FOLDER / "notebooks" / f"{source.stem}.ipynb")
        nbformat.write(solved, FOLDER / "solved" / f"{source.stem}.ipynb")
    (FOLDER / "slides" / f"{source.stem}.html").write_text(page, encoding="utf-8")
    return f"{source.name}: {seconds:.0f} s, {slides} slides"


def write_minutes(sources: dict[int, Path], check: bool) -> str:
    """Writes the lessons' minutes into the table of README.md, or checks that they stand there."""
    import jupytext

    found = {number: minutes(jupytext.read(path)) for number, path in sources.items()}
    before = README.read_text(encoding="utf-8")
    after = with_table(before, found)
    if check and after != before:
        raise InputError("the table of tutorials/README.md is not that of the lessons: python -m "
                         "tutorials.build --minutes writes it")
    if not check:
        README.write_text(after, encoding="utf-8")
    rows = [f"{number:>2}  {own.words:5} words, {own.core:4} minutes, and {own.optional:3} optional"
            for number, own in found.items()]
    return "\n".join([*rows, f"in all {sum(own.core for own in found.values()) / 60:.1f} hours, and "
                            f"{sum(own.optional for own in found.values()) / 60:.1f} optional"])


def chosen_notebooks(items: list[str], sources: dict[int, Path]) -> dict:
    """file name -> (a notebook in which only these exercises are blank, the same with all filled in)."""
    import jupytext

    made = {number: versions(jupytext.read(path)) for number, path in sources.items()}
    exercises = {number: [name for cell in own["learner"].cells if (name := kit.number_of(cell))]
                 for number, own in made.items()}
    return {sources[number].with_suffix(".ipynb").name:
            [kit.with_blanks(made[number]["learner"], made[number]["solved"], some) for some in (own, set())]
            for number, own in kit.chosen(items, exercises).items()}


def hand_out(options, sources: dict[int, Path]) -> str:
    """Writes notebooks with chosen blanks, or an archive; or runs the notebooks with the blanks filled in."""
    import nbformat

    if options.teacher:
        return f"saved {kit.teacher_archive(options.out or OUTPUT)}"
    items = kit.RECIPES[options.recipe].split() if options.recipe else options.blank
    made = chosen_notebooks(items or [f"{number}.*" for number in sources], sources)
    if options.check:
        lines = [f"{name}: {execute(filled, name):.0f} s, filled in" for name, (_, filled) in made.items()]
        return "\n".join(lines)
    if options.student:
        own = {name: notebook for name, (notebook, _) in made.items()}
        saved = kit.student_archive(options.out or OUTPUT, own, options.recipe or "")
        return f"saved {saved}"
    out = options.out or OUTPUT / (options.recipe or "notebooks")
    out.mkdir(parents=True, exist_ok=True)
    for name, (notebook, _) in made.items():
        kit.moved(notebook, out)
        nbformat.write(notebook, out / name)
    return f"saved {len(made)} notebooks in {out}"


def parse(arguments: list[str] | None):
    parser = Parser("python -m tutorials.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("lessons", nargs="*", type=int, help="their numbers; by default all")
    parser.add_argument("--check", action="store_true", help="write nothing; try the exercises' checks")
    parser.add_argument("--minutes", action="store_true", help="count each lesson's minutes, for README.md")
    parser.add_argument("--blank", nargs="+", metavar="6.2", help="only these exercises are blank, the "
                        "others of their lessons filled in (6.*: all of a lesson; 7: none of it)")
    parser.add_argument("--recipe", choices=kit.RECIPES, help="the blanks of a syllabus (teaching/README.md)")
    parser.add_argument("--student", "--zip", action="store_true", help="an archive for a class, without "
                        "solutions and keys; with --recipe or --blank, of these notebooks")
    parser.add_argument("--teacher", action="store_true", help="an archive of the solutions and keys")
    parser.add_argument("--out", type=file_path, help="a folder; by default one in output/")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with report_errors():
        sources = {int(path.name[:2]): path for path in sorted((FOLDER / "lessons").glob("[0-9]*.py"))}
        if unknown := set(options.lessons) - {0, *sources}:
            raise InputError(f"there is no lesson {min(unknown)}; there are {', '.join(map(str, sources))}")
        try:
            if options.blank or options.recipe or options.student or options.teacher:
                print(hand_out(options, sources))
                return
            for number in () if options.minutes else options.lessons or [0, *sources]:
                print(build(sources.get(number, DECK_0), options.check), flush=True)
            if options.minutes or not options.lessons:
                print(write_minutes(sources, options.check))
        except ModuleNotFoundError as error:
            raise InputError(f"the lessons need {error.name}: "
                             "pip install -r tutorials/requirements.txt") from None


if __name__ == "__main__":
    main()

"""Executes every notebook from the top, as a reader would, and fails where a cell fails.

    python -m tutorials.run            checks them all
    python -m tutorials.run --save     also keeps their outputs in the files
"""

import time
from pathlib import Path

from tinyflow.errors import InputError, Parser, report_errors

FOLDER = Path(__file__).parent


def execute(path: Path, save: bool) -> float:
    """Runs one notebook in its own folder; returns the seconds it took.

    Raises: CellExecutionError where a cell fails; the file then stays as it was. InputError without Jupyter.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
    except ModuleNotFoundError as error:
        raise InputError(f"the lessons need {error.name}: "
                         "pip install -r tutorials/requirements.txt") from None
    notebook, begun = nbformat.read(path, as_version=4), time.time()
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place, record_timing=False,
                   coalesce_streams=True).execute()
    if save:
        nbformat.write(notebook, path)
    return time.time() - begun


def main() -> None:
    parser = Parser(prog="python -m tutorials.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--save", action="store_true", help="write the outputs back into the notebooks")
    save = parser.parse_args().save
    paths = sorted(FOLDER.glob("*.ipynb"))
    with report_errors():
        for path in paths:
            print(f"{path.name}: {execute(path, save):.0f} s", flush=True)
    print(f"{len(paths)} passed, 0 failed")


if __name__ == "__main__":
    main()

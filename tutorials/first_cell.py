# Finds the course's folder: this notebook may stand in it, in a folder of it, or beside it.
import os
import sys
from importlib.util import find_spec
from pathlib import Path


class Stop(Exception):
    def _render_traceback_(self):                # one line in place of a traceback
        return [str(self)]


here, mark = Path.cwd(), "tutorials/first_cell.py"
places = [here, *here.parents, *here.glob("*"), *map(Path, sys.path)]
root = next((str(place) for place in places if os.path.exists(place / mark)), None)
if root is None:
    raise Stop(f"The folder of the course is not found from {here}: start Jupyter in that folder, or put "
               "this notebook into its tutorials/notebooks; on Colab, clone or unzip the course first.")
needed = ("einops", "matplotlib", "safetensors", "tokenizers", "torch", "tqdm")
if missing := [name for name in needed if not find_spec(name)]:
    raise Stop(f"{', '.join(missing)} is not installed. Run this in a cell, then restart and run this one: "
               f"%pip install -r {root}/requirements.txt -r {root}/tutorials/requirements.txt")
sys.path.insert(0, root)

from tutorials.course import own_work  # noqa: E402, F401

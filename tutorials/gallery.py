"""Puts into play.html what it shows below the plane, as one line of data.

    python -m tutorials.gallery output/benchmark       after python -m purecc_min.benchmark

These are the benchmark's pictures by concept, method and text, and the attention that lesson 9 looks at
(experiments/attention.py). The pictures are of the seed that is typical for the paper's method, the one with
its median similarity. A method's pictures of a concept are one image, side by side, which the page cuts up
again. The recommended methods stand first.
"""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from purecc_min.benchmark.cells import set_up
from purecc_min.benchmark.entries import MAIN
from purecc_min.benchmark.figures import typical_pictures
from purecc_min.benchmark.plans import plan
from purecc_min.benchmark.report import gather
from purecc_min.benchmark.tables import Results
from purecc_min.measure.toy import HELD_OUT
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.terminal import Parser, file_path, report_errors
from tutorials.experiments.attention import hover

PAGE = Path(__file__).with_name("play.html")
PLACE = re.compile(r'(?<=<script id="data" type="application/json">).*(?=</script>)')
EACH = 4                                         # pictures of a group
FIRST = ("nothing", "perfect", "bound-pairs", "bound", "switched-off", "lora", "paper")    # then all others
READERS = ("base", "lora", "token", "bound-pairs")


def packed(pictures: list[np.ndarray]) -> str:
    """Pictures of one size in one row, as text that a browser reads as an image."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(pictures, axis=1)).save(file, "WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def concept_data(results: Results, folder: Path, concept: str) -> dict:
    """The texts of each group, and the pictures of each method in the order of the texts."""
    found, texts = typical_pictures(results, folder, concept)
    if not found:
        raise InputError(f"{folder}: the pictures of {concept} are not there any more; draw them again")
    titles = [title for title in FIRST if title in found] + [title for title in found if title not in FIRST]
    methods = {title: packed([picture for group in found[title] for picture in found[title][group][:EACH]])
               for title in titles}
    return {"references": packed(list(set_up(concept).pictures)), "methods": methods,
            "texts": {group: own[:EACH] for group, own in texts.items()}}


def reading_data() -> dict:
    """The words of a text, and for each model its picture and which patch reads which word, in .01 %."""
    seen = {name: hover(name) for name in READERS}
    models = {name: {"picture": packed([one["picture"]]),
                     "grid": [np.rint(1e4 * np.ravel(word)).astype(int).tolist() for word in one["grid"]]}
              for name, one in seen.items()}
    return {"words": seen[READERS[0]]["words"], "models": models}


def put(data: dict) -> None:
    """Writes the data into the page."""
    new, old = json.dumps(data, separators=(",", ":")), PAGE.read_text(encoding="utf-8")
    page, places = PLACE.subn(lambda _: new, old)
    assert places == 1
    write_whole(PAGE, page.encode())
    print(f"{PAGE} shows {len(data['concepts'])} concepts; it has {len(page) / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("python -m tutorials.gallery", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=file_path, help="where the benchmark has left its cells")
    folder = parser.parse_args(arguments).folder
    with report_errors():
        results = gather(plan("main"), folder)
        missing = set(HELD_OUT) - {row["concept"] for row in results if row["method"] == "paper"}
        if missing:
            raise InputError(f"{folder}: nothing of {min(missing)} was drawn there; "
                             f"python -m purecc_min.benchmark --out {folder} draws it")
        put({"concepts": {concept: concept_data(results, folder, concept) for concept in HELD_OUT},
             "about": {name: entry.about for name, entry in MAIN.items()}, "reading": reading_data()})


if __name__ == "__main__":
    main()

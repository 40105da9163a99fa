"""Puts the benchmark's pictures into play.html, by concept and method and prompt, as one line of data.

    python -m tutorials.gallery output/benchmark       after python -m purecc_min.benchmark

They are of the seed that is typical for the paper's method, the one with its median similarity. A method's
pictures of a concept are one image, side by side, which the page cuts up again.
"""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from purecc_min.benchmark.cells import set_up
from purecc_min.benchmark.figures import typical_pictures
from purecc_min.benchmark.plans import plan
from purecc_min.benchmark.report import gather
from purecc_min.benchmark.tables import Results
from purecc_min.measure.toy import HELD_OUT
from tinyflow.errors import InputError
from tinyflow.files import write_whole
from tinyflow.terminal import Parser, file_path, report_errors

PAGE = Path(__file__).with_name("play.html")
PLACE = re.compile(r'(?<=<script id="gallery" type="application/json">).*(?=</script>)')
EACH = 4                                         # pictures of a group


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
    methods = {title: packed([picture for group in own for picture in own[group][:EACH]])
               for title, own in found.items()}
    return {"references": packed(list(set_up(concept).pictures)), "methods": methods,
            "texts": {group: own[:EACH] for group, own in texts.items()}}


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
        data = {concept: concept_data(results, folder, concept) for concept in HELD_OUT}
        new, old = json.dumps(data, separators=(",", ":")), PAGE.read_text(encoding="utf-8")
        page, places = PLACE.subn(lambda _: new, old)
        assert places == 1
        write_whole(PAGE, page.encode())
        print(f"{PAGE} shows {len(data)} concepts; it has {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""The first picture: drawn as tables and `sample` draw, of concepts learned as its rows say."""

import numpy as np
import pytest
from PIL import Image

from purecc_min.benchmark.entries import MAIN
from purecc_min.benchmark.entries import as_sampled as as_tabled
from purecc_min.branch import Thetas
from purecc_min.commands.demo import LEARNED, ROWS, SECOND
from purecc_min.concept_file import load_branch
from purecc_min.measure.draw import draw
from purecc_min.measure.toy import CONCEPTS
from purecc_min.registry import METHODS, as_sampled
from purecc_min.sheets import draw_sheet, unseen_texts
from tests.test_commands import alike, few_sampling_steps, make_concept, sampled  # noqa: F401
from tinyflow.picturebook.model import load_tiny
from tinyflow.pipeline import to_pictures
from tinyflow.sheet import GAP, MARGIN
from tinyflow.weights import load_tensors


@pytest.mark.parametrize("name", ["lora", "switched-off", "bound"])
def test_tables_sheets_and_sample_draw_a_method_in_one_way(name, tmp_path):
    """README's picture and its table once let two models answer the empty text: fidelity .69 and .88."""
    method, text = METHODS[name], unseen_texts("robot")[0]
    concept = make_concept(tmp_path / "c.safetensors", "robot", method.where, method=name)
    sampled(tmp_path / "s.png", concept, text, "--steps", "3")

    def pixels(file):
        return np.asarray(Image.open(tmp_path / file)).astype(int)

    def drawn(**who):
        return to_pictures(draw(pipe, texts=[text], class_word="robot", **who))[0].astype(int)

    pipe = load_tiny()
    theta = load_branch(pipe, concept)[0]
    in_tables = drawn(**as_tabled(MAIN[name], Thetas(pipe.velocity, None, theta)))
    assert alike(pixels("s-seed0.png"), in_tables)
    assert alike(drawn(theta=theta), in_tables) == (method.where == "phrase")  # who answers "" matters
    references, row = CONCEPTS["checked_robot"].references(), as_sampled(method, theta, pipe.velocity)
    draw_sheet(pipe, references, {name: row}, [text], tmp_path / "sheet.png")
    last = pixels("sheet.png")[-2 * GAP - 128:-2 * GAP:2, MARGIN:MARGIN + 128:2]     # of its rows, enlarged
    assert alike(last, in_tables)


def test_the_demo_s_second_concept_was_learned_as_its_rows_are():
    for name in ROWS:
        _, facts = load_tensors(LEARNED / f"{SECOND}-{name}.safetensors", "concept")
        assert (facts["method"], facts["where"]) == (name, METHODS[name].where)
        assert facts["config"].items() >= METHODS[name].settings.items() and facts["config"]["steps"] == 200

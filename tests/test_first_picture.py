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
from tinyflow.weights import load_tensors, save_tensors


@pytest.mark.parametrize("name", ["lora", "switched-off", "bound"])
def test_tables_sheets_and_sample_draw_a_method_in_one_way(name, tmp_path):
    """README's picture and its table once let two models answer the empty text: fidelity .69 and .88."""
    method, text = METHODS[name], unseen_texts("robot")[0]
    concept = make_concept(tmp_path / "c.safetensors", "robot", method.where)
    tensors, facts = load_tensors(concept, "concept")
    save_tensors(concept, "concept", tensors, facts | {"method": name})
    sampled(tmp_path / "s.png", concept, text, "--steps", "3")
    by_sample = np.asarray(Image.open(tmp_path / "s-seed0.png")).astype(int)

    pipe = load_tiny()
    theta = load_branch(pipe, concept)[0]
    in_tables = as_tabled(MAIN[name], Thetas(pipe.velocity, None, theta))
    drawn = to_pictures(draw(pipe, texts=[text], class_word="robot", **in_tables))[0].astype(int)
    assert alike(by_sample, drawn)
    references, file = CONCEPTS["checked_robot"].references(), tmp_path / "sheet.png"
    draw_sheet(pipe, references, {name: as_sampled(method, theta, pipe.velocity)}, [text], file)
    assert in_sheet(file, drawn)
    adapted = to_pictures(draw(pipe, texts=[text], class_word="robot", theta=theta))[0].astype(int)
    assert alike(adapted, drawn) == (method.where == "phrase")       # what such a model answers matters


def in_sheet(file, picture) -> bool:
    """Whether the sheet's last row begins with this picture, enlarged."""
    page = np.asarray(Image.open(file)).astype(int)
    y, side = page.shape[0] - 2 * GAP - 128, 128
    return alike(page[y:y + side:2, MARGIN:MARGIN + side:2], picture)


def test_the_demo_s_second_concept_was_learned_as_its_rows_are():
    for name in ROWS:
        _, facts = load_tensors(LEARNED / f"{SECOND}-{name}.safetensors", "concept")
        assert (facts["method"], facts["where"]) == (name, METHODS[name].where)
        assert facts["config"].items() >= METHODS[name].settings.items() and facts["config"]["steps"] == 200

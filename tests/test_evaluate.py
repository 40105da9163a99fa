import numpy as np
import pytest
import torch

from purecc_min.branch import Branch
from purecc_min.compare import mean_and_interval
from purecc_min.evaluate import MEASURES, Pictures, Recogniser, calibrate, concept_prompts, measure, other_prompts, pixel_change, table
from purecc_min.toy import TOYS
from tinyflow import world
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader, check, to_tensor

TOY = TOYS["striped_robot"]


@pytest.fixture(scope="module")
def shipped():
    return Pipeline.shipped(), Reader.shipped()


def renders(scenes):
    return to_tensor(np.stack([world.render(scene)[0] for scene in scenes]))


def test_the_reader_reads_fresh_renders(shipped):
    row = check(shipped[1], None, count=250)["renders"]
    assert all(row[head] > 0.98 for head in row if head != "mask IoU") and row["mask IoU"] > 0.9


def test_the_base_draws_what_it_is_told(shipped):
    pipe, reader = shipped
    prompts = other_prompts("robot")
    text = pipe.encode_text([p.base for p in prompts])
    seen = reader(pipe.sample(text, list(range(len(prompts)))))
    for head in ("object", "colour", "place", "background", "size"):
        assert np.mean([a == getattr(p.scene, head) for a, p in zip(seen.names(head), prompts)]) > 0.9


@pytest.mark.slow
def test_the_base_and_the_reader_hold_what_readme_says(shipped):
    rows = check(*reversed(shipped))
    assert all(value > 0.995 for head, value in rows["renders"].items() if head != "mask IoU")
    for row, least in (("base, seen combinations", 0.97), ("base, held-out combinations", 0.90)):
        assert all(rows[row][head] >= least for head in ("object", "colour", "place", "background")), rows[row]


def test_the_recogniser_tells_the_concept_from_its_near_misses(shipped):
    recogniser = calibrate(shipped[1], TOY)
    assert recogniser.hits > 0.9 and recogniser.false_alarms < 0.05
    fresh = calibrate(shipped[1], TOY, seed=99)                  # other views, same verdict
    assert abs(fresh.threshold - recogniser.threshold) < 0.1


def test_near_enough_is_not_enough_if_something_else_is_nearer():
    recogniser = Recogniser(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]]), threshold=0.5, hits=1.0, false_alarms=0.0)
    assert recogniser(torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.4, 0.3]])).tolist() == [True, False, False]


def measured(shipped, custom, original):
    pipe, reader = shipped
    branch = Branch.fresh(pipe, torch.zeros(pipe.mmdit.config.depth, pipe.mmdit.config.width), 1)
    references = np.stack([world.render(TOY.scene(size="big", seed=n))[0] for n in range(4)])
    return measure(pipe, reader, branch, "robot", references, original, custom, calibrate(reader, TOY))


def test_the_renderer_as_a_method_scores_perfect_and_the_original_drifts_nowhere(shipped):
    where = [p.scene for p in concept_prompts("robot")]
    plain, other = renders(where), renders([p.scene for p in other_prompts("robot")])
    concept = renders([TOY.scene(size=s.size, place=s.place, background=s.background) for s in where])
    values = measured(shipped, Pictures(concept, plain, other), Pictures(plain, plain, other))
    assert values["sees concept"] > 0.9 and values["similarity"] > 0.8
    for name, (_, perfect) in MEASURES.items():
        if perfect == 0:
            assert abs(values[name]) < 0.03, name
    assert values["mask IoU"] > 0.8


def test_a_model_that_always_draws_the_references_is_caught(shipped):
    where = [p.scene for p in concept_prompts("robot")]
    plain, other = renders(where), renders([p.scene for p in other_prompts("robot")])
    always = renders([TOY.scene(size="big", seed=n) for n in range(len(where))])
    values = measured(shipped, Pictures(always, always, other.roll(1, 0)), Pictures(plain, plain, other))
    assert values["sees concept"] > 0.9 and values["leak"] > 0.9
    assert values["background"] == pytest.approx(1 / 6 - 1, abs=0.03) and values["place"] == pytest.approx(1 / 3 - 1, abs=0.03)
    assert values["other object"] < -0.5 and values["drift"] > 0.05 and values["class drift"] > 0.05


def test_pixel_change_is_in_units_of_the_full_range():
    assert pixel_change(-torch.ones(1, 3, 2, 2), 9 * torch.ones(1, 3, 2, 2)).tolist() == [[[1, 1], [1, 1]]]


def test_intervals_are_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)
    assert np.isnan(mean_and_interval([1.0])[1])


def test_the_table_has_a_row_for_each_measure_it_is_given():
    lines = table({"a": {"similarity": 0.5, "leak": 0.25}}).splitlines()
    assert lines[0] == "| measure | a | perfect |" and lines[2:] == ["| similarity | 0.500 | 1 |", "| leak | +0.250 | 0 |"]

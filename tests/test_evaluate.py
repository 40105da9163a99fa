"""The measures against constructed cases whose answers are known: renders in the place of a model's pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from purecc_min import evaluate
from purecc_min.branch import Branch
from purecc_min.evaluate import MEASURES, PLAIN, TIMES, count_pictures, draw_groups, measure, perfect, pixel_change, table, velocity_error
from purecc_min.toy import TOYS, Toy
from tinyflow import world
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader, check, to_tensor

ROBOT, SEPIA, MUSHROOM = TOYS["striped_robot"], TOYS["sepia"], TOYS["checked_mushroom"]


@pytest.fixture(scope="module")
def shipped():
    return Pipeline.shipped(), Reader.shipped()


def renders(scenes):
    return to_tensor(np.stack([world.render(scene)[0] for scene in scenes]))


def rendered(toy):
    """The pictures of an original model that draws every base text to the letter."""
    drawn = {group: renders([p.scene for p in prompts]) for group, prompts in toy.prompts().items()}
    return drawn | {"plain": drawn["concept"][:PLAIN]}


def measured(shipped, toy, custom, branch=None):
    pictures = np.stack([r.picture for r in toy.references().references])
    return measure(*shipped, branch, toy, pictures, rendered(toy), custom)


def test_the_reader_reads_fresh_renders(shipped):
    row = check(shipped[1], None, count=250)["renders"]
    assert all(row[head] > 0.97 for head in row if head != "mask IoU") and row["mask IoU"] > 0.85


def test_the_base_draws_what_it_is_told_in_few_steps(shipped):
    pipe, reader = shipped
    prompts = ROBOT.prompts()["other"]
    seen = reader(pipe.sample(pipe.encode_text([p.base for p in prompts]), list(range(len(prompts))), steps=8))
    for head in ("object", "colour", "place", "background", "size"):
        assert np.mean([a == getattr(p.scene, head) for a, p in zip(seen.names(head), prompts)]) > 0.9


@pytest.mark.slow
def test_the_base_and_the_reader_hold_what_readme_says(shipped):
    rows = check(*reversed(shipped))
    assert all(value > 0.98 for head, value in rows["renders"].items() if head != "mask IoU")
    assert all(value > 0.995 for head, value in rows["renders without a style"].items() if head != "mask IoU")
    for row, least in (("base, seen combinations", 0.97), ("base, held-out combinations", 0.90)):
        assert all(rows[row][head] >= least for head in ("object", "colour", "place", "background")), rows[row]


@pytest.mark.parametrize("name", list(TOYS))
def test_the_perfect_method_scores_perfect(shipped, name):
    toy = TOYS[name]
    values = measured(shipped, toy, perfect(shipped[1], toy, rendered(toy)))
    assert values.keys() == MEASURES.keys()
    for measure_name, row in MEASURES.items():
        if row.perfect == 0:
            assert abs(values[measure_name]) < 0.03, measure_name
        elif row.perfect == 1:
            assert values[measure_name] > 0.9, measure_name
    assert values["similarity"] > 0.85 and values["mask IoU"] > 0.7


@pytest.mark.parametrize("name", list(TOYS))
def test_doing_nothing_costs_nothing_and_learns_nothing(shipped, name):
    values = measured(shipped, TOYS[name], rendered(TOYS[name]))
    for measure_name, row in MEASURES.items():
        if row.nothing is not None:
            assert values[measure_name] == pytest.approx(row.nothing, abs=1e-6), measure_name


def test_the_perfect_picture_is_the_original_outside_the_object(shipped):
    original = rendered(ROBOT)
    laid = perfect(shipped[1], ROBOT, original)
    changed = (laid["concept"] != original["concept"]).any(1).float().mean()
    assert 0.03 < changed < 0.25 and torch.equal(laid["other"], original["other"]) and torch.equal(laid["plain"], original["plain"])


def test_a_model_that_always_draws_the_references_is_caught(shipped):
    always = lambda group: renders([replace(ROBOT.wearing(p.scene), **ROBOT.confounder) for p in ROBOT.prompts()[group]])
    original = rendered(ROBOT)
    custom = original | {group: always(group) for group in ("concept", "unsaid", "composition")}
    custom |= {"plain": always("concept")[:PLAIN], "other": original["other"].roll(1, 0)}
    values = measured(shipped, ROBOT, custom)
    assert values["sees concept"] > 0.9 and values["class leak"] > 0.5 and values["composition"] < 0.1
    assert values["confounder contradicted"] > 0.97 and values["layout"] < 0.2
    assert values["object"] < -0.5 and values["drift"] > 0.05 and values["class drift"] > 0.05


def test_always_the_desert_is_full_leakage_of_the_background_alone(shipped):
    """The place is right: of the two things that this concept's references share, one has leaked."""
    desert = renders([replace(ROBOT.wearing(p.scene), background="desert") for p in ROBOT.prompts()["concept"]])
    values = measured(shipped, ROBOT, rendered(ROBOT) | {"concept": desert})
    says = [(p.scene.place != "middle", p.scene.background != "desert") for p in ROBOT.prompts()["concept"]]
    assert values["confounder contradicted"] == pytest.approx(np.sum(says, 0)[1] / np.sum(says), abs=0.02)


def test_a_light_that_no_word_names_is_seen_to_leak(shipped):
    evening = lambda group: renders([replace(MUSHROOM.wearing(p.scene), light="evening") for p in MUSHROOM.prompts()[group]])
    values = measured(shipped, MUSHROOM, rendered(MUSHROOM) | {group: evening(group) for group in ("concept", "unsaid")})
    assert values["confounder contradicted"] > 0.9 and values["confounder unsaid"] > 0.9 and values["outside change"] > 0.05


def test_a_style_that_spreads_to_plain_prompts_leaks(shipped):
    redrawn = perfect(shipped[1], SEPIA, rendered(SEPIA))
    values = measured(shipped, SEPIA, redrawn | {"plain": redrawn["concept"][:PLAIN]})
    assert values["sees concept"] > 0.95 and values["class leak"] > 0.95


def test_velocities_of_a_fresh_branch_do_not_drift_and_the_kl_is_the_weighted_integral(pipe, monkeypatch):
    branch = Branch.fresh(pipe, torch.zeros(3, 32), 2)
    errors = velocity_error(pipe, branch, ROBOT)
    assert errors.relative == errors.squared == [0.0] * len(TIMES) and errors.path_kl == 0
    monkeypatch.setattr(Branch, "velocity", lambda self, pipe, x, t, text: pipe.velocity(x, t, text) + 0.1)
    assert velocity_error(pipe, branch, ROBOT).path_kl == pytest.approx(np.mean([(1 - t) / t for t in TIMES]) * 0.01 * 3 * 32 * 32, rel=1e-3)


def test_only_a_known_concept_is_asked_for_its_traits(shipped):
    values = measured(shipped, Toy(dict(object="robot"), {}), rendered(ROBOT))
    assert "similarity" in values and not values.keys() & {"sees concept", "traits", "class leak", "confounder unsaid", "composition"}


def test_every_picture_is_counted_and_starts_from_its_own_seed(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "draw", lambda pipe, branch, texts, word, bar: seen.append(texts) or torch.zeros(len(texts), 3, 32, 32))
    groups = draw_groups(pipe, Branch.fresh(pipe, torch.zeros(3, 32), 2), ROBOT)
    assert sum(map(len, seen)) == sum(map(len, groups.values())) == count_pictures(ROBOT)
    assert seen[-1] == [p.base for p in ROBOT.prompts()["concept"][:PLAIN]]          # at the seeds of the original's base texts


def test_pixel_change_is_in_units_of_the_full_range():
    assert pixel_change(-torch.ones(1, 3, 2, 2), 9 * torch.ones(1, 3, 2, 2)).tolist() == [[[1, 1], [1, 1]]]


def test_the_table_has_a_row_for_each_measure_it_is_given():
    lines = table({"a": {"similarity": 0.5, "class leak": 0.25, "path KL": 12.34}}).splitlines()
    assert lines[0] == "| measure | a | perfect |"
    assert lines[2:] == ["| similarity | 0.500 |  |", "| class leak | +0.250 | 0 |", "| path KL | 12.3 | 0 |"]

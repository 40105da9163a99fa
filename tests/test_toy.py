import numpy as np
import pytest

from purecc_min.concept import load_concept
from purecc_min.toy import CONCEPTS, FOLDER, HELD_OUT, TOYS, TUNING, write_references
from tinyflow import world
from tinyflow.pipeline import Pipeline

PLAIN = dict(marking="plain", topper="none", eyes=2, style="none", light="day")


@pytest.mark.parametrize("name", ["striped_robot", "sepia"])
def test_a_toy_in_memory_is_the_toy_in_a_folder(name, tmp_path):
    folder = FOLDER / name if (FOLDER / name).exists() else tmp_path
    if folder == tmp_path:
        write_references(name, folder)
        (folder / "metadata.jsonl").unlink(missing_ok=True)
    toy = TOYS[name]
    for ours, read in zip(toy.references().references, load_concept(folder, toy.class_word, 32).references, strict=True):
        assert np.array_equal(ours.pictures, read.pictures) and (ours.id, ours.complete) == (read.id, read.complete)


def test_tuning_and_held_out_concepts_do_not_meet_and_pretraining_never_drew_any():
    assert not set(TUNING) & set(HELD_OUT) and {*TUNING, *HELD_OUT} == set(TOYS)
    rng = np.random.default_rng(0)
    assert all(getattr(world.random_scene(rng), trait) == value for _ in range(50) for trait, value in PLAIN.items())
    for toy in TOYS.values():
        assert any(getattr(toy.reference_scenes()[0], trait) != value for trait, value in PLAIN.items() if trait != "light")


@pytest.mark.parametrize("name", list(CONCEPTS))
def test_references_share_the_confounder_and_nothing_else(name):
    toy = CONCEPTS[name]
    scenes = toy.reference_scenes()
    assert len(scenes) == toy.count
    for trait in ("place", "background", "size", "light"):
        shown = {getattr(scene, trait) for scene in scenes}
        if trait in toy.confounder:
            assert shown == {toy.confounder[trait]}
        elif trait != "light" and toy.count > 1:
            assert len(shown) > 1, trait


@pytest.mark.parametrize("name", list(TOYS))
def test_every_text_is_known_to_the_tiny_model_and_has_its_slot(name):
    toy, pipe = TOYS[name], Pipeline.tiny()
    for group, prompts in toy.prompts().items():
        slots = pipe.encode_text([p.complete for p in prompts], {"[V]": toy.class_word}).slots
        assert slots.sum(1).tolist() == [0 if group == "other" else 1] * len(prompts)
        assert not any("[V]" in p.base for p in prompts)
        assert all(word in p.base.split() for p in prompts for word in (p.scene.object,))


def test_a_composition_asks_for_colours_that_the_concept_does_not_wear():
    """A yellow robot with yellow stripes once counted as a failure to draw stripes."""
    for name in ("striped_robot", *HELD_OUT[:3]):
        looks = TOYS[name].looks
        assert not {p.scene.colour for p in TOYS[name].prompts()["composition"]} & {looks["colour"], looks["accent"]}

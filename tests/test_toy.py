import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from purecc_min.commands.folder import load_concept
from purecc_min.concept import TOKEN
from purecc_min.measure import toy as module
from purecc_min.measure.lottery import draw_concepts
from purecc_min.measure.toy import CHOSEN, CONCEPTS, FOLDER, HELD_OUT, STYLE_WORD, write_references
from purecc_min.sheets import unseen_texts
from tinyflow.picturebook import world
from tinyflow.picturebook.model import make_tiny

NAMES = (*module.TUNING, *module.EARLIER, *HELD_OUT)
RECIPE = '''
CONCEPTS["party_star"] = Toy(dict(object="star", colour="red", marking="dots", accent="white",
                                  topper="hat", eyes=1), dict(background="night"))
'''


@pytest.mark.parametrize("name", NAMES)
def test_a_toy_in_memory_is_the_toy_in_a_folder(name, tmp_path):
    write_references(name, tmp_path)
    toy = CONCEPTS[name]
    for folder in (tmp_path, FOLDER / name):
        if folder.exists():                      # two concepts are shipped as folders
            read = load_concept(folder, toy.class_word, 64).references
            for ours, theirs in zip(toy.references().references, read, strict=True):
                assert np.array_equal(ours.pictures, theirs.pictures)
                assert (ours.id, ours.complete) == (theirs.id, theirs.complete)
                assert toy.is_style or (ours.base, ours.target) == (theirs.base, theirs.target)


def test_a_concept_is_added_at_the_end_of_the_file(tmp_path):
    """It was once never known there. The command stands above the added lines, and must know it as well."""
    package = tmp_path / "purecc_min"
    shutil.copytree(FOLDER.parent, package / "measure", ignore=shutil.ignore_patterns("references"))
    for file in FOLDER.parent.parent.glob("*.py"):
        shutil.copy(file, package)
    with open(package / "measure" / "toy.py", "a") as file:
        file.write(RECIPE)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(world.__file__).parents[2]}"}
    subprocess.run([sys.executable, "-m", "purecc_min.measure.toy", "party_star"], check=True, cwd=tmp_path,
                   env=environment)
    read = load_concept(package / "measure" / "references" / "party_star", "star", 64)
    assert [r.complete.split()[2:4] for r in read.references] == [["[V]", "star"]] * 4
    assert all(r.complete.endswith("at night") for r in read.references)


def test_no_two_kinds_of_concepts_meet_and_pretraining_never_drew_any():
    assert sorted(NAMES) == sorted(name for name in CONCEPTS if "," not in name)  # the rest are variants
    low, high = world.HELD_BACK
    for name in NAMES:
        toy = CONCEPTS[name]
        if toy.is_style:
            assert low <= toy.looks["style_member"] <= high
        else:                                    # the parts are held out, not the scene around them
            looks, (colour, _, parts) = toy.looks, world.MISSING[toy.looks["object"]]
            assert looks["colour"] == colour or (looks["marking"], looks["topper"]) == parts
            assert sum(abs(value) > .3 for value in vars(looks["identity"]).values()) >= 5


def test_the_lottery_s_first_draw_stands():
    """Its concepts are held out because nobody chose them; another draw would be a choice."""
    assert HELD_OUT == ("orange_star", "yellow_mushroom", "green_cat", "white_tree", "drawn_print",
                        "drawn_chalk")
    toys = [CONCEPTS[name] for name in HELD_OUT]
    numbers = [value for toy in toys[:4] for value in vars(toy.looks["identity"]).values()]
    assert f"{sum(numbers):.6f} {toys[4].looks['style_member']:.6f}" == "5.991972 0.481698"
    confounders = [pair for toy in toys for pair in toy.confounder.items()]
    assert confounders == [("background", "snow"), ("place", "left"), ("light", "glow"), ("place", "left"),
                           ("size", "small"), ("place", "middle")]


def test_any_lottery_keeps_its_rules():
    for seed in range(40):
        concepts = draw_concepts(CHOSEN, seed)
        individuals, styles = concepts[:4], concepts[4:]
        assert len({one.looks["object"] for one in individuals}) == 4
        assert len({one.looks["style"] for one in styles}) == 2
        assert [one.confounder for one in concepts].count({"light": "glow"}) == 1
        for one in individuals:
            assert tuple(one.looks[name] for name in ("object", "marking", "topper")) not in CHOSEN
            assert one.looks["accent"] != one.looks["colour"]


@pytest.mark.parametrize("name", list(CONCEPTS))
def test_references_share_the_confounder_and_nothing_else(name):
    toy = CONCEPTS[name]
    for trait in ("place", "background", "size", "light"):
        shown = {scene.trait(trait) for scene in toy.reference_scenes()}
        if trait in toy.confounder:
            assert shown == {toy.confounder[trait]}
        elif trait != "light" and toy.count > 1:
            assert len(shown) > 1, trait


@pytest.mark.parametrize("name", NAMES)
def test_every_text_is_known_to_the_tiny_model_and_has_its_slot(name):
    toy, pipe = CONCEPTS[name], make_tiny()
    for group, prompts in (toy.prompts() | toy.forms()).items():
        slots = pipe.encode_text([p.complete for p in prompts], {"[V]": toy.class_word}).slots
        assert slots.sum(1).tolist() == [0 if group == "other" else 1] * len(prompts)
        assert not any("[V]" in p.base for p in prompts)
        assert all(p.scene.trait("object") in p.base.split() for p in prompts)
    if not toy.is_style:                         # yellow stripes on yellow once counted as a failure
        asked = {p.scene.trait("colour") for p in toy.prompts()["composition"]}
        assert not asked & {toy.looks["colour"], toy.looks["accent"]}


@pytest.mark.parametrize("class_word", ["robot", STYLE_WORD, STYLE_WORD.upper()])
def test_the_first_picture_shows_what_no_reference_does(class_word):
    """For a style it once asked for "a small [V] a"."""
    toy = next(toy for toy in CONCEPTS.values() if toy.class_word == class_word.lower())
    texts = unseen_texts(class_word)
    assert [TOKEN in text for text in texts] == [True] * 4 + [False] * 2
    make_tiny().tokenizer(texts, {TOKEN: class_word})            # it knows every word
    assert not set(texts) & {r.complete for r in toy.references().references}
    if class_word == "robot":                    # named first, then second
        is_first = [text.find(TOKEN) < text.find(" and ") for text in texts if text.count("robot") == 2]
        assert is_first == [True, False]
    assert not any(f"{TOKEN} a" in text for text in texts)

"""[V]'s phrase: the rule in every form that the world writes, braces, styles; and whose words they are.

In these tests "1<" and ">" stand around the phrase of the first placeholder.
"""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from purecc_min.concept import base_text, styles_among
from purecc_min.measure.toy import CONCEPTS, PAIR_TEMPLATES
from purecc_min.pairs import texts_of
from tinyflow.errors import InputError
from tinyflow.phrase import write_stand_ins
from tinyflow.picturebook import world
from tinyflow.picturebook.model import make_tiny

ROBOT, TWO, A = {"[V]": "robot"}, {"[V1]": "cat", "[V2]": "a"}, {"[V]": "a"}
TOKENIZER = make_tiny().tokenizer
CAT = world.Thing("cat", "red", "small", "left", "stripes", "blue", "hat", 1)
ROBOT_THING = replace(CAT, object="robot", colour="blue", size="big", place="right", topper="none")


def check(marked: str, stand_ins=ROBOT, styles=()) -> None:
    """The phrases of a text are those that are marked in it."""
    written = write_stand_ins(re.sub("[12]<|>", "", marked), stand_ins, styles)
    found = written.text
    for n, start, stop in sorted(written.phrases, key=lambda row: -row[1]):
        found = f"{found[:start]}{n}<{found[start:stop]}>{found[stop:]}"
    for placeholder, stand_in in stand_ins.items():
        marked = marked.replace(placeholder, stand_in)
    assert found == re.sub("[{}]", "", marked)


@pytest.mark.parametrize("marked", [
    "a robot and a big 1<[V] robot on the left in the snow>", "a 1<[V] robot >next to a robot",
    "a 1<[V] robot >Next  To a robot", "a 1<[V] robot >beside a robot", "a 1<[V] robot>; a robot. A robot",
    "a 1<[V] robot>. A robot", "a 1<[V] robot>, a robot",
    "a 1<[V] robot with blue checks, a hat and one eye on the left >and a robot",
    "a 1<[V] robot with checks and a hat in the snow>, at night", "a 1<[V] robot with a hat>; a robot",
    "a 1<[V] robot on the left with a hat and one eye>",
    "a black-and-white 1<[V] robot hand-in-hand>, 1,000 km", "a 1<[V] robot 1,000 km v1.5 away>",
    "a 1<[V] Robot >and a robot", "a 1<[V] >and a 1<[V]>", "a robot", "", "a 1<{[V] robot}>"])
def test_a_phrase_goes_to_the_end_of_its_clause(marked):
    check(marked)


def test_a_class_word_that_holds_an_and_does_not_end_its_own_phrase():
    check("a 1<[V] salt and pepper mill >and a robot", {"[V]": "salt and pepper mill"})


def test_the_next_placeholder_ends_a_phrase_even_in_a_list():
    check("a 1<[V1] robot with a hat and a big >2<[V2] cat>", {"[V1]": "robot", "[V2]": "cat"})


@pytest.mark.parametrize("count", [1, 2])
def test_the_rule_is_right_for_every_form_that_a_caption_has(count):
    """But for one: a list without a place, and then another thing, which reads as a part of the list."""
    scene = world.Scene((CAT, ROBOT_THING)[-count:], "snow", "dusk", style="chalk")
    parts = (*world.THING_PARTS, *world.SCENE_PARTS)
    for chosen in itertools.product((False, True), repeat=len(parts)):
        said = {part for part, is_said in zip(parts, chosen) if is_said}
        for n in range(count):
            nouns = [thing.object for thing in scene.things]
            nouns[n] = f"[V] {nouns[n]}"
            text = world.caption(scene, tuple(nouns), said)
            first = world.thing_caption(scene.things[0], said, nouns[0])
            open_list = " with " in first and "place" not in said
            stop = len(first) + 1 if (count, n) == (2, 0) and not open_list else len(text)
            start = text.index("[V]")
            check(f"{text[:start]}1<{text[start:stop]}>{text[stop:]}", {"[V]": "cat"})
            if n == 0:                           # braces are right in that form, too
                check(f"1<{{{first}}}>{text[len(first):]}", {"[V]": "cat"})


def test_tokens_of_the_tiny_tokenizer():
    """Start, end and padding are in no phrase; ids are those of the text with the stand-in written."""
    tokens = TOKENIZER(["{a big [V] robot, on the left} and a robot in the snow."], ROBOT)
    assert (tokens.ids == TOKENIZER(["a big robot robot on the left and a robot in the snow"]).ids).all()
    assert tokens.phrases[0].nonzero().flatten().tolist() == list(range(1, 8))
    assert tokens.slots[0].nonzero().flatten().tolist() == [3]
    with pytest.raises(InputError, match="'robott'.*did you mean robot"):
        TOKENIZER(["a red robott"])
    with pytest.raises(InputError, match="at most 42"):
        TOKENIZER(["robot " * 43])


# ------------------------------------------------------------------------------------------ braces and styles
@pytest.mark.parametrize("text", ["{a [V] robot", "a [V] robot}", "{} a [V] robot", "{a [V] and a [V]}",
                                  "{a {[V]} robot}", "{a robot} and a [V] robot", "}a [V]{"])
def test_braces_that_do_not_hold_one_placeholder_each_are_one_clear_error(text):
    with pytest.raises(InputError, match="braces in .* do not enclose one placeholder each.*leave them out$"):
        write_stand_ins(text, ROBOT)


def test_braces_count_only_where_a_placeholder_is_named():
    """The class word, which is looked for to find where Y starts from, is none: it stands for itself."""
    for text in ("{a robot}", "}a {{ robot", "{}"):
        assert write_stand_ins(text, ROBOT).text == write_stand_ins(text, {"robot": "robot"}).text == text
    assert base_text("{a [V] robot} on {a mat}") == "a robot on a mat"
    assert base_text("a {robot}") == "a {robot}"


def test_a_styles_phrase_is_all_that_the_others_leave():
    check("1<[V] big red ball in the desert>", A, ("[V]",))
    check("2<[V2] small >1<[V1] cat on the left>2<, at night>", TWO, ("[V2]",))
    check("1<a cat, in [V] style>", A, ("[V]",))
    check("2<{[V2] big}> 1<[V1] cat>", TWO, ("[V2]",))
    check("2<[V2] red ball>", TWO, ("[V1]", "[V2]"))
    with pytest.raises(InputError, match="two styles in .*remove one of them"):
        write_stand_ins("[V2] red [V1] ball", TWO, ("[V1]", "[V2]"))
    assert styles_among({"[V1]": "a", "[V2]": "Style", "[V3]": "robot"}) == ("[V1]", "[V2]")


# -------------------------------------------------------------- what is imagined, and what is measured
@pytest.mark.parametrize("name", [name for name, toy in CONCEPTS.items() if not toy.is_style])
def test_no_text_on_which_a_neighbour_is_measured_is_imagined(name):
    """In a trial they overlapped: half of what was measured had been trained on."""
    toy = CONCEPTS[name]
    plain = {row[0] for row in texts_of(PAIR_TEMPLATES, toy.class_word, 64)}
    assert len(plain) == len(PAIR_TEMPLATES) == 24
    groups = toy.prompts() | toy.forms()
    assert not plain & {prompt.base for prompts in groups.values() for prompt in prompts}


def test_forms_that_no_training_saw_are_what_they_say():
    forms = CONCEPTS["checked_robot"].forms()
    rng = np.random.default_rng(0)
    captions = {world.random_caption(world.random_scene(rng, parts=False, pairs=1), rng) for _ in range(3000)}
    assert not any(" on the right and " in text for text in captions)
    for prompt in forms["right first"]:
        assert prompt.base.index("on the right") < prompt.base.index("on the left")
        assert prompt.complete.index("[V]") < prompt.complete.index("and") if prompt.n == 1 else True
    assert not any("on the" in p.base.replace("on the beach", "") for p in forms["no places"])
    assert all(p.base.count("robot") == 1 for p in forms["another kind"])
    assert CONCEPTS["moss_print"].forms() == {}

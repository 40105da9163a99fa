"""[V]'s phrase: the rule in every form that the world writes, braces, styles; and whose words they are."""

import itertools
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

ROBOT, TWO = {"[V]": "robot"}, {"[V1]": "robot", "[V2]": "cat"}
TOKENIZER = make_tiny().tokenizer
CAT = world.Thing("cat", "red", "small", "left", "stripes", "blue", "hat", 1)
ROBOT_THING = replace(CAT, object="robot", colour="blue", size="big", place="right", topper="none")


def marked(text, stand_ins=ROBOT, styles=()) -> str:
    """The written text with "n<" and ">" around each phrase."""
    written = write_stand_ins(text, stand_ins, styles)
    out = written.text
    for n, start, stop in sorted(written.phrases, key=lambda row: -row[1]):
        out = f"{out[:start]}{n}<{out[start:stop]}>{out[stop:]}"
    return out


@pytest.mark.parametrize("text, expected", [
    ("a big [V] robot on the left and a small robot", "a big 1<robot robot on the left >and a small robot"),
    ("a robot and a big [V] robot on the left in the snow",
     "a robot and a big 1<robot robot on the left in the snow>"),
    ("a [V] robot next to a robot", "a 1<robot robot >next to a robot"),
    ("a [V] robot Next  To a robot", "a 1<robot robot >Next  To a robot"),
    ("a [V] robot beside a robot", "a 1<robot robot >beside a robot"),
    ("a [V] robot; a robot. A robot", "a 1<robot robot>; a robot. A robot"),
    ("a [V] robot. A robot", "a 1<robot robot>. A robot"),
    ("a [V] robot, a robot", "a 1<robot robot>, a robot"),
    ("a [V] robot with blue checks, a hat and one eye on the left and a robot",
     "a 1<robot robot with blue checks, a hat and one eye on the left >and a robot"),
    ("a [V] robot with checks and a hat in the snow, at night",
     "a 1<robot robot with checks and a hat in the snow>, at night"),
    ("a [V] robot with a hat; a robot", "a 1<robot robot with a hat>; a robot"),
    ("a [V] robot on the left with a hat and one eye", "a 1<robot robot on the left with a hat and one eye>"),
    ("a black-and-white [V] robot hand-in-hand, 1,000 km",
     "a black-and-white 1<robot robot hand-in-hand>, 1,000 km"),
    ("a [V] robot 1,000 km v1.5 away", "a 1<robot robot 1,000 km v1.5 away>"),
    ("a [V] Robot and a robot", "a 1<robot Robot >and a robot"),
    ("a [V] and a [V]", "a 1<robot >and a 1<robot>"),
    ("a robot", "a robot"), ("", "")])
def test_a_phrase_goes_to_the_end_of_its_clause(text, expected):
    assert marked(text) == expected


def test_a_class_word_that_holds_an_and_does_not_end_its_own_phrase():
    mill = {"[V]": "salt and pepper mill"}
    assert marked("a [V] salt and pepper mill and a robot", mill) == \
        "a 1<salt and pepper mill salt and pepper mill >and a robot"


def test_the_next_placeholder_ends_a_phrase_even_in_a_list():
    assert marked("a [V1] robot with a hat and a big [V2] cat", TWO) == \
        "a 1<robot robot with a hat and a big >2<cat cat>"
    assert marked("a [V1] robot and a [V2] cat", TWO) == "a 1<robot robot >and a 2<cat cat>"


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
            expected = f"{text[:start]}1<{text[start:stop]}>{text[stop:]}".replace("[V]", "cat")
            assert marked(text, {"[V]": "cat"}) == expected
            if n == 0:                           # braces are right in that form, too
                braced = f"{{{first}}}{text[len(first):]}"
                expected = f"1<{first}>{text[len(first):]}".replace("[V]", "cat")
                assert marked(braced, {"[V]": "cat"}) == expected


def test_tokens_of_the_tiny_tokenizer():
    """Start, end and padding are in no phrase; ids are those of the text with the stand-in written."""
    text = "{a big [V] robot, on the left} and a robot in the snow."
    tokens = TOKENIZER([text], ROBOT)
    assert (tokens.ids == TOKENIZER(["a big robot robot on the left and a robot in the snow"]).ids).all()
    assert tokens.phrases[0].nonzero().flatten().tolist() == list(range(1, 8))
    assert tokens.slots[0].nonzero().flatten().tolist() == [3]
    assert not TOKENIZER(["a robot"], ROBOT).phrases.any()


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
    assert write_stand_ins("a {[V] robot}", ROBOT).text == "a robot robot"
    assert base_text("{a [V] robot} on {a mat}") == "a robot on a mat"
    assert base_text("a {robot}") == "a {robot}"


def test_a_styles_phrase_is_all_that_the_others_leave():
    words = {"[V1]": "cat", "[V2]": "a"}
    assert marked("[V] big red ball in the desert", {"[V]": "a"}, ("[V]",)) == \
        "1<a big red ball in the desert>"
    assert marked("[V2] small [V1] cat on the left, at night", words, ("[V2]",)) == \
        "2<a small >1<cat cat on the left>2<, at night>"
    assert marked("a cat, in [V] style", {"[V]": "style"}, ("[V]",)) == "1<a cat, in style style>"
    assert marked("{[V2] big} [V1] cat", words, ("[V2]",)) == "2<a big> 1<cat cat>"
    with pytest.raises(InputError, match="two styles in .*remove one of them"):
        write_stand_ins("[V2] red [V1] ball", words, ("[V1]", "[V2]"))
    assert write_stand_ins("[V2] red ball", words, ("[V1]", "[V2]")).phrases == [(2, 0, 10)]


def test_who_is_a_style_is_said_by_the_class_word():
    words = {"[V1]": "a", "[V2]": "Style", "[V3]": "robot"}
    assert styles_among(words) == ("[V1]", "[V2]")


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

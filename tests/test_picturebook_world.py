from dataclasses import replace

import numpy as np
import pytest

from tinyflow.picturebook import world
from tinyflow.picturebook.model import make_tiny
from tinyflow.picturebook.objects import OBJECTS, draw_thing, exact_colour
from tinyflow.picturebook.render import STYLES, render, tint
from tinyflow.picturebook.world import Identity, Scene, Thing

CAT = Scene((Thing("cat", "pink", "big", "left"),), "beach", seed=3)
PAIR = Scene((Thing("cat", "red", "small", "left"), Thing("robot", "blue", "big", "right")), "meadow", seed=3)


def grown(mask):
    """The mask and the pixels beside it."""
    wide = np.pad(mask, 1)
    return wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:] | mask


# ----------------------------------------------------------------------------------------------- the renderer
def test_rendering_is_deterministic_and_seeds_matter():
    picture, other = render(CAT)[0], render(replace(CAT, seed=4))[0]
    assert (picture == render(CAT)[0]).all() and (picture != other).any()


@pytest.mark.parametrize("name", world.OBJECTS)
def test_the_mask_is_where_the_object_is(name):
    """Another colour changes pixels inside the mask (and its soft edge) only."""
    scenes = [Scene((Thing(name, colour),), "meadow", seed=2) for colour in ("red", "blue")]
    (a, (mask,)), (b, _) = map(render, scenes)
    changed = (a != b).any(-1)
    assert changed.sum() > 100 and not (changed & ~grown(mask)).any()


@pytest.mark.parametrize("name", world.OBJECTS)
@pytest.mark.parametrize("trait", world.TRAITS)
def test_every_unnamed_trait_shows_on_every_object(name, trait):
    """Between the ends of a trait's range a picture changes clearly, inside the objects' masks alone."""
    thing = Thing(name, "red", marking="checks", topper="crown")
    scenes = [Scene((thing,), "meadow", seed=2).changed(**{trait: value}) for value in (-1, 1)]
    (a, (mask_a,)), (b, (mask_b,)) = map(render, scenes)
    change = np.abs(a.astype(int) - b).max(-1)
    assert (change > 25).sum() >= 8, (change > 25).sum()
    if trait != "width":                                         # a wider object has the same shadow
        assert not (change > 60)[~(grown(grown(mask_a)) | grown(grown(mask_b)))].any()


def test_the_masks_of_two_things_do_not_meet_and_the_one_in_front_is_whole():
    wide = PAIR.changed(size="big", width=1).changed(1, width=1)
    _, (left, right) = render(wide)
    alone = render(replace(wide, things=wide.things[:1]))[1][0]
    assert not (left & right).any() and left.sum() > 200 and right.sum() > 200
    assert (alone & ~left & ~right).sum() == 0


def test_a_moved_object_is_where_it_was_moved_to():
    (_, (mask,)), (_, (moved,)) = render(CAT), render(CAT, moved=(6, -4))
    assert np.array_equal(moved, np.roll(mask, (-4, 6), axis=(0, 1)))


def test_lights_and_styles_redraw_a_picture_that_is_otherwise_the_same():
    picture, mask = render(CAT)
    dusk, _ = render(replace(CAT, light="dusk", light_member=.5))
    assert np.abs(dusk - picture * tint("dusk", .5)).max() <= 1
    for name in STYLES:
        redrawn, its_mask = render(replace(CAT, style=name, style_member=.5))
        assert np.array_equal(its_mask, mask) and (name == "none") == np.array_equal(redrawn, picture)
        other, _ = render(replace(CAT, style=name, style_member=-.2))
        assert (name == "none") == np.array_equal(redrawn, other)        # members of a family differ


def test_no_identity_leads_into_another_colour():
    """The red of one robot never lies nearer to what another named colour can be than to plain red."""
    plain = {name: np.array(exact_colour(name, Identity())) for name in world.COLOURS}
    for name in world.COLOURS:
        for hue in (-1, 1):
            own = np.array(exact_colour(name, Identity(hue=hue)))
            near = min(plain, key=lambda other: np.linalg.norm(plain[other] - own))
            assert near == name, (name, hue, near)


@pytest.mark.parametrize("marking", world.MARKINGS[1:])
def test_a_red_thing_with_white_stripes_is_no_white_thing_with_red_ones(marking):
    """Stripes and checks once covered one half. Only the marking's phase could tell the colour of a thing
    from that of its marking, and the reader took one for the other in one picture out of five.
    """
    rng = np.random.default_rng(0)
    for name in OBJECTS:
        shares = []
        for _ in range(10):
            identity = replace(world.random_identity(rng), hue=0, tone=0)
            thing = Thing(name, "red", marking=marking, accent="blue", identity=identity)
            drawn = np.array(draw_thing(thing, (32, 32), 15.5))[..., :3]
            body, accent = ((drawn == exact_colour(colour, Identity())).all(-1).sum()
                            for colour in ("red", "blue"))
            shares.append(accent / (accent + body))
        assert .15 < np.mean(shares) < .42, (name, shares)


# ---------------------------------------------------------------------------------------------------- scenes
def test_held_out_combinations_are_never_seen_and_every_word_is():
    rng = np.random.default_rng(0)
    seen = [world.seen_scene(rng) for _ in range(3000)]
    things = [(thing, scene) for scene in seen for thing in scene.things]
    for thing, scene in things:
        colour, background, parts = world.MISSING[thing.object]
        assert thing.colour != colour and scene.background != background
        assert (thing.marking, thing.topper) != parts
        low, high = world.HELD_BACK
        assert not low < scene.light_member < high and not low < scene.style_member < high
    words = set(" ".join(world.caption(scene, said=world.ALL_PARTS) for scene in seen).split())
    assert {word.strip(",") for word in words} == set(world.VOCABULARY)
    assert all(world.held_out(world.seen_scene(rng, seen=False)) for _ in range(50))
    for name, (colour, _, parts) in world.MISSING.items():       # everything else is seen
        own = [thing for thing, _ in things if thing.object == name]
        assert {thing.colour for thing in own} == set(world.COLOURS) - {colour}
        assert len({(thing.marking, thing.topper) for thing in own} | {parts}) == 16


def test_a_change_reaches_the_scene_the_thing_and_its_identity():
    changed = PAIR.changed(1, colour="green", hue=.5, background="snow")
    assert (changed.background, changed.trait("colour", 1), changed.trait("hue", 1)) == ("snow", "green", .5)
    assert changed.things[0] == PAIR.things[0] and changed.trait("colour") == "red"
    with pytest.raises(TypeError):
        PAIR.changed(colours="green")


# -------------------------------------------------------------------------------------------------- captions
def test_captions_say_what_is_there():
    assert world.caption(CAT) == "a big pink cat on the left on the beach"
    assert world.caption(CAT, ("[V] cat",), {"size"}) == "a big [V] cat"
    assert world.caption(CAT, said=set()) == "a cat"
    assert world.caption(PAIR) == (
        "a small red cat on the left and a big blue robot on the right in the meadow")
    dressed = PAIR.changed(marking="stripes", topper="antenna", eyes=1, light="dusk", style="chalk")
    dressed = dressed.changed(1, topper="hat", marking="dots", accent="red")
    assert world.caption(dressed, said=world.ALL_PARTS) == (
        "a small red cat with white stripes, an antenna and one eye on the left and a big blue robot with "
        "red dots, a hat and two eyes on the right in the meadow at dusk in chalk")
    assert world.caption(dressed, said=[{"marking", "topper"}, {"accent"}]) == (
        "a cat with stripes and an antenna and a robot")


def test_the_longest_caption_and_two_placeholders_fit_the_text_encoder():
    thing = Thing("mushroom", "purple", marking="checks", topper="antenna", eyes=1)
    things = (replace(thing, place="left"), replace(thing, place="right"))
    scene = Scene(things, "meadow", "moonlight", style="print")
    text = world.caption(scene, ("[V1] mushroom", "[V2] mushroom"), world.ALL_PARTS)
    assert len(text.split()) == 40
    ids, slots, _ = make_tiny().tokenizer([text], {"[V1]": "mushroom", "[V2]": "mushroom"})
    assert ids.shape[1] >= 32 and sorted(slots[0].tolist())[-2:] == [1, 2]


def test_random_captions_leave_things_out_and_double_either_noun():
    rng = np.random.default_rng(0)
    texts = [world.random_caption(PAIR, rng) for _ in range(1000)]
    assert 70 < texts.count("") < 130
    assert any("cat cat" in text and "robot robot" not in text for text in texts)
    assert any("robot robot" in text and "cat cat" not in text for text in texts)
    for words in ("small", "red", "on the left", "blue", "in the meadow"):
        assert 600 < sum(words in text for text in texts) < 850, words
    assert not any("hat" in text.split() for text in texts)

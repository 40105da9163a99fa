from dataclasses import replace

import numpy as np
import pytest

from tinyflow.picturebook import world


def test_rendering_is_deterministic_and_seeds_matter():
    scene = world.Scene("cat", "pink", "big", "left", "beach", seed=3)
    assert (world.render(scene)[0] == world.render(scene)[0]).all()
    assert (world.render(scene)[0] != world.render(replace(scene, seed=4))[0]).any()


@pytest.mark.parametrize("name", world.OBJECTS)
def test_the_mask_is_where_the_object_is(name):
    """Another colour changes pixels inside the mask (and its soft edge) only."""
    scenes = [world.Scene(name, colour, "big", "middle", "meadow", seed=2) for colour in ("red", "blue")]
    (a, mask), (b, _) = map(world.render, scenes)
    changed = (a != b).any(-1)
    grown = np.pad(mask, 1)
    grown = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:] | mask
    assert changed.sum() > 30 and not (changed & ~grown).any()


def test_held_out_combinations_are_never_seen_and_every_word_is():
    rng = np.random.default_rng(0)
    seen = [world.seen_scene(rng) for _ in range(2000)]
    assert not any(map(world.held_out, seen))
    pairs = {(s.object, s.colour) for s in seen} | {(s.object, s.background) for s in seen}
    assert not pairs & {("robot", "blue"), ("ball", "purple"), ("cat", "red"), ("ball", "meadow"),
                        ("fish", "snow")}
    assert {("robot", "purple"), ("robot", "desert"), ("ball", "blue"), ("cat", "snow")} <= pairs
    assert {s.object for s in seen} == set(world.OBJECTS) and {s.colour for s in seen} == set(world.COLOURS)
    assert {s.background for s in seen} == set(world.BACKGROUND_WORDS)
    assert all(map(world.held_out, [world.seen_scene(rng, seen=False) for _ in range(50)]))


def test_plain_scenes_wear_no_decoration():
    rng = np.random.default_rng(0)
    scenes = [world.random_scene(rng) for _ in range(100)]
    assert all((scene.marking, scene.topper, scene.eyes) == ("plain", "none", 2) for scene in scenes)


def test_captions_say_what_is_there():
    scene = world.Scene("robot", "green", "small", "left", "night")
    assert world.caption(scene) == "a small green robot on the left at night"
    assert world.caption(scene, noun="[V] robot", colour=False) == "a small [V] robot on the left at night"
    assert world.caption(scene, size=False, colour=False, place=False, background=False) == "a robot"


def test_a_moved_object_is_where_it_was_moved_to():
    scene = world.Scene("ball", "red", "big", "middle", "meadow")
    (_, mask), (_, moved) = world.render(scene), world.render(scene, moved=(3, -2))
    assert np.array_equal(moved, np.roll(mask, (-2, 3), axis=(0, 1)))


def test_lights_and_styles_redraw_a_picture_that_is_otherwise_the_same():
    plain = world.Scene("cat", "orange", "big", "left", "beach", seed=3)
    picture, mask = world.render(plain)
    evening, _ = world.render(replace(plain, light="evening"))
    assert np.abs(evening - picture * np.array(world.LIGHTS["evening"])).max() <= 0.5
    for name, style in world.STYLES.items():
        redrawn, its_mask = world.render(replace(plain, style=name))
        assert np.abs(redrawn - style(picture.astype(float))).max() <= 0.5 and np.array_equal(its_mask, mask)
        assert (name == "none") == np.array_equal(redrawn, picture)

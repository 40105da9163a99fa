"""The picture book: its renderer, scenes and captions, and the questions that the check asks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from tinyflow.picturebook import check, world
from tinyflow.picturebook.codec import quality
from tinyflow.picturebook.model import load_codec, make_tiny
from tinyflow.picturebook.objects import OBJECTS, draw_thing, exact_colour
from tinyflow.picturebook.reader import HEADS, Reader, shows, true_traits
from tinyflow.picturebook.render import STYLES, render, tint
from tinyflow.picturebook.world import Identity, Scene, Thing

CAT = Scene((Thing("cat", "pink", "big", "left"),), "beach", seed=3)
PAIR = Scene((Thing("cat", "red", "small", "left"), Thing("robot", "blue", "big", "right")), "meadow", seed=3)


def grown(mask):
    """The mask and the pixels beside it."""
    wide = np.pad(mask, 1)
    return wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:] | mask


# ----------------------------------------------------------------------------------------------- the renderer
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
    assert {word.strip(",") for word in words} == set(world.VOCABULARY) == set(make_tiny().tokenizer.ids)
    assert all(world.held_out(world.seen_scene(rng, seen=False)) for _ in range(50))
    for name, (colour, _, parts) in world.MISSING.items():       # everything else is seen
        own = [thing for thing, _ in things if thing.object == name]
        assert {thing.colour for thing in own} == set(world.COLOURS) - {colour}
        assert len({(thing.marking, thing.topper) for thing in own} | {parts}) == 16


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


# -------------------------------------------------------------------------------------------------- the check
@pytest.fixture(scope="module")
def untrained():
    pipe = make_tiny().requires_grad_(False)
    pipe.codec = load_codec()
    return pipe, Reader().requires_grad_(False)


def test_the_codec_keeps_the_objects():
    inside, whole = quality(load_codec(), 40)
    assert inside.mean() > 31 and inside.min() > 22 and whole.mean() > 35


def test_individuals_differ_in_one_trait_that_shows_or_in_none():
    rng = np.random.default_rng(0)
    for same in (True, False) * 30:
        one, other = check.pair_of_scenes(rng, same)
        a, b = one.things[0], other.things[0]
        assert all(getattr(a, part) == getattr(b, part) for part in world.WORN if part != "identity")
        differing = [trait for trait in world.TRAITS if one.trait(trait) != other.trait(trait)]
        assert len(differing) == (0 if same else 1) and one.seed != other.seed
        for trait in differing:
            assert abs(one.trait(trait) - other.trait(trait)) >= 1 - 1e-9 and shows(one, 0, trait)
            assert -1 <= other.trait(trait) <= 1


def test_the_same_individual_is_told_by_how_sure_the_reader_is():
    sure, unsure = torch.full((1, 11), .1), torch.full((1, 11), 1.0)
    zero, moved, shown = torch.zeros(1, 11), torch.zeros(1, 11), torch.ones(1, 11, dtype=torch.bool)
    moved[0, 3] = 1.2
    assert check.same_individual([zero, zero + .1], [sure, sure], shown).item()
    assert not check.same_individual([zero, moved], [sure, sure], shown).item()
    assert check.same_individual([zero, moved], [unsure, unsure], shown).item()
    assert check.same_individual([zero, moved], [sure, sure], shown & (torch.arange(11) != 3)).item()
    moved[0, 3], half_sure = .75, [torch.full((1, 11), .4)] * 2  # of 1.35, such a reading shows about .7
    assert not check.same_individual([zero, moved], half_sure, torch.arange(11)[None] == 3).item()


def test_the_reader_knows_how_unsure_it_is_of_pictures_that_it_has_never_seen():
    """Its training had made it two times too sure, and it took one individual for two."""
    scenes = [world.any_scene(np.random.default_rng((11, n))) for n in range(150)]
    reading = check.read(Reader.shipped(), check.renders(scenes))
    errors = ((reading.traits - true_traits(scenes)) / reading.spread).square().nanmean((0, 1)).sqrt()
    assert errors.min() > .7 and errors.max() < 1.4, dict(zip(world.TRAITS, errors.tolist()))


def test_a_text_is_followed_if_everything_that_it_says_is_seen():
    """What a thing does not wear is not said, so it is not asked for; the light without a name neither."""
    cat = Thing("cat", "red", marking="stripes", topper="none")
    scenes = [Scene((cat,), "snow", "glow"), Scene((replace(cat, topper="hat"),), "snow")]

    class Answers:
        logits = {head: one_hot(answers.clamp(min=0), len(HEADS[head]))
                  for head, answers in check.truth(scenes).items()}
    assert check.follows(Answers, scenes, HEADS)[1] == 1
    Answers.logits["topper"][0, 0] = torch.tensor([0, 0, 0, 5])          # an unasked crown
    Answers.logits["light"][0] = torch.tensor([5, 0, 0, 0])
    assert check.follows(Answers, scenes, HEADS)[1] == 1
    Answers.logits["topper"][1, 0] = torch.tensor([5, 0, 0, 0])          # the hat is missing
    row, everything = check.follows(Answers, scenes, HEADS)
    assert row["topper"] == 0 and everything == .5


def test_the_command_prints_every_row(untrained, capsys):
    pipe, reader = untrained
    sample = pipe.sample
    pipe.sample = lambda text, seeds, **options: sample(text, seeds, steps=1, guidance=1)
    check.check(reader, pipe, 2)
    del pipe.sample
    printed = capsys.readouterr().out
    for row in ("codec: PSNR", "renders", "after the codec", "same individual", "one thing, held out",
                "two things, held out", "both objects", "everything", "individuals differ",
                "doubled nouns"):
        assert row in printed, row


class Knowing:
    """A base model that answers right up to an error, which is larger for texts with other colours."""

    def __init__(self, pipe, ear):
        self.encode_images, self.encode_text, self.ear = pipe.encode_images, list, ear

    def velocity(self, x_t, t, texts):
        if not hasattr(self, "right"):           # the right texts are asked first
            self.right = texts
        errors = torch.tensor([2. if self.ear(text) != self.ear(right) else 1.
                               for text, right in zip(texts, self.right)])
        x_0 = self.pictures                      # v = (x_t - x_0) / t
        return (x_t - x_0) / t[:, None, None, None] + errors[:, None, None, None]


def test_a_word_is_worth_what_its_lack_costs(untrained):
    pipe = Knowing(untrained[0], ear=lambda text: [word for word in text.split() if word in world.COLOURS])
    encode = pipe.encode_images
    pipe.encode_images = lambda pictures: setattr(pipe, "pictures", encode(pictures)) or pipe.pictures
    rows = check.worth_of_words(pipe, 6)
    assert rows["worth of the colour"] == pytest.approx({"t = 0.7": 3, "t = 0.8": 3, "t = 0.9": 3}, rel=1e-3)
    assert rows["worth of the topper"] == pytest.approx({"t = 0.7": 0, "t = 0.8": 0, "t = 0.9": 0}, abs=1e-3)

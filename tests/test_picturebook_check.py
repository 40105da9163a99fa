"""The questions that the check asks, and the shipped codec's answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from tinyflow.picturebook import check as module
from tinyflow.picturebook import world
from tinyflow.picturebook.check import follows, pair_of_scenes, same_individual, worth_of_words
from tinyflow.picturebook.codec import quality
from tinyflow.picturebook.model import load_codec, make_tiny
from tinyflow.picturebook.reader import HEADS, Reader, shows, true_traits
from tinyflow.picturebook.world import Scene, Thing


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
        one, other = pair_of_scenes(rng, same)
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
    assert same_individual([zero, zero + .1], [sure, sure], shown).item()
    assert not same_individual([zero, moved], [sure, sure], shown).item()
    assert same_individual([zero, moved], [unsure, unsure], shown).item()
    assert same_individual([zero, moved], [sure, sure], shown & (torch.arange(11) != 3)).item()
    moved[0, 3], half_sure = .75, torch.full((1, 11), .4)        # of 1.35, such a reading shows about .7
    assert not same_individual([zero, moved], [half_sure, half_sure], torch.arange(11)[None] == 3).item()


def test_the_reader_knows_how_unsure_it_is_of_pictures_that_it_has_never_seen():
    """Its training had made it two times too sure, and it took one individual for two."""
    scenes = [world.any_scene(np.random.default_rng((11, n))) for n in range(150)]
    reading = module.read(Reader.shipped(), module.renders(scenes))
    errors = ((reading.traits - true_traits(scenes)) / reading.spread).square().nanmean((0, 1)).sqrt()
    assert errors.min() > .7 and errors.max() < 1.4, dict(zip(world.TRAITS, errors.tolist()))


def test_a_text_is_followed_if_everything_that_it_says_is_seen():
    """What a thing does not wear is not said, so it is not asked for; the light without a name neither."""
    cat = Thing("cat", "red", marking="stripes", topper="none")
    scenes = [Scene((cat,), "snow", "glow"), Scene((replace(cat, topper="hat"),), "snow")]

    class Answers:
        logits = {head: one_hot(answers.clamp(min=0), len(HEADS[head]))
                  for head, answers in module.truth(scenes).items()}
    assert follows(Answers, scenes, HEADS)[1] == 1
    Answers.logits["topper"][0, 0] = torch.tensor([0, 0, 0, 5])          # an unasked crown
    Answers.logits["light"][0] = torch.tensor([5, 0, 0, 0])
    assert follows(Answers, scenes, HEADS)[1] == 1
    Answers.logits["topper"][1, 0] = torch.tensor([5, 0, 0, 0])          # the hat is missing
    row, everything = follows(Answers, scenes, HEADS)
    assert row["topper"] == 0 and everything == .5


def test_the_command_prints_every_row(untrained, capsys):
    pipe, reader = untrained
    sample = pipe.sample
    pipe.sample = lambda text, seeds, **options: sample(text, seeds, steps=1, guidance=1)
    module.check(reader, pipe, 2)
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
    rows = worth_of_words(pipe, 6)
    assert rows["worth of the colour"] == pytest.approx({"t = 0.7": 3, "t = 0.8": 3, "t = 0.9": 3}, rel=1e-3)
    assert rows["worth of the topper"] == pytest.approx({"t = 0.7": 0, "t = 0.8": 0, "t = 0.9": 0}, abs=1e-3)

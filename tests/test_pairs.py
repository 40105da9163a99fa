"""Scenes of two things that the base model imagines, and the two losses on them."""

import numpy as np
import pytest
import torch

from purecc_min.branch import Thetas
from purecc_min.concept import encode
from purecc_min.learning import fingerprint
from purecc_min.measure.judge import one_in_each_half
from purecc_min.measure.toy import PAIR_TEMPLATES
from purecc_min.methods import cosine, l_cc
from purecc_min.objective import inner
from purecc_min.pairs import half_kept, imagine, imagine_resumably, pairs, pairs_with_lambda
from purecc_min.train import TrainConfig, draw_batch
from tests.test_branch import make_branch
from tinyflow.errors import InputError
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import to_pixels

CLOSE = dict(rtol=1e-3, atol=0)                  # the losses of this random model are near .00001


@pytest.fixture
def scenes(pipe, robot):
    """A custom set with two imagined scenes, each with [V] on the left and on the right."""
    imagined = imagine(pipe, robot, PAIR_TEMPLATES, seed=0, count=2, steps=1)
    return encode(pipe, robot)._replace(imagined=imagined)


def thetas_of(pipe):
    return Thetas(pipe.velocity, make_branch(pipe, 1), make_branch(pipe, 2, "phrase"))


def test_a_scene_stands_there_twice_and_M_is_the_half_of_the_token(pipe, robot, scenes):
    imagined = scenes.imagined
    assert torch.equal(imagined.x_0[:2], imagined.x_0[2:]) and imagined.masks.shape == (4, 1, 1, 16, 16)
    assert imagined.masks[0, 0, 0, :, :8].min() == 1 and imagined.masks[0, 0, 0, :, 8:].max() == 0
    assert torch.equal(imagined.masks[2], 1 - imagined.masks[0])
    left, right = imagined.texts.complete.slots[0], imagined.texts.complete.slots[2]
    assert left.nonzero().item() < right.nonzero().item() and not imagined.texts.base.slots.any()
    expected = pipe.encode_text(["a small robot on the left and a robot on the right in the meadow"])
    assert torch.equal(imagined.texts.base.context[:1], expected.context)


def test_scenes_leave_the_references_draws_alone(pipe, scenes):
    config = TrainConfig(batch=3)
    batch, again = (draw_batch(scenes, config, 2, 5, pipe.shift) for _ in range(2))
    plain = draw_batch(scenes._replace(imagined=None), config, 2, 5, pipe.shift)
    assert torch.equal(batch.x_t, plain.x_t) and torch.equal(batch.imagined.x_t, again.imagined.x_t)


def test_pairs_by_hand(pipe, scenes):
    """v_original + lambda M R; with lambda* nothing of what is left lies along M R inside the half."""
    batch, thetas = draw_batch(scenes, TrainConfig(), 2, 0, pipe.shift), thetas_of(pipe)
    scene = batch.imagined
    v, R = (theta(scene.x_t, scene.t, scene.texts.complete) for theta in (thetas.theta, thetas.theta_1))
    v_original = pipe.velocity(scene.x_t, scene.t, scene.texts.base)
    R, M = R - v_original, scene.mask
    loss, log = pairs(thetas, batch, 2.0)
    loss.backward()
    assert all(p.grad is None for p in thetas.theta_1.parameters())
    assert all(p.grad.abs().max() > 0 for p in thetas.theta.parameters())
    torch.testing.assert_close(log["loss_pairs"], (v_original + M * R - v).square().mean(), **CLOSE)
    torch.testing.assert_close(loss, l_cc(thetas, batch, 1.0)[0] + 2 * log["loss_pairs"])
    _, log = pairs_with_lambda(thetas, batch, 1.0)
    inside, left = M * (v - v_original), (1 - M) * (v - v_original)
    rejection = inner(inside, inside) * (1 - cosine(inside, M * R) ** 2) + inner(left, left)
    torch.testing.assert_close(log["loss_pairs"], rejection.mean() / v[0].numel(), **CLOSE)
    _, log = half_kept(thetas, batch, 1.0)
    torch.testing.assert_close(log["loss_half"], 2 * left.square().mean(), **CLOSE)


def test_scenes_are_kept_with_the_run(pipe, robot, tmp_path, monkeypatch):
    file = tmp_path / "imagined.safetensors"
    first = imagine_resumably(pipe, robot, PAIR_TEMPLATES, 0, file, steps=1)
    monkeypatch.setattr(pipe, "sample", None)    # it must not draw again
    again = imagine_resumably(pipe, robot, PAIR_TEMPLATES, 0, file, steps=1)
    assert fingerprint(robot, first) == fingerprint(robot, again) != fingerprint(robot)
    with pytest.raises(InputError, match="scenes are of another run; choose another --out"):
        imagine_resumably(pipe, robot, PAIR_TEMPLATES, 1, file, steps=1)


def test_the_reader_says_in_how_many_scenes_there_is_one_in_each_half():
    robots = [world.Thing("robot", "red", "big", place) for place in ("left", "right")]
    two, one = world.Scene(tuple(robots), "snow"), world.Scene((robots[0],), "snow")
    other = two.changed(1, object="cat")
    reading = Reader.shipped()(to_pixels(np.stack(render_all([two, one, other, two])[0])))
    assert one_in_each_half(reading, "robot") == 0.5

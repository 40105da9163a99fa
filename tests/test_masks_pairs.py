"""What a batch may hold besides: masks of the references, and imagined scenes of two things.

What is black in a mask does not count in L_CC, and nothing else changes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from purecc_min.branch import Thetas
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode
from purecc_min.learning import fingerprint
from purecc_min.measure.judge import one_in_each_half
from purecc_min.measure.toy import PAIR_TEMPLATES
from purecc_min.methods import cosine, l_cc
from purecc_min.objective import inner
from purecc_min.pairs import half_kept, imagine, imagine_resumably, pairs, pairs_with_lambda
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig, draw_batch
from tests.test_branch import make_branch
from tests.test_folder import refused
from tinyflow.errors import InputError
from tinyflow.flow import squared_error
from tinyflow.picturebook import world
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.render import render_all
from tinyflow.pipeline import to_pixels

CLOSE = dict(rtol=1e-3, atol=0)                  # the losses of this random model are near .00001


# ------------------------------------------------------------------------------------------------------ masks
@pytest.fixture
def folder(tmp_path):
    """Wide black pictures with a white thing in each, and masks that are white where it stands."""
    for n in range(3):
        picture = np.zeros((60, 90), dtype=np.uint8)
        picture[20:40, 40 + n:60 + n] = 255
        Image.fromarray(picture).convert("RGB").save(tmp_path / f"{n}.png")
        Image.fromarray(picture).save(tmp_path / f"{n}.mask.png")
    return tmp_path


def test_a_mask_is_cut_and_mirrored_as_its_picture_is(folder):
    """And it changes neither pictures nor texts."""
    masked = load_concept(folder, "fish", 30, variants=20).references
    assert [r.id for r in masked] == ["0.png", "1.png", "2.png"]
    for mask in folder.glob("*.mask.png"):
        mask.unlink()
    for one, other in zip(masked, load_concept(folder, "fish", 30, variants=20).references):
        assert one.pictures.shape == (20, 30, 30, 3) and np.array_equal(one.pictures[..., 0], one.masks)
        assert np.array_equal(one.pictures, other.pictures) and one.complete == other.complete
        assert other.masks is None


def test_a_square_beside_the_concept_gives_way_to_the_picture(folder):
    """A thing in the corner is outside of some random squares: there would be nothing to learn from."""
    corner = np.zeros((60, 90), dtype=np.uint8)
    corner[:3, 15:18] = 255                      # the middle square starts at column 15
    Image.fromarray(corner).save(folder / "1.mask.png")
    reference = load_concept(folder, "fish", 60, variants=30).references[1]
    replaced = [(reference.pictures[n] == reference.pictures[0]).all() for n in range(1, 30)]
    assert reference.masks.any((1, 2)).all() and 3 < sum(replaced) < 29


def test_masks_that_cannot_be_used(folder):
    (folder / "1.mask.png").rename(folder / "7.mask.png")
    refused(folder, "1.png: this picture has no mask, though others in the folder do; give it 1.mask.png")
    Image.new("L", (90, 60)).save(folder / "1.mask.png")
    refused(folder, "7.mask.png: a mask of no picture; there is no '7'")
    (folder / "7.mask.png").unlink()
    refused(folder, "1.mask.png: the mask is black all over the middle square")
    Image.new("L", (60, 60)).save(folder / "1.mask.png")
    refused(folder, "1.mask.png: the mask has 60 x 60 pixels and its picture 90 x 60")
    (folder / "1.mask.png").write_text("no picture")
    refused(folder, "1.mask.png: it is not a picture")


def test_a_weighted_error_is_the_mean_over_what_counts():
    prediction, target = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(3, 1, 4, 4)
    weight[0, 0, :2], weight[2, 0, 1, 1] = 1, 1
    counted = torch.cat([(prediction - target)[0, :, :2].flatten(), (prediction - target)[2, :, 1, 1]])
    torch.testing.assert_close(squared_error(prediction, target, weight), counted.square().mean())
    torch.testing.assert_close(squared_error(prediction, target, torch.full_like(weight, .3)),
                               squared_error(prediction, target))


def masked(robot):
    """The references, each with a mask that is white in one quarter."""
    quarter = np.zeros(robot.references[0].pictures.shape[:3], dtype=np.uint8)
    half = quarter.shape[-1] // 2
    quarter[:, :half, half:] = 255
    return replace(robot, references=[replace(r, masks=quarter) for r in robot.references])


def test_an_encoded_mask_lies_on_its_latents_and_belongs_to_the_fingerprint(pipe, robot):
    data, plain = encode(pipe, masked(robot)), encode(pipe, robot)
    assert data.masks[..., :8, 8:].min() == 1 and data.masks.mean() == .25
    assert fingerprint(masked(robot)) != fingerprint(robot) and plain.masks is None
    batch, without = (draw_batch(some, TrainConfig(batch=3), 1, 0, 1.0) for some in (data, plain))
    assert batch.mask.shape == (3, 1, 16, 16) and torch.equal(batch.x_t, without.x_t)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_learns_from_what_is_black_in_the_mask(name, pipe, robot):
    """The target velocity changes where the mask is black: the gradient does not; where it is white, it does.

    All else that a method asks for, as L_PureCC and the anchor, has no target in the pictures.
    """
    data, way = encode(pipe, masked(robot)), METHODS[name]
    if way.imagines:
        data = data._replace(imagined=imagine(pipe, robot, PAIR_TEMPLATES, seed=0, count=2, steps=1))
    theta = make_branch(pipe, where=way.where)
    batch = draw_batch(data, TrainConfig(), 1, 0, pipe.shift)

    def gradient(change):
        loss, _ = way.loss(Thetas(pipe.velocity, theta, theta), batch._replace(v=batch.v + change), 1.0)
        return torch.autograd.grad(loss, theta.lora.B["blocks/1/attention/text/to_v"])[0]

    black = torch.randn(batch.v.shape) * (batch.mask == 0)
    assert torch.equal(gradient(black), gradient(torch.zeros(())))
    assert not torch.allclose(gradient(batch.mask), gradient(torch.zeros(())))


# -------------------------------------------------------------------------------------------- imagined scenes
@pytest.fixture
def scenes(pipe, robot):
    """A custom set with two imagined scenes, each with [V] on the left and on the right."""
    imagined = imagine(pipe, robot, PAIR_TEMPLATES, seed=0, count=2, steps=1)
    return encode(pipe, robot)._replace(imagined=imagined)


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
    batch = draw_batch(scenes, TrainConfig(), 2, 0, pipe.shift)
    thetas = Thetas(pipe.velocity, make_branch(pipe, 1), make_branch(pipe, 2, "phrase"))
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

"""The optimizer, the schedule, and the trainings of codec, reader and base model on a toy budget."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.picturebook import codec, pretrain, reader, world
from tinyflow.picturebook.codec import CODEC, CodecTraining, psnr
from tinyflow.picturebook.model import load_codec, make_codec
from tinyflow.picturebook.muon import Muon, orthogonal
from tinyflow.picturebook.pretrain import Pretraining
from tinyflow.picturebook.reader import Reader, ReaderTraining, shows
from tinyflow.picturebook.render import render_all
from tinyflow.picturebook.training import rate_share, train
from tinyflow.picturebook.world import Scene, Thing
from tinyflow.pipeline import to_pixels
from tinyflow.weights import load_tensors, save_tensors, tensor_hash

SMALL_CODEC = replace(CODEC, steps=6, batch=8, warmup=2, pictures=520)
SMALL_READER = replace(reader.READER, steps=6, batch=4, warmup=2, pictures=12)
SMALL_BASE = replace(pretrain.BASE, steps=6, batch=4, warmup=2, pictures=16)


@pytest.fixture
def few_pictures(monkeypatch):
    """The same picture again and again, and little of what a training shows of itself: all that takes longer
    than the training here.
    """
    pictures, masks = render_all([Scene((Thing("cat", "red"),), "meadow")])

    def render_one(scenes):
        return pictures.repeat(len(scenes), 0), masks.repeat(len(scenes), 0)
    monkeypatch.setattr(codec, "render_all", render_one)
    monkeypatch.setattr(codec, "quality", lambda vae, count, quality=codec.quality: quality(vae, 2))
    monkeypatch.setattr(reader, "FRESH", 4)
    monkeypatch.setattr(pretrain, "sample_page", lambda pipe: pretrain.Image.new("RGB", (8, 8)))


def begin(kind, out, **changes):
    torch.manual_seed(0)
    if kind == "codec":
        return CodecTraining(replace(SMALL_CODEC, **changes), make_codec())
    if kind == "reader":
        return ReaderTraining(replace(SMALL_READER, **changes), Reader())
    return Pretraining(replace(SMALL_BASE, **changes), make_pipe().requires_grad_(True), out)


# ---------------------------------------------------------------------------------------------- all trainings
@pytest.mark.parametrize("kind", ["codec", "reader", "base"])
def test_an_interrupted_training_ends_bitwise_like_a_whole_one(kind, tmp_path, few_pictures):
    folders = whole, cut = tmp_path / "whole", tmp_path / "cut"
    losses = [loss for _, loss in train(begin(kind, whole), whole, 2)]
    rows = train(begin(kind, cut), cut, 2)
    resumed = [next(rows)[1] for _ in range(5)][:4]              # the fifth is lost: step 4 was saved
    resumed += [loss for _, loss in train(begin(kind, cut), cut, 2)]
    assert resumed == losses and len(losses) == 6
    one, other = (load_tensors(folder / f"{kind}.safetensors", f"tinyflow {kind}")[0] for folder in folders)
    log = (cut / "log.jsonl").read_text().splitlines()
    assert tensor_hash(one) == tensor_hash(other)
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6]
    if kind == "codec":                          # its latents have no mean, and unit variance
        latents = load_codec(whole / "codec.safetensors").encode(to_pixels(begin(kind, whole).pictures[:4]))
        assert abs(latents.mean()) < .02 and latents.std().item() == pytest.approx(1, abs=.02)
    with pytest.raises(InputError, match="another configuration"):
        list(train(begin(kind, cut, lr=1.0), cut, 2))


def test_a_loss_that_is_not_finite_is_one_clear_error(tmp_path, few_pictures):
    training = begin("codec", tmp_path)
    finite = training.loss
    training.loss = lambda k: finite(k) * np.nan
    with pytest.raises(InputError, match="not finite at step 0"):
        list(train(training, tmp_path, 2))


def test_muons_steps_are_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((1, 8, 8), (2, 16, 40), (3, 40, 16)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert singular.min() > 0.5 and singular.max() < 1.3


def test_a_matrix_takes_muons_step_and_the_rest_adams():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    twin = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    twin.load_state_dict(module.state_dict())
    ours, adam = Muon(module, .01, .1, ("1.",)), torch.optim.Adam(twin.parameters(), .01, (.9, .99))
    before = module[0].weight.detach().clone()
    for _ in range(3):
        for net, optimizer in ((module, ours), (twin, adam)):
            net(torch.ones(2, 6)).square().sum().backward()
            twin[0].weight.data.copy_(module[0].weight)          # the one parameter that goes another way
            optimizer.step()
            optimizer.zero_grad()
        twin[0].weight.data.copy_(module[0].weight)
    assert torch.allclose(module[1].weight, twin[1].weight, atol=1e-6)
    assert torch.allclose(module[0].bias, twin[0].bias, atol=1e-6)
    assert 0.05 < torch.linalg.svdvals(module[0].weight - before).max() < 0.4


def test_the_rate_warms_up_stays_and_falls():
    config = replace(CODEC, steps=100, warmup=10, flat=.6)
    shares = [rate_share(k, config) for k in range(100)]
    assert shares[0] == pytest.approx(.1) and shares[9:60] == [1] * 51
    assert shares[60:] == sorted(shares[60:], reverse=True) and .02 <= shares[99] < .03


# ----------------------------------------------------------------------------------------------- pretraining
def test_the_average_is_what_is_kept_and_the_codec_is_not_trained(tmp_path, few_pictures):
    training = begin("base", tmp_path)
    codec = tensor_hash(training.codec.state_dict())
    list(train(training, tmp_path, 6))
    checkpoint, _ = load_tensors(tmp_path / "checkpoint.safetensors", "training checkpoint")
    base, facts = load_tensors(tmp_path / "base.safetensors", "tinyflow base")
    name = "mmdit.final_linear.weight"
    assert torch.equal(base[name], checkpoint[f"average.{name}"].half())
    assert not torch.equal(base[name], checkpoint[f"model.{name}"].half())
    assert facts["config"]["steps"] == 6 and "seconds" in facts
    assert tensor_hash(training.codec.state_dict()) == codec and not any("codec" in name for name in base)


def test_latents_are_those_of_the_scenes_and_are_made_once(tmp_path):
    training, file = begin("base", tmp_path), tmp_path / "latents.safetensors"
    written = file.stat().st_mtime_ns
    again = begin("base", tmp_path)
    assert file.stat().st_mtime_ns == written and torch.equal(training.latents, again.latents)
    x_0 = training.codec.encode(to_pixels(render_all(training.scenes[3:4])[0]))
    assert torch.allclose(training.latents[3].float(), x_0[0], atol=2e-3)
    other = begin("base", tmp_path, seed=2)      # other pictures: the file is made anew
    assert not torch.equal(other.latents, again.latents)


def test_batches_that_other_processes_make_ahead_are_the_same(tmp_path):
    training = begin("base", tmp_path)
    loader = pretrain.DataLoader(training, None, sampler=range(2, 5), **pretrain.AHEAD)
    for k, ahead in enumerate(loader, start=2):
        here = training[k]
        assert all(torch.equal(a, b) for a, b in zip(ahead[:3], here[:3])) and list(ahead[3]) == here[3]


def test_a_stage_goes_on_from_others_weights_and_a_wrong_start_is_one_line(tmp_path, monkeypatch, capsys):
    weights, pipe = tmp_path / "start.safetensors", make_pipe()
    state = {name: tensor for name, tensor in pipe.state_dict().items() if not name.startswith("codec.")}
    save_tensors(weights, "tinyflow base", state, {})
    monkeypatch.setattr(pretrain, "make_tiny", make_pipe)
    begun = pretrain.begin(weights, None, 1)
    assert torch.equal(begun.mmdit.final_linear.weight, pipe.mmdit.final_linear.weight)
    assert all(p.requires_grad for p in begun.mmdit.parameters())
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["--out", str(tmp_path / "x"), "--start", str(tmp_path / "none.safetensors")])
    assert caught.value.code == 2 and "there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------- the codec
def test_a_second_stage_trains_the_decoder_and_leaves_the_latents_alone(tmp_path, few_pictures):
    config = replace(SMALL_CODEC, steps=2, start="the shipped codec")
    training = CodecTraining(config, load_codec().requires_grad_(True))
    list(train(training, tmp_path, 2))
    before, after = load_codec(), load_codec(tmp_path / "codec.safetensors")
    x = to_pixels(training.pictures[:4])
    assert torch.equal(before.encode(x), after.encode(x))
    assert not torch.equal(before.decode(before.encode(x)), after.decode(before.encode(x)))
    assert training.batch(0)[0].shape == (4, 3, 64, 64)                                 # whole pictures


def test_crops_lie_on_the_grid_of_the_latents_and_mostly_hold_the_object():
    training = CodecTraining(replace(CODEC, steps=10, pictures=16), make_codec())
    rng, hits = np.random.default_rng(0), []
    for mask in np.repeat(training.masks, 10, axis=0):
        y, x = training.corner(mask, rng)
        assert y % 4 == x % 4 == 0 and min(x, y) >= 0 and max(x, y) <= 32
        hits.append(mask[y:y + 32, x:x + 32].any())
    assert np.mean(hits) > .7
    x, weight = training.batch(9)
    assert x.shape == (4, 3, 64, 64) and set(weight.unique().tolist()) == {1, codec.INSIDE}


def test_psnr_is_in_decibels_of_the_full_range():
    x, y, inside = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), .2), torch.zeros(1, 4, 4).bool()
    assert psnr(x, y).item() == pytest.approx(20)
    y[..., 0, 0], inside[0, 0, 0] = .02, True
    assert psnr(x, y, inside).item() == pytest.approx(40)


# ------------------------------------------------------------------------------------------------ the reader
def test_an_object_is_cut_out_to_one_size_wherever_it_is():
    robot = Thing("robot", "red", "big", topper="hat", identity=world.Identity(topper_height=1))
    scenes = [Scene((world.replace(robot, place=place, size=size),), "snow", seed=1)
              for place, size in (("left", "big"), ("right", "big"), ("middle", "small"))]
    pictures, masks = render_all(scenes)
    big = torch.tensor([[True, False], [True, False], [False, False]])
    cut = reader.cut_out(to_pixels(pictures), torch.tensor(masks), big)
    assert cut.shape == (6, 4, reader.CROP, reader.CROP)
    left, right, small = cut[0], cut[2], cut[4]
    assert (left - right).abs().mean() < .1 and (left - small).abs().mean() < .15
    assert left[3].sum() > .2 * reader.CROP**2 and (cut[1] == 0).all()  # there is no second object
    nothing_around = left[:3] * (left[3] == 0)
    assert (nothing_around == 0).all()
    edges = torch.cat([left[3, 0], left[3, :, 0], left[3, :, -1]])
    assert (edges < .5).all()                                    # all of it is there, the hat included


def test_a_mask_wobbles_with_its_picture():
    """No line of the base model is quite straight. The reader learns on lines that wobble with their mask."""
    masks = torch.zeros(4, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, 20:50, 15:45] = True
    x = masks[:, :1].float().repeat(1, 3, 1, 1) * 2 - 1
    moved, followed = reader.augment(x, masks, torch.Generator().manual_seed(0))
    assert ((moved.mean(1) > 0) == followed[:, 0]).float().mean() > .995
    assert not torch.equal(followed[:, 0], masks[:, 0]) and not followed[:, 1].any()


def test_a_picture_without_objects_can_be_read():
    reading = Reader()(torch.zeros(2, 3, 64, 64), torch.zeros(2, 2, 64, 64, dtype=torch.bool))
    assert reading.traits.shape == (2, 2, len(world.TRAITS)) and reading.traits.isfinite().all()
    assert len(reading.names("object", 1)) == len(reading.names("background")) == 2


def test_the_truth_says_what_a_picture_determines_and_no_more():
    cat = Thing("cat", "red", "big", "left", "stripes", "white", "none", 1)
    pair = Scene((cat, Thing("robot", "blue", "small", "right")), "night", "dusk", .5, "none", .25)
    inks = Scene((cat,), "snow", "dusk", .5, "print", .5)
    labels, traits, members = (true([pair, inks]) for true in
                               (reader.truth, reader.true_traits, reader.true_members))

    def said(head, row, n=0):
        label = labels[head][row] if labels[head].dim() == 1 else labels[head][row, n]
        return None if label == reader.IGNORED else reader.HEADS[head][label]

    assert [said("count", row) for row in (0, 1)] == [2, 1]
    assert [said("object", 0, n) for n in (0, 1)] == ["cat", "robot"] and said("object", 1, 1) is None
    assert (said("accent", 0), said("accent", 0, 1), said("marking", 0, 1)) == ("white", None, "plain")
    assert (said("colour", 1), said("light", 1), said("style", 1)) == (None, None, "print")
    assert said("marking", 1) == "stripes"
    shown = {trait: not value.isnan() for trait, value in zip(world.TRAITS, traits[0, 0])}
    assert not shown["eye_gap"] and not shown["topper_height"] and shown["marking_angle"] and shown["hue"]
    assert traits[0, 1].isnan().sum() == 4 and traits[1, 1].isnan().all()
    assert members[0, 0] == .5 and members[0, 1:].isnan().all() and members[1, 0].isnan()
    assert members[1, 1:].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_a_marking_of_equal_brightness_cannot_be_told_in_two_inks():
    thing = Thing("cat", "red", marking="stripes", accent="blue")
    dark = Scene((thing,), "snow", style="print")
    assert not shows(dark, 0, "marking") and shows(dark.changed(accent="white"), 0, "marking")
    assert shows(dark.changed(style="none"), 0, "marking")

"""The training loop, Algorithm 1, and the methods on a real (small, random) model."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from purecc_min import learning, methods, train
from purecc_min.branch import Branch, Thetas
from purecc_min.commands.folder import load_concept
from purecc_min.concept import ConceptSet, encode
from purecc_min.learning import fingerprint, learn, stage
from purecc_min.measure.toy import FOLDER, PAIR_TEMPLATES
from purecc_min.methods import l_cc, paper
from purecc_min.pairs import imagine
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig, draw_batch, optimizer_for
from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.weights import tensor_hash

LORA, PAPER = METHODS["lora"], METHODS["paper"]
CONFIG = TrainConfig(steps=4, batch=2, rank=2, learning_rate=1e-2)


@pytest.fixture
def trained(pipe, robot, tmp_path):
    """An extractor after a few steps, and what stage 2 needs."""
    data = encode(pipe, robot)
    theta_1, rows = stage(pipe, data, CONFIG, tmp_path, LORA)
    list(rows)
    return pipe, data, theta_1.requires_grad_(False), tmp_path


def try_method(trained, method, eta=1.0):
    """The loss and the log of one step, of a theta_2 whose adapters are far from where they begin."""
    pipe, data, theta_1, _ = trained
    theta_2 = Branch.fresh(pipe, theta_1.embeddings.Y.detach(), 2, torch.Generator().manual_seed(5))
    for B in theta_2.lora.B.values():
        B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    return method(Thetas(pipe.velocity, theta_1, theta_2), draw_batch(data, CONFIG, 2, 0, pipe.shift), eta)


# --------------------------------------------------------------------------------------------- data and draws
def test_pictures_and_texts_are_paired_by_id(pipe, robot):
    """Cached latents once met the wrong captions after a shuffle (diffusers #14430)."""
    changed = [replace(r, id=f"{n}.png", complete=f"a {colour} [V] robot", base=f"a {colour} robot",
                       pictures=np.full_like(r.pictures, n))
               for n, (r, colour) in enumerate(zip(robot.references, ("red", "green", "blue", "pink")))]
    sets = [ConceptSet("robot", rows) for rows in (changed, changed[::-1])]
    data, shuffled = (encode(pipe, concept) for concept in sets)
    for n, id in enumerate(data.ids):
        m = shuffled.ids.index(id)
        assert torch.equal(data.x_0[n], pipe.encode_images([changed[n].picture])[0]) and id == changed[n].id
        assert torch.equal(data.x_0[n], shuffled.x_0[m])
        assert torch.equal(data.texts.complete.context[n], shuffled.texts.complete.context[m])
    counts = {name: text.slots.sum(1).tolist() for name, text in data.texts._asdict().items()}
    assert counts == {"complete": [1] * 4, "base": [0] * 4, "target": [1] * 4, "null": [0] * 4}
    assert data.class_text.slots.sum(1).tolist() == [1] * 4
    assert fingerprint(sets[0]) != fingerprint(sets[1]) == fingerprint(ConceptSet("robot", changed[::-1]))


def test_a_draw_depends_on_seed_stage_and_step_alone(pipe, robot):
    data, draws = encode(pipe, robot), ((0, 1, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))
    first, again, *others = (draw_batch(data, replace(CONFIG, seed=seed), stage, step, 1.0).x_t
                             for seed, stage, step in draws)
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)


def test_a_draw_holds_crops_and_flips_of_each_picture_with_its_own_texts(pipe):
    """x_0 = x_t - t v by Eq. 1 and 2 tells which variant of which picture was drawn: in time, each one."""
    one, same, other = (load_concept(FOLDER / "checked_robot", "robot", 64, variants=3, seed=seed)
                        for seed in (1, 1, 2))   # which crops they are, the seed says
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    data, drawn = encode(pipe, one), set()
    batch = draw_batch(data, replace(CONFIG, batch=80), 1, 0, 1.0)
    for n, x_0 in enumerate(batch.x_t - batch.t.view(-1, 1, 1, 1) * batch.v):
        distance = (data.variants - x_0).abs().amax((2, 3, 4))                           # [4, 3]
        (row, variant), = (distance < 1e-4).nonzero().tolist()
        drawn.add((row, variant))
        for text, its in zip(data.texts, batch.texts):
            assert torch.equal(text.context[row], its.context[n])
    assert len(drawn) == 4 * 3


# ------------------------------------------------------------------------------------------------- the stages
def test_stage_1_is_really_in_the_target_representation(trained):
    """The released code computes R(y_tar) with the extractor's adapters off; here they must matter."""
    theta_1 = trained[2]
    _, with_it = try_method(trained, paper)
    for B in theta_1.lora.B.values():
        B.zero_()
    _, without = try_method(trained, paper)
    assert (with_it["norm_R_target"] - without["norm_R_target"]).abs() > 1e-4


def test_stage_2_never_moves_the_extractor(trained):
    pipe, data, theta_1, folder = trained
    before = tensor_hash(theta_1.state_dict())
    theta_2, rows = stage(pipe, data, CONFIG, folder, PAPER, theta_1)
    assert torch.equal(theta_2.embeddings.Y, theta_1.embeddings.Y)
    assert all(B.abs().max() == 0 for B in theta_2.lora.B.values())
    list(rows)
    assert tensor_hash(theta_1.state_dict()) == before
    assert not torch.equal(theta_2.embeddings.Y, theta_1.embeddings.Y)


def test_training_lowers_the_loss_on_draws_it_never_saw(pipe, robot, tmp_path):
    data, config = encode(pipe, robot), replace(CONFIG, steps=40, batch=4)
    theta_1, rows = stage(pipe, data, config, tmp_path, LORA)
    unseen = [draw_batch(data, config, 9, n, pipe.shift) for n in range(10)]

    def mean_loss():
        return np.mean([l_cc(Thetas(None, None, theta_1), batch, 1.0)[0].item() for batch in unseen])

    before = mean_loss()
    list(rows)
    assert mean_loss() < 0.95 * before


def test_adapters_and_embeddings_have_their_own_learning_rates(trained):
    others, embeddings = optimizer_for(trained[2], CONFIG).param_groups
    assert embeddings["params"] == [trained[2].embeddings.Y]
    assert (others["lr"], embeddings["lr"]) == (CONFIG.learning_rate, CONFIG.embedding_learning_rate)


def test_the_anchor_asks_the_base_text_to_stay(trained):
    pipe, data, theta_1, _ = trained
    eta = 1e6                                    # the anchor is small in this random model
    loss, log = try_method(trained, methods.anchored, eta)
    assert eta * log["loss_anchor"] > 0.1 * log["loss_cc"]
    torch.testing.assert_close(loss, log["loss_cc"] + eta * log["loss_anchor"])
    fresh, batch = Branch.fresh(pipe, theta_1.embeddings.Y, 2), draw_batch(data, CONFIG, 2, 0, pipe.shift)
    assert methods.anchor_loss(Thetas(pipe.velocity, None, fresh), batch) == 0


# ---------------------------------------------------------------------------------------------- interruptions
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(trained, monkeypatch):
    """A run that fails at once promises no checkpoint."""
    pipe, data, theta_1, folder = trained
    theta_2, rows = stage(pipe, data, CONFIG, folder / "new", PAPER, theta_1)
    theta_2.embeddings.Y.data.fill_(float("nan"))
    with pytest.raises(InputError, match="lower learning rate$"):
        next(rows)
    monkeypatch.setattr(learning, "SAVE_EVERY", 1)
    factors = iter((1.0, 1.0, float("nan")))
    spoiled = replace(PAPER, loss=lambda *step: (next(factors) * PAPER.loss(*step)[0], {}))
    with pytest.raises(InputError, match="not finite at step 3.*lower learning rate.*the last good state"):
        list(stage(pipe, data, CONFIG, folder, spoiled, theta_1)[1])
    lines = (folder / "stage2.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_another_runs_folder_is_refused(trained):
    pipe, data, theta_1, folder = trained
    for config, origin, differs in ((replace(CONFIG, seed=1), "", "seed is 0 there and 1 here"),
                                    (replace(CONFIG, steps=3), "", "steps is 4 there and 3 here"),
                                    (CONFIG, "other data", "other pictures")):
        with pytest.raises(InputError, match=f"holds another run .*{differs}"):
            list(stage(pipe, data, config, folder, LORA, origin=origin)[1])
    list(stage(pipe, data, CONFIG, folder, PAPER, theta_1)[1])
    with pytest.raises(InputError, match="holds another run"):
        list(stage(pipe, data, CONFIG, folder, replace(PAPER, loss=l_cc), theta_1)[1])


CHILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell's background jobs ignore it
from tests.test_train import learning, two_stages
learning.SAVE_EVERY = 3
for stage, _, row in two_stages(Path(sys.argv[1])):
    print(stage, row["step"], flush=True)
    sys.stdin.readline()                                         # a step is taken only when it is asked for
"""


def two_stages(folder):
    robot = load_concept(FOLDER / "checked_robot", "robot", 64)
    return learn(make_pipe(), robot, replace(CONFIG, steps=8), folder, PAPER)


def test_a_run_killed_at_random_steps_ends_where_an_uninterrupted_one_ends(tmp_path, monkeypatch):
    whole, cut, root, chance = tmp_path / "a", tmp_path / "b", Path(__file__).parent.parent, random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for sent in (signal.SIGKILL, signal.SIGINT):                 # after at most 12 of the 16 steps
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(cut)], cwd=root, env=environment,
                                 text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(chance.randint(4, 6)):
            assert child.stdout.readline()
            child.stdin.write("\n")
            child.stdin.flush()
        time.sleep(chance.random() * 0.02)                       # somewhere in the next step
        child.send_signal(sent)
        child.communicate()
        assert child.returncode != 0
    assert not (cut / "concept.safetensors").exists()
    monkeypatch.setattr(learning, "SAVE_EVERY", 3)
    assert len(list(two_stages(cut))) < len(list(two_stages(whole))) == 16
    for file in whole.iterdir():
        assert (cut / file.name).read_bytes() == file.read_bytes(), file.name
    lines = (cut / "stage2.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_where_it_stopped(pipe, robot, tmp_path, monkeypatch, name):
    """And the base model is never written."""
    monkeypatch.setattr(learning, "SAVE_EVERY", 1)
    before = tensor_hash(pipe.state_dict())
    method, scenes = METHODS[name], None
    if method.imagines:
        scenes = imagine(pipe, robot, PAIR_TEMPLATES, seed=0, count=2, steps=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rows = list(learn(pipe, robot, CONFIG, whole, method, imagined=scenes))
    for stopped_after in (2, 1):
        started = learn(pipe, robot, CONFIG, cut, method, imagined=scenes)
        for _ in range(stopped_after):
            next(started)
        started.close()
    assert len(list(learn(pipe, robot, CONFIG, cut, method, imagined=scenes))) < len(rows)
    assert (cut / "concept.safetensors").read_bytes() == (whole / "concept.safetensors").read_bytes()
    assert tensor_hash(pipe.state_dict()) == before


@pytest.mark.parametrize("name", ["lora", "paper"])
def test_a_finished_run_goes_on_to_more_steps(pipe, robot, tmp_path, name):
    """It was "another run", though what step k draws does not depend on how many there are."""
    for folder, steps in (("whole", (6,)), ("longer", (4, 6))):
        for count in steps:
            rows = list(learn(pipe, robot, replace(CONFIG, steps=count), tmp_path / folder, METHODS[name]))
    assert len(rows) == (2 if name == "lora" else 2 + 6)         # stage 2 begins anew behind a longer stage 1
    whole, longer = (tmp_path / folder / "concept.safetensors" for folder in ("whole", "longer"))
    assert whole.read_bytes() == longer.read_bytes()


def test_a_step_whose_gradients_are_too_large_is_left_out_and_counted(trained, monkeypatch):
    """One infinite gradient made every weight nan."""
    pipe, data, _, folder = trained
    monkeypatch.setattr(learning, "SCALE", 2.0**100)             # times such a loss it is no number of fp32
    large = replace(LORA, loss=lambda *step: (1e30 * l_cc(*step)[0], {}))
    theta, rows = stage(pipe, data, CONFIG, folder / "new", large)
    before = [parameter.clone() for parameter in theta.parameters()]
    assert next(rows)["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, theta.parameters()))


@pytest.mark.parametrize("scale, found", [(train.SCALE, True), (2**-12, False)])
def test_small_gradients_survive_in_fp16(pipe, robot, tmp_path, monkeypatch, scale, found):
    """Cards before Ampere compute in fp16, whose numbers end at 6e-8. The gradient of a mean over a picture's
    65,536 latents is as small; a scale of 2^-12 stands for it.
    """
    monkeypatch.setattr(learning, "SCALE", scale)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        pipe.mmdit.to(dtype)
        theta, rows = stage(pipe, encode(pipe, robot), replace(CONFIG, steps=1), tmp_path / str(dtype), LORA)
        list(rows)
        gradients.append(torch.cat([p.grad.flatten() for p in theta.parameters()]))
    exact, half = gradients
    assert ((half - exact).norm() < 0.02 * exact.norm()) == found

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

from purecc_min import train
from purecc_min.branch import Branch
from purecc_min.concept import ConceptSet
from purecc_min.train import TrainConfig, draw_batch, learn, prepare, stage_1, stage_1_losses, stage_2, stage_2_losses
from tinyflow.errors import InputError
from tinyflow.weights import tensor_hash

CONFIG = TrainConfig(steps=4, batch=2, rank=2, learning_rate=1e-2)


def run(rows):
    return list(rows)


@pytest.fixture
def trained(pipe, robot, tmp_path):
    """An extractor after a few steps, and what stage 2 needs."""
    data = prepare(pipe, robot)
    theta_1, rows = stage_1(pipe, data, CONFIG, tmp_path)
    run(rows)
    return pipe, data, theta_1.requires_grad_(False), tmp_path


def losses_of(trained, **changes):
    pipe, data, theta_1, _ = trained
    config = replace(CONFIG, **changes)
    theta_2 = Branch.fresh(pipe, theta_1.embeddings.Y.detach(), 2, torch.Generator().manual_seed(5))
    with torch.no_grad():
        for B in theta_2.lora.B.values():
            B.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    batch = draw_batch(data, config, 2, 0, pipe.shift)
    return stage_2_losses(pipe, theta_1, theta_2, data, batch, config), theta_2


def test_pictures_and_texts_are_paired_by_id(pipe, robot):
    """Cached latents once met the wrong captions after a shuffle (diffusers #14430): any order of references gives the same pairs."""
    changed = [replace(r, id=f"{n}.png", complete=f"a {colour} [V] robot", base=f"a {colour} robot", pictures=np.full_like(r.pictures, n))
               for n, (r, colour) in enumerate(zip(robot.references, ("red", "green", "blue", "pink")))]
    data, shuffled = (prepare(pipe, ConceptSet("robot", rows, [])) for rows in (changed, changed[::-1]))
    for n, id in enumerate(data.ids):
        m = shuffled.ids.index(id)
        assert torch.equal(data.x_0[n], pipe.encode_images([changed[n].picture])[0]) and id == changed[n].id
        assert torch.equal(data.x_0[n], shuffled.x_0[m]) and torch.equal(data.complete.context[n], shuffled.complete.context[m])
    assert data.fingerprint() != shuffled.fingerprint()


def test_texts_hold_the_slot_where_they_should(pipe, robot):
    data = prepare(pipe, robot)
    assert data.complete.slots.sum(1).tolist() == data.target.slots.sum(1).tolist() == [1] * 4
    assert not data.base.slots.any() and not data.null.slots.any() and data.class_text.slots.sum(1).tolist() == [1] * 4


def test_a_draw_depends_on_seed_stage_and_step_alone(pipe, robot):
    data = prepare(pipe, robot)
    draw = lambda seed, stage, step: draw_batch(data, replace(CONFIG, seed=seed), stage, step, 1.0).x_t
    assert torch.equal(draw(0, 1, 0), draw(0, 1, 0))
    others = [draw(0, 1, 1), draw(0, 2, 0), draw(1, 1, 0)]
    assert not any(torch.equal(draw(0, 1, 0), other) for other in others)


def test_the_base_is_never_written(pipe, robot, tmp_path):
    before = tensor_hash(pipe.state_dict())
    run(learn(pipe, robot, CONFIG, tmp_path))
    assert tensor_hash(pipe.state_dict()) == before


def test_stage_1_is_really_in_the_target_representation(trained):
    """The released code computes R(y_tar) with the extractor's adapter switched off; here it must matter."""
    pipe, data, theta_1, _ = trained
    with_it = losses_of(trained)[0]["norm_R_target"]
    for B in theta_1.lora.B.values():
        B.zero_()
    assert (losses_of(trained)[0]["norm_R_target"] - with_it).abs() > 1e-4


def test_stage_2_never_moves_the_extractor(trained):
    pipe, data, theta_1, folder = trained
    before = tensor_hash(theta_1.state_dict())
    theta_2, rows = stage_2(pipe, theta_1, data, CONFIG, folder)
    assert torch.equal(theta_2.embeddings.Y, theta_1.embeddings.Y) and all(B.abs().max() == 0 for B in theta_2.lora.B.values())
    run(rows)
    assert tensor_hash(theta_1.state_dict()) == before and not torch.equal(theta_2.embeddings.Y, theta_1.embeddings.Y)


def test_without_eta_the_loss_is_plain_LoRA_on_the_same_draws(trained):
    plain, pure = losses_of(trained, eta=0.0)[0], losses_of(trained, eta=2.0)[0]
    torch.testing.assert_close(plain["loss"], pure["loss_cc"])
    torch.testing.assert_close(pure["loss"], pure["loss_cc"] + 2.0 * pure["loss_purecc"])


def test_detaching_v_original_changes_the_gradient_and_nothing_else(trained):
    (detached, theta_a), (attached, theta_b) = losses_of(trained), losses_of(trained, detach=False)
    for name in detached:
        torch.testing.assert_close(detached[name], attached[name], rtol=1e-4, atol=1e-5)
    gradients = []
    for losses, theta in ((detached, theta_a), (attached, theta_b)):
        losses["loss_purecc"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in theta.lora.parameters()]))
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[0].norm()


def test_v_original_from_the_base_ignores_theta_2(trained):
    from_model, from_base = losses_of(trained)[0], losses_of(trained, original="base")[0]
    assert (from_model["norm_R_complete"] - from_base["norm_R_complete"]).abs() > 1e-3
    torch.testing.assert_close(from_model["loss_cc"], from_base["loss_cc"])


def test_a_constant_lambda_is_used(trained):
    assert losses_of(trained, fixed_lambda=3.0)[0]["lambda"] == 3.0


def test_training_lowers_the_loss_on_draws_it_never_saw(pipe, robot, tmp_path):
    data, config = prepare(pipe, robot), replace(CONFIG, steps=60, batch=4)
    theta_1, rows = stage_1(pipe, data, config, tmp_path)
    unseen = [draw_batch(data, config, 9, n, pipe.shift) for n in range(10)]
    loss = lambda: np.mean([stage_1_losses(pipe, theta_1, data, batch)["loss"].item() for batch in unseen])
    before = loss()
    run(rows)
    assert loss() < 0.95 * before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(trained, monkeypatch):
    pipe, data, theta_1, folder = trained
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    theta_2, rows = stage_2(pipe, theta_1, data, CONFIG, folder)
    next(rows), next(rows)
    good = (folder / "stage2.safetensors").read_bytes()
    with torch.no_grad():
        theta_2.embeddings.Y.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite at step 3.*lower learning rate"):
        next(rows)
    assert (folder / "stage2.safetensors").read_bytes() == good


def test_another_runs_folder_is_refused(trained):
    pipe, data, theta_1, folder = trained
    for other_data, other_config in ((data, replace(CONFIG, seed=1)), (data._replace(variants=data.variants + 1), CONFIG)):
        with pytest.raises(InputError, match="holds another run"):
            run(stage_1(pipe, other_data, other_config, folder)[1])


CHILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell's background jobs inherit it ignored
from purecc_min import train
from purecc_min.concept import load_concept
from purecc_min.toy import FOLDER
from tests.conftest import make_pipe
train.SAVE_EVERY = 3
config = train.TrainConfig(steps=20, batch=2, rank=2, learning_rate=1e-2)
for stage, row in train.learn(make_pipe(), load_concept(FOLDER / "striped_robot", "robot", 32), config, Path(sys.argv[1])):
    print(stage, row["step"], flush=True)
    sys.stdin.readline()                                         # a step is taken only when it is asked for
"""


def start_child(folder):
    root = Path(__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_at_random_steps_ends_where_an_uninterrupted_one_ends(tmp_path, sent):
    whole = start_child(tmp_path / "whole")
    assert whole.communicate()[0].count("\n") == 40 and whole.returncode == 0
    chance = random.Random(int(sent))
    for _ in range(3):                                           # at most 36 of the 40 steps
        child = start_child(tmp_path / "cut")
        for _ in range(chance.randint(4, 11)):
            child.stdout.readline()
            child.stdin.write("\n")
            child.stdin.flush()
        time.sleep(chance.random() * 0.02)                       # somewhere in the next step
        child.send_signal(sent)
        child.communicate()
        assert child.returncode != 0
    assert not (tmp_path / "cut" / "concept.safetensors").exists()
    last = start_child(tmp_path / "cut")
    assert last.communicate()[0].count("\n") < 40 and last.returncode == 0
    for name in ("concept.safetensors", "stage1.safetensors", "stage2.safetensors", "stage1.jsonl", "stage2.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [json.loads(line)["step"] for line in (tmp_path / "cut" / "stage2.jsonl").read_text().splitlines()] == list(range(1, 21))


@pytest.mark.parametrize("changes, message", [(dict(original="nothing"), "'model' or 'base'"), (dict(batch=0), "batch is 0")])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)

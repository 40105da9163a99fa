import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.picturebook import pretrain as module
from tinyflow.picturebook.pretrain import PretrainConfig, learning_rate, pretrain
from tinyflow.weights import load_tensors

CONFIG = PretrainConfig(steps=6, batch=4, pictures=12, warmup=2)
ROOT = Path(__file__).parent.parent
SMALL = """
import sys
from tests.conftest import make_pipe
from tinyflow.picturebook import pretrain as module
module.make_tiny = lambda: make_pipe().requires_grad_(True)
module.sample_grid = lambda pipe: module.Image.new("RGB", (8, 8))
module.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small model, and no sample grids: they would take longer than the training."""
    monkeypatch.setattr(module, "make_tiny", lambda: make_pipe().requires_grad_(True))
    monkeypatch.setattr(module, "sample_grid", lambda pipe: module.Image.new("RGB", (8, 8)))


def test_an_interrupted_pretraining_ends_bitwise_like_a_whole_one(tmp_path):
    whole = [loss for _, loss in pretrain(CONFIG, tmp_path / "whole", "cpu", save_every=2)]
    rows = pretrain(CONFIG, tmp_path / "cut", "cpu", save_every=2)
    cut = [next(rows)[1] for _ in range(5)]      # the fifth step is lost: the last checkpoint is of step 4
    cut = cut[:4] + [loss for _, loss in pretrain(CONFIG, tmp_path / "cut", "cpu", save_every=2)]
    assert cut == whole and len(whole) == 6
    one, _ = load_tensors(tmp_path / "whole" / "base.safetensors", "tinyflow base")
    other, _ = load_tensors(tmp_path / "cut" / "base.safetensors", "tinyflow base")
    assert all(torch.equal(one[name], other[name]) for name in one)
    log = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6]


def test_another_configuration_is_refused(tmp_path):
    list(pretrain(CONFIG, tmp_path, "cpu"))
    with pytest.raises(InputError, match="another configuration"):
        list(pretrain(PretrainConfig(steps=6, batch=2, pictures=12, warmup=2), tmp_path, "cpu"))


def test_the_average_is_what_is_kept(tmp_path):
    list(pretrain(CONFIG, tmp_path, "cpu"))
    checkpoint, _ = load_tensors(tmp_path / "checkpoint.safetensors", "tinyflow pretraining checkpoint")
    base, facts = load_tensors(tmp_path / "base.safetensors", "tinyflow base")
    name = "mmdit.final_linear.weight"
    assert torch.equal(base[name], checkpoint[f"average.{name}"].half())
    assert not torch.equal(base[name], checkpoint[f"model.{name}"].half())
    assert facts["config"]["steps"] == 6 and "seconds" in facts


def test_the_learning_rate_warms_up_and_decays():
    config = PretrainConfig(steps=100, warmup=10)
    rates = [learning_rate(k, config) for k in range(100)]
    assert rates[0] < rates[9] == max(rates) == config.learning_rate
    assert rates[99] < 0.03 * config.learning_rate


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """torchrun splits each batch; the averaged gradients are those of one process (up to bf16 rounding)."""
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    arguments = ["--steps", "5", "--batch", "4", "--pictures", "12", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(script), *arguments, "--out", str(tmp_path / "one")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
           str(script), *arguments, "--out", str(tmp_path / "two")]
    for command in (one, two):
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    a, b = (load_tensors(tmp_path / name / "checkpoint.safetensors", "tinyflow pretraining checkpoint")[0]
            for name in ("one", "two"))
    for name in a:
        if name.endswith("exp_avg") and a[name].norm() > 1e-4:   # the running mean of the gradients
            assert (a[name] - b[name]).norm() < 0.05 * a[name].norm(), name

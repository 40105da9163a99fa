import errno
import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import make_pipe
from tinyflow import files
from tinyflow.checkpoints import read_log
from tinyflow.errors import InputError
from tinyflow.weights import load_into, load_tensors, save_tensors, tensor_hash

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}


@pytest.fixture
def file(tmp_path):
    save_tensors(tmp_path / "x.safetensors", "concept", TENSORS, {"seed": 3})
    return tmp_path / "x.safetensors"


def refused(path, message, kind="concept"):
    with pytest.raises(InputError, match=message) as caught:
        load_tensors(path, kind)
    assert "\n" not in str(caught.value)


def test_missing_foreign_and_misused_files(file, tmp_path):
    refused(tmp_path / "none.safetensors", "no such file")
    refused(file, "file of kind tinyflow base; its kind is: concept", kind="tinyflow base")
    save_file(TENSORS, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "foreign.safetensors", "nothing of ours")
    (tmp_path / "page.safetensors").write_text("<!doctype html><html>")
    refused(tmp_path / "page.safetensors", "not a readable safetensors file")


def test_random_damage_is_always_one_clear_line(file):
    good, chance = file.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        if chance.random() < 0.4:
            data = data[:chance.randrange(len(data))]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            tensors, facts = load_tensors(file, "concept")
        except InputError as error:
            assert "\n" not in str(error)
        else:                                    # a bit that carries nothing, such as the header's padding
            assert facts == {"seed": 3} and tensor_hash(tensors) == tensor_hash(TENSORS)


def test_tensors_that_do_not_fit_are_listed():
    model = make_pipe().mmdit
    tensors = dict(model.state_dict())
    tensors["surplus"] = tensors.pop("final_linear.bias")
    tensors["final_linear.weight"] = torch.zeros(1, 2)
    message = (r"here: .*final_linear.weight is \(1, 2\), not \(64, 32\); "
               "missing final_linear.bias; unexpected surplus")
    with pytest.raises(InputError, match=message):
        load_into(model, tensors, "here")


@pytest.mark.parametrize("step, number", [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_file_is_replaced_whole_or_not_at_all(file, monkeypatch, step, number):
    """A full disk, or whatever happens before the rename, leaves the old file."""
    before = file.read_bytes()

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, step, fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        save_tensors(file, "concept", {"a": torch.zeros(9)}, {})
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_numbers_that_are_not_finite_are_neither_written_nor_read(file, monkeypatch):
    nan = {"a": torch.tensor([1.0, torch.nan])}
    with pytest.raises(InputError, match="a holds numbers that are not finite; nothing was saved"):
        save_tensors(file, "concept", nan, {})
    monkeypatch.setattr("tinyflow.weights.check_finite", lambda *_: None)
    save_tensors(file, "concept", nan, {})
    monkeypatch.undo()
    refused(file, "a holds numbers that are not finite")


def test_a_long_runs_log_is_read_whatever_its_size(tmp_path):
    """A caption of 10 MB cannot be right; the log of 50,000 steps is as large."""
    row = json.dumps({"step": 1} | {f"term {n}": n / 7 for n in range(40)})
    (tmp_path / "log.jsonl").write_text("\n".join([row] * 11_000))
    assert len(read_log(tmp_path / "log.jsonl")) == 11_000

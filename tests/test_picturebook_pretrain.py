import json
from dataclasses import replace

import pytest
import torch

from tinyflow.errors import InputError
from tinyflow.mmdit import MMDiTConfig
from tinyflow.picturebook import pretrain as module
from tinyflow.picturebook.model import make_tiny
from tinyflow.picturebook.pretrain import BASE, Pretraining
from tinyflow.picturebook.training import train
from tinyflow.weights import load_tensors, save_tensors, tensor_hash

CONFIG = replace(BASE, steps=6, batch=4, pictures=16, warmup=2)


def make_pipe():
    """A small model, with no gate left at zero."""
    torch.manual_seed(0)
    config = MMDiTConfig(16, 2, width=32, depth=3, heads=2, context_width=16, pooled_width=16)
    pipe = make_tiny(config)
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe.requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """No pages of samples: they would take longer than the training."""
    monkeypatch.setattr(module, "sample_page", lambda pipe: module.Image.new("RGB", (8, 8)))


def start(out, config=CONFIG):
    return Pretraining(config, make_pipe().requires_grad_(True), out)


def test_an_interrupted_pretraining_ends_bitwise_like_a_whole_one(tmp_path):
    whole = [loss for _, loss in train(start(tmp_path / "whole"), tmp_path / "whole", 2)]
    rows = train(start(tmp_path / "cut"), tmp_path / "cut", 2)
    cut = [next(rows)[1] for _ in range(5)]      # the fifth step is lost: the last checkpoint is of step 4
    cut = cut[:4] + [loss for _, loss in train(start(tmp_path / "cut"), tmp_path / "cut", 2)]
    assert cut == whole and len(whole) == 6
    one, _ = load_tensors(tmp_path / "whole" / "base.safetensors", "tinyflow base")
    other, _ = load_tensors(tmp_path / "cut" / "base.safetensors", "tinyflow base")
    assert all(torch.equal(one[name], other[name]) for name in one)
    log = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6]


def test_another_configuration_is_refused(tmp_path):
    list(train(start(tmp_path), tmp_path, 6))
    with pytest.raises(InputError, match="another configuration"):
        list(train(start(tmp_path, replace(CONFIG, batch=2)), tmp_path, 6))


def test_the_average_is_what_is_kept_and_the_codec_is_not_trained(tmp_path):
    training = start(tmp_path)
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
    training = start(tmp_path)
    file = tmp_path / "latents.safetensors"
    written = file.stat().st_mtime_ns
    again = start(tmp_path)
    assert file.stat().st_mtime_ns == written and torch.equal(training.latents, again.latents)
    pictures, _ = module.render_all(training.scenes[3:4])
    x_0 = training.codec.encode(module.to_pixels(pictures))
    assert torch.allclose(training.latents[3].float(), x_0[0], atol=2e-3)
    other = start(tmp_path, replace(CONFIG, seed=2))             # other pictures: the file is made anew
    assert not torch.equal(other.latents, again.latents)


def test_batches_that_other_processes_make_ahead_are_the_same(tmp_path):
    training = start(tmp_path)
    loader = module.DataLoader(training, None, sampler=range(2, 5), **module.AHEAD)
    for k, ahead in enumerate(loader, start=2):
        here = training[k]
        assert all(torch.equal(a, b) for a, b in zip(ahead[:3], here[:3])) and list(ahead[3]) == here[3]


def test_a_stage_goes_on_from_others_weights_and_a_wrong_start_is_one_line(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "start.safetensors"
    pipe = make_pipe()
    codec = pipe.codec
    del pipe.codec
    save_tensors(weights, "tinyflow base", pipe.state_dict(), {})
    pipe.codec = codec
    monkeypatch.setattr(module, "make_tiny", make_pipe)
    begun = module.begin(weights, None, 1)
    assert torch.equal(begun.mmdit.final_linear.weight, pipe.mmdit.final_linear.weight)
    assert all(p.requires_grad for p in begun.mmdit.parameters())
    with pytest.raises(SystemExit) as caught:
        module.main(["--out", str(tmp_path / "x"), "--start", str(tmp_path / "none.safetensors")])
    assert caught.value.code == 2 and "there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

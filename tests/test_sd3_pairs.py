"""`learn` with each bound method on small public weights, to its very end; imagined scenes; then `sample`."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from purecc_min import pairs
from purecc_min.__main__ import main
from purecc_min.commands import learn as commands_learn
from purecc_min.registry import METHODS
from tests.test_commands import fails
from tests.test_sd3_learning import PUBLIC, ROBOT
from tinyflow.pipeline import Pipeline
from tinyflow.weights import load_tensors

METHOD_NAMES = [name for name, method in METHODS.items() if method.where == "phrase"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Four scenes and three steps a picture: these tests are about the commands, not about pictures."""
    sample = Pipeline.sample

    def quickly(pipe, text, seeds, steps=28, *others, **named):
        return sample(pipe, text, seeds, min(steps, 3), *others, **named)

    monkeypatch.setattr(Pipeline, "sample", quickly)
    monkeypatch.setattr(pairs.imagine, "__defaults__", (4, *pairs.imagine.__defaults__[1:]))


def command(folder, out, method) -> list[str]:
    return ["learn", str(ROBOT), "--weights", str(folder), "--out", str(out), "--method", method,
            "--learning-rate", "0.5", *PUBLIC]


def picture_of(out, concept, prompt, folder) -> bytes:
    main(["sample", str(concept), prompt, "--number", "1", "--steps", "2", "--weights", str(folder),
          "--device", "cpu", "--out", str(out)])
    return out.read_bytes()


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_bound_method_learns_and_its_concept_is_sampled(name, sd3, tmp_path, capsys):
    """Adapters at the phrase alone, no Y; braces reach the picture, and bad ones are one line."""
    method, out = METHODS[name], tmp_path / "run"
    main(command(sd3[0], out, name))
    tensors, facts = load_tensors(out / "concept.safetensors", "concept")
    assert (facts["method"], facts["where"], facts["base"]) == (name, "phrase", "sd3.5-medium")
    assert len(tensors) == 2 * 2 * 3 and all(tensor.abs().max() > 0 for tensor in tensors.values())
    last = "stage2" if method.extractor else "stage1"
    rows = [json.loads(line) for line in (out / f"{last}.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and (out / "comparison.png").exists()
    assert (out / "stage2.jsonl").exists() == (method.extractor is not None)
    for file in ("imagined.png", "imagined.safetensors"):
        assert (out / file).exists() == method.imagines
    if method.imagines:
        scenes, facts = load_tensors(out / "imagined.safetensors", "imagined scenes")
        assert scenes["x_0"].shape == (4, 16, 8, 8) and facts["templates"] == pairs.ON_PUBLIC_WEIGHTS
        assert Image.open(out / "imagined.png").width > 4 * 64
        assert re.search(f"4 scenes; .*{out}/imagined.png", capsys.readouterr().out)

    concept, prompt = out / "concept.safetensors", "a big [V] robot and a robot"
    named, in_braces = (picture_of(tmp_path / f"{n}.png", concept, text, sd3[0])
                        for n, text in enumerate((prompt, "{a big [V] robot and} a robot")))
    assert named != in_braces
    line = fails(capsys, "sample", concept, "a {[V] robot", "--weights", sd3[0], "--out", tmp_path / "no.png")
    assert "the braces in 'a {[V] robot' do not enclose one placeholder each" in line


def test_bound_pairs_that_was_stopped_twice_ends_bitwise_where_a_whole_run_does(sd3, tmp_path, capsys,
                                                                                monkeypatch):
    """Once in either stage; the scenes are those that were imagined before."""
    monkeypatch.setattr("purecc_min.learning.SAVE_EVERY", 1)
    draw_sheet, runs = commands_learn.draw_sheet, [tmp_path / "whole", tmp_path / "stopped"]
    whole, stopped = ([*command(sd3[0], run, "bound-pairs"), "--samples-every", "1"] for run in runs)
    main(whole)
    for stage in (1, 2):
        def stop(pipe, concept, drawn, texts, file, *others):
            if list(drawn) == [f"stage {stage}, step 2"]:
                raise KeyboardInterrupt
            draw_sheet(pipe, concept, drawn, texts, file, *others)

        with monkeypatch.context() as context, pytest.raises(SystemExit) as caught:
            context.setattr(commands_learn, "draw_sheet", stop)
            main(stopped)
        assert caught.value.code == 130 and not (runs[1] / "concept.safetensors").exists()
        monkeypatch.setattr(pairs, "imagine", None)              # it is not called again
    main(stopped)
    assert "bound-pairs: going on from step 3" in capsys.readouterr().out
    for name, kind in (("concept", "concept"), ("imagined", "imagined scenes")):
        (expected, facts), (resumed, same) = (load_tensors(run / f"{name}.safetensors", kind) for run in runs)
        assert expected.keys() == resumed.keys() and facts == same
        assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.parametrize("name", ["bound-half", "bound-pairs"])
def test_a_style_has_no_halves_and_is_refused_before_anything_loads(name, sd3, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands_learn, "open_base_model", None)
    monkeypatch.setattr(commands_learn, "plan", None)
    photos = shutil.copytree(ROBOT, tmp_path / "photos")
    for file in photos.glob("*.txt"):
        file.write_text("a dog on the beach, in [V] style")
    learn = command(sd3[0], tmp_path / "run", name)
    line = fails(capsys, "learn", photos, *learn[2:], "--class-word", "style")
    assert "--class-word style: a style fills the whole picture" in line and "--method bound" in line
    assert not (tmp_path / "run").exists()

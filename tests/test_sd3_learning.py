"""`learn` and `sample` on a small random model in the layout of the public weights."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from purecc_min import pairs
from purecc_min.__main__ import main
from purecc_min.commands import learn as commands_learn
from purecc_min.commands.base_models import half_precision, open_base_model
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode
from purecc_min.learning import stage
from purecc_min.measure.toy import FOLDER
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig
from tests.test_commands import fails
from tinyflow.pipeline import Pipeline
from tinyflow.sd3.load import load_sd3
from tinyflow.weights import load_tensors, save_tensors, tensor_hash

ROBOT = FOLDER / "checked_robot"
PUBLIC = ["--base", "sd3.5-medium", "--size", "64", "--steps", "2", "--device", "cpu",
          "--class-word", "robot", "--learning-rate", "0.5"]
BOUND = [name for name, method in METHODS.items() if method.where == "phrase"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Four scenes and three steps a picture: these tests are about the commands, not about pictures."""
    sample = Pipeline.sample

    def quickly(pipe, text, seeds, steps=28, *others, **named):
        return sample(pipe, text, seeds, min(steps, 3), *others, **named)

    monkeypatch.setattr(Pipeline, "sample", quickly)
    monkeypatch.setattr(pairs.imagine, "__defaults__", (4, *pairs.imagine.__defaults__[1:]))


@pytest.fixture
def command(sd3, tmp_path) -> list[str]:
    return ["learn", str(ROBOT), "--weights", str(sd3[0]), "--out", str(tmp_path / "run"), *PUBLIC]


def sampled(out, concept, prompt, folder) -> bytes:
    main(["sample", str(concept), prompt, "--number", "1", "--steps", "2", "--weights", str(folder),
          "--device", "cpu", "--out", str(out)])
    return out.with_name(f"{out.stem}-seed0.png").read_bytes()   # the sheet shows the prompt, too


@pytest.mark.parametrize("name", [None, *BOUND])
def test_a_concept_is_learned_and_sampled_by_the_same_commands(name, command, sd3, tmp_path, capsys,
                                                               monkeypatch):
    """By default and by each bound method: adapters at the phrase alone, no Y; braces reach the picture."""
    method, out = METHODS[name or "paper"], tmp_path / "run"
    if name:                                     # counting memory takes longer than the training
        monkeypatch.setattr(commands_learn, "plan", lambda *_: name == "bound")
    learn, checkpointing = commands_learn.learn, []
    monkeypatch.setattr(commands_learn, "learn", lambda pipe, *others, **named: checkpointing.append(
        pipe.mmdit.checkpointing) or learn(pipe, *others, **named))
    main([*command, *(["--method", name] if name else [])])
    assert checkpointing == [name == "bound"]    # it is on where the plan says so
    tensors, facts = load_tensors(out / "concept.safetensors", "concept")
    assert (facts["method"], facts["where"]) == (method.name, method.where)
    assert (facts["base"], facts["size"], facts["config"]["batch"]) == ("sd3.5-medium", 64, 2)
    if name:
        assert len(tensors) == 2 * 2 * 3 and all(tensor.abs().max() > 0 for tensor in tensors.values())
    rows = [json.loads(line) for line in (out / f"stage{method.stages}.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and (out / "comparison.png").exists()
    assert (out / "stage2.jsonl").exists() == (method.extractor is not None)
    for file in ("imagined.png", "imagined.safetensors"):
        assert (out / file).exists() == method.imagines
    if method.imagines:
        scenes, facts = load_tensors(out / "imagined.safetensors", "imagined scenes")
        assert scenes["x_0"].shape == (4, 16, 8, 8) and facts["templates"] == pairs.ON_PUBLIC_WEIGHTS
        assert Image.open(out / "imagined.png").width > 4 * 64
        assert re.search(f"4 scenes; .*{out}/imagined.png", capsys.readouterr().out)

    concept, prompts = out / "concept.safetensors", ["a big [V] robot and a robot"] * 2
    prompts.append("{a big [V] robot and} a robot")
    one, again, in_braces = (sampled(tmp_path / f"{n}.png", concept, text, sd3[0])
                             for n, text in enumerate(prompts))
    assert one == again and (one != in_braces) == bool(name)
    for prompt, message in (("a {[V] robot", "the braces in 'a {[V] robot' do not"), ("a[V]robot", "glued")):
        assert message in fails(capsys, "sample", concept, prompt, "--weights", sd3[0])


def test_a_run_that_was_stopped_twice_ends_bitwise_like_a_whole_one(command, tmp_path, capsys, monkeypatch):
    """Once in either stage; the scenes are those that were imagined before."""
    monkeypatch.setattr("purecc_min.learning.SAVE_EVERY", 1)
    monkeypatch.setattr(commands_learn, "plan", lambda *_: False)
    draw_sheet, runs = commands_learn.draw_sheet, [tmp_path / "whole", tmp_path / "stopped"]
    options = ["--method", "bound-pairs", "--samples-every", "1"]
    whole, stopped = ([*command, *options, "--out", str(run)] for run in runs)
    main(whole)
    for number in (1, 2):
        def stop(pipe, concept, drawn, texts, file, *others):
            if list(drawn) == [f"stage {number}, step 2"]:
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
        assert tensor_hash(expected) == tensor_hash(resumed) and facts == same


# -------------------------------------------------------------------------------- before anything is loaded
@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of references. 16 GB of weights were once read before an error in it was told."""
    monkeypatch.setattr(commands_learn, "open_base_model", None)
    return shutil.copytree(ROBOT, tmp_path / "photos")


def test_the_plan_is_printed_before_anything_is_loaded(photos, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("purecc_min.commands.memory.free_memory", lambda device: 10**8)
    line = fails(capsys, *command)
    assert "stage 2 at 64 px, batch 2 needs" in line and "the card has 0.1 GB" in line
    assert not (tmp_path / "run").exists()


def test_a_text_that_cannot_be_encoded_is_refused(photos, command, capsys):
    (photos / "2.txt").write_text("a [V]robot in the desert")
    assert "2.png: the placeholder '[V]' is glued" in fails(capsys, "learn", photos, *command[2:])


@pytest.mark.parametrize("name", ["bound-half", "bound-pairs"])
def test_a_style_has_no_halves_and_is_refused(name, photos, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands_learn, "plan", None)
    for file in photos.glob("*.txt"):
        file.write_text("a dog on the beach, in [V] style")
    line = fails(capsys, "learn", photos, *command[2:], "--method", name, "--class-word", "style")
    assert "--class-word style: a style fills the whole picture" in line and "--method bound" in line
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_one_line(command, tmp_path, capsys):
    concept, tiny = tmp_path / "concept.safetensors", tmp_path / "tiny.safetensors"
    facts = {"rank": 4, "class_word": "robot"}
    save_tensors(tiny, "concept", {"embeddings.Y": torch.zeros(6, 128)}, facts)
    save_tensors(concept, "concept", {"embeddings.Y": torch.zeros(3, 32)},
                 facts | {"base": "sd3.5-medium", "size": 64})
    assert "--weights DIR" in fails(capsys, "learn", ROBOT, *PUBLIC)
    assert "--weights DIR" in fails(capsys, "sample", concept, "a [V] robot")
    assert "leave them out" in fails(capsys, "learn", ROBOT, "--class-word", "robot", *command[2:4])
    assert "64 px only" in fails(capsys, "learn", ROBOT, "--class-word", "robot", "--size", "32")
    absent = "mps" if torch.cuda.is_available() else "cuda"      # the plan once asked it for its memory
    assert f"--device {absent}: torch can use none" in fails(capsys, *command, "--device", absent)
    assert "multiple of 16, for example 64" in fails(capsys, *command, "--size", "72")
    assert "learned on the tiny base" in fails(capsys, "export", tiny)


# ------------------------------------------------------------------------------------- precision and memory
def test_bf16_weights_are_trained_with_fp32_adapters(sd3, tmp_path):
    pipe = open_base_model("sd3.5-medium", sd3[0], None, 64, torch.device("cpu"))
    before, data = tensor_hash(pipe.mmdit.state_dict()), encode(pipe, load_concept(ROBOT, "robot", 64))
    theta, rows = stage(pipe, data, TrainConfig(steps=2, batch=2), tmp_path, METHODS["lora"])
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert {p.dtype for p in pipe.mmdit.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in theta.parameters()} == {torch.float32}
    assert pipe.velocity(data.x_0, torch.full((4,), 0.5), data.texts.complete).dtype == torch.float32
    assert tensor_hash(pipe.mmdit.state_dict()) == before


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_cards_without_bf16_compute_in_fp16(sd3, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_precision(torch.device("cuda")) == dtype
    assert half_precision(torch.device("cpu")) == torch.bfloat16
    assert load_sd3(sd3[0], size=64, dtype=dtype).mmdit.final_linear.weight.dtype == dtype

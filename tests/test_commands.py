"""The commands end to end, on a toy budget, as a user runs them."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from purecc_min.__main__ import main
from purecc_min.benchmark.entries import MAIN
from purecc_min.benchmark.entries import as_sampled as as_tabled
from purecc_min.branch import Branch, Thetas
from purecc_min.commands import demo
from purecc_min.commands.options import build_parser
from purecc_min.concept_file import load_branch
from purecc_min.measure.draw import draw
from purecc_min.measure.measures import in_words
from purecc_min.measure.toy import CONCEPTS, FOLDER
from purecc_min.registry import METHODS, as_sampled
from purecc_min.sheets import draw_sheet, unseen_texts
from tinyflow.device import choose_device
from tinyflow.picturebook.model import load_tiny
from tinyflow.pipeline import Pipeline, to_pictures
from tinyflow.sheet import GAP, MARGIN
from tinyflow.weights import load_tensors

ROOT = Path(__file__).parent.parent
LEARN = ["learn", FOLDER / "checked_robot", "--class-word", "robot", "--method", "bound", "--out"]
BUDGET = ["--steps", "2", "--batch", "1", "--device", "cpu"]


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and error[-1].startswith("error: "), error
    return error[-1]


@pytest.fixture(scope="module", autouse=True)
def few_sampling_steps(few_pictures):
    sample = Pipeline.sample.__wrapped__         # behind torch.no_grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "__defaults__", (3, *sample.__defaults__[1:]))
        patch.setattr(demo, "FEW_STEPS", 1)
        yield


def test_a_learned_concept_can_be_moved_and_says_what_it_is(tmp_path, capsys):
    out, moved = tmp_path / "out", tmp_path / "mine.safetensors"
    main([*map(str, LEARN), str(out), *BUDGET])
    said = capsys.readouterr().out
    assert f"learned: {out}/concept.safetensors" in said and "| similarity ↑ |" in said
    (out / "concept.safetensors").rename(moved)
    _, facts = load_tensors(moved, "concept")
    assert facts.items() >= dict(class_word="robot", token="[V]", base="tiny", method="bound").items()
    assert facts["config"]["steps"] == 2 and facts["versions"]["torch"]
    assert moved.stat().st_size < 1_000_000
    assert sampled(tmp_path / "s.png", moved, "a [V] robot on the beach").std() > 5


def test_a_full_disk_is_one_line_and_leaves_no_claim(tmp_path, capsys, monkeypatch):
    """run.json was once left, and the corrected command was "another run"."""
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/stage1.safetensors")

    monkeypatch.setattr("purecc_min.learning.save_checkpoint", full)
    assert "no space left" in fails(capsys, *LEARN, tmp_path / "x", *BUDGET)
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_exhausted_memory_is_one_line_and_a_bug_keeps_its_traceback(error, tmp_path, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(Pipeline, "sample", exhausted)
    concept = make_concept(tmp_path / "c.safetensors", "robot")
    command = ["sample", str(concept), "a [V] robot", "--device", "cpu"]
    assert "out of memory; choose a smaller" in fails(capsys, *command)
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        main(command)


def test_every_option_is_explained_and_every_word_listed(capsys):
    for name, parser in build_parser("")._subparsers._group_actions[0].choices.items():
        assert all(action.help for action in parser._actions), name
    main(["words"])
    listed = set(re.findall(r"[a-z]+", capsys.readouterr().out))
    assert set(load_tiny().tokenizer.ids) <= listed


def test_nothing_is_pickled():
    for file in [*ROOT.glob("tinyflow/**/*.py"), *ROOT.glob("purecc_min/**/*.py")]:
        assert not re.search(r"import pickle|allow_pickle|torch\.(save|load)\(", file.read_text()), file


def sampled(out, *arguments) -> np.ndarray:
    out.unlink(missing_ok=True)                  # otherwise the next sheet gets another name
    main(["sample", *map(str, arguments), "--number", "1", "--device", "cpu", "--out", str(out)])
    return np.asarray(Image.open(out)).astype(int)


def alike(a, b) -> bool:
    """Batches of other sizes round otherwise, which can move a pixel by a shade."""
    return np.abs(a - b).mean() < 0.1


def make_concept(file, class_word, where="everywhere", seed=0, std=0.1, **facts):
    """A concept that has learned nothing sensible, and much of it."""
    pipe, generator = load_tiny(), torch.Generator().manual_seed(seed)
    Y = None if where == "phrase" else torch.randn(6, 128, generator=generator)
    theta = Branch.fresh(pipe, Y, 2, generator, where)
    with torch.no_grad():
        for B in theta.lora.B.values():
            B.normal_(std=std, generator=generator)
    theta.save(file, {"class_word": class_word, "rank": 2, "base": "tiny", "size": 64, **facts})
    return file


def test_a_file_says_that_it_wants_to_be_switched_off(tmp_path):
    out, adapted = tmp_path / "s.png", ("--empty-text", "adapted")       # in vain if the file wants otherwise
    lora, bound = (make_concept(tmp_path / word, word, where, seed)
                   for seed, (word, where) in enumerate((("robot", "everywhere"), ("cat", "phrase"))))
    switched = make_concept(tmp_path / "switched", "robot", method="switched-off")
    prompt = "a [V] robot on the beach"
    on, off = (sampled(out, concept, prompt, *adapted) for concept in (lora, switched))
    asked = sampled(out, lora, prompt, *adapted, "--only-with-token")
    assert alike(off, asked) and not alike(on, asked)

    prompt = "a [V1] robot on the left and a [V2] cat"        # once it had to be so for all concepts
    on, off = (sampled(out, concept, bound, prompt, *adapted) for concept in (lora, switched))
    with_base = sampled(out, lora, bound, prompt)
    assert alike(off, with_base) and not alike(on, with_base)
    both = [lora, switched, "a [V1] robot and a [V2] robot", *adapted]   # one stays on
    assert not alike(sampled(out, *both), sampled(out, *both, "--only-with-token"))


def test_braces_styles_and_two_concepts_in_a_prompt(tmp_path, capsys):
    robot, cat, style, other = (make_concept(tmp_path / f"{seed}", word, "phrase", seed)
                                for seed, word in enumerate(("robot", "cat", "a", "a")))

    def drawn(*arguments):                       # without the prompt, which stands beside the picture
        return sampled(tmp_path / "s.png", *arguments)[-130:, -130:]

    text = drawn(robot, "a [V] robot on the left and a robot")
    assert np.array_equal(text, drawn(robot, "a {[V] robot on the left} and a robot"))
    assert not np.array_equal(text, drawn(robot, "a {[V] robot on the left and a robot}"))
    both = "[V2] small [V1] robot"
    assert not np.array_equal(drawn(robot, style, both), drawn(robot, other, both))
    both = "a [V1] robot in the snow [V2] cat"
    assert not alike(drawn(robot, cat, both), drawn(robot, robot, both))
    public = make_concept(tmp_path / "public", "cat", base="sd3.5-medium", size=512)
    for message, *arguments in (("braces in", robot, "a {[V] robot"),
                                ("two styles", style, style, "[V1] small [V2] robot"),
                                ("has no [V2], which is the concept of", robot, cat, "a [V1] robot"),
                                ("has no [V1]", robot, cat, "a [V] robot [V2] cat"),
                                ("they cannot be combined", robot, public, both)):
        assert message in fails(capsys, "sample", *arguments)


def test_a_sheet_is_never_overwritten_and_single_pictures_lie_beside_it(tmp_path, capsys):
    concept, out = make_concept(tmp_path / "c.safetensors", "robot"), tmp_path / "s.png"
    for _ in range(2):
        main(["sample", str(concept), "a [v] robot", "--number", "2", "--device", "cpu", "--out", str(out)])
    names = {"s", "s-seed0", "s-seed1", "s-2", "s-2-seed0", "s-2-seed1"}
    assert {file.stem for file in tmp_path.glob("*.png")} == names
    single, again = (np.asarray(Image.open(tmp_path / f"{name}-seed0.png")) for name in ("s", "s-2"))
    assert single.shape[0] == single.shape[1] == load_tiny().picture_size and np.array_equal(single, again)
    assert str(tmp_path / "s-2.png") in capsys.readouterr().out


def test_the_strength_scales_the_adapters(tmp_path):
    concept, prompt = make_concept(tmp_path / "c.safetensors", "robot"), "a [V] robot"
    out, alone = tmp_path / "s.png", make_concept(tmp_path / "y", "robot", std=0)
    none, some, full = (sampled(out, concept, prompt, "--strength", share) for share in (0, 0.2, 1))
    assert np.array_equal(none, sampled(out, alone, prompt))
    of_some, of_full = (np.abs(picture - none).mean() for picture in (some, full))
    assert 0 < of_some < of_full


def test_the_sentence_says_what_was_learned_and_what_it_cost():
    original, bound = {"similarity": 0.5}, {"similarity": 0.875, "class drift": 0.0, "drift": 0.0}
    said = in_words("bound", bound, original)
    assert "similarity of 0.88 to the references (the original model's: 0.50)" in said
    assert said.endswith("texts without [V] are drawn as they were.")
    cost = in_words("LoRA", bound | {"class drift": 0.123, "drift": 0.04, "neighbour leak": 0.66}, original)
    assert "pictures of the class change by 12 % of the full range, and of other things by 4 %" in cost
    assert cost.endswith("A plain thing next to [V] takes on 66 % of [V]'s traits.")


def test_stopping_while_torch_is_loaded_leaves_no_traceback():
    def listen() -> None:                        # to Ctrl-C, which a shell's background jobs ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen([sys.executable, "-m", "purecc_min", "words"], cwd=ROOT, preexec_fn=listen,
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not any("torch" in line for line in Path(f"/proc/{child.pid}/maps").read_text().splitlines()):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in error and "stopped" in error


@pytest.mark.parametrize("package", ["tinyflow", "purecc_min"])
def test_threads_sleep_while_they_wait(package):
    """They spun, and beside two busy processes on two cores a step took 60 times as long."""
    code = f"import os, sys, {package}; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True)
    assert said.split() == ["3000", "False"]


@pytest.mark.parametrize("load, threads", [(0.3, 4), (1.2, 3), (9.0, 1)])
def test_busy_cores_are_left_to_others(monkeypatch, load, threads):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_device("cpu")
    assert chosen == [threads]


@pytest.mark.parametrize("name", ["lora", "switched-off", "bound"])
def test_tables_sheets_and_sample_draw_a_method_in_one_way(name, tmp_path):
    """README's picture and its table once let two models answer the empty text: fidelity .69 and .88."""
    method, text = METHODS[name], unseen_texts("robot")[0]
    concept = make_concept(tmp_path / "c.safetensors", "robot", method.where, method=name)
    sampled(tmp_path / "s.png", concept, text, "--steps", "3")

    def pixels(file):
        return np.asarray(Image.open(tmp_path / file)).astype(int)

    def drawn(**who):
        return to_pictures(draw(pipe, texts=[text], class_word="robot", **who))[0].astype(int)

    pipe = load_tiny()
    theta = load_branch(pipe, concept)[0]
    in_tables = drawn(**as_tabled(MAIN[name], Thetas(pipe.velocity, None, theta)))
    assert alike(pixels("s-seed0.png"), in_tables)
    assert alike(drawn(theta=theta), in_tables) == (method.where == "phrase")  # who answers "" matters
    references, row = CONCEPTS["checked_robot"].references(), as_sampled(method, theta, pipe.velocity)
    draw_sheet(pipe, references, {name: row}, [text], tmp_path / "sheet.png")
    last = pixels("sheet.png")[-2 * GAP - 128:-2 * GAP:2, MARGIN:MARGIN + 128:2]     # of its rows, enlarged
    assert alike(last, in_tables)


def test_the_demo_s_second_concept_was_learned_as_its_rows_are():
    for name in demo.ROWS:
        _, facts = load_tensors(demo.LEARNED / f"{demo.SECOND}-{name}.safetensors", "concept")
        assert (facts["method"], facts["where"]) == (name, METHODS[name].where)
        assert facts["config"].items() >= METHODS[name].settings.items() and facts["config"]["steps"] == 200

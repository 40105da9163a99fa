"""Pictures, texts' encodings and concepts' files that are none; and what is left after a failure."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from purecc_min import __main__ as purecc_min
from purecc_min.commands.folder import load_concept
from tests.hostile import LONG, WORD, contents, learn_spoiled, refused
from tinyflow.files import locked, read_log
from tinyflow.picturebook.model import SHIPPED
from tinyflow.weights import load_tensors, save_tensors


# --------------------------------------------------------------------------------------------------- pictures
def spoil(file: Path, kind: str) -> None:
    """Puts something in a picture's place that is none, or none that can be used."""
    good = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "fractions":
        Image.fromarray(np.random.default_rng(0).random((64, 64), np.float32)).save(file.with_suffix(".tiff"))
    elif kind in ("1x1", "20000x40", "15x64"):
        width, height = map(int, kind.split("x"))
        Image.new("RGB", (width, height)).save(file)
    else:
        data = {"nothing": b"", "text": b"<html>no picture</html>", "svg": b"<svg xmlns='x'/>",
                "half": good[:len(good) // 2], "head": good[:20], "zeros": bytes(1000),
                "flipped": good[:60] + bytes([good[60] ^ 255]) + good[61:]}
        file.write_bytes(data[kind])


KINDS = ("folder", "pipe", "loop", "device", "fractions", "1x1", "20000x40", "15x64", "nothing", "text",
         "svg", "half", "head", "zeros", "flipped")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_are_none(kind, photos, capsys):
    spoil(photos / "1.png", kind)
    assert "1." in learn_spoiled(capsys, photos)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_are_none(kind, photos, capsys):
    for picture in list(photos.glob("*.png")):
        shutil.copy(picture, picture.with_suffix(".mask.png"))
    spoil(photos / "1.mask.png", kind)
    assert "1.mask." in learn_spoiled(capsys, photos)


def test_more_pictures_than_anybody_learns_from(photos, capsys):
    for n in range(100, 200):
        shutil.copy(photos / "1.png", photos / f"{n}.png")
    assert "104 pictures" in learn_spoiled(capsys, photos)


# -------------------------------------------------------------------------------------------- concepts' files
def damage(good: Path, kind: str) -> Path:
    """A copy of a concept's file that is cut, changed, foreign, or sealed over nonsense."""
    file, data = good.with_name("damaged.safetensors"), bytearray(good.read_bytes())
    tensors, facts = load_tensors(good, "concept")
    if kind.startswith("cut"):
        file.write_bytes(data[:int(len(data) * float(kind[3:]))])
    elif kind.startswith("flip"):
        data[int(len(data) * float(kind[4:]))] ^= 64
        file.write_bytes(data)
    elif kind == "foreign":
        save_file({"a": torch.ones(2)}, file)
    elif kind == "another kind":
        shutil.copy(SHIPPED / "reader.safetensors", file)
    elif kind == "text":
        file.write_text("not weights")
    elif kind == "too shallow":
        save_tensors(file, "concept", {**tensors, "embeddings.Y": tensors["embeddings.Y"][:2]}, facts)
    elif kind == "a tensor less":
        save_tensors(file, "concept", dict(list(tensors.items())[:-1]), facts)
    elif kind == "unknown base":
        save_tensors(file, "concept", tensors, {**facts, "base": "flux"})
    else:
        wrong = {"no rank": "rank", "no word": "class_word"}[kind]
        save_tensors(file, "concept", tensors, {name: fact for name, fact in facts.items() if name != wrong})
    return file


DAMAGES = ("cut0", "cut.001", "cut.1", "cut.5", "cut.99", "flip.0001", "flip.01", "flip.3", "flip.7",
           "flip.999", "foreign", "another kind", "text", "too shallow", "a tensor less", "unknown base",
           "no rank", "no word")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("command", ["sample", "export"])
def test_a_concept_that_is_none(command, kind, ground, capsys):
    file = damage(ground / "good.safetensors", kind)
    arguments = {"sample": [f"a [V] {WORD}", "--out", "out.png"], "export": ["--out", "lora.safetensors"]}
    refused(capsys, ground, purecc_min.main, command, file, *arguments[command])
    file.unlink()


@pytest.mark.parametrize("file", ["none.safetensors", "theirs", "loop", "pipe", "/dev/null", LONG, ""])
@pytest.mark.parametrize("command", ["sample", "export"])
def test_a_concept_that_is_not_there(command, file, ground, capsys):
    prompt = [f"a [V] {WORD}"] if command == "sample" else []
    refused(capsys, ground, purecc_min.main, command, file, *prompt)


def test_numbers_that_are_not_finite_are_neither_written_nor_read(ground, capsys, monkeypatch):
    tensors, facts = load_tensors(ground / "good.safetensors", "concept")
    tensors["embeddings.Y"][0, 0] = torch.nan
    file = ground / "nan.safetensors"
    with pytest.raises(ValueError, match="not finite; nothing was saved"):
        save_tensors(file, "concept", tensors, facts)
    monkeypatch.setattr("tinyflow.weights.check_finite", lambda *_: None)
    save_tensors(file, "concept", tensors, facts)
    monkeypatch.undo()
    line = refused(capsys, ground, purecc_min.main, "sample", file, f"a [V] {WORD}", "--out", "out.png")
    assert "embeddings.Y holds numbers that are not finite" in line
    file.unlink()


def test_pictures_of_numbers_that_are_not_finite_are_not_drawn(ground, capsys):
    """`--guidance 1e30` once drew black pictures, with exit code 0. A concept can do so by itself."""
    tensors, facts = load_tensors(ground / "good.safetensors", "concept")
    huge = {name: 1e30 * tensor if name.startswith("lora") else tensor for name, tensor in tensors.items()}
    save_tensors(ground / "huge.safetensors", "concept", huge, facts)
    line = refused(capsys, ground, purecc_min.main, "sample", "huge.safetensors", f"a [V] {WORD}",
                   "--steps", "2", "--out", "out.png")
    assert "not finite" in line
    (ground / "huge.safetensors").unlink()


# ------------------------------------------------------------------------------------------------- afterwards
def test_a_corrected_command_runs_in_the_same_folder(photos, capsys, monkeypatch):
    """run.json was once written before the texts were read: the corrected command was "another run"."""
    monkeypatch.setattr("purecc_min.commands.learn.assess", lambda *_: ({}, []))     # pictures take long
    monkeypatch.setattr("purecc_min.commands.learn.draw_sheet", lambda *_: None)
    good = (photos / "1.txt").read_bytes()
    (photos / "1.txt").write_text(f"a [V] {WORD} and a dragon")
    learn_spoiled(capsys, photos)
    (photos / "1.txt").write_bytes(good)
    out = photos.parent / "out"
    learn = ["learn", str(photos), "--class-word", WORD, "--out", str(out), "--steps", "1", "--method",
             "lora"]
    purecc_min.main(learn)
    assert json.loads((out / "run.json").read_text())["class_word"] == WORD
    assert (out / "concept.safetensors").exists()
    with locked(out), pytest.raises(SystemExit) as caught:
        purecc_min.main(learn)
    assert caught.value.code == 2 and "another process is at work" in capsys.readouterr().err
    shutil.rmtree(out)


def test_a_long_runs_log_is_read_whatever_its_size(tmp_path):
    """A caption of 10 MB cannot be right; the log of 50,000 steps is as large."""
    row = json.dumps({"step": 1} | {f"term {n}": n / 7 for n in range(40)})
    (tmp_path / "log.jsonl").write_text("\n".join([row] * 11_000))
    assert len(read_log(tmp_path / "log.jsonl")) == 11_000


def test_a_run_that_fails_before_it_saves_leaves_no_claim(photos, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device", "out/stage1.safetensors")
    monkeypatch.setattr("purecc_min.train.save_checkpoint", fails)
    out = photos.parent / "out"
    with pytest.raises(SystemExit):
        purecc_min.main(["learn", str(photos), "--class-word", WORD, "--out", str(out), "--steps", "1",
                         "--method", "lora"])
    assert "no space left" in capsys.readouterr().err and not list(out.iterdir())


def test_a_byte_order_mark_is_no_word(photos):
    """Notepad and Excel write one. It once became part of the first word, or of the first column's name."""
    plain = load_concept(photos, WORD, 64).references
    for file in photos.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [r.complete for r in load_concept(photos, WORD, 64).references] == [r.complete for r in plain]
    for file in photos.glob("*.txt"):
        file.unlink()
    rows = ["image_path,prompt", *(f"{r.id},{r.complete}" for r in plain)]
    (photos / "train.csv").write_bytes("\n".join(rows).encode("utf-8-sig"))
    assert [r.complete for r in load_concept(photos, WORD, 64).references] == [r.complete for r in plain]


# --------------------------------------------------------------------------------------------- whole commands
ROOT = Path(__file__).parent.parent
LEARN = f"purecc_min learn photos --class-word {WORD} --out out"
COMMANDS = [
    "purecc_min --stepz 3", "purecc_min lern", "purecc_min demo --out file", "purecc_min demo --steps 0",
    f"{LEARN} --eta nan", f"{LEARN} --learning-rate -1", f"{LEARN} --base sd3.5-medium", f"{LEARN} --size 48",
    "purecc_min learn none --class-word robot", "purecc_min learn photos --class-word dragon --out out",
    "purecc_min sample good.safetensors red --out out.png", "purecc_min sample file red --out out.png",
    "purecc_min export good.safetensors", "purecc_min export good.safetensors --out good.safetensors",
    "purecc_min speed --steps none", "purecc_min.benchmark --methods LoRa", "purecc_min.benchmark --out file",
    "purecc_min.measure.toy dragon", "tinyflow.picturebook.reader --out file",
    "tinyflow.picturebook.check --base none", "tutorials.build 99"]


def test_whole_commands_fail_as_well(ground):
    """All of the above runs in one process. This is what a shell sees."""
    def run(command: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", *command.split()], cwd=ground, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)

    before = contents(ground)
    with ThreadPoolExecutor(2) as pool:
        for command, done in zip(COMMANDS, pool.map(run, COMMANDS)):
            assert done.returncode == 2 and not done.stdout, (command, done)
            assert re.fullmatch(r"error: [^\n]{10,300}\n", done.stderr), (command, done.stderr)
    assert contents(ground) == before

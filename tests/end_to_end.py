"""Every path that README, the pages and --help promise, from its start to its very end, with nothing patched.

    python -m tests.end_to_end

Trainings take two steps, and what they leave is looked at: files, tables, pictures that are not one colour.
It is a step of its own in .ci/run; pytest tries `learn` and `sample` with less to draw.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from purecc_min.__main__ import main
from purecc_min.commands.demo import ROWS
from purecc_min.measure.toy import FOLDER, write_references
from purecc_min.registry import METHODS

ROOT = Path(__file__).parent.parent
ROBOT, FEW = FOLDER / "checked_robot", ("--steps", "2", "--batch", "1", "--device", "cpu")
LEFT = ("run.json", "concept.safetensors", "comparison.png", "stage1.jsonl")


def command(*arguments) -> str:
    """What `python -m purecc_min` prints; anything but success ends this check."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(list(map(str, arguments)))
    return said.getvalue()


def module(name: str, *arguments) -> str:
    """What another module's command prints, in a process of its own."""
    ran = subprocess.run([sys.executable, "-m", name, *map(str, arguments)], cwd=ROOT, capture_output=True,
                         text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, f"{name}: {ran.stderr[-2000:]}"
    return ran.stdout


def refuses(*arguments) -> str:
    """The one line with which a command refuses something."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main(list(map(str, arguments)))
    except SystemExit as end:
        assert end.code == 2, arguments
    assert said.getvalue().count("error: ") == 1, said.getvalue()
    return said.getvalue()


def look_at(picture: Path) -> None:
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.size and pixels.reshape(-1, 3).std(0).max() > 5, f"{picture} is of one colour"


def left(out: Path, *more: str) -> None:
    """Looks at what a run has left."""
    for name in (*LEFT, *more):
        assert (out / name).stat().st_size > 0, out / name
    for picture in out.glob("*.png"):
        look_at(picture)


def every_method_learns(folder: Path) -> None:
    for method in METHODS:
        out = folder / method
        said = command("learn", ROBOT, "--class-word", "robot", "--method", method, "--out", out, *FEW)
        assert "learned: " in said and "| similarity" in said
        left(out, "table.md")


def what_a_user_may_bring(folder: Path) -> None:
    """A style and a capital class word once ended in a traceback, after all the work."""
    style, table, masked = (folder / name for name in ("style", "csv", "masked"))
    write_references("moss_print", style)
    line = ("learn", style, "--class-word", "A", "--out", folder / "of a style", *FEW)
    for _ in range(2):                           # and again, where nothing is left to train
        assert "learned: " in command(*line)
    left(folder / "of a style")
    assert "fills the whole picture" in refuses("learn", style, "--class-word", "a", "--method", "bound-half",
                                                "--out", folder / "none", *FEW)

    shutil.copytree(ROBOT, table, ignore=shutil.ignore_patterns("*.txt"))
    rows = ["image_path,prompt,target_prompt,base_prompt,instance_word"]
    rows += [f"{n}.png,a [v] robot,[v] robot,a robot,robot" for n in range(1, 5)]
    (table / "train.csv").write_text("\n".join(rows))
    assert "texts from train.csv" in command("learn", table, "--out", folder / "of a csv", *FEW)
    left(folder / "of a csv")

    shutil.copytree(ROBOT, masked)
    for n in range(1, 5):
        white = Image.new("L", (256, 256))
        white.paste(255, (64, 64, 192, 224))
        white.save(masked / f"{n}.mask.png")
    assert "4 masks" in command("learn", masked, "--class-word", "ROBOT", "--out", folder / "of masks", *FEW)
    left(folder / "of masks")
    defaults = [json.loads((folder / name / "run.json").read_text())["method"]
                for name in ("of a style", "of masks")]
    assert defaults == ["switched-off", "bound-pairs"]


def a_run_goes_on(folder: Path) -> None:
    out, prompts = folder / "goes on", folder / "prompts.txt"
    prompts.write_text("a [V] robot on the beach\na robot on the beach\n")
    line = ["learn", ROBOT, "--class-word", "robot", "--method", "bound", "--out", out, "--prompts", prompts]
    line += ["--samples-every", "1"]
    command(*line, *FEW)
    first = (out / "concept.safetensors").read_bytes()
    command(*line, *FEW)
    assert (out / "concept.safetensors").read_bytes() == first
    assert "going on from step 2" in command(*line, "--steps", "3", *FEW[2:])
    assert (out / "concept.safetensors").read_bytes() != first
    left(out, "samples-1-000001.png", "concept-1-000001.safetensors", "samples-1-000003.png")
    assert "seed, which is 0 there and 1 here" in refuses(*line, "--steps", "3", *FEW[2:], "--seed", "1")
    assert "steps, which is 3 there and 2 here" in refuses(*line, *FEW)
    command("sample", out / "concept-1-000001.safetensors", "a [V] robot", "--number", "1", "--steps", "2",
            "--out", folder / "on the way.png")
    look_at(folder / "on the way.png")


def concepts_are_drawn(folder: Path) -> None:
    one, two = (folder / method / "concept.safetensors" for method in ("bound", "switched-off"))
    few = ("--number", "2", "--steps", "2", "--device", "cpu")
    texts = {(one,): "a small [V] robot on the beach", (two,): "{a [V] robot on the left} and a robot",
             (one, two): "a [V1] robot on the left and a [V2] robot on the right"}
    for n, (files, text) in enumerate(texts.items()):
        for m, more in enumerate(([], ["--strength", "0.5"], ["--only-with-token"], ["--negative", "night"],
                                  ["--empty-text", "adapted"])):
            sheet = folder / f"drawn {n} {m}.png"
            assert str(sheet) in command("sample", *files, text, *more, "--out", sheet, *few)
            look_at(sheet)
            look_at(sheet.with_name(f"{sheet.stem}-seed1.png"))
    assert "learned on the tiny base" in refuses("export", one, "--out", folder / "lora.safetensors")


def on_public_weights(folder: Path) -> None:
    """`learn`, `sample` and `export`, on a small Stable Diffusion 3 with random weights."""
    from safetensors.torch import load_file

    from tests.public import write_sd3
    weights, out, photos = folder / "sd3", folder / "public", shutil.copytree(ROBOT, folder / "photos")
    for text in photos.glob("*.txt"):            # a class word of two words
        text.write_text(text.read_text().replace("robot", "toy robot"))
    write_sd3(weights)
    base = ("--weights", weights)
    command("learn", photos, "--class-word", "toy robot", "--base", "sd3.5-medium", *base, "--size", "64",
            "--method", "paper", "--out", out, *FEW)
    left(out, "stage2.jsonl")
    command("sample", out / "concept.safetensors", "a [V] toy robot", *base, "--number", "1", "--steps", "2",
            "--device", "cpu", "--out", folder / "public.png")
    lora = folder / "lora.safetensors"
    assert "tensors" in command("export", out / "concept.safetensors", "--out", lora)
    assert all(name.startswith("transformer.") for name in load_file(lora))
    assert "lora-2.safetensors" in command("export", out / "concept.safetensors", "--out", lora)


def all_else(folder: Path) -> None:
    command("--out", folder / "demo", *FEW)
    for name in ("table.md", *(f"{row}-concept.safetensors" for row in ROWS)):
        assert (folder / "demo" / name).stat().st_size > 0
    look_at(folder / "demo" / "comparison.png")
    results = json.loads((folder / "demo" / "results.json").read_text())
    assert results.keys() == set(ROWS) and results["lora"]["drift"] > 1e-5
    assert max(results["bound"]["class drift"], results["switched-off"]["drift"]) < 1e-6      # last bits
    first, second = map(json.loads, (folder / "demo" / "paper-stage2.jsonl").read_text().splitlines())
    assert second["step"] == 2 and {"loss_cc", "loss_purecc", "lambda", "cosine"} <= first.keys()
    assert "robot" in command("words") and command("memory").count("\n| ") >= 24
    assert "| stage 2 |" in module("purecc_min", "speed", "--steps", "2", "--device", "cpu")
    module("purecc_min.benchmark", "--quick", "--steps", "2", "--out", folder / "benchmark")
    for name in ("table.md", "results.csv", "fronts.png", "figure8.png"):
        assert (folder / "benchmark" / "main" / name).stat().st_size > 0


PATHS = (every_method_learns, what_a_user_may_bring, a_run_goes_on, concepts_are_drawn, on_public_weights,
         all_else)

if __name__ == "__main__":
    chosen = sys.argv[1:] or [path.__name__ for path in PATHS]
    with TemporaryDirectory() as place:
        for path in PATHS:
            if path.__name__ in chosen:
                begun = time.time()
                path(Path(place))
                print(f"{path.__name__.replace('_', ' ')}: {time.time() - begun:.0f} s", flush=True)

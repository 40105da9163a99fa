"""Bad and odd files of every kind: texts, pictures, masks, concepts, checkpoints, logs, runs, public weights.

What a file says of itself is changed and sealed again, so that no checksum notices; and bytes are cut off or
turned over, so that one has to. See hostile.py.
"""

import itertools
import json
import os
import shutil
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from purecc_min.benchmark import __main__ as benchmark
from purecc_min.commands.folder import load_concept
from purecc_min.commands.run import run_folder
from purecc_min.learning import learn
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig
from tests.hostile import REFERENCES, STOP, WORD, Case
from tinyflow.picturebook.model import SHIPPED, load_tiny
from tinyflow.weights import load_tensors, save_tensors

LEARN = ("learn", "photos", "--class-word", WORD, "--method", "bound", "--out", "out")
TO_STOP = (*LEARN, "--prompts", "nothing.txt")
MISSING = object()
ODD = ("25", None, -5, 1.5, float("nan"), [], {}, True, MISSING)     # in the place of a fact
Change = Callable[[dict], dict]                  # of tensors


PAGES = {"nothing": b"", "zeros": bytes(1000), "a web page": b"<!doctype html>", "text": b"not weights",
         "svg": b"<svg xmlns='x'/>", "exe": b"MZ" + bytes(99), "a pickle": b"\x80\x02}q\x00.",
         "a zip": b"PK\x03\x04" + bytes(99), "GGUF": b"GGUF" + bytes(99), "a list": b"[]",
         "a pointer": b"version https://git-lfs.github.com/spec/v1\n"}
NO_FILES = ("folder", "pipe", "loop", "device")


# ------------------------------------------------------------------------------------------------- every file
def spoil(root: Path, file: str, kind: str) -> None:
    """Puts something in a file's place that is none, or none that can be used."""
    path = root / file
    data, (what, _, share) = path.read_bytes(), kind.partition(" ")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "device"):
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    elif kind == "fractions":
        Image.fromarray(np.random.default_rng(0).random((64, 64), np.float32)).save(path.with_suffix(".tiff"))
    elif kind[0].isdigit():
        Image.new("RGB", tuple(map(int, kind.split("x")))).save(path)
    elif what in ("cut", "flip"):
        place = int(len(data) * float(share))
        rest = bytes([data[place] ^ 64]) + data[place + 1:] if what == "flip" else b""
        path.write_bytes(data[:place] + rest)
    elif kind == "foreign":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "another":
        shutil.copy(SHIPPED / "reader.safetensors", path)
    else:
        path.write_bytes(PAGES[kind])


def write(root: Path, file: str, text: str | bytes) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(text.encode(errors="surrogatepass") if isinstance(text, str) else text)


# ------------------------------------------------------------------------------------------- texts and tables
GOOD, ROW = f"a [V] {WORD}", '{"file_name": "1.png", "text": %s}'
ALL = [f"{n}.png" for n in range(1, 5)]


def rows(columns: str, row: str) -> str:
    """A CSV with a row for each picture, in which {} stands for its name."""
    return "\n".join([columns, *(row.format(name) for name in ALL)])


TEXTS = {                                        # file -> what is bad about it -> its text
    "1.txt": {"latin-1": f"{GOOD} möwe".encode("latin-1"), "utf-16": GOOD.encode("utf-16"), "empty": "",
              "utf-32": GOOD.encode("utf-32"), "null": f"a [V]\0 {WORD}", "huge": "a " * 6_000_000,
              "one long word": f"{GOOD} {'x' * 10**6}", "too many words": GOOD + " red" * 100,
              "no token": f"a {WORD}", "token behind": f"a {WORD} [V]", "another noun": "a [V] cat",
              "glued": f"a [V]{WORD}", "an unknown word": f"{GOOD} and a dragon",
              "control characters": f"{GOOD} \x07\x1b", "half a brace": f"{{{GOOD}"},
    "1.caption": {"two texts of one": GOOD},
    "metadata.jsonl": {"not json": "not json", "half": '{"file_name": "1.png", ', "a number": ROW % "123",
                       "a null": ROW % "null", "a list": ROW % "[1]", "a list of all": "[1, 2]",
                       "deep": "[" * 10**5, "no text": '{"file_name": "1.png"}',
                       "a file of numbers": '{"file_name": 1, "text": "a"}',
                       "a missing picture": '{"file_name": "9.png", "text": "a [V] robot"}',
                       "twice": f'{ROW}\n{ROW}'.replace("%s", f'"{GOOD}"'),
                       "utf-16 json": (ROW % '"a"').encode("utf-16"), "of one picture": ROW % f'"{GOOD}"'},
    "train.csv": {"semicolons": rows("image_path;prompt", f"{{}};{GOOD}"), "no columns": "a,b\n1,2",
                  "an empty table": "", "columns alone": "image_path,prompt",
                  "an empty cell": rows("image_path,prompt", "{},"), "nulls": "\0" * 100,
                  "a huge field": rows("image_path,prompt", "{}," + "x" * 200_000),
                  "rows twice": rows("image_path,prompt", f"{{0}},{GOOD}\nx/{{0}},{GOOD}"),
                  "two class words": rows("image_path,prompt,instance_word", f"{{}},{GOOD},cat"),
                  "the token in the base": rows("image_path,prompt,base_prompt", f"{{}},{GOOD},[V]"),
                  "a comma too many": rows("image_path,prompt", f"{{}},{GOOD},red"),
                  "an open quote": rows("image_path,prompt", f'{{}},"{GOOD}')},
}
SAYS = {"no token": "has no [V]; write it before", "two texts of one": "has a text in another file already",
        "a missing picture": "which is not in the folder", "of one picture": "this picture has no text",
        "no text": "needs JSON with file_name and text", "semicolons": "needs the columns",
        "a comma too many": "more fields", "the token in the base": "the base text '[V]' has [V] in it",
        "an empty table": "there is no text in it"}
TAKEN = {
    "1.txt": {"a byte-order mark": f"\ufeff{GOOD}", "Windows' lines": f"{GOOD}\r\n", "full stop": f"{GOOD}.",
              "two lines": f"a [V]\n{WORD}", "capitals": f"A [V] {WORD.upper()}", "small v": f"a [v] {WORD}"},
    "metadata.jsonl": {"a line separator": "\n".join(json.dumps(
        {"file_name": name, "text": f"{GOOD}\u2028"}, ensure_ascii=False) for name in ALL)},
    "train.csv": {"quoted commas": rows("image_path,prompt", f'{{}},"{GOOD}, red"'),
                  "Windows' paths": rows("image_path,prompt", f"C:\\x\\{{}},{GOOD}"),
                  "another column": rows("image_path,prompt,note", f"{{}},{GOOD},x")},
}


def put_text(root: Path, file: str, text: str | bytes) -> None:
    """Writes a file among the references. Where it is a table, there is no other text."""
    for other in (root / "photos").glob("*.txt") if file.startswith(("metadata", "train")) else ():
        other.unlink()
    write(root, f"photos/{file}", text)


def put_other(root: Path, file: str, kind: str) -> None:
    put_text(root, file, "")
    spoil(root, f"photos/{file}", kind)


def texts() -> Iterator[Case]:
    for file, kinds in TEXTS.items():
        for name, text in kinds.items():
            yield Case("text", f"{file}: {name}", LEARN, partial(put_text, file=file, text=text),
                       says=SAYS.get(name, ""))
    for file, kinds in TAKEN.items():
        for name, text in kinds.items():
            yield Case("text, odd", f"{file}: {name}", TO_STOP, partial(put_text, file=file, text=text),
                       says=STOP)
    for file in ("1.txt", "metadata.jsonl", "train.csv"):
        for kind in NO_FILES:
            yield Case("text", f"{file} is a {kind}", LEARN, partial(put_other, file=file, kind=kind))


# --------------------------------------------------------------------------------------------------- pictures
KINDS = (*NO_FILES, "fractions", "1x1", "20000x40", "15x64", "nothing", "text", "svg", "zeros", "exe",
         "cut .5", "cut .001", "flip .02")
MODES = {"1": "png", "L": "png", "LA": "png", "P": "png", "RGBA": "png", "CMYK": "jpg", "YCbCr": "jpg",
         "LAB": "tiff", "I;16": "png", "I": "tiff"}
ENDINGS = ("bmp", "gif", "tif", "jpeg", "avif", "webp", "png")


def add_pictures(root: Path) -> None:
    for n in range(100, 200):
        shutil.copy(root / "photos" / "1.png", root / "photos" / f"{n}.png")


def spoil_mask(root: Path, kind: str) -> None:
    white = Image.new("L", (256, 256))
    white.paste(255, (64, 64, 192, 192))
    for name in ALL:
        white.save(root / "photos" / f"{name[0]}.mask.png")
    mask = root / "photos" / "1.mask.png"
    if kind in ("black", "another size"):
        Image.new("L", (256, 256) if kind == "black" else (64, 64), 255 * (kind != "black")).save(mask)
    elif kind == "missing":
        mask.unlink()
    elif kind == "of no picture":
        mask.rename(mask.with_name("9.mask.png"))
    elif kind == "twice":
        shutil.copy(mask, mask.with_name("1-mask.png"))
    else:
        spoil(root, "photos/1.mask.png", kind)


def convert(root: Path, mode: str, ending: str) -> Path:
    """Writes the first picture in another mode and format."""
    file = root / "photos" / "1.png"
    picture = Image.open(file).convert("RGB")
    file.unlink()
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    picture.convert(mode).save(file := file.with_suffix(f".{ending}"))
    return file


def damage_picture(root: Path, ending: str, seed: int) -> None:
    """A few bytes are others, and some are missing. If it can still be read, the case stops later."""
    file, rng = convert(root, "RGB", ending), np.random.default_rng(seed)
    data = bytearray(file.read_bytes())
    for place in rng.integers(0, min(len(data), 400), 3):
        data[place] = int(rng.integers(256))
    file.write_bytes(data[:int(len(data) * rng.uniform(.3, 1.2))])


def pictures() -> Iterator[Case]:
    for kind in (*KINDS, "64x64"):               # the last is of one colour
        yield Case("picture", kind, LEARN, partial(spoil, file="photos/1.png", kind=kind))
    yield Case("picture", "104 of them", LEARN, add_pictures)
    for kind in (*KINDS, "black", "another size", "missing", "of no picture", "twice"):
        yield Case("mask", kind, LEARN, partial(spoil_mask, kind=kind))
    for mode, ending in (*MODES.items(), *(("RGB", ending) for ending in ENDINGS)):
        yield Case("picture, odd", f"{mode} in .{ending}", TO_STOP,
                   partial(convert, mode=mode, ending=ending), says=STOP)
    for ending in ENDINGS:
        for seed in range(8):
            yield Case("picture, damaged", f"1.{ending}, {seed}", TO_STOP,
                       partial(damage_picture, ending=ending, seed=seed))


# ------------------------------------------------------------------------------------------- files of ours
def reseal(root: Path, file: str, facts: dict | None = None, change: Change | None = None) -> None:
    """A file of ours with other facts or tensors, and a checksum that fits them."""
    kind = "concept" if file == "good.safetensors" else "training checkpoint"
    tensors, said = load_tensors(root / file, kind)
    said = {name: fact for name, fact in {**said, **(facts or {})}.items() if fact is not MISSING}
    save_tensors(root / file, kind, change(tensors) if change else tensors, said)


DAMAGES = ("cut 0", "cut .001", "cut .1", "cut .5", "cut .99", "flip .0001", "flip .01", "flip .3", "flip .7",
           "flip .999", "foreign", "another", "text")
SHAPES: dict[str, Change] = {
    "a tensor less": lambda own: dict(list(own.items())[:-1]), "none": lambda own: {},
    "a tensor more": lambda own: {**own, "more": torch.ones(2)},
    "huge": lambda own: {name: 1e30 * tensor for name, tensor in own.items()},
    "shaped": lambda own: {name: tensor[:1] for name, tensor in own.items()}}
DRAW = ("sample", "good.safetensors", "a [V] house", "--number", "1", "--steps", "2", "--device", "cpu",
        "--out", "out.png")


def concepts() -> Iterator[Case]:
    good = partial(partial, reseal, file="good.safetensors")
    for kind in DAMAGES:
        for arguments in (DRAW, ("export", "good.safetensors", "--out", "lora.safetensors")):
            yield Case("concept", f"{arguments[0]}: {kind}", arguments,
                       partial(spoil, file="good.safetensors", kind=kind))
    for name, change in SHAPES.items():
        yield Case("concept", name, DRAW, good(change=change))
    for fact in ("rank", "class_word", "base", "size", "where", "method", "base_sample"):
        for value in (*ODD, "nonsense", 10**9):
            is_text = isinstance(value, str) and fact in ("class_word", "method")    # any text may be one
            if not is_text and (value is not MISSING or fact in ("rank", "class_word")):     # older files
                yield Case("concept", f"{fact} is {value!r}", DRAW, good(facts={fact: value}))


# --------------------------------------------------------------------------------- runs, checkpoints, logs
FEW = ("--batch", "1", "--rank", "1", "--device", "cpu")
# a longer run that failed once left "3 steps" in run.json, and the run of 2 steps was then refused
GOES_ON = ("learn", REFERENCES, "--class-word", WORD, "--method", "lora", "--out", "run", *FEW, "--steps",
           "3")
CHECKPOINT = "run/stage1.safetensors"


@cache
def finished_run() -> Path:
    """A run of two steps, made once."""
    out, method, concept = Path(mkdtemp()) / "run", METHODS["lora"], load_concept(REFERENCES, WORD, 64)
    config = TrainConfig(steps=2, batch=1, rank=1, **method.settings)
    with run_folder(out, concept, config, "lora", "tiny at 64 px"):
        for _ in learn(load_tiny(), concept, config, out, method):
            pass
    return out


def in_run(root: Path, spoiled: Callable[[Path], object] | None = None) -> None:
    shutil.copytree(finished_run(), root / "run")
    if spoiled:
        spoiled(root)


def spoiled_run(function: Callable, **named) -> Callable[[Path], None]:
    return partial(in_run, spoiled=partial(function, **named))


def without(part: str) -> Change:
    return lambda own: {name: tensor for name, tensor in own.items() if part not in name}


def renamed(old: str, new: str) -> Change:
    return lambda own: {name.replace(old, new): tensor for name, tensor in own.items()}


STATES = {"no state": without("optimizer."), "no moments": without("exp_avg_sq"),
          "no steps": without(".step"), "misnamed": renamed("exp_avg_sq", "square"),
          "no weights": without("lora."),
          "misnumbered": renamed("optimizer.0.", "optimizer.999."),
          "shaped": lambda own: {name: tensor[:1] if "exp_avg" in name else tensor
                                 for name, tensor in own.items()}}
RUNS = ("[1, 2", "[]", "null", "3", "{}", '{"config": 3}', '{"config": {}}', '{"config": {"steps": "2"}}',
        '{"config": {"steps": null}}', "\0", "[" * 10**5, "")
LOGS = ("not json", "[]", "3", "{}", '{"step": "1"}', '{"step": true}', '{"step": 1, "loss": "x"}',
        '{"step": 1, "loss": null}', '{"step": 1, "loss": []}', '{"step": 1.5}', "\0", "[" * 10**5)
OTHERS = ("--seed 1", "--batch 2", "--rank 2", "--method paper", "--learning-rate .01",
          "--steps 1", "--class-word ROBOT")


def runs() -> Iterator[Case]:
    for fact in ("step", "config", "stage", "loss", "origin", "optimizer"):
        for value in (*ODD, 0, 10**9, 3):
            yield Case("checkpoint", f"{fact} is {value!r}", GOES_ON,
                       spoiled_run(reseal, file=CHECKPOINT, facts={fact: value}))
    for name, change in STATES.items():
        yield Case("checkpoint", name, GOES_ON, spoiled_run(reseal, file=CHECKPOINT, change=change))
    for kind in DAMAGES:
        yield Case("checkpoint", kind, GOES_ON, spoiled_run(spoil, file=CHECKPOINT, kind=kind))
    for text in RUNS:
        yield Case("run", text[:30], GOES_ON, spoiled_run(write, file="run/run.json", text=text))
    for text in LOGS:
        yield Case("log", text[:30], GOES_ON, spoiled_run(write, file="run/stage1.jsonl", text=text))
    for other in OTHERS:
        yield Case("run", f"other {other}", (*GOES_ON, *other.split()), in_run, says="another run")
    for text in ("", "3", "[]", "{}", '{"recipe": 3', "\0", "[" * 10**5):
        yield Case("result", text[:30], ("--quick", "--out", "measured"), partial(
            write, file="measured/cells/orange_star/nothing seed0.json", text=text), benchmark.main)


# --------------------------------------------------------------------------------------------- public weights
WEIGHTS = [f"{name}.safetensors" for name in (
    "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model",
    "text_encoder_2/model", "text_encoder_3/model")]
JSON = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_3/tokenizer.json", "model_index.json",
        "vae/config.json")
ON_PUBLIC = ("learn", REFERENCES, "--class-word", WORD, "--base", "sd3.5-medium", "--weights", "sd3",
             "--size", "64", "--out", "out", *FEW, "--steps", "1")


@cache
def public_model() -> Path:
    from tests.public import write_sd3
    folder = Path(mkdtemp()) / "sd3"
    write_sd3(folder)
    return folder


def spoil_public(root: Path, file: str, kind: str) -> None:
    shutil.copytree(public_model(), root / "sd3")
    spoil(root / "sd3", file, kind)


def public() -> Iterator[Case]:
    texts = ("nothing", "a web page", "a list", "cut .5")
    for files, kinds in ((WEIGHTS, (*PAGES, "cut .5")), (JSON, texts)):
        for file, kind in itertools.product(files, kinds):
            yield Case("public", f"{file}: {kind}", ON_PUBLIC, partial(spoil_public, file=file, kind=kind))


FILES = (texts, pictures, concepts, runs, public)

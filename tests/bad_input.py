"""What nobody should give, and many do: every command, with bad and odd input of every kind, made by rule.

    python -m tests.bad_input              every case; a table says how many of each kind
    python -m tests.bad_input --third      every third case, as .ci/run does
    python -m tests.bad_input picture      one kind

A case must end as hostile.py says. Odd input that is right must be taken: such a case carries a stop of its
own (STOP), so that nothing is trained. Here are numbers, places, devices and words; bad_files.py has files.
"""

import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Iterator

from purecc_min import __main__ as purecc_min
from purecc_min.benchmark import __main__ as benchmark
from tests.bad_files import FILES, LEARN, write
from tests.hostile import LONG, STOP, Case, run
from tinyflow.picturebook import check, codec, pretrain, reader
from tutorials import build, gallery

# --------------------------------------------------------------------------- numbers, and lines that are none
SAMPLE, DEMO = ("sample", "good.safetensors", "a [V] house", "--out", "out.png"), ("demo", "--out", "out")
WHOLE = ("-1", "", "nan", "inf", "1.5", "0x10", "1e3", "word", "9" * 30, LONG)
FRACTIONS = ("-1", "-1e-9", "nan", "inf", "-inf", "1e999", "1e30", "word", "")
FRACTIONAL = ("--learning-rate", "--embedding-learning-rate", "--eta", "--guidance", "--strength")
COUNTED = ("--steps", "--batch", "--rank", "--number", "--size", "--samples-every", "--workers", "--pictures",
           "--save-every", "--count")            # 0 is none of these
STEPS = ("--steps", "--batch", "--rank", "--seed", "--learning-rate", "--embedding-learning-rate", "--eta")
TRAININGS = {"pretrain": pretrain.main, "reader": reader.main, "codec": codec.main, "check": check.main}
NUMBERED = ((purecc_min.main, DEMO, STEPS), (purecc_min.main, ("speed",), ("--steps", "--seed")),
            (purecc_min.main, LEARN, (*STEPS, "--size", "--samples-every")),
            (purecc_min.main, SAMPLE, ("--steps", "--seed", "--number", "--guidance", "--strength")),
            (benchmark.main, ("--quick",), ("--steps", "--workers")),
            (pretrain.main, ("--out", "out"), ("--steps", "--batch", "--pictures", "--seed", "--save-every")),
            (reader.main, (), ("--steps", "--seed")), (codec.main, (), ("--steps", "--seed")),
            (check.main, (), ("--count",)))
LINES = (("lern",), ("learn",), ("sample",), ("sample", "good.safetensors"), ("export",), ("--stepz", "3"),
         ("demo", "extra"), ("learn", "photos", "--method", "dora"), ("learn", "photos", "--base", "flux"),
         (*SAMPLE, "--empty-text", "nobody"), ("speed", "--device", "tpu"), ("memory", "3"), ("words", "red"),
         ("learn", "photos", "--out"), (LONG,), ("learn", "photos", f"--{LONG}"),
         ("learn", "photos", "-", "-"), ("speed", "--device", "\x1b[31m"), ("speed", "--device", ""))


def numbers() -> Iterator[Case]:
    for main, line, options in NUMBERED:
        for option in options:
            values = (*(FRACTIONS if option in FRACTIONAL else WHOLE), *("0",) * (option in COUNTED))
            for value in values:
                name = f"{main.__module__} {line[:1]} {option}={value:.20}"
                yield Case("number", name, (*line, f"{option}={value}"), main=main, says=option)
    for value in (" 3 ", "+3", "003", "\u0663"):              # odd, and numbers all the same
        yield Case("number, odd", f"--steps={value!r}", ("learn", "none", f"--steps={value}"),
                   says="there is no such folder")
    for line in LINES:
        yield Case("command line", " ".join(line)[:40], line, says="--help")
    for arguments in (("claims", "--quick"), ("--methods", "LoRa"), ("--concepts", "dragon"), ("nonsense",)):
        yield Case("command line", f"benchmark {' '.join(arguments)}", arguments, main=benchmark.main)
    yield Case("command line", "build 99", ("99",), main=build.main)


# ------------------------------------------------------------------------------- places, devices, processes
NOT_FOLDERS = ("file", "file/out", "loop", "loop/out", LONG, "/dev/null", "/dev/null/out", "pipe", "", "a\0b",
               "a\udcffb")
NOT_SHEETS = ("pic", "pic.xyz", "pic.jpg", "-", "", ".", "folder.png", "loop.png", "pipe.png", "/dev/null",
              "/dev/null/a.png", "file/a.png", "loop/a.png", f"{LONG}.png", "good.safetensors")
NOT_EXPORTS = ("good.safetensors", "./good.safetensors", "theirs", "lora", "lora.png", "", "loop",
               "file/a.safetensors", f"{LONG}.safetensors", "/dev/null")
NOT_THERE = ("none", "file", "theirs", "empty", "loop", "pipe", "/dev/null", LONG, "")


def places() -> Iterator[Case]:
    for out in (*NOT_FOLDERS, "theirs"):
        for line in (LEARN, DEMO):
            yield Case("place", f"{line[0]} --out {out:.20}", (*line[:-1], out))
    for out in NOT_FOLDERS:
        yield Case("place", f"benchmark --out {out:.20}", ("--quick", "--out", out), main=benchmark.main)
        for name in ("pretrain", "reader", "codec"):
            yield Case("place", f"{name} --out {out:.20}", ("--out", out), main=TRAININGS[name])
    for out in NOT_SHEETS:
        yield Case("place", f"sample --out {out:.20}", (*SAMPLE[:-2], "--out", out))
    for out in NOT_EXPORTS:
        yield Case("place", f"export --out {out:.20}", ("export", "good.safetensors", "--out", out))
    for path in NOT_THERE:
        yield Case("place", f"learn {path:.20}", ("learn", path, *LEARN[2:]))
        yield Case("place", f"sample {path:.20}", ("sample", path, *SAMPLE[2:]))
        yield Case("place", f"export {path:.20}", ("export", path))
        yield Case("place", f"gallery {path:.20}", (path,), main=gallery.main)
        yield Case("place", f"--prompts {path:.20}", (*LEARN, "--prompts", path))
        public = ("--base", "sd3.5-medium", "--weights")
        yield Case("place", f"--weights {path:.20}", (*LEARN, *public, path))
        yield Case("place", f"--text {path:.20}", (*LEARN, *public, "theirs", "--text", path))
    for name, *options in (("pretrain", "--out", "out", "--start"), ("pretrain", "--out", "out", "--codec"),
                           ("reader", "--start"), ("codec", "--start"), ("check", "--base"),
                           ("check", "--reader"), ("check", "--codec")):
        for path in (*NOT_THERE, "good.safetensors"):
            yield Case("place", f"{name} {options[-1]} {path:.20}", (*options, path), main=TRAININGS[name])
    for line in (LEARN, SAMPLE) if os.geteuid() else ():         # root may write everything
        closed = (*line[:-1], f"closed/{line[-1]}")
        yield Case("place", f"{line[0]} into another's folder", closed, close_one, says="permission denied")


def close_one(root: Path) -> None:
    (root / "closed").mkdir(mode=0o500)


def devices() -> Iterator[Case]:
    for name in ("pretrain", "reader"):
        for device in ("foo", "", "cuda", "cuda:99", "mps", "meta", "\x1b[31mcpu"):
            yield Case("device", f"{name} --device {device!r}", ("--out", "out", f"--device={device}"),
                       main=TRAININGS[name], says="--device")


# ------------------------------------------------------------------------------------------------------ words
CLASS_WORDS = ("on", "purple", "dragon", "", " ", "Robot robot", "[V]", LONG, "ro\0bot", "robot,", "cat",
               "\u0440obot", "robot\u200b")
PROMPTS = ("", " ", "a house", "a [V] dragon", f"a [V] {LONG}", "a [V] house " + "red " * 99, "[V1] house",
           "a [V]\0house", "a [V]house", "{a [V] house", "a [V] house}", "{{a [V] house}}",
           "a [V] [V1] house", "{a house} and a [V] house", "a [W] house", "\ud800 [V] house")


def words() -> Iterator[Case]:
    for word in CLASS_WORDS:
        yield Case("class word", repr(word)[:30], ("learn", "photos", "--class-word", word, "--out", "out"))
    for prompt in PROMPTS:
        yield Case("prompt", repr(prompt)[:30], ("sample", "good.safetensors", prompt, "--out", "out.png"))
        put = partial(write, file="prompts.txt", text=prompt.replace("house", "dragon"))
        yield Case("prompt", f"of a sheet: {prompt!r:.30}", (*LEARN, "--prompts", "prompts.txt"), put)
    for prompt in ("a [V1] house", "a [V2] house and a cat", "a [V] house"):
        two = ("sample", "good.safetensors", "good.safetensors", prompt, "--out", "out.png")
        yield Case("prompt", f"of two concepts: {prompt}", two)
    for word in ("robot", "Robot", "ROBOT"):
        line = ("learn", "photos", "--class-word", word, "--out", "out", "--prompts", "nothing.txt")
        yield Case("class word, odd", word, line, says=STOP)


# ------------------------------------------------------------------------------------------------- all cases
def main(arguments: list[str]) -> None:
    third, wanted = "--third" in arguments, set(arguments) - {"--third"}
    cases = [case for kind in (numbers, places, devices, words, *FILES) for case in kind()]
    cases = [case for case in cases if not wanted or case.kind.split(",")[0] in wanted]
    counted, wrong, begun = Counter(), 0, time.time()
    for case in cases[::3] if third else cases:
        found = run(case)
        counted[case.kind] += 1
        if found != "clear":
            wrong += 1
            print(f"{case.kind}: {case.name}: {found}"[:600], flush=True)
    for kind, count in counted.items():
        print(f"{kind:24s} {count:5d}")
    print(f"{sum(counted.values())} cases, {wrong} not as they should be ({time.time() - begun:.0f} s)")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What other work on the machine costs: seconds a step, alone and beside a process that takes a core.

    python -m tests.busy

Each case runs twice: as the commands run (`room_for_others`), and with the number of threads left as it is. A
process of higher priority needs the right to raise it; without it that row is left out. Printed are ratios of
medians to the same training alone with its threads left as they are. Nothing else should run meanwhile.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

from purecc_min.concept import encode
from purecc_min.learning import stage
from purecc_min.measure.toy import CONCEPTS, TUNING
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig
from tinyflow.picturebook.model import load_tiny
from tinyflow.threads import room_for_others

WARMUP, STEPS, LONGEST = 20, 100, 20             # steps not counted, steps, and seconds after which it ends
REPEATS = 3


def seconds_a_step(polite: bool) -> float:
    """Of training, after the steps in which the number of threads finds its place."""
    pipe = load_tiny()
    data = encode(pipe, CONCEPTS[TUNING[0]].references())
    with (room_for_others() if polite else nullcontext()), tempfile.TemporaryDirectory() as folder:
        _, rows = stage(pipe, data, TrainConfig(steps=WARMUP + STEPS), Path(folder), METHODS["lora"])
        begun, counted = time.time(), 0
        for n, _ in enumerate(rows):
            if n + 1 == WARMUP:
                begun, counted = time.time(), 0
            elif time.time() - begun > LONGEST:
                break
            counted += 1
        return (time.time() - begun) / counted


@contextmanager
def beside(nice: int | None):
    """A process that takes a core, with a niceness; None: no process."""
    if nice is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", f"import os; os.nice({nice})\nwhile True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    cases = {"alone": None, "beside one of equal priority": 0}
    if os.geteuid() == 0:
        cases["beside one of higher priority"] = -15
    alone = None
    print("| | threads as they are | room for others |\n|---|---|---|")
    for name, nice in cases.items():
        with beside(nice):
            pairs = [(seconds_a_step(False), seconds_a_step(True)) for _ in range(REPEATS)]
        fixed, polite = map(median, zip(*pairs))
        alone = alone or fixed
        print(f"| {name} | {fixed / alone:.2f} | {polite / alone:.2f} |", flush=True)
    print(f"1 is {alone:.3f} s a step.")


if __name__ == "__main__":
    main()

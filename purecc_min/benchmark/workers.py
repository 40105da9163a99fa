"""Running cells side by side: how long it will take, a progress bar, and a clean end if it is stopped.

Read next: report.py.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from purecc_min.benchmark.cells import ALL, CURVE, SAMPLING_STEPS, Cell, extractor_cell, make_extractor, run_cell, set_up, train_cell
from purecc_min.branch import Branch
from purecc_min.evaluate import TIMES, count_pictures, draw
from tinyflow.errors import InputError


def end_with_parent() -> None:
    """A killed parent once left its workers computing for minutes."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker() -> None:
    """One thread a worker: small models gain more from several cells at once, and results do not depend on the number of cores."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # the parent ends the workers,
    threading.Thread(target=end_with_parent, daemon=True).start()                # however it ends itself
    os.environ["TQDM_DISABLE"] = "1"


def time_cell(cell: Cell, steps: int = 6) -> float:
    """Seconds that a cell will take, from a few of its steps and one group of pictures."""
    stage, method = set_up(cell.concept), ALL[cell.method]
    theta_1 = Branch.fresh(stage.pipe, torch.zeros(stage.pipe.mmdit.config.depth, stage.pipe.mmdit.config.width), 4).requires_grad_(False)
    trained = train_cell(cell, stage, theta_1 if method.extractor == "frozen" else None)
    _, trial = next(trained)                                     # the first step pays for what is made once
    begun = time.perf_counter()
    done = sum(1 for _ in itertools.islice(trained, steps))
    per_step = (time.perf_counter() - begun) / max(1, done)
    begun = time.perf_counter()
    draw(stage.pipe, trial.theta, [p.complete for p in stage.toy.prompts()["unsaid"]], stage.toy.class_word, steps=SAMPLING_STEPS)
    per_picture = (time.perf_counter() - begun) / 12
    pictures = len(cell.snapshots) * (count_pictures(stage.toy) + 12)                                 # a drift costs as much as 12 pictures
    return per_step * (cell.steps + (len(CURVE) * len(TIMES) if method.extractor else 0)) + per_picture * pictures


@contextlib.contextmanager
def pool_of(workers: int):
    """Worker processes that end when this context does, however that is. Raises InputError if one of them dies."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise InputError("a worker was ended from outside, perhaps for lack of memory; the same command goes on, "
                             "and --workers 1 needs less") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def finish(pool: ProcessPoolExecutor, title: str, work: Callable, cells: list[Cell], folder: Path) -> list:
    """work(cell, folder) for each cell, behind a progress bar; the results in the order of the cells."""
    waiting = [pool.submit(work, cell, folder) for cell in cells]
    for done in tqdm(as_completed(waiting), f"{title:24s}", len(waiting), unit="cell"):
        done.result()
    return [future.result() for future in waiting]


def make_extractors(pool: ProcessPoolExecutor, cells: list[Cell], folder: Path) -> None:
    """Each extractor once, before several cells take it."""
    finish(pool, "extractors", make_extractor, list({theirs: cell for cell in cells if (theirs := extractor_cell(cell))}.values()), folder)


def each(work: Callable, cells: list[Cell], folder: Path, workers: int) -> list:
    """work(cell, folder) for each cell, with its extractor there."""
    with pool_of(workers) as pool:
        make_extractors(pool, cells, folder)
        return finish(pool, "cells", work, cells, folder)


def run(cells: list[Cell], folder: Path, workers: int, shipped: bool = False) -> None:
    """Runs what is not done yet (or, with `shipped`, did not come with this repository), after saying how long that will take."""
    waiting = [cell for cell in cells if cell.result(folder, shipped) is None]
    if not waiting:
        return
    with pool_of(workers) as pool:
        kinds = {cell.method: cell for cell in waiting if cell.method in ALL}                    # one of each
        print(f"{len(waiting)} of {len(cells)} cells to do; timing a few steps of each method ...", flush=True)
        seconds = dict(zip(kinds, pool.map(time_cell, kinds.values())))
        total = sum(seconds.get(cell.method, 0.0) for cell in waiting) / workers
        print(f"about {total / 60:.0f} min on {workers} worker{'s' * (workers > 1)}", flush=True)
        make_extractors(pool, waiting, folder)
        finish(pool, "cells", run_cell, waiting, folder)

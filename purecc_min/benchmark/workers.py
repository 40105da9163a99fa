"""Running cells side by side: how long it will take, a progress bar, and a clean end if it is stopped.

Read next: tables.py.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Callable, Iterator

import torch
from tqdm import tqdm

from purecc_min.benchmark.cells import (
    ALL,
    CURVE,
    Cell,
    learned_file,
    run_cell,
    set_up,
    theta_1_cell,
    train_cell,
)
from purecc_min.branch import Branch
from purecc_min.measure.draw import FEW_STEPS, count_pictures, draw
from purecc_min.measure.velocities import TIMES
from tinyflow.errors import InputError


def end_with_parent() -> None:
    """Ends this worker as soon as its parent is gone; it would go on computing after a killed parent."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker() -> None:
    """One thread for each worker: small models gain more from several cells at once.

    It also makes results independent of the number of cores.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # the parent ends the workers,
    threading.Thread(target=end_with_parent, daemon=True).start()     # however it ends itself
    os.environ["TQDM_DISABLE"] = "1"


def time_cell(cell: Cell, steps: int = 6) -> float:
    """Seconds that a cell will take, from a few of its steps and one group of pictures."""
    setup, method = set_up(cell.concept), ALL[cell.method]
    Y, theta_1 = torch.zeros(setup.pipe.mmdit.config.depth, setup.pipe.mmdit.config.width), None
    if method.extractor:
        theta_1 = Branch.fresh(setup.pipe, Y if method.extractor.embeddings else None, 4,
                               where=method.extractor.where).requires_grad_(False)
    asked = len(CURVE) * len(TIMES) if method.has_theta_1 else 0     # so often the terms are asked for
    trained = train_cell(cell, theta_1)
    _, thetas, _ = next(trained)                 # the first step pays for what is made once
    begun = time.perf_counter()
    done = sum(1 for _ in itertools.islice(trained, steps))
    per_step = (time.perf_counter() - begun) / max(1, done)

    texts = [prompt.complete for prompt in setup.toy.prompts()["unsaid"]]
    begun = time.perf_counter()
    draw(setup.pipe, thetas.theta, texts, setup.toy.class_word, steps=FEW_STEPS)
    per_picture = (time.perf_counter() - begun) / len(texts)
    drawings = len(cell.snapshots) + ("own empty text" in method.ways)
    pictures = count_pictures(setup.toy, forms=True) + 12    # 12 pictures' time for the velocities
    return per_step * (cell.config().steps + asked) + per_picture * pictures * drawings


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end when this context does, however that is.

    Raises: InputError if one of them dies.
    """
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise InputError("a worker was ended from outside, perhaps for lack of memory; the same command "
                             "goes on, and --workers 1 needs less") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def finish(pool: ProcessPoolExecutor, title: str, work: Callable, cells: list[Cell], folder: Path) -> list:
    """work(cell, folder) for each cell, behind a progress bar; the results in the order of the cells."""
    futures = [pool.submit(work, cell, folder) for cell in cells]
    waiting = set(futures)
    with tqdm(total=len(futures), desc=f"{title:24s}", unit="cell") as bar:
        while waiting:                           # a cell may take minutes; the clock goes on meanwhile
            done, waiting = wait(waiting, timeout=10, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            bar.update(len(done))
            bar.refresh()
    return [future.result() for future in futures]


def leave_extractors(pool: ProcessPoolExecutor, cells: list[Cell], folder: Path) -> None:
    """Trains every extractor once, before several cells take it."""
    extractors = set(map(theta_1_cell, cells)) - {None}
    finish(pool, "extractors", learned_file, list(extractors), folder)


def run(cells: list[Cell], folder: Path, workers: int, shipped: bool = False) -> None:
    """Runs what is not done yet, after saying how long that will take.

    Args:
        shipped: whether a cell of which a result came with this repository counts as done.
    """
    waiting = [cell for cell in cells if cell.result(folder, shipped) is None]
    if not waiting:
        return
    with pool_of(workers) as pool:
        kinds = {cell.method: cell for cell in waiting if cell.method in ALL}    # one of each
        print(f"{len(waiting)} of {len(cells)} cells to do; timing a few steps of each method ...",
              flush=True)
        seconds = dict(zip(kinds, pool.map(time_cell, kinds.values())))
        total = sum(seconds.get(cell.method, 0.0) for cell in waiting) / workers
        total += seconds.get("paper", 0.0)       # one is trained again for the pictures (figures.py)
        print(f"about {total / 60:.0f} min on {workers} worker{'s' * (workers > 1)}", flush=True)
        leave_extractors(pool, waiting, folder)
        finish(pool, "cells", run_cell, waiting, folder)

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
from typing import Callable, Iterator, NamedTuple

import torch
from tqdm import tqdm

from purecc_min.benchmark.cells import ALL, Cell, learned_file, run_cell, set_up, theta_1_cell, train_cell
from purecc_min.benchmark.entries import as_sampled
from purecc_min.benchmark.two import SCENES, Two, run_two
from purecc_min.branch import Branch
from purecc_min.measure.draw import FEW_STEPS, count_pictures, draw
from purecc_min.measure.toy import CONCEPTS
from purecc_min.registry import is_held
from tinyflow.errors import InputError


def end_with_parent() -> None:
    """Ends this worker as soon as its parent is gone; it would go on computing after a killed parent."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker() -> None:
    """One thread for each worker: that is faster for small models, and results do not depend on the cores."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # the parent ends the workers,
    threading.Thread(target=end_with_parent, daemon=True).start()     # however it ends itself
    os.environ["TQDM_DISABLE"] = "1"


class Pace(NamedTuple):
    """How fast a method is on this machine, in seconds."""
    concept: float                               # to set a concept up
    step: float                                  # of training
    picture: float


def pace_of(cell: Cell, steps: int = 6) -> Pace:
    """From a few of a cell's steps and one group of pictures."""
    begun = time.perf_counter()
    setup, method, theta_1 = set_up(cell.concept), ALL[cell.method], None
    concept = time.perf_counter() - begun
    if teacher := method.extractor:
        Y = torch.zeros(setup.pipe.mmdit.config.depth, setup.pipe.mmdit.config.width)
        theta_1 = Branch.fresh(setup.pipe, Y if teacher.embeddings else None, cell.config().rank,
                               where=teacher.where).requires_grad_(False)
    trained = train_cell(cell, theta_1)
    _, thetas, _ = next(trained)                 # the first step pays for what is made once
    begun = time.perf_counter()
    done = sum(1 for _ in itertools.islice(trained, steps))
    step = (time.perf_counter() - begun) / max(1, done)

    texts = [prompt.complete for prompt in setup.toy.prompts()["unsaid"]]
    begun = time.perf_counter()
    draw(setup.pipe, texts=texts, class_word=setup.toy.class_word, steps=FEW_STEPS,
         **as_sampled(method, thetas))
    return Pace(concept, step, (time.perf_counter() - begun) / len(texts))


def seconds_of(work: Cell | Two, pace: Pace) -> float:
    """How long a cell takes without its extractor, or a pair."""
    if isinstance(work, Two):
        return 3 * SCENES * pace.picture         # each concept alone, and both
    toy, method = CONCEPTS[work.concept], ALL[work.method]
    again = -36 if is_held(method) else 12        # pictures that are not drawn again; or the velocities' time
    on_the_way = (len(work.snapshots) - 1) * (count_pictures(toy) + again)
    at_the_end = len(method.ways) * (count_pictures(toy, forms=True) + again)
    return pace.step * work.config().steps + pace.picture * (on_the_way + at_the_end)


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


def finish(pool: ProcessPoolExecutor, title: str, work: Callable, cells: list, folder: Path) -> list:
    """work(cell, folder) for each cell, behind a progress bar; the results in the order of the cells."""
    futures = [pool.submit(work, cell, folder) for cell in cells]
    waiting = set(futures)
    with tqdm(total=len(futures), desc=f"{title:24s}", unit="cell", disable=not futures) as bar:
        while waiting:                           # a cell may take minutes; the clock goes on meanwhile
            done, waiting = wait(waiting, timeout=10, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            bar.update(len(done))
            bar.refresh()
    return [future.result() for future in futures]


def extractors_of(cells: list[Cell]) -> list[Cell]:
    """Every extractor that these cells take, once."""
    return list({theta_1_cell(cell) for cell in cells} - {None})


def run(work: list[Cell | Two], folder: Path, workers: int, shipped: bool = False) -> None:
    """Runs what is not done yet, after saying how long that will take.

    Args:
        shipped: whether what came with this repository counts as done.
    """
    waiting = [one for one in work if one.result(folder, shipped) is None]
    if not waiting:
        return
    cells, pairs = ([one for one in waiting if isinstance(one, kind)] for kind in (Cell, Two))
    extractors = extractors_of(cells)
    with pool_of(workers) as pool:
        print(f"{len(waiting)} of {len(work)} cells to do; timing a few steps of each method ...", flush=True)
        print(f"about {estimate(pool, cells, extractors, pairs) / 60 / workers:.0f} min on {workers} "
              f"worker{'s' * (workers > 1)}", flush=True)
        finish(pool, "extractors", learned_file, extractors, folder)
        finish(pool, "cells", run_cell, cells, folder)
        finish(pool, "two in one text", run_two, pairs, folder)


def estimate(pool: ProcessPoolExecutor, cells: list[Cell], extractors: list[Cell], pairs: list[Two]) -> float:
    """Seconds that all this takes one worker."""
    used = [*cells, *extractors, *(cell for pair in pairs for cell in pair.cells)]
    kinds = {cell.method: cell for cell in used if cell.method in ALL}   # one of each
    paces = dict(zip(kinds, pool.map(pace_of, kinds.values())))
    setting_up = max([pace.concept for pace in paces.values()], default=0.0)
    return (setting_up * len({cell.concept for cell in used})
            + sum(seconds_of(one, paces[one.method]) for one in (*cells, *pairs) if one.method in ALL)
            + sum(paces[cell.method].step * cell.config().steps for cell in extractors))



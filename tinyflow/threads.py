"""Adapts the number of torch's threads to the cores that other programs leave free.

Two threads that share one operation wait for each other many thousand times a second. If another program
takes a core, one of the two is often not running, and the other one waits: a step takes 4 times as long, and
100 times next to a program of higher priority. With this context it takes 1.1 and 1.2 times as long (two
cores, `python -m tests.busy`): once a second a command measures how busy its cores are with other work, and
does not use the busy ones. Where OMP_NUM_THREADS is set, or the system is not Linux, nothing changes.
"""

import contextlib
import os
import signal
import threading
from typing import Iterator

import torch

from tinyflow.errors import InputError

SECONDS = 1.0                                    # between two looks


def spare_threads(others: float, cores: int, most: int) -> int:
    """How many threads to use when other programs keep `others` of the cores busy: 1 to `most`.

    A third of a core is ignored: a browser or a notebook takes that now and then.
    """
    return max(1, min(most, int(cores - others + .35)))


def busy_seconds(cores: set[int]) -> float:
    """For how long these cores have been busy since the machine started, added up."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0
    with open("/proc/stat") as file:
        for line in file:
            name, *numbers = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system, idle, waiting, *rest = map(int, numbers[:8])
                total += user + nice + system + sum(rest)
    return total / ticks


@contextlib.contextmanager
def room_for_others() -> Iterator[None]:
    """Within this context, in the main thread, the number of threads follows what other programs leave."""
    fixed = "OMP_NUM_THREADS" in os.environ or not os.path.exists("/proc/stat")
    if fixed or threading.current_thread() is not threading.main_thread():
        yield
        return
    most, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    last = [busy_seconds(cores), sum(os.times()[:4]), os.times().elapsed]

    def look(*_) -> None:
        now = [busy_seconds(cores), sum(os.times()[:4]), os.times().elapsed]
        busy, own, seconds = (a - b for a, b in zip(now, last))
        if seconds > .5 * SECONDS:
            last[:] = now
            torch.set_num_threads(spare_threads((busy - own) / seconds, len(cores), most))

    before = signal.signal(signal.SIGALRM, look)     # Python calls it in the main thread, where OpenMP asks
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_num_threads(most)


def choose_device(name: str = "auto") -> torch.device:
    """A device by its name; "auto" takes CUDA, then MPS, then the CPU.

    Raises: InputError if this machine does not have it.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: torch can use none on this machine; try --device cpu") from None

"""A machine that is busy with other work makes us slower, not stuck."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tinyflow.threads import room_for_others, spare_threads


@pytest.mark.parametrize("others, cores, most, threads", [
    (0, 2, 2, 2), (.3, 2, 2, 2), (1, 2, 2, 1), (2, 2, 2, 1), (-.1, 8, 8, 8), (1, 8, 8, 7), (1, 8, 4, 4),
    (7.9, 8, 8, 1), (1, 1, 1, 1)])
def test_threads_go_where_cores_are_free(others, cores, most, threads):
    assert spare_threads(others, cores, most) == threads


WATCH = """
import time, torch
from tinyflow.threads import room_for_others
with room_for_others():
    before = torch.get_num_threads()
    end = time.time() + 4
    while time.time() < end:
        time.sleep(.01)
    during = torch.get_num_threads()
print(before, during, torch.get_num_threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux tells how busy a core is")
@pytest.mark.parametrize("fixed", [False, True], ids=["by itself", "not if OMP_NUM_THREADS is set"])
def test_a_busy_core_takes_a_thread_away(fixed):
    """Two threads on one free core wait for each other most of the time."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if fixed:
        environment["OMP_NUM_THREADS"] = "2"
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        run = subprocess.run([sys.executable, "-c", WATCH], env=environment, capture_output=True, text=True)
    finally:
        for process in busy:
            process.kill()
    before, during, after = map(int, run.stdout.split())
    assert during == (2 if fixed else 1), run
    assert after == before


def test_the_alarm_is_given_back():
    mine = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        with room_for_others():
            time.sleep(.01)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, mine)

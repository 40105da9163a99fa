"""What a training step costs: seconds and peak memory, as ratios to stage 1 of the same run.

A step of stage 2 is a step of stage 1 plus two predictions without gradients: theta_2 on the base text, and
theta_1 on a batch of twice the size. Two ablations (ablations.py) are timed as well.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from purecc_min.ablations import not_detached, untouched_original
from purecc_min.concept import encode
from purecc_min.learning import stage
from purecc_min.measure.toy import CONCEPTS
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig
from tinyflow.device import choose_device
from tinyflow.picturebook.model import load_tiny

LORA, PAPER, BOUND = (METHODS[name] for name in ("lora", "paper", "bound"))
VARIANTS = {"stage 1": LORA, "bound": BOUND, "stage 2": PAPER,
            "stage 2, v_original not detached": replace(PAPER, loss=not_detached),
            "stage 2, v_original from the base model": replace(PAPER, loss=untouched_original)}


def time_steps(variant: str, steps: int, device: str) -> tuple[float, float]:
    """Median seconds a step, and peak memory in MB: allocated on CUDA, otherwise resident in this process."""
    pipe, config, method = load_tiny(device), TrainConfig(steps=steps), VARIANTS[variant]
    data = encode(pipe, CONCEPTS["checked_robot"].references())
    with TemporaryDirectory() as folder:
        theta_1, rows = stage(pipe, data, config, Path(folder), method.extractor or method)
        if method.extractor:
            _, rows = stage(pipe, data, config, Path(folder), method, theta_1.requires_grad_(False))
        seconds, begun = [], time.perf_counter()
        for _ in rows:
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
    if device.startswith("cuda"):
        return float(np.median(seconds)), torch.cuda.max_memory_allocated() / 1e6
    return float(np.median(seconds)), resident_memory()


def resident_memory() -> float:
    """The most memory that this process has held, in MB; nan where the system does not say it (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def speed_command(options: argparse.Namespace) -> None:
    """Measures every variant in a process of its own, one after the other, and prints Markdown."""
    device = str(choose_device(options.device))
    lines = [f"| {device} | s a step | ratio | peak memory (MB) |", "|---|---|---|---|"]
    first = None
    for variant in VARIANTS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds, memory = pool.submit(time_steps, variant, options.steps, device).result()
        first = first or seconds
        lines.append(f"| {variant} | {seconds:.4f} | {seconds / first:.2f} | {memory:.0f} |")
    print("\n".join(lines))

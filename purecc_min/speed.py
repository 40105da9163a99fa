"""What a training step costs: seconds and peak memory of stage 1 and of stage 2, printed as ratios to stage 1 of the same run.

    python -m purecc_min speed

With v_original detached, stage 2 adds to stage 1's step one prediction for the base text and a frozen one on a doubled batch, all without
gradients. Not detached, the base text's prediction carries a gradient too.
"""

import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from purecc_min.concept import load_concept
from purecc_min.toy import FOLDER, TOYS
from purecc_min.train import TrainConfig, prepare, stage_1, stage_2
from tinyflow.pipeline import Pipeline

VARIANTS = {"stage 1": None, "stage 2, detached": dict(detach=True), "stage 2, not detached": dict(detach=False),
            "stage 2, v_original from the base": dict(original="base")}


def time_steps(variant: str, steps: int, device: str) -> tuple[float, float]:
    """Median seconds a step, and peak memory in MB: allocated on CUDA, otherwise resident in this process."""
    pipe, config = Pipeline.shipped(device), TrainConfig(steps=steps)
    data = prepare(pipe, load_concept(FOLDER / "striped_robot", TOYS["striped_robot"].class_word, pipe.picture_size))
    with TemporaryDirectory() as folder:
        theta_1, rows = stage_1(pipe, data, config, Path(folder))
        if VARIANTS[variant] is not None:
            _, rows = stage_2(pipe, theta_1.requires_grad_(False), data, replace(config, **VARIANTS[variant]), Path(folder))
        seconds, begun = [], time.perf_counter()
        for _ in rows:
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
    if device == "cuda":
        return float(np.median(seconds)), torch.cuda.max_memory_allocated() / 1e6
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(np.median(seconds)), resident / (1e6 if sys.platform == "darwin" else 1e3)


def speed(steps: int, device: str) -> str:
    """Measures every variant in a process of its own, one after the other; Markdown."""
    lines = [f"| {device} | s a step | ratio | peak memory (MB) |", "|---|---|---|---|"]
    first = None
    for variant in VARIANTS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds, memory = pool.submit(time_steps, variant, steps, device).result()
        first = first or seconds
        lines.append(f"| {variant} | {seconds:.4f} | {seconds / first:.2f} | {memory:.0f} |")
    return "\n".join(lines)

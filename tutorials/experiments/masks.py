"""Masks beside the references: what they do to what the references happen to share.

    python -m tutorials.experiments.masks

A concept is learned four times a method: with captions that say what is around it, and with bare ones ("a [V]
robot"); with L_CC over the whole picture, and with L_CC where the concept stands alone. Bare captions leave
the scene unexplained, so it becomes part of [V]. The table is on the tuning instance, two seeds; it takes
about a quarter of an hour on one core.
"""

from dataclasses import replace

import torch

from purecc_min.benchmark.cells import ALL, Cell, set_up
from purecc_min.benchmark.entries import start
from purecc_min.benchmark.tables import markdown, mean_and_interval
from purecc_min.branch import Thetas
from purecc_min.concept import EncodedConcept, encode
from purecc_min.learning import train_steps
from purecc_min.measure import toy
from purecc_min.measure.draw import FEW_STEPS, draw_groups
from purecc_min.measure.measures import measure
from purecc_min.train import optimizer_for
from tinyflow.terminal import report_errors

CONCEPT, METHODS, SEEDS = toy.TUNING[0], ("lora", "token"), 2
SHOWN = ("similarity", "sees concept", "confounder contradicted", "confounder unsaid", "outside change",
         "class leak")


def learn(method: str, seed: int, data: EncodedConcept) -> dict[str, float]:
    """The measures of what a method learns from this data."""
    setup, config = set_up(CONCEPT), Cell(CONCEPT, method, seed).config()
    pipe, entry = setup.pipe, ALL[method]
    theta = start(entry, pipe, data, config, None)
    thetas = Thetas(pipe.velocity, None, theta)
    for _ in train_steps(entry.loss, thetas, data, config, entry.stages, optimizer_for(theta, config)):
        pass
    drawn = draw_groups(pipe, theta, setup.toy, steps=FEW_STEPS, theta_null=pipe.velocity)
    return measure(pipe, setup.reader, theta, setup.toy, setup.pictures, setup.original, drawn)


def main() -> None:
    torch.set_num_threads(1)
    rows, concept = [], toy.CONCEPTS[CONCEPT]
    for method in METHODS:
        for captions in ("full", "bare"):
            references = replace(concept, bare=captions == "bare").references(masked=True)
            masked = encode(set_up(CONCEPT).pipe, references)
            for name, data in (("whole picture", masked._replace(masks=None)), ("masked", masked)):
                found = [learn(method, seed, data) for seed in range(SEEDS)]
                means = [mean_and_interval([values[name] for values in found])[0] for name in SHOWN]
                rows.append([method, captions, name, *(f"{mean:.3f}" for mean in means)])
                print(" | ".join(rows[-1]), flush=True)
    print(markdown(["method", "captions", "L_CC over", *SHOWN], rows))


if __name__ == "__main__":
    with report_errors():
        main()

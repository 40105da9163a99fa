"""The demo: one concept, learned in several ways, drawn on one sheet and measured.

    lora           a plain LoRA: L_CC alone
    switched-off   a LoRA that is switched off for texts without [V]: the base model is used for them
    paper          PureCC as the paper writes it: an extractor, then fresh adapters that learn with L_PCC
    bound          L_CC, with adapters that act only on [V]'s phrase

All train for the same number of steps, with the settings of registry.py. In some columns of the sheet a [V]
robot stands next to a plain one, or to a second learned concept, which comes with the repository (LEARNED):
there, damage to neighbours is visible. benchmark/ does the same with more methods, concepts and seeds.
"""

import argparse
import json
import time
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from purecc_min.branch import Branch, velocity_with
from purecc_min.commands.base_models import training_config
from purecc_min.commands.folder import load_concept
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import ConceptSet
from purecc_min.concept_file import load_branch
from purecc_min.learning import learn
from purecc_min.measure.draw import FEW_STEPS, PLAIN, UNNAMED, count_pictures, draw_groups
from purecc_min.measure.measures import in_words, measure, table
from purecc_min.measure.toy import CONCEPTS, FOLDER, Toy
from purecc_min.registry import METHODS, as_sampled, is_held
from purecc_min.sheets import Samplers, Second, draw_sheet, unseen_texts
from tinyflow.device import choose_device
from tinyflow.files import write_whole
from tinyflow.picturebook.model import load_tiny
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline

ROWS = ("lora", "switched-off", "paper", "bound")        # of the sheet
# `learn` made the files in LEARNED, one per row, from the references of SECOND
ROBOT, SECOND, LEARNED = "checked_robot", "dotted_house", FOLDER.parent / "learned"


class Assessed(NamedTuple):
    measures: dict[str, dict[str, float]]        # by method
    sentences: list[str]                         # one on each method

    @property
    def report(self) -> str:
        return "\n".join([table(self.measures), "", *self.sentences])


def assess(pipe: Pipeline, toy: Toy, concept: ConceptSet, samplers: Samplers) -> Assessed:
    """Draws and measures each method, with a progress bar.

    Pictures of texts that a method leaves to the base model are reused.
    """
    reader, references = Reader.shipped(), np.stack([r.picture for r in concept.references])
    count, results = count_pictures(toy) * (len(samplers) + 1) - PLAIN, {}
    with tqdm(total=count, desc=f"{'drawing':24s}", unit="picture") as bar:
        original = draw_groups(pipe, None, toy, bar, steps=FEW_STEPS)
        original_values = measure(pipe, reader, None, toy, references, original, original)
        for name, sampler in samplers.items():
            reused = {group: original[group] for group in UNNAMED if is_held(METHODS[name])}
            custom = draw_groups(pipe, toy=toy, bar=bar, steps=FEW_STEPS, known=reused, **sampler)
            results[name] = measure(pipe, reader, sampler["theta"], toy, references, original, custom)
    return Assessed(results, [in_words(name, values, original_values) for name, values in results.items()])


def demo_command(options: argparse.Namespace) -> None:
    """Learns the shipped concept by each method of ROWS and compares.

    Leaves comparison.png, table.md, results.json, the concepts and the logs in --out, and prints the table.
    """
    begun, out = time.time(), options.out
    pipe = load_tiny(choose_device(options.device))
    check_run_folder(out)
    concept = load_concept(FOLDER / ROBOT, CONCEPTS[ROBOT].class_word, pipe.picture_size)
    configs = {name: training_config(options, "tiny", METHODS[name]) for name in ROWS}
    with run_folder(out, concept, configs["lora"], "demo", f"tiny at {pipe.picture_size} px"):
        for name, config in configs.items():
            training = learn(pipe, concept, config, out, METHODS[name], name=f"{name}-")
            for _ in follow(name, training, config.steps, METHODS[name].stages):
                pass
        branches = {name: load_branch(pipe, out / f"{name}-concept.safetensors")[0] for name in ROWS}
        samplers = {name: as_sampled(METHODS[name], branches[name], pipe.velocity) for name in ROWS}
        assessed = assess(pipe, CONCEPTS[ROBOT], concept, samplers)
        draw_sheet(pipe, concept, samplers, unseen_texts(concept.class_word), out / "comparison.png",
                   assessed.sentences, second_concept(pipe, branches))
        write_whole(out / "results.json", json.dumps(assessed.measures, indent=1).encode())
        write_whole(out / "table.md", f"{assessed.report}\n".encode())
    print(f"\n{assessed.report}\n\n{out}/comparison.png compares all methods; {out}/ holds the concepts, "
          f"the logs and the table ({time.time() - begun:.0f} s)")


def second_concept(pipe: Pipeline, branches: dict[str, Branch]) -> Second:
    """The second concept of the sheet, and each row's model with the adapters of both."""
    samplers = {}
    for name, branch in branches.items():
        second = load_branch(pipe, LEARNED / f"{SECOND}-{name}.safetensors")[0]
        samplers[name] = as_sampled(METHODS[name], partial(velocity_with, [branch, second]), pipe.velocity)
    return Second(CONCEPTS[SECOND].references(), samplers)

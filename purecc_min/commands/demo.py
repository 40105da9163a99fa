"""The demo: one concept, learned in several ways, drawn side by side and measured.

    lora           a plain LoRA: L_CC alone
    switched-off   a LoRA that the base model stands in for where a text is without [V]
    paper          PureCC as the paper writes it: an extractor, then fresh adapters that learn with L_PCC
    bound          L_CC, with adapters that act on [V]'s phrase alone

Each takes as many steps, with the settings of registry.py. The sheet has columns in which a [V] robot stands
beside a plain one, and beside a second learned concept, which comes with the repository (LEARNED): there
nobody can hide. The same with more methods, concepts and seeds is in benchmark/.
"""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from purecc_min.algorithm import Training, concept_facts, stage_1, stage_2
from purecc_min.branch import Branch, velocity_with
from purecc_min.commands.folder import load_concept
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import ConceptSet, encode
from purecc_min.measure.draw import FEW_STEPS, PLAIN, UNNAMED, count_pictures, draw_groups
from purecc_min.measure.first_picture import Second, Who, draw_sheet, unseen_texts
from purecc_min.measure.measures import in_words, measure, table
from purecc_min.measure.toy import CONCEPTS, FOLDER, Toy
from purecc_min.registry import METHODS, as_sampled, is_held
from purecc_min.train import TrainConfig
from tinyflow.files import write_whole
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline

ROWS = ("lora", "switched-off", "paper", "bound")        # of the sheet
# `learn` made these of the second concept's references, a file for each row
SECOND, LEARNED = "dotted_house", FOLDER.parent / "learned"


def assess(pipe: Pipeline, toy: Toy, concept: ConceptSet, drawn: Who) -> tuple[dict[str, dict], list[str]]:
    """The measures of each method, by name, and a sentence on each; behind a progress bar.

    Where a text without [V] is the base model's by construction, it is not drawn again.
    """
    reader, references = Reader.shipped(), np.stack([r.picture for r in concept.references])
    count, results = count_pictures(toy) * (len(drawn) + 1) - PLAIN, {}
    with tqdm(total=count, desc=f"{'drawing':24s}", unit="picture") as bar:
        original = draw_groups(pipe, None, toy, bar, steps=FEW_STEPS)
        of_original = measure(pipe, reader, None, toy, references, original, original)
        for name, who in drawn.items():
            known = {group: original[group] for group in UNNAMED if is_held(METHODS[name])}
            custom = draw_groups(pipe, toy=toy, bar=bar, steps=FEW_STEPS, known=known, **who)
            results[name] = measure(pipe, reader, who["theta"], toy, references, original, custom)
    sentences = [in_words(name, values, of_original) for name, values in results.items()]
    return results, sentences


def demo(pipe: Pipeline, configs: dict[str, TrainConfig], folder: Path, toy: str = "checked_robot") -> None:
    """Learns the shipped concept by each method of ROWS and compares.

    Leaves comparison.png, table.md, results.json, the concepts and the logs in `folder`, and prints the
    table.
    """
    check_run_folder(folder)
    begun, concept = time.time(), load_concept(FOLDER / toy, CONCEPTS[toy].class_word, pipe.picture_size)
    with run_folder(folder, concept, configs["lora"], "demo", f"tiny at {pipe.picture_size} px"):
        branches = learn_all(pipe, concept, configs, folder)
        drawn = {name: as_sampled(METHODS[name], branches[name], pipe.velocity) for name in ROWS}
        results, sentences = assess(pipe, CONCEPTS[toy], concept, drawn)
        draw_sheet(pipe, concept, drawn, unseen_texts(concept.class_word), folder / "comparison.png",
                   sentences, second_concept(pipe, branches))
        write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
        report = "\n".join([table(results), "", *sentences])
        write_whole(folder / "table.md", (report + "\n").encode())
    print(f"\n{report}\n\n{folder}/comparison.png shows all, side by side; {folder}/ holds the concepts, "
          f"the logs and the table ({time.time() - begun:.0f} s)")


def learn_all(pipe: Pipeline, concept: ConceptSet, configs: dict[str, TrainConfig],
              folder: Path) -> dict[str, Branch]:
    """A row of the sheet -> what it has learned, frozen."""
    data, learned = encode(pipe, concept), {}

    def train(name: str, training: Training) -> Branch:
        theta, rows = training
        follow(name, rows, configs["lora"].steps)
        return theta.requires_grad_(False)

    for name in ("lora", "switched-off", "bound"):
        learned[name] = train(name, stage_1(pipe, data, configs[name], folder, METHODS[name], name))
    paper, config = METHODS["paper"], configs["paper"]
    first = replace(config, learning_rate=config.extractor_learning_rate or config.learning_rate)
    theta_1 = train("PureCC's extractor", stage_1(pipe, data, first, folder, paper.extractor, "extractor"))
    learned["paper"] = train("paper", stage_2(pipe, theta_1, data, config, folder, paper, "paper"))
    for name, theta in learned.items():
        facts = concept_facts(pipe, concept.class_word, configs[name], name, "tiny")
        theta.save(folder / f"{name}-concept.safetensors", facts)
    return learned


def second_concept(pipe: Pipeline, branches: dict[str, Branch]) -> Second:
    """The second concept of the sheet, and each row's model with the adapters of both."""
    drawn = {}
    for name, branch in branches.items():
        second = Branch.load(pipe, LEARNED / f"{SECOND}-{name}.safetensors")[0]
        drawn[name] = as_sampled(METHODS[name], partial(velocity_with, [branch, second]), pipe.velocity)
    return Second(CONCEPTS[SECOND].references(), drawn)

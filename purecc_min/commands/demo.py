"""The demo: one concept, learned in several ways, drawn side by side and measured.

    lora           stage 1 of Algorithm 1
    switched-off   the same for texts with [V]; it is also PureCC's frozen extractor
    paper          stage 2 as the paper writes it: fresh adapters, which learn with L_PCC
    bound          L_CC, with adapters that act on [V]'s phrase alone

Each takes as many steps, with the settings of registry.py. The sheet has a column in which a [V] robot stands
beside a plain one: there nobody can hide. The same with more methods, concepts and seeds is in benchmark/.
"""

import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from purecc_min.algorithm import Training, concept_facts, stage_1, stage_2
from purecc_min.commands.folder import load_concept
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import ConceptSet, encode
from purecc_min.measure.draw import FEW_STEPS, PLAIN, count_pictures, draw_groups
from purecc_min.measure.first_picture import draw_sheet, unseen_texts
from purecc_min.measure.measures import in_words, measure, table
from purecc_min.measure.toy import CONCEPTS, FOLDER, Toy
from purecc_min.registry import METHODS, as_sampled
from purecc_min.train import TrainConfig
from tinyflow.files import write_whole
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline, Velocity

LEARNED = ("lora", "switched-off", "paper", "bound")     # the sheet's rows


def assess(pipe: Pipeline, toy: Toy, concept: ConceptSet,
           drawn: dict[str, dict[str, Velocity]]) -> tuple[dict[str, dict], list[str]]:
    """The measures of each method, by name, and a sentence on each; behind a progress bar.

    drawn: name -> who answers which text (registry.as_sampled).
    """
    reader, references = Reader.shipped(), np.stack([r.picture for r in concept.references])
    count, results = count_pictures(toy) * (len(drawn) + 1) - PLAIN, {}
    with tqdm(total=count, desc=f"{'drawing':24s}", unit="picture") as bar:
        original = draw_groups(pipe, None, toy, bar, steps=FEW_STEPS)
        of_original = measure(pipe, reader, None, toy, references, original, original)
        for name, who in drawn.items():
            custom = draw_groups(pipe, toy=toy, bar=bar, steps=FEW_STEPS, **who)
            results[name] = measure(pipe, reader, who["theta"], toy, references, original, custom)
    sentences = [in_words(name, values, of_original) for name, values in results.items()]
    return results, sentences


def demo(pipe: Pipeline, configs: dict[str, TrainConfig], folder: Path, toy: str = "checked_robot") -> None:
    """Learns the shipped concept by each method of LEARNED and compares.

    Leaves comparison.png, table.md, results.json, the concepts and the logs in `folder`, and prints the
    table.
    """
    check_run_folder(folder)
    begun, concept = time.time(), load_concept(FOLDER / toy, CONCEPTS[toy].class_word, pipe.picture_size)
    with run_folder(folder, concept, configs["lora"], "demo", f"tiny at {pipe.picture_size} px"):
        drawn = learn_all(pipe, concept, configs, folder)
        results, sentences = assess(pipe, CONCEPTS[toy], concept, drawn)
        texts = unseen_texts(concept.class_word)
        draw_sheet(pipe, concept, drawn, texts, folder / "comparison.png", sentences)
        write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
        report = "\n".join([table(results), "", *sentences])
        write_whole(folder / "table.md", (report + "\n").encode())
    print(f"\n{report}\n\n{folder}/comparison.png shows all, side by side; {folder}/ holds the concepts, "
          f"the logs and the table ({time.time() - begun:.0f} s)")


def learn_all(pipe: Pipeline, concept: ConceptSet, configs: dict[str, TrainConfig],
              folder: Path) -> dict[str, dict[str, Velocity]]:
    """A row of the sheet -> who answers which text in it."""
    data, learned = encode(pipe, concept), {}

    def train(name: str, training: Training) -> None:
        theta, rows = training
        follow(name, rows, configs[name].steps)
        facts = concept_facts(pipe, concept.class_word, configs[name], name, "tiny")
        theta.save(folder / f"{name}-concept.safetensors", facts)
        learned[name] = theta.requires_grad_(False)

    for name in ("lora", "switched-off", "bound"):
        train(name, stage_1(pipe, data, configs[name], folder, METHODS[name], name))
    extractor = learned["switched-off"]          # a LoRA with the settings of paper's own extractor
    train("paper", stage_2(pipe, extractor, data, configs["paper"], folder, METHODS["paper"], "paper"))
    return {name: as_sampled(METHODS[name], learned[name], pipe.velocity) for name in LEARNED}

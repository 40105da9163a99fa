"""The demo: one concept, learned in three ways, drawn side by side and measured.

    plain LoRA     stage 1 of Algorithm 1, which is also PureCC's frozen extractor; and the same, switched off
                   for texts without [V], which costs nothing
    PureCC         stage 2 as the paper writes it: fresh adapters, which learn with L_PCC
    bound          L_CC, with adapters that act at [V] alone

Each takes as many steps. The sheet has a column in which a [V] robot stands beside a plain one: there nobody
can hide. The same with more methods, concepts and seeds is in benchmark/.
"""

import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from purecc_min.algorithm import Training, concept_facts, stage_1, stage_2
from purecc_min.branch import Branch, only_with_token
from purecc_min.commands.folder import load_concept
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import ConceptSet, encode
from purecc_min.measure.draw import FEW_STEPS, PLAIN, count_pictures, draw_groups
from purecc_min.measure.first_picture import draw_sheet, unseen_texts
from purecc_min.measure.measures import in_words, measure, table
from purecc_min.measure.toy import CONCEPTS, FOLDER, Toy
from purecc_min.methods import METHODS
from purecc_min.train import TrainConfig
from tinyflow.files import write_whole
from tinyflow.picturebook.reader import Reader
from tinyflow.pipeline import Pipeline, Velocity


def assess(pipe: Pipeline, toy: Toy, concept: ConceptSet,
           thetas: dict[str, Velocity]) -> tuple[dict[str, dict], list[str]]:
    """The measures of each theta, by name, and a sentence on each; behind a progress bar."""
    reader, references = Reader.shipped(), np.stack([r.picture for r in concept.references])
    count, results = count_pictures(toy) * (len(thetas) + 1) - PLAIN, {}
    with tqdm(total=count, desc=f"{'drawing':24s}", unit="picture") as bar:
        original = draw_groups(pipe, None, toy, bar, steps=FEW_STEPS)
        of_original = measure(pipe, reader, None, toy, references, original, original)
        for name, theta in thetas.items():
            custom = draw_groups(pipe, theta, toy, bar, steps=FEW_STEPS)
            results[name] = measure(pipe, reader, theta, toy, references, original, custom)
    sentences = [in_words(name, values, of_original) for name, values in results.items()]
    return results, sentences


def demo(pipe: Pipeline, config: TrainConfig, folder: Path, toy: str = "checked_robot") -> None:
    """Learns the shipped concept in three ways and compares.

    Leaves comparison.png, table.md, results.json, the concepts and the logs in `folder`, and prints the
    table.
    """
    check_run_folder(folder)
    begun, concept = time.time(), load_concept(FOLDER / toy, CONCEPTS[toy].class_word, pipe.picture_size)
    with run_folder(folder, concept, config, "demo", f"tiny at {pipe.picture_size} px"):
        thetas = learn_all(pipe, concept, config, folder)
        results, sentences = assess(pipe, CONCEPTS[toy], concept, thetas)
        texts = unseen_texts(concept.class_word)
        draw_sheet(pipe, concept, thetas, texts, folder / "comparison.png", sentences)
        write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
        report = "\n".join([table(results), "", *sentences])
        write_whole(folder / "table.md", (report + "\n").encode())
    print(f"\n{report}\n\n{folder}/comparison.png shows all, side by side; {folder}/ holds the concepts, "
          f"the logs and the table ({time.time() - begun:.0f} s)")


def learn_all(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path) -> dict[str, Velocity]:
    """A row of the sheet -> what draws it."""
    data = encode(pipe, concept)

    def train(name: str, title: str, training: Training) -> Branch:
        theta, rows = training
        follow(title, rows, config.steps)
        facts = concept_facts(pipe, concept.class_word, config, name, "tiny")
        theta.save(folder / f"{name}-concept.safetensors", facts)
        return theta.requires_grad_(False)

    lora = train("lora", "plain LoRA, stage 1", stage_1(pipe, data, config, folder, name="lora"))
    paper = train("paper", "PureCC, stage 2", stage_2(pipe, lora, data, config, folder, name="paper"))
    bound = stage_1(pipe, data, config, folder, where=METHODS["bound"].where, name="bound")
    return {"plain LoRA": lora, "LoRA, switched off without [V]": only_with_token(lora, pipe.velocity),
            "PureCC": paper, "bound": train("bound", "bound", bound)}

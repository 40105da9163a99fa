"""The demo: one concept, learned by a plain LoRA and by PureCC, drawn side by side and measured.

Both start from the same extractor (stage 1) and the same embeddings, take the same steps on the same draws,
and differ in one thing, their loss: L_CC alone against L_PCC. Both answer guidance's empty text themselves,
as in training. The same with more methods, concepts and seeds is in benchmark/.
"""

import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from purecc_min.algorithm import concept_facts, stage_1, stage_2
from purecc_min.branch import Branch
from purecc_min.commands.folder import load_concept
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import ConceptSet, base_text, encode
from purecc_min.measure.draw import PLAIN, count_pictures, draw, draw_groups
from purecc_min.measure.measures import in_words, measure, table
from purecc_min.measure.toy import CONCEPTS, FOLDER, Toy
from purecc_min.methods import l_cc, paper
from purecc_min.train import TrainConfig
from tinyflow.files import write_picture, write_whole
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.sheet import sheet
from tinyflow.pipeline import Pipeline

# Backgrounds and places that the references never show, then prompts without [V].
WITH_TOKEN = ["a small [V] {} on the left in the snow", "a big [V] {} on the right in the meadow",
              "a small [V] {} in the middle at night", "a big [V] {} on the left on the beach",
              "a small [V] {} on the right in the room"]
WITHOUT_TOKEN = ["a big {} on the left in the snow", "a big green cat on the right on the beach",
                 "a small red house in the middle at night"]
LOSSES = {"plain LoRA": ("lora", l_cc), "PureCC": ("paper", paper)}      # row -> its files' name, its loss


def unseen_texts(class_word: str) -> list[str]:
    return [text.format(class_word) for text in WITH_TOKEN + WITHOUT_TOKEN]


def draw_sheet(pipe: Pipeline, concept: ConceptSet, thetas: dict[str, Branch], texts: list[str],
               path: Path) -> None:
    """Rows: references, the original model with the base texts, each theta with the complete ones."""
    def pictures(theta: Branch | None, texts: list[str]) -> list[np.ndarray]:
        return list(pipe.decode_images(draw(pipe, theta, texts, concept.class_word)))

    rows = [("references", [r.picture for r in concept.references][:len(texts)]),
            ("original model, base text", pictures(None, [base_text(text) for text in texts]))]
    rows += [(f"{name}, complete text", pictures(theta, texts)) for name, theta in thetas.items()]
    write_picture(path, sheet(rows, [(1, texts)], side=min(256, max(128, pipe.picture_size))))


def assess(pipe: Pipeline, toy: Toy, concept: ConceptSet,
           thetas: dict[str, Branch]) -> tuple[dict[str, dict], list[str]]:
    """The measures of each theta, by name, and a sentence on each; behind a progress bar."""
    reader, references = Reader.shipped(), np.stack([r.picture for r in concept.references])
    count, results = count_pictures(toy) * (len(thetas) + 1) - PLAIN, {}
    with tqdm(total=count, desc=f"{'drawing':24s}", unit="picture") as bar:
        original = draw_groups(pipe, None, toy, bar=bar)
        of_original = measure(pipe, reader, None, toy, references, original, original)
        for name, theta in thetas.items():
            custom = draw_groups(pipe, theta, toy, bar=bar)
            results[name] = measure(pipe, reader, theta, toy, references, original, custom)
    sentences = [in_words(name, values, of_original) for name, values in results.items()]
    return results, sentences


def demo(pipe: Pipeline, config: TrainConfig, folder: Path, toy: str = "striped_robot") -> None:
    """Learns the shipped concept twice and compares.

    Leaves comparison.png, table.md, results.json, the concepts and the logs in `folder`, and prints the
    table.
    """
    check_run_folder(folder)
    begun, concept = time.time(), load_concept(FOLDER / toy, CONCEPTS[toy].class_word, pipe.picture_size)
    with run_folder(folder, concept, config, "demo", f"tiny at {pipe.picture_size} px"):
        thetas = learn_both(pipe, concept, config, folder)
        draw_sheet(pipe, concept, thetas, unseen_texts(concept.class_word), folder / "comparison.png")
        results, sentences = assess(pipe, CONCEPTS[toy], concept, thetas)
        write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
        report = "\n".join([table(results), "", *sentences])
        write_whole(folder / "table.md", (report + "\n").encode())
    print(f"\n{report}\n\n{folder}/comparison.png shows both, side by side; {folder}/ holds the concepts, "
          f"the logs and the table ({time.time() - begun:.0f} s)")


def learn_both(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, folder: Path) -> dict[str, Branch]:
    """A key of LOSSES -> what that loss has taught, from one frozen extractor."""
    data = encode(pipe, concept)
    theta_1, rows = stage_1(pipe, data, config, folder)
    follow("stage 1: extractor", rows, config.steps)
    theta_1.requires_grad_(False)
    thetas = {}
    for name, (file, loss) in LOSSES.items():
        thetas[name], rows = stage_2(pipe, theta_1, data, config, folder, loss, file)
        follow(f"stage 2: {name}", rows, config.steps)
        facts = concept_facts(pipe, concept.class_word, config, file, "tiny")
        thetas[name].save(folder / f"{file}-concept.safetensors", facts)
    return thetas

"""The demo: one concept, learned by a plain LoRA and by PureCC, drawn side by side and measured.

Both start from the same extractor (stage 1) and the same embeddings, take the same steps on the same draws, and differ in one thing: the
plain LoRA has eta = 0, that is L_CC alone. Read next: benchmark/, the same with more methods, concepts and seeds.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from purecc_min.branch import Branch
from purecc_min.concept import ConceptSet, load_concept, without_token
from purecc_min.evaluate import PLAIN, count_pictures, draw, draw_groups, measure, table
from purecc_min.run import claim, follow
from purecc_min.sheet import sheet
from purecc_min.toy import FOLDER, TOYS, Toy
from purecc_min.train import TrainConfig, concept_facts, prepare, stage_1, stage_2
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader
from tinyflow.weights import write_whole

# Backgrounds and places that the references never show, then prompts without [V].
WITH_TOKEN = ["a small [V] {} on the left in the snow", "a big [V] {} on the right in the meadow", "a small [V] {} in the middle at night",
              "a big [V] {} on the left on the beach", "a small [V] {} on the right in the room"]
WITHOUT_TOKEN = ["a big {} on the left in the snow", "a big green cat on the right on the beach", "a small red house in the middle at night"]


def unseen_texts(class_word: str) -> list[str]:
    return [text.format(class_word) for text in WITH_TOKEN + WITHOUT_TOKEN]


def draw_sheet(pipe: Pipeline, concept: ConceptSet, branches: dict[str, Branch], complete: list[str], path: Path) -> None:
    """References, the original model with the base texts, and each branch with the complete texts, at seeds 0, 1, 2, ..."""
    base = [without_token(text) for text in complete]
    pictures = lambda branch, texts: list(pipe.decode_images(draw(pipe, branch, texts, concept.class_word)))
    rows = [("references", [r.picture for r in concept.references][:len(base)]), ("original model, base text", pictures(None, base))]
    rows += [(f"{name}, complete text", pictures(branch, complete)) for name, branch in branches.items()]
    sheet(rows, [(1, complete)], side=min(256, max(128, pipe.picture_size))).save(path)


def assess(pipe: Pipeline, toy: Toy, concept: ConceptSet, branches: dict[str, Branch]) -> dict[str, dict[str, float]]:
    """The measures of each branch, behind a progress bar."""
    reader, references = Reader.shipped(), np.stack([r.picture for r in concept.references])
    with tqdm(total=count_pictures(toy) * (len(branches) + 1) - PLAIN, desc=f"{'drawing':24s}", unit="picture") as bar:
        original = draw_groups(pipe, None, toy, bar=bar)
        return {name: measure(pipe, reader, branch, toy, references, original, draw_groups(pipe, branch, toy, bar=bar))
                for name, branch in branches.items()}


def demo(pipe: Pipeline, config: TrainConfig, folder: Path, toy: str = "striped_robot") -> dict[str, dict[str, float]]:
    """Learns the shipped concept twice and compares. Leaves comparison.png, table.md, results.json, the concepts and the logs in `folder`."""
    concept = load_concept(FOLDER / toy, TOYS[toy].class_word, pipe.picture_size)
    claim(folder, concept, config)
    data = prepare(pipe, concept)

    theta_1, rows = stage_1(pipe, data, config, folder)
    follow("stage 1: extractor", rows, config.steps)
    theta_1.requires_grad_(False)
    branches = {}
    for name, its_config in (("lora", replace(config, eta=0.0)), ("purecc", config)):
        branches[name], rows = stage_2(pipe, theta_1, data, its_config, folder, name)
        follow(f"stage 2: {name}", rows, config.steps)
        branches[name].save(folder / f"{name}-concept.safetensors", concept_facts(concept.class_word, its_config))

    shown = {"plain LoRA": branches["lora"], "PureCC": branches["purecc"]}
    draw_sheet(pipe, concept, shown, unseen_texts(concept.class_word), folder / "comparison.png")
    results = assess(pipe, TOYS[toy], concept, shown)
    write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
    write_whole(folder / "table.md", (table(results) + "\n").encode())
    return results

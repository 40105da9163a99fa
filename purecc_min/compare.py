"""Every measure for plain LoRA and PureCC over several training seeds, at equal steps and at equal fidelity.

    python -m purecc_min compare --seeds 5

Three columns. LoRA and PureCC: the same stage 1, the same embeddings, the same steps and draws; they differ in eta. LoRA stopped early: the first
of LoRA's snapshots whose similarity to the references reaches PureCC's, because a concept learned less always damages
less. Each cell is the mean over seeds and the half-width of its 95 % interval (Student's t).
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from purecc_min.branch import Branch
from purecc_min.concept import ConceptSet, load_concept
from purecc_min.evaluate import MEASURES, Recogniser, calibrate, concept_prompts, draw, draw_all, measure
from purecc_min.run import claim, follow
from purecc_min.toy import FOLDER, TOYS
from purecc_min.train import TrainConfig, concept_facts, prepare, stage_1, stage_2
from tinyflow.pipeline import Pipeline
from tinyflow.reader import Reader, to_tensor
from tinyflow.weights import write_whole

SNAPSHOT_EVERY = 25
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}    # 97.5 % quantile by degrees of freedom


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of the mean; the latter is nan for a single value."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(STUDENT_T.get(len(values) - 1, 1.96) * spread)


def compare_seed(pipe: Pipeline, reader: Reader, recogniser: Recogniser, concept: ConceptSet, config: TrainConfig,
                 folder: Path) -> dict[str, dict[str, float]]:
    """One training seed: the three columns of measures."""
    word, references, data = concept.class_word, np.stack([r.picture for r in concept.references]), prepare(pipe, concept)
    theta_1, rows = stage_1(pipe, data, config, folder)
    follow(f"seed {config.seed}: stage 1", rows, config.steps)
    theta_1.requires_grad_(False)
    purecc, rows = stage_2(pipe, theta_1, data, config, folder, "purecc")
    follow(f"seed {config.seed}: PureCC", rows, config.steps)

    # A run that stopped between a checkpoint and its snapshot would miss the snapshot for ever: this LoRA starts anew, to the same result.
    (folder / "lora.safetensors").unlink(missing_ok=True)
    without = replace(config, eta=0.0)
    lora, rows = stage_2(pipe, theta_1, data, without, folder, "lora")
    snapshot = lambda step: folder / f"lora-{step:04d}.safetensors"

    def keep_snapshots():
        for row in rows:
            if row["step"] % SNAPSHOT_EVERY == 0:
                lora.save(snapshot(row["step"]), concept_facts(word, without))
            yield row

    follow(f"seed {config.seed}: LoRA", keep_snapshots(), config.steps)

    original = draw_all(pipe, None, word, "original")
    results = {}
    for name, branch in (("LoRA", lora), ("PureCC", purecc)):
        results[name] = measure(pipe, reader, branch, word, references, original, draw_all(pipe, branch, word, name), recogniser)

    centre = reader(to_tensor(references)).identity.mean(0)
    centre, texts = centre / centre.norm(), [p.complete for p in concept_prompts(word)]
    stopped, stop = lora, config.steps
    for step in range(SNAPSHOT_EVERY, config.steps + 1, SNAPSHOT_EVERY):
        branch, _ = Branch.load(pipe, snapshot(step))
        if (reader(draw(pipe, branch, texts, word)).identity @ centre).mean().item() >= results["PureCC"]["similarity"]:
            stopped, stop = branch, step
            break
    name = "LoRA stopped early"
    results[name] = measure(pipe, reader, stopped, word, references, original, draw_all(pipe, stopped, word, name), recogniser)
    results[name]["steps"] = stop
    return results


def compare(pipe: Pipeline, config: TrainConfig, seeds: int, folder: Path, toy: str = "striped_robot") -> str:
    """All seeds; goes on where it was interrupted. Leaves results.json (every seed) and table.md; returns the table."""
    reader, concept = Reader.shipped(), load_concept(FOLDER / toy, TOYS[toy].class_word, pipe.picture_size)
    recogniser = calibrate(reader, TOYS[toy])
    per_seed = []
    for seed in range(config.seed, config.seed + seeds):
        file, its_config = folder / f"seed{seed}" / "results.json", replace(config, seed=seed)
        claim(file.parent, concept, its_config)
        if not file.exists():
            results = compare_seed(pipe, reader, recogniser, concept, its_config, file.parent)
            write_whole(file, json.dumps(results, indent=1).encode())
        per_seed.append(json.loads(file.read_text()))
    write_whole(folder / "results.json", json.dumps(per_seed, indent=1).encode())
    columns = list(per_seed[0])
    lines = ["| measure | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in [*MEASURES, "steps"]:
        cells = ["{:.3f} ± {:.3f}".format(*mean_and_interval([result[c][name] for result in per_seed])) if name in per_seed[0][c]
                 else f"{config.steps}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"{seeds} seeds; on renders, the recogniser takes {recogniser.hits:.1%} of the concept's "
                  f"and {recogniser.false_alarms:.1%} of its near misses'"]
    write_whole(folder / "table.md", ("\n".join(lines) + "\n").encode())
    return "\n".join(lines)

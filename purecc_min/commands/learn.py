"""`learn`: a concept from a folder of pictures, on the tiny base model or on public weights."""

from pathlib import Path

from purecc_min.algorithm import learn
from purecc_min.branch import Branch
from purecc_min.commands.base_models import (
    BASE_MODELS,
    check_base_model,
    open_base_model,
    usable_device,
)
from purecc_min.commands.demo import assess, draw_sheet, unseen_texts
from purecc_min.commands.folder import load_concept
from purecc_min.commands.memory import plan
from purecc_min.commands.run import claim, follow
from purecc_min.measure.measures import table
from purecc_min.measure.toy import Toy
from purecc_min.methods import METHODS
from purecc_min.train import TrainConfig
from tinyflow.sd3.load import read_config


def learn_folder(folder: Path, class_word: str | None, config: TrainConfig, out: Path, method: str,
                 base_model: str, weights: Path | None, text: Path | None, size: int,
                 device_name: str) -> None:
    """Learns the concept and leaves everything in `out`: concept.safetensors, logs, comparison.png.

    Raises: InputError for anything that cannot be used, before anything is trained.
    """
    model, device = BASE_MODELS[base_model], usable_device(device_name)
    public = model.public
    check_base_model(base_model, weights, size)
    concept = load_concept(folder, class_word, size, model.variants, config.seed)
    for note in concept.notes:
        print("converted", note)
    checkpointing = public and plan(read_config(weights, text, size), config, size, METHODS[method], device)
    pipe = open_base_model(base_model, weights, text, size, device)
    pipe.mmdit.checkpointing = checkpointing
    claim(out, concept, config, method, f"{base_model} at {size} px")
    stages = learn(pipe, concept, config, out, method, base_model)
    rows = ({**row, "step": row["step"] + (stage - 1) * config.steps} for stage, row in stages)
    follow(f"learning: {method}", rows, (2 if METHODS[method].extractor else 1) * config.steps)

    theta, _ = Branch.load(pipe, out / "concept.safetensors")
    texts = [r.complete for r in concept.references] if public else unseen_texts(concept.class_word)
    draw_sheet(pipe, concept, {method: theta}, texts, out / "comparison.png")
    if not public:                               # the reader network knows the picture-book world only
        toy = Toy(dict(object=concept.class_word), {})
        print(f"\n{table(assess(pipe, toy, concept, {method: theta}))}")
    print(f"\nlearned: {out}/concept.safetensors; {out}/comparison.png shows it")

"""`learn`: a concept from a folder of pictures, on the tiny base model or on public weights."""

from pathlib import Path
from typing import Iterator

from purecc_min.algorithm import learn
from purecc_min.branch import Branch, only_with_token
from purecc_min.commands.base_models import (
    BASE_MODELS,
    check_base_model,
    open_base_model,
    open_tokenizer,
    usable_device,
)
from purecc_min.commands.demo import assess
from purecc_min.commands.folder import load_concept
from purecc_min.commands.memory import plan
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import TOKEN, ConceptSet
from purecc_min.measure.first_picture import draw_sheet, unseen_texts
from purecc_min.measure.measures import table
from purecc_min.measure.toy import STYLE_WORD, Toy
from purecc_min.methods import METHODS
from purecc_min.train import TrainConfig
from tinyflow.errors import InputError, shown
from tinyflow.picturebook.world import OBJECTS
from tinyflow.pipeline import Velocity
from tinyflow.sd3.load import read_config


def learn_folder(folder: Path, class_word: str | None, config: TrainConfig, out: Path, method: str,
                 base_model: str, weights: Path | None, text: Path | None, size: int, device_name: str,
                 samples_every: int | None = None) -> None:
    """Learns the concept and leaves everything in `out`: concept.safetensors, logs, comparison.png.

    samples_every: steps between sheets of samples on the way, samples-<stage>-<step>.png.

    Raises: InputError for anything that cannot be used, before anything is trained.
    """
    model, device = BASE_MODELS[base_model], usable_device(device_name)
    check_base_model(base_model, weights, size)
    check_run_folder(out)
    if class_word and not model.public:
        check_noun(class_word)
    concept = load_concept(folder, class_word, size, model.variants, config.seed)
    if not model.public:                         # it may be the CSV's
        check_noun(concept.class_word)
    for note in concept.notes:
        print("converted", note)
    if concept.references[0].masks is not None:
        print("masks: only what is white in them counts in L_CC")
    check_texts(open_tokenizer(base_model, weights, text), concept, folder)
    checkpointing = model.public and plan(read_config(weights, text, size), config, size, METHODS[method],
                                          device)
    pipe = open_base_model(base_model, weights, text, size, device)
    pipe.mmdit.checkpointing = checkpointing
    with run_folder(out, concept, config, method, f"{base_model} at {size} px"):
        texts = [r.complete for r in concept.references]
        if not model.public:
            texts = unseen_texts(concept.class_word)

        def as_drawn(theta: Branch) -> Velocity:
            return only_with_token(theta, pipe.velocity) if METHODS[method].named_only else theta

        def rows() -> Iterator[dict]:
            for stage, theta, row in learn(pipe, concept, config, out, method, base_model):
                if samples_every and row["step"] % samples_every == 0:
                    file = out / f"samples-{stage}-{row['step']:06d}.png"
                    title = f"stage {stage}, step {row['step']}"
                    draw_sheet(pipe, concept, {title: as_drawn(theta)}, texts, file)
                yield {**row, "step": row["step"] + (stage - 1) * config.steps}

        follow(f"learning: {method}", rows(), (2 if METHODS[method].extractor else 1) * config.steps)
        theta = as_drawn(Branch.load(pipe, out / "concept.safetensors")[0])
        draw_sheet(pipe, concept, {method: theta}, texts, out / "comparison.png")
        if not model.public:                     # the reader knows the tiny world alone
            toy = Toy(dict(object=concept.class_word), {})
            results, sentences = assess(pipe, toy, concept, {method: theta})
            print("\n".join(["", table(results), "", *sentences]))
    print(f"\nlearned: {out}/concept.safetensors; {out}/comparison.png shows it")


def check_texts(tokenizer, concept: ConceptSet, folder: Path) -> None:
    """Raises: InputError that names the picture whose text cannot be encoded, before anything is loaded."""
    word = concept.class_word
    for reference in concept.references:
        try:
            tokenizer([reference.complete, reference.base, reference.target], {TOKEN: word})
            tokenizer([reference.base, word], {word: word})      # where Y starts from
        except InputError as error:
            raise InputError(f"{folder / reference.id}: {error}") from None


def check_noun(word: str) -> None:
    """Raises: InputError for a class word that names nothing in the tiny world; "a" stands for a style."""
    if word.lower() not in (*OBJECTS, STYLE_WORD):
        raise InputError(f"--class-word {shown(word)}: the tiny model knows these kinds of things: "
                         f"{', '.join(OBJECTS)}; for a style, say a")

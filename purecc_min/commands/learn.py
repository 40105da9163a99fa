"""`learn`: a concept from a folder of pictures, on the tiny base model or on public weights."""

from dataclasses import replace
from pathlib import Path
from typing import Iterator

from purecc_min.algorithm import concept_facts, learn
from purecc_min.branch import Branch
from purecc_min.commands.base_models import (
    BASE_MODELS,
    BaseModel,
    check_base_model,
    open_base_model,
    open_tokenizer,
)
from purecc_min.commands.demo import assess
from purecc_min.commands.folder import load_concept
from purecc_min.commands.memory import plan
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import TOKEN, ConceptSet, EncodedConcept, styles_among
from purecc_min.measure.first_picture import draw_sheet, unseen_texts
from purecc_min.measure.judge import one_in_each_half
from purecc_min.measure.measures import table
from purecc_min.measure.toy import PAIR_TEMPLATES, STYLE_WORD, Toy
from purecc_min.pairs import ON_PUBLIC_WEIGHTS, check_has_halves, imagine_resumably
from purecc_min.registry import METHODS, as_sampled
from purecc_min.train import TrainConfig
from tinyflow.errors import InputError, shown
from tinyflow.files import read_text, write_picture, write_whole
from tinyflow.picturebook.reader import Reader
from tinyflow.picturebook.sheet import sheet
from tinyflow.picturebook.world import OBJECTS
from tinyflow.pipeline import Pipeline, to_pictures
from tinyflow.sd3.load import read_config
from tinyflow.threads import choose_device


def learn_folder(folder: Path, class_word: str | None, config: TrainConfig, out: Path, method: str,
                 base_model: str, weights: Path | None, text: Path | None, size: int, device_name: str,
                 samples_every: int | None = None, prompts: Path | None = None,
                 alpha_as_mask: bool = False) -> None:
    """Learns the concept and leaves everything in `out`: concept.safetensors, logs, comparison.png, table.md.

    samples_every: steps between sheets of samples on the way, samples-<stage>-<step>.png, each with the
        concept as it is then. prompts: a file with the texts of the sheets.

    Raises: InputError for anything that cannot be used, before anything is trained.
    """
    model, device = BASE_MODELS[base_model], choose_device(device_name)
    check_base_model(base_model, weights, size)
    check_run_folder(out)
    if class_word and not model.public:
        check_noun(class_word)
    concept = load_concept(folder, class_word, size, model.variants, config.seed, alpha_as_mask)
    if not model.public:                         # it may be the CSV's
        check_noun(concept.class_word)
    print("\n".join(concept.notes))
    tokenizer = open_tokenizer(base_model, weights, text)
    check_texts(tokenizer, concept, folder)
    texts = unseen_texts(concept.class_word)
    if prompts:
        texts = read_prompts(prompts, tokenizer, concept.class_word)
    elif model.public:
        texts = [r.complete for r in concept.references]
    way = METHODS[method]
    if way.imagines:
        check_has_halves(concept)
    checkpointing = model.public and plan(read_config(weights, text, size), config, size, way, device)
    pipe = open_base_model(base_model, weights, text, size, device)
    pipe.mmdit.checkpointing = checkpointing
    with run_folder(out, concept, config, method, f"{base_model} at {size} px"):
        imagined = imagine_for(pipe, concept, config, out, model) if way.imagines else None

        def rows() -> Iterator[dict]:
            for stage, theta, row in learn(pipe, concept, config, out, way, base_model, imagined):
                if samples_every and row["step"] % samples_every == 0:
                    file = out / f"samples-{stage}-{row['step']:06d}.png"
                    title = f"stage {stage}, step {row['step']}"
                    draw_sheet(pipe, concept, {title: as_sampled(way, theta, pipe.velocity)}, texts, file)
                    own = way if stage == 2 else way.extractor or way
                    facts = concept_facts(pipe, concept.class_word, replace(config, steps=row["step"]),
                                          own.name, base_model)
                    theta.save(out / f"concept-{stage}-{row['step']:06d}.safetensors", facts)
                yield {**row, "step": row["step"] + (stage - 1) * config.steps}

        follow(f"learning: {method}", rows(), (2 if way.extractor else 1) * config.steps)
        theta = Branch.load(pipe, out / "concept.safetensors")[0]
        drawn = {method: as_sampled(way, theta, pipe.velocity)}
        draw_sheet(pipe, concept, drawn, texts, out / "comparison.png")
        if not model.public and concept.class_word.lower() in OBJECTS:   # the reader knows these by name
            toy = Toy(dict(object=concept.class_word.lower()), {})
            results, sentences = assess(pipe, toy, concept, drawn)
            report = "\n".join([table(results), "", *sentences])
            write_whole(out / "table.md", f"{report}\n".encode())
            print(f"\n{report}")
    print(f"\nlearned: {out}/concept.safetensors; {out}/comparison.png shows it")


def imagine_for(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, out: Path,
                model: BaseModel) -> EncodedConcept:
    """The scenes of two things that the base model imagines. They are kept in `out`, with a sheet to look at.

    On the tiny model the reader says how many are what the text asked for.
    """
    templates, steps = (ON_PUBLIC_WEIGHTS, 28) if model.public else (PAIR_TEMPLATES, 10)
    imagined = imagine_resumably(pipe, concept, templates, config.seed, out / "imagined.safetensors", steps)
    pixels = pipe.decode(imagined.x_0[:len(imagined.x_0) // 2])
    pictures = to_pictures(pixels)
    rows = [(f"from scene {n + 1}", list(pictures[n:n + 8])) for n in range(0, len(pictures), 8)]
    write_picture(out / "imagined.png", sheet(rows, [], side=max(128, pipe.picture_size) // 2))
    if model.public:
        print(f"imagined: {len(pictures)} scenes; {out}/imagined.png should show one {concept.class_word} in "
              "each half")
    else:
        share = one_in_each_half(Reader.shipped()(pixels), concept.class_word.lower())
        print(f"imagined: {len(pictures)} scenes, {share:.0%} of them with one {concept.class_word} in each "
              f"half ({out}/imagined.png)")
    return imagined


def check_texts(tokenizer, concept: ConceptSet, folder: Path) -> None:
    """Raises: InputError that names the picture whose text cannot be encoded, before anything is loaded."""
    word = concept.class_word
    for reference in concept.references:
        try:
            tokenizer([reference.complete, reference.base, reference.target], {TOKEN: word},
                      styles_among({TOKEN: word}))
            tokenizer([reference.base, word], {word: word})      # where Y starts from
        except InputError as error:
            raise InputError(f"{folder / reference.id}: {error}") from None


def read_prompts(file: Path, tokenizer, word: str) -> list[str]:
    """The texts of a file, one a line. Raises InputError if there is none, or one that cannot be encoded."""
    lines = [" ".join(line.split()).replace("[v]", TOKEN) for line in read_text(file).split("\n")]
    texts = list(filter(None, lines))
    if not texts:
        raise InputError(f"{file}: there is no text in it; write one a line, such as 'a {TOKEN} {word}'")
    for number, text in enumerate(texts, start=1):
        try:
            tokenizer([text], {TOKEN: word}, styles_among({TOKEN: word}))
        except InputError as error:
            raise InputError(f"{file}, text {number}: {error}") from None
    return texts


def check_noun(word: str) -> None:
    """Raises: InputError for a class word that names nothing in the tiny world; "a" stands for a style."""
    if word.lower() not in (*OBJECTS, STYLE_WORD):
        raise InputError(f"--class-word {shown(word)}: the tiny model knows these kinds of things: "
                         f"{', '.join(OBJECTS)}; for a style, say a")

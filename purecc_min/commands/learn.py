"""`learn`: a concept from a folder of pictures, on the tiny base model or on public weights.

The measures of the tiny world are imported only where they are used. Read next: demo.py.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from purecc_min.commands.base_models import (
    BASE_MODELS,
    check_base_model,
    open_base_model,
    open_tokenizer,
    training_config,
)
from purecc_min.commands.folder import load_concept
from purecc_min.commands.memory import plan
from purecc_min.commands.run import check_run_folder, follow, run_folder
from purecc_min.concept import STYLE_WORD, TOKEN, ConceptSet, EncodedConcept, styles_among
from purecc_min.concept_file import load_branch
from purecc_min.learning import concept_facts, learn
from purecc_min.methods import Method, l_cc
from purecc_min.pairs import ON_PUBLIC_WEIGHTS, check_has_halves, imagine_resumably
from purecc_min.registry import METHODS, as_sampled
from purecc_min.sheets import Samplers, draw_sheet, unseen_texts
from purecc_min.train import TrainConfig
from tinyflow.device import choose_device
from tinyflow.disk import read_text, write_picture
from tinyflow.errors import InputError, shown
from tinyflow.files import write_whole
from tinyflow.picturebook.world import OBJECTS, pair_templates
from tinyflow.pipeline import Pipeline, to_pictures
from tinyflow.sd3.load import read_config
from tinyflow.sheet import sheet


def learn_command(options: argparse.Namespace) -> None:
    """Learns the concept and leaves everything in --out: concept.safetensors, logs, comparison.png, table.md.

    Raises InputError for anything that cannot be used, before anything is trained.
    """
    model, out, places = BASE_MODELS[options.base], options.out, (options.weights, options.text)
    size, device = options.size or model.size, choose_device(options.device)
    check_base_model(options.base, *places, size)
    needed = read_config(*places, size) if model.public else None
    check_run_folder(out)
    if options.class_word and not model.public:
        check_noun(options.class_word)
    concept = load_concept(options.folder, options.class_word, size, model.variants, options.seed,
                           options.alpha_as_mask)
    if not model.public:                         # it may be the CSV's
        check_noun(concept.class_word)
    is_style = bool(styles_among({TOKEN: concept.class_word}))
    method = METHODS[options.method or (model.method_of_a_style if is_style else model.method)]
    config = training_config(options, options.base, method)
    check_options(options, method, config)
    print("\n".join(concept.notes))
    tokenizer = open_tokenizer(options.base, *places)
    check_texts(tokenizer, concept, options.folder)
    texts = [r.complete for r in concept.references] if model.public else unseen_texts(concept.class_word)
    if options.prompts:
        texts = read_prompts(options.prompts, tokenizer, concept.class_word)
    if method.imagines:
        check_has_halves(concept)
    checkpointing = needed is not None and plan(needed, config, size, method, device)
    pipe = open_base_model(options.base, *places, size, device)
    pipe.mmdit.checkpointing = checkpointing
    with run_folder(out, concept, config, method.name, f"{options.base} at {size} px"):
        imagined = imagine_for(pipe, concept, config, out, model.public) if method.imagines else None
        training = learn(pipe, concept, config, out, method, options.base, imagined)
        for stage, theta, row in follow(f"learning: {method.name}", training, config.steps, method.stages):
            if options.samples_every and row["step"] % options.samples_every == 0:
                own = method if stage == method.stages else method.extractor
                name = f"{stage}-{row['step']:06d}"
                sampler = {f"stage {stage}, step {row['step']}": as_sampled(method, theta, pipe.velocity)}
                draw_sheet(pipe, concept, sampler, texts, out / f"samples-{name}.png")
                facts = concept_facts(pipe, concept.class_word, replace(config, steps=row["step"]), own.name,
                                      options.base)
                theta.save(out / f"concept-{name}.safetensors", facts)
        theta = load_branch(pipe, out / "concept.safetensors")[0]
        sampler = {method.name: as_sampled(method, theta, pipe.velocity)}
        draw_sheet(pipe, concept, sampler, texts, out / "comparison.png")
        if not model.public:
            print_measures(pipe, concept, sampler, out)
    print(f"\nlearned: {out}/concept.safetensors; {out}/comparison.png shows it")


def check_options(options: argparse.Namespace, method: Method, config: TrainConfig) -> None:
    """Raises: InputError for an option that this method would not use."""
    used = {"eta": method.loss is not l_cc, "embedding_learning_rate": method.embeddings,
            "learning_rate": method.adapters, "rank": method.adapters}
    for name, is_used in used.items():
        if getattr(options, name) is not None and not is_used:
            raise InputError(f"--{name.replace('_', '-')}: --method {method.name} does not use it; leave it "
                             "out")
    if options.samples_every and options.samples_every > config.steps:
        raise InputError(f"--samples-every {options.samples_every}: the run has {config.steps} steps, so no "
                         "sheet would be drawn")


def print_measures(pipe: Pipeline, concept: ConceptSet, sampler: Samplers, out: Path) -> None:
    """Measures the concept, and writes table.md, if the reader network knows its class word (no style)."""
    from purecc_min.commands.demo import assess
    from purecc_min.measure.toy import Toy

    if concept.class_word.lower() in OBJECTS:
        text = assess(pipe, Toy({"object": concept.class_word.lower()}, {}), concept, sampler).report
        write_whole(out / "table.md", f"{text}\n".encode())
        print(f"\n{text}")


def imagine_for(pipe: Pipeline, concept: ConceptSet, config: TrainConfig, out: Path,
                public: bool) -> EncodedConcept:
    """Scenes of two things that the base model samples; they are saved in `out`, with a sheet.

    On the tiny model the reader network says how many of them match their text.
    """
    templates, steps = (ON_PUBLIC_WEIGHTS, 28) if public else (pair_templates(), 10)
    imagined = imagine_resumably(pipe, concept, templates, config.seed, out / "imagined.safetensors", steps)
    pixels = pipe.decode(imagined.x_0[:len(imagined.x_0) // 2])
    pictures, word = to_pictures(pixels), concept.class_word
    rows = [(f"from scene {n + 1}", list(pictures[n:n + 8])) for n in range(0, len(pictures), 8)]
    write_picture(out / "imagined.png", sheet(rows, [], side=max(128, pipe.picture_size) // 2))
    said = f"imagined: {len(pictures)} scenes; {out}/imagined.png should show one {word} in each half"
    if not public:
        from purecc_min.measure.judge import one_in_each_half
        from tinyflow.picturebook.reader import Reader

        said += f", and {one_in_each_half(Reader.shipped()(pixels), word.lower()):.0%} of them do"
    print(said)
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
                         f"{', '.join(OBJECTS)}; for a style, give --class-word a")

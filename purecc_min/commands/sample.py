"""`sample`: pictures drawn with one learned concept, or with several in one text."""

import argparse
import re
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from purecc_min.branch import velocity_with
from purecc_min.commands.base_models import BASE_MODELS, check_base_model, open_base_model
from purecc_min.concept import TOKEN, styles_among
from purecc_min.concept_file import load_branch, read_concept
from purecc_min.registry import METHODS, only_with_token
from tinyflow.device import choose_device
from tinyflow.disk import check_output, free_name, write_picture
from tinyflow.errors import InputError, shown
from tinyflow.sheet import sheet

AT_ONCE = 4                                      # pictures per batch


def names_of(number: int) -> list[str]:
    """What the concepts are called in a text: "[V]" if there is one, otherwise "[V1]", "[V2]", ..."""
    return [TOKEN] if number == 1 else [f"[V{n}]" for n in range(1, number + 1)]


def read_facts(files: list[Path], prompt: str) -> tuple[str, int, dict[str, str], list[bool]]:
    """The base model and picture size on which all files were learned, name -> class word, and of each file
    whether it is switched off for texts without a name.

    Raises: InputError for files that do not go together, or that the prompt does not name.
    """
    facts, words = [read_concept(file)[1] for file in files], {}
    learned_on = [(its["base"], its["size"]) for its in facts]
    for file, name, its, where in zip(files, names_of(len(files)), facts, learned_on):
        word = words[name] = its["class_word"]
        if name not in prompt:
            raise InputError(f"the prompt {shown(prompt)} has no {name}, which is the concept of {file}; "
                             f"write it before the class word, as in 'a {name} {word}'")
        if where[0] not in BASE_MODELS:
            raise InputError(f"{file}: learned on {shown(where[0])}, which this version does not know")
        if where != learned_on[0]:
            raise InputError(f"{file}: learned on {where[0]} at {where[1]} px, and {files[0]} on "
                             f"{learned_on[0][0]} at {learned_on[0][1]} px; they cannot be combined")
    named_only = [its["method"] in METHODS and METHODS[its["method"]].named_only for its in facts]
    return *learned_on[0], words, named_only


def sample_command(options: argparse.Namespace) -> None:
    """Draws the prompt at every seed: one PNG each, and a sheet with all of them. No file is overwritten."""
    files, out = options.concept, options.out
    check_output(out, ".png")
    prompt = re.sub(r"\[v(\d*)\]", r"[V\1]", options.prompt)
    base_model, size, words, off = read_facts(files, prompt)
    check_base_model(base_model, options.weights, options.text, size)
    strangers = set(re.findall(r"\[V\d*\]", f"{prompt} {options.negative}", re.IGNORECASE)) - words.keys()
    if strangers or any(name in options.negative for name in words):
        raise InputError(f"{min(strangers or words)}: only the prompt names concepts, and only "
                         f"{', '.join(words)} here; take it out of the text")
    if options.negative and options.guidance == 1:
        raise InputError("--negative: with --guidance 1 it would not be used; leave one of them out")
    pipe = open_base_model(base_model, options.weights, options.text, size, choose_device(options.device))
    branches = [load_branch(pipe, file)[0] for file in files]
    for B in (B for branch in branches for B in branch.lora.B.values()):
        B.mul_(options.strength)
    stay = [branch for branch, is_off in zip(branches, off) if not (options.only_with_token or is_off)]
    without = partial(velocity_with, stay) if stay else pipe.velocity
    theta = only_with_token(partial(velocity_with, branches), without)
    theta_null = pipe.velocity if options.empty_text == "base" else None
    bound = {name: words[name] for name, branch in zip(words, branches) if branch.lora.where == "phrase"}
    seeds = list(range(options.seed, options.seed + options.number))
    text, pictures = pipe.encode_text([prompt], words, styles_among(bound)), []
    for n in tqdm(range(0, len(seeds), AT_ONCE), "pictures", leave=False, delay=5):
        some = seeds[n:n + AT_ONCE]
        x_0 = pipe.sample(text[[0] * len(some)], some, options.steps, options.guidance, theta, theta_null,
                          options.negative)
        if not x_0.isfinite().all():
            raise InputError("the pictures hold numbers that are not finite; try a lower --guidance")
        pictures += list(pipe.decode_images(x_0))
    page = sheet([(prompt, pictures)], [(0, [f"seed {seed}" for seed in seeds])], side=max(size, 128))
    out = free_name(out)
    for seed, picture in zip(seeds, pictures):
        write_picture(free_name(out.with_name(f"{out.stem}-seed{seed}.png")), Image.fromarray(picture))
    write_picture(out, page)                     # last: where the sheet is, all pictures are
    print(f"wrote {out}, and each picture as a file of its own in the same folder")

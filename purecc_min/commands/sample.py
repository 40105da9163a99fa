"""`sample`: pictures drawn with one learned concept, or with several in one text."""

from functools import partial
from pathlib import Path

from purecc_min.branch import Branch, only_with_token, velocity_with
from purecc_min.commands.base_models import check_base_model, open_base_model, usable_device
from purecc_min.concept import TOKEN
from tinyflow.errors import InputError
from tinyflow.picturebook.sheet import sheet
from tinyflow.weights import load_tensors


def names_of(count: int) -> list[str]:
    """What the concepts are called in a text: "[V]" if there is one, otherwise "[V1]", "[V2]", ..."""
    return [TOKEN] if count == 1 else [f"[V{n}]" for n in range(1, count + 1)]


def read_facts(files: list[Path], prompt: str) -> tuple[str, int, dict[str, str]]:
    """The base model and picture size on which all files were learned, and name -> class word.

    Raises: InputError for files that do not go together, or that the prompt does not name.
    """
    facts, words = [load_tensors(file, "concept")[1] for file in files], {}
    learned_on = [(its.get("base", "tiny"), its.get("size", 32)) for its in facts]
    for file, name, its, where in zip(files, names_of(len(files)), facts, learned_on):
        word = words[name] = its["class_word"]
        if name not in prompt:
            raise InputError(f"the prompt {prompt!r} has no {name}, which is the concept of {file}; write it "
                             f"before the class word, as in 'a {name} {word}'")
        if where != learned_on[0]:
            raise InputError(f"{file}: learned on {where[0]} at {where[1]} px, and {files[0]} on "
                             f"{learned_on[0][0]} at {learned_on[0][1]} px; they cannot stand in one picture")
    return *learned_on[0], words


def sample_concepts(files: list[Path], prompt: str, weights: Path | None, text: Path | None, seeds: list[int],
                    steps: int, guidance: float | None, empty_text: str, named_only: bool, out: Path,
                    device_name: str) -> None:
    """Draws the prompt at every seed and saves one picture sheet.

    Args:
        files: of concepts; the names of several are [V1], [V2], ... in this order.
        empty_text: who answers guidance's empty text, the "adapted" model or the "base" model.
        named_only: whether the adapters are off for every text without a concept's name.
    """
    base_model, size, words = read_facts(files, prompt)
    check_base_model(base_model, weights, size)
    pipe = open_base_model(base_model, weights, text, size, usable_device(device_name))
    theta = partial(velocity_with, [Branch.load(pipe, file)[0] for file in files])
    if named_only:
        theta = only_with_token(theta, pipe.velocity)
    theta_null = pipe.velocity if empty_text == "base" else None
    texts = pipe.encode_text([prompt], words)[[0] * len(seeds)]
    pictures = list(pipe.decode_images(pipe.sample(texts, seeds, steps, guidance, theta, theta_null)))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet([(prompt, pictures)], [(0, [f"seed {seed}" for seed in seeds])], side=max(size, 128)).save(out)
    print(out)

"""`sample`: pictures drawn with a learned concept."""

from pathlib import Path

from purecc_min.branch import Branch
from purecc_min.commands.base_models import check_base_model, open_base_model, usable_device
from purecc_min.concept import TOKEN
from tinyflow.errors import InputError
from tinyflow.picturebook.sheet import sheet
from tinyflow.weights import load_tensors


def sample_concept(file: Path, prompt: str, weights: Path | None, text: Path | None, seeds: list[int],
                   steps: int, guidance: float | None, out: Path, device_name: str) -> None:
    """Draws the prompt at every seed and saves one picture sheet.

    Raises InputError for a prompt without [V].
    """
    _, facts = load_tensors(file, "concept")
    base_model, size, word = facts.get("base", "tiny"), facts.get("size", 32), facts["class_word"]
    if TOKEN not in prompt:
        raise InputError(f"the prompt {prompt!r} has no {TOKEN}; write it before the class word, "
                         f"as in 'a {TOKEN} {word}'")
    check_base_model(base_model, weights, size)
    pipe = open_base_model(base_model, weights, text, size, usable_device(device_name))
    theta, _ = Branch.load(pipe, file)
    texts = pipe.encode_text([prompt], {TOKEN: word})[[0] * len(seeds)]
    pictures = list(pipe.decode_images(pipe.sample(texts, seeds, steps, guidance, theta)))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet([(prompt, pictures)], [(0, [f"seed {seed}" for seed in seeds])], side=max(size, 128)).save(out)
    print(out)

"""A sheet of pictures: one row per method, one column per text, with the same noise in all rows.

The texts are new scenes with [V]; [V] next to another thing of its class, once as the first and once as the
second; two learned concepts in one text; and two texts without [V]. In scenes of two things, adapters that
act everywhere change both, even if they are switched off for texts without [V]. Read next: commands/.
"""

from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from purecc_min.concept import STYLE_WORD, TOKEN, ConceptSet, base_text, styles_among
from tinyflow.disk import write_picture
from tinyflow.pipeline import Pipeline, Velocity, to_pictures
from tinyflow.sheet import sheet

# {0}: [V] and its class word; {1}: only the class word
UNSEEN = ["a small {} on the left at night", "a big {} on the right in the meadow",
          "a big {} on the left and a small {} on the right in the room",
          "a small {1} on the left and a big {0} on the right in the meadow",
          "a big {} on the left in the room", "a big purple cat on the right on the beach"]
STYLE = ["{} small ball on the left in the snow", "{} big tree on the right in the meadow",
         "{} small robot in the middle at night", "{} big star on the left on the beach",
         "a big tree on the left in the snow", "a big purple cat on the right on the beach"]
AT_ONCE = 6                                      # texts per batch; guidance doubles them
WITH_TOKEN = 4                                   # the first texts, which have [V]
TWO = "a small [V1] {} on the left and a big [V2] {} on the right at night"
Samplers = dict[str, dict[str, Velocity]]        # a row's name -> theta and theta_null (as_sampled)


class Second(NamedTuple):
    """A second concept. One more column shows both concepts in one picture."""
    concept: ConceptSet
    samplers: Samplers                           # with the adapters of both


@torch.no_grad()
def draw_texts(pipe: Pipeline, texts: list[str], words: dict[str, str], bar: tqdm | None = None,
               **options) -> Tensor:
    """A picture per text, pixels [n, 3, H, W] in [-1, 1] on the CPU. Text i starts from the noise of seed i.

    Args:
        words: placeholder -> class word.
        bar: a progress bar, which counts pictures.
        options: for Pipeline.sample; without theta the base model draws.
    Raises: InputError for words that the text encoder does not know.
    """
    pictures = []
    for first in range(0, len(texts), AT_ONCE):
        seeds = list(range(first, min(first + AT_ONCE, len(texts))))
        text = pipe.encode_text(texts[first:first + AT_ONCE], words, styles_among(words))
        pictures.append(pipe.decode(pipe.sample(text, seeds, **options)))
        if bar is not None:
            bar.update(len(seeds))
    return torch.cat(pictures)


def draw(pipe: Pipeline, theta: Velocity | None, texts: list[str], class_word: str, bar: tqdm | None = None,
         **options) -> Tensor:
    """`draw_texts` with one concept. theta None: the base model."""
    return draw_texts(pipe, texts, {TOKEN: class_word}, bar, theta=theta, **options)


def unseen_texts(class_word: str) -> list[str]:
    """Returns the sheet's texts: first with [V], then without. The class word "a" means a style."""
    if class_word.lower() == STYLE_WORD:
        return [text.format(TOKEN) for text in STYLE]
    named = [text.format(f"{TOKEN} {class_word}", class_word) for text in UNSEEN[:WITH_TOKEN]]
    return named + [text.format(class_word) for text in UNSEEN[WITH_TOKEN:]]


def draw_sheet(pipe: Pipeline, concept: ConceptSet, samplers: Samplers, texts: list[str], path: Path,
               notes: Sequence[str] = (), second: Second | None = None) -> None:
    """Writes the sheet to `path`. Its rows: references, base model (base texts), methods (complete texts).

    notes: sentences below the rows.
    """
    references = [r.picture for r in concept.references][:len(texts)]
    words, pair_text = {TOKEN: concept.class_word}, ""
    if second:
        both = {"[V1]": concept.class_word, "[V2]": second.concept.class_word}
        pair_text = TWO.format(*both.values())
        references[WITH_TOKEN:] = [second.concept.references[0].picture]     # in the column of that text

    def row(texts: list[str], sampler: dict, pair_text: str, pair_sampler: dict) -> list[np.ndarray]:
        pictures = list(to_pictures(draw_texts(pipe, texts, words, **sampler)))
        if pair_text:
            pair = draw_texts(pipe, [pair_text], both, **pair_sampler)
            pictures.insert(WITH_TOKEN, to_pictures(pair)[0])
        return pictures

    plain = pair_text.replace("[V1] ", "").replace("[V2] ", "")
    rows = [("references", references), ("original model", row(list(map(base_text, texts)), {}, plain, {}))]
    rows += [(name, row(texts, sampler, pair_text, second.samplers[name] if second else {}))
             for name, sampler in samplers.items()]
    headings = [*texts[:WITH_TOKEN], *[pair_text] * bool(pair_text), *texts[WITH_TOKEN:]]
    page = sheet(rows, [(1, headings)], min(256, max(128, pipe.picture_size)), notes)    # above row 1
    write_picture(path, page)

"""What models draw, on one sheet: several methods, the same texts, the same noise. No renderer is needed.

The texts are new scenes with [V]; [V] beside a plain thing of its class, named first and named second; two
learned concepts in one text; and two texts without [V]. Where [V] stands beside a plain thing nobody can
hide: adapters that act everywhere, and those that are switched off for texts without [V], change both. Read
next: commands/.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from purecc_min.concept import STYLE_WORD, TOKEN, ConceptSet, base_text, styles_among
from tinyflow.disk import write_picture
from tinyflow.pipeline import Pipeline, Velocity, to_pictures
from tinyflow.sheet import sheet

UNSEEN = ["a small {} on the left at night", "a big {} on the right in the meadow",
          "a big {} on the left and a small {} on the right in the room",
          "a small {1} on the left and a big {0} on the right in the meadow",
          "a big {} on the left in the room", "a big purple cat on the right on the beach"]
STYLE = ["{} small ball on the left in the snow", "{} big tree on the right in the meadow",
         "{} small robot in the middle at night", "{} big star on the left on the beach",
         "a big tree on the left in the snow", "a big purple cat on the right on the beach"]
AT_ONCE = 6                                      # with guidance these are 12 samples, which fit a CPU's cache
WITH_TOKEN = 4                                   # of these texts, the first ones
TWO = "a small [V1] {} on the left and a big [V2] {} on the right at night"
Who = dict[str, dict[str, Velocity]]             # a row's name -> who answers which text (as_sampled)


class Second(NamedTuple):
    """A second concept, which stands beside the first one in one more column."""
    concept: ConceptSet
    drawn: Who                                   # with the adapters of both


@torch.no_grad()
def draw(pipe: Pipeline, theta: Velocity | None, texts: list[str], class_word: str, bar: tqdm | None = None,
         **options) -> Tensor:
    """Draws one picture for each text: pixels [n, 3, H, W] in [-1, 1], on the CPU. Text i starts from the
    noise of seed i.

    Args:
        theta: the velocity to follow; None is the original model.
        class_word: what the text encoder reads where [V] stands.
        bar: a progress bar, which counts pictures. options: for Pipeline.sample.
    Raises: InputError for words that the text encoder does not know.
    """
    pictures = []
    for first in range(0, len(texts), AT_ONCE):
        rows = texts[first:first + AT_ONCE]
        text = pipe.encode_text(rows, {TOKEN: class_word}, styles_among({TOKEN: class_word}))
        seeds = list(range(first, first + len(rows)))
        pictures.append(pipe.decode(pipe.sample(text, seeds, theta=theta, **options)))
        if bar is not None:
            bar.update(len(rows))
    return torch.cat(pictures)


def unseen_texts(class_word: str) -> list[str]:
    """What a sheet shows: texts with [V], then texts without. The class word "a" stands for a style."""
    if class_word.lower() == STYLE_WORD:
        return [text.format(TOKEN) for text in STYLE]
    named = [text.format(f"{TOKEN} {class_word}", class_word) for text in UNSEEN[:WITH_TOKEN]]
    return named + [text.format(class_word) for text in UNSEEN[WITH_TOKEN:]]


def draw_sheet(pipe: Pipeline, concept: ConceptSet, drawn: Who, texts: list[str], path: Path,
               notes: list[str] = (), second: Second | None = None) -> None:
    """Rows: references, the original model with the base texts, each method with the complete ones. Below
    them, the notes.
    """
    references = [r.picture for r in concept.references][:len(texts)]
    both, two = {}, []
    if second:
        both = {"[V1]": concept.class_word, "[V2]": second.concept.class_word}
        two = [TWO.format(*both.values())]
        references[WITH_TOKEN:] = [second.concept.references[0].picture]     # below the text that names it

    def pictures(one: list[str], two: list[str], of_one: dict, of_two: dict) -> list[np.ndarray]:
        drawn = list(to_pictures(draw(pipe, texts=one, class_word=concept.class_word, **of_one)))
        if two:
            text = pipe.encode_text(two, both, styles_among(both))
            drawn.insert(WITH_TOKEN, to_pictures(pipe.decode(pipe.sample(text, [0], **of_two)))[0])
        return drawn

    plain = [text.replace("[V1] ", "").replace("[V2] ", "") for text in two]
    rows = [("references", references),
            ("original model", pictures([base_text(text) for text in texts], plain, {"theta": None}, {}))]
    rows += [(name, pictures(texts, two, who, second.drawn[name] if second else {}))
             for name, who in drawn.items()]
    headings = texts[:WITH_TOKEN] + two + texts[WITH_TOKEN:]
    write_picture(path, sheet(rows, [(1, headings)], min(256, max(128, pipe.picture_size)), notes))

"""The picture that a newcomer sees: what several methods draw for the same texts, from the same noise.

In one column [V] stands beside another thing of its class. There nobody can hide: adapters that act
everywhere, and those that are switched off for texts without [V], change both. Read next: measures.py.
"""

from pathlib import Path

import numpy as np

from purecc_min.concept import TOKEN, ConceptSet, base_text
from purecc_min.measure.draw import draw
from purecc_min.measure.toy import STYLE_WORD
from tinyflow.files import write_picture
from tinyflow.picturebook.sheet import sheet
from tinyflow.pipeline import Pipeline, Velocity, to_pictures

# Places and backgrounds that the references never show; one more beside another of its class; without [V].
UNSEEN = ["a small {} on the left in the snow", "a big {} on the right in the meadow",
          "a small {} in the middle at night", "a big {} on the left and a small {} on the right in the snow",
          "a big {} on the left in the snow", "a big purple cat on the right on the beach",
          "a small red house in the middle in the room"]
WITH_TOKEN = 4                                   # of these texts, the first ones
STYLE = ["{} small ball on the left in the snow", "{} big tree on the right in the meadow",
         "{} small robot in the middle at night", "{} big star on the left on the beach",
         "a big tree on the left in the snow", "a big purple cat on the right on the beach",
         "a small red house in the middle in the room"]


def unseen_texts(class_word: str) -> list[str]:
    """What a sheet shows: texts with [V], then texts without. The class word "a" stands for a style."""
    if class_word == STYLE_WORD:
        return [text.format(TOKEN) for text in STYLE]
    named = [text.format(f"{TOKEN} {class_word}", class_word) for text in UNSEEN[:WITH_TOKEN]]
    return named + [text.format(class_word) for text in UNSEEN[WITH_TOKEN:]]


def draw_sheet(pipe: Pipeline, concept: ConceptSet, drawn: dict[str, dict[str, Velocity]], texts: list[str],
               path: Path, notes: list[str] = ()) -> None:
    """Rows: references, the original model with the base texts, each method with the complete ones. Below
    them, the notes.

    drawn: name -> who answers which text (registry.as_sampled).
    """
    def pictures(texts: list[str], theta: Velocity | None = None, **options) -> list[np.ndarray]:
        return list(to_pictures(draw(pipe, theta, texts, concept.class_word, **options)))

    rows = [("references", [r.picture for r in concept.references][:len(texts)]),
            ("original model, base text", pictures([base_text(text) for text in texts]))]
    rows += [(name, pictures(texts, **who)) for name, who in drawn.items()]
    write_picture(path, sheet(rows, [(1, texts)], min(256, max(128, pipe.picture_size)), notes))

"""The tokenizer of the tiny world: one word, one id.

A placeholder such as "[V]" is a slot of its own: it is never split, it is encoded as an ordinary word that
stands in for it, and the positions that it takes are reported, so that a concept can be put there later. A
word that the world does not know is an error that names it. Read next: pipeline.py.
"""

import difflib

import torch
from torch import Tensor

from tinyflow.errors import InputError, shown


class WordTokenizer:
    """Ids: 0 starts a text, 1 ends it and pads it, the words of `vocabulary` follow in their order."""

    start, end = 0, 1

    def __init__(self, vocabulary: list[str], length: int = 16):
        self.length = length
        self.ids = {word: n for n, word in enumerate(vocabulary, start=2)}

    @property
    def vocabulary_size(self) -> int:
        return len(self.ids) + 2

    def __call__(self, texts: list[str], stand_ins: dict[str, str] | None = None) -> tuple[Tensor, Tensor]:
        """Args:
            stand_ins: placeholder -> the known word that is encoded in its place, e.g. {"[V]": "robot"}.
        Returns: ids [B, length], and slots [B, length]: n where the n-th placeholder of stand_ins stands,
            else 0.
        Raises: InputError for an unknown word (with the nearest known ones) and for a text that is too long.
        """
        stand_ins = stand_ins or {}
        numbers = {placeholder: n for n, placeholder in enumerate(stand_ins, start=1)}
        ids, slots = [], []
        for text in texts:
            words = [word.strip(".,;!?") for word in text.split()]
            if len(words) > self.length - 2:
                raise InputError(f"the text {shown(text)} has {len(words)} words; "
                                 f"this model reads at most {self.length - 2}")
            padding = self.length - 1 - len(words)
            ids.append([self.start, *(self.word_id(stand_ins.get(word, word), text) for word in words),
                        *[self.end] * padding])
            slots.append([0, *(numbers.get(word, 0) for word in words), *[0] * padding])
        return torch.tensor(ids), torch.tensor(slots)

    def word_id(self, word: str, text: str) -> int:
        known = self.ids.get(word.lower())
        if known is None:
            near = difflib.get_close_matches(word.lower()[:40], self.ids, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else "python -m purecc_min words lists them"
            raise InputError(f"the tiny model does not know the word {shown(word)} in {shown(text)}; "
                             f"{advice}")
        return known

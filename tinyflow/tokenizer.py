"""The tokenizer of the tiny world: one word, one id.

A stand-in word replaces a placeholder such as "[V]". Its position (the slot) and those of its phrase are
returned, so that a concept can act there later. An unknown word raises an InputError that names the word.
Read next: vae.py.
"""

import difflib
import re

import torch

from tinyflow.errors import InputError, shown
from tinyflow.phrase import Tokens, write_stand_ins


class WordTokenizer:
    """Ids: 0 is the start, 1 the end and the padding, 2, 3, ... are the words of `vocabulary` in order."""

    start, end = 0, 1

    def __init__(self, vocabulary: list[str], length: int = 16):
        self.length, self.vocabulary_size = length, len(vocabulary) + 2
        self.ids = {word: n for n, word in enumerate(vocabulary, start=2)}

    def __call__(self, texts: list[str], stand_ins: dict[str, str] | None = None,
                 styles: tuple[str, ...] = ()) -> Tokens:
        """Args:
            stand_ins: placeholder -> the vocabulary word that replaces it, e.g. {"[V]": "robot"}.
            styles: the placeholders that name a style, not a thing.
        Raises: InputError for an unknown word (with the nearest known ones), for a text that is too long, and
            for the causes that write_stand_ins lists.
        """
        tokens = Tokens(*(torch.zeros(len(texts), self.length, dtype=torch.long) for _ in Tokens._fields))
        for row, text in enumerate(texts):
            written = write_stand_ins(text, stand_ins or {}, styles)
            # words, without the punctuation around them
            words = list(re.finditer(r"[^\s.,;!?](\S*[^\s.,;!?])?", written.text))
            if len(words) > self.length - 2:
                raise InputError(f"the text {shown(text)} has {len(words)} words; "
                                 f"this model reads at most {self.length - 2}")
            ids = [self.start, *(self.word_id(word[0], text) for word in words)]
            tokens.ids[row] = torch.tensor(ids + [self.end] * (self.length - len(ids)))
            for place, word in enumerate(words, start=1):
                here = word.start()
                tokens.slots[row, place] = next((n for n, stop in written.slots if stop == word.end()), 0)
                tokens.phrases[row, place] = next((n for n, a, b in written.phrases if a <= here < b), 0)
        return tokens

    def word_id(self, word: str, text: str) -> int:
        known = self.ids.get(word.lower())
        if known is None:
            near = difflib.get_close_matches(word.lower()[:40], self.ids, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else "see python -m purecc_min words"
            raise InputError(f"the tiny model does not know the word {shown(word)} in {shown(text)}; "
                             f"{advice}")
        return known

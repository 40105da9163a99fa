"""A placeholder and its phrase: which words of a text speak of "[V]".

A placeholder such as "[V]" is encoded as its stand-in, the word or words that are written in its place. Its
PHRASE goes from the placeholder to the end of its clause: "a big [V] robot on the left | and a small robot".
A clause ends before "and", "next to" or "beside", at a comma, a semicolon or a full stop, and before the next
placeholder. In a list that "with" opens, commas and "and" do not end it; the list itself ends at its next
"on", "in" or "at". Where this is wrong, braces say it: "{a [V] robot with a hat} and a robot". The phrase of
a style is all words that stand in no other phrase. Read next: tokenizer.py.
"""

import re
from typing import NamedTuple

from torch import Tensor

from tinyflow.errors import InputError, shown

LETTER = "(?:[^\\W_]|[\u0300-\u036f])"           # a letter or a digit, or an accent that belongs to one
MARK = re.compile(r"(?<![\w-])(?:with|and|next\s+to|beside|on|in|at)(?![\w-])|[,;.](?!\d)", re.IGNORECASE)


class Tokens(NamedTuple):
    """Texts as a tokenizer reads them, one a row."""
    ids: Tensor                                  # [B, T] integers
    slots: Tensor                                # [B, T] n at the last token of the n-th placeholder, else 0
    phrases: Tensor                              # [B, T] n at the tokens of its phrase, else 0


class Written(NamedTuple):
    """A text with stand-ins in the place of placeholders. n counts the placeholders from 1."""
    text: str
    slots: list[tuple[int, int]]                 # (n, the character at which its stand-in stops)
    phrases: list[tuple[int, int, int]]          # (n, the characters from which and to which its phrase goes)


def write_stand_ins(text: str, stand_ins: dict[str, str], styles: tuple[str, ...] = ()) -> Written:
    """Writes stand-ins in the place of placeholders, and finds the phrase of each.

    A placeholder counts only as a word of its own: "[V]'s" holds one, and the "dog" of "hotdog" is none.
    Braces count only in a text with a placeholder that does not merely stand for itself.

    Args:
        stand_ins: placeholder -> what is encoded in its place, e.g. {"[V]": "teddy bear"}.
        styles: those of the placeholders that are styles.
    Raises: InputError for an empty placeholder or stand-in, for a placeholder glued to its neighbour, for
        braces that do not enclose one placeholder each, and for two styles in one text.
    """
    parts = split_at(text, stand_ins)            # text, mark, text, mark, ..., text
    named = any(stand_ins.get(part, part) != part for part in parts[1::2])
    written, slots, phrases, begun, wrong = parts[0], [], [], None, False
    for mark, following in zip(parts[1::2], parts[2::2]):
        here = len(written)
        if mark in stand_ins:
            n = list(stand_ins).index(mark) + 1
            written += stand_ins[mark]
            slots.append((n, len(written)))
            if begun is None and mark not in styles:
                phrases.append((n, here, len(written) + clause_end(following, stand_ins[mark])))
        elif not named:
            written += mark
        elif mark == "{" and begun is None:
            begun, before = here, len(slots)
        elif mark == "}" and begun is not None and len(slots) == before + 1:
            phrases.append((slots[-1][0], begun, here))
            begun = None
        else:
            wrong = True
        written += following
    if wrong or begun is not None:
        raise InputError(f"the braces in {shown(text)} do not enclose one placeholder each, as in "
                         "'{a [V] robot on the left} and a robot'; mend them or leave them out")

    style = {n for n, _ in slots} - {n for n, _, _ in phrases}
    if len(style) > 1:
        raise InputError(f"two styles in {shown(text)}: each would speak of all its words; name one of them")
    edges = [0, *(edge for span in sorted(row[1:] for row in phrases) for edge in span), len(written)]
    gaps = [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
    return Written(written, slots, phrases + [(n, *gap) for n in style for gap in gaps])


def split_at(text: str, stand_ins: dict[str, str]) -> list[str]:
    """The text, cut at placeholders and braces: text, mark, text, mark, ..., text."""
    for placeholder, stand_in in stand_ins.items():
        if not placeholder.strip() or not re.search(LETTER, stand_in):
            raise InputError(f"the placeholder {placeholder!r} with the stand-in {stand_in!r}: "
                             "both must be written, the stand-in as a word")
    if not stand_ins:
        return [text]
    longest_first = sorted(stand_ins, key=len, reverse=True)
    any_of_them = "|".join(map(re.escape, longest_first))
    parts = re.split(f"((?<!{LETTER})(?:{any_of_them})(?!{LETTER}|{any_of_them})|[{{}}])", text)
    for placeholder in longest_first:
        is_word = placeholder[0].isalnum() and placeholder[-1].isalnum()     # may be part of a longer word
        if not is_word and any(placeholder in part for part in parts[::2]):
            raise InputError(f"the placeholder {placeholder!r} is glued to its neighbour in "
                             f"{shown(text)}; write it as a word of its own")
    return parts


def clause_end(following: str, stand_in: str) -> int:
    """How many characters of what follows a placeholder still speak of it: its class word and its clause."""
    noun = re.match(rf"\s*{re.escape(stand_in)}", following, re.IGNORECASE)
    in_list = False
    for mark in MARK.finditer(following, noun.end() if noun else 0):
        word = mark[0].lower()
        if word == "with":
            in_list = True
        elif word in ("on", "in", "at"):
            in_list = False
        elif not (in_list and word in ("and", ",")):
            return mark.start()
    return len(following)

"""Finds the placeholders of a text, and for each its phrase: the words that describe it.

The encoder knows no [V], so a stand-in replaces it: with "robot", "a [V] robot" is read "a robot robot". The
phrase goes from the placeholder to the end of its clause: in "a big [V] robot on the left and a small robot"
it is "[V] robot on the left". A clause ends before "and", "next to" or "beside", at a comma, a semicolon or a
full stop, and before the next placeholder. In a list after "with", commas and "and" do not end the clause;
the list ends at "on", "in" or "at". If this rule fails, write braces: "{a [V] robot with a hat} and a robot".
The phrase of a style is every word outside the other phrases. Read next: tokenizer.py.
"""

import re
from typing import NamedTuple

from torch import Tensor

from tinyflow.errors import InputError, shown

LETTER = "(?:[^\\W_]|[\u0300-\u036f])"           # a letter, a digit or a combining accent
# a comma or full stop before a digit ends nothing: "1,000", "v1.5"
CLAUSE_WORD = re.compile(r"(?<![\w-])(?:with|and|next\s+to|beside|on|in|at)(?![\w-])|[,;.](?!\d)",
                         re.IGNORECASE)


class Tokens(NamedTuple):
    """Tokenized texts, one per row."""
    ids: Tensor                                  # [B, T] integers
    slots: Tensor                                # [B, T] n at the last token of stand-in n, else 0
    phrases: Tensor                              # [B, T] n at the tokens of phrase n, else 0


class Written(NamedTuple):
    """A text with stand-ins. n is a placeholder's place in `stand_ins`, from 1; not its order in the text."""
    text: str
    slots: list[tuple[int, int]]                 # (n, index of the character after its stand-in)
    phrases: list[tuple[int, int, int]]          # (n, first character, character after the last)


def write_stand_ins(text: str, stand_ins: dict[str, str], styles: tuple[str, ...] = ()) -> Written:
    """Replaces placeholders by stand-ins, and finds the phrase of each.

    A placeholder must be a word of its own: "[V]'s" has [V], but "hotdog" has no "dog". Braces count only if
    some stand-in differs from its placeholder: the stand-in "dog" for "dog" only finds the dog.

    Args:
        stand_ins: placeholder -> the words that replace it, e.g. {"[V]": "teddy bear"}.
        styles: the placeholders that name a style, not a thing.
    Raises: InputError for a placeholder such as [V] that touches another word, for braces that do not enclose
        one placeholder each, and for two styles in one text.
    """
    parts = split_at(text, stand_ins)
    any_replaced = any(stand_ins.get(piece, piece) != piece for piece in parts[1::2])
    written, slots, phrases, brace_start, bad_braces = parts[0], [], [], None, False
    for piece, following in zip(parts[1::2], parts[2::2]):
        start = len(written)
        if piece in stand_ins:
            n = list(stand_ins).index(piece) + 1
            written += stand_ins[piece]
            slots.append((n, len(written)))
            if brace_start is None and piece not in styles:
                phrases.append((n, start, len(written) + clause_end(following, stand_ins[piece])))
        elif not any_replaced:
            written += piece
        elif piece == "{" and brace_start is None:
            brace_start, slots_before = start, len(slots)
        elif piece == "}" and brace_start is not None and len(slots) == slots_before + 1:
            phrases.append((slots[-1][0], brace_start, start))
            brace_start = None
        else:
            bad_braces = True
        written += following
    if bad_braces or brace_start is not None:
        raise InputError(f"the braces in {shown(text)} do not enclose one placeholder each; write them as in "
                         "'{a [V] robot on the left} and a robot', or leave them out")

    style = {n for n, _ in slots} - {n for n, _, _ in phrases}       # only a style has no phrase yet
    if len(style) > 1:
        raise InputError(f"two styles in {shown(text)}, but a text can have only one; remove one of them")
    # a style's phrase is made of the gaps between the phrases
    edges = [0, *(edge for span in sorted(row[1:] for row in phrases) for edge in span), len(written)]
    gaps = [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
    return Written(written, slots, phrases + [(n, *gap) for n in style for gap in gaps])


def split_at(text: str, stand_ins: dict[str, str]) -> list[str]:
    """The text, cut at placeholders and braces: text, mark, text, mark, ..., text."""
    if not stand_ins:
        return [text]
    longest_first = sorted(stand_ins, key=len, reverse=True)
    any_of_them = "|".join(map(re.escape, longest_first))
    parts = re.split(f"((?<!{LETTER})(?:{any_of_them})(?!{LETTER}|{any_of_them})|[{{}}])", text)
    for placeholder in longest_first:
        is_word = placeholder[0].isalnum() and placeholder[-1].isalnum()     # "dog" may be in "hotdog"
        if not is_word and any(placeholder in part for part in parts[::2]):
            raise InputError(f"the placeholder {placeholder!r} is glued to another word in "
                             f"{shown(text)}; write it as a word of its own")
    return parts


def clause_end(following: str, stand_in: str) -> int:
    """The number of characters of `following` that belong to the placeholder's phrase."""
    # the class word may itself contain "and", so the search starts after it
    noun = re.match(rf"\s*{re.escape(stand_in)}", following, re.IGNORECASE)
    in_list = False
    for mark in CLAUSE_WORD.finditer(following, noun.end() if noun else 0):
        word = mark[0].lower()
        if word == "with":
            in_list = True
        elif word in ("on", "in", "at"):
            in_list = False
        elif not (in_list and word in ("and", ",")):
            return mark.start()
    return len(following)

"""The tokenizers of SD3.5: CLIP's byte-pair encoding, and T5's, which the package `tokenizers` reads.

CLIP's tokenizer lower-cases a text and cuts it into words, single digits and runs of punctuation. It joins
the bytes of each of these by the ranks in merges.txt. T5's tokenizer.json holds compiled tables that only
that package reads. In both, a placeholder such as "[V]" is encoded as its stand-in (phrase.py). Its slot is
the stand-in's last token, and its phrase the tokens of the words that speak of it. Read next: t5.py.
"""

import functools
import json
import math
import re
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from tinyflow.disk import read_text
from tinyflow.errors import InputError, shown
from tinyflow.phrase import Tokens, write_stand_ins

WORD_END = "</w>"                                # marks a token that ends a word
LONGEST = 10_000                                 # letters of a word; more would take minutes


def read_file(folder: Path, name: str) -> str:
    """A text in UTF-8. Raises InputError if it is missing or damaged."""
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{folder}: no {name} there; it belongs to the model's tokenizer folder, "
                         "download it too")
    return read_text(path)


class SlotTokenizer:
    """What both tokenizers share: texts become rows of ids of one length, and their slots are marked.

    A subclass defines encode(text, stops), which returns the ids of a text without the end token, and for
    each stop (character offsets, ascending) the position of the last token that starts before it.
    """

    def __init__(self, length: int, end: int, pad: int):
        self.length, self.end, self.pad = length, end, pad
        self.cut: set[str] = set()               # texts whose cut was already reported

    def __call__(self, texts: list[str], stand_ins: dict[str, str] | None = None,
                 styles: tuple[str, ...] = ()) -> Tokens:
        """Args:
            stand_ins: placeholder -> the words that are encoded in its place, e.g. {"[V]": "teddy bear"}.
            styles: those of the placeholders that are styles.
        Returns: rows of `length` tokens. Long texts are cut, and their end token is kept.
        Raises: InputError for a placeholder that stands where its text is cut, and as write_stand_ins does.
        """
        slots, phrases = (torch.zeros(len(texts), self.length, dtype=torch.long) for _ in range(2))
        ids = torch.full_like(slots, self.pad)
        for row, text in enumerate(texts):
            written = write_stand_ins(text, stand_ins or {}, styles)
            if re.search("[\ud800-\udfff]", written.text):
                raise InputError(f"the text {shown(text)} holds half a character (a lone surrogate); "
                                 "write it again in UTF-8")
            # a token may hold the space before its word: a phrase goes from the end of the word before it
            spans = [(n, *(len(written.text[:edge].rstrip()) for edge in edges))
                     for n, *edges in written.phrases]
            stops = {stop for _, stop in written.slots} | {edge for _, *edges in spans for edge in edges}
            tokens, positions = self.encode(written.text, sorted(stops))
            last = dict(zip(sorted(stops), positions))
            for n, stop in written.slots:
                if last[stop] >= self.length - 1:
                    placeholder = list(stand_ins)[n - 1]
                    raise InputError(f"the placeholder {placeholder!r} in {shown(text)} is token "
                                     f"{last[stop] + 1}, but a text is cut to {self.length} with the end "
                                     "token; shorten it, or name the placeholder earlier")
                slots[row, last[stop]] = n
            for n, start, stop in spans:
                phrases[row, last[start] + 1:min(last[stop] + 1, self.length - 1)] = n
            if len(tokens) > self.length - 1 and text not in self.cut:
                self.cut.add(text)
                tqdm.write(f"{shown(text)}: longer than {self.length} tokens, and cut there for "
                           f"{type(self).__name__}", file=sys.stderr)
            tokens = [*tokens[:self.length - 1], self.end]
            ids[row, :len(tokens)] = torch.tensor(tokens)
        return Tokens(ids, slots, phrases)


def byte_symbols() -> list[str]:
    """The character by which vocab.json writes each byte: itself if it is visible, or one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = iter(range(256, 512))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]


BYTES = byte_symbols()
KINDS = {"L": "L", "N": "N", "Z": " "}           # by the category's first letter; others are signs, "S"
RUN = re.compile("L+|N|S+| +")
# Endings such as "'s" are words. Only a special token in capitals comes here; CLIP reads it as three words.
SUFFIX = re.compile(r"('(?:s|t|re|ve|m|ll|d))|(<\|)((?:start|end)oftext)(\|>)")


def kind(character: str) -> str:
    return " " if character in "\t\n\v\f\r\x85" else KINDS.get(unicodedata.category(character)[0], "S")


def split_words(text: str) -> Iterator[str]:
    """Yields lower-cased words, single digits and runs of signs. White space is dropped."""
    # One by one, as a sigma at the end of a word would change otherwise.
    text = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
    kinds = "".join(map(kind, text))
    start = 0
    while start < len(text):
        suffix = SUFFIX.match(text, start)
        stop = (suffix or RUN.match(kinds, start)).end()
        if suffix:
            yield from filter(None, suffix.groups())
        elif kinds[start] != " ":
            yield text[start:stop]
        start = stop


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: joins the leftmost neighbours of the lowest rank until no pair has a rank."""
    while len(symbols) > 1:
        pair = min(pairwise(symbols), key=lambda pair: ranks.get(pair, math.inf))
        if pair not in ranks:
            break
        joined, n = [], 0
        while n < len(symbols):
            is_pair = tuple(symbols[n:n + 2]) == pair
            joined.append("".join(pair) if is_pair else symbols[n])
            n += 1 + is_pair
        symbols = joined
    return symbols


def sizes(tokens: list[str]) -> list[int]:
    """How many bytes of the text each token is."""
    return [len(token.removesuffix(WORD_END)) for token in tokens]


def read_clip_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The ids of tokens, and the lines of merges: from vocab.json and merges.txt, or, where newer libraries
    leave these out, from tokenizer.json. Raises InputError if a file is missing or damaged.
    """
    whole = folder / "tokenizer.json"
    name = "vocab.json" if (folder / "vocab.json").is_file() or not whole.is_file() else whole.name
    try:
        found = json.loads(read_file(folder, name))
        if name == "vocab.json":
            return found, read_file(folder, "merges.txt").split("\n")
        merges = [line if isinstance(line, str) else " ".join(line) for line in found["model"]["merges"]]
        return found["model"]["vocab"], merges
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{folder / name}: not a readable JSON file, perhaps cut short; "
                         "download it again") from None
    except (KeyError, TypeError):
        raise InputError(f"{folder / name}: not CLIP's tokenizer; download it again") from None


class ClipTokenizer(SlotTokenizer):
    """CLIP's tokenizer, from vocab.json and merges.txt. `pad` is the end token (CLIP-L) or 0, "!" (CLIP-G).

    A start, end or pad token that is written in a text is read as that token. So CLIP-G reads every "!" as
    id 0, as diffusers does (Stability's own code reads it as a sign). The ids equal those of transformers,
    with two exceptions. Letters that are newer than Python's Unicode tables count as signs here. And several
    accents on one letter that are newer than Unicode 9 are not put into the normal order by transformers.

    Raises: InputError if a file is missing or damaged, or if the two do not fit each other.
    """

    def __init__(self, folder: Path, pad: int):
        self.ids, lines = read_clip_files(Path(folder))
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)
                      if line.strip() and not line.startswith("#version")}
        expected = {*BYTES, *(symbol + WORD_END for symbol in BYTES), *map("".join, self.ranks),
                    "<|startoftext|>", "<|endoftext|>"}
        if not isinstance(self.ids, dict) or self.ids.keys() != expected:
            raise InputError(f"{folder}: merges.txt and vocab.json do not fit each other; one is damaged, "
                             "download both again")
        super().__init__(77, self.ids["<|endoftext|>"], pad)
        special = {self.ids["<|startoftext|>"], self.end, pad}
        written = [re.escape(token) for token, n in self.ids.items() if n in special]
        self.special = re.compile(f"({'|'.join(written)})")
        self.merged = functools.lru_cache(10_000)(self.merged)

    def merged(self, word: str) -> list[str]:
        if len(word) > LONGEST:
            raise InputError(f"a word of {len(word)} letters, {shown(word)}; that cannot be right")
        symbols = [BYTES[byte] for byte in word.encode()]
        return merge([*symbols[:-1], symbols[-1] + WORD_END], self.ranks)

    def tokens(self, text: str) -> list[str]:
        found = []
        for n, part in enumerate(self.special.split(text)):
            found += [part] if n % 2 else [token for word in split_words(part) for token in self.merged(word)]
        return found

    def encode(self, text: str, stops: list[int]) -> tuple[list[int], list[int]]:
        """A stop is found by counting bytes: the text before it has as many as the tokens up to there."""
        tokens = self.tokens(text)
        spent = list(accumulate(sizes(tokens)))
        parts = (self.tokens(text[start:stop]) for start, stop in pairwise([0, *stops]))
        before = accumulate(sum(sizes(part)) for part in parts)
        ids = [self.ids[token] for token in ("<|startoftext|>", *tokens)]
        return ids, [1 + bisect_left(spent, count) if count else 0 for count in before]


class T5Tokenizer(SlotTokenizer):
    """T5's tokenizer, from tokenizer.json: </s> (1) ends a text, and <pad> (0) fills it up.

    Raises: InputError if the file is missing, damaged or not T5's, or if the package is not installed.
    """

    def __init__(self, folder: Path, length: int = 256):
        super().__init__(length, end=1, pad=0)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InputError("T5's tokenizer.json is read by the package tokenizers, which is not installed: "
                             "pip install tokenizers") from None
        text, path = read_file(folder, "tokenizer.json"), Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_str(text)
        except Exception:                        # the package has no narrower class
            raise InputError(f"{path}: not a readable tokenizer; the file is damaged, "
                             "download it again") from None
        if (self.tokenizer.token_to_id("<pad>"), self.tokenizer.token_to_id("</s>")) != (self.pad, self.end):
            raise InputError(f"{path}: not T5's tokenizer, whose <pad> is 0 and </s> is 1; "
                             "take that of tokenizer_3")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str, stops: list[int]) -> tuple[list[int], list[int]]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        return encoding.ids, [bisect_left(starts, stop) - 1 for stop in stops]

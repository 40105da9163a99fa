"""The tokenizers of SD3.5: CLIP's byte-pair encoding and T5's unigrams, both run by the package `tokenizers`.

In both, a placeholder such as "[V]" is encoded as its stand-in (phrase.py). Its slot is the stand-in's last
token, and its phrase the tokens of the words that speak of it. Read next: t5.py.
"""

import re
import sys
from bisect import bisect_left
from pathlib import Path

import torch
from tqdm import tqdm

from tinyflow.disk import read_json, read_text
from tinyflow.errors import InputError, shown
from tinyflow.phrase import Tokens, write_stand_ins

START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def package():
    """The package `tokenizers`, which the tiny model does not need. Raises InputError if it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("the tokenizers of public weights need the package tokenizers, which is not "
                         "installed: pip install tokenizers") from None
    return tokenizers


def read_tokenizer(path: Path):
    """A tokenizer.json of the package. Raises InputError if it is missing or damaged."""
    text = read_text(path)
    try:
        tokenizer = package().Tokenizer.from_str(text)
    except InputError:
        raise
    except Exception:                            # the package has no narrower class
        raise InputError(f"{path}: not a readable tokenizer; it is damaged, download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class SlotTokenizer:
    """What both tokenizers share: texts become rows of ids of one length, and their slots are marked.

    Args:
        tokenizer: one of the package `tokenizers`. It cuts a text into tokens.
        length: tokens of a row.
        start, end, pad: ids before a text (or none), after it, and in the rest of its row.
    """

    def __init__(self, tokenizer, length: int, start: list[int], end: int, pad: int):
        self.tokenizer, self.length, self.start, self.end, self.pad = tokenizer, length, start, end, pad
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
            encoding = self.tokenizer.encode(written.text, add_special_tokens=False)
            tokens = [*self.start, *encoding.ids]
            starts = [-1] * len(self.start) + [start for start, _ in encoding.offsets]
            for n, stop in written.slots:
                last = bisect_left(starts, stop) - 1             # the last token that starts before `stop`
                if last >= self.length - 1:
                    placeholder = list(stand_ins)[n - 1]
                    raise InputError(f"the placeholder {placeholder!r} in {shown(text)} is token {last + 1}, "
                                     f"but a text is cut to {self.length} with the end token; shorten it, or "
                                     "name the placeholder earlier")
                slots[row, last] = n
            for n, *edges in written.phrases:
                # a token may hold the space before its word: a phrase goes from the end of the word before it
                first, stop = (bisect_left(starts, len(written.text[:edge].rstrip())) for edge in edges)
                phrases[row, first:min(stop, self.length - 1)] = n
            if len(tokens) > self.length - 1 and text not in self.cut:
                self.cut.add(text)
                tqdm.write(f"{shown(text)}: longer than {self.length} tokens, and cut there for "
                           f"{type(self).__name__}", file=sys.stderr)
            tokens = [*tokens[:self.length - 1], self.end]
            ids[row, :len(tokens)] = torch.tensor(tokens)
        return Tokens(ids, slots, phrases)


def build_clip(folder: Path):
    """CLIP's tokenizer from vocab.json and merges.txt. Raises InputError if one is missing or damaged."""
    parts = package()
    ids = read_json(folder / "vocab.json", "download it again")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    try:
        tokenizer = parts.Tokenizer(parts.models.BPE(ids, merges, end_of_word_suffix="</w>", unk_token=END))
        complete = len(ids) == 2 * 256 + len(merges) + 2         # bytes, merged tokens, START and END
    except Exception:                            # the package has no narrower class
        complete = False
    if not complete:
        raise InputError(f"{folder}: merges.txt and vocab.json do not fit each other; one is damaged, "
                         "download both again")
    tokenizer.normalizer = parts.normalizers.Sequence([
        parts.normalizers.NFC(), parts.normalizers.Replace(parts.Regex(r"\s+"), " "),
        parts.normalizers.Lowercase()])
    tokenizer.pre_tokenizer = parts.pre_tokenizers.Sequence([
        parts.pre_tokenizers.Split(parts.Regex(CLIP_WORDS), "removed", invert=True),
        parts.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


class ClipTokenizer(SlotTokenizer):
    """CLIP's tokenizer, from vocab.json and merges.txt, or from the tokenizer.json of newer libraries.

    It lower-cases a text and cuts it into words, single digits and runs of signs. A start, end or pad token
    that is written in a text is read as that token. `pad` is the end token (CLIP-L) or 0, "!" (CLIP-G). So
    CLIP-G reads every "!" as id 0, as diffusers does (Stability's own code reads it as a sign).

    Raises: InputError if a file is missing or damaged, or if the package is not installed.
    """

    def __init__(self, folder: Path, pad: int):
        whole = Path(folder) / "tokenizer.json"
        split = (whole.parent / "vocab.json").is_file() or not whole.is_file()
        tokenizer = build_clip(whole.parent) if split else read_tokenizer(whole)
        start, end = map(tokenizer.token_to_id, (START, END))
        filler = tokenizer.id_to_token(pad)
        if None in (start, end, filler):
            raise InputError(f"{folder}: not CLIP's tokenizer; download it again")
        tokenizer.add_special_tokens([START, END, filler])
        super().__init__(tokenizer, 77, [start], end, pad)


class T5Tokenizer(SlotTokenizer):
    """T5's tokenizer, from tokenizer.json: </s> (1) ends a text, and <pad> (0) fills it up.

    Raises: InputError if the file is missing, damaged or not T5's, or if the package is not installed.
    """

    def __init__(self, folder: Path, length: int = 256):
        path = Path(folder) / "tokenizer.json"
        super().__init__(read_tokenizer(path), length, [], end=1, pad=0)
        if (self.tokenizer.id_to_token(self.pad), self.tokenizer.id_to_token(self.end)) != ("<pad>", "</s>"):
            raise InputError(f"{path}: not T5's tokenizer, whose <pad> is 0 and </s> is 1; "
                             "take that of tokenizer_3")

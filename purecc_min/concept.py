"""A concept as data: reference pictures with their texts, encoded once, and noised batches of them.

    COMPLETE  "a [V] robot in the desert"          BASE  "a robot in the desert"
    TARGET    "[V] robot"                          NULL  ""

Row i of everything belongs to reference i: pictures and texts are paired once, here, and never again. How a
folder of pictures becomes a `ConceptSet` is in commands/folder.py. Read next: embeddings.py.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyflow.flow import path, velocity_target
from tinyflow.pipeline import Pipeline, Text

TOKEN = "[V]"                                    # the new concept's name in every text
STYLE_WORD = "a"                                 # the class word of a style: "[V] red ball"
STYLE_WORDS = (STYLE_WORD, "style")              # or "a red ball in [V] style"
STYLE = re.compile(r",?\s*\bin (?:(?:the |a )?\[V\] style\b|the style of \[V\])", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """One picture of the concept with its three texts."""
    id: str                                      # the file's name
    pictures: np.ndarray                         # uint8 [V, S, S, 3]: the picture, then crops and flips of it
    complete: str
    base: str
    target: str
    masks: np.ndarray | None = None              # uint8 [V, S, S]: where each picture counts in L_CC; or all

    @property
    def picture(self) -> np.ndarray:             # [S, S, 3], the picture itself
        return self.pictures[0]


@dataclass(frozen=True)
class ConceptSet:
    """The references of one concept. The text encoder reads the class word where [V] stands."""
    class_word: str
    references: list[Reference]
    notes: list[str] = field(default_factory=list)   # what was taken from a folder, and what was converted


def styles_among(class_words: dict[str, str]) -> tuple[str, ...]:
    """The placeholders that are styles, as their class words say."""
    return tuple(name for name, word in class_words.items() if word.lower() in STYLE_WORDS)


def base_text(complete: str) -> str:
    """The text without [V] and braces. A style's words go too: "a cat, in [V] style" is "a cat" (Fig. 5)."""
    if TOKEN in complete:
        complete = re.sub("[{}]", "", complete)
    text = " ".join(STYLE.sub("", complete).replace(TOKEN, " ").split())
    return re.sub(r" ([,.;!?])", r"\1", text).lstrip(",.;!? ")


class Texts(NamedTuple):
    """The four encoded texts of n references: y_complete, y_base, y_tar and the empty text."""
    complete: Text
    base: Text
    target: Text
    null: Text

    def rows(self, rows: Tensor) -> "Texts":
        return Texts(*(text[rows] for text in self))


class EncodedConcept(NamedTuple):
    """A custom set as the model sees it."""
    ids: list[str]
    variants: Tensor                             # [n, V, C, H, W]: each picture, then its crops and flips
    texts: Texts
    class_text: Text                             # the base texts (or the bare class word), slots at that word
    masks: Tensor | None = None                  # [n, V, 1, H, W] in [0, 1], if the references have masks
    imagined: "EncodedConcept | None" = None     # scenes that the base model drew itself (pairs.py)

    @property
    def x_0(self) -> Tensor:                     # [n, C, H, W], the pictures themselves
        return self.variants[:, 0]


def encode(pipe: Pipeline, concept: ConceptSet) -> EncodedConcept:
    """Encodes a custom set. Raises InputError for words that the text encoder does not know."""
    references, word = concept.references, concept.class_word
    rows = ([r.complete for r in references], [r.base for r in references], [r.target for r in references],
            [""] * len(references))
    texts = Texts(*(pipe.encode_text(row, {TOKEN: word}, styles_among({TOKEN: word})) for row in rows))
    named = pipe.tokenizer([r.base for r in references], {word: word}).slots.any(1).tolist()
    class_texts = [r.base if has_word else word for r, has_word in zip(references, named)]
    variants = torch.stack([pipe.encode_images(r.pictures) for r in references])
    class_text = pipe.encode_text(class_texts, {word: word})
    masks = None
    if references[0].masks is not None:          # a latent counts as much as the pixels that it stands for
        pixels = torch.tensor(np.stack([r.masks for r in references if r.masks is not None]))
        height, width = variants.shape[-2:]
        masks = F.adaptive_avg_pool2d(pixels.to(variants) / 255, (height, width))[:, :, None]
    return EncodedConcept([r.id for r in references], variants, texts, class_text, masks)


class Batch(NamedTuple):
    """One step's draw. All predictions of a step see the same x_t and t."""
    x_t: Tensor                                  # [B, C, H, W]
    t: Tensor                                    # [B]
    v: Tensor                                    # [B, C, H, W] the target velocity of Eq. 2
    texts: Texts
    mask: Tensor | None = None                   # [B, 1, H, W]: what each pixel counts in L_CC
    imagined: "Batch | None" = None              # a draw from scenes that the base model drew itself


def noised(x_0: Tensor, x_1: Tensor, t: Tensor, texts: Texts) -> Batch:
    """Pictures x_0 and noise x_1 [B, C, H, W], mixed at times t [B] (Eq. 1), with their texts."""
    return Batch(path(x_0, x_1, t), t, velocity_target(x_0, x_1), texts)

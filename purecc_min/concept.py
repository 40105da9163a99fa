"""The data of a concept: pictures and texts, encoded once, and batches of them with noise.

    COMPLETE  "a [V] robot in the desert", the caption     BASE   "a robot in the desert", without [V]
    TARGET    "[V] robot", the concept alone (y_tar)       NULL   "", the empty text

Row i of every tensor belongs to reference i. commands/folder.py reads a folder of pictures as a `ConceptSet`.
Read next: embeddings.py.
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
STYLE_WORD = "a"                                 # a style's class word: "[V] red ball" is read "a red ball"
STYLE_WORDS = (STYLE_WORD, "style")              # elsewhere it is "style": "a red ball in [V] style"
STYLE = re.compile(r",?\s*\bin (?:(?:the |a )?\[V\] style\b|the style of \[V\])", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """One picture of the concept with its three texts."""
    id: str                                      # the file's name
    pictures: np.ndarray                         # uint8 [K, S, S, 3]: the picture, then crops and flips of it
    complete: str
    base: str
    target: str
    masks: np.ndarray | None = None              # uint8 [K, S, S], 255 where L_CC counts; in all, or none

    @property
    def picture(self) -> np.ndarray:             # [S, S, 3], the picture itself
        return self.pictures[0]


@dataclass(frozen=True)
class ConceptSet:
    """The references of one concept. The text encoder reads the class word where [V] stands."""
    class_word: str
    references: list[Reference]
    notes: list[str] = field(default_factory=list)   # what commands/folder.py used and converted


def styles_among(class_words: dict[str, str]) -> tuple[str, ...]:
    """Returns the placeholders whose class word is in STYLE_WORDS."""
    return tuple(name for name, word in class_words.items() if word.lower() in STYLE_WORDS)


def base_text(complete: str) -> str:
    """Removes [V], braces and a style's words: "a cat, in [V] style" becomes "a cat" (the paper's Fig. 5)."""
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

    def rows(self, chosen: Tensor) -> "Texts":
        return Texts(*(text[chosen] for text in self))


class EncodedConcept(NamedTuple):
    """A ConceptSet, encoded: latents, texts and masks of n references."""
    ids: list[str]
    variants: Tensor                             # [n, K, C, H, W]: each picture, then its crops and flips
    texts: Texts
    class_text: Text                             # base texts, or the word where it is missing; slots mark it
    masks: Tensor | None = None                  # [n, K, 1, H, W] in [0, 1], if the references have masks
    imagined: "EncodedConcept | None" = None     # scenes that the base model sampled itself (pairs.py)

    @property
    def x_0(self) -> Tensor:                     # [n, C, H, W], the pictures themselves
        return self.variants[:, 0]


def encode(pipe: Pipeline, concept: ConceptSet) -> EncodedConcept:
    """Encodes a ConceptSet. Raises InputError for a text that the tokenizer refuses."""
    references, word = concept.references, concept.class_word
    kinds = ([r.complete for r in references], [r.base for r in references], [r.target for r in references],
             [""] * len(references))
    texts = Texts(*(pipe.encode_text(kind, {TOKEN: word}, styles_among({TOKEN: word})) for kind in kinds))
    # {word: word} changes no text; it only makes slots mark the class word
    has_word = pipe.tokenizer([r.base for r in references], {word: word}).slots.any(1).tolist()
    class_texts = [r.base if has_it else word for r, has_it in zip(references, has_word)]
    variants = torch.stack([pipe.encode_images(r.pictures) for r in references])
    class_text = pipe.encode_text(class_texts, {word: word})
    masks = None
    if references[0].masks is not None:          # a latent position's weight: the mean mask of its pixels
        pixels = torch.tensor(np.stack([r.masks for r in references if r.masks is not None]))
        height, width = variants.shape[-2:]
        masks = F.adaptive_avg_pool2d(pixels.to(variants) / 255, (height, width))[:, :, None]
    return EncodedConcept([r.id for r in references], variants, texts, class_text, masks)


class Batch(NamedTuple):
    """The random batch of one step. All predictions of the step use this x_t and t."""
    x_t: Tensor                                  # [B, C, H, W]
    t: Tensor                                    # [B]
    v: Tensor                                    # [B, C, H, W] the target velocity x_1 - x_0 of Eq. 2
    texts: Texts
    mask: Tensor | None = None                   # [B, 1, H, W]: weights in L_CC; in pairs.py, [V]'s half
    imagined: "Batch | None" = None              # a batch of imagined scenes (pairs.py)


def noised(x_0: Tensor, x_1: Tensor, t: Tensor, texts: Texts) -> Batch:
    """Mixes latents x_0 and noise x_1 [B, C, H, W] at times t [B] (Eq. 1); keeps their texts."""
    return Batch(path(x_0, x_1, t), t, velocity_target(x_0, x_1), texts)

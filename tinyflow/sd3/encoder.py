"""How three tokenizers and three text encoders become one of each, as the Pipeline needs them.

The text stream of the MMDiT has 77 tokens of CLIP and then 256 tokens of T5. A CLIP token is the hidden
states of CLIP-L and CLIP-G side by side, filled up with zeros to the width of T5. The pooled vector is that
of CLIP-L and that of CLIP-G side by side. Read next: tokenizers.py.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflow.phrase import Tokens
from tinyflow.sd3.t5 import T5Encoder
from tinyflow.sd3.tokenizers import ClipTokenizer, T5Tokenizer
from tinyflow.text import TextEncoder


class SD3Tokenizer:
    """The three tokenizers as one.

    Args:
        folders: "clip_l", "clip_g" and, if the model has T5, "t5" -> the folder of that tokenizer.
    """

    def __init__(self, folders: dict[str, Path]):
        self.clip_l = ClipTokenizer(folders["clip_l"], pad=49407)
        self.clip_g = ClipTokenizer(folders["clip_g"], pad=0)
        self.t5 = T5Tokenizer(folders["t5"]) if "t5" in folders else None

    def __call__(self, texts: list[str], stand_ins: dict[str, str] | None = None,
                 styles: tuple[str, ...] = ()) -> Tokens:
        """All ids side by side [B, 77 + 77 + 256]; slots and phrases of the text stream [B, 77 + 256]."""
        clip_l, clip_g = (tokenizer(texts, stand_ins, styles) for tokenizer in (self.clip_l, self.clip_g))
        t5 = Tokens(*[torch.zeros(len(texts), 256, dtype=torch.long)] * 3)
        if self.t5:
            t5 = self.t5(texts, stand_ins, styles)
        return Tokens(torch.cat([clip_l.ids, clip_g.ids, t5.ids], dim=1),
                      *(torch.cat(pair, dim=1) for pair in zip(clip_l[1:], t5[1:])))


class SD3Encoder(nn.Module):
    """CLIP-L, CLIP-G and T5 as one text encoder.

    Without T5 its 256 tokens are zeros, as in diffusers; other programs leave these tokens out.
    """

    def __init__(self, clip_l: TextEncoder, clip_g: TextEncoder, t5: T5Encoder | None, context_width: int):
        super().__init__()
        self.clip_l, self.clip_g, self.t5, self.context_width = clip_l, clip_g, t5, context_width

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, 77 + 77 + 256] -> context [B, 77 + 256, context_width], pooled [B, pooled_width]."""
        lengths = [self.clip_l.config.length, self.clip_g.config.length]
        ids_l, ids_g, ids_t5 = ids.split([*lengths, ids.shape[1] - sum(lengths)], dim=1)
        (context_l, pooled_l), (context_g, pooled_g) = self.clip_l(ids_l), self.clip_g(ids_g)
        clip = torch.cat([context_l, context_g], dim=-1)                               # [B, 77, 768 + 1280]
        clip = F.pad(clip, (0, self.context_width - clip.shape[-1]))                   # [B, 77, 4096]
        t5 = (self.t5(ids_t5) if self.t5                                               # [B, 256, 4096]
              else clip.new_zeros(*ids_t5.shape, self.context_width))
        return torch.cat([clip, t5], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

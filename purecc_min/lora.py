"""LoRA: low-rank adapters, kept apart from the base model, whose weights never change.

Each adapted linear layer computes W x + B A x, with A [r, in] and B [out, r]. B starts at zero, so a fresh
set changes nothing. While a set is `attached` to a block, hooks add its B A x to the outputs of the block's
layers. So the frozen extractor and the trainable model are two sets over ONE base model in memory. `where`:

    everywhere    all projections of the joint attention, of image and text, at all tokens (for the paper)
    phrase        the text keys and values, at the tokens of [V]'s phrase
    token         the text keys and values, at [V] alone

With phrase or token, the velocity of a text without [V] is exactly the base model's. Many programs
multiply B A x by alpha / rank; here is no such factor, as if alpha = rank. A and B are fp32, and used in the
dtype of the layer's input. (As the first size of a shape, B is the batch.) Read next: branch.py.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflow.mmdit import MMDiT
from tinyflow.pipeline import Text

TEXT_KEYS_AND_VALUES = ["attention.text.to_k", "attention.text.to_v"]
TARGETS = {"everywhere": [f"attention.{stream}.{layer}" for stream in ("image", "text")
                          for layer in ("to_q", "to_k", "to_v", "to_out")],
           "phrase": TEXT_KEYS_AND_VALUES, "token": TEXT_KEYS_AND_VALUES}


def target_layers(block: nn.Module, where: str) -> dict[str, nn.Linear]:
    """The linear layers of a block that are adapted, by name. The last block has no attention.text.to_out."""
    layers = dict(block.named_modules())
    return {name: layers[name] for name in TARGETS[where] if name in layers}


def key_of(l: int, name: str) -> str:
    """A layer's key in a set of adapters. A ParameterDict's key must not contain dots."""
    return f"blocks.{l}.{name}".replace(".", "/")


class LoRA(nn.Module):
    """One set of adapters, with the parameters "A.<key>" [r, in] and "B.<key>" [out, r]."""

    def __init__(self, mmdit: MMDiT, rank: int = 4, generator: torch.Generator | None = None,
                 where: str = "everywhere"):
        super().__init__()
        self.where, self.A, self.B = where, nn.ParameterDict(), nn.ParameterDict()
        for l, block in enumerate(mmdit.blocks):
            for name, layer in target_layers(block, where).items():
                key, bound = key_of(l, name), layer.in_features**-0.5
                A = (2 * torch.rand((rank, layer.in_features), generator=generator) - 1) * bound
                self.A[key] = nn.Parameter(A.to(layer.weight.device))
                self.B[key] = nn.Parameter(torch.zeros(layer.out_features, rank).to(layer.weight.device))

    def places(self, text: Text, n: int) -> Tensor | None:
        """bool [B, T]: the text tokens at which the set acts for placeholder n; None: everywhere."""
        if self.where == "everywhere":
            return None
        return (text.phrases if self.where == "phrase" else text.slots) == n

    @contextlib.contextmanager
    def attached(self, l: int, block: nn.Module, places: Tensor | None):
        """Inside `with`, block l computes with this set's adapters at these places."""
        mask = None if places is None else places[..., None]                            # [B, T, 1]
        hooks = [layer.register_forward_hook(self.hook(key_of(l, name), mask))
                 for name, layer in target_layers(block, self.where).items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, key: str, mask: Tensor | None):
        """A forward hook that adds B A x to a layer's output, where the mask is True."""
        def add(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x = inputs[0]                                                               # [B, N or T, in]
            change = F.linear(F.linear(x, self.A[key].to(x.dtype)), self.B[key].to(x.dtype))
            return output + (change if mask is None else mask * change)
        return add

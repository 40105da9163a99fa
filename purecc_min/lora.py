"""LoRA: low-rank adapters as a set of their own over a shared, untouched base model.

Each adapted linear layer computes W x + B A x, with A [r, in] and B [out, r]. B starts at zero, so a fresh
set changes nothing. A set is not built into the model: while it is `attached` to a block, hooks add its B A x
to the outputs of the block's layers. So the frozen extractor and the trainable model are two sets over ONE
base model in memory, which is never written. A set acts "everywhere" (the paper's); or on [V]'s "phrase"
(phrase.py), on the keys and values that others read there; or on these at the "token" [V] alone. With the
last two a text without [V] is computed by the base model itself. There is no alpha: the scale is 1, which
other programs call alpha = rank. A and B are kept in fp32 and used in the dtype of the layer's input (bf16 in
SD3.5). Read next: branch.py.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflow.mmdit import MMDiT
from tinyflow.pipeline import Text

KEYS_AND_VALUES = ["attention.text.to_k", "attention.text.to_v"]
TARGETS = {"everywhere": [f"attention.{stream}.{layer}" for stream in ("image", "text")
                          for layer in ("to_q", "to_k", "to_v", "to_out")],
           "phrase": KEYS_AND_VALUES, "token": KEYS_AND_VALUES}


def target_layers(block: nn.Module, where: str) -> dict[str, nn.Linear]:
    """The linear layers of a block that are adapted, by name. The last block has no attention.text.to_out."""
    layers = dict(block.named_modules())
    return {name: layers[name] for name in TARGETS[where] if name in layers}


def key_of(l: int, name: str) -> str:
    """A layer's key in a set of adapters. A parameter's name may not hold dots."""
    return f"blocks.{l}.{name}".replace(".", "/")


class LoRA(nn.Module):
    """One set of adapters, with the parameters "A.<key>" [r, in] and "B.<key>" [out, r].

    Args:
        where: a key of TARGETS, see above.
    """

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
        """bool [B, T]: the text tokens at which the set acts for the n-th placeholder; None: everywhere."""
        if self.where == "everywhere":
            return None
        return (text.phrases if self.where == "phrase" else text.slots) == n

    @contextlib.contextmanager
    def attached(self, l: int, block: nn.Module, places: Tensor | None):
        """Within this context block l computes with this set's adapters at these places."""
        mask = None if places is None else places[..., None]                            # [B, T, 1]
        hooks = [layer.register_forward_hook(self.hook(key_of(l, name), mask))
                 for name, layer in target_layers(block, self.where).items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, key: str, mask: Tensor | None):
        """A forward hook that adds B A x to a layer's output, where the mask allows it."""
        def add(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x = inputs[0]                                                               # [B, T, in]
            change = F.linear(F.linear(x, self.A[key].to(x.dtype)), self.B[key].to(x.dtype))
            return output + (change if mask is None else mask * change)
        return add

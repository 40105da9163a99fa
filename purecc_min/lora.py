"""LoRA: low-rank adapters as a set of their own over a shared, untouched base.

Each adapted linear layer computes W x + B A x, with A [r, in] and B [out, r]; B starts at zero, so a fresh set changes nothing. A set is
not built into the model: while it is `attached`, hooks add its B A x to the outputs of the base's layers. So the frozen extractor and
the trainable model are two sets over ONE base in memory, and the base is never written. There is no alpha: the scale is 1, that is
alpha = rank. A and B are kept in fp32 and used in the dtype of the layer's input, bf16 over a bf16 base. Read next: embeddings.py.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out")     # in JointAttention, of both streams: the paper's eight attention projections


def target_layers(mmdit: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are adapted, by name."""
    return {name: layer for name, layer in mmdit.named_modules()
            if isinstance(layer, nn.Linear) and ".attention." in name and name.endswith(TARGETS)}


class LoRA(nn.Module):
    """One adapter set. Parameters: "A.<layer>" [r, in] and "B.<layer>" [out, r], dots in the layer's name written as "/"."""

    def __init__(self, mmdit: nn.Module, rank: int = 4, generator: torch.Generator | None = None):
        super().__init__()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in target_layers(mmdit).items():
            key, bound = name.replace(".", "/"), layer.in_features**-0.5
            A = (2 * torch.rand((rank, layer.in_features), generator=generator) - 1) * bound
            self.A[key] = nn.Parameter(A.to(layer.weight.device))
            self.B[key] = nn.Parameter(torch.zeros((layer.out_features, rank), device=layer.weight.device))

    @contextlib.contextmanager
    def attached(self, mmdit: nn.Module):
        """Within this context the model computes with this set's adapters."""
        def hook_for(key: str):
            def add(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                x = inputs[0]
                return output + F.linear(F.linear(x, self.A[key].to(x.dtype)), self.B[key].to(x.dtype))
            return add

        hooks = [layer.register_forward_hook(hook_for(name.replace(".", "/"))) for name, layer in target_layers(mmdit).items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

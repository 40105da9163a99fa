"""Text encoders whose weights stay in host memory, and whose layers run on another device, one at a time.

The three text encoders of SD3.5 are larger than the model that draws, and each text needs them only once. So
`offload` leaves their weights in the mapped file, in the file's own dtype. Whenever a layer is called, its
weights are copied to the device of its input, in fp32, and the copies are dropped after the call. The classes
TextEncoder and T5Encoder know nothing of this. We compute in fp32 because T5 overflows in fp16, and one layer
at a time fits everywhere. Read next: tinyflow/vae.py.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call


def run_beside_input(layer: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    """Computes layer(x, *args) on the device of x, in fp32. Weights that are there in fp32 are not copied."""
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if all((tensor.device, tensor.dtype) == (x.device, torch.float32) for tensor in state.values()):
        return type(layer).forward(layer, x, *args)
    copies = {name: tensor.to(x.device, torch.float32) for name, tensor in state.items()}
    return functional_call(layer, copies, (x, *args))    # calls this function again; now no copy is needed


def offload(encoder: nn.Module) -> nn.Module:
    """Lets every part of a text encoder, and every single entry of its `layers`, run by `run_beside_input`.

    The names and the places of the weights do not change. Returns the encoder.
    """
    for part in encoder.children():
        for layer in part if isinstance(part, nn.ModuleList) else [part]:
            layer.forward = partial(run_beside_input, layer)
    return encoder

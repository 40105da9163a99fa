"""A learned concept for other programs.

    export_lora           adapters as the LoRA file that diffusers and ComfyUI read (Stable Diffusion 3.5; alpha = rank, scale 1)
    attach_embeddings     what no LoRA file can carry, the layer-wise embeddings Y^l, put into a diffusers pipeline by hooks

A client that loads the LoRA alone and is given the class word in [V]'s place draws with theta2's adapters and without its Y. Read next:
the README's section on Stable Diffusion 3.5.
"""

import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor

from tinyflow.errors import InputError
from tinyflow.layouts import DIFFUSERS, mmdit_layers
from tinyflow.weights import load_tensors, save_tensors


def export_lora(concept: str | Path, out: str | Path) -> int:
    """Writes the concept's adapters to `out`, a .safetensors file in diffusers' layout, in fp32. Returns the number of tensors.

    Raises: InputError for a file that is no concept, or one learned on the tiny base, which no other program knows.
    """
    tensors, facts = load_tensors(concept, "concept")
    if facts.get("base", "tiny") == "tiny":
        raise InputError(f"{concept}: learned on the tiny base, which no other program has; only concepts on public weights are exported")
    names = mmdit_layers(DIFFUSERS, depth=len(tensors["embeddings.Y"]))
    exported = {}
    for name, tensor in tensors.items():
        if name.startswith("lora."):
            _, letter, key = name.split(".")
            exported[f"transformer.{names[key.replace('/', '.')]}.lora_{letter}.weight"] = tensor
    rank, prefix = facts["rank"], "transformer."
    targets = sorted({name.removeprefix(prefix).partition(".lora_")[0] for name in exported})
    adapter = {f"{prefix}r": rank, f"{prefix}lora_alpha": rank, f"{prefix}target_modules": targets}
    save_tensors(out, "exported LoRA", exported, facts, {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)})
    return len(exported)


@contextlib.contextmanager
def attach_embeddings(transformer: torch.nn.Module, concept: str | Path, slots: Tensor):
    """Within this context diffusers' SD3Transformer2DModel sees Y^l in the slots at the input of every block l (Eq. 7).

    Args:
        slots: [B, T] bool, True at [V]'s positions among the text tokens, as tinyflow.sd3.load_tokenizer reports them; a row for every
            row of the transformer's batch. With guidance the empty prompt comes first, and its row is all False.
    """
    Y = load_tensors(concept, "concept")[0]["embeddings.Y"]

    def hook_for(l: int):
        def replace(block: torch.nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
            c = named["encoder_hidden_states"]                                                   # [B, T, D]
            return inputs, {**named, "encoder_hidden_states": torch.where(slots.to(c.device)[..., None], Y[l].to(c), c)}
        return replace

    hooks = [block.register_forward_pre_hook(hook_for(l), with_kwargs=True) for l, block in enumerate(transformer.transformer_blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

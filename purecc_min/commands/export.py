"""A learned concept for other programs.

    export_lora           the adapters, as a LoRA file for diffusers and ComfyUI (alpha = rank, scale 1)
    attach_embeddings     what no LoRA file can carry: the embeddings Y^l, put into a diffusers pipeline

A client that loads the LoRA alone, with the class word in [V]'s place, draws with theta_2's adapters but
without its Y. The page tinyflow/sd3/README.md shows both at work.
"""

import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor

from tinyflow.errors import InputError
from tinyflow.sd3.layouts import DIFFUSERS, mmdit_layers
from tinyflow.weights import load_tensors, save_tensors

PREFIX = "transformer."                          # of every name in diffusers' LoRA files


def export_lora(concept: str | Path, out: str | Path) -> int:
    """Writes the concept's adapters to `out`, a .safetensors file in diffusers' layout, in fp32.

    Returns: the number of tensors.
    Raises: InputError for a file that is no concept, or one learned on the tiny base model, which no other
        program has.
    """
    tensors, facts = load_tensors(concept, "concept")
    if facts.get("base", "tiny") == "tiny":
        raise InputError(f"{concept}: learned on the tiny base model, which no other program has; "
                         "only concepts on public weights are exported")
    names = mmdit_layers(DIFFUSERS, depth=len(tensors["embeddings.Y"]))
    exported, targets = {}, set()
    for name, tensor in tensors.items():
        if name.startswith("lora."):
            _, letter, key = name.split(".")
            target = names[key.replace("/", ".")]
            targets.add(target)
            exported[f"{PREFIX}{target}.lora_{letter}.weight"] = tensor
    adapter = {"r": facts["rank"], "lora_alpha": facts["rank"], "target_modules": sorted(targets)}
    metadata = json.dumps({PREFIX + name: value for name, value in adapter.items()})
    save_tensors(out, "exported LoRA", exported, facts, {"format": "pt", "lora_adapter_metadata": metadata})
    return len(exported)


@contextlib.contextmanager
def attach_embeddings(transformer: torch.nn.Module, concept: str | Path, slots: Tensor):
    """Within this context diffusers' SD3Transformer2DModel sees Y^l in the slots at the input of every
    block l (Eq. 7).

    Args:
        slots: [B, T] bool, True at [V]'s positions among the text tokens, as
            tinyflow.sd3.load.load_tokenizer reports them; a row for every row of the transformer's batch.
            With guidance the empty prompt comes first, and its row is all False.
    """
    Y = load_tensors(concept, "concept")[0]["embeddings.Y"]

    def hook_for(l: int):
        def replace(block: torch.nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
            c = named["encoder_hidden_states"]                                          # [B, T, D]
            c = torch.where(slots.to(c.device)[..., None], Y[l].to(c), c)
            return inputs, {**named, "encoder_hidden_states": c}
        return replace

    hooks = [block.register_forward_pre_hook(hook_for(l), with_kwargs=True)
             for l, block in enumerate(transformer.transformer_blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

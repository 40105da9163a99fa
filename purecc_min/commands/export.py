"""A learned concept for other programs.

    export_lora           the adapters, as a LoRA file for diffusers and ComfyUI (alpha = rank, scale 1)
    attach_concept        what no LoRA file can carry, put into a diffusers pipeline by hooks: the embeddings
                          Y^l, and adapters that act at [V] alone

A client that loads the LoRA alone, with the class word in [V]'s place, draws with theta_2's adapters but
without its Y. The page tinyflow/sd3/README.md shows both at work.
"""

import contextlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from purecc_min.branch import load_concept_file
from purecc_min.commands.base_models import BASE_MODELS
from purecc_min.lora import key_of
from tinyflow.errors import InputError, shown
from tinyflow.files import check_output
from tinyflow.sd3.layouts import DIFFUSERS, mmdit_layers
from tinyflow.weights import save_tensors

PREFIX = "transformer."                          # of every name in diffusers' LoRA files


def export_lora(concept: str | Path, out: str | Path) -> int:
    """Writes the concept's adapters to `out`, a .safetensors file in diffusers' layout, in fp32.

    Returns: the number of tensors.
    Raises: InputError for a file that is no concept, or one learned on the tiny base model, which no other
        program has.
    """
    check_output(Path(out), ".safetensors", [Path(concept)])
    tensors, facts = load_concept_file(concept)
    if facts.get("base", "tiny") == "tiny":
        raise InputError(f"{concept}: learned on the tiny base model, which no other program has; "
                         "only concepts on public weights are exported")
    if facts["base"] not in BASE_MODELS:
        raise InputError(f"{concept}: learned on {shown(facts['base'])}, which this version does not know")
    if facts.get("where") == "token":
        raise InputError(f"{concept}: its adapters act where [V] stands and nowhere else; a LoRA file cannot "
                         "say so, and other programs would use them everywhere; for diffusers there is "
                         "attach_concept (tinyflow/sd3/README.md)")
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
def attach_concept(transformer: torch.nn.Module, concept: str | Path, slots: Tensor, copies: int = 1):
    """Within this context diffusers' SD3Transformer2DModel knows the concept.

    At the slots, Y^l stands at the input of every block l (Eq. 7), and bound adapters change the keys and
    values. (Adapters that act everywhere are loaded by load_lora_weights.)

    Args:
        slots: [R, T], not 0 at [V]'s positions among the text tokens, as tinyflow.sd3.load.load_tokenizer
            reports them for the R texts of a batch. With guidance the empty text is the first of them.
        copies: pictures of each text in a batch (num_images_per_prompt).
    Raises: InputError if concept, slots and transformer do not go together; at once where that can be seen,
        otherwise when the transformer is called.
    """
    tensors, facts = load_concept_file(concept)
    Y, blocks = tensors["embeddings.Y"], transformer.transformer_blocks
    if len(Y) != len(blocks):
        raise InputError(f"{concept}: learned on {len(Y)} blocks, and this transformer has {len(blocks)}; "
                         "use the base model that it was learned on")
    named = (slots > 0).any(1)                                                          # [R]
    if named[0] and not named.all():
        raise InputError("slots: the first text names the concept and another does not; with guidance the "
                         "empty text comes first")
    mask = (slots > 0).repeat_interleave(copies, dim=0)[..., None]                      # [B, T, 1]

    def check(c: Tensor) -> None:
        if c.shape[:2] != mask.shape[:2]:
            raise InputError(f"slots: the transformer was given {c.shape[0]} texts of {c.shape[1]} tokens, "
                             f"and the slots are of {mask.shape[0]} texts of {mask.shape[1]}; give one row "
                             "for each text of a batch, the empty one for guidance first, and "
                             "copies=num_images_per_prompt")

    def put_Y(l: int):
        def replace(block: torch.nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
            c = named["encoder_hidden_states"]                                          # [B, T, D]
            check(c)
            return inputs, {**named, "encoder_hidden_states": torch.where(mask.to(c.device), Y[l].to(c), c)}
        return replace

    def add_adapter(A: Tensor, B: Tensor):
        def add(layer: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            x = inputs[0]
            return output + mask.to(x.device) * F.linear(F.linear(x, A.to(x)), B.to(x))
        return add

    hooks = [block.register_forward_pre_hook(put_Y(l), with_kwargs=True) for l, block in enumerate(blocks)]
    if facts.get("where") == "token":
        for l, block in enumerate(blocks):
            for ours, theirs in (("to_k", block.attn.add_k_proj), ("to_v", block.attn.add_v_proj)):
                key = key_of(l, f"attention.text.{ours}")
                adapter = add_adapter(tensors[f"lora.A.{key}"], tensors[f"lora.B.{key}"])
                hooks.append(theirs.register_forward_hook(adapter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

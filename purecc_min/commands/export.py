"""A learned concept for other programs.

    export_lora           the adapters, as a LoRA file for diffusers and ComfyUI (alpha = rank, scale 1)
    attach_concept        what no LoRA file can carry, put into a diffusers pipeline by hooks: the embeddings
                          Y^l, and adapters that act on [V]'s phrase alone

A client that loads the LoRA alone, with the class word in [V]'s place, draws with theta_2's adapters but
without its Y. The page tinyflow/sd3/README.md shows both at work.
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from purecc_min.commands.base_models import BASE_MODELS
from purecc_min.concept import TOKEN
from purecc_min.concept_file import read_concept
from purecc_min.lora import key_of
from tinyflow.disk import check_output, free_name
from tinyflow.errors import InputError, shown
from tinyflow.files import write_whole
from tinyflow.phrase import Tokens
from tinyflow.sd3.layouts import DIFFUSERS, mmdit_layers

PREFIX = "transformer."                          # of every name in diffusers' LoRA files
CLIP_TOKENS = 77                                 # T5's tokens come after them


def export_command(options: argparse.Namespace) -> None:
    check_output(options.out, ".safetensors", [options.concept])
    out = free_name(options.out)                 # what stands there may be another concept
    count = export_lora(options.concept, out)
    print(f"{out}: {count} tensors; the layer-wise embeddings stay behind (tinyflow/sd3/README.md)")


def export_lora(concept: str | Path, out: str | Path) -> int:
    """Writes the concept's adapters to `out`, a .safetensors file in diffusers' layout, in fp32.

    Returns the number of tensors. Raises InputError for a file that is no concept, or that no LoRA can hold.
    """
    tensors, facts = read_concept(concept)
    if facts["base"] == "tiny":
        raise InputError(f"{concept}: learned on the tiny base model, which no other program has; "
                         "only concepts on public weights are exported")
    if facts["base"] not in BASE_MODELS:
        raise InputError(f"{concept}: learned on {shown(facts['base'])}, which this version does not know")
    if facts["where"] != "everywhere":
        raise InputError(f"{concept}: its adapters act on [V]'s {facts['where']} and nowhere else; a LoRA "
                         "file cannot say so, and other programs would use them everywhere; for diffusers "
                         "there is attach_concept (tinyflow/sd3/README.md)")
    names = mmdit_layers(DIFFUSERS, depth_of(tensors))
    exported, targets = {}, set()
    for name, tensor in tensors.items():
        if name.startswith("lora."):
            _, letter, key = name.split(".")
            target = names[key.replace("/", ".")]
            targets.add(target)
            exported[f"{PREFIX}{target}.lora_{letter}.weight"] = tensor
    adapter = {"r": facts["rank"], "lora_alpha": facts["rank"], "target_modules": sorted(targets)}
    metadata = json.dumps({PREFIX + name: value for name, value in adapter.items()})
    write_whole(out, save(exported, {"lora_adapter_metadata": metadata}))
    return len(exported)


def depth_of(tensors: dict[str, Tensor]) -> int:
    """The number of blocks that a concept was learned on."""
    keys = [name.split(".")[2] for name in tensors if name.startswith("lora.A.")]
    return 1 + max(int(key.split("/")[1]) for key in keys)


def put_Y(Y: Tensor | None, slots: Tensor):
    """A hook before a block of diffusers: Y [D] at the slots [B, T, 1] (Eq. 7), if there is one.

    It also raises InputError if the texts that the block is given are not those of the slots.
    """
    def replace(block: torch.nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        c = named["encoder_hidden_states"]                                              # [B, T, D]
        if c.shape[1] != slots.shape[1]:
            behind = slots.shape[1] - CLIP_TOKENS
            advice = f"give the pipeline max_sequence_length={behind}" if behind else "use load_tokenizer's"
            raise InputError(f"tokens: the transformer was given texts of {c.shape[1]} tokens, and here they "
                             f"have {slots.shape[1]}; {advice}")
        if len(c) != len(slots):
            raise InputError(f"tokens: the transformer was given {len(c)} texts, and here are {len(slots)}; "
                             "give one row for each text of a batch, the empty one for guidance first, and "
                             "copies=num_images_per_prompt; leave out skip_guidance_layers")
        c = c if Y is None else torch.where(slots.to(c.device), Y.to(c), c)
        return inputs, {**named, "encoder_hidden_states": c}
    return replace


def add_adapter(A: Tensor, B: Tensor, places: Tensor):
    """A hook after a layer of diffusers: B A x at the places [B, T, 1]."""
    def add(layer: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        x = inputs[0]
        return output + places.to(x.device) * F.linear(F.linear(x, A.to(x)), B.to(x))
    return add


@contextlib.contextmanager
def attach_concept(transformer: torch.nn.Module, concept: str | Path, tokens: Tokens, copies: int = 1):
    """Within this context diffusers' SD3Transformer2DModel knows the concept.

    A concept with embeddings has Y^l in [V]'s place at the input of every block l (Eq. 7), and bound adapters
    change keys and values where they act. (Adapters that act everywhere are loaded by load_lora_weights.)

    Args:
        tokens: what tinyflow.sd3.load.load_tokenizer makes of the R texts of a batch, with [V] in them. With
            guidance the empty text is the first of them. What the pipeline itself is given has the class word
            in [V]'s place, and no braces.
        copies: pictures of each text in a batch (num_images_per_prompt).
    Raises: InputError if concept, tokens and transformer do not go together; at once where that can be seen,
        otherwise when the transformer is called.
    """
    tensors, facts = read_concept(concept)
    depth, blocks = depth_of(tensors), transformer.transformer_blocks
    if depth != len(blocks):
        raise InputError(f"{concept}: learned on {depth} blocks, and this transformer has {len(blocks)}; "
                         "use the base model that it was learned on")
    named = (tokens.slots > 0).any(1)                                                   # [R]
    if not named.any():
        raise InputError("tokens: no text names the concept; give load_tokenizer(...) the texts with "
                         f"{TOKEN} in them, and what is read there: {{'{TOKEN}': '{facts['class_word']}'}}")
    if tokens.slots.max() > 1:
        raise InputError("tokens: their texts name several concepts, and one is attached at a time")
    if named[0] and not named.all():
        raise InputError("tokens: the first text names the concept and another does not; with guidance the "
                         "empty text comes first")
    slots, phrases = ((places > 0).repeat_interleave(copies, dim=0)[..., None]          # [B, T, 1]
                      for places in (tokens.slots, tokens.phrases))
    where = facts["where"]
    acting = phrases if where == "phrase" else slots

    Y, hooks = tensors.get("embeddings.Y", [None] * depth), []
    for l, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(put_Y(Y[l], slots), with_kwargs=True))
        for ours, theirs in (("to_k", block.attn.add_k_proj), ("to_v", block.attn.add_v_proj)):
            if where != "everywhere":
                key = key_of(l, f"attention.text.{ours}")
                adapter = add_adapter(tensors[f"lora.A.{key}"], tensors[f"lora.B.{key}"], acting)
                hooks.append(theirs.register_forward_hook(adapter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

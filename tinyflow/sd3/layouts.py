"""The rename table: each of our layers, and what the public files of Stable Diffusion 3 call it.

Each row is (ours, in a diffusers folder, in an original single file). "{n}" and "{m}" count blocks, "{x}" is
q, k or v. The layers of the text encoders have the same names in both, so their rows have two columns. A note
in brackets says what to take of a tensor:

    [1/3]     a third of its rows: the single file stores query, key and value as one tensor
    [swap]    its two halves, exchanged: scale and shift, where we have shift and scale
    [1x1]     the weight of a 1 x 1 convolution, which is a linear layer here

Read next: encoder.py.
"""

from itertools import product

Row = tuple[str, ...]
DIFFUSERS, SINGLE = 0, 1                         # the layouts, as the functions below take them


def below(prefix: Row, rows: list[Row]) -> list[Row]:
    """Puts the prefix before every name, column by column."""
    return [tuple(f"{outer}.{inner}" for outer, inner in zip(prefix, row)) for row in rows]


def expand(rows: list[Row], layout: int, blocks: int, inner: int = 1) -> dict[str, str]:
    """Our layer -> theirs, for all that the braces stand for. The later of two rows for one layer counts."""
    names = {}
    for row in rows:
        for n, m, (third, x) in product(range(blocks), range(inner), enumerate("qkv", 1)):
            ours, theirs = (name.format(n=n, m=m, x=x, third=third, reverse=blocks - 1 - n)
                            for name in (row[0], row[1 + layout]))
            names[ours] = theirs
    return names


def mmdit_layers(layout: int, depth: int) -> dict[str, str]:
    """The layers of an MMDiT with `depth` blocks, also those that not every configuration has."""
    block: list[Row] = [
        ("image_adaln.linear", "norm1.linear", "x_block.adaLN_modulation.1"),
        ("text_adaln.linear", "norm1_context.linear", "context_block.adaLN_modulation.1"),
        ("attention.image.to_{x}", "attn.to_{x}", "x_block.attn.qkv[{third}/3]"),
        ("attention.image.to_out", "attn.to_out.0", "x_block.attn.proj"),
        ("attention.image.norm_q", "attn.norm_q", "x_block.attn.ln_q"),
        ("attention.image.norm_k", "attn.norm_k", "x_block.attn.ln_k"),
        ("attention.text.to_{x}", "attn.add_{x}_proj", "context_block.attn.qkv[{third}/3]"),
        ("attention.text.to_out", "attn.to_add_out", "context_block.attn.proj"),
        ("attention.text.norm_q", "attn.norm_added_q", "context_block.attn.ln_q"),
        ("attention.text.norm_k", "attn.norm_added_k", "context_block.attn.ln_k"),
        ("attention2.to_{x}", "attn2.to_{x}", "x_block.attn2.qkv[{third}/3]"),
        ("attention2.to_out", "attn2.to_out.0", "x_block.attn2.proj"),
        ("attention2.norm_q", "attn2.norm_q", "x_block.attn2.ln_q"),
        ("attention2.norm_k", "attn2.norm_k", "x_block.attn2.ln_k"),
        ("image_mlp.fc1", "ff.net.0.proj", "x_block.mlp.fc1"),
        ("image_mlp.fc2", "ff.net.2", "x_block.mlp.fc2"),
        ("text_mlp.fc1", "ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("text_mlp.fc2", "ff_context.net.2", "context_block.mlp.fc2"),
    ]
    last = depth - 1                             # its text stream ends at the attention: shift and scale only
    rows: list[Row] = [
        ("patch_embedder", "pos_embed.proj", "x_embedder.proj"),
        ("time_embedder.fc1", "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_embedder.fc2", "time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("pooled_embedder.fc1", "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("pooled_embedder.fc2", "time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("context_embedder", "context_embedder", "context_embedder"),
        ("final_adaln.linear", "norm_out.linear[swap]", "final_layer.adaLN_modulation.1"),
        ("final_linear", "proj_out", "final_layer.linear"),
        *below(("blocks.{n}", "transformer_blocks.{n}", "joint_blocks.{n}"), block),
        *below((f"blocks.{last}", f"transformer_blocks.{last}", f"joint_blocks.{last}"), [
            ("text_adaln.linear", "norm1_context.linear[swap]", "context_block.adaLN_modulation.1")]),
    ]
    return expand(rows, layout, depth)


def clip_layers(depth: int) -> dict[str, str]:
    """The layers of a TextEncoder with `depth` layers, as CLIP-L and CLIP-G."""
    layer: list[Row] = [
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("to_{x}", "self_attn.{x}_proj"),
        ("to_out", "self_attn.out_proj"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    ]
    rows: list[Row] = [
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("position_embedding", "text_model.embeddings.position_embedding"),
        *below(("layers.{n}", "text_model.encoder.layers.{n}"), layer),
        ("final_norm", "text_model.final_layer_norm"),
        ("projection", "text_projection"),
    ]
    return expand(rows, DIFFUSERS, depth)


def t5_layers(depth: int, token_embedding: str) -> dict[str, str]:
    """The layers of a T5Encoder with `depth` layers.

    Args:
        token_embedding: what the file calls it, "shared" or "encoder.embed_tokens".
    """
    layer: list[Row] = [
        ("norm1", "layer.0.layer_norm"),
        ("to_{x}", "layer.0.SelfAttention.{x}"),
        ("to_out", "layer.0.SelfAttention.o"),
        ("norm2", "layer.1.layer_norm"),
        ("gate", "layer.1.DenseReluDense.wi_0"),
        ("fc1", "layer.1.DenseReluDense.wi_1"),
        ("fc2", "layer.1.DenseReluDense.wo"),
    ]
    rows: list[Row] = [
        ("token_embedding", token_embedding),
        ("distance_embedding", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        *below(("layers.{n}", "encoder.block.{n}"), layer),
        ("final_norm", "encoder.final_layer_norm"),
    ]
    return expand(rows, DIFFUSERS, depth)


def vae_layers(layout: int, levels: int, layers: int) -> dict[str, str]:
    """The layers of a VAE with `levels` levels of `layers` residual blocks (in the decoder, of one more).

    The single file numbers the decoder's levels from the finest on. They are applied in the reverse order.
    """
    block: list[Row] = [
        *((same, same, same) for same in ("norm1", "conv1", "norm2", "conv2")),
        ("shortcut", "conv_shortcut", "nin_shortcut"),
    ]
    attention: list[Row] = [
        ("norm", "group_norm", "norm"),
        ("to_{x}", "to_{x}[1x1]", "{x}[1x1]"),
        ("to_out", "to_out.0[1x1]", "proj_out[1x1]"),
    ]
    both: list[Row] = [
        ("conv_in", "conv_in", "conv_in"),
        *below(("mid.0", "mid_block.resnets.0", "mid.block_1"), block),
        *below(("mid.1", "mid_block.attentions.0", "mid.attn_1"), attention),
        *below(("mid.2", "mid_block.resnets.1", "mid.block_2"), block),
        ("norm_out", "conv_norm_out", "norm_out"),
        ("conv_out", "conv_out", "conv_out"),
    ]
    blocks = below(("blocks.{m}", "resnets.{m}", "block.{m}"), block)
    down = ("encoder.down.{n}", "encoder.down_blocks.{n}", "encoder.down.{n}")
    up = ("decoder.up.{n}", "decoder.up_blocks.{n}", "decoder.up.{reverse}")
    rows: list[Row] = [
        *below(("encoder", "encoder", "encoder"), both),
        *below(("decoder", "decoder", "decoder"), both),
        *below(down, [*blocks, ("resample", "downsamplers.0.conv", "downsample.conv")]),
        *below(up, [*blocks, ("resample", "upsamplers.0.conv", "upsample.conv")]),
    ]
    return expand(rows, layout, levels, layers + 1)

"""The rename table: our layers, and what the public files of Stable Diffusion 3 call them.

Each row is (ours, diffusers folder, original single file); "{n}" counts blocks. A note in brackets says what to take of a tensor:
[1/3] a third of its rows (the single file stores query, key and value as one), [swap] its two halves swapped (scale and shift, where we
have shift and scale), [1x1] a 1 x 1 convolution that is a linear layer here. Text encoders have one public layout. Read next: sd3.py.
"""

Row = tuple[str, str, str]
DIFFUSERS, SINGLE = 0, 1                         # columns, as the functions below take them


def expand(rows: list[Row], layout: int, **numbers: range) -> dict[str, str]:
    """Our layer -> theirs, for every n (and m) that the rows count. Of two rows for one layer the later one holds."""
    names = {}
    for row in rows:
        ours, theirs = row[0], row[1 + layout]
        for n in numbers["n"] if "{n}" in ours else [0]:
            for m in numbers["m"] if "{m}" in ours else [0]:
                reverse = len(numbers["n"]) - 1 - n
                names[ours.format(n=n, m=m)] = theirs.format(n=n, m=m, reverse=reverse)
    return names


def mmdit_layers(layout: int, depth: int) -> dict[str, str]:
    """Of MMDiT. A layer that a configuration does not have is named all the same."""
    rows: list[Row] = [
        ("patch_embedder", "pos_embed.proj", "x_embedder.proj"),
        ("time_embedder.fc1", "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_embedder.fc2", "time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("pooled_embedder.fc1", "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("pooled_embedder.fc2", "time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("context_embedder", "context_embedder", "context_embedder"),
        ("final_adaln.linear", "norm_out.linear[swap]", "final_layer.adaLN_modulation.1"),
        ("final_linear", "proj_out", "final_layer.linear"),
    ]
    block: list[Row] = [
        ("image_adaln.linear", "norm1.linear", "x_block.adaLN_modulation.1"),
        ("text_adaln.linear", "norm1_context.linear", "context_block.adaLN_modulation.1"),
        ("attention.image.to_q", "attn.to_q", "x_block.attn.qkv[1/3]"),
        ("attention.image.to_k", "attn.to_k", "x_block.attn.qkv[2/3]"),
        ("attention.image.to_v", "attn.to_v", "x_block.attn.qkv[3/3]"),
        ("attention.image.to_out", "attn.to_out.0", "x_block.attn.proj"),
        ("attention.image.norm_q", "attn.norm_q", "x_block.attn.ln_q"),
        ("attention.image.norm_k", "attn.norm_k", "x_block.attn.ln_k"),
        ("attention.text.to_q", "attn.add_q_proj", "context_block.attn.qkv[1/3]"),
        ("attention.text.to_k", "attn.add_k_proj", "context_block.attn.qkv[2/3]"),
        ("attention.text.to_v", "attn.add_v_proj", "context_block.attn.qkv[3/3]"),
        ("attention.text.to_out", "attn.to_add_out", "context_block.attn.proj"),
        ("attention.text.norm_q", "attn.norm_added_q", "context_block.attn.ln_q"),
        ("attention.text.norm_k", "attn.norm_added_k", "context_block.attn.ln_k"),
        ("attention2.to_q", "attn2.to_q", "x_block.attn2.qkv[1/3]"),
        ("attention2.to_k", "attn2.to_k", "x_block.attn2.qkv[2/3]"),
        ("attention2.to_v", "attn2.to_v", "x_block.attn2.qkv[3/3]"),
        ("attention2.to_out", "attn2.to_out.0", "x_block.attn2.proj"),
        ("attention2.norm_q", "attn2.norm_q", "x_block.attn2.ln_q"),
        ("attention2.norm_k", "attn2.norm_k", "x_block.attn2.ln_k"),
        ("image_mlp.fc1", "ff.net.0.proj", "x_block.mlp.fc1"),
        ("image_mlp.fc2", "ff.net.2", "x_block.mlp.fc2"),
        ("text_mlp.fc1", "ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("text_mlp.fc2", "ff_context.net.2", "context_block.mlp.fc2"),
    ]
    rows += [(f"blocks.{{n}}.{ours}", f"transformer_blocks.{{n}}.{theirs}", f"joint_blocks.{{n}}.{single}") for ours, theirs, single in block]
    last = depth - 1                             # its text stream ends at the attention: shift and scale only, the other way round in diffusers
    rows.append((f"blocks.{last}.text_adaln.linear", f"transformer_blocks.{last}.norm1_context.linear[swap]",
                 f"joint_blocks.{last}.context_block.adaLN_modulation.1"))
    return expand(rows, layout, n=range(depth))


def clip_layers(depth: int) -> dict[str, str]:
    """Of TextEncoder as CLIP-L and CLIP-G."""
    rows: list[Row] = [(ours, theirs, theirs) for ours, theirs in (
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("position_embedding", "text_model.embeddings.position_embedding"),
        ("layers.{n}.norm1", "text_model.encoder.layers.{n}.layer_norm1"),
        ("layers.{n}.norm2", "text_model.encoder.layers.{n}.layer_norm2"),
        ("layers.{n}.to_q", "text_model.encoder.layers.{n}.self_attn.q_proj"),
        ("layers.{n}.to_k", "text_model.encoder.layers.{n}.self_attn.k_proj"),
        ("layers.{n}.to_v", "text_model.encoder.layers.{n}.self_attn.v_proj"),
        ("layers.{n}.to_out", "text_model.encoder.layers.{n}.self_attn.out_proj"),
        ("layers.{n}.fc1", "text_model.encoder.layers.{n}.mlp.fc1"),
        ("layers.{n}.fc2", "text_model.encoder.layers.{n}.mlp.fc2"),
        ("final_norm", "text_model.final_layer_norm"),
        ("projection", "text_projection"),
    )]
    return expand(rows, DIFFUSERS, n=range(depth))


def t5_layers(depth: int, shared: str) -> dict[str, str]:
    """Of T5Encoder. `shared` is what the file calls the token embedding: "shared" or "encoder.embed_tokens"."""
    rows: list[Row] = [(ours, theirs, theirs) for ours, theirs in (
        ("token_embedding", shared),
        ("distance_embedding", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("layers.{n}.norm1", "encoder.block.{n}.layer.0.layer_norm"),
        ("layers.{n}.to_q", "encoder.block.{n}.layer.0.SelfAttention.q"),
        ("layers.{n}.to_k", "encoder.block.{n}.layer.0.SelfAttention.k"),
        ("layers.{n}.to_v", "encoder.block.{n}.layer.0.SelfAttention.v"),
        ("layers.{n}.to_out", "encoder.block.{n}.layer.0.SelfAttention.o"),
        ("layers.{n}.norm2", "encoder.block.{n}.layer.1.layer_norm"),
        ("layers.{n}.gate", "encoder.block.{n}.layer.1.DenseReluDense.wi_0"),
        ("layers.{n}.fc1", "encoder.block.{n}.layer.1.DenseReluDense.wi_1"),
        ("layers.{n}.fc2", "encoder.block.{n}.layer.1.DenseReluDense.wo"),
        ("final_norm", "encoder.final_layer_norm"),
    )]
    return expand(rows, DIFFUSERS, n=range(depth))


def vae_layers(layout: int, levels: int, layers: int) -> dict[str, str]:
    """Of VAE. The single file numbers the decoder's levels from the finest, the reverse of the order in which they are applied."""
    rows: list[Row] = [(f"{side}.{layer}", f"{side}.{theirs}", f"{side}.{layer}") for side in ("encoder", "decoder")
                       for layer, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))]
    block = (("norm1", "norm1", "norm1"), ("conv1", "conv1", "conv1"), ("norm2", "norm2", "norm2"), ("conv2", "conv2", "conv2"),
             ("shortcut", "conv_shortcut", "nin_shortcut"))
    middle = (("norm", "group_norm", "norm"), ("to_q", "to_q[1x1]", "q[1x1]"), ("to_k", "to_k[1x1]", "k[1x1]"), ("to_v", "to_v[1x1]", "v[1x1]"),
              ("to_out", "to_out.0[1x1]", "proj_out[1x1]"))
    for side in ("encoder", "decoder"):
        for ours, index, number in (("0", 0, 1), ("2", 1, 2)):
            rows += [(f"{side}.mid.{ours}.{a}", f"{side}.mid_block.resnets.{index}.{b}", f"{side}.mid.block_{number}.{c}") for a, b, c in block]
        rows += [(f"{side}.mid.1.{a}", f"{side}.mid_block.attentions.0.{b}", f"{side}.mid.attn_1.{c}") for a, b, c in middle]
    for a, b, c in block:
        rows += [(f"encoder.down.{{n}}.blocks.{{m}}.{a}", f"encoder.down_blocks.{{n}}.resnets.{{m}}.{b}", f"encoder.down.{{n}}.block.{{m}}.{c}"),
                 (f"decoder.up.{{n}}.blocks.{{m}}.{a}", f"decoder.up_blocks.{{n}}.resnets.{{m}}.{b}", f"decoder.up.{{reverse}}.block.{{m}}.{c}")]
    rows += [("encoder.down.{n}.resample", "encoder.down_blocks.{n}.downsamplers.0.conv", "encoder.down.{n}.downsample.conv"),
             ("decoder.up.{n}.resample", "decoder.up_blocks.{n}.upsamplers.0.conv", "decoder.up.{reverse}.upsample.conv")]
    return expand(rows, layout, n=range(levels), m=range(layers + 1))

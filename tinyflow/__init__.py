"""A small text-to-image rectified-flow model. Read in this order: world, flow, attention, mmdit, tokenizer, text, pipeline, pretrain.

For Stable Diffusion 3.5 in the same classes: checkpoint, layouts, sd3, sd3_tokenizers, t5, vae.
"""

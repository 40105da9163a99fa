"""A small text-to-image rectified-flow model. Read in this order: world, flow, attention, mmdit, tokenizer, text, pipeline, pretrain."""

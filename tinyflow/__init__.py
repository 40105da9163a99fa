"""A small text-to-image rectified-flow model, which knows nothing of concepts.

The core, in the order in which to read it: flow, attention, mmdit, text, tokenizer, pipeline. Two folders
serve it: picturebook/ is a world of pictures that we draw ourselves, with the tiny model that was trained
on it; sd3/ loads the public weights of Stable Diffusion 3 and 3.5 into the same classes.
"""

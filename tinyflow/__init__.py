"""A small text-to-image rectified-flow model, which knows nothing of concepts.

The core, in the order in which to read it: flow, attention, mmdit, text, tokenizer, pipeline. Two folders
serve it: picturebook/ is a world of pictures that we draw ourselves, with the tiny model that was trained
on it; sd3/ loads the public weights of Stable Diffusion 3 and 3.5 into the same classes.
"""

import os

# Torch's threads sleep while they wait for each other. Otherwise they spin, and beside programs that keep all
# cores busy a training step takes 60 times as long. It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

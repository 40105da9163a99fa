"""A small text-to-image rectified-flow model, which knows nothing of concepts.

The core, in the order in which to read it: flow, attention, mmdit, text, phrase, tokenizer, vae, pipeline.
Two folders serve it: picturebook/ is a world of pictures that we draw ourselves, with the tiny model that was
trained on it; sd3/ loads the public weights of Stable Diffusion 3 and 3.5 into the same classes.
"""

import os

# Torch's threads spin while they wait for each other. Where other programs keep the cores busy, a training
# step can then take 60 times as long; so they spin for a few microseconds and then sleep. Sleeping at once
# would halve the speed on an idle machine. It must be set before torch is loaded (GNU's OpenMP, on Linux).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

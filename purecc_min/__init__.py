"""PureCC, readable: teach a model one new concept and change nothing else.

The core, in the order in which to read it: concept, embeddings, lora, branch, objective, train and
algorithm. Three folders serve it: measure/ says what was learned and what it cost, benchmark/ compares
methods, commands/ is what a user runs.
"""

import tinyflow  # noqa: F401  (before torch is loaded: see there)

__version__ = "0.3.0"

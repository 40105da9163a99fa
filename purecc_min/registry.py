"""The methods that users have, an entry each: what `learn`, the demo, the benchmark and the help read.

An entry says what is minimised (methods.py, pairs.py), where its adapters act (lora.py), whether Y^l takes
[V]'s place, what teaches its extractor, who answers a text without [V], and the settings that suit it on the
tiny model: the best of those that were tried on the benchmark's tuning concepts. `as_sampled` is how a
method's model is drawn, in pictures, tables, the demo and `sample` alike. Read next: commands/learn.py.
"""

from purecc_min.branch import only_with_token
from purecc_min.methods import Method, anchored, l_cc, paper
from purecc_min.pairs import half_kept, pairs
from tinyflow.pipeline import Velocity

LORA = Method("lora", "a plain LoRA: L_CC, with adapters everywhere and Y", l_cc,
              settings=dict(learning_rate=1e-3))
BOUND = Method("bound", "L_CC, with adapters that act on [V]'s phrase alone: texts without [V] cannot change",
               l_cc, where="phrase", embeddings=False, settings=dict(learning_rate=2e-3, rank=16))
METHODS = {method.name: method for method in (
    LORA,
    Method("switched-off", "a plain LoRA that is switched off for texts without [V]", l_cc, named_only=True,
           settings=dict(learning_rate=1e-3, rank=16)),
    Method("paper", "PureCC as the paper writes it: an extractor, then L_PCC", paper, extractor=LORA,
           settings=dict(learning_rate=1e-3, extractor_learning_rate=2e-3)),
    Method("anchor", "a LoRA whose base text must predict what it predicted before (DOP)", anchored,
           settings=dict(learning_rate=4e-3, eta=1.0)),
    Method("embeddings", "Y alone; no weight of the model changes", l_cc, adapters=False,
           settings=dict(embedding_learning_rate=2.0)),
    BOUND,
    Method("bound-paper", "the paper's objective, with such adapters in both stages", paper, where="phrase",
           embeddings=False, extractor=BOUND, settings=dict(learning_rate=4e-3, rank=16)),
    Method("bound-half", "bound, and of two things that the model imagines, the one without [V] stays",
           half_kept, where="phrase", embeddings=False, imagines=True,
           settings=dict(learning_rate=2e-3, rank=16)),
    Method("bound-pairs", "bound, and of two such things only [V] becomes what a LoRA knows of it", pairs,
           where="phrase", embeddings=False, extractor=LORA, imagines=True,
           settings=dict(learning_rate=1e-2, extractor_learning_rate=2e-3)),
)}


def as_sampled(method: Method, theta: Velocity, theta_0: Velocity) -> dict[str, Velocity]:
    """Who answers which text when a method's model is drawn: the theta and theta_null of Pipeline.sample.

    The base model answers guidance's empty text for every method: [V] is not in it.
    """
    return {"theta": only_with_token(theta, theta_0) if method.named_only else theta, "theta_null": theta_0}


def is_held(method: Method) -> bool:
    """Whether a text without [V] is the base model's, whatever was learned."""
    return method.named_only or method.where in ("phrase", "token")

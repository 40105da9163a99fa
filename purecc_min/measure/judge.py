"""What both models drew, as the reader network sees it, and what matters in it for one concept.

`Judge` knows the concept and asks the reader about single pictures. `Drawn` holds all pictures of both models
with their readings, each read once, and answers what several measures ask for. Read next: measures.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from purecc_min.measure.draw import Pictures
from purecc_min.measure.toy import Toy
from purecc_min.measure.velocities import VelocityError
from tinyflow.picturebook.check import same_individual
from tinyflow.picturebook.reader import HEADS, Reader, Reading, shows
from tinyflow.picturebook.world import TRAITS
from tinyflow.pipeline import to_pixels

NAMED_BY_BASE = ("object", "size", "place", "background")        # what every base text says
LEAST = np.log(.001)                             # lower bound of a log-probability


def sees(reading: Reading, traits: dict, n: int = 0) -> Tensor:
    """bool [B, number of traits]: which of these traits the reader sees in each picture, on its object n."""
    seen = [[name == value for name in reading.names(head, n)] for head, value in traits.items()]
    return torch.tensor(seen).T


def one_in_each_half(reading: Reading, kind: str) -> float:
    """The share of pictures in which the reader sees a thing of a kind on the left, and one on the right."""
    correct = np.array(reading.names("count")) == 2
    for n, place in enumerate(("left", "right")):
        correct &= sees(reading, {"object": kind, "place": place}, n).all(1).numpy()
    return float(correct.mean())


@dataclass
class Judge:
    """Answers questions about one concept from what the reader network saw."""
    reader: Reader
    toy: Toy
    references: np.ndarray                       # uint8 [n, H, W, 3]

    def traits(self, reading: Reading, without: str = "") -> Tensor:
        """bool [B, number of traits]: which of the concept's traits are seen. `without` leaves one out."""
        known = self.toy.known_traits.items()
        return sees(reading, {head: value for head, value in known if head != without})

    def feature(self, reading: Reading) -> Tensor:
        """[B, width] unit vectors that tell what the object is, or for a style how the picture is drawn."""
        return reading.look if self.toy.is_style else reading.identity[:, 0]

    def is_it(self, reading: Reading) -> Tensor:
        """bool [B]: is the object the individual of the references, as far as the reader can tell?"""
        references = self.reader(to_pixels(self.references))
        weight = references.spread[:, 0] ** -2                                          # [n, TRAITS]
        # the mean over references, weighted by 1 / variance
        traits, spread = (weight * references.traits[:, 0]).sum(0) / weight.sum(0), weight.sum(0) ** -.5
        worn = self.toy.wearing(self.toy.prompts()["concept"][0].scene)
        shown = torch.tensor([shows(worn, 0, trait) for trait in TRAITS]).expand(len(reading.traits), -1)
        pairs = [reading.traits[:, 0], traits], [reading.spread[:, 0], spread]
        return same_individual(*pairs, shown)

    def similarity(self, reading: Reading) -> Tensor:
        """[B] cosines between the feature of each picture and the mean feature of the references."""
        references = self.feature(self.reader(to_pixels(self.references)))
        return self.feature(reading) @ F.normalize(references.mean(0), dim=0)


class Drawn:
    """What both models drew, and what the reader sees in it. Every picture is read once."""

    def __init__(self, judge: Judge, original: Pictures, custom: Pictures, errors: VelocityError):
        self.judge, self.toy, self.prompts = judge, judge.toy, judge.toy.prompts() | judge.toy.forms()
        self.original, self.custom, self.errors = original, custom, errors
        self.seen = {group: judge.reader(x) for group, x in custom.items()}             # group -> Reading
        self.seen_original = {group: judge.reader(x) for group, x in original.items()}
        self.similarity = judge.similarity(self.seen["concept"])                        # [24]
        masks = [seen["concept"].mask[:, 0] > 0 for seen in (self.seen, self.seen_original)]
        self.masks = torch.stack(masks)                                                 # bool [2, 24, H, W]

    def right(self, seen: dict[str, Reading], group: str, head: str) -> np.ndarray:
        """bool [B]: where the reader sees what the text says."""
        said = [prompt.scene.trait(head) for prompt in self.prompts[group]]
        return np.array(seen[group].names(head)) == np.array(said)

    def gained(self, head: str) -> np.ndarray:
        """[24] of 1, 0 or -1, for group "other": correct here, minus correct in the original's picture."""
        right_original = self.right(self.seen_original, "other", head)
        return self.right(self.seen, "other", head).astype(float) - right_original

    def of_neighbours(self, values: Tensor, group: str = "neighbour") -> Tensor:
        """Values of both objects [12, 2, ...] -> values of the object without [V] [12, ...]."""
        return torch.stack([row[1 - prompt.n] for row, prompt in zip(values, self.prompts[group])])

    def traits_beside(self, seen: dict[str, Reading], plain: bool, group: str = "neighbour") -> Tensor:
        """bool [12, number of traits]: the concept's traits seen on the object without [V], or on [V]."""
        reading, traits = seen[group], self.toy.traits_beside
        both = torch.stack([sees(reading, traits, n) for n in (0, 1)], 1)               # [12, 2, traits]
        return self.of_neighbours(both if plain else both.flip(1), group)

    def says(self, seen: dict[str, Reading]) -> Tensor:
        """[24]: the reader's mean log-probability, in the concept group, of each part that the texts say."""
        found = []
        for head in NAMED_BY_BASE:
            answers = torch.tensor([HEADS[head].index(p.scene.trait(head)) for p in self.prompts["concept"]])
            scores = seen["concept"].scores(head).log_softmax(-1)
            found.append(scores.gather(1, answers[:, None])[:, 0].clamp(min=LEAST))
        return torch.stack(found).mean(0)

    def contradicted(self) -> Tensor:
        """bool [24, number of confounders]: where a prompt of group "concept" contradicts the confounder."""
        shared = self.toy.confounder.items()
        return torch.tensor([[p.scene.trait(head) != value for head, value in shared]
                             for p in self.prompts["concept"]])

    def more_shared(self, group: str) -> Tensor:
        """[B, number of confounders] of 1, 0 or -1: is it seen here, minus in the original's picture."""
        shared_original = sees(self.seen_original[group], self.toy.confounder)
        return sees(self.seen[group], self.toy.confounder).float() - shared_original.float()

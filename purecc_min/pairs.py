"""Eq. 13 with a mask: in scenes of two things, only [V]'s half may change.

Imagined scenes of two things of the class are sampled from the base model: "a robot on the left and a small
robot on the right". For such a scene, noised to x_t, with [V] at one of the two things, theta must predict

    v_original + M R,   v_original = v_theta0(x_t | both plain),  R = v_theta1(x_t | one is [V]) - v_original

where M is 1 in [V]'s half of the picture and 0 in the other. This is Eq. 13 with the mask M in place of
lambda*. (Eq. 8 subtracts the empty text's velocity; this R subtracts v_original.) `half_kept` uses only the
half without [V], and no extractor. Similar methods: TokenVerse's concept isolation (2501.12224, Sec. 5) and
XVerse's region preservation (2506.21416, Eq. 7). Read next: ablations.py.
"""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from purecc_min.branch import Thetas
from purecc_min.concept import TOKEN, Batch, ConceptSet, EncodedConcept, Texts, styles_among
from purecc_min.concept_file import sample_of
from purecc_min.methods import Loss, l_cc
from purecc_min.objective import lambda_star
from tinyflow.errors import InputError
from tinyflow.flow import expand, squared_error
from tinyflow.pipeline import Pipeline, Text
from tinyflow.weights import load_tensors, save_tensors

IMAGINED = 32                                    # number of scenes
AT_ONCE = 8                                      # scenes per batch while they are sampled
FIRST_SEED = 10_000                              # of their noise; measured pictures use other seeds


# ----------------------------------------------------------------------------------------- the two losses
def half_kept(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """L_CC + eta times the squared change of the velocity in the half without [V]."""
    loss_cc, _ = l_cc(thetas, batch, eta)
    scene = batch.imagined
    with torch.no_grad():
        v_original = thetas.theta_0(scene.x_t, scene.t, scene.texts.base)
    v = thetas.theta(scene.x_t, scene.t, scene.texts.complete)
    loss_half = squared_error(v, v_original, 1 - scene.mask)
    return loss_cc + eta * loss_half, {"loss_cc": loss_cc, "loss_half": loss_half}


def pairs(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """L_CC + eta times the squared error between v and v_original + M R."""
    return pairs_loss(thetas, batch, eta, with_lambda=False)


def pairs_with_lambda(thetas: Thetas, batch: Batch, eta: float) -> Loss:
    """Like pairs, with lambda* M R; only [V]'s half enters the inner products of Eq. 12."""
    return pairs_loss(thetas, batch, eta, with_lambda=True)


def pairs_loss(thetas: Thetas, batch: Batch, eta: float, with_lambda: bool) -> Loss:
    loss_cc, _ = l_cc(thetas, batch, eta)
    scene = batch.imagined
    x_t, t, M = scene.x_t, scene.t, scene.mask
    with torch.no_grad():
        v_original = thetas.theta_0(x_t, t, scene.texts.base)
        R = thetas.theta_1(x_t, t, scene.texts.complete) - v_original
    v = thetas.theta(x_t, t, scene.texts.complete)
    lam = lambda_star(M * (v - v_original), M * R).detach() if with_lambda else torch.ones_like(t)
    loss_pairs = squared_error(v, v_original + expand(lam, R) * M * R)
    return loss_cc + eta * loss_pairs, {"loss_cc": loss_cc, "loss_pairs": loss_pairs, "lambda": lam.mean()}


# --------------------------------------------------------------------------------------------- the scenes
ON_PUBLIC_WEIGHTS = ["a {0} on the left and a {1} on the right"]


def check_has_halves(concept: ConceptSet) -> None:
    """Raises: InputError for a style."""
    if styles_among({TOKEN: concept.class_word}):
        raise InputError(f"--class-word {concept.class_word}: a style fills the whole picture, so no half of "
                         "it can be kept; choose --method bound")


def texts_of(templates: list[str], class_word: str, count: int) -> list[tuple[str, str, str]]:
    """Returns for each of `count` scenes: the text without [V], with [V] first, with [V] second.

    templates: texts with {0} for the left and {1} for the right thing; used in turn.
    """
    named, rows = f"{TOKEN} {class_word}", []
    for n in range(count):
        template = templates[n % len(templates)]
        rows.append(tuple(template.format(*nouns) for nouns in
                          ((class_word, class_word), (named, class_word), (class_word, named))))
    return rows


def imagine(pipe: Pipeline, concept: ConceptSet, templates: list[str], seed: int, count: int = IMAGINED,
            steps: int = 28) -> EncodedConcept:
    """Samples scenes of two things of the class from the base model; the masks of the set are M.

    The set holds each scene twice: with [V] on the left, and with [V] on the right.

    Raises: InputError for a style.
    """
    check_has_halves(concept)
    plain, left, right = zip(*texts_of(templates, concept.class_word, count))
    text, rows = encode_once(pipe, plain), []
    for indices in tqdm(torch.arange(count).split(AT_ONCE), "imagining", leave=False, delay=5):
        seeds = (FIRST_SEED + 1000 * seed + indices).tolist()
        rows.append(pipe.sample(text[indices], seeds, steps))
    return as_custom_set(pipe, concept, torch.cat(rows), plain, left, right)


def as_custom_set(pipe: Pipeline, concept: ConceptSet, x_0: Tensor, plain, left, right) -> EncodedConcept:
    """Latents x_0 [n, C, H, W] and their texts -> 2 n rows: [V] on the left, then [V] on the right."""
    base = encode_once(pipe, [*plain, *plain])
    complete = encode_once(pipe, [*left, *right], {TOKEN: concept.class_word})
    texts = Texts(complete, base, base, base)    # losses on scenes use only the first two
    M = torch.zeros(2 * len(x_0), 1, 1, *x_0.shape[-2:]).to(x_0)
    middle = x_0.shape[-1] // 2
    M[:len(x_0), ..., :middle] = 1
    M[len(x_0):, ..., middle:] = 1
    return EncodedConcept([], torch.cat([x_0, x_0])[:, None], texts, base, M)


def encode_once(pipe: Pipeline, texts: list[str], stand_ins: dict[str, str] | None = None) -> Text:
    """Encodes texts; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    return pipe.encode_text(distinct, stand_ins)[[distinct.index(text) for text in texts]]


def imagine_resumably(pipe: Pipeline, concept: ConceptSet, templates: list[str], seed: int, file: Path,
                      steps: int) -> EncodedConcept:
    """Loads the scenes from `file` if it exists; otherwise calls imagine and saves them there."""
    facts = {"class_word": concept.class_word, "templates": templates, "seed": seed, "steps": steps,
             "base_sample": sample_of(pipe.mmdit)}
    if file.exists():
        tensors, found = load_tensors(file, "imagined scenes")
        if found != facts:
            raise InputError(f"{file}: these scenes are of another run; choose another --out")
        x_0 = tensors["x_0"].to(pipe.device)
        return as_custom_set(pipe, concept, x_0, *zip(*texts_of(templates, concept.class_word, len(x_0))))
    imagined = imagine(pipe, concept, templates, seed, steps=steps)
    x_0 = imagined.x_0[:len(imagined.x_0) // 2]
    save_tensors(file, "imagined scenes", {"x_0": x_0}, facts)
    return imagined

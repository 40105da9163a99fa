"""Adapters that act on [V]'s phrase, or at [V] alone; several concepts in a text, who answers which text."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from purecc_min import lora
from purecc_min.branch import Branch, velocity_with
from purecc_min.concept import Texts, noised
from purecc_min.concept_file import load_branch
from purecc_min.lora import LoRA, key_of, target_layers
from purecc_min.methods import cosine
from purecc_min.objective import inner, pcc_loss
from purecc_min.registry import only_with_token
from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.weights import save_tensors

PROMPT, BASE = "a big [V] robot in the snow", "a big robot in the snow"


BOUND = pytest.mark.parametrize("where", ["phrase", "token"])


def make_bound(pipe, seed=1, where="phrase") -> Branch:
    """A branch whose adapters are far from where they begin, and its embeddings if it has some."""
    config, generator = pipe.mmdit.config, torch.Generator().manual_seed(seed)
    Y = None if where == "phrase" else torch.randn(config.depth, config.width, generator=generator)
    branch = Branch.fresh(pipe, Y, rank=2, generator=generator, where=where)
    with torch.no_grad():
        for B in branch.lora.B.values():
            B.normal_(std=0.3, generator=generator)
    return branch


def draw(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, 16, 16, generator=generator), torch.rand(batch, generator=generator)


def encode(pipe, *texts):
    return pipe.encode_text(list(texts), {"[V]": "robot"})


# ----------------------------------------------------------------------------------------- texts without [V]
@BOUND
def test_a_text_without_the_token_is_computed_by_the_base_model_bitwise(pipe, where):
    theta, (x_t, t), text = make_bound(pipe, where=where), draw(), encode(pipe, BASE, "")
    assert torch.equal(theta(x_t, t, text), pipe.velocity(x_t, t, text))
    named = encode(pipe, PROMPT, PROMPT)
    assert not torch.allclose(theta(x_t, t, named), pipe.velocity(x_t, t, named), atol=1e-3)


@BOUND
def test_rows_of_a_mixed_batch_do_not_touch_each_other(pipe, where):
    theta, (x_t, t), text = make_bound(pipe, where=where), draw(3), encode(pipe, PROMPT, BASE, "")
    mixed = theta(x_t, t, text)
    torch.testing.assert_close(mixed[1:], pipe.velocity(x_t[1:], t[1:], text[1:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:1], theta(x_t[:1], t[:1], text[:1]), rtol=1e-5, atol=1e-5)


def test_pictures_without_the_token_are_the_base_models(pipe):
    """Guidance's empty text has no [V] either, so who answers it makes no difference for a bound concept."""
    theta, text, named = make_bound(pipe), encode(pipe, BASE, "a robot"), encode(pipe, PROMPT, PROMPT)
    base = pipe.sample(text, [3, 4], steps=3)
    assert torch.equal(pipe.sample(text, [3, 4], steps=3, theta=theta), base)
    drawn = pipe.sample(named, [3, 4], steps=3, theta=theta)
    with_base = pipe.sample(named, [3, 4], steps=3, theta=theta, theta_null=pipe.velocity)
    torch.testing.assert_close(drawn, with_base, rtol=1e-4, atol=1e-4)
    assert (drawn - base).abs().max() > 0.01


def test_switched_off_is_theta_with_the_token_and_the_base_model_without(pipe):
    theta, (x_t, t) = make_bound(pipe, where="everywhere"), draw()
    off = only_with_token(theta, pipe.velocity)
    named, base, mixed = (encode(pipe, *texts) for texts in ((PROMPT, PROMPT), (BASE, ""), (PROMPT, BASE)))
    assert torch.equal(off(x_t, t, named), theta(x_t, t, named))
    assert torch.equal(off(x_t, t, base), pipe.velocity(x_t, t, base))
    both = off(x_t, t, mixed)
    assert torch.equal(both[:1], theta(x_t[:1], t[:1], mixed[:1]))
    assert torch.equal(both[1:], pipe.velocity(x_t[1:], t[1:], mixed[1:]))


def test_switched_off_computes_each_row_once(pipe):
    """In a mixed batch both models once computed all rows: four rows a picture in place of two."""
    rows = []
    pipe.mmdit.register_forward_hook(lambda mmdit, inputs, out: rows.append(len(out)))
    theta, (x_t, t) = make_bound(pipe, where="everywhere"), draw(4)
    only_with_token(theta, pipe.velocity)(x_t, t, encode(pipe, PROMPT, BASE, PROMPT, ""))
    assert rows == [2, 2]


# ------------------------------------------------------------------------------------- why two layers suffice
def test_only_keys_and_values_of_the_token_reach_anybody(pipe, monkeypatch):
    """With adapters on every projection of the text stream, masked to the token, those of to_q and to_out
    get no
    gradient: Y^l replaces what they change.
    """
    every = [f"attention.text.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out")]
    monkeypatch.setitem(lora.TARGETS, "token", every)
    theta, (x_t, t) = make_bound(pipe, where="token"), draw()
    theta(x_t, t, encode(pipe, PROMPT, PROMPT)).square().sum().backward()
    for key, B in theta.lora.B.items():
        wanted = key.endswith(("text/to_k", "text/to_v"))
        assert (B.grad is not None and B.grad.abs().max() > 0) == wanted, key
    reaching = [key for key in theta.lora.B if key.endswith(("text/to_k", "text/to_v"))]
    monkeypatch.undo()
    assert reaching == list(make_bound(pipe, where="token").lora.B)


def test_a_bound_adapter_is_a_plain_reference_implementation(pipe):
    """Joint attention of one block written out, with B A x added to the token's own key and value."""
    theta, block, l = make_bound(pipe), pipe.mmdit.blocks[1], 1
    x, c, slots = torch.randn(2, 64, 32), torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.long)
    slots[0, 3], slots[1, 5] = 1, 1
    layers, attention = block.attention, block.attention
    heads = {}
    for stream, tokens in (("image", x), ("text", c)):
        part = getattr(layers, stream)
        for name in ("to_q", "to_k", "to_v"):
            out, key = getattr(part, name)(tokens), key_of(l, f"attention.{stream}.{name}")
            if key in theta.lora.A:
                for row, place in ((0, 3), (1, 5)):
                    out[row, place] += theta.lora.B[key] @ theta.lora.A[key] @ tokens[row, place]
            heads[stream, name] = rearrange(out, "b n (h d) -> b h n d", h=part.heads)
        heads[stream, "to_q"] = part.norm_q(heads[stream, "to_q"])
        heads[stream, "to_k"] = part.norm_k(heads[stream, "to_k"])
    q, k, v = (torch.cat([heads["image", name], heads["text", name]], dim=2)
               for name in ("to_q", "to_k", "to_v"))
    both = rearrange(F.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v, "b h n d -> b n (h d)")
    with theta.lora.attached(l, block, slots == 1):
        x_out, c_out = attention(x, c)
    torch.testing.assert_close(x_out, attention.image.to_out(both[:, :64]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(c_out, attention.text.to_out(both[:, 64:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["everywhere", "token", "phrase"])
def test_checkpointed_gradients_are_the_plain_ones_when_another_text_passes_between(pipe, where):
    """A mask that is kept beside the adapters is the wrong one when the backward pass computes a block again
    after another text has passed: bound adapters then silently get gradients of zero.
    """
    theta, (x_t, t) = make_bound(pipe, where=where), draw()
    named, base = encode(pipe, PROMPT, PROMPT), encode(pipe, BASE, BASE)

    def gradients(checkpointing):
        theta.zero_grad()
        pipe.mmdit.checkpointing = checkpointing
        loss = theta(x_t, t, named).square().mean()
        theta(x_t, t, base)                      # passes between forward and backward
        loss.backward()
        pipe.mmdit.checkpointing = False
        return [parameter.grad.clone() for parameter in theta.parameters()]

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))
    if where != "everywhere":                    # of those everywhere, the last block's text queries get none
        assert all(gradient.abs().max() > 0 for gradient in plain)


# -------------------------------------------------------------------------------------- the paper's objective
@BOUND
def test_v_original_is_the_base_models_and_the_loss_is_the_rejection(pipe, where):
    theta_1, theta_2, (x_0, t) = make_bound(pipe, 1, where), make_bound(pipe, 2, where), draw()
    texts = Texts(*(encode(pipe, text, text) for text in (PROMPT, BASE, "[V] robot", "")))
    batch = noised(x_0, torch.randn_like(x_0), t, texts)
    _, terms = pcc_loss(theta_1, theta_2, batch, eta=1.0)
    assert torch.equal(terms.v_original, pipe.velocity(batch.x_t, t, texts.base))
    sin_squared = 1 - cosine(terms.R_complete, terms.R_target) ** 2
    rejection = (inner(terms.R_complete, terms.R_complete) * sin_squared).mean() / x_0[0].numel()
    torch.testing.assert_close(terms.loss_purecc, rejection, rtol=1e-3, atol=1e-6)
    assert inner(terms.v_purecc - terms.v_complete, terms.R_target).abs().max() < 1e-2


# ------------------------------------------------------------------------------------------- several concepts
TWO = "a [V1] robot on the left and a big [V2] cat at night"
READINGS = {"[V1]": "robot", "[V2]": "cat"}


@BOUND
def test_two_bound_concepts_ignore_each_others_adapters(pipe, where):
    """At its own places the keys and values are a concept's; every other token's are the base model's."""
    one, two = make_bound(pipe, 1, where), make_bound(pipe, 2, where)
    text = pipe.encode_text([TWO], READINGS)
    block, c = pipe.mmdit.blocks[1], torch.randn(1, 44, 32)
    layers = target_layers(block, where).values()
    plain = [layer(c) for layer in layers]
    acts = {n: branch.lora.places(text, n) for n, branch in ((1, one), (2, two))}
    with one.lora.attached(1, block, acts[1]), two.lora.attached(1, block, acts[2]):
        together = [layer(c) for layer in layers]
    for n, branch in ((1, one), (2, two)):
        with branch.lora.attached(1, block, acts[n]):
            alone = [layer(c) for layer in layers]
        places = acts[n][0].nonzero().flatten()
        assert len(places) == (1 if where == "token" else {1: 5, 2: 4}[n])
        for a, b, nobody in zip(together, alone, plain):
            assert torch.equal(a[:, places], b[:, places])
            assert not torch.isclose(a[:, places], nobody[:, places]).all(-1).any()
    others = [place for place in range(44) if not acts[1][0, place] and not acts[2][0, place]]
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(together, plain))


@BOUND
def test_a_text_with_one_of_two_concepts_is_that_concepts_own(pipe, where):
    one, two, (x_t, t) = make_bound(pipe, 1, where), make_bound(pipe, 2, where), draw(1)
    readings = {"[V1]": "robot", "[V2]": "cat"}
    both = partial(velocity_with, [one, two])
    first = pipe.encode_text(["a [V1] robot at night"], readings)
    second = pipe.encode_text(["a [V2] cat at night"], readings)
    assert torch.equal(both(x_t, t, first), one(x_t, t, first))
    alone = two(x_t, t, pipe.encode_text(["a [V] cat at night"], {"[V]": "cat"}))
    assert torch.equal(both(x_t, t, second), alone)


def test_adapters_everywhere_add_up(pipe):
    one, two = make_bound(pipe, 1, "everywhere"), make_bound(pipe, 2, "everywhere")
    block, x = pipe.mmdit.blocks[0], torch.randn(2, 5, 32)
    name, layer = "attention.image.to_q", pipe.mmdit.blocks[0].attention.image.to_q
    with one.lora.attached(0, block, None), two.lora.attached(0, block, None):
        together = layer(x)
    change = sum(branch.lora.B[key_of(0, name)] @ branch.lora.A[key_of(0, name)] for branch in (one, two))
    torch.testing.assert_close(together, layer(x) + x @ change.T, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ files
def test_where_a_set_acts_is_saved_with_the_concept(pipe, tmp_path):
    for where in ("everywhere", "token", "phrase"):
        branch, file = make_bound(pipe, where=where), tmp_path / f"{where}.safetensors"
        branch.save(file, {"class_word": "robot", "rank": 2})
        loaded, facts = load_branch(pipe, file)
        assert loaded.lora.where == facts["where"] == where
        (x_t, t), text = draw(), encode(pipe, PROMPT, BASE)
        assert torch.equal(loaded(x_t, t, text), branch(x_t, t, text))
        assert (loaded.embeddings is None) == (where == "phrase")


def test_a_file_whose_adapters_act_somewhere_unknown_is_refused(pipe, tmp_path):
    """Facts of a file once were believed: where="image" ended in a KeyError."""
    branch = make_bound(pipe)
    for where in ("image", None, ["token"]):
        tensors = branch.state_dict()
        facts = dict(class_word="robot", rank=2, where=where)
        save_tensors(tmp_path / "c.safetensors", "concept", tensors, facts)
        with pytest.raises(InputError, match="where its adapters act, .*is unknown.*learn it again"):
            load_branch(pipe, tmp_path / "c.safetensors")


def test_a_bound_set_adapts_two_layers_a_block_and_starts_as_nothing(pipe):
    everywhere, token = LoRA(pipe.mmdit), LoRA(pipe.mmdit, where="phrase")
    assert len(token.A) == 2 * 3 and len(everywhere.A) == 8 * 3 - 1
    with_dual = make_pipe(dual_attention_layers=(0,))
    assert LoRA(with_dual.mmdit, where="phrase").A.keys() == token.A.keys()
    assert all(B.abs().max() == 0 for B in token.B.values())

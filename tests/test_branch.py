"""A branch: where [V] enters, where its adapters act, several concepts in a text, a concept's file."""

from functools import partial

import pytest
import torch

from purecc_min import lora
from purecc_min.branch import Branch, velocity_with
from purecc_min.concept import Texts, noised
from purecc_min.concept import encode as encode_set
from purecc_min.concept_file import load_branch
from purecc_min.embeddings import class_word_states
from purecc_min.learning import concept_facts
from purecc_min.lora import LoRA, key_of, target_layers
from purecc_min.objective import pcc_loss
from purecc_min.registry import only_with_token
from purecc_min.train import TrainConfig
from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.weights import save_tensors, tensor_hash

PROMPT, BASE = "a big [V] robot in the snow", "a big robot in the snow"
TWO, READINGS = "a [V1] robot on the left and a big [V2] cat at night", {"[V1]": "robot", "[V2]": "cat"}
BOUND = pytest.mark.parametrize("where", ["phrase", "token"])
ANYWHERE = pytest.mark.parametrize("where", ["everywhere", "phrase", "token"])
FACTS = {"class_word": "robot", "rank": 2, "base": "tiny", "size": 64, "method": "lora"}


def make_branch(pipe, seed=1, where="everywhere") -> Branch:
    """A branch whose adapters are far from where they begin, and its embeddings if it has some."""
    config, generator = pipe.mmdit.config, torch.Generator().manual_seed(seed)
    Y = None if where == "phrase" else torch.randn(config.depth, config.width, generator=generator)
    branch = Branch.fresh(pipe, Y, rank=2, generator=generator, where=where)
    with torch.no_grad():
        for B in branch.lora.B.values():
            B.normal_(std=0.3, generator=generator)
    return branch


def draw(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 16, 16, 16, generator=generator), torch.rand(batch, generator=generator)


def encode(pipe, *texts):
    return pipe.encode_text(list(texts), {"[V]": "robot"})


# --------------------------------------------------------------------------------------------------- adapters
def test_a_fresh_adapter_set_changes_nothing(pipe):
    """Without embeddings, which take the word's place."""
    (x_t, t), text = draw(), encode(pipe, PROMPT, BASE)
    for where in lora.TARGETS:
        fresh = Branch.fresh(pipe, None, rank=2, where=where)
        assert torch.equal(fresh(x_t, t, text), pipe.velocity(x_t, t, text))


def test_adapters_sit_on_attention_projections_alone(pipe):
    """All eight of a block, but for the last's text output; of a bound set, the text's keys and values."""
    with_dual = make_pipe(dual_attention_layers=(0,))
    for where, count in (("everywhere", 8 * 3 - 1), ("phrase", 2 * 3), ("token", 2 * 3)):
        adapted = LoRA(pipe.mmdit, where=where).A.keys()
        assert len(adapted) == count and all("/attention/" in key for key in adapted)
        assert LoRA(with_dual.mmdit, where=where).A.keys() == adapted


@ANYWHERE
def test_an_adapter_adds_BA_to_its_layer_at_its_places(pipe, where):
    branch, block = make_branch(pipe, where=where), pipe.mmdit.blocks[1]
    places = None if where == "everywhere" else torch.tensor([[True, False, True], [False, False, True]])
    acts = torch.ones(2, 3, 1) if places is None else places[..., None]
    for name, layer in target_layers(block, where).items():
        key, x = key_of(1, name), torch.randn(2, 3, layer.in_features)
        expected = layer(x) + acts * (x @ (branch.lora.B[key] @ branch.lora.A[key]).T)
        with branch.lora.attached(1, block, places):
            torch.testing.assert_close(layer(x), expected)


def test_two_sets_share_one_base_model_and_do_not_mix(pipe):
    (x_t, t), text = draw(), encode(pipe, PROMPT, PROMPT)
    one, two, before = make_branch(pipe), make_branch(pipe, seed=2), pipe.velocity(x_t, t, text)
    of_one, of_two = one(x_t, t, text), two(x_t, t, text)
    assert not torch.allclose(of_one, of_two) and not torch.allclose(of_one, before)
    assert torch.equal(one(x_t, t, text), of_one) and torch.equal(pipe.velocity(x_t, t, text), before)
    assert {name.split(".")[0] for name in one.state_dict()} == {"lora", "embeddings"}  # not the base model


def test_hooks_are_gone_after_an_error_too(pipe):
    block = pipe.mmdit.blocks[0]
    with pytest.raises(ZeroDivisionError), LoRA(pipe.mmdit).attached(0, block, torch.zeros(1, 16)):
        1 / 0
    assert not any(layer._forward_hooks for layer in target_layers(block, "everywhere").values())


@ANYWHERE
def test_checkpointed_gradients_are_the_plain_ones(pipe, where):
    """The backward pass computes a block again, after another branch and another text have passed. Adapters
    attached to the whole model, or a mask kept beside them, were those of the branch or text that came last.
    """
    one, two, (x_t, t) = make_branch(pipe, 1, where), make_branch(pipe, 2, where), draw()
    named, base, mixed = (encode(pipe, *texts) for texts in ((PROMPT, PROMPT), (BASE, ""), (BASE, PROMPT)))

    def gradients(checkpointing):
        for branch in (one, two):
            branch.zero_grad()
        pipe.mmdit.checkpointing = checkpointing
        loss = (one(x_t, t, named) + 2 * two(x_t, t, mixed)).square().mean()
        one(x_t, t, base)
        loss.backward()
        return [parameter.grad.clone() for branch in (one, two) for parameter in branch.parameters()]

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))
    if where != "everywhere":                    # of those everywhere, the last block's text queries get none
        assert all(gradient.abs().max() > 0 for gradient in plain)


def test_only_keys_and_values_of_the_token_reach_anybody(pipe, monkeypatch):
    """Adapters on every text projection, masked to the token: those of to_q and to_out get no gradient, since
    Y^l replaces what they change.
    """
    every = [f"attention.text.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out")]
    monkeypatch.setitem(lora.TARGETS, "token", every)
    theta, (x_t, t) = make_branch(pipe, where="token"), draw()
    theta(x_t, t, encode(pipe, PROMPT, PROMPT)).square().sum().backward()
    reaching = [key for key, B in theta.lora.B.items() if B.grad is not None and B.grad.abs().max() > 0]
    monkeypatch.undo()
    assert reaching == list(make_branch(pipe, where="token").lora.B)


# ------------------------------------------------------------------------------------------------- embeddings
def test_the_token_is_replaced_at_the_input_of_every_block(pipe):
    """What each block receives: Y^l in the slot, and in the first block the model's own states elsewhere."""
    (x_t, t), text = draw(), encode(pipe, PROMPT, PROMPT)
    branch, received = make_branch(pipe), []
    for block in pipe.mmdit.blocks:
        block.register_forward_pre_hook(lambda block, inputs: received.append(inputs[1]))
    pipe.velocity(x_t, t, text)
    branch(x_t, t, text).square().sum().backward()
    plain, replaced = received[:3], received[3:]
    slot, Y = text.slots[0].nonzero().item(), branch.embeddings.Y
    for l in range(3):
        assert torch.equal(replaced[l][:, slot], Y[l].expand(2, -1)), f"block {l}"
        assert not torch.equal(plain[l][:, slot], Y[l].expand(2, -1))
    others = [n for n in range(16) if n != slot]
    assert torch.equal(replaced[0][:, others], plain[0][:, others])
    assert (Y.grad.abs().amax(1) > 0).all()      # every block's embedding is trained


def test_embeddings_start_from_the_class_words_states(pipe, robot):
    """At the first block that state is the embedded token itself, whatever t and noise are."""
    data = encode_set(pipe, robot)
    Y = class_word_states(pipe, data, torch.Generator().manual_seed(0))
    expected = pipe.mmdit.context_embedder(data.class_text.context)[data.class_text.slots > 0].mean(0)
    torch.testing.assert_close(Y[0], expected)
    assert Y.shape == (3, 32) and not torch.allclose(Y[1], Y[0])


# ----------------------------------------------------------------------------------------- texts without [V]
@BOUND
def test_a_text_without_the_token_is_computed_by_the_base_model_bitwise(pipe, where):
    """So v_original of Eq. 9 is the base model's."""
    theta, (x_t, t), text = make_branch(pipe, where=where), draw(), encode(pipe, BASE, "")
    assert torch.equal(theta(x_t, t, text), pipe.velocity(x_t, t, text))
    named = encode(pipe, PROMPT, PROMPT)
    assert not torch.allclose(theta(x_t, t, named), pipe.velocity(x_t, t, named), atol=1e-3)
    batch = noised(x_t, torch.randn_like(x_t), t, Texts(named, text, named, text))
    _, terms = pcc_loss(theta, theta, batch, eta=1.0)
    assert torch.equal(terms.v_original, pipe.velocity(batch.x_t, t, text))


@BOUND
def test_rows_of_a_mixed_batch_do_not_touch_each_other(pipe, where):
    theta, (x_t, t), text = make_branch(pipe, where=where), draw(3), encode(pipe, PROMPT, BASE, "")
    mixed = theta(x_t, t, text)
    torch.testing.assert_close(mixed[1:], pipe.velocity(x_t[1:], t[1:], text[1:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:1], theta(x_t[:1], t[:1], text[:1]), rtol=1e-5, atol=1e-5)


def test_a_seeds_picture_does_not_depend_on_the_batch(pipe):
    branch, text = make_branch(pipe), encode(pipe, "a [V] robot", PROMPT, "a [V] robot at night")
    together = pipe.sample(text, [4, 5, 6], steps=4, theta=branch)
    alone = pipe.sample(text[1:2], [5], steps=4, theta=branch)
    torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=1e-4)


def test_switched_off_is_theta_with_the_token_and_the_base_model_without(pipe):
    """In a mixed batch both models once computed all rows: four rows a picture in place of two."""
    theta, (x_t, t), rows = make_branch(pipe), draw(4), []
    text, is_named = encode(pipe, PROMPT, BASE, PROMPT, ""), torch.tensor([True, False, True, False])
    counting = pipe.mmdit.register_forward_hook(lambda mmdit, inputs, out: rows.append(len(out)))
    off = only_with_token(theta, pipe.velocity)(x_t, t, text)
    counting.remove()
    assert rows == [2, 2]
    for model, some in ((theta, is_named), (pipe.velocity, ~is_named)):
        assert torch.equal(off[some], model(x_t[some], t[some], text[some]))


# ------------------------------------------------------------------------------------------- several concepts
@BOUND
def test_two_bound_concepts_act_at_their_own_places(pipe, where):
    text, lora = pipe.encode_text([TWO], READINGS), make_branch(pipe, where=where).lora
    first, second = (lora.places(text, n)[0].nonzero().flatten().tolist() for n in (1, 2))
    assert (first, second) == (([2], [10]) if where == "token" else ([2, 3, 4, 5, 6], [10, 11, 12, 13]))


@BOUND
def test_a_text_with_one_of_two_concepts_is_that_concepts_own(pipe, where):
    one, two, (x_t, t) = make_branch(pipe, 1, where), make_branch(pipe, 2, where), draw(1)
    both = partial(velocity_with, [one, two])
    first, second = (pipe.encode_text([text], READINGS) for text in ("a [V1] robot", "a [V2] cat at night"))
    assert torch.equal(both(x_t, t, first), one(x_t, t, first))
    alone = two(x_t, t, pipe.encode_text(["a [V] cat at night"], {"[V]": "cat"}))
    assert torch.equal(both(x_t, t, second), alone)


def test_two_sets_of_adapters_add_up(pipe):
    one, two, block = make_branch(pipe, 1), make_branch(pipe, 2), pipe.mmdit.blocks[0]
    key, layer, x = key_of(0, "attention.image.to_q"), block.attention.image.to_q, torch.randn(2, 5, 32)
    with one.lora.attached(0, block, None), two.lora.attached(0, block, None):
        together = layer(x)
    change = sum(branch.lora.B[key] @ branch.lora.A[key] for branch in (one, two))
    torch.testing.assert_close(together, layer(x) + x @ change.T, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ files
@ANYWHERE
def test_a_concept_file_round_trips_bitwise(pipe, tmp_path, where):
    branch, files = make_branch(pipe, where=where), [tmp_path / f"{n}.safetensors" for n in range(2)]
    for file in files:
        branch.save(file, FACTS)
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded, facts = load_branch(pipe, files[0])
    assert facts == {**FACTS, "where": where} and loaded.lora.where == where
    assert tensor_hash(loaded.state_dict()) == tensor_hash(branch.state_dict())


def test_a_concept_is_refused_by_weights_that_fit_by_their_shapes_alone(pipe, tmp_path):
    """A concept of one base model once drew nonsense on another, with exit code 0."""
    file, other = tmp_path / "c.safetensors", make_pipe()
    make_branch(pipe).save(file, concept_facts(pipe, "robot", TrainConfig(rank=2), "lora", "tiny"))
    load_branch(make_pipe().to(torch.bfloat16), file)            # the same, rounded
    for parameter in other.mmdit.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(InputError, match="learned on other weights than these"):
        load_branch(other, file)


@pytest.mark.parametrize("where", ["image", None, ["token"]])
def test_a_file_whose_adapters_act_somewhere_unknown_is_refused(pipe, tmp_path, where):
    """Facts of a file once were believed: where="image" ended in a KeyError."""
    file = tmp_path / "c.safetensors"
    save_tensors(file, "concept", make_branch(pipe).state_dict(), FACTS | {"where": where})
    with pytest.raises(InputError, match="where its adapters act, .*is unknown.*learn it again"):
        load_branch(pipe, file)

import pytest
import torch

from purecc_min.branch import TOKEN, Branch
from purecc_min.embeddings import ConceptEmbeddings, class_word_states
from purecc_min.lora import LoRA, target_layers
from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.weights import tensor_hash

STAND_IN = {TOKEN: "robot"}


def make_branch(pipe, trained=True) -> Branch:
    config = pipe.mmdit.config
    branch = Branch.fresh(pipe, torch.randn(config.depth, config.width), rank=2, generator=torch.Generator().manual_seed(1))
    if trained:
        with torch.no_grad():
            for B in branch.lora.B.values():
                B.normal_(std=0.1)
    return branch


def draw(pipe, batch=2):
    text = pipe.encode_text(["a big [V] robot in the snow"] * batch, STAND_IN)
    return torch.randn(batch, 3, 32, 32), torch.rand(batch), text


def test_a_fresh_adapter_set_changes_nothing(pipe):
    x, t, text = draw(pipe)
    before, lora = pipe.velocity(x, t, text), LoRA(pipe.mmdit)
    with lora.attached(pipe.mmdit):
        assert torch.equal(pipe.velocity(x, t, text), before)


def test_adapters_sit_on_the_eight_attention_projections(pipe):
    names = target_layers(pipe.mmdit)
    depth = pipe.mmdit.config.depth
    assert len(names) == 8 * depth - 1                           # the last block has no text output
    assert all(".attention." in name for name in names)
    with_dual = make_pipe(dual_attention_layers=(0,))
    assert target_layers(with_dual.mmdit).keys() == names.keys()


def test_an_adapter_adds_BA_to_its_layer(pipe):
    lora = make_branch(pipe).lora
    name, layer = next(iter(target_layers(pipe.mmdit).items()))
    key, x = name.replace(".", "/"), torch.randn(5, layer.in_features)
    merged = layer.weight + lora.B[key] @ lora.A[key]
    with lora.attached(pipe.mmdit):
        torch.testing.assert_close(layer(x), x @ merged.T + layer.bias)


def test_two_sets_share_one_base_and_do_not_mix(pipe):
    x, t, text = draw(pipe)
    one, two = make_branch(pipe), make_branch(pipe)
    with torch.no_grad():
        for B in two.lora.B.values():
            B.neg_()
    before = pipe.velocity(x, t, text)
    of_one, of_two = one.velocity(pipe, x, t, text), two.velocity(pipe, x, t, text)
    assert not torch.allclose(of_one, of_two) and not torch.allclose(of_one, before)
    assert torch.equal(one.velocity(pipe, x, t, text), of_one) and torch.equal(pipe.velocity(x, t, text), before)


def test_hooks_are_gone_after_an_error_too(pipe):
    lora = LoRA(pipe.mmdit)
    with pytest.raises(ZeroDivisionError), lora.attached(pipe.mmdit):
        1 / 0
    assert not any(layer._forward_hooks for layer in target_layers(pipe.mmdit).values())


def test_the_token_is_replaced_at_the_input_of_every_block(pipe):
    """What each block really receives: Y^l in the slot, the base's own states elsewhere in the first block."""
    x, t, text = draw(pipe)
    Y, received, plain = torch.randn(3, 32), [], []
    for block in pipe.mmdit.blocks:
        block.register_forward_pre_hook(lambda block, inputs: received.append(inputs[1]))
    pipe.velocity(x, t, text)
    plain, received = received, []
    pipe.velocity(x, t, text, fill=ConceptEmbeddings(Y))
    slot = text.slots[0].nonzero().item()
    for l in range(3):
        assert torch.equal(received[l][:, slot], Y[l].expand(2, -1)), f"block {l}"
        assert not torch.equal(plain[l][:, slot], Y[l].expand(2, -1))
    others = [n for n in range(16) if n != slot]
    assert torch.equal(received[0][:, others], plain[0][:, others])


def test_every_layers_embedding_matters_and_is_trained(pipe):
    x, t, text = draw(pipe)
    embeddings = ConceptEmbeddings(torch.randn(3, 32))
    pipe.velocity(x, t, text, fill=embeddings).square().sum().backward()
    assert (embeddings.Y.grad.abs().amax(1) > 0).all()


def test_texts_without_the_token_never_see_the_embeddings(pipe):
    x, t, _ = draw(pipe)
    text = pipe.encode_text(["a robot"] * 2, STAND_IN)
    assert torch.equal(pipe.velocity(x, t, text, fill=ConceptEmbeddings(torch.randn(3, 32))), pipe.velocity(x, t, text))


def test_embeddings_start_from_the_class_words_states(pipe):
    """At the first block that state is the embedded token itself, whatever t and noise are."""
    text = pipe.encode_text(["a robot in the snow", "a big robot at night"], {"robot": "robot"})
    Y = class_word_states(pipe, torch.randn(2, 3, 32, 32), text, torch.Generator().manual_seed(0))
    expected = pipe.mmdit.context_embedder(text.context)[text.slots].mean(0)
    torch.testing.assert_close(Y[0], expected)
    assert Y.shape == (3, 32) and not torch.allclose(Y[1], Y[0])


def test_a_concept_file_round_trips_bitwise(pipe, tmp_path):
    branch = make_branch(pipe)
    facts = {"class_word": "robot", "rank": 2}
    branch.save(tmp_path / "c.safetensors", facts)
    loaded, its_facts = Branch.load(pipe, tmp_path / "c.safetensors")
    assert its_facts == facts and tensor_hash(loaded.state_dict()) == tensor_hash(branch.state_dict())
    branch.save(tmp_path / "d.safetensors", facts)
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_a_concept_for_another_base_is_refused(pipe, tmp_path):
    make_branch(pipe).save(tmp_path / "c.safetensors", {"class_word": "robot", "rank": 2})
    with pytest.raises(InputError, match="do not fit this model.*embeddings.Y is"):
        Branch.load(make_pipe(width=16, depth=3), tmp_path / "c.safetensors")


def test_a_seeds_picture_does_not_depend_on_the_batch(pipe):
    branch = make_branch(pipe)
    text = pipe.encode_text(["a [V] robot", "a big [V] robot in the snow", "a [V] robot at night"], STAND_IN)
    together = branch.sample(pipe, text, [4, 5, 6], steps=4)
    torch.testing.assert_close(branch.sample(pipe, text[1:2], [5], steps=4), together[1:2], atol=1e-4, rtol=1e-4)

import pytest
import torch

from purecc_min.branch import Branch
from purecc_min.concept import TOKEN, ConceptSet, Reference, encode
from purecc_min.concept_file import load_branch
from purecc_min.embeddings import class_word_states
from purecc_min.learning import concept_facts
from purecc_min.lora import LoRA, key_of, target_layers
from purecc_min.train import TrainConfig
from tests.conftest import make_pipe
from tinyflow.errors import InputError
from tinyflow.weights import tensor_hash

STAND_IN = {TOKEN: "robot"}


def make_branch(pipe, trained=True) -> Branch:
    config = pipe.mmdit.config
    Y, generator = torch.randn(config.depth, config.width), torch.Generator().manual_seed(1)
    branch = Branch.fresh(pipe, Y, rank=2, generator=generator)
    if trained:
        with torch.no_grad():
            for B in branch.lora.B.values():
                B.normal_(std=0.1)
    return branch


def draw(pipe, batch=2):
    text = pipe.encode_text(["a big [V] robot in the snow"] * batch, STAND_IN)
    return torch.randn(batch, 16, 16, 16), torch.rand(batch), text


def plain_text(pipe, batch=2):
    return pipe.encode_text(["a robot"] * batch)


def test_a_fresh_adapter_set_changes_nothing(pipe):
    x_t, t, _ = draw(pipe)
    text = plain_text(pipe)
    assert torch.equal(make_branch(pipe, trained=False)(x_t, t, text), pipe.velocity(x_t, t, text))


def test_adapters_sit_on_the_eight_attention_projections(pipe):
    blocks, depth = pipe.mmdit.blocks, pipe.mmdit.config.depth
    names = [name for block in blocks for name in target_layers(block, "everywhere")]
    assert len(names) == 8 * depth - 1                           # the last block has no text output
    assert all(name.startswith("attention.") for name in names)
    with_dual = make_pipe(dual_attention_layers=(0,))
    dual = target_layers(with_dual.mmdit.blocks[0], "everywhere")
    assert dual.keys() == target_layers(blocks[0], "everywhere").keys()
    assert len(LoRA(pipe.mmdit).A) == len(names)


def test_an_adapter_adds_BA_to_its_layer(pipe):
    lora, block, anywhere = make_branch(pipe).lora, pipe.mmdit.blocks[1], None
    for name, layer in target_layers(block, "everywhere").items():
        key, x = key_of(1, name), torch.randn(5, layer.in_features)
        merged = layer.weight + lora.B[key] @ lora.A[key]
        with lora.attached(1, block, anywhere):
            torch.testing.assert_close(layer(x), x @ merged.T + layer.bias)


def test_two_sets_share_one_base_model_and_do_not_mix(pipe):
    x_t, t, text = draw(pipe)
    one, two = make_branch(pipe), make_branch(pipe)
    with torch.no_grad():
        for B in two.lora.B.values():
            B.neg_()
    before = pipe.velocity(x_t, t, text)
    of_one, of_two = one(x_t, t, text), two(x_t, t, text)
    assert not torch.allclose(of_one, of_two) and not torch.allclose(of_one, before)
    assert torch.equal(one(x_t, t, text), of_one) and torch.equal(pipe.velocity(x_t, t, text), before)


def test_a_branch_counts_its_own_weights_only(pipe):
    """The base model is shared: it must be neither trained nor saved with a branch."""
    branch = make_branch(pipe)
    assert {name.split(".")[0] for name in branch.state_dict()} == {"lora", "embeddings"}
    assert sum(p.numel() for p in branch.parameters()) < sum(p.numel() for p in pipe.parameters()) / 4


def test_hooks_are_gone_after_an_error_too(pipe):
    lora, block = LoRA(pipe.mmdit), pipe.mmdit.blocks[0]
    with pytest.raises(ZeroDivisionError), lora.attached(0, block, torch.zeros(1, 16)):
        1 / 0
    assert not any(layer._forward_hooks for layer in target_layers(block, "everywhere").values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_branches_in_one_loss_keep_their_own_gradients(pipe, checkpointing):
    """Gradient checkpointing computes a block again in the backward pass. While the adapters were attached
    to the whole model from outside, the second branch's blocks were computed again with the first one's
    adapters.
    """
    x_t, t, text = draw(pipe)
    one, two = make_branch(pipe), make_branch(pipe)
    pipe.mmdit.checkpointing = checkpointing
    (one(x_t, t, text) + 2 * two(x_t, t, plain_text(pipe))).square().mean().backward()
    together = [p.grad.clone() for branch in (one, two) for p in branch.lora.parameters()]
    pipe.mmdit.checkpointing = False
    for branch in (one, two):
        branch.zero_grad()
    (one(x_t, t, text) + 2 * two(x_t, t, plain_text(pipe))).square().mean().backward()
    plain = [p.grad for branch in (one, two) for p in branch.lora.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(together, plain))


def test_the_token_is_replaced_at_the_input_of_every_block(pipe):
    """What each block receives: Y^l in the slot, and in the first block the model's own states elsewhere."""
    x_t, t, text = draw(pipe)
    branch, received = make_branch(pipe, trained=False), []
    for block in pipe.mmdit.blocks:
        block.register_forward_pre_hook(lambda block, inputs: received.append(inputs[1]))
    pipe.velocity(x_t, t, text)
    branch(x_t, t, text)
    plain, replaced = received[:3], received[3:]
    slot, Y = text.slots[0].nonzero().item(), branch.embeddings.Y
    for l in range(3):
        assert torch.equal(replaced[l][:, slot], Y[l].expand(2, -1)), f"block {l}"
        assert not torch.equal(plain[l][:, slot], Y[l].expand(2, -1))
    others = [n for n in range(16) if n != slot]
    assert torch.equal(replaced[0][:, others], plain[0][:, others])


def test_every_layers_embedding_matters_and_is_trained(pipe):
    branch = make_branch(pipe)
    branch(*draw(pipe)).square().sum().backward()
    assert (branch.embeddings.Y.grad.abs().amax(1) > 0).all()


def test_texts_without_the_token_never_see_the_embeddings(pipe):
    x_t, t, _ = draw(pipe)
    text, branch = plain_text(pipe), make_branch(pipe)
    before = branch(x_t, t, text)
    with torch.no_grad():
        branch.embeddings.Y.add_(1)
    assert torch.equal(branch(x_t, t, text), before)


def test_embeddings_start_from_the_class_words_states(pipe):
    """At the first block that state is the embedded token itself, whatever t and noise are."""
    bases, picture = ["a robot in the snow", "a big robot at night"], torch.zeros(1, 64, 64, 3).byte().numpy()
    references = [Reference(base, picture, f"{TOKEN} {base}", base, f"{TOKEN} robot") for base in bases]
    data = encode(pipe, ConceptSet("robot", references))
    Y = class_word_states(pipe, data, torch.Generator().manual_seed(0))
    expected = pipe.mmdit.context_embedder(data.class_text.context)[data.class_text.slots > 0].mean(0)
    torch.testing.assert_close(Y[0], expected)
    assert Y.shape == (3, 32) and not torch.allclose(Y[1], Y[0])


def test_a_concept_file_round_trips_bitwise(pipe, tmp_path):
    branch = make_branch(pipe)
    facts = {"class_word": "robot", "rank": 2, "base": "tiny", "size": 64, "method": "lora"}
    branch.save(tmp_path / "c.safetensors", facts)
    loaded, its_facts = load_branch(pipe, tmp_path / "c.safetensors")
    assert its_facts == {**facts, "where": "everywhere"}
    assert tensor_hash(loaded.state_dict()) == tensor_hash(branch.state_dict())
    branch.save(tmp_path / "d.safetensors", facts)
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_a_concept_for_another_base_model_is_refused(pipe, tmp_path):
    make_branch(pipe).save(tmp_path / "c.safetensors", {"class_word": "robot", "rank": 2})
    with pytest.raises(InputError, match="do not fit this model.*embeddings.Y is"):
        load_branch(make_pipe(width=16, depth=3), tmp_path / "c.safetensors")


def test_a_seeds_picture_does_not_depend_on_the_batch(pipe):
    branch = make_branch(pipe)
    text = pipe.encode_text(["a [V] robot", "a big [V] robot in the snow", "a [V] robot at night"], STAND_IN)
    together = pipe.sample(text, [4, 5, 6], steps=4, theta=branch)
    alone = pipe.sample(text[1:2], [5], steps=4, theta=branch)
    torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=1e-4)


def test_a_concept_is_refused_by_weights_that_fit_by_their_shapes_alone(pipe, tmp_path):
    """A concept of one base model once drew nonsense on another, with exit code 0."""
    facts = concept_facts(pipe, "robot", TrainConfig(rank=2), "lora", "tiny")
    make_branch(pipe).save(tmp_path / "c.safetensors", facts)
    load_branch(pipe, tmp_path / "c.safetensors")
    load_branch(make_pipe().to(torch.bfloat16), tmp_path / "c.safetensors")          # the same, rounded
    other = make_pipe()
    with torch.no_grad():
        for parameter in other.mmdit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(InputError, match="learned on other weights than these"):
        load_branch(other, tmp_path / "c.safetensors")

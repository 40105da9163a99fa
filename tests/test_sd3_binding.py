"""A bound concept on a small random model in the layout of the public weights: ours, and in diffusers."""

from types import SimpleNamespace

import pytest
import torch

from purecc_min.__main__ import main
from purecc_min.branch import Branch
from purecc_min.commands.export import attach_concept
from tests.test_commands import fails
from tests.test_sd3_learning import PUBLIC, ROBOT
from tinyflow.errors import InputError
from tinyflow.flow import noise_for
from tinyflow.sd3.load import load_sd3, load_tokenizer

PROMPT = "a [V] robot on the beach"


@pytest.fixture(scope="module")
def bound(sd3, tmp_path_factory):
    """A bound concept whose adapters and embeddings are far from where they began."""
    out = tmp_path_factory.mktemp("runs") / "bound"
    rates = ["--learning-rate", "0.5", "--embedding-learning-rate", "0.5"]
    command = ["learn", str(ROBOT), "--weights", str(sd3[0]), "--out", str(out), "--method", "bound"]
    main([*command, *rates, *PUBLIC])
    return out / "concept.safetensors"


@pytest.fixture(scope="module")
def pipe(sd3):
    return load_sd3(sd3[0], size=64, dtype=torch.float32)


def test_a_bound_set_acts_at_clip_and_t5_positions_and_nowhere_else(bound, pipe):
    theta, facts = Branch.load(pipe, bound)
    assert facts["where"] == "token" and facts["method"] == "bound" and len(theta.lora.A) == 2 * 3
    named, base = (pipe.encode_text([text], {"[V]": "robot"}) for text in (PROMPT, "a robot on the beach"))
    places = named.slots[0].nonzero().flatten()
    assert len(places) == 2 and places[0] < 77 <= places[1]
    x_t, t = torch.randn(1, 16, 8, 8), torch.tensor([0.4])
    assert torch.equal(theta(x_t, t, base), pipe.velocity(x_t, t, base))
    changes = []
    for layer in (pipe.mmdit.blocks[1].attention.text.to_k, pipe.mmdit.blocks[1].attention.text.to_v):
        c = torch.randn(1, named.slots.shape[1], layer.in_features)
        plain = layer(c)
        with theta.lora.attached(1, pipe.mmdit.blocks[1], named.slots == 1):
            changes.append((layer(c) != plain).any(-1)[0].nonzero().flatten())
    assert all(torch.equal(changed, places) for changed in changes)


def test_a_bound_concept_is_no_plain_lora(bound, tmp_path, capsys):
    """As a LoRA file its adapters would act on every token."""
    line = fails(capsys, "export", bound, "--out", tmp_path / "lora.safetensors")
    assert "where [V] stands and nowhere else" in line and not (tmp_path / "lora.safetensors").exists()


def test_diffusers_draws_our_guided_pictures_with_a_bound_concept(bound, pipe, sd3):
    """Two pictures of one prompt: the empty text's rows come first, then the prompt's."""
    folder, pipeline = sd3
    theta, _ = Branch.load(pipe, bound)
    text = pipe.encode_text([PROMPT] * 2, {"[V]": "robot"})
    expected = pipe.sample(text, [5, 6], steps=3, guidance=4.0, theta=theta)
    _, slots = load_tokenizer(folder)(["", PROMPT], {"[V]": "robot"})

    def draw():
        return pipeline(PROMPT.replace("[V]", "robot"), negative_prompt="", num_inference_steps=3, height=64,
                        width=64, guidance_scale=4.0, num_images_per_prompt=2, output_type="latent",
                        latents=noise_for([5, 6], (16, 8, 8))).images

    plain = draw()
    with attach_concept(pipeline.transformer, bound, slots, copies=2):
        drawn = draw()
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(), plain) and (drawn - plain).abs().max() > 1e-3


def test_slots_that_do_not_fit_are_one_error(bound, sd3):
    """A forgotten empty text, swapped rows, another length or another depth once drew another picture
    silently, or ended in a traceback about sizes.
    """
    folder, pipeline = sd3
    transformer, tokenizer = pipeline.transformer, load_tokenizer(folder)
    _, slots = tokenizer(["", PROMPT], {"[V]": "robot"})

    def call(slots, rows=2, tokens=77 + 256, copies=1):
        with torch.no_grad(), attach_concept(transformer, bound, slots, copies):
            return transformer(torch.randn(rows, 16, 8, 8), timestep=torch.full((rows,), 500.0),
                               encoder_hidden_states=torch.randn(rows, tokens, 80),
                               pooled_projections=torch.randn(rows, 56)).sample

    assert call(slots).shape == (2, 16, 8, 8) and call(slots, rows=6, copies=3).shape[0] == 6
    with pytest.raises(InputError, match="the empty text comes first"):
        call(slots.flip(0))
    for wrong in (dict(slots=slots[1:]), dict(slots=slots, rows=4), dict(slots=slots, tokens=77)):
        with pytest.raises(InputError, match="one row for each text.*num_images_per_prompt"):
            call(**wrong)
    assert not any(block._forward_pre_hooks for block in transformer.transformer_blocks)
    with pytest.raises(InputError, match="learned on 3 blocks, and this transformer has 2"):
        attach_concept(SimpleNamespace(transformer_blocks=[None, None]), bound, slots).__enter__()

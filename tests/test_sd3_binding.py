"""Bound concepts on a small random model in the layout of the public weights: ours, and in diffusers.

"phrase" is what `learn --method bound` makes: adapters that act on [V]'s phrase, and no Y. "token" is what it
made before: adapters at [V] alone, and Y in the word's place. Such files still load.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from purecc_min.__main__ import main
from purecc_min.branch import Branch
from purecc_min.commands.export import attach_concept
from purecc_min.concept_file import has_t5, load_branch
from purecc_min.learning import concept_facts
from purecc_min.train import TrainConfig
from tests.test_commands import fails
from tests.test_sd3_learning import PUBLIC, ROBOT
from tinyflow.errors import InputError
from tinyflow.flow import noise_for
from tinyflow.phrase import Tokens
from tinyflow.sd3.load import load_sd3, load_tokenizer
from tinyflow.weights import load_tensors, save_tensors

STAND_INS = {"[V]": "robot"}
PROMPTS = ["a [V] robot on the beach and a robot", "{a big [V] robot} on the beach and a robot"]
KINDS = ["phrase", "token"]


@pytest.fixture(scope="module")
def pipe(sd3):
    return load_sd3(sd3[0], size=64, dtype=torch.float32)


@pytest.fixture(scope="module")
def learned(sd3, tmp_path_factory):
    """A concept learned by `--method bound`, whose adapters are far from where they began."""
    out = tmp_path_factory.mktemp("runs") / "bound"
    main(["learn", str(ROBOT), "--weights", str(sd3[0]), "--out", str(out), "--method", "bound",
          "--learning-rate", "0.5", *PUBLIC])
    return out / "concept.safetensors"


@pytest.fixture(scope="module")
def old(pipe, tmp_path_factory):
    """A concept as `--method bound` made it before, with adapters and embeddings far from their beginning."""
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(pipe.mmdit.config.depth, pipe.mmdit.config.width, generator=generator)
    theta = Branch.fresh(pipe, Y, 4, generator, where="token")
    for B in theta.lora.B.values():
        B.data.normal_(std=0.5, generator=generator)
    file = tmp_path_factory.mktemp("old") / "concept.safetensors"
    theta.save(file, concept_facts(pipe, "robot", TrainConfig(), "bound", "sd3.5-medium"))
    return file


@pytest.fixture(params=KINDS)
def bound(request, learned, old):
    """(the file, which of a text's positions its adapters act at)"""
    return (learned, "phrases") if request.param == "phrase" else (old, "slots")


def test_a_bound_set_acts_at_clip_and_t5_positions_and_nowhere_else(bound, pipe):
    """At the phrase, or at [V] alone; Y^l stands at [V] in files that have one."""
    file, positions = bound
    theta, facts = load_branch(pipe, file)
    assert facts["method"] == "bound" and len(theta.lora.A) == 2 * 3
    assert facts["where"] == theta.lora.where == positions.removesuffix("s").replace("slot", "token")
    assert (theta.embeddings is None) == (positions == "phrases")
    for prompt, in_clip in zip(PROMPTS, ([2, 3, 4, 5, 6], [1, 2, 3, 4])):
        text = pipe.encode_text([prompt], STAND_INS)
        places = getattr(text, positions)[0].nonzero().flatten()
        if positions == "phrases":
            in_t5 = [77 - 1 + place for place in in_clip]        # it has no start token
            assert places.tolist() == in_clip + in_t5
        else:
            assert len(places) == 2 and places[0] < 77 <= places[1]
        for l, block in enumerate(pipe.mmdit.blocks):
            for layer in (block.attention.text.to_k, block.attention.text.to_v):
                c = torch.randn(1, text.slots.shape[1], layer.in_features)
                plain = layer(c)
                with theta.lora.attached(l, block, theta.lora.places(text, 1)):
                    changed = (layer(c) != plain).any(-1)[0].nonzero().flatten()
                assert torch.equal(changed, places)


def test_a_bound_concept_is_no_plain_lora(bound, tmp_path, capsys):
    """As a LoRA file its adapters would act on every token."""
    file, positions = bound
    line = fails(capsys, "export", file, "--out", tmp_path / "lora.safetensors")
    acts = "phrase" if positions == "phrases" else "token"
    assert f"its adapters act on [V]'s {acts} and nowhere else; a LoRA file cannot say so" in line
    assert "attach_concept" in line and not (tmp_path / "lora.safetensors").exists()


@pytest.fixture(params=["with T5", "without T5"])
def model(request, sd3, pipe, tmp_path):
    """Ours, diffusers', and the folder of both: with T5, or as a user may download it, without."""
    folder, pipeline = sd3
    if request.param == "with T5":
        return pipe, pipeline, folder
    left_out = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")
    shutil.copytree(folder, tmp_path / "sd3", ignore=left_out)
    without = {**pipeline.components, "text_encoder_3": None, "tokenizer_3": None}
    ours = load_sd3(tmp_path / "sd3", size=64, dtype=torch.float32)
    return ours, StableDiffusion3Pipeline(**without), tmp_path / "sd3"


def learned_with_the_encoders_of(pipe, file, folder):
    """The same concept, as if T5 had been there or missing when it was learned, as it is in `pipe`."""
    tensors, facts = load_tensors(file, "concept")
    if not has_t5(pipe):
        with pytest.raises(InputError, match="learned with T5; load the base model in the same way"):
            load_branch(pipe, file)
    save_tensors(folder / "same.safetensors", "concept", tensors, {**facts, "t5": has_t5(pipe)})
    return folder / "same.safetensors"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_diffusers_draws_our_guided_pictures_with_a_bound_concept(bound, model, prompt, tmp_path):
    """Two pictures of one prompt: the empty text's rows come first, then the prompt's."""
    ours, pipeline, folder = model
    file = learned_with_the_encoders_of(ours, bound[0], tmp_path)
    theta, _ = load_branch(ours, file)
    text = ours.encode_text([prompt] * 2, STAND_INS)
    expected = ours.sample(text, [5, 6], steps=3, guidance=4.0, theta=theta)
    tokens = load_tokenizer(folder)(["", prompt], STAND_INS)
    assert tokens.phrases[1, 77:].any() == (ours.tokenizer.t5 is not None)

    def draw():
        pipeline.set_progress_bar_config(disable=True)
        written = prompt.replace("[V]", "robot").replace("{", "").replace("}", "")
        return pipeline(written, negative_prompt="", num_inference_steps=3, height=64, width=64,
                        guidance_scale=4.0, num_images_per_prompt=2, output_type="latent",
                        latents=noise_for([5, 6], (16, 8, 8))).images

    plain = draw()
    with attach_concept(pipeline.transformer, file, tokens, copies=2):
        drawn = draw()
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(), plain) and (drawn - plain).abs().max() > 1e-3


def test_tokens_that_do_not_fit_are_one_error(bound, sd3):
    """Forgotten stand-ins, a forgotten empty text, swapped rows, two concepts, another length, another depth:
    they once drew another picture silently, or ended in a traceback about sizes.
    """
    folder, pipeline = sd3
    transformer, tokenizer = pipeline.transformer, load_tokenizer(folder)
    tokens = tokenizer(["", PROMPTS[0]], STAND_INS)

    def call(tokens, rows=2, count=77 + 256, copies=1):
        with torch.no_grad(), attach_concept(transformer, bound[0], tokens, copies):
            return transformer(torch.randn(rows, 16, 8, 8), timestep=torch.full((rows,), 500.0),
                               encoder_hidden_states=torch.randn(rows, count, 80),
                               pooled_projections=torch.randn(rows, 56)).sample

    def rows_of(tokens, rows):
        return Tokens(*(part[rows] for part in tokens))

    assert call(tokens).shape == (2, 16, 8, 8) and call(tokens, rows=6, copies=3).shape[0] == 6
    with pytest.raises(InputError, match="the empty text comes first"):
        call(rows_of(tokens, [1, 0]))
    with pytest.raises(InputError, match="tokens: no text names the concept.*{'\\[V\\]': 'robot'}"):
        call(tokenizer(["", PROMPTS[0]]))
    with pytest.raises(InputError, match="one is attached at a time"):
        call(tokenizer(["", "a [V1] robot and a [V2] robot"], {"[V1]": "robot", "[V2]": "robot"}))
    of_clip = tokenizer.clip_l(["", PROMPTS[0]], STAND_INS)
    for wrong in (dict(tokens=rows_of(tokens, [1])), dict(tokens=tokens, rows=4)):
        with pytest.raises(InputError, match="one row for each text.*num_images_per_prompt"):
            call(**wrong)
    for wrong, advice in ((dict(tokens=of_clip), "use load_tokenizer's"),
                          (dict(tokens=tokens, count=77 + 128), "give the pipeline max_sequence_length=256")):
        with pytest.raises(InputError, match=advice):
            call(**wrong)
    assert not any(block._forward_pre_hooks for block in transformer.transformer_blocks)
    assert not any(block.attn.add_k_proj._forward_hooks for block in transformer.transformer_blocks)
    with pytest.raises(InputError, match="learned on 3 blocks, and this transformer has 2"):
        attach_concept(SimpleNamespace(transformer_blocks=[None, None]), bound[0], tokens).__enter__()

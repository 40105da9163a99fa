"""Concepts of a small random model in the layout of the public weights, as diffusers draws them: the exported
LoRA, and `attach_concept`.

"phrase" is what `learn --method bound` makes: adapters that act on [V]'s phrase, and no Y. "token" is what it
made before: adapters at [V] alone, and Y in the word's place. Such files still load.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from purecc_min.__main__ import main
from purecc_min.branch import Branch
from purecc_min.commands.export import attach_concept
from purecc_min.concept_file import load_branch
from purecc_min.learning import concept_facts
from purecc_min.train import TrainConfig
from tests.test_commands import fails
from tinyflow.errors import InputError
from tinyflow.flow import noise_for
from tinyflow.phrase import Tokens
from tinyflow.sd3.load import load_sd3, load_tokenizer

STAND_INS = {"[V]": "robot"}
PROMPTS = ["a [V] robot on the beach and a robot", "{a big [V] robot} on the beach and a robot"]


@pytest.fixture(scope="module")
def pipe(sd3):
    return load_sd3(sd3[0], size=64, dtype=torch.float32)


def make_concept(pipe, file, where, rank=4, word="robot") -> Branch:
    """Its adapters are far from where they begin, and its embeddings if it has some."""
    config, generator = pipe.mmdit.config, torch.Generator().manual_seed(0)
    Y = None if where == "phrase" else torch.randn(config.depth, config.width, generator=generator)
    theta = Branch.fresh(pipe, Y, rank, generator, where)
    for B in theta.lora.B.values():
        B.data.normal_(std=0.2, generator=generator)
    theta.save(file, concept_facts(pipe, word, TrainConfig(rank=rank), "lora", "sd3.5-medium"))
    return theta


@pytest.fixture(params=["phrase", "token"])
def bound(request, pipe, tmp_path):
    make_concept(pipe, tmp_path / "concept.safetensors", request.param)
    return tmp_path / "concept.safetensors"


def test_slots_and_phrases_stand_in_clips_and_in_t5s_part_of_the_text(pipe):
    for prompt, in_clip in zip(PROMPTS, ([2, 3, 4, 5, 6], [1, 2, 3, 4])):
        text = pipe.encode_text([prompt], STAND_INS)
        in_t5 = [77 - 1 + place for place in in_clip]            # it has no start token
        assert text.phrases[0].nonzero().flatten().tolist() == in_clip + in_t5
        clip, t5 = text.slots[0].nonzero().flatten().tolist()
        assert text.phrases[0, clip] and t5 == 77 - 1 + clip


def test_a_bound_concept_is_no_plain_lora(bound, tmp_path, capsys):
    """As a LoRA file its adapters would act on every token."""
    line = fails(capsys, "export", bound, "--out", tmp_path / "lora.safetensors")
    assert re.search(r"act on \[V\]'s (phrase|token) and nowhere else; a LoRA file cannot say so", line)
    assert "attach_concept" in line and not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("where, rank, word, prompt", [
    ("everywhere", 1, "robot", "a [V] robot on the beach"),
    ("everywhere", 8, "robot", "a [V] robot beside a [V] robot, and one more [V] robot"),
    ("everywhere", 16, "teddy bear", "a big [V] teddy bear on the beach"),
    *(("phrase", 4, "robot", prompt) for prompt in PROMPTS), ("token", 4, "robot", PROMPTS[0])])
def test_diffusers_draws_our_guided_pictures_by_the_readmes_recipe(where, rank, word, prompt, pipe,
                                                                   sd3_in_both_forms, tmp_path):
    """The class word stands in [V]'s place. The empty text's rows come first, then two of the prompt."""
    (folder, pipeline), file, names = sd3_in_both_forms, tmp_path / "concept.safetensors", {"[V]": word}
    ours = load_sd3(folder, size=64, dtype=torch.float32)
    text, tokens = ours.encode_text([prompt] * 2, names), load_tokenizer(folder)(["", prompt], names)
    make_concept(pipe, file, where)              # with T5
    if ours.tokenizer.t5 is None:
        with pytest.raises(InputError, match="learned with T5; load the base model in the same way"):
            load_branch(ours, file)

    def draw():
        written = prompt.replace("[V]", word).replace("{", "").replace("}", "")
        return pipeline(written, negative_prompt="", num_inference_steps=3, height=64, width=64,
                        guidance_scale=4.0, num_images_per_prompt=2, output_type="latent",
                        latents=noise_for([5, 6], (16, 8, 8))).images

    def check(drawn, text):
        expected = ours.sample(text, [5, 6], steps=3, guidance=4.0, theta=theta)
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)

    theta, plain = make_concept(ours, file, where, rank, word), draw()
    if where == "everywhere":
        main(["export", str(file), "--out", str(tmp_path / "pytorch_lora_weights.safetensors")])
        pipeline.load_lora_weights(tmp_path)     # the real client
        check(draw(), replace(text, slots=torch.zeros_like(text.slots)))         # without Y^l
    with attach_concept(pipeline.transformer, file, tokens, copies=2):
        drawn = draw()
    if where == "everywhere":
        pipeline.unload_lora_weights()
    check(drawn, text)
    assert torch.equal(draw(), plain) and (drawn - plain).abs().max() > 1e-3


def test_tokens_that_do_not_fit_are_one_error(bound, sd3):
    """Forgotten stand-ins, a forgotten empty text, swapped rows, two concepts, another length, another depth:
    they once drew another picture silently, or ended in a traceback about sizes.
    """
    folder, pipeline = sd3
    transformer, tokenizer = pipeline.transformer, load_tokenizer(folder)
    tokens = tokenizer(["", PROMPTS[0]], STAND_INS)

    def call(tokens, rows=2, count=77 + 256, copies=1):
        with torch.no_grad(), attach_concept(transformer, bound, tokens, copies):
            return transformer(torch.randn(rows, 16, 8, 8), timestep=torch.full((rows,), 500.0),
                               encoder_hidden_states=torch.randn(rows, count, 80),
                               pooled_projections=torch.randn(rows, 56)).sample

    def rows_of(tokens, rows):
        return Tokens(*(part[rows] for part in tokens))

    assert call(tokens).shape == (2, 16, 8, 8) and call(tokens, rows=6, copies=3).shape[0] == 6
    two = tokenizer(["", "a [V1] robot and a [V2] robot"], {"[V1]": "robot", "[V2]": "robot"})
    one_row_each = "one row for each text.*num_images_per_prompt"
    for wrong, message in (
            (dict(tokens=rows_of(tokens, [1, 0])), "the empty text comes first"),
            (dict(tokens=tokenizer(["", PROMPTS[0]])), r"no text names the concept.*{'\[V\]': 'robot'}"),
            (dict(tokens=two), "one is attached at a time"),
            (dict(tokens=rows_of(tokens, [1])), one_row_each), (dict(tokens=tokens, rows=4), one_row_each),
            (dict(tokens=tokenizer.clip_l(["", PROMPTS[0]], STAND_INS)), "use load_tokenizer's"),
            (dict(tokens=tokens, count=77 + 128), "give the pipeline max_sequence_length=256")):
        with pytest.raises(InputError, match=message):
            call(**wrong)
    assert not any(block._forward_pre_hooks for block in transformer.transformer_blocks)
    assert not any(block.attn.add_k_proj._forward_hooks for block in transformer.transformer_blocks)
    with pytest.raises(InputError, match="learned on 3 blocks, and this transformer has 2"):
        attach_concept(SimpleNamespace(transformer_blocks=[None, None]), bound, tokens).__enter__()

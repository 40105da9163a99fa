"""Concepts of other shapes in diffusers, pictures without T5, and the published scheduler."""

import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from purecc_min.branch import Branch
from purecc_min.commands.export import attach_concept, export_lora
from purecc_min.learning import concept_facts
from purecc_min.train import TrainConfig
from tests.test_sd3 import TEXTS
from tinyflow.flow import noise_for, sampling_times
from tinyflow.sd3.load import LAST_TIME, SHIFT, load_sd3, load_tokenizer


@pytest.mark.parametrize("rank, word, text", [
    (1, "robot", "a [V] robot on the beach"),
    (8, "robot", "a [V] robot beside a [V] robot, and one more [V] robot"),
    (16, "teddy bear", "a big [V] teddy bear on the beach")])
def test_any_rank_several_names_and_words_of_several_pieces_reach_diffusers(rank, word, text, sd3, tmp_path):
    folder, pipeline = sd3
    pipe, generator = load_sd3(folder, size=64, dtype=torch.float32), torch.Generator().manual_seed(0)
    Y = torch.randn(pipe.mmdit.config.depth, pipe.mmdit.config.width, generator=generator)
    theta = Branch.fresh(pipe, Y, rank, generator)
    for B in theta.lora.B.values():
        B.data.normal_(std=0.2, generator=generator)
    config = TrainConfig(rank=rank)
    theta.save(tmp_path / "concept.safetensors", concept_facts(pipe, word, config, "lora", "sd3.5-medium"))
    export_lora(tmp_path / "concept.safetensors", tmp_path / "pytorch_lora_weights.safetensors")

    encoded = pipe.encode_text([text], {"[V]": word})
    assert (encoded.slots > 0).sum() == 2 * text.count("[V]")    # in CLIP's segment, and in T5's
    x_t, t = torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([0.6])
    tokens = load_tokenizer(folder)([text], {"[V]": word})
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    try:
        with torch.no_grad(), attach_concept(pipeline.transformer, tmp_path / "concept.safetensors", tokens):
            theirs = pipeline.transformer(x_t, timestep=1000 * t, encoder_hidden_states=encoded.context,
                                          pooled_projections=encoded.pooled).sample
            torch.testing.assert_close(theirs, theta(x_t, t, encoded), rtol=1e-5, atol=1e-5)
    finally:
        pipeline.unload_lora_weights()


def test_whole_pictures_without_t5_are_diffusers_own(sd3, tmp_path):
    folder, pipeline = sd3
    without = StableDiffusion3Pipeline(**{**pipeline.components, "text_encoder_3": None, "tokenizer_3": None})
    left_out = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")       # as a user may download it
    shutil.copytree(folder, tmp_path / "sd3", ignore=left_out)
    ours = load_sd3(tmp_path / "sd3", size=64, dtype=torch.float32)
    latents = ours.sample(ours.encode_text(TEXTS), [1, 2, 3], steps=3, guidance=5.0)
    theirs = without(TEXTS, negative_prompt=[""] * 3, num_inference_steps=3, guidance_scale=5.0, height=64,
                     width=64, latents=noise_for([1, 2, 3], (16, 8, 8)), output_type="latent").images
    torch.testing.assert_close(latents, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 8, 28, 50])
def test_the_sampler_stops_where_the_published_scheduler_does(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    scheduler.set_timesteps(steps)
    times = torch.tensor(sampling_times(steps, SHIFT, LAST_TIME), dtype=torch.float32)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=2e-6)

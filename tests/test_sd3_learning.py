"""Learning, sampling and exporting a concept on a small random model in the layout of the public weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from purecc_min.__main__ import main
from purecc_min.branch import Branch
from purecc_min.commands.base_models import half_precision, open_base_model
from purecc_min.commands.export import attach_concept, export_lora
from purecc_min.commands.folder import load_concept
from purecc_min.concept import encode
from purecc_min.concept_file import load_branch
from purecc_min.learning import concept_facts, stage
from purecc_min.measure.toy import FOLDER
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig, draw_batch
from tests.test_commands import fails
from tinyflow.flow import noise_for
from tinyflow.sd3.load import load_sd3, load_tokenizer
from tinyflow.weights import load_tensors, save_tensors, tensor_hash

ROBOT = FOLDER / "checked_robot"
PUBLIC = ["--base", "sd3.5-medium", "--size", "64", "--steps", "2", "--device", "cpu",
          "--class-word", "robot"]


@pytest.fixture(scope="module")
def learned(sd3, tmp_path_factory):
    """A concept whose adapters and embeddings are far from where they began."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    rates = ["--learning-rate", "0.5", "--embedding-learning-rate", "0.5"]
    main(["learn", str(ROBOT), "--weights", str(sd3[0]), "--out", str(out), *rates, *PUBLIC])
    return out


def test_a_concept_is_learned_and_sampled_by_the_same_commands(learned, sd3, tmp_path, capsys):
    _, facts = load_tensors(learned / "concept.safetensors", "concept")
    assert (facts["base"], facts["size"]) == ("sd3.5-medium", 64)
    assert (facts["config"]["batch"], facts["config"]["eta"]) == (2, 1.0)
    rows = [json.loads(line) for line in (learned / "stage2.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["norm_R_target"] > 0
    for name in "ab":
        out = str(tmp_path / f"{name}.png")
        main(["sample", str(learned / "concept.safetensors"), "a [V] robot on the beach", "--number", "2",
              "--steps", "2", "--weights", str(sd3[0]), "--device", "cpu", "--out", out])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_plan_is_printed_before_anything_is_loaded(sd3, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("purecc_min.commands.memory.free_memory", lambda device: 10**8)
    monkeypatch.setattr("purecc_min.commands.learn.open_base_model", None)
    line = fails(capsys, "learn", ROBOT, "--weights", sd3[0], "--out", tmp_path / "run", *PUBLIC)
    assert "stage 2 at 64 px, batch 2 needs" in line and "the card has 0.1 GB" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("needed", [False, True])
def test_gradient_checkpointing_is_on_where_the_plan_says_so(sd3, tmp_path, monkeypatch, needed):
    class Reached(Exception):
        pass

    def learn(pipe, *_):
        assert pipe.mmdit.checkpointing == needed
        raise Reached

    monkeypatch.setattr("purecc_min.commands.learn.plan", lambda *_: needed)
    monkeypatch.setattr("purecc_min.commands.learn.learn", learn)
    with pytest.raises(Reached):
        main(["learn", str(ROBOT), "--weights", str(sd3[0]), "--out", str(tmp_path / "run"), *PUBLIC])


def test_what_cannot_be_is_one_line(learned, sd3, tmp_path, capsys):
    concept = learned / "concept.safetensors"
    assert "--weights DIR" in fails(capsys, "learn", ROBOT, *PUBLIC)
    assert "--weights DIR" in fails(capsys, "sample", concept, "a [V] robot")
    assert "leave them out" in fails(capsys, "learn", ROBOT, "--class-word", "robot", "--weights", sd3[0])
    assert "64 px only" in fails(capsys, "learn", ROBOT, "--class-word", "robot", "--size", "32")
    public = ["learn", ROBOT, "--weights", sd3[0], *PUBLIC]
    absent = "mps" if torch.cuda.is_available() else "cuda"      # the plan once asked it for its memory
    assert f"--device {absent}: torch can use none" in fails(capsys, *public, "--device", absent)
    assert "multiple of 16, for example 64" in fails(capsys, *public, "--size", "72")
    assert "glued" in fails(capsys, "sample", concept, "a[V]robot", "--weights", sd3[0])
    tiny = tmp_path / "tiny.safetensors"
    save_tensors(tiny, "concept", {"embeddings.Y": torch.zeros(6, 128)}, {"rank": 4, "class_word": "robot"})
    assert "learned on the tiny base" in fails(capsys, "export", tiny)


def test_a_text_that_cannot_be_encoded_is_refused_before_anything_loads(sd3, tmp_path, capsys, monkeypatch):
    """16 GB of weights were once read first."""
    monkeypatch.setattr("purecc_min.commands.learn.open_base_model", None)
    photos = tmp_path / "photos"
    shutil.copytree(ROBOT, photos)
    (photos / "2.txt").write_text("a [V]robot in the desert")
    line = fails(capsys, "learn", photos, "--weights", sd3[0], "--class-word", "robot", *PUBLIC)
    assert "2.png: the placeholder '[V]' is glued" in line


@pytest.fixture(scope="module")
def small(sd3):
    """The small public model in fp32, its data with three variants a picture, and both stages' branches."""
    pipe = load_sd3(sd3[0], size=64, dtype=torch.float32)
    return pipe, encode(pipe, load_concept(ROBOT, "robot", 64, variants=3, seed=1))


def test_crops_and_flips_are_cached_variants_of_each_picture(small):
    """The first is the picture itself; every step draws one for each of its rows; which, the seed says."""
    pipe, data = small
    assert data.variants.shape[:2] == (4, 3)
    assert not any(torch.equal(data.variants[n, 0], data.variants[n, k]) for n in range(4) for k in (1, 2))
    config, drawn = TrainConfig(batch=4), set()
    for step in range(20):
        batch = draw_batch(data, config, 1, step, pipe.shift)
        x_0 = batch.x_t - batch.t.view(-1, 1, 1, 1) * batch.v
        for picture in x_0:
            distance = (data.variants - picture).abs().amax((2, 3, 4))                   # [4, 3]
            drawn.add(tuple((distance < 1e-4).nonzero().flatten().tolist()))
    assert drawn == {(n, k) for n in range(4) for k in range(3)}

    def pictures(seed):
        return load_concept(ROBOT, "robot", 64, variants=3, seed=seed).references[0].pictures

    assert (pictures(1) == pictures(1)).all() and (pictures(1) != pictures(2)).any()


def test_gradient_checkpointing_changes_memory_not_the_result(small, tmp_path):
    """Blocks are computed again in the backward pass, with the same adapters: bitwise the same training."""
    pipe, data = small
    results, config = [], TrainConfig(steps=2, batch=2)
    for name in ("off", "on"):
        pipe.mmdit.checkpointing = name == "on"
        theta_1, rows = stage(pipe, data, config, tmp_path / name, METHODS["lora"])
        list(rows)
        theta_1.requires_grad_(False)
        theta_2, rows = stage(pipe, data, config, tmp_path / name, METHODS["paper"], theta_1)
        results.append(([row["loss"] for row in rows], tensor_hash(theta_2.state_dict())))
    pipe.mmdit.checkpointing = False
    assert results[0] == results[1]


def test_bf16_weights_are_trained_with_fp32_adapters(sd3, tmp_path):
    pipe = open_base_model("sd3.5-medium", sd3[0], None, 64, torch.device("cpu"))
    before, data = tensor_hash(pipe.mmdit.state_dict()), encode(pipe, load_concept(ROBOT, "robot", 64))
    theta, rows = stage(pipe, data, TrainConfig(steps=2, batch=2), tmp_path, METHODS["lora"])
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert {p.dtype for p in pipe.mmdit.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in theta.parameters()} == {torch.float32}
    assert pipe.velocity(data.x_0, torch.full((4,), 0.5), data.texts.complete).dtype == torch.float32
    assert tensor_hash(pipe.mmdit.state_dict()) == before


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_cards_without_bf16_compute_in_fp16(sd3, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_precision(torch.device("cuda")) == dtype
    assert half_precision(torch.device("cpu")) == torch.bfloat16
    assert load_sd3(sd3[0], size=64, dtype=dtype).mmdit.final_linear.weight.dtype == dtype


@pytest.mark.parametrize("rank, word, prompt", [
    (1, "robot", "a [V] robot on the beach"),
    (8, "robot", "a [V] robot beside a [V] robot, and one more [V] robot"),
    (16, "teddy bear", "a big [V] teddy bear on the beach")])
def test_the_exported_lora_is_what_diffusers_draws_with(rank, word, prompt, sd3, small, tmp_path):
    """load_lora_weights, the real client, then the same velocity; with the embeddings, the branch's own."""
    (folder, pipeline), (pipe, _), generator = sd3, small, torch.Generator().manual_seed(0)
    Y = torch.randn(pipe.mmdit.config.depth, pipe.mmdit.config.width, generator=generator)
    theta = Branch.fresh(pipe, Y, rank, generator)
    for B in theta.lora.B.values():
        B.data.normal_(std=0.2, generator=generator)
    concept, out = tmp_path / "concept.safetensors", tmp_path / "pytorch_lora_weights.safetensors"
    theta.save(concept, concept_facts(pipe, word, TrainConfig(rank=rank), "lora", "sd3.5-medium"))
    export_lora(concept, out)
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == rank
    text = pipe.encode_text([prompt] * 2, {"[V]": word})
    assert (text.slots > 0).sum() == 2 * 2 * prompt.count("[V]")         # in CLIP's segment, and in T5's
    nowhere = replace(text, slots=torch.zeros_like(text.slots))  # the adapters alone: Y^l has no slot
    x_t, t = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.3, 0.9])

    def theirs():
        return pipeline.transformer(x_t, timestep=1000 * t, encoder_hidden_states=text.context,
                                    pooled_projections=text.pooled).sample

    tokens = load_tokenizer(folder)([prompt] * 2, {"[V]": word})
    pipeline.load_lora_weights(tmp_path)
    try:
        with torch.no_grad():
            torch.testing.assert_close(theirs(), theta(x_t, t, nowhere), rtol=1e-5, atol=1e-5)
            with attach_concept(pipeline.transformer, concept, tokens):
                torch.testing.assert_close(theirs(), theta(x_t, t, text), rtol=1e-5, atol=1e-5)
    finally:
        pipeline.unload_lora_weights()


def test_the_readmes_recipe_for_diffusers_draws_our_picture(learned, sd3, tmp_path):
    """The class word stands in [V]'s place, tokens come from our tokenizers, the empty row comes first."""
    folder, pipeline = sd3
    concept = learned / "concept.safetensors"
    main(["export", str(concept), "--out", str(tmp_path / "pytorch_lora_weights.safetensors")])
    pipe = load_sd3(folder, size=64, dtype=torch.float32)
    branch, _ = load_branch(pipe, concept)
    text = pipe.encode_text(["a [V] robot"], {"[V]": "robot"})
    expected = pipe.sample(text, [5], steps=3, guidance=4.0, theta=branch)
    tokens = load_tokenizer(folder)(["", "a [V] robot"], {"[V]": "robot"})
    pipeline.load_lora_weights(tmp_path)
    try:
        with attach_concept(pipeline.transformer, concept, tokens):
            drawn = pipeline("a robot robot", negative_prompt="", num_inference_steps=3, guidance_scale=4.0,
                             height=64, width=64, output_type="latent",
                             latents=noise_for([5], (16, 8, 8))).images
    finally:
        pipeline.unload_lora_weights()
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_the_public_size_of_an_adapter_set():
    """Rank 4 on the eight attention projections of SD3.5 Medium: 382 tensors, 2,347,008 parameters."""
    from purecc_min.lora import LoRA
    from tinyflow.mmdit import MMDiT
    from tinyflow.sd3.load import SD35_MEDIUM
    with torch.device("meta"):
        lora = LoRA(MMDiT(SD35_MEDIUM), rank=4)
    assert len(list(lora.parameters())) == 382 and sum(p.numel() for p in lora.parameters()) == 2_347_008

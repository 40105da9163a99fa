"""Memory counted without a card, against hand-worked cases, the profiler, and the targets at full size."""

import gc
import re
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from purecc_min import pairs
from purecc_min.ablations import not_detached
from purecc_min.commands import memory
from purecc_min.commands.memory import OVERHEAD, Memory, PeakMemory, dry_run, fit, memory_table
from purecc_min.concept import ConceptSet
from purecc_min.registry import METHODS
from purecc_min.train import TrainConfig
from tinyflow.errors import InputError
from tinyflow.mmdit import MMDiT, MMDiTConfig
from tinyflow.pipeline import Pipeline
from tinyflow.sd3.load import SD35_MEDIUM
from tinyflow.tokenizer import WordTokenizer
from tinyflow.vae import VAE, VAEConfig

SMALL = MMDiTConfig(channels=4, patch=2, width=64, depth=3, heads=2, context_width=32, pooled_width=16,
                    base_grid=8, dual_attention_layers=(0, 1))
TINY = dict(tokens=20, autoencoder=VAEConfig((8, 16), layers=1, latent_channels=4, groups=4))
TRAIN = TrainConfig(batch=2, rank=2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_counted_once_and_until_they_are_freed(device):
    old = torch.zeros(1000, device=device)
    with PeakMemory() as count:
        a = torch.zeros(100, device=device)                                          # 400 bytes
        view = a.view(10, 10)[2:].t()
        a.add_(1)
        old.mul_(2).view(10, 100)
        assert (count.now, count.peak) == (400, 400)
        b = (a + a).double()                                             # 400 for a while, then 800
        assert (count.now, count.peak) == (1200, 1600)
        del a
        assert count.now == 1200                                                     # the view still holds it
        del view, b
        assert (count.now, count.peak) == (0, 1600)


def test_texts_are_encoded_layer_by_layer():
    """Of T5 no more than its largest layer in fp32, and what it computes for eight texts."""
    layer = 4 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert layer < memory.encoding_memory() < 2 * layer


def kernel_of_the_cpu(q, k, v, bias=None, is_causal=False, scale=None):
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, is_causal=is_causal, scale=scale)[0]


@pytest.mark.parametrize("name, stage", [("paper", 1), ("paper", 2), ("bound", 1),
                                         ("bound-pairs", 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dry_run_is_the_real_step(name, stage, checkpointing, monkeypatch):
    """Byte for byte, in fp32 with one attention kernel for both. torch's profiler, which sees all that
    kernels take, agrees to 0.5 %.
    """
    def run(device):
        case = (SMALL, TRAIN, 64, stage, checkpointing)
        return dry_run(*case, **TINY, dtype=torch.float32, device=device, method=METHODS[name])

    monkeypatch.setattr(memory, "flash", kernel_of_the_cpu)
    gc.collect()                          # what earlier tests left must not be freed while the profiler looks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        real = run("cpu")
    assert run("meta") == real

    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert max(accumulate(sizes)) == pytest.approx(sum(real[:4]), rel=5e-3)

    monkeypatch.undo()
    assert 0 <= run("meta").activations - real.activations < 1000     # flash attention keeps its random state


def test_parts_are_what_they_say():
    """rank (in + out) values for each adapted layer, L D for Y; weights in bf16, autoencoder in fp32."""
    one, two = (dry_run(SMALL, TRAIN, 64, stage, False, **TINY) for stage in (1, 2))
    layers, positions = 3 * 8 - 1, 16 * 16 * 64
    values = sum(p.numel() for p in MMDiT(SMALL).parameters()) + positions
    autoencoder = sum(p.numel() for p in VAE(TINY["autoencoder"]).parameters())
    assert one.adapters == 4 * (layers * 2 * (64 + 64) + 3 * 64) and two.adapters == 2 * one.adapters
    assert 3 * one.adapters <= one.optimizer <= 3 * one.adapters + 4 * 100       # and a step counter a tensor
    assert one.weights == two.weights == 2 * values + 4 * autoencoder
    assert two.total == two.weights + two.texts + OVERHEAD       # here the text encoders are the largest part
    assert Memory(5, 1, 1, 1, 9, 2).total == 14 + OVERHEAD
    assert Memory(5, 1, 1, 1, 9, 20).total == 25 + OVERHEAD


def test_gradient_checkpointing_and_detaching_save_memory():
    def need(checkpointing=False, method=METHODS["paper"]):
        return dry_run(SMALL, TRAIN, 64, 2, checkpointing, **TINY, method=method).activations

    attached = replace(METHODS["paper"], loss=not_detached)
    assert need(checkpointing=True) < 0.6 * need() and 1.5 * need() < need(method=attached)


def test_bound_adapters_are_fewer_and_each_stage_has_what_its_own_method_trains():
    """Two layers a block and no Y; Y alone needs no gradient and no moments for the adapters. The extractor
    of bound-pairs is a LoRA with adapters everywhere and Y.
    """
    def need(name, stage=1):
        return dry_run(SMALL, TRAIN, 64, stage, False, **TINY, method=METHODS[name])

    bound, lora, alone, pairs = need("bound"), need("lora"), need("embeddings"), need("bound-pairs", 2)
    assert bound.adapters == 4 * 3 * 2 * 2 * (64 + 64)
    assert alone.optimizer <= 3 * 4 * 3 * 64 + 4 * 100 < bound.optimizer
    assert need("bound-paper", 2).adapters == 2 * bound.adapters
    assert pairs.adapters == bound.adapters + lora.adapters and pairs.optimizer == bound.optimizer
    assert need("bound-pairs").adapters == lora.adapters


class Encoder(torch.nn.Module):
    """Texts of the small case; it counts how many are encoded at once."""
    most = 0

    def forward(self, ids):
        self.most = max(self.most, len(ids))
        return torch.zeros(len(ids), TINY["tokens"], SMALL.context_width), torch.zeros(len(ids), 16)


def test_imagined_scenes_are_counted_as_they_lie_on_the_card(monkeypatch):
    """Each scene stands there twice, and half of that was once counted. Equal texts are encoded once."""
    words, encoder = ["a", "robot", "on", "the", "left", "and", "right"], Encoder()
    tokenizer = WordTokenizer(words, TINY["tokens"])
    pipe = Pipeline(tokenizer, encoder, MMDiT(SMALL).requires_grad_(False), VAE(TINY["autoencoder"]), 16)
    scenes = pairs.imagine(pipe, ConceptSet("robot", []), pairs.ON_PUBLIC_WEIGHTS, seed=0, steps=1)
    texts = {id(text): text for text in (*scenes.texts, scenes.class_text)}.values()
    real = [scenes.variants, scenes.masks, *(part for text in texts for part in vars(text).values())]
    counted = memory.empty_data(SMALL, TRAIN, 8, TINY["tokens"], "cpu", imagined=True)
    texts = {id(text): text for text in (*counted.texts, counted.class_text)}.values()
    ours = [counted.variants, counted.masks, *(part for text in texts for part in vars(text).values())]
    assert [part.shape for part in ours] == [part.shape for part in real]
    assert sum(part.nbytes for part in ours) == sum(part.nbytes for part in real)

    encoded = []
    monkeypatch.setattr(memory, "encoding_memory", lambda: encoded.append(1) or 10**9)
    plain, imagining = (dry_run(SMALL, TRAIN, 64, 1, False, **TINY, method=METHODS[name])
                        for name in ("bound", "bound-half"))
    assert encoded == [1, 1] and encoder.most <= memory.REFERENCES
    more = imagining.texts - plain.texts
    assert more == imagining.pictures - plain.pictures and more > 0.9 * 2 * 64 * 20 * 32 * 4


@pytest.mark.parametrize("size, target", [(512, 12e9), pytest.param(1024, 24e9, marks=pytest.mark.slow)])
def test_stage_2_of_sd35_medium_fits(size, target):
    assert 5e9 < dry_run(SD35_MEDIUM, TrainConfig(batch=2), size).total <= target


@pytest.mark.parametrize("free, expected", [
    (55, False), (54, True), (40, True),
    (39, "stage 2 at 1024 px, batch 3 needs 40.0 GB with gradient checkpointing and the card has 39.0 GB; "
         "--batch 2 needs 30.0 GB"),
    (20, "--batch 1 needs 20.0 GB"),
    (19, "--batch 1 --size 896 needs 18.8 GB"),
    (12.4, "nothing smaller fits: the least, --batch 1 --size 256, needs 12.5 GB"),
])
def test_the_next_smaller_option_is_named(monkeypatch, free, expected):
    """On a card of `free` GB, for a model that needs 10 GB, and 10 or 15 more a sample at 1024 px."""
    def model(config, train, size, stage, checkpointing, method):
        sample = 10_000_000_000 if checkpointing else 15_000_000_000
        return Memory(10_000_000_000 - OVERHEAD, 0, 0, train.batch * sample * size // 1024, 0, 0)

    monkeypatch.setattr(memory, "dry_run", model)
    case = (SD35_MEDIUM, TrainConfig(batch=3), 1024, METHODS["paper"], int(free * 1e9))
    if isinstance(expected, bool):
        assert fit(*case) is expected
    else:
        with pytest.raises(InputError, match=re.escape(expected) + "$"):
            fit(*case)


def test_the_table_has_a_row_for_every_case(monkeypatch):
    same = Memory(4_500_000_000, 10_000_000, 30_000_000, 2_000_000_000, 800_000_000, 900_000_000)
    monkeypatch.setattr(memory, "dry_run", lambda *case, **method: same)
    rows = [line for line in memory_table(SD35_MEDIUM).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 24 and len({row.count("|") for row in rows}) == 1
    assert rows[3] == "| paper | 512 | 1 | on | 4.50 | 0.01 | 0.03 | 2.00 | 0.80 | 0.90 | 7.14 |"

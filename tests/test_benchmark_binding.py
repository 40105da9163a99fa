"""The benchmark's bound methods, their extractors, and who answers a text without [V]."""

import torch

from purecc_min.benchmark.cells import ALL, Cell, learn_theta_1, run_cell, set_up, theta_1_cell, train_cell
from purecc_min.benchmark.entries import as_sampled
from tutorials.experiments import pool


def test_a_bound_method_never_moves_a_text_without_the_token(cheap, tmp_path):
    """Neither in training nor in sampling; and a LoRA that is switched off is the base model there too."""
    data, pipe = set_up("striped_cat").data, set_up("striped_cat").pipe
    x_t, t = torch.randn(4, 16, 16, 16), torch.full((4,), 0.4)
    for name, way in (("bound", ""), ("bound-paper", ""), ("token paper", ""), ("lora", "switched off"),
                      ("lora", "")):
        cell = Cell("striped_cat", name, steps=2)
        for _, thetas, _ in train_cell(cell, learn_theta_1(cell, tmp_path)):
            pass
        theta, options = as_sampled(thetas, way)
        kept = torch.equal(theta(x_t, t, data.texts.base), pipe.velocity(x_t, t, data.texts.base))
        assert kept == ((name, way) != ("lora", ""))
        assert (options == {"theta_null": pipe.velocity}) == (way == "")
    assert as_sampled(thetas, "own empty text") == (thetas.theta, {})


def test_switched_off_is_measured_without_drawing_again(cheap, tmp_path):
    """With [V] it draws what the LoRA draws, and without [V] what the original draws."""
    ways = run_cell(Cell("striped_cat", "lora", steps=2), tmp_path)["ways"]
    on, off = ways[""]["2"], ways["switched off"]["2"]
    for name in ("similarity", "outside change", "composition", "neighbour leak", "neighbour change"):
        assert on[name] == off[name]
    assert off["class drift"] == off["drift"] == off["path KL"] == 0 < on["class drift"]


def test_a_bound_extractor_teaches_a_bound_model(cheap):
    for name, method in ALL.items():
        teacher = theta_1_cell(Cell("striped_cat", name))
        if method.extractor is None:
            assert teacher is None
        else:                                    # but pairs ask a LoRA, which knows the concept everywhere
            assert (ALL[teacher.method].where == method.where) != method.imagines, name


def test_a_pool_that_is_never_used_twice_is_the_fresh_draws(cheap, tmp_path, monkeypatch):
    """What is remembered is what would have been computed."""
    monkeypatch.setattr(pool, "FOLDER", tmp_path)
    monkeypatch.setattr(pool, "FEW_STEPS", 1)
    cell = Cell("checked_robot", pool.METHOD, steps=2)
    fresh, remembered, reused = (pool.train(cell, size) for size in (0, 8, 4))
    for name in ("similarity", "outside change"):
        assert fresh[name] == remembered[name] != reused[name]

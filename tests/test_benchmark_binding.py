"""The benchmark's binding part: bound methods, their extractors, and who answers a text without [V]."""

import torch

from purecc_min.benchmark.cells import ALL, Cell, learn_theta_1, set_up, theta_1_cell, train_cell
from purecc_min.benchmark.entries import BINDING
from tutorials.experiments import pool


def test_a_bound_method_never_moves_a_text_without_the_token(cheap, tmp_path):
    """Neither in training nor in sampling; and a LoRA that is switched off is the base model there too."""
    data, pipe = set_up("checked_cat").data, set_up("checked_cat").pipe
    x_t, t = torch.randn(4, 3, 32, 32), torch.full((4,), 0.4)
    for name in ("bound", "bound paper, eta 1", "LoRA switched off", "LoRA, base's empty text"):
        cell = Cell("checked_cat", name, steps=2)
        for _, thetas, _ in train_cell(cell, learn_theta_1(cell, tmp_path)):
            pass
        theta, options = ALL[name].as_sampled(thetas)
        kept = torch.equal(theta(x_t, t, data.texts.base), pipe.velocity(x_t, t, data.texts.base))
        assert kept == (name != "LoRA, base's empty text")
        assert (options == {"theta_null": pipe.velocity}) == (name != "LoRA switched off")


def test_a_bound_extractor_teaches_a_bound_model(cheap):
    cells = {name: theta_1_cell(Cell("checked_cat", name)) for name in BINDING}
    teachers = {name: cell.method for name, cell in cells.items() if cell}
    assert teachers == {"paper, base's empty text": "LoRA", "bound paper, LoRA's extractor": "LoRA",
                        **{f"bound paper, eta {eta}": "bound" for eta in (1, 0.3, 0.1)},
                        "bound, extractor's Y": "bound"}


def test_a_pool_that_is_never_used_twice_is_the_fresh_draws(cheap, tmp_path, monkeypatch):
    """What is remembered is what would have been computed."""
    monkeypatch.setattr(pool, "FOLDER", tmp_path)
    monkeypatch.setattr(pool, "SAMPLING_STEPS", 1)
    cell = Cell("striped_robot", pool.METHOD, steps=2)
    fresh, remembered, reused = (pool.train(cell, size) for size in (0, 8, 4))
    for name in ("similarity", "outside change"):
        assert fresh[name] == remembered[name] != reused[name]

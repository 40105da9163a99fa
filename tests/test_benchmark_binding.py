"""The benchmark's bound methods, their extractors, and who answers a text without [V]."""

import torch

from purecc_min.benchmark.cells import ALL, Cell, learn_theta_1, run_cell, set_up, theta_1_cell, train_cell
from purecc_min.benchmark.entries import as_sampled
from purecc_min.registry import is_held


def test_a_bound_method_never_moves_a_text_without_the_token(cheap, tmp_path):
    """Neither in training nor in sampling; and a LoRA that is switched off is the base model there too."""
    data, pipe = set_up("striped_cat").data, set_up("striped_cat").pipe
    x_t, t = torch.randn(4, 16, 16, 16), torch.full((4,), 0.4)
    for name in ("bound", "bound-paper", "token", "switched-off", "lora"):
        cell = Cell("striped_cat", name, steps=2)
        for _, thetas, _ in train_cell(cell, learn_theta_1(cell, tmp_path)):
            pass
        who = as_sampled(ALL[name], thetas)
        drawn, kept = who["theta"](x_t, t, data.texts.base), pipe.velocity(x_t, t, data.texts.base)
        assert torch.equal(drawn, kept) == is_held(ALL[name]) == (name != "lora")
        assert who["theta_null"] == pipe.velocity
    assert as_sampled(ALL["lora"], thetas, "own empty text") == {"theta": thetas.theta}


def test_what_is_the_base_models_by_construction_is_measured_without_drawing_it(cheap, tmp_path):
    """With [V] a switched-off LoRA draws what the LoRA draws, and without [V] what the original draws."""
    changes = (("learning_rate", 1e-3), ("rank", 2))
    on, off = (run_cell(Cell("striped_cat", name, 0, changes, steps=2), tmp_path)["ways"][""]["2"]
               for name in ("lora", "switched-off"))
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

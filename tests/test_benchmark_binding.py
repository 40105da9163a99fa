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
        said = data.texts.complete               # with [V] a switched-off LoRA is the LoRA
        assert torch.equal(who["theta"](x_t, t, said), thetas.theta(x_t, t, said))
    assert as_sampled(ALL["lora"], thetas, "own empty text") == {"theta": thetas.theta}


def test_what_is_the_base_models_by_construction_is_measured_without_drawing_it(cheap, tmp_path):
    cell = Cell("striped_cat", "switched-off", steps=2, on_the_way=False)
    values = run_cell(cell, tmp_path)["ways"][""]["2"]
    assert values["class drift"] == values["drift"] == values["path KL"] == 0 < values["outside change"]


def test_a_bound_extractor_teaches_a_bound_model(cheap):
    for name, method in ALL.items():
        teacher = theta_1_cell(Cell("striped_cat", name))
        if method.extractor is None:
            assert teacher is None
        else:                                    # but pairs ask a LoRA, which knows the concept everywhere
            assert (ALL[teacher.method].where == method.where) != method.imagines, name

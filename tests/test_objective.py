"""The identities of the method, each on random tensors in float64."""

import math

import pytest
import torch

from purecc_min.objective import cosine, inner, lambda_star, purecc_terms, total_loss, v_purecc
from tinyflow.flow import squared_error

SHAPE = (3, 2, 4, 4)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def test_lambda_star_minimises_equation_11(draw):
    R_complete, R_target = draw(), draw()
    lam = lambda_star(R_complete, R_target)
    at = lambda l: (R_complete - v_purecc(torch.zeros_like(R_target), l, R_target)).square().flatten(1).sum(1)
    for other in (lam + 1e-3, lam - 1e-3):
        assert (at(lam) < at(other)).all()


def test_lambda_star_is_per_sample_and_hits_its_known_values(draw):
    R = draw()
    scale = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(lambda_star(scale[:, None, None, None] * R, R), scale)            # 1 when equal; negative is allowed
    orthogonal = draw()
    orthogonal -= v_purecc(torch.zeros_like(R), lambda_star(orthogonal, R), R)
    assert lambda_star(orthogonal, R).abs().max() < 1e-12


def test_the_loss_is_the_squared_rejection(draw):
    """With lambda* inserted, L_PureCC = ||R_c||^2 sin^2(angle) / (values a sample): nothing along the target direction is left."""
    v_complete, v_original, R_target = draw(), draw(), draw()
    terms = purecc_terms(v_complete, v_original, R_target)
    R = v_complete - v_original
    sin_squared = 1 - cosine(R, R_target) ** 2
    expected = (inner(R, R) * sin_squared).mean() / math.prod(SHAPE[1:])
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=0)
    assert inner(terms.v_pure - v_complete, R_target).abs().max() < 1e-10


def test_envelope_theorem_detaching_lambda_changes_no_gradient(draw):
    v_complete, v_original, R_target = draw(), draw(), draw()

    def gradient(detach):
        v = v_complete.clone().requires_grad_(True)
        lam = lambda_star(v - v_original, R_target)
        loss = (v_purecc(v_original, lam.detach() if detach else lam, R_target) - v).square().mean()
        return torch.autograd.grad(loss, v)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-14)


def test_an_attached_v_original_receives_the_opposite_gradient(draw):
    v_complete, v_original, R_target = draw().requires_grad_(True), draw().requires_grad_(True), draw()
    on_complete, on_original = torch.autograd.grad(purecc_terms(v_complete, v_original, R_target).loss, (v_complete, v_original))
    assert on_complete.abs().max() > 1e-3
    torch.testing.assert_close(on_original, -on_complete)


def test_the_loss_never_pulls_along_the_target(draw):
    v_complete, v_original, R_target = draw().requires_grad_(True), draw(), draw()
    gradient, = torch.autograd.grad(purecc_terms(v_complete, v_original, R_target).loss, v_complete)
    assert inner(gradient, R_target).abs().max() < 1e-8


@pytest.mark.parametrize("a", [0.01, -3.0, 200.0])
def test_scaling_the_target_scales_lambda_and_leaves_v_purecc(draw, a):
    v_complete, v_original, R_target = draw(), draw(), draw()
    one, scaled = purecc_terms(v_complete, v_original, R_target), purecc_terms(v_complete, v_original, a * R_target)
    torch.testing.assert_close(scaled.lam, one.lam / a)
    torch.testing.assert_close(scaled.v_pure, one.v_pure)


def test_a_vanishing_target_gives_zero_and_no_nan(draw):
    v_complete, v_original, R_target = draw().requires_grad_(True), draw(), draw()
    R_target[1] = 0
    R_target.requires_grad_(True)
    lam = lambda_star(v_complete - v_original, R_target)
    assert lam[1] == 0 and lam[0] != 0
    loss = (v_purecc(v_original, lam, R_target) - v_complete).square().mean()
    for gradient in torch.autograd.grad(loss, (v_complete, R_target)):
        assert gradient.isfinite().all()
    assert cosine(torch.zeros(SHAPE), torch.zeros(SHAPE)).tolist() == [0, 0, 0]


def test_gradient_matches_finite_differences(draw):
    v_original, R_target = draw(), draw()
    mean_square = lambda v: (v_purecc(v_original, lambda_star(v - v_original, R_target), R_target) - v).square().mean()
    assert torch.autograd.gradcheck(mean_square, (draw().requires_grad_(True),), eps=1e-6, atol=1e-8)


def test_bf16_predictions_are_compared_in_fp32():
    """bf16 has eight bits: a sum of 257 ones would come out as 256 or 258."""
    ones = torch.ones(1, 1, 1, 257, dtype=torch.bfloat16)
    assert inner(ones, ones).item() == 257 and lambda_star(ones, ones).dtype == torch.float32


def test_a_constant_lambda_replaces_lambda_star(draw):
    v_complete, v_original, R_target = draw(), draw(), draw()
    terms = purecc_terms(v_complete, v_original, R_target, fixed_lambda=3.0)
    torch.testing.assert_close(terms.v_pure, v_original + 3 * R_target)
    torch.testing.assert_close(terms.loss, squared_error(v_original + 3 * R_target, v_complete))
    assert total_loss(torch.tensor(2.0), torch.tensor(3.0), eta=0.5) == 3.5

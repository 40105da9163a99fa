"""The identities of the method, each on random tensors in float64, by the very function that trains."""

import math

import pytest
import torch

from purecc_min.ablations import constant_lambda, not_detached, untouched_original
from purecc_min.branch import Thetas
from purecc_min.concept import Batch, Texts
from purecc_min.methods import log_of
from purecc_min.objective import inner, lambda_star, pcc_loss
from tinyflow.flow import expand, squared_error
from tinyflow.pipeline import Text

SHAPE = (3, 2, 4, 4)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


# Each text says its number and its rows, so that a stub can look up what to predict.
ROWS, NOWHERE = torch.arange(3)[:, None], torch.zeros(3, 1)
TEXTS = Texts(*(Text(torch.full((3, 1, 1), number), ROWS, NOWHERE, NOWHERE) for number in range(4)))


def predicts(**predictions):
    """A theta that predicts what it is told for each text; it fails if it is asked for another text."""
    def theta(x_t, t, text):
        names = [Texts._fields[number] for number in text.context[:, 0, 0].tolist()]
        return torch.stack([predictions[name][row] for name, row in zip(names, text.pooled[:, 0].tolist())])
    return theta


def batch_of(v):
    return Batch(torch.zeros(SHAPE), torch.zeros(3), v, TEXTS)


def step(v_complete, v_original, v_tar, v_null, v, eta=1.0):
    theta_1, theta_2 = predicts(target=v_tar, null=v_null), predicts(complete=v_complete, base=v_original)
    return pcc_loss(theta_1, theta_2, batch_of(v), eta)


def test_the_step_is_equations_8_to_15(draw):
    v_complete, v_original, v_tar, v_null, v = (draw() for _ in range(5))
    loss, terms = step(v_complete, v_original, v_tar, v_null, v, eta=0.5)
    R_target, R_complete = v_tar - v_null, v_complete - v_original
    lam = torch.stack([(c * r).sum() / (r * r).sum() for c, r in zip(R_complete, R_target)])
    v_purecc = v_original + lam.view(3, 1, 1, 1) * R_target
    torch.testing.assert_close((terms.R_target, terms.R_complete, terms.lam), (R_target, R_complete, lam))
    torch.testing.assert_close(terms.v_purecc, v_purecc)
    expected = (v_complete - v).square().mean() + 0.5 * (v_purecc - v_complete).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert terms.loss_cc + 0.5 * terms.loss_purecc == loss


def test_ablations_replace_one_part_of_the_papers_loss(draw):
    """Equations 8 to 15 stand once, in pcc_loss; an ablation calls it with another lambda or theta."""
    v_complete, v_original, v_tar, v_null, v, v_before = (draw() for _ in range(6))
    theta_1, theta_2 = predicts(target=v_tar, null=v_null), predicts(complete=v_complete, base=v_original)
    thetas = Thetas(predicts(base=v_before), theta_1, theta_2)
    _, log = constant_lambda(3.0)(thetas, batch_of(v), 2.0)
    expected = squared_error(v_original + 3 * (v_tar - v_null), v_complete)
    assert log["lambda"] == 3 and log["loss_purecc"] == expected
    loss, log = untouched_original(thetas, batch_of(v), 2.0)
    again, terms = step(v_complete, v_before, v_tar, v_null, v, eta=2.0)
    assert torch.equal(loss, again) and log == log_of(terms)
    loss, _ = step(v_complete, v_original, v_tar, v_null, v, eta=2.0)
    assert torch.equal(not_detached(thetas, batch_of(v), 2.0)[0], loss)


def test_lambda_star_minimises_equation_11_for_each_sample(draw):
    R, R_complete = draw(), draw()
    scale = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)  # 1 when both are equal; it may be negative
    torch.testing.assert_close(lambda_star(expand(scale, R) * R, R), scale)
    lam = lambda_star(R_complete, R)
    rejection, farther, nearer = (R_complete - expand(lam + step, R) * R for step in (0, 1e-3, -1e-3))
    assert (inner(rejection, rejection) < inner(farther, farther)).all()
    assert (inner(rejection, rejection) < inner(nearer, nearer)).all()
    assert lambda_star(rejection, R).abs().max() < 1e-12


def test_the_loss_is_the_squared_rejection_and_never_pulls_along_the_target(draw):
    """With lambda* put in, L_PureCC = |R_complete|^2 sin^2(angle): nothing along R_target is left."""
    v_complete, v_original, v_tar, v_null, v = (draw() for _ in range(5))
    _, terms = step(v_complete.requires_grad_(True), v_original, v_tar, v_null, v)
    R = (v_complete - v_original).detach()
    sin_squared = 1 - torch.cosine_similarity(R.flatten(1), terms.R_target.flatten(1)) ** 2
    expected = (inner(R, R) * sin_squared).mean() / math.prod(SHAPE[1:])
    torch.testing.assert_close(terms.loss_purecc.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(log_of(terms)["rejection"], expected)
    assert inner(terms.v_purecc - v_complete, terms.R_target).abs().max() < 1e-10
    gradient, = torch.autograd.grad(terms.loss_purecc, v_complete)
    assert inner(gradient, terms.R_target).abs().max() < 1e-8 < gradient.abs().max()


def test_envelope_theorem_detaching_lambda_changes_no_gradient(draw):
    v_complete, v_original, R_target = draw(), draw(), draw()

    def gradient(detach):
        v = v_complete.clone().requires_grad_(True)
        lam = lambda_star(v - v_original, R_target)
        v_purecc = v_original + expand(lam.detach() if detach else lam, R_target) * R_target
        return torch.autograd.grad((v_purecc - v).square().mean(), v)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-14)


def test_v_original_and_the_extractor_receive_no_gradient(draw):
    """The paper does not say whether v_original does. In ablations.not_detached it receives the opposite."""
    predictions = [draw().requires_grad_(True) for _ in range(4)]
    v_complete, v_original, v_tar, v_null = predictions
    loss, _ = step(*predictions, draw())
    on_complete, *others = torch.autograd.grad(loss, predictions, allow_unused=True)
    assert on_complete.abs().max() > 1e-3 and others == [None, None, None]
    theta_1, theta = predicts(target=v_tar, null=v_null), predicts(complete=v_complete, base=v_original)
    _, log = not_detached(Thetas(None, theta_1, theta), batch_of(draw()), eta=1.0)
    on_complete, on_original = torch.autograd.grad(log["loss_purecc"], (v_complete, v_original))
    assert on_complete.abs().max() > 1e-3
    torch.testing.assert_close(on_original, -on_complete)


@pytest.mark.parametrize("a", [-0.01, 200.0])
def test_scaling_the_target_scales_lambda_and_leaves_v_purecc(draw, a):
    v_complete, v_original, R_target, v = draw(), draw(), draw(), draw()
    _, one = step(v_complete, v_original, R_target, torch.zeros(SHAPE), v)
    _, scaled = step(v_complete, v_original, a * R_target, torch.zeros(SHAPE), v)
    torch.testing.assert_close(scaled.lam, one.lam / a)
    torch.testing.assert_close(scaled.v_purecc, one.v_purecc)


def test_a_vanishing_target_gives_zero_and_no_nan(draw):
    v_complete, v_original, R_target = draw().requires_grad_(True), draw(), draw()
    R_target[1] = 0
    R_target.requires_grad_(True)
    lam = lambda_star(v_complete - v_original, R_target)
    assert lam[1] == 0 and lam[0] != 0
    loss = (v_original + expand(lam, R_target) * R_target - v_complete).square().mean()
    for gradient in torch.autograd.grad(loss, (v_complete, R_target)):
        assert gradient.isfinite().all()


def test_bf16_predictions_are_compared_in_fp32():
    """bf16 has eight bits: a sum of 257 ones would come out as 256 or 258."""
    ones = torch.ones(1, 1, 1, 257, dtype=torch.bfloat16)
    assert inner(ones, ones).item() == 257 and lambda_star(ones, ones).dtype == torch.float32

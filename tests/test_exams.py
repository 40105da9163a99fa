"""Exams and problems: each number of their keys is computed here from the question's own numbers."""

import re
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from purecc_min.benchmark.cells import shipped_results
from purecc_min.benchmark.tables import mean_and_interval, pairs_at_equal_fidelity
from purecc_min.measure.toy import HELD_OUT
from purecc_min.objective import inner, lambda_star
from tinyflow import flow
from tinyflow.mmdit import Block
from tinyflow.picturebook.model import load_tiny
from tutorials.build import FOLDER

TEACHING = FOLDER / "teaching"
EXAMS = ("exam", "exam_second")
FRONTS = {"exam": ([(0.4, 0.10), (0.6, 0.30)], [(0.3, 0.05), (0.5, 0.15)]),         # of question 13
          "exam_second": ([(0.5, 0.10), (0.7, 0.30)], [(0.5, 0.08), (0.6, 0.18)])}


def page(name: str) -> str:
    return (TEACHING / name).read_text(encoding="utf-8")


def answers(name: str) -> dict[str, str]:
    """number or letter -> the text of its key, on one line."""
    parts = re.split(r"\n\*\*(\w+)\.\*\*", page(name))
    return {number: " ".join(text.split()) for number, text in zip(parts[1::2], parts[2::2])}


def test_what_a_teacher_hands_out_has_its_keys():
    def numbers(file):
        return re.findall(r"^\*\*(\w+)[.*]", page(file), re.MULTILINE)

    for exam in EXAMS:
        assert numbers(f"{exam}.md") == numbers(f"{exam}_keys.md") == [str(n) for n in range(1, 15)]
    assert [name[0] for name in numbers("problems.md")] == numbers("problem_keys.md") == list("ABCDEFGH")


@pytest.mark.parametrize("exam", EXAMS)
def test_an_answer_has_five_points_and_no_half_ones(exam):
    for number, answer in answers(f"{exam}_keys.md").items():
        points = [int(point) for point in re.findall(r"\[([^\]]*)\]", answer) if point.isdigit()]
        assert sum(points) == 5 or "One point each, any five" in answer, (number, points)
        parts = re.findall(r"\(([a-e])\)", answers(f"{exam}.md")[number])
        assert number == "14" or set(parts) <= set(re.findall(r"\(([a-e])\)", answer)), number


def numeric_keys(exam: str) -> dict[str, list[str]]:
    """question -> what its key has to say, computed from the question's own numbers."""
    first = exam == "exam"
    a, x, t = (2, 3, Fraction(1, 2)) if first else (-1, 1, Fraction(1, 4))
    velocity = (x - a) / t
    assert x - t * velocity == a
    data = torch.tensor([1.0, -1.0] if first else [-3.0, 0.0, 3.0])
    null, text = torch.tensor([[1.0, 0], [2, 2]] if first else [[0, 1.0], [1, -1]])
    guided = [flow.guide(null, text, g).int().tolist() for g in ((0, 1, 3) if first else (0, 1, 2))]
    side, channels, T = (16, 16, 44) if first else (8, 4, 20)
    N = (side // 2) ** 2
    width_in, width_out, r = (128, 384, 4) if first else (256, 256, 8)
    lora, whole = r * (width_in + width_out), width_in * width_out
    forward, backward = (4, 1) if first else (4, 2)
    v_o, v_c, R_t = torch.tensor([[1.0, 1], [4, 5], [2, 0]] if first else [[1, 0], [3, 3.0], [0, 2]])
    R_c = v_c - v_o
    lam = lambda_star(R_c[None], R_t[None])
    v_p = v_o + lam * R_t
    ((low, below), (high, above)), (begun, (level, damage)) = FRONTS[exam]
    assert level < high and all(f"({fidelity}, {cost:.2f})" in answers(f"{exam}.md")["13"]
                                for fidelity, cost in ((low, below), begun))
    read = below + (level - low) / (high - low) * (above - below)

    def numbers(values):
        return f"({', '.join(str(int(value)) for value in values)})"

    def counted(number):
        return f"{number:,}".replace(",", "{,}")

    return {
        "1": [f"= {velocity}", f"= {a} = a"],
        "2": [f"${data.var(unbiased=False):.0f}$"],
        "3": [numbers(values) for values in guided],
        "4": [f"= {N}$", f"{4 * channels}$ numbers", counted((N + T) ** 2), counted(N * T)],
        "7": [counted(lora), counted(whole), f"{100 * lora / whole:.3g} %", f"\\tfrac1{r}", f"\\alpha = {r}"],
        "8": [f"{forward} and {backward}", str(Fraction(forward + 2 * backward, 3))],
        "9": [numbers(R_c), f"= {lam.item():.1f}", numbers(v_p), f"= {flow.squared_error(v_p, v_c):.0f}$",
              numbers(v_c - v_p)],
        "13": [f"{level}", f"{read:.2f}", f"{damage:.2f}"],
    }


@pytest.mark.parametrize("exam", EXAMS)
def test_each_number_of_a_key_is_computed(exam):
    keys = answers(f"{exam}_keys.md")
    for number, wanted in numeric_keys(exam).items():
        for text in wanted:
            assert text in keys[number], (number, text, keys[number])


def test_what_the_keys_of_both_exams_derive():
    """Scaling lambda*, the detached gradient, the common move, and v_original from elsewhere."""
    torch.manual_seed(0)
    v_o, v_c, R_t = torch.randn(3, 1, 7, dtype=torch.float64)

    def loss(v_c, v_o, R_t, detach=True, start=None):
        lam = lambda_star(v_c - v_o, R_t)
        lam = lam.detach() if detach else lam
        return ((v_o if start is None else start) + lam * R_t - v_c).square().mean()

    assert lambda_star(v_c - v_o, -5 * R_t).item() == pytest.approx(-lambda_star(v_c - v_o, R_t).item() / 5)
    assert loss(v_c, v_o, -5 * R_t).item() == pytest.approx(loss(v_c, v_o, R_t).item())
    v_p = v_o + lambda_star(v_c - v_o, R_t) * R_t
    assert inner(v_c - v_p, R_t).abs() < 1e-12
    thrice = v_o + 3 * (v_c - v_o)
    assert loss(thrice, v_o, R_t).item() == pytest.approx(9 * loss(v_c, v_o, R_t).item())
    delta = torch.randn(1, 7, dtype=torch.float64)
    assert loss(v_c + delta, v_o + delta, R_t).item() == pytest.approx(loss(v_c, v_o, R_t).item())
    assert abs(loss(v_c + delta, v_o, R_t) - loss(v_c, v_o, R_t)) > 1e-3
    assert loss(v_c + R_t, v_o, R_t).item() == pytest.approx(loss(v_c, v_o, R_t).item())

    def gradient(**options):
        moving = v_c.clone().requires_grad_()
        return torch.autograd.grad(loss(moving, v_o, R_t, **options), moving)[0]

    assert torch.allclose(gradient(), gradient(detach=False))
    base = torch.randn_like(v_o)
    assert not torch.allclose(gradient(start=base), gradient(start=base, detach=False), atol=1e-3)


def test_what_the_encoder_can_know():
    """Question 6 of the first exam: what stands before the changed word cannot differ."""
    with torch.no_grad():
        text = load_tiny().encode_text([f"a big {colour} cat in the snow" for colour in ("red", "blue")])
    red, blue = text.context
    moved = (red - blue).abs().amax(-1)
    assert not moved[:3].any() and (moved[3:8] > 0.1).all()              # begin, a, big; red ... snow


def test_problem_b_counts_what_torch_counts():
    D, T, counted = 128, 44, []
    for N in (64, 256):
        inputs = torch.randn(1, N, D), torch.randn(1, T, D), torch.randn(1, D)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            Block(D, 4, qk_norm=True, dual=False, last=False)(*inputs)
        counted.append(counter.get_flop_counts()["Global"])
        attention, rest = 2 * (N + T) ** 2 * D, 12 * (N + T) * D ** 2 + 12 * D ** 2
        assert sorted(counted[-1].values()) == sorted((2 * attention, 2 * rest))
    key = answers("problem_keys.md")["B"]
    assert f"{(256 + T) / (64 + T):.2f} and {((256 + T) / (64 + T)) ** 2:.2f}" in key


def test_problem_c_finds_two_texts_of_one_picture():
    pipe = load_tiny()
    texts = re.findall(r'"(a big red cat[^"]*)"', " ".join(page("problems.md").split()))
    same, swapped, other = pipe.encode_text(texts).context

    def moved(context):
        return ((same - context).square().mean() / same.square().mean()).sqrt().item()

    key = answers("problem_keys.md")["C"]
    for context in (swapped, other):
        assert f".{100 * moved(context):.0f} of" in key, moved(context)
    one, two, three = (pipe.decode(pipe.sample(pipe.encode_text([text] * 2), seeds=[0, 1], steps=8))
                       for text in texts)
    assert (one - two).square().mean().sqrt() < 0.1 * (one - three).square().mean().sqrt()


def test_problem_f_ends_where_its_key_says():
    R_t, v_o, v = torch.tensor([[2.0, 0], [1, 1], [2, 3]], dtype=torch.float64)[:, None]

    def descend(eta, with_cc):
        v_c = torch.tensor([[4.0, 5.0]], dtype=torch.float64, requires_grad=True)
        for _ in range(1000):
            lam = lambda_star(v_c - v_o, R_t).detach()
            loss = eta * (v_o + lam * R_t - v_c).square().mean() + with_cc * (v_c - v).square().mean()
            v_c.data -= 0.05 * torch.autograd.grad(loss, v_c)[0]
        return v_c.detach()[0].tolist()

    assert descend(1, 0) == pytest.approx([4, 1])
    for eta in (0.5, 2):
        assert descend(eta, 1) == pytest.approx([2, (3 + eta) / (1 + eta)])
    assert "(4, 1)" in (key := answers("problem_keys.md")["F"]) and "(3 + \\eta)/(1 + \\eta)" in key


def test_problem_h_has_two_intervals():
    runs = [run for run in shipped_results().values() if run.get("concept") in HELD_OUT and "snapshots" in run
            and not run["changes"] and run["steps"] == 200]
    of_concept = defaultdict(list)
    for run, ours, theirs in pairs_at_equal_fidelity(runs, "bound-half", "bound"):
        of_concept[run["concept"]].append(ours["outside change"] - theirs["outside change"])
    assert len(of_concept) == 4 and {len(values) for values in of_concept.values()} == {5}
    means = [sum(values) / 5 for values in of_concept.values()]
    pairs = [value for values in of_concept.values() for value in values]
    key = answers("problem_keys.md")["H"]
    for values in (means, pairs):
        mean, half = mean_and_interval(values)
        assert f"$-{abs(mean):.3f} \\pm {half:.3f}$".replace("0.", ".") in key

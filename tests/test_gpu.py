"""The command that measures a card, in toy sizes on a CPU: it has to work on the day when a card is there."""

import re

from tests import gpu


def test_every_row_of_the_table_is_measured(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "card.md")]) == 0
    head, *rows = [line for line in (tmp_path / "card.md").read_text().splitlines() if line.startswith("| ")]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert "mean nothing" in capsys.readouterr().out.splitlines()[0]
    assert head == "| what | measured | beside it |"
    assert all(re.search(r"\d|flash", measured) for _, measured, *_ in cells)
    said = " ".join(rows)
    for what in ("joint attention", "CLIP", "T5", "diffusers", "stage 1", "stage 2", "counted", "a picture"):
        assert what in said, what


def test_what_does_not_fit_or_fails_says_so_and_the_rest_goes_on(monkeypatch, capsys):
    def too_large(case):
        yield "first", "1", ""
        raise gpu.torch.OutOfMemoryError("no room")

    def wrong(case):
        yield "second", "2", ""
        assert False, "too much memory"

    def measured(case):
        yield "third", "3", ""

    monkeypatch.setattr(gpu, "measurements", lambda case: [(call.__name__, call, case)
                                                           for call in (too_large, wrong, measured)])
    assert gpu.main([]) == 1
    rows = capsys.readouterr().out.splitlines()[4:]
    assert rows[:5] == ["| first | 1 |  |", "| too_large | does not fit on this card |  |",
                        "| second | 2 |  |", "| wrong | FAILED | too much memory |", "| third | 3 |  |"]


def test_the_case_has_the_size_of_sd35_medium():
    from tinyflow.sd3.load import SD35_MEDIUM
    ours = gpu.CARD.config
    for name in ("channels", "patch", "width", "depth", "heads", "context_width", "pooled_width", "qk_norm",
                 "dual_attention_layers"):
        assert getattr(ours, name) == getattr(SD35_MEDIUM, name), name
    assert gpu.pixels(gpu.CARD) == 512 and gpu.CARD.tokens == 333


def test_a_plain_kernel_is_an_error(monkeypatch):
    """A bias on the joint attention once would have cost the flash kernel; nobody would have seen it."""
    def plain(q, k, v, *args, **options):
        return gpu.torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", plain)
    row, went_well = next(gpu.rows_of(gpu.TOY))
    assert row[1] == "FAILED" and not went_well

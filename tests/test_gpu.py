"""The command that measures a card, in toy sizes on a CPU: it has to work on the day when a card is there."""

import re
from dataclasses import replace

from tests import gpu
from tinyflow.sd3.load import SD35_MEDIUM


def test_every_row_of_the_table_is_measured(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "card.md")]) == 0
    assert "mean nothing" in capsys.readouterr().out.splitlines()[0]
    _, *rows = [line for line in (tmp_path / "card.md").read_text().splitlines() if line.startswith("| ")]
    assert all(re.search(r"\d|flash|equal", row.split(" | ")[1]) for row in rows)
    said = " ".join(rows)
    for what in ("joint attention", "CLIP", "T5", "diffusers", "stage 1", "stage 2", "counted", "released",
                 "a picture", "pretraining", "steps of a LoRA", "equal bit for bit"):
        assert what in said, what


def test_what_does_not_fit_or_fails_says_so_and_the_rest_goes_on(monkeypatch, capsys):
    def measured(error):
        yield "begun", "1", ""
        if error:
            raise error

    ends = [("large", measured, gpu.torch.OutOfMemoryError("no room")),
            ("wrong", measured, AssertionError("too much")), ("right", measured, None)]
    monkeypatch.setattr(gpu, "measurements", lambda case: ends)
    assert gpu.main([]) == 1
    begun = "| begun | 1 |  |"
    assert capsys.readouterr().out.splitlines()[4:9] == [
        begun, "| large | does not fit on this card |  |", begun, "| wrong | FAILED | too much |", begun]


def test_the_case_has_the_size_of_sd35_medium():
    ours = replace(gpu.CARD.config, max_grid=SD35_MEDIUM.max_grid, base_grid=SD35_MEDIUM.base_grid)
    assert ours == SD35_MEDIUM and gpu.pixels(gpu.CARD) == 512 and gpu.CARD.tokens == 333


def test_a_plain_kernel_is_an_error(monkeypatch):
    """A bias on the joint attention once would have cost the flash kernel; nobody would have seen it."""
    def plain(q, k, v, *args, **options):
        return gpu.torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", plain)
    row, went_well = next(gpu.rows_of(gpu.TOY))
    assert row[1] == "FAILED" and not went_well

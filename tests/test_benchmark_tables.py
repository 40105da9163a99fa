"""From results to tables and verdicts: fidelity, fronts, intervals, the paper's claims."""

import re

import numpy as np
import pytest

from purecc_min.benchmark import page, tables
from purecc_min.benchmark.claims import CLOSE, COMPARISONS, Claim, bound, claims
from purecc_min.benchmark.entries import FURTHER, MAIN
from purecc_min.benchmark.plans import VARIED, plan
from purecc_min.benchmark.report import further_text, gather, phrase_text
from purecc_min.benchmark.tables import add_fidelity, at_similarity, equal_fidelity, mean_and_interval, score
from purecc_min.measure.measures import MEASURES


def run(concept, method, seed, *similarities, **others):
    snapshots = {str(step): {"similarity": value, **{name: factor * value for name, factor in others.items()}}
                 for step, value in enumerate(similarities, start=1)}
    return dict(concept=concept, method=method, seed=seed, changes={}, steps=200, on_the_way=True,
                way="", snapshots=snapshots)


def test_fidelity_is_0_for_nothing_and_1_for_perfect():
    results = [run("c", "nothing", 0, 0.2), run("c", "perfect", 0, 0.8), run("c", "lora", 0, 0.35, 0.5)]
    add_fidelity(results)
    fidelities = [values["fidelity"] for result in results for _, values in tables.front(result)]
    assert fidelities == pytest.approx([0, 1, 0.25, 0.5])


def test_damage_at_a_similarity_is_read_off_the_front_at_its_first_crossing():
    result, nothing = run("c", "lora", 0, 0.4, 0.8, 0.6, drift=10), {"similarity": 0.0, "drift": 0.0}
    for similarity in (0.1, 0.4, 0.6, 0.8):
        assert at_similarity(result, similarity, nothing)["drift"] == pytest.approx(10 * similarity)
    assert at_similarity(result, 0.81, nothing) is None
    assert at_similarity(result, -0.5, nothing) == nothing       # stopped before the first step


def test_methods_are_compared_where_the_weaker_one_ends():
    """The stronger run is stopped early, so a damage that grows with fidelity alone makes no difference."""
    names = dict.fromkeys((*tables.DAMAGES, "retention, held out", "text kept", "mask IoU", "composition"), 1)
    results = [run("c", "nothing", 0, 0.0, **names), run("c", "perfect", 0, 1.0, **names)]
    ends = (("paper", 0.6), ("lora", 0.7), ("DreamBooth", 0.4))
    results += [run("c", method, seed, 0.3, end, **names) for seed in range(2) for method, end in ends]
    add_fidelity(results)
    pairs = [("DreamBooth", "paper"), ("lora", "paper"), ("token", "paper")]
    rows = [[cell.strip() for cell in row.strip("|").split("|")]
            for table in equal_fidelity(results, pairs).split("\n\n") for row in table.splitlines()[2:]]
    both = [["DreamBooth minus paper", "0.40"], ["lora minus paper", "0.60"]]     # no token was run
    assert rows and [row[:2] for row in rows] == both * (len(rows) // 2)
    assert all(cell == "0" or cell.startswith(("+0.0", "-0.0")) for row in rows for cell in row[2:])


def test_the_score_is_0_without_fidelity_and_1_without_damage():
    best = dict.fromkeys(MEASURES, 0.0) | {"fidelity": 1.0}
    assert score(best) == 1 and score(best | {"fidelity": 0.0}) == 0
    assert score(best | {"class leak": 0.5}) < 1 and score(best | {"drift": 0.05}) < 1


def test_intervals_are_students_and_verdicts_look_at_the_whole_interval():
    assert mean_and_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.30 / 3**0.5))
    assert np.isnan(mean_and_interval([1.0])[1])
    for values, equal, verdict in (([0.1, 0.11, 0.12], False, "holds"),
                                   ([-0.1, -0.11, -0.12], False, "does not hold"),
                                   ([0.1, -0.1, 0.0], False, "depends"),
                                   ([0.0, 0.0, 0.0], False, "does not hold"),    # no difference is not "more"
                                   ([CLOSE / 9, 0.0, -CLOSE / 9], True, "holds"),
                                   ([0.1, 0.11, 0.12], True, "does not hold")):
        assert Claim("", "", "", values, equal).verdict() == verdict


def test_each_further_method_is_compared_with_what_it_varies():
    for entry in FURTHER.values():
        assert entry.beside and set(entry.beside) <= set(VARIED) <= set(MAIN)
    text = further_text([run("striped_cat", "paper", 0, 1.0), run("striped_cat", "nothing", 0, 0.0)])
    rows = [line for line in text.splitlines() if "| released minus paper " in line]         # it was not run
    assert rows and not re.search(r"\d|nan", "".join(rows))


def test_every_claim_names_methods_and_measures_that_are_run():
    cells = {(cell.concept, cell.name) for cell in plan("claims")}
    for row in COMPARISONS:
        assert row.measure in MEASURES
        for method in {row.larger, row.smaller, bound(row.larger), bound(row.smaller)} - {None}:
            assert {(concept, method) for concept in row.concepts} <= cells, row


def test_the_shipped_parts_make_their_tables(tmp_path, monkeypatch):
    """`phrase` ended in an IndexError after all its cells, and in `tuning` the mean stood below a style."""
    text = phrase_text(gather(plan("phrase"), tmp_path, shipped=True))
    assert "bound, braces" in text.replace(" learning_rate=0.004 rank=4", "") and "at equal fidelity" in text
    monkeypatch.setattr(tables, "WIDE", 1000)    # one table
    table = tables.tuning_table(gather(plan("tuning"), tmp_path, shipped=True))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][-1] == "mean score" and {len(row) for row in rows} == {5}
    half = next(row for row in rows if row[0].startswith("bound-half"))
    assert half[3] == "" and float(half[4]) == pytest.approx((float(half[1]) + float(half[2])) / 2, abs=2e-3)


def test_a_run_with_fewer_steps_lacks_what_it_did_not_record():
    results = [dict(run("striped_cat", "paper", 0, 0.5), terms={"1": [{"lambda": 0.1}]})]
    assert [claim.values for claim in claims(results) if claim.where == "Sec. 4.4"] == [[], []]
    assert equal_fidelity([], [("bound", "token")]) == tables.terms_table([]) == ""


def test_the_pages_hold_the_tables_of_the_shipped_results(monkeypatch):
    for file, text in page.part_pages().items():
        assert file.read_text(encoding="utf-8") == text, file
    monkeypatch.setattr(tables, "WIDE", page.WIDE)
    known = page.all_tables()
    for file in page.PAGES:
        text = file.read_text(encoding="utf-8")
        assert "<!-- end -->" in text and page.filled(text, known) == text, file

"""The benchmark on a toy budget: every method, resuming, the tables' arithmetic, the README's recipes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from purecc_min import toy
from purecc_min.benchmark import __main__ as command
from purecc_min.benchmark import cells, methods, tables
from purecc_min.benchmark.cells import ALL, RESULTS, Cell, learned, run_cell, set_up, train_cell
from purecc_min.benchmark.claims import CLOSE, Claim, claims, difference
from purecc_min.benchmark.mechanism import study
from purecc_min.benchmark.methods import FURTHER, METHODS
from purecc_min.benchmark.pairs import PAIRS, slots_of, two_instances
from purecc_min.benchmark.plans import SEEDS, plan
from purecc_min.benchmark.tables import add_fidelity, at_similarity, equal_fidelity, mean_and_interval, score
from purecc_min.branch import Branch
from purecc_min.evaluate import MEASURES
from purecc_min.toy import HELD_OUT, TUNING
from tinyflow.weights import tensor_hash

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cheap(monkeypatch):
    """These tests are about the machinery, not about pictures."""
    monkeypatch.setattr(cells, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(methods, "IMAGINED", 2)
    set_up.cache_clear()
    yield
    set_up.cache_clear()


def without_time(result):
    return {**result, "seconds": None}


# ------------------------------------------------------------------------------------------------------ methods
@pytest.mark.parametrize("name", list(METHODS | FURTHER))
def test_every_method_trains_what_it_says_and_never_the_base(name, cheap, tmp_path):
    stage = set_up("checked_cat")
    before, cell = tensor_hash(stage.pipe.state_dict()), Cell("checked_cat", name, steps=2)
    theta_1 = learned(Cell("checked_cat", "LoRA", steps=2), stage, tmp_path) if ALL[name].extractor == "frozen" else None
    start = None
    for _, trial in train_cell(cell, stage, theta_1):
        start = start or {key: value.clone() for key, value in trial.theta.state_dict().items()}
    changed = {key.split(".")[0] for key, value in trial.theta.state_dict().items() if not torch.equal(value, start[key])}
    assert changed == {"adapters": {"lora", "embeddings"}, "embeddings": {"embeddings"}, "model": {"mmdit", "embeddings"}}[ALL[name].trains] \
        | ({"theta_1"} if ALL[name].extractor == "joint" else set())
    assert tensor_hash(stage.pipe.state_dict()) == before


def losses_of(name, stage, theta_1, **changes):
    cell = Cell("checked_cat", name, changes=tuple(changes.items()), steps=2)
    _, trial = next(train_cell(cell, stage, theta_1))
    return trial, ALL[name].losses, cell.extras()


def test_the_released_step_never_sees_the_extractors_adapters(cheap, tmp_path):
    stage = set_up("checked_cat")
    theta_1 = learned(Cell("checked_cat", "LoRA", steps=2), stage, tmp_path)
    trial, losses, _ = losses_of("released", stage, theta_1)
    batch = cells.Batch(torch.tensor([0, 1]), torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.6]), torch.randn(2, 3, 32, 32))
    before, paper = losses(trial, batch)["norm_R_target"], methods.paper(trial, batch)["norm_R_target"]
    for B in theta_1.lora.B.values():
        B.data.add_(0.1)
    assert losses(trial, batch)["norm_R_target"] == before and methods.paper(trial, batch)["norm_R_target"] != paper
    assert losses(trial, batch)["lambda"] == 1


def test_lambda_can_be_kept_from_falling_below_a_value(cheap, tmp_path):
    stage = set_up("checked_cat")
    trial, losses, _ = losses_of("lambda* at least 1", stage, learned(Cell("checked_cat", "LoRA", steps=2), stage, tmp_path))
    batch = cells.Batch(torch.tensor([0]), torch.randn(1, 3, 32, 32), torch.tensor([0.5]), torch.randn(1, 3, 32, 32))
    assert losses(trial, batch)["lambda"] >= 1 > methods.paper(trial, batch)["lambda"]


def test_asking_for_the_terms_changes_nothing(cheap, tmp_path):
    """Recording lambda* over t must not move what a method remembers or draws next."""
    stage = set_up("checked_cat")
    trial, losses, extras = losses_of("lambda* of t", stage, learned(Cell("checked_cat", "LoRA", steps=2), stage, tmp_path))
    before, state = {key: value.clone() for key, value in trial.running.items()}, trial.generator.get_state()
    rows = cells.terms_over_t(trial, losses, extras)
    assert [row["t"] for row in rows] == list(cells.TIMES) and torch.equal(trial.generator.get_state(), state)
    assert before.keys() == trial.running.keys() and all(torch.equal(before[key], trial.running[key]) for key in before)


# --------------------------------------------------------------------------------------------------------- cells
def test_a_cell_run_again_or_without_its_extractor_gives_the_same_result(cheap, tmp_path):
    cell, lora = Cell("checked_cat", "paper", steps=2), Cell("checked_cat", "LoRA", steps=2)
    run_cell(lora, tmp_path / "a")
    first = run_cell(cell, tmp_path / "a")
    assert first["snapshots"]["2"].keys() == MEASURES.keys() and len(first["terms"]["1"]) == len(cells.TIMES)
    assert without_time(run_cell(cell, tmp_path / "b")) == without_time(first)        # its extractor is trained on the way
    written = (tmp_path / "a" / cell.file).stat().st_mtime_ns
    assert run_cell(cell, tmp_path / "a") == first and (tmp_path / "a" / cell.file).stat().st_mtime_ns == written


def test_a_result_of_other_settings_is_not_taken(cheap, tmp_path, monkeypatch):
    cell = Cell("checked_cat", "nothing")
    run_cell(cell, tmp_path)
    assert cell.result(tmp_path) and Cell("checked_cat", "perfect").result(tmp_path) is None
    monkeypatch.setattr(cells, "SAMPLING_STEPS", 2)
    assert cell.result(tmp_path) is None


def test_the_two_ends_of_the_scale(cheap, tmp_path):
    nothing, perfect = (run_cell(Cell("checked_cat", end), tmp_path)["snapshots"]["0"] for end in ("nothing", "perfect"))
    for name, row in MEASURES.items():
        if row.nothing is not None:
            assert nothing[name] == pytest.approx(row.nothing, abs=1e-6)
    assert perfect["drift"] == perfect["path KL"] == perfect["class drift"] == 0


def test_the_plans_keep_tuning_and_held_out_concepts_apart():
    assert {cell.concept for cell in plan("tuning") + plan("further")} == set(TUNING)
    assert {cell.concept for cell in plan("main")} == set(HELD_OUT)
    runs = [cell for cell in plan("main") if cell.method in METHODS]
    assert len(runs) == len(set(runs)) == 4 * 5 * len(METHODS)
    for part in SEEDS:
        files = [cell.file for cell in set(plan(part))]
        assert len(files) == len(set(files))
    assert all(len(method.tries) == 3 and method.settings in method.tries for method in METHODS.values())            # the same budget


# -------------------------------------------------------------------------------------------------------- tables
def run(concept, method, seed, *similarities, **others):
    snapshots = {str(10 * n): {"similarity": s, **{k: v * s for k, v in others.items()}} for n, s in enumerate(similarities, start=1)}
    return dict(concept=concept, method=method, seed=seed, changes={}, steps=200, snapshots=snapshots)


def test_fidelity_is_0_for_nothing_and_1_for_perfect():
    results = [run("c", "nothing", 0, 0.2), run("c", "perfect", 0, 0.8), run("c", "LoRA", 0, 0.35, 0.5)]
    add_fidelity(results)
    assert [round(values["fidelity"], 6) for r in results for _, values in tables.front(r)] == [0, 1, 0.25, 0.5]


def test_damage_at_a_similarity_is_read_off_the_front_at_its_first_crossing():
    result, nothing = run("c", "LoRA", 0, 0.4, 0.8, 0.6, drift=10), {"similarity": 0.0, "drift": 0.0}
    for similarity in (0.1, 0.4, 0.6, 0.8):
        assert at_similarity(result, similarity, nothing)["drift"] == pytest.approx(10 * similarity)
    assert at_similarity(result, 0.81, nothing) is None
    assert at_similarity(result, -0.5, nothing) == nothing       # less similar than the original model: stopped before the first step


def test_methods_are_compared_where_the_weaker_one_ends():
    """The stronger run is stopped early, whichever it is; a damage that grows with fidelity alone makes no difference then."""
    names = dict.fromkeys((*tables.DAMAGES, "retention, held out", "layout", "mask IoU", "composition"), 1.0)
    results = [run("c", "nothing", 0, 0.0, **names), run("c", "perfect", 0, 1.0, **names)]
    ends = (("paper", 0.6), ("LoRA", 0.7), ("DreamBooth", 0.4))
    results += [run("c", method, seed, 0.3, end, **names) for seed in range(2) for method, end in ends]
    add_fidelity(results)
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in equal_fidelity(results).splitlines()[2:]}
    assert rows.keys() == {"LoRA", "DreamBooth"} and rows["LoRA"][0] == "0.60" and rows["DreamBooth"][0] == "0.40"
    assert all(cell.startswith(("+0.0", "-0.0")) for row in rows.values() for cell in row[1:])
    (stopped,) = {tables.final(r)["drift"] for r in tables.stopped_early(results)}
    assert stopped == pytest.approx(0.6)


def test_the_score_is_0_without_fidelity_and_1_without_damage():
    best = dict.fromkeys(MEASURES, 0.0) | {"layout": 1.0, "fidelity": 1.0}
    assert score(best) == 1 and score(best | {"fidelity": 0.0}) == 0 and score(best | {"class leak": 0.5}) < 1 > score(best | {"drift": 0.05})


def test_intervals_are_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)
    assert np.isnan(mean_and_interval([1.0])[1])


def test_verdicts_look_at_the_whole_interval():
    verdict = lambda values, equal=False: Claim("", "", values, equal).verdict()
    assert verdict([0.1, 0.11, 0.12]) == "holds" and verdict([-0.1, -0.11, -0.12]) == "does not hold" and verdict([0.1, -0.1, 0.0]) == "depends"
    assert verdict([0.0, 0.0, 0.0]) == "does not hold"           # no difference at all is not "more"
    assert verdict([CLOSE / 9, 0.0, -CLOSE / 9], True) == "holds" and verdict([0.1, 0.11, 0.12], True) == "does not hold"


def test_a_difference_pairs_concepts_and_seeds():
    results = [run("a", "paper", 0, 0.5), run("b", "paper", 0, 0.9), run("a", "LoRA", 0, 0.4), run("b", "LoRA", 0, 0.6), run("a", "paper", 1, 0.5)]
    assert difference(results, "paper", "LoRA", "similarity", ("a", "b")) == pytest.approx([0.2])


def test_slots_of_two_placeholders_are_told_apart(pipe):
    texts, readings = ["[W] big [V] cat"], {"[V]": "cat", "[W]": "a"}
    assert [slots_of(pipe, texts, token, readings)[0].nonzero().flatten().tolist() for token in ("[W]", "[V]")] == [[1], [3]]
    assert all(name in toy.CONCEPTS for names in PAIRS.values() for name in names)


def test_Y_alone_never_moves_the_base_text_and_adapters_do(cheap, tmp_path):
    moves = {name: study(Cell("checked_cat", name, steps=2), tmp_path)["base moves"] for name in ("embeddings alone", "LoRA")}
    assert moves["embeddings alone"] == 0 < moves["LoRA"]


def test_two_untrained_concepts_draw_what_the_base_draws_by_region(cheap):
    """Fresh branches change nothing: the left half answers the left text, the right half the right one."""
    stage = set_up("checked_cat")
    fresh = [Branch.fresh(stage.pipe, torch.zeros(6, 128), 1) for _ in range(2)]
    values, pictures = two_instances(stage.pipe, stage.reader, PAIRS["two instances"], fresh, together=True)
    assert values["base: right object, checked_cat"] > 0.8 and values["base: right object, cyclops_fish"] > 0.8
    assert values["base: traits, checked_cat"] < 0.5 and pictures.shape == (12, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------- shipped
def test_the_shipped_results_are_whole_and_of_these_weights_and_settings():
    for part in ("tuning", "main", "claims", "factors", "further"):
        missing = [cell.file for cell in plan(part) if cell.result(Path("nowhere"), shipped=True) is None]
        assert not missing, (part, missing[:3], len(missing))
    results = [cell.result(Path("nowhere"), shipped=True) for cell in plan("claims")]
    assert all(len(claim.values) >= 3 and np.isfinite(claim.values).all() for claim in claims(results))


def test_the_settings_are_those_that_won_on_the_tuning_concepts():
    results = [cell.result(Path("nowhere"), shipped=True) for cell in plan("tuning")]
    add_fidelity(results)
    for name, method in METHODS.items():
        mean = {str(dict(tries)): np.mean([score(tables.final(r)) for r in results if r["method"] == name and r["changes"] == tries])
                for tries in method.tries}
        assert max(mean, key=mean.get) == str(dict(method.settings)), (name, mean)


# ---------------------------------------------------------------------------------------------------- the README
def recipe(title):
    """The Python block below a heading of the README."""
    block = re.search(rf"### {title}\n.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    return block, len(block.strip().splitlines())


def test_a_method_is_added_by_the_readmes_recipe(cheap, tmp_path, monkeypatch):
    block, lines = recipe("A method of your own")
    assert lines < 30
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))
    exec(block, vars(methods).copy() | {"METHODS": methods.METHODS})
    (name,) = methods.METHODS.keys() - METHODS.keys()
    monkeypatch.setitem(ALL, name, methods.METHODS[name])
    assert run_cell(Cell("checked_cat", name, steps=1), tmp_path)["snapshots"]["1"].keys() == MEASURES.keys()


def test_a_concept_is_added_by_the_readmes_recipe(cheap, tmp_path, monkeypatch):
    block, lines = recipe("A concept of your own")
    assert lines < 20
    added = {}
    exec(block, vars(toy).copy() | {"TOYS": added})
    (name,) = added
    monkeypatch.setitem(toy.CONCEPTS, name, added[name])
    assert run_cell(Cell(name, "perfect"), tmp_path)["snapshots"]["0"]["sees concept"] >= 0


# --------------------------------------------------------------------------------------------------- the command
def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        command.main(list(arguments))
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(error) == 1, error
    return error[0]


def test_bad_input_is_one_line(capsys, monkeypatch):
    assert "'LoRa'" in refused(capsys, "--methods", "LoRa") and "'dog'" in refused(capsys, "--concepts", "dog")
    assert "main part" in refused(capsys, "claims", "--quick")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("figures", "report"):
        monkeypatch.delitem(sys.modules, f"purecc_min.benchmark.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    assert "pip install -r tutorials/requirements.txt" in refused(capsys, "--quick")


def test_a_killed_benchmark_leaves_no_workers_and_goes_on(tmp_path):
    """Workers once outlived their parent and kept the machine busy for minutes."""
    line = [sys.executable, "-m", "purecc_min.benchmark", "--quick", "--concepts", "checked_cat", "--steps", "2", "--out", str(tmp_path)]
    first = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("cells/*/*.json")):
        assert first.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {file: file.read_bytes() for file in tmp_path.glob("cells/*/*.json")}
    time.sleep(1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists() and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "min on" in again.stdout and "| paper |" in again.stdout and len(done) < 6
    assert all(file.read_bytes() == content for file, content in done.items())
    results = json.loads((tmp_path / "main" / "results.json").read_text())
    assert {r["method"] for r in results} == {"nothing", "perfect", "DreamBooth", "LoRA", "LoRA + anchor", "paper"}
    for name in ("results.csv", "table.md", "fronts.png", "curves.png", "samples-checked_cat.png", "figure8.png"):
        assert (tmp_path / "main" / name).stat().st_size > 100, name


def test_the_shipped_files_are_the_ones_the_package_installs():
    assert "results/*.json" in (ROOT / "pyproject.toml").read_text() and RESULTS.parent.name == "benchmark"

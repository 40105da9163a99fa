"""The benchmark on a toy budget: methods, resuming, the tables' arithmetic, pictures, and the recipes."""

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

from purecc_min.benchmark import __main__ as command
from purecc_min.benchmark import cells, entries, tables
from purecc_min.benchmark.cells import ALL, RESULTS, Cell, learned, run_cell, set_up, terms_over_t, train_cell
from purecc_min.benchmark.claims import CLOSE, Claim, claims, difference
from purecc_min.benchmark.entries import BINDING, MAIN, start
from purecc_min.benchmark.plans import QUICK, SEEDS, plan
from purecc_min.benchmark.tables import add_fidelity, at_similarity, equal_fidelity, mean_and_interval, score
from purecc_min.branch import Branch
from purecc_min.concept import Batch
from purecc_min.measure import toy
from purecc_min.measure.measures import MEASURES
from purecc_min.measure.toy import HELD_OUT, TUNING
from purecc_min.train import TrainConfig, optimizer_for
from tinyflow.flow import noise_for, predict_x_0
from tinyflow.weights import tensor_hash
from tutorials.experiments.mechanism import study
from tutorials.experiments.pairs import CASES, SECOND, two_instances

ROOT = Path(__file__).parent.parent


def without_time(result):
    return {**result, "seconds": None}


# ---------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize("name", list(ALL))
def test_every_method_trains_what_it_says_and_never_the_base(name, cheap, tmp_path):
    pipe, method = set_up("checked_cat").pipe, ALL[name]
    before, begun = tensor_hash(pipe.state_dict()), None
    theta_1 = learned(Cell("checked_cat", "LoRA", steps=2), tmp_path) if method.theta_1 == "frozen" else None
    for _, thetas, _ in train_cell(Cell("checked_cat", name, steps=2), theta_1):
        state = thetas.theta.state_dict()
        begun = begun or {key: value.clone() for key, value in state.items()}
    changed = {key.split(".")[0] for key, value in state.items() if not torch.equal(value, begun[key])}
    said = {"adapters": {"lora", "embeddings"}, "embeddings": {"embeddings"},
            "model": {"mmdit", "embeddings"}}
    joint = {"theta_1"} if method.theta_1 == "joint" else set()
    assert changed == said[method.trains] | joint
    assert tensor_hash(pipe.state_dict()) == before


def after_a_step(name, tmp_path):
    """The models and the loss of a method after its first step, and a batch."""
    theta_1 = learned(Cell("checked_cat", "LoRA", steps=2), tmp_path)
    _, thetas, loss = next(train_cell(Cell("checked_cat", name, steps=2), theta_1))
    texts = set_up("checked_cat").data.texts.rows(torch.tensor([0, 1]))
    x_t, v = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return thetas, loss, Batch(x_t, torch.tensor([0.3, 0.6]), v, texts)


def test_the_released_step_never_sees_the_extractors_adapters(cheap, tmp_path):
    thetas, loss, batch = after_a_step("released", tmp_path)
    before, paper = loss(thetas, batch, 2.0)[1], entries.paper(thetas, batch, 1.0)[1]
    for B in thetas.theta_1.lora.B.values():
        B.data.add_(0.1)
    assert loss(thetas, batch, 2.0)[1]["norm_R_target"] == before["norm_R_target"] and before["lambda"] == 1
    assert entries.paper(thetas, batch, 1.0)[1]["norm_R_target"] != paper["norm_R_target"]


def test_lambda_can_be_kept_from_falling_below_a_value(cheap, tmp_path):
    thetas, loss, batch = after_a_step("lambda* at least 1", tmp_path)
    assert loss(thetas, batch, 1.0)[1]["lambda"] >= 1 > entries.paper(thetas, batch, 1.0)[1]["lambda"]


def test_asking_for_the_terms_changes_nothing(cheap, tmp_path):
    """Recording lambda* over t must not move what a method remembers or draws next."""
    data, (thetas, loss, _) = set_up("checked_cat").data, after_a_step("lambda* of t", tmp_path)
    before = dict(loss.running)
    assert [row["t"] for row in terms_over_t(loss, thetas, data, 1.0)] == list(cells.TIMES)
    assert before.keys() == loss.running.keys()
    assert all(mean is loss.running[tenth] for tenth, mean in before.items())
    thetas, loss, _ = after_a_step("imagined scenes", tmp_path)
    state = loss.generator.get_state()
    terms_over_t(loss, thetas, data, 1.0)
    assert torch.equal(loss.generator.get_state(), state)


def test_every_Y_has_the_embeddings_learning_rate(cheap):
    """In merged stages theta_1's Y once had the adapters' rate.

    optimizer_for looked for theta_2's Y alone, so the extractor's Y, which is trained along, counted as an
    adapter and learned at another rate than the Y of every other method.
    """
    setup, config = set_up("checked_cat"), TrainConfig(learning_rate=0.25, embedding_learning_rate=0.5)
    theta = start(MAIN["merged stages"], setup.pipe, setup.data, config, None)
    others, embeddings = optimizer_for(theta, config).param_groups
    assert others["lr"] == 0.25 and embeddings["lr"] == 0.5
    assert {id(Y) for Y in embeddings["params"]} == {id(theta.embeddings.Y), id(theta.theta_1.embeddings.Y)}
    assert len(others["params"]) + 2 == len(list(theta.parameters()))


# ------------------------------------------------------------------------------------------------------ cells
def test_a_cell_run_again_or_without_its_extractor_gives_the_same_result(cheap, tmp_path):
    cell, lora = Cell("checked_cat", "paper", steps=2), Cell("checked_cat", "LoRA", steps=2)
    run_cell(lora, tmp_path / "a")
    first = run_cell(cell, tmp_path / "a")
    assert first["snapshots"]["2"].keys() == MEASURES.keys() and len(first["terms"]["1"]) == len(cells.TIMES)
    again = run_cell(cell, tmp_path / "b")       # its extractor is trained on the way
    assert without_time(again) == without_time(first)
    file = tmp_path / "a" / cell.file
    written = file.stat().st_mtime_ns
    assert run_cell(cell, tmp_path / "a") == first and file.stat().st_mtime_ns == written


def test_a_result_of_other_settings_is_not_taken(cheap, tmp_path, monkeypatch):
    cell = Cell("checked_cat", "nothing")
    run_cell(cell, tmp_path)
    assert cell.result(tmp_path) and Cell("checked_cat", "perfect").result(tmp_path) is None
    monkeypatch.setattr(cells, "SAMPLING_STEPS", 2)
    assert cell.result(tmp_path) is None


def test_the_two_ends_of_the_scale(cheap, tmp_path):
    nothing = run_cell(Cell("checked_cat", "nothing"), tmp_path)["snapshots"]["0"]
    perfect = run_cell(Cell("checked_cat", "perfect"), tmp_path)["snapshots"]["0"]
    for name, row in MEASURES.items():
        if row.nothing is not None:
            assert nothing[name] == pytest.approx(row.nothing, abs=1e-6)
    assert perfect["drift"] == perfect["path KL"] == perfect["class drift"] == 0


def test_the_plans_keep_tuning_and_held_out_concepts_apart():
    assert {cell.concept for cell in plan("tuning") + plan("further")} == set(TUNING)
    assert {cell.concept for cell in plan("main")} == set(HELD_OUT)
    runs = [cell for cell in plan("main") if cell.method in MAIN]
    assert len(runs) == len(set(runs)) == 4 * 5 * len(MAIN)
    for part in SEEDS:
        files = [cell.file for cell in set(plan(part))]
        assert len(files) == len(set(files))
    for method in MAIN.values():              # all have the same budget
        assert len(method.tries) == 3 and method.settings in method.tries


# ----------------------------------------------------------------------------------------------------- tables
def run(concept, method, seed, *similarities, **others):
    snapshots = {str(step): {"similarity": value, **{name: factor * value for name, factor in others.items()}}
                 for step, value in enumerate(similarities, start=1)}
    return dict(concept=concept, method=method, seed=seed, changes={}, steps=200, on_the_way=True,
                snapshots=snapshots)


def test_fidelity_is_0_for_nothing_and_1_for_perfect():
    results = [run("c", "nothing", 0, 0.2), run("c", "perfect", 0, 0.8), run("c", "LoRA", 0, 0.35, 0.5)]
    add_fidelity(results)
    fidelities = [values["fidelity"] for result in results for _, values in tables.front(result)]
    assert fidelities == pytest.approx([0, 1, 0.25, 0.5])


def test_damage_at_a_similarity_is_read_off_the_front_at_its_first_crossing():
    result, nothing = run("c", "LoRA", 0, 0.4, 0.8, 0.6, drift=10), {"similarity": 0.0, "drift": 0.0}
    for similarity in (0.1, 0.4, 0.6, 0.8):
        assert at_similarity(result, similarity, nothing)["drift"] == pytest.approx(10 * similarity)
    assert at_similarity(result, 0.81, nothing) is None
    assert at_similarity(result, -0.5, nothing) == nothing       # stopped before the first step


def test_methods_are_compared_where_the_weaker_one_ends():
    """The stronger run is stopped early, whichever it is.

    A damage that grows with fidelity alone makes no difference then.
    """
    names = dict.fromkeys((*tables.DAMAGES, "retention, held out", "layout", "mask IoU", "composition"), 1.0)
    results = [run("c", "nothing", 0, 0.0, **names), run("c", "perfect", 0, 1.0, **names)]
    ends = (("paper", 0.6), ("LoRA", 0.7), ("DreamBooth", 0.4))
    results += [run("c", method, seed, 0.3, end, **names) for seed in range(2) for method, end in ends]
    add_fidelity(results)
    rows = [row.strip("| ").split(" | ") for row in equal_fidelity(results).splitlines()[2:]]
    assert [row[:2] for row in rows] == [["DreamBooth", "0.40"], ["LoRA", "0.60"]]
    assert all(cell.startswith(("+0.0", "-0.0")) for row in rows for cell in row[2:])
    (stopped,) = {tables.final(r)["drift"] for r in tables.stopped_early(results)}
    assert stopped == pytest.approx(0.6)


def test_the_score_is_0_without_fidelity_and_1_without_damage():
    best = dict.fromkeys(MEASURES, 0.0) | {"layout": 1.0, "fidelity": 1.0}
    assert score(best) == 1 and score(best | {"fidelity": 0.0}) == 0
    assert score(best | {"class leak": 0.5}) < 1 and score(best | {"drift": 0.05}) < 1


def test_intervals_are_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)
    assert np.isnan(mean_and_interval([1.0])[1])


def test_verdicts_look_at_the_whole_interval():
    for values, equal, verdict in (([0.1, 0.11, 0.12], False, "holds"),
                                   ([-0.1, -0.11, -0.12], False, "does not hold"),
                                   ([0.1, -0.1, 0.0], False, "depends"),
                                   ([0.0, 0.0, 0.0], False, "does not hold"),    # no difference is not "more"
                                   ([CLOSE / 9, 0.0, -CLOSE / 9], True, "holds"),
                                   ([0.1, 0.11, 0.12], True, "does not hold")):
        assert Claim("", "", values, equal).verdict() == verdict


def test_a_difference_pairs_concepts_and_seeds():
    results = [run("a", "paper", 0, 0.5), run("b", "paper", 0, 0.9), run("a", "LoRA", 0, 0.4),
               run("b", "LoRA", 0, 0.6), run("a", "paper", 1, 0.5)]
    assert difference(results, "paper", "LoRA", "similarity", ("a", "b")) == pytest.approx([0.2])


# ----------------------------------------------------------------------------------- pictures and experiments
def test_fig_8_shows_pictures_that_the_velocities_lead_to(cheap):
    """The figure once showed predictions of x_0 from one noised picture, not where the velocities lead.

    Before its first step theta_2 predicts for the base text what the base model does. So its v_original must
    lead from a noise to the picture that the base model draws for that text without guidance.
    """
    pytest.importorskip("matplotlib")
    from purecc_min.benchmark.figures import follow, unseen_texts
    setup = set_up("checked_cat")
    texts, x_1 = unseen_texts(setup), noise_for([0], (3, 32, 32))
    theta = start(MAIN["LoRA"], setup.pipe, setup.data, TrainConfig(), None)
    x_0 = follow("v_original", theta, theta, texts, x_1)
    drawn = setup.pipe.sample(texts.base, [0], guidance=1)
    assert (x_0 - drawn).abs().max() < 1e-5
    t = torch.ones(1)
    at_once = predict_x_0(x_1, t, setup.pipe.velocity(x_1, t, texts.base))
    assert (x_0 - at_once).abs().mean() > 0.1
    assert (follow("v_purecc", theta, theta, texts, x_1) - x_0).abs().max() > 1e-5       # Y says something


def test_slots_of_two_placeholders_are_told_apart(pipe):
    slots = pipe.encode_text([f"{SECOND} big [V] cat"], {"[V]": "cat", SECOND: "a"}).slots[0].tolist()
    assert slots[1] == 2 and slots[3] == 1 and slots.count(0) == len(slots) - 2
    assert all(name in toy.CONCEPTS for names, _ in CASES.values() for name in names)


def test_Y_alone_never_moves_the_base_text_and_adapters_do(cheap, tmp_path):
    assert study(Cell("checked_cat", "embeddings alone", steps=2), tmp_path)["base moves"] == 0
    assert study(Cell("checked_cat", "LoRA", steps=2), tmp_path)["base moves"] > 0


def test_two_untrained_concepts_draw_what_the_base_draws_by_region(cheap):
    """Fresh branches change nothing: the left half answers the left text, the right half the right one."""
    setup, names = set_up("checked_cat"), ("checked_cat", "cyclops_fish")
    fresh = [Branch.fresh(setup.pipe, torch.zeros(6, 128), 1) for _ in range(2)]
    seen, pictures = two_instances(setup.pipe, setup.reader, names, fresh, together=True)
    assert all(seen[f"base: right object, {name}"].float().mean() > 0.8 for name in names)
    assert seen["base: traits, checked_cat"].float().mean() < 0.5 and pictures.shape == (12, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------- shipped
def test_the_shipped_results_are_whole_and_of_these_weights_and_settings():
    for part in SEEDS:
        missing = [cell.file for cell in plan(part) if cell.result(Path("nowhere"), shipped=True) is None]
        assert not missing, (part, missing[:3], len(missing))
    results = [cell.result(Path("nowhere"), shipped=True) for cell in plan("claims")]
    assert all(len(claim.values) >= 3 and np.isfinite(claim.values).all() for claim in claims(results))


def test_the_settings_are_those_that_won_on_the_tuning_concepts():
    results = [cell.result(Path("nowhere"), shipped=True) for cell in plan("tuning")]
    add_fidelity(results)
    tried = {name: method for name, method in (MAIN | BINDING).items() if method.tries}
    for name, method in tried.items():
        means = []
        for settings in method.tries:
            own = [r for r in results if r["method"] == name and r["changes"] == settings]
            means.append(np.mean([score(tables.final(result)) for result in own]))
        assert method.tries[np.argmax(means)] == method.settings, (name, means)


# ---------------------------------------------------------------------------------------------- its README.md
def recipe(title):
    """The Python block below a heading of the benchmark's README.md."""
    text = (RESULTS.parent / "README.md").read_text()
    block = re.search(rf"### {title}\n.*?```python\n(.*?)```", text, re.DOTALL).group(1)
    return block, len(block.strip().splitlines())


def test_a_method_is_added_by_the_recipe(cheap, tmp_path, monkeypatch):
    block, lines = recipe("A method of your own")
    assert lines < 30
    added = {}
    exec(block, {**vars(entries), "MAIN": added})
    (name,) = added
    monkeypatch.setitem(ALL, name, added[name])
    assert run_cell(Cell("checked_cat", name, steps=1), tmp_path)["snapshots"]["1"].keys() == MEASURES.keys()


def test_a_concept_is_added_by_the_recipe(cheap, tmp_path, monkeypatch):
    block, lines = recipe("A concept of your own")
    assert lines < 20
    added = {}
    exec(block, {**vars(toy), "CONCEPTS": added})
    (name,) = added
    monkeypatch.setitem(toy.CONCEPTS, name, added[name])
    assert run_cell(Cell(name, "perfect"), tmp_path)["snapshots"]["0"]["sees concept"] >= 0


def test_the_report_links_to_what_is_there():
    text = (RESULTS.parent / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and all((RESULTS.parent / link).exists() for link in links)


# ------------------------------------------------------------------------------------------------ the command
def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        command.main(list(arguments))
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(error) == 1, error
    return error[0]


def test_bad_input_is_one_line(capsys, monkeypatch):
    assert "'LoRa'" in refused(capsys, "--methods", "LoRa")
    assert "'dog'" in refused(capsys, "--concepts", "dog")
    assert "main part" in refused(capsys, "claims", "--quick")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("figures", "report"):
        monkeypatch.delitem(sys.modules, f"purecc_min.benchmark.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    assert "pip install -r tutorials/requirements.txt" in refused(capsys, "--quick")


def test_a_killed_benchmark_leaves_no_workers_and_goes_on(tmp_path):
    """Workers once outlived their parent and kept the machine busy for minutes."""
    line = [sys.executable, "-m", "purecc_min.benchmark", "--quick", "--concepts", "checked_cat",
            "--steps", "2", "--out", str(tmp_path)]
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
    for line_of in (Path(f"/proc/{pid}/cmdline") for pid in workers):
        assert not line_of.exists() or "spawn_main" not in line_of.read_text()
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "min on" in again.stdout and "| paper |" in again.stdout and len(done) < 6
    assert all(file.read_bytes() == content for file, content in done.items())
    results = json.loads((tmp_path / "main" / "results.json").read_text())
    assert {result["method"] for result in results} == {"nothing", "perfect", *QUICK["methods"]}
    for name in ("results.csv", "table.md", "fronts.png", "curves.png", "samples-checked_cat.png",
                 "figure8.png"):
        assert (tmp_path / "main" / name).stat().st_size > 100, name


def test_the_shipped_files_are_the_ones_the_package_installs():
    assert "results/*.json" in (ROOT / "pyproject.toml").read_text() and RESULTS.parent.name == "benchmark"

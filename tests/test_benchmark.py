"""The benchmark on a toy budget: methods, resuming, the tables' arithmetic, pictures, and the recipes."""

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from purecc_min.benchmark import cells, entries, two
from purecc_min.benchmark.cells import ALL, Cell, learn_theta_1, run_cell, set_up, theta_1_cell, train_cell
from purecc_min.benchmark.entries import MAIN, as_sampled, start
from purecc_min.benchmark.plans import SEEDS, plan
from purecc_min.benchmark.report import gather
from purecc_min.benchmark.two import PAIRS, Two, draw_pair, judged, of_pairs, pair_of, run_two
from purecc_min.branch import Branch, Thetas
from purecc_min.concept import Batch
from purecc_min.measure import toy
from purecc_min.measure.measures import MEASURES
from purecc_min.measure.toy import CONCEPTS, EARLIER, HELD_OUT, TUNING
from purecc_min.registry import METHODS, is_held
from purecc_min.sheets import draw_texts
from purecc_min.train import TrainConfig, draw_batch, optimizer_for
from tinyflow.flow import noise_for, shift_times
from tinyflow.weights import tensor_hash
from tutorials.experiments.mechanism import study

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cheap(few_pictures):
    with pytest.MonkeyPatch.context() as patch:
        for place, name, value in ((cells, "FEW_STEPS", 1), (two, "FEW_STEPS", 1), (two, "SCENES", 12),
                                   (cells, "IMAGINED", 2), (entries, "IMAGINED", 2)):
            patch.setattr(place, name, value)
        set_up.cache_clear()
        yield
    set_up.cache_clear()
    pair_of.cache_clear()


@pytest.mark.parametrize("name", list(ALL))
def test_every_method_trains_what_it_says_and_never_the_base(name, cheap, tmp_path):
    cell, pipe, method = Cell("striped_cat", name, steps=2), set_up("striped_cat").pipe, ALL[name]
    before, begun = tensor_hash(pipe.state_dict()), None
    for _, thetas, _ in train_cell(cell, learn_theta_1(cell, tmp_path)):
        state = thetas.theta.state_dict()
        begun = begun or {key: value.clone() for key, value in state.items()}
    changed = {key.split(".")[0] for key, value in state.items() if not torch.equal(value, begun[key])}
    said = {"mmdit": method.whole_model, "lora": method.adapters and not method.whole_model,
            "embeddings": method.embeddings, "theta_1": method.joint}
    assert changed == {part for part, is_trained in said.items() if is_trained}
    assert tensor_hash(pipe.state_dict()) == before


def after_a_step(name, tmp_path):
    """The models and the loss of a method after its first step, and a batch."""
    theta_1 = cells.learned(Cell("striped_cat", "lora", steps=2), tmp_path)
    _, thetas, loss = next(train_cell(Cell("striped_cat", name, steps=2), theta_1))
    texts = set_up("striped_cat").data.texts.rows(torch.tensor([0, 1]))
    x_t, v = torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    return thetas, loss, Batch(x_t, torch.tensor([0.3, 0.6]), v, texts)


def test_the_released_step_never_sees_the_extractors_adapters(cheap, tmp_path):
    thetas, loss, batch = after_a_step("released", tmp_path)
    before, paper = loss(thetas, batch, 2.0)[1], entries.paper(thetas, batch, 1.0)[1]
    for B in thetas.theta_1.lora.B.values():
        B.data.add_(0.1)
    assert loss(thetas, batch, 2.0)[1]["norm_R_target"] == before["norm_R_target"] and before["lambda"] == 1
    assert entries.paper(thetas, batch, 1.0)[1]["norm_R_target"] != paper["norm_R_target"]


def test_imagined_scenes_have_the_times_of_the_training_and_asking_for_terms_moves_no_draw(cheap, tmp_path):
    """They were once drawn without the model's shift, so that most of them were nearly clean."""
    data, (thetas, loss, _) = set_up("striped_cat").data, after_a_step("DreamBooth + prior", tmp_path)
    state = loss.generator.get_state()
    assert [row["t"] for row in cells.terms_over_t(loss, thetas, data, 1.0)] == list(cells.TIMES)
    assert torch.equal(loss.generator.get_state(), state)
    middle = shift_times(torch.tensor(0.5), loss.shift)
    assert middle > 0.6 and abs(loss.draw(4000).t.median() - middle) < 0.03


@pytest.mark.parametrize("name, forward, backward", [
    ("lora", 1, 1), ("DreamBooth", 1, 1), ("anchor", 3, 2), ("paper", 5, 2), ("released", 5, 3),
    ("merged stages", 5, 2), ("paper, v_0", 5, 2), ("lora, twice", 2, 2), ("bound, longer", 5, 5),
    ("bound", 1, 1), ("bound-half", 3, 2), ("bound-pairs", 5, 3)])
def test_passes_are_counted(name, forward, backward, cheap, tmp_path):
    """A step of a LoRA takes a picture through the model once and back; an extractor's steps count."""
    theta_1 = learn_theta_1(Cell("striped_cat", name, steps=2), tmp_path)
    counted = cells.count_passes(Cell("striped_cat", name, steps=10_000), theta_1)   # where Y starts is cheap
    assert counted == pytest.approx({"forward": forward, "backward": backward}, abs=0.02)


def test_a_weight_that_matters_stays_where_it_is(cheap):
    """EWC: the loss grows with the square of a move, more where the base model's pictures need the weight."""
    setup, cell = set_up("striped_cat"), Cell("striped_cat", "DreamBooth + EWC", steps=2)
    loss = ALL[cell.method].loss_for(setup, cell.config())
    theta = start(ALL[cell.method], setup.pipe, setup.data, cell.config(), None)
    batch, weight = draw_batch(setup.data, cell.config(), 1, 0, 1.0), next(theta.mmdit.parameters()).data

    def moved(size):
        weight.add_(size)
        cost = loss(Thetas(setup.pipe.velocity, None, theta), batch, 1.0)[1]["loss_ewc"].item()
        weight.sub_(size)
        return cost

    assert moved(0) == pytest.approx(0, abs=1e-6) and moved(.02) == pytest.approx(4 * moved(.01), rel=.05)
    assert torch.cat([fisher.flatten() for fisher in loss.fisher]).mean() == pytest.approx(1, rel=1e-4)


def test_every_Y_has_the_embeddings_learning_rate(cheap):
    """In merged stages theta_1's Y once had the adapters' rate: only theta_2's Y was looked for."""
    setup, config = set_up("striped_cat"), TrainConfig(learning_rate=0.25, embedding_learning_rate=0.5)
    theta = start(ALL["merged stages"], setup.pipe, setup.data, config, None)
    others, embeddings = optimizer_for(theta, config).param_groups
    assert others["lr"] == 0.25 and embeddings["lr"] == 0.5
    assert {id(Y) for Y in embeddings["params"]} == {id(theta.embeddings.Y), id(theta.theta_1.embeddings.Y)}
    assert len(others["params"]) + 2 == len(list(theta.parameters()))


def test_a_cell_run_again_gives_the_same_result_and_its_pictures(cheap, tmp_path):
    """The second time its extractor is there already."""
    cell = Cell("striped_cat", "paper", steps=2, on_the_way=False)
    first = run_cell(cell, tmp_path)
    assert first["ways"][""]["2"].keys() == MEASURES.keys() and len(first["terms"]["1"]) == len(cells.TIMES)
    assert first["passes"]["backward"] == 2 and first["trained"] > 1000
    file = tmp_path / cell.file
    written = file.stat().st_mtime_ns
    assert run_cell(cell, tmp_path) == first and file.stat().st_mtime_ns == written
    file.unlink()
    again = run_cell(cell, tmp_path)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}

    figures = pytest.importorskip("purecc_min.benchmark.figures")
    figures.curves(gather([cell], tmp_path), tmp_path / "curves.png")
    figures.figure_8(cell, tmp_path, tmp_path / "figure8.png")
    assert all((tmp_path / name).stat().st_size > 100 for name in ("curves.png", "figure8.png"))


def test_a_result_stands_for_what_its_method_uses_and_for_nothing_else(monkeypatch):
    """Each cell once stood for the setting of the LoRA extractor, whatever its own extractor was."""
    cell, settings = Cell("striped_cat", "bound-paper"), (("extractor_learning_rate", 1e-3),)
    other, ranked = Cell("striped_cat", "bound-paper", 0, settings), (("rank", 2),)
    assert cell.recipe() != other.recipe() and dict(theta_1_cell(other).changes)["learning_rate"] == 1e-3
    assert dict(theta_1_cell(Cell("striped_cat", "paper", 0, ranked)).changes)["rank"] == 2
    few, usual = (Cell("striped_cat", "bound-pairs", 0, changes) for changes in ((("imagined", 16),), ()))
    assert few.recipe() != usual.recipe() and few.imagined == 16 and "imagined" not in few.settings
    known = {name: Cell("striped_cat", name).recipe() for name in ("lora", "bound", "paper", "bound-pairs")}
    monkeypatch.setattr(cells, "IMAGINED", 7)
    monkeypatch.setitem(METHODS["lora"].settings, "eta", 0.5)
    changed = {name for name, recipe in known.items() if Cell("striped_cat", name).recipe() != recipe}
    assert changed == {"lora", "bound-pairs"}    # the LoRA's own setting, and the number of imagined scenes
    once, often = (Cell("striped_cat", "lora", on_the_way=on_the_way) for on_the_way in (False, True))
    assert once.recipe() != often.recipe() and once.recipe(measured=False) == often.recipe(measured=False)


def test_there_is_one_registry_and_every_row_of_the_main_table_had_as_many_tries():
    """`learn` and the benchmark once had a method each under other names and at other rates."""
    for name, method in METHODS.items():
        assert vars(MAIN[name]).items() >= vars(method).items(), name
    for name, method in MAIN.items():
        if method.times > 1:                     # as the same method after the usual number of steps
            assert method.settings == MAIN[name.removesuffix(", longer")].settings
            continue
        assert len(method.tries) == 5 and method.settings in method.tries, name
        has_rank = method.adapters and not method.whole_model
        assert any(one.get("rank") == 16 for one in method.tries) == has_rank, name


def test_the_two_ends_of_the_scale_and_a_result_of_other_settings_is_not_taken(cheap, tmp_path, monkeypatch):
    cell = Cell("striped_cat", "nothing")
    nothing = run_cell(cell, tmp_path)["ways"][""]["0"]
    known = {name: row.nothing for name, row in MEASURES.items() if row.nothing is not None}
    assert {name: nothing[name] for name in known} == pytest.approx(known, abs=1e-6)
    assert cell.result(tmp_path) and Cell("striped_cat", "perfect").result(tmp_path) is None
    perfect = run_cell(Cell("striped_cat", "perfect"), tmp_path)["ways"][""]["0"]
    held = run_cell(Cell("striped_cat", "switched-off", steps=2, on_the_way=False), tmp_path)["ways"][""]["2"]
    for values in (perfect, held):               # the base model's pictures, which are not drawn again
        assert values["drift"] == values["path KL"] == values["class drift"] == 0 < values["outside change"]
    monkeypatch.setattr(cells, "FEW_STEPS", 2)
    assert cell.result(tmp_path) is None


def test_the_plans_keep_tuning_and_held_out_concepts_apart():
    assert {cell.concept for cell in plan("tuning")} == set(TUNING)
    assert {cell.concept for cell in plan("main")} == set(HELD_OUT)
    assert {cell.concept for cell in plan("further") + plan("claims")} == set(EARLIER)
    for name, method in MAIN.items():
        runs = Counter(cell.concept for cell in plan("main") if cell.method == name)
        on_styles = not (method.imagines or method.times > 1)                # a style has no halves
        assert runs == {concept: 5 for concept in HELD_OUT if on_styles or not CONCEPTS[concept].is_style}
    for part in SEEDS:
        cells_of = set(plan(part))
        assert len({cell.file for cell in cells_of}) == len(cells_of)


def test_fig_8_shows_pictures_that_the_velocities_lead_to(cheap):
    """The figure once showed predictions of x_0 from one noised picture, not where the velocities lead.

    Before its first step theta_2 predicts for the base text what the base model does. So its v_original must
    lead from a noise to the picture that the base model draws for that text without guidance.
    """
    figures, setup = pytest.importorskip("purecc_min.benchmark.figures"), set_up("striped_cat")
    texts, x_1 = figures.scene_unseen(setup), noise_for([0], (16, 16, 16))
    theta = start(MAIN["lora"], setup.pipe, setup.data, TrainConfig(), None)
    x_0, other = (figures.follow(name, theta, theta, texts, x_1, setup.pipe.shift)
                  for name in ("v_original", "v_purecc"))
    assert (x_0 - setup.pipe.sample(texts.base, [0], guidance=1)).abs().max() < 1e-5
    at_once = x_1 - setup.pipe.velocity(x_1, torch.ones(1), texts.base)
    assert (x_0 - at_once).abs().mean() > 0.1 and (other - x_0).abs().max() > 1e-5   # Y says something


def test_a_bound_method_never_moves_a_text_without_the_token(cheap, tmp_path):
    """Neither in training nor in sampling; and a LoRA that is switched off is the base model there too."""
    texts, pipe = set_up("striped_cat").data.texts, set_up("striped_cat").pipe
    x_t, t = torch.randn(4, 16, 16, 16), torch.full((4,), 0.4)
    for name in ("bound", "bound-paper", "token", "switched-off", "lora"):
        cell = Cell("striped_cat", name, steps=2)
        *_, (_, thetas, _) = train_cell(cell, learn_theta_1(cell, tmp_path))
        who = as_sampled(ALL[name], thetas)
        drawn, kept = who["theta"](x_t, t, texts.base), pipe.velocity(x_t, t, texts.base)
        assert torch.equal(drawn, kept) == is_held(ALL[name]) == (name != "lora")
        assert who["theta_null"] == pipe.velocity
        said = texts.complete                    # with [V] a switched-off LoRA is the LoRA
        assert torch.equal(who["theta"](x_t, t, said), thetas.theta(x_t, t, said))
    assert as_sampled(ALL["lora"], thetas, "own empty text") == {"theta": thetas.theta}
    assert study(Cell("striped_cat", "embeddings", steps=2), tmp_path)["base moves"] == 0    # Y alone
    assert study(Cell("striped_cat", "lora", steps=2), tmp_path)["base moves"] > 0


def test_a_bound_extractor_teaches_a_bound_model():
    for name, method in ALL.items():             # but pairs ask a LoRA, which knows the concept everywhere
        teacher = theta_1_cell(Cell("striped_cat", name))
        assert (teacher is None) == (method.extractor is None), name
        assert not teacher or (ALL[teacher.method].where == method.where) != method.imagines, name


def test_two_untrained_concepts_draw_what_the_base_draws(cheap):
    """Fresh branches say of [V1] and [V2] what the class words say."""
    pair = pair_of(("striped_cat", "dotted_fish"))
    both, neither = pair.texts((0, 1)), pair.texts(())
    assert all("[V1] cat on the left and a" in text and "[V2] fish on the right" in text for text in both)
    assert neither == [text.replace("[V1] ", "").replace("[V2] ", "") for text in both]
    fresh = [Branch.fresh(pair.setups[0].pipe, None, 1, where="phrase") for _ in range(2)]
    drawn, kept = draw_pair(pair, "bound", fresh, (0, 1), 2), draw_pair(pair, "", [], (), 2)
    said_twice = [text.replace("[V1]", "cat").replace("[V2]", "fish") for text in both]
    base = draw_texts(pair.setups[0].pipe, said_twice[:2], {}, steps=1)
    assert torch.allclose(drawn, base, atol=1e-4) and not torch.allclose(drawn, kept, atol=1e-2)


def test_in_a_perfect_picture_of_two_concepts_each_has_its_own_traits(cheap):
    for names in (*PAIRS, ("striped_cat", "checked_star")):  # the last two have one eye and an antenna, both
        pair = pair_of(names)
        reading = pair.setups[0].reader(pair.perfect())
        for seen in (judged(pair, reading, n) for n in (0, 1)):
            assert seen["own"] > .9 and seen["other's"] < .05


def test_a_pair_is_drawn_once_and_its_table_counts_each_concept(cheap, tmp_path, monkeypatch):
    drawn = run_two(Two(PAIRS[0], "original"), tmp_path)
    monkeypatch.setattr(two, "pair_of", None)    # the second time it is read
    assert run_two(Two(PAIRS[0], "original"), tmp_path) == drawn
    made_up = {"method": "lora", "together": [{"own": .5, "other's": .1}, {"own": .7, "other's": .3}],
               "alone": [{"own": 1.0, "other's": 0}, {"own": .5, "other's": 0}]}
    means = of_pairs([drawn, made_up], "lora")
    assert means == pytest.approx({"together": .6, "alone": .75, "other's": .2, "keeps": .8})


def added_by(title, known, name, most):
    """What the Python block below a heading of the benchmark's README.md adds: (its name, itself)."""
    text = (cells.RESULTS.parent / "README.md").read_text()
    block = re.search(rf"### {title}\n.*?```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len(block.strip().splitlines()) < most
    added = {}
    exec(block, {**vars(known), name: added})
    return added.popitem()


def test_a_method_and_a_concept_are_added_by_the_recipes(cheap, tmp_path, monkeypatch):
    name, method = added_by("A method of your own", entries, "MAIN", 30)
    monkeypatch.setitem(ALL, name, method)
    assert run_cell(Cell("striped_cat", name, steps=1), tmp_path)["ways"][""]["1"].keys() == MEASURES.keys()
    name, concept = added_by("A concept of your own", toy, "CONCEPTS", 20)
    monkeypatch.setitem(toy.CONCEPTS, name, concept)
    assert run_cell(Cell(name, "perfect"), tmp_path)["ways"][""]["0"]["sees concept"] >= 0


def test_matplotlib_is_asked_for_in_one_line():
    code = "import sys; sys.modules['matplotlib'] = None\n" \
           "from purecc_min.benchmark.__main__ import main\nmain(['--quick'])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (error,) = ran.stderr.strip().splitlines()
    assert ran.returncode == 2 and "pip install matplotlib" in error


def test_a_killed_benchmark_leaves_no_workers_and_goes_on(tmp_path):
    """Workers once outlived their parent and kept the machine busy for minutes."""
    line = [sys.executable, "-m", "purecc_min.benchmark", "--quick", "--concepts", "striped_cat",
            "--methods", "bound", "--steps", "2", "--workers", "1", "--out", str(tmp_path)]
    first = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("cells/*/*.json")):
        assert first.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    first.kill()
    first.wait()
    done = {file: file.read_bytes() for file in tmp_path.glob("cells/*/*.json")}
    time.sleep(1)
    for line_of in (Path(f"/proc/{pid}/cmdline") for pid in workers):
        assert not line_of.exists() or "spawn_main" not in line_of.read_text()
    again = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert again.stdout.readline().startswith(f"{3 - len(done)} of 3 cells to do")
    again.kill()                                 # end_to_end.py runs this command to its end
    again.communicate()
    assert all(file.read_bytes() == content for file, content in done.items())

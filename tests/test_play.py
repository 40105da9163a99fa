"""The page to play with, in a real browser: it computes what the package does, and its tips can be moved."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from purecc_min.benchmark.cells import STEPS, STRIP, Cell
from purecc_min.benchmark.entries import MAIN
from purecc_min.benchmark.plans import can_learn
from purecc_min.concept import Batch, Texts
from purecc_min.measure.toy import HELD_OUT
from purecc_min.methods import cosine
from purecc_min.objective import pcc_loss
from tests.browser import in_browser, needs_browser
from tinyflow.pipeline import Text
from tutorials.build import FOLDER

PAGE = (FOLDER / "play.html").read_text(encoding="utf-8")
PROBE = """const SHOWN = ["target", "complete", "lambda", "angle", "pure", "loss", "cc", "all", "drift"];
const found = [], show = () => found.push({
  state: structuredClone(state), said: $("said").textContent, eta: +$("eta").value,
  shown: Object.fromEntries(SHOWN.map(name => [name, $("n-" + name).textContent])) });
"""
EXAMPLES = """show();
for (const button of document.querySelectorAll("#examples button")) { button.click(); show(); }
for (const share of [.5, 0, 1])
  for (const id of ["back", "step", "steps"]) { $("shared").value = share; $(id).click(); show(); }"""
HANDLES = """const press = (name, key, shiftKey = false) =>
  $("tip-" + name).dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey }));
for (let n = 0; n < 90; n++) press("complete", "ArrowLeft");
show(); press("target", "ArrowUp"); press("data", "ArrowDown", true); show();
$("tip-target").setPointerCapture = () => 0; $("tip-target").hasPointerCapture = () => true;
const box = $("plane").getBoundingClientRect();
const at = { clientX: box.left + .75 * box.width, clientY: box.top + .5 * box.height, pointerId: 1 };
$("tip-target").dispatchEvent(new PointerEvent("pointermove", at));
show();
$("back").click();
for (let n = 0; n < 15; n++) press("original", "ArrowLeft");
show();
for (let n = 0; n < 90; n++) press("original", "ArrowRight");
show();"""


def driven(drive: str, folder: Path, width: int = 1200) -> list[dict]:
    return in_browser(PAGE, f"{PROBE}{drive}\nreport(found);", folder, width)


def check_numbers(report: dict) -> None:
    """That the page shows what the package computes from the same places."""
    original, target, complete, data = (torch.tensor(report["state"][name]).double().view(1, 2, 1, 1)
                                        for name in ("original", "target", "complete", "data"))
    empty, none = torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long)
    texts = Texts(*(Text(empty, torch.full((1, 1), float(n)), none, none) for n in range(4)))    # by number
    batch = Batch(x_t=torch.zeros(1, 2, 1, 1), t=torch.zeros(1), v=data, texts=texts)
    answers = torch.cat([original + complete, original, target, torch.zeros_like(target)])

    def theta(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        return answers[text.pooled[:, 0].long()]

    loss, terms = pcc_loss(theta, theta, batch, report["eta"])
    shown = {name: number.strip("°") for name, number in report["shown"].items()}
    wanted = {"target": target.norm(), "complete": complete.norm(), "lambda": terms.lam, "all": loss,
              "pure": (terms.v_purecc - original).norm(), "loss": terms.loss_purecc, "cc": terms.loss_cc,
              "drift": original.norm()}
    for name, number in wanted.items():
        assert float(shown[name]) == pytest.approx(number.item(), abs=.006), name
    if target.any() and complete.any():
        angle = cosine(complete, target).clamp(-1, 1).acos().rad2deg().item()
        assert float(shown["angle"]) == pytest.approx(angle, abs=.6)
    else:
        assert shown["angle"] == "none"


@needs_browser
def test_the_page_computes_what_the_package_does(tmp_path):
    opened, *examples = reports = driven(EXAMPLES, tmp_path)
    for report in reports:
        check_numbers(report)
    assert len(examples) == 7 + 9 and "nothing else" in examples[0]["said"] and "AWAY" in examples[3]["said"]
    (back, one, half), (_, _, bound), (_, _, along) = (examples[n:n + 3] for n in (7, 10, 13))
    assert back["state"] == opened["state"]
    # a step: a fifth of the gradient of L = L_CC + L_PureCC in v_complete, and v_original goes half as far
    place = {name: torch.tensor(back["state"][name]) for name in back["state"]}
    R_c = place["complete"].clone().requires_grad_()
    rejection = R_c - (R_c @ place["target"] / place["target"].square().sum()) * place["target"]
    ((place["original"] + R_c - place["data"]).square().mean() + rejection.square().mean()).backward()
    assert one["state"]["original"] == pytest.approx((-.1 * R_c.grad).tolist())
    assert one["state"]["complete"] == pytest.approx((place["complete"] - .1 * R_c.grad).tolist())
    for report in (half, bound):
        assert float(report["shown"]["all"]) < float(back["shown"]["all"])
    assert float(bound["shown"]["loss"]) < .5 * float(back["shown"]["loss"])
    assert bound["shown"]["drift"] == "0.00"
    assert along["shown"]["loss"] == back["shown"]["loss"] and float(along["shown"]["drift"]) > .3
    far = driven('$("eta").value = 4; $("shared").value = 1; $("steps").click(); show();', tmp_path)[0]
    places = torch.tensor([far["state"][name] for name in ("original", "target", "complete", "data")])
    places[1:3] += places[0]
    assert places.abs().max() <= 3.8 and "would leave the plane" in far["said"]


@needs_browser
def test_handles_move_by_keys_and_by_the_pointer(tmp_path):
    left, stepped, dragged, common, far = reports = driven(HANDLES, tmp_path)
    for report in reports:
        check_numbers(report)
    assert left["state"]["complete"][0] == -3.8  # a handle stays on the page
    assert stepped["state"]["target"] == [2.2, .7] and stepped["state"]["data"] == [2.4, 2.1]
    assert dragged["state"]["target"] == pytest.approx([2, 0], abs=.02)
    unseen = ("target", "complete", "lambda", "angle", "pure", "loss")
    opened = driven("show();", tmp_path)[0]
    assert common["state"]["original"] == [-1.5, 0] and "do not see it" in common["said"]
    assert {common["shown"][name] for name in unseen} == {opened["shown"][name] for name in unseen}
    assert common["shown"]["cc"] != opened["shown"]["cc"] and "do not see it" not in opened["said"]
    assert far["state"]["original"][0] == 1.6    # the tip of R(y_tar), too, stays in the plane


PLACES = [  # R(y_tar), R(y_complete, y_base), what the sentence says, and what it must not say
    ([2, 0], [1, 0], "0.50 times what the extractor adds, and nothing else", "AWAY"),
    ([2, 0], [2, 0], "1.00 times what the extractor adds, and nothing else", "which is more"),
    ([2, 1], [3, 1.5], "1.50 times what the extractor adds, and nothing else", "something else"),
    ([2, 0], [1, .02], "almost nothing else", "something else"),
    ([2, 0], [.02, .02], "0.01 times what the extractor adds and something else", "nothing else"),
    ([2, 0], [1, .5], "0.50 times what the extractor adds and something else", "nothing else"),
    ([2, 0], [2, 2], "1.00 times what the extractor adds and something else", "which is more"),
    ([1, 0], [3, 1], "3.00 times what the extractor adds, which is more, and something else", "nothing else"),
    ([2, 0], [0, 2], "at a right angle", "times"),
    ([2, 0], [.01, 2], "0 or nearly so", "AWAY"),
    ([2, 0], [-.01, 2], "0 or nearly so", "AWAY"),
    ([2, 0], [-1, 1], "AWAY from the concept (λ* is negative), and adds something else", "nothing else"),
    ([2, 1], [-2, -1], "AWAY from the concept: it takes away 1.00 times", "however much"),
    ([2, 1], [-1, -.5], "takes away 0.50 times what the extractor adds, and adds nothing else", "wants gone"),
    ([2, 0], [0, 0], "[V] changes nothing", "adds the concept"),
    ([0, 0], [2, 1], "λ* is set to 0, and L_PureCC asks to undo all", "short"),
    ([0, 0], [0, 0], "Both are 0", "undo"),
    ([.01, 0], [3, 1], "300.00 times", "set to 0"),
    ([.01, 0], [-3, 0], "takes away 300.00 times", "set to 0"),
    ([0, .2], [1, 0], "R(y_tar) is short", "set to 0"),
    ([.2, 0], [0, 0], "[V] changes nothing", "short"),
    ([-1, -1], [1, 1], "AWAY from the concept: it takes away 1.00 times", "which is more"),
    ([3, 3], [.01, .01], "0.00 times what the extractor adds, and nothing else", "AWAY"),
]


@needs_browser
def test_the_sentence_is_right_wherever_the_two_vectors_are(tmp_path):
    drive = "".join(f"Object.assign(state, {{ target: {target}, complete: {complete} }}); draw(); show();\n"
                    for target, complete, *_ in PLACES)
    reports = driven(drive, tmp_path)
    for report, (target, complete, said, not_said) in zip(reports, PLACES, strict=True):
        check_numbers(report)
        assert said in report["said"] and not_said not in report["said"], report
        lam, angle, loss = (report["shown"][name].strip("°") for name in ("lambda", "angle", "loss"))
        assert ("AWAY" in report["said"]) == (float(lam) < -.01), report
        assert ("set to 0" in report["said"]) == (target == [0, 0])
        if "L_PureCC is 0" in report["said"]:
            assert loss == "0.00", report


LOOK = """$("eta").value = 2; draw();
const box = element => element.getBoundingClientRect();
for (const name of Object.keys(HANDLES)) {
  $("tip-" + name).focus();
  const ring = $("tip-" + name).querySelector(".ring"), style = getComputedStyle(ring);
  found.push({ name, focused: document.activeElement.id, size: box(ring).width,
               width: parseFloat(style.strokeWidth), effect: style.vectorEffect, stroke: style.stroke,
               outline: getComputedStyle($("tip-" + name)).outlineStyle });
}
const letters = element => parseFloat(getComputedStyle(element).fontSize)
                           * (element.closest("#plane") ? $("plane").getScreenCTM().a : 1);
found.push({ page: document.scrollingElement.scrollWidth, window: innerWidth,
  texts: [...document.querySelectorAll("#plane text, p, td, th, button, select, small")]
    .filter(element => element.textContent && element.getClientRects().length).map(letters),
  buttons: [...document.querySelectorAll("button")].map(button => box(button).height) });"""


@needs_browser
@pytest.mark.parametrize("width", (1200, 390))
def test_the_page_fits_a_telephone_and_its_focus_ring_is_thin(tmp_path, width):
    *rings, page = driven(LOOK, tmp_path, width)
    for ring in rings:
        assert ring["focused"] == f"tip-{ring['name']}" and ring["outline"] == "none", ring
        assert 1 <= ring["width"] <= 4 and ring["effect"] == "non-scaling-stroke", ring
        assert ring["stroke"] != "none" and 24 <= ring["size"] <= 60, ring
    assert page["window"] == width and page["page"] <= width, page
    assert min(page["texts"]) >= 12 and min(page["buttons"]) >= 30


def luminance(colour: str) -> float:
    parts = np.array([int(colour[n:n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(parts <= .04045, parts / 12.92, ((parts + .055) / 1.055)**2.4) @ [.2126, .7152, .0722]


def test_colours_have_contrast_and_nothing_comes_from_elsewhere():
    colours = dict(re.findall(r"--(\w+): (#\w{6})", PAGE))
    for name in ("ink", "coral", "blue", "grey"):
        assert (luminance(colours["paper"]) + .05) / (luminance(colours[name]) + .05) >= 4.5, name
    assert set(re.findall(r"fill: (#\w{6})", PAGE)) <= {colours["coral"], colours["blue"]}
    text = PAGE.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|<link|src=|@import|url\((?!#)", text)


BROWSE = """const seen = [];
for (const concept of Object.keys(gallery)) for (const group of Object.keys(gallery[concept].texts)) {
  $("concept").value = concept; $("group").value = group; showGallery();
  seen.push({ concept, group, methods: Object.keys(gallery[concept].methods), asks: $("asks").textContent,
              titles: [...document.querySelectorAll("#drawn tbody th")].map(head => head.firstChild.data),
              canvases: [...document.querySelectorAll("#drawn canvas")] });
}
Promise.all(Object.values(gallery).flatMap(own => Object.values(own.methods)).map(data =>
  Object.assign(new Image(), { src: data }).decode())).then(() => setTimeout(() => {
    for (const one of seen) one.blank = one.canvases.filter(canvas =>
      new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size < 8).length;
    for (const one of seen) one.canvases = one.canvases.length;
    report(seen);
  }, 1000));"""


@needs_browser
def test_the_gallery_shows_every_method_on_every_held_out_concept(tmp_path):
    found = in_browser(PAGE, BROWSE, tmp_path)
    assert {one["concept"] for one in found} == set(HELD_OUT)
    for one in found:
        learned = {method for method in MAIN if can_learn(method, one["concept"])}
        assert set(one["methods"]) == {"nothing", "perfect", *learned} - {"lora, own empty text"}, one
        assert one["titles"] == ["references", *one["methods"]] and one["asks"], one
        default = "bound-pairs" if can_learn("bound-pairs", one["concept"]) else "bound"
        assert one["titles"][3] == default and "first row" not in one["asks"]
        assert one["canvases"] == 4 * len(one["titles"]) and not one["blank"], one


READ = """const seen = [], add = () => seen.push({
  model: $("model").value, word: chosen.word, patch: chosen.patch, said: $("read").textContent,
  words: [...$("words").children].map(button => button.textContent) });
for (const model of Object.keys(reading.models)) {
  $("model").value = model; $("model").dispatchEvent(new Event("change"));
  for (const n of [1, 8]) { $("words").children[n].focus(); add(); }
  for (const key of ["ArrowDown", "ArrowRight"])
    $("patches").dispatchEvent(new KeyboardEvent("keydown", { key }));
  add();
}
report(seen);"""


@needs_browser
def test_attention_can_be_read_by_word_and_by_patch(tmp_path):
    models = json.loads(re.search('<script id="data"[^>]*>(.*)</script>', PAGE)[1])["reading"]["models"]
    found = in_browser(PAGE, READ, tmp_path)
    assert [one["model"] for one in found[::3]] == list(models) == ["base", "lora", "token", "bound-pairs"]
    for one in found:
        grid = np.array(models[one["model"]]["grid"]).reshape(15, 8, 8) / 100
        left, right = (half.mean() for half in np.split(grid[one["word"]], 2, axis=1))
        if one["patch"] < 0:
            numbers = [float(number) for number in re.findall(r"([\d.]+) %", one["said"])]
            assert numbers == pytest.approx([left, right, grid[one["word"]].max()], abs=.051), one
        else:
            assert one["patch"] == 9 and "Row 2, column 2" in one["said"]
            shares = [float(word.split()[-1]) for word in one["words"]]
            assert shares == pytest.approx(grid[:, 1, 1].tolist(), abs=.051)


def test_a_strip_is_cut_at_its_groups(tmp_path):
    """Each picture of this strip is of a colour of its own, its number in the strip."""
    typical_pictures = pytest.importorskip("purecc_min.benchmark.figures").typical_pictures
    rows = [dict(concept="striped_cat", method=method, seed=0, changes={}, steps=STEPS, on_the_way=True,
                 way="", snapshots={"200": {"similarity": .5}}) for method in ("nothing", "lora", "paper")]
    rows.append({**rows[1], "way": "own empty text"})        # was never drawn as a strip
    numbers = np.arange(sum(STRIP.values()), dtype=np.uint8)
    for row in rows[:2]:                         # the paper's pictures are not there
        file = (tmp_path / Cell.of(row).file).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(numbers, 64)[None, :, None].repeat(64, 0).repeat(3, 2)).save(file)
    found, texts = typical_pictures(rows, tmp_path, "striped_cat")
    assert list(found) == ["nothing", "lora"]    # an earlier page showed lora's pictures under that name, too
    assert [picture[0, 0, 0] for group in STRIP for picture in found["lora"][group]] == numbers.tolist()
    assert {group: len(own) for group, own in texts.items()} == STRIP
    assert "[V]" in texts["concept"][0] and texts["plain"][0] == texts["concept"][0].replace("[V] ", "")

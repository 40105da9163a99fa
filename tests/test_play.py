"""The page to play with, in a real browser: it computes what the package does, and its tips can be moved."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from purecc_min.benchmark.cells import STEPS, STRIP, Cell
from purecc_min.benchmark.entries import MAIN
from purecc_min.benchmark.plans import can_learn
from purecc_min.measure.toy import HELD_OUT
from purecc_min.methods import cosine
from purecc_min.objective import lambda_star
from tutorials.build import FOLDER

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")

PROBE = """<script>
const NAMES = ["lambda", "angle", "pure", "loss"], report = [], show = () => report.push({
  target: tips.target, complete: tips.complete, said: $("said").textContent,
  shown: Object.fromEntries(NAMES.map(name => [name, $("n-" + name).textContent]))});
show();
for (const button of document.querySelectorAll("button")) { button.click(); show(); }
const tip = $("tip-complete"), press = key => tip.dispatchEvent(new KeyboardEvent("keydown", { key }));
for (let n = 0; n < 90; n++) press("ArrowLeft");
show();
$("tip-target").setPointerCapture = () => 0; $("tip-target").hasPointerCapture = () => true;
const box = $("plane").getBoundingClientRect();
const at = { clientX: box.left + .75 * box.width, clientY: box.top + .5 * box.height, pointerId: 1 };
$("tip-target").dispatchEvent(new PointerEvent("pointermove", at));
show();
const out = document.body.appendChild(document.createElement("pre"));
out.textContent = "REPORT" + JSON.stringify(report) + "END";
</script>"""


def in_browser(script: str, folder) -> list[dict]:
    """What the page reports when this script has been added to it."""
    page = folder / "page.html"
    page.write_text((FOLDER / "play.html").read_text().replace("</html>", script + "</html>"))
    run = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                          "--virtual-time-budget=60000", f"--user-data-dir={folder}/profile", page.as_uri()],
                         capture_output=True, text=True, timeout=120)
    return json.loads(re.search("REPORT(.*)END", run.stdout.split("</script>")[-1])[1])


@needs_browser
def test_the_page_computes_what_the_package_does(tmp_path):
    report = in_browser(PROBE, tmp_path)
    assert len(report) == 8                      # as it opens, five examples, by keys, by the pointer
    for state in report:
        target, complete = (torch.tensor(state[name]).double().view(1, 2, 1, 1)
                            for name in ("target", "complete"))
        lam = lambda_star(complete, target)
        pure = lam * target
        shown = {name: float(number.strip("°")) for name, number in state["shown"].items()}
        assert shown["lambda"] == pytest.approx(lam.item(), abs=.006)
        assert shown["pure"] == pytest.approx(pure.norm().item(), abs=.006)
        assert shown["loss"] == pytest.approx((complete - pure).square().sum().item(), abs=.006)
        angle = cosine(complete, target).clamp(-1, 1).acos().rad2deg().item()
        assert shown["angle"] == pytest.approx(angle, abs=.6)
    assert "the concept and nothing else" in report[1]["said"] and "AWAY" in report[4]["said"]
    assert report[6]["complete"][0] == -3.8      # a tip stays on the page
    assert report[7]["target"] == pytest.approx([2, 0], abs=.02)


def test_the_page_needs_nothing_from_elsewhere():
    text = (FOLDER / "play.html").read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|<link|src=|@import|url\((?!#)", text)


BROWSE = """<script>
const seen = [];
for (const concept of Object.keys(gallery)) for (const group of Object.keys(gallery[concept].texts)) {
  $("concept").value = concept; $("group").value = group; showGallery();
  seen.push({ concept, group, methods: Object.keys(gallery[concept].methods), asks: $("asks").textContent,
              titles: [...document.querySelectorAll("#drawn tbody th")].map(head => head.textContent),
              canvases: [...document.querySelectorAll("#drawn canvas")] });
}
Promise.all(Object.values(gallery).flatMap(own => Object.values(own.methods)).map(data =>
  Object.assign(new Image(), { src: data }).decode())).then(() => setTimeout(() => {
    for (const one of seen) one.blank = one.canvases.filter(canvas =>
      new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size < 8).length;
    for (const one of seen) one.canvases = one.canvases.length;
    const out = document.body.appendChild(document.createElement("pre"));
    out.textContent = "REPORT" + JSON.stringify(seen) + "END";
  }, 1000));
</script>"""


@needs_browser
def test_the_gallery_shows_every_method_on_every_held_out_concept(tmp_path):
    report = in_browser(BROWSE, tmp_path)
    assert {one["concept"] for one in report} == set(HELD_OUT)
    for one in report:
        learned = {method for method in MAIN if can_learn(method, one["concept"])}
        assert set(one["methods"]) == {"nothing", "perfect", *learned} - {"lora, own empty text"}, one
        assert one["titles"] == ["references", *one["methods"]] and one["asks"], one
        assert one["canvases"] == 4 * len(one["titles"]) and not one["blank"], one


def test_a_strip_is_cut_at_its_groups(tmp_path):
    """Each picture of this strip is of a colour of its own, its number in the strip."""
    pytest.importorskip("matplotlib")
    from purecc_min.benchmark.figures import typical_pictures
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
    shown = [int(picture[0, 0, 0]) for group in STRIP for picture in found["lora"][group]]
    assert shown == numbers.tolist()
    assert {group: len(own) for group, own in texts.items()} == STRIP
    assert "[V]" in texts["concept"][0] and texts["plain"][0] == texts["concept"][0].replace("[V] ", "")


def test_no_pictures_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tutorials.gallery import main
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2 and "python -m purecc_min.benchmark" in capsys.readouterr().err

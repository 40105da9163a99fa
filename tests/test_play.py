"""The page to play with, in a real browser: it computes what the package does, and its tips can be moved."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from purecc_min.objective import cosine, lambda_star
from tutorials.build import FOLDER

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")

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


def test_the_page_computes_what_the_package_does(tmp_path):
    page = tmp_path / "page.html"
    page.write_text((FOLDER / "play.html").read_text().replace("</html>", PROBE + "</html>"))
    run = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                          f"--user-data-dir={tmp_path}/profile", page.as_uri()],
                         capture_output=True, text=True, timeout=120)
    report = json.loads(re.search("REPORT(.*)END", run.stdout.split("</script>")[-1])[1])
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

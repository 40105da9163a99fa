"""A page in a real browser, in a frame of a given size, and what a script on it reports."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")
FRAME = """<!doctype html>
<iframe src="page.html" style="width: WIDTHpx; height: HEIGHTpx; border: 0"></iframe>
<script>
addEventListener("message", event => { document.body.append("REPORT" + event.data + "END"); });
</script>"""
REPORT = 'const report = found => parent.postMessage(JSON.stringify(found), "*");'


def chromium(folder: Path, *arguments: str) -> str:
    """Runs the browser without a window; returns what it prints."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300).stdout


def in_browser(page: str, script: str, folder: Path, width: int = 1200, height: int = 900) -> list:
    """What a script sends with `report(...)` when it has been added to a page."""
    script = f"<script>\n{REPORT}\n{script}</script>"
    (folder / "page.html").write_text(page.replace("</html>", script + "</html>"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(height)))
    printed = chromium(folder, "--dump-dom", f"--window-size={max(width, 500) + 40},{height + 200}",
                       "--virtual-time-budget=60000", frame.as_uri())
    return json.loads(re.search("REPORT(.*)END", printed.split("</script>")[-1])[1])

"""A headless Chromium that opens one page from the disk, and asks nobody for anything."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"),
)
# The page has no script of its own. It is shown in a frame of the width that is asked for, because a window has a least width.
FRAME = """<!doctype html><title>probe</title><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:900px"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const sizes = [...page.querySelectorAll("p, td, th, dd, dt, figcaption, h1, h2, h3, h4, li")]
    .map(element => parseFloat(frame.contentWindow.getComputedStyle(element).fontSize));
  const found = {{
    inner: frame.contentWindow.innerWidth, scroll: root.scrollWidth, smallest: Math.min(...sizes),
    images: [...page.images].map(image => [image.naturalWidth, image.clientWidth, image.alt]),
    asked: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
  }};
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
}};
frame.srcdoc = {page};
</script>"""


class Chromium:
    """Runs the program once per question."""

    def __init__(self, program: str, profile: Path) -> None:
        self._command = [program, *FLAGS, f"--user-data-dir={profile}"]
        self._probe = profile / "probe.html"

    def measure(self, page: Path, width: int) -> dict[str, Any]:
        """Of a page laid out that wide: "inner" and "scroll" width, "smallest" font in pixels, "images" (natural width, width,
        alternative text), "asked": what it loaded."""
        html = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
        self._probe.write_text(FRAME.format(width=width, page=html), encoding="utf-8")
        dom = self._run("--dump-dom", "--virtual-time-budget=5000", "--window-size=1600,1000", self._probe.as_uri())
        found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[-500:]
        return json.loads(unescape(found[1]))

    def screenshot(self, page: Path, png: Path, width: int, height: int) -> None:
        """The page's beginning as a picture."""
        self._run(f"--screenshot={png}", f"--window-size={width},{height}", page.as_uri())

    def print(self, page: Path, pdf: Path) -> None:
        """The page on paper."""
        self._run(f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())

    def _run(self, *arguments: str) -> str:
        result = subprocess.run([*self._command, *arguments], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

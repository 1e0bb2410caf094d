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
# The page is shown in a frame of the width that is asked for, because a window has a least width.
FRAME = """<!doctype html><title>probe</title><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:900px"></iframe>
<script>
const frame = document.getElementById("page");
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
frame.onload = async () => {{
  const page = frame.contentDocument, root = page.documentElement, all = (what) => [...page.querySelectorAll(what)];
  while (!root.dataset.drawn) await pause(50);
  const sizes = all("p, td, th, h1, h2, h3, h4, li, figcaption, b, button, .scale span, text")
    .filter((element) => element.textContent)
    .map((element) => parseFloat(frame.contentWindow.getComputedStyle(element).fontSize));
  const hovered = [];
  for (const plot of all({hover})) {{
    plot.scrollIntoView();
    const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
    for (const type of ["mouseover", "mousemove"])
      plot.querySelector(".nsewdrag").dispatchEvent(new frame.contentWindow.MouseEvent(type,
        {{ bubbles: true, clientX: box.left + 0.97 * box.width, clientY: box.top + 0.02 * box.height + 2 }}));
    await pause(300);
    const told = [...plot.querySelectorAll(".hovertext")].map((text) => [...text.querySelectorAll(".line")]);
    hovered.push(told.flat().map((line) => line.textContent).join(" "));
  }}
  const found = {{
    inner: frame.contentWindow.innerWidth, scroll: root.scrollWidth, smallest: Math.min(...sizes), drawn: root.dataset.drawn,
    plots: all(".plot").map((plot) => [plot.clientWidth, plot.querySelectorAll(".trace, .hm image").length]),
    told: all("[data-chart]").map((chart) => chart.getAttribute("aria-label")),
    legends: all(".legend").map((legend) => [...legend.querySelectorAll("button")].map((b) => b.textContent)),
    first: all(".card").map((card) => card.getBoundingClientRect().bottom + frame.contentWindow.scrollY),
    asked: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name), hovered,
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

    def measure(self, page: Path, width: int, hover: str = "none") -> dict[str, Any]:
        """Of a page laid out that wide: "inner" and "scroll" width, "smallest" font in pixels, "drawn", "plots" (width,
        traces), what is "told" of the charts, "legends", where the "first" cards end, what it "asked" for, and what the pointer
        is told near the upper right corner of the plots that the selector `hover` finds: "hovered"."""
        html = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
        self._probe.write_text(FRAME.format(width=width, page=html, hover=json.dumps(hover)), encoding="utf-8")
        dom = self._run("--dump-dom", "--virtual-time-budget=30000", "--window-size=1600,1000", self._probe.as_uri())
        found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[-500:]
        return json.loads(unescape(found[1]))

    def screenshot(self, page: Path, png: Path, width: int, height: int, *, dark: bool = False) -> None:
        """The page's beginning as a picture."""
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        self._run(
            f"--screenshot={png}", f"--window-size={width},{height}", "--virtual-time-budget=30000", *scheme, page.as_uri()
        )

    def print(self, page: Path, pdf: Path) -> None:
        """The page on paper."""
        options = ("--no-pdf-header-footer", "--virtual-time-budget=30000", "--window-size=1280,1000")
        self._run(f"--print-to-pdf={pdf}", *options, page.as_uri())

    def _run(self, *arguments: str) -> str:
        result = subprocess.run([*self._command, *arguments], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

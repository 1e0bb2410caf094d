"""Links between the documents lead to a file, and to a heading where they name one; the documents stay short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.skipif(not DOCUMENTS, reason="not a clone of the repository")
def test_links_lead_somewhere():
    lost = []
    for name in DOCUMENTS:
        document = ROOT / name
        for target in LINK.findall(document.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
                lost.append(f"{name}: {target}")
    assert not lost, "\n".join(lost)


def _words(*files: Path) -> int:
    """As `wc -w` counts."""
    return sum(len(file.read_text(encoding="utf-8").split()) for file in files)


def test_the_documents_are_short():
    assert _words(ROOT / "README.md") <= 900
    assert _words(*(ROOT / "docs").glob("*.md")) <= 12_500

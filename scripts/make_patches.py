"""Makes the patches, their checksums and the table in patches/README.md from a git repository of Megatron-LM with its tags.

    python scripts/make_patches.py MEGATRON_LM_DIR

For a new release add its tag to TAGS. What is inserted is in megatron_global_lbl/command/insertions.py. It stops where a place
for it is not found exactly once.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the plugin, when it is not installed

from megatron_global_lbl.command.insertions import insert  # noqa: E402

PATCHES = ROOT / "patches"
FILE = "megatron/training/arguments.py"
TAGS = (
    "core_v0.14.0",
    "core_v0.15.3",
    "core_v0.16.1",
    "core_v0.17.0",
    "core_v0.17.1",
    "core_v0.18.0",
    "core_v0.18.2",
    "core_v0.19.0",
)


def table(patches: list[dict[str, str]]) -> str:
    """The table of patches/README.md."""
    rows = ["| tag | commit | SHA-256 of the file before | after | checked |", "|---|---|---|---|---|"]
    rows += ["| {tag} | `{commit}` | `{before}` | `{after}` | {checked} |".format(**patch) for patch in patches]
    return "\n".join(rows) + "\n"


def main(repository: str) -> None:
    """Write the patches of all tags, checksums.json and the table."""
    patches = []
    for tag in TAGS:

        def git(*command: str) -> bytes:
            return subprocess.run(["git", "-C", repository, *command], check=True, capture_output=True).stdout

        before = git("show", f"{tag}:{FILE}")
        major, minor, _ = tag.removeprefix("core_v").split(".")
        after = insert(before, (int(major), int(minor)))
        texts = [content.decode().splitlines(True) for content in (before, after)]
        diff = difflib.unified_diff(*texts, f"a/{FILE}", f"b/{FILE}", n=1)
        (PATCHES / f"{tag}.patch").write_text("".join(diff), encoding="utf-8")
        patches.append(
            {
                "tag": tag,
                "commit": git("rev-parse", f"{tag}^{{commit}}").decode().strip(),
                "before": hashlib.sha256(before).hexdigest(),
                "after": hashlib.sha256(after).hexdigest(),
                "checked": datetime.date.today().isoformat(),
            }
        )
    (PATCHES / "checksums.json").write_text(json.dumps({"file": FILE, "patches": patches}, indent=2) + "\n", encoding="utf-8")
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    start, end = readme.index("| tag |"), readme.index("\n\n", readme.index("| tag |")) + 1
    (PATCHES / "README.md").write_text(readme[:start] + table(patches) + readme[end:], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

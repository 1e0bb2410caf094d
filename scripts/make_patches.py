"""Makes the patches, their checksums and the table in patches/README.md from a git repository of Megatron-LM with its tags.

    python scripts/make_patches.py MEGATRON_LM_DIR

For a new release add its tag to TAGS. It stops where a place to insert something is not found exactly once.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

PATCHES = Path(__file__).parents[1] / "patches"
FILE = "megatron/training/arguments.py"
TAGS = ("core_v0.14.0", "core_v0.15.3", "core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0")

# Everything that may change with the plugin is behind the two calls, so that an upgrade of it needs no new patch. Without the
# plugin the command line is searched, not only declared: argparse would ignore the flags where a script parses known ones.
ARGUMENTS = """\
    try:  # plugin megatron_global_lbl: --moe-lbl-*
        from megatron_global_lbl.flags import add_arguments as add_moe_lbl_args
    except ImportError as error:
        import sys
        given = [arg for arg in sys.argv if arg.startswith('--moe-lbl-')]
        if given:
            raise SystemExit(f'error: {given[0]} needs the plugin megatron_global_lbl ({error}): '
                             'pip install it from its source tree into this environment')
    else:
        parser = add_moe_lbl_args(parser)
"""
VALIDATED = """\
    if hasattr(args, 'moe_lbl_scope'):
        from megatron_global_lbl.flags import activate as activate_moe_lbl
        activate_moe_lbl(args)
"""
# The line after which each goes (the first of these that the release has), always followed by an empty one: so the one line
# of context that a hunk has before and after it holds one line of Megatron-LM.
PLACES = (
    (("    parser = _add_fault_injector_args(parser)\n", "    parser = _add_sft_args(parser)\n"), ARGUMENTS),
    (('    _print_args("arguments", args)\n',), VALIDATED),
)


def patched(before: str) -> str:
    """The text of `FILE` with both insertions."""
    after = before
    for lines, insertion in PLACES:
        line = next(line for line in lines if line in before)
        assert before.count(line) == before.count(line + "\n") == 1, f"not exactly once, before an empty line: {line}"
        after = after.replace(line, line + insertion)
    return after


def table(patches: list[dict[str, str]]) -> str:
    """The table of patches/README.md."""
    rows = ["| tag | commit | SHA-256 of the file before | after | checked |", "|---|---|---|---|---|"]
    rows += ["| {tag} | `{commit}` | `{before}` | `{after}` | {checked} |".format(**patch) for patch in patches]
    return "\n".join(rows) + "\n"


def main(repository: str) -> None:
    """Write the patches of all tags, checksums.json and the table."""
    patches = []
    for tag in TAGS:

        def git(*command: str) -> str:
            return subprocess.run(["git", "-C", repository, *command], check=True, capture_output=True).stdout.decode()

        before = git("show", f"{tag}:{FILE}")
        after = patched(before)
        diff = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{FILE}", f"b/{FILE}", n=1)
        (PATCHES / f"{tag}.patch").write_text("".join(diff), encoding="utf-8")
        patches.append(
            {
                "tag": tag,
                "commit": git("rev-parse", f"{tag}^{{commit}}").strip(),
                "before": hashlib.sha256(before.encode()).hexdigest(),
                "after": hashlib.sha256(after.encode()).hexdigest(),
                "checked": datetime.date.today().isoformat(),
            }
        )
    (PATCHES / "checksums.json").write_text(json.dumps({"file": FILE, "patches": patches}, indent=2) + "\n", encoding="utf-8")
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    start, end = readme.index("| tag |"), readme.index("\n\n", readme.index("| tag |")) + 1
    (PATCHES / "README.md").write_text(readme[:start] + table(patches) + readme[end:], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

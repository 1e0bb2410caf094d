"""All defects of upstream's `global_aux_loss` on the installed Megatron-Core, in one table.

    python benchmarks/upstream/run_all.py                        prints every script's table, then one for all
    python benchmarks/upstream/run_all.py --only D2 D5           some of them
    python benchmarks/upstream/run_all.py --markdown FILE        also writes both as Markdown, with machine and versions
    PYTHONPATH=.versions/0.16.1 python benchmarks/upstream/run_all.py       another release, installed into a folder

Exit status: 0 when every defect was shown and the plugin was right everywhere, 1 if not, 2 when the release has no
`global_aux_loss`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
import time
from pathlib import Path

import side_by_side
from side_by_side import DEFECTS, NO_GLOBAL_AUX_LOSS, Finding, Pool, markdown_table, table

HEADER = ("defect", "upstream", "plugin", "what was seen")


def megatron_version() -> str:
    """In a worker: the release, without the commit of the folder that Megatron appends."""
    import megatron.core

    return megatron.core.__version__.split("+")[0]


def findings(pool: Pool, only: list[str] | None = None) -> list[Finding]:
    """What every script saw."""
    wanted = [entry for entry in DEFECTS if only is None or entry.id in only]
    scripts = {entry.id: importlib.import_module(entry.script.removesuffix(".py")) for entry in wanted}
    return [side_by_side.find(id, script.show, pool) for id, script in scripts.items()]


def rows(seen: list[Finding]) -> list[tuple[str, ...]]:
    """One row per defect."""
    words = {True: ("off", "right"), False: ("not off", "WRONG"), None: ("-", "-")}
    return [(f.defect.id, words[f.upstream_off][0], words[f.plugin_right][1], f.summary) for f in seen]


def machine(version: str) -> str:
    """Class of the machine and versions, without its name."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return (
        f"Megatron-Core {version}, PyTorch {torch.__version__}, Python {platform.python_version()}, gloo on "
        f"{os.cpu_count()} cores of {model}, no GPU used"
    )


def markdown(seen: list[Finding], version: str) -> str:
    """A section of a report."""
    lines = [f"## Megatron-Core {version}", "", machine(version) + ".", "", *markdown_table(HEADER, rows(seen))]
    for finding in seen:
        lines += ["", f"### {finding.defect.id}: {finding.defect.text}", "", *markdown_table(finding.header, finding.rows)]
        lines += ["", *(f"{note[0].upper()}{note[1:]}." for note in finding.notes)] if finding.notes else []
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, pool: Pool | None = None) -> int:
    """The command; a pool that is passed in is left running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[entry.id for entry in DEFECTS], metavar="ID")
    parser.add_argument("--markdown", metavar="FILE", help="append the tables to FILE")
    args = parser.parse_args(argv)
    started, own_pool = time.monotonic(), pool is None
    pool = pool or side_by_side.start_pool()
    try:
        version = pool.run(megatron_version, 1)[0]
        seen = findings(pool, args.only)
    finally:
        if own_pool:
            pool.close()
    for finding in seen:
        print(finding, end="\n\n")
    print(f"{datetime.date.today()}  {machine(version)}, {time.monotonic() - started:.0f} s")
    print("\n".join(table(HEADER, rows(seen))))
    if args.markdown:
        with open(args.markdown, "a", encoding="utf-8") as file:
            file.write(markdown(seen, version))
    statuses = {finding.status for finding in seen}
    return NO_GLOBAL_AUX_LOSS if NO_GLOBAL_AUX_LOSS in statuses else max(statuses)


if __name__ == "__main__":
    sys.exit(main())

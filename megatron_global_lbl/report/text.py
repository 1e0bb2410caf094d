"""Names that others chose, made safe to show, and numbers as they are shown."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from megatron_global_lbl.metrics.record import printable

RECORD = "balance"  # a run's folder of its record


def record_directory(directory: str | Path) -> Path:
    """The directory itself, or its folder "balance" if only that one holds records."""
    directory = Path(directory)
    inner = directory / RECORD
    return inner if inner.is_dir() and not any(directory.glob("*.balance")) else directory


def labels(runs: list[Any]) -> list[str]:
    """Names of runs that differ: the directory's (its parent's, if it is "balance"), with more of the path if needed."""
    paths = [run.directory.resolve() for run in runs]
    models = [printable(run.name).removeprefix(printable(path.name)) for run, path in zip(runs, paths)]
    folders = [path.parent if path.name == RECORD and path.parent.name else path for path in paths]
    names = [folder.name for folder in folders]
    if len(set(zip(names, models))) < len(names) and len(set(folders)) > 1:
        common = Path(os.path.commonpath(folders))
        names = [str(folder.relative_to(common)) for folder in folders]
    names = [printable(name + model) for name, model in zip(names, models)]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def slugs(names: list[str]) -> list[str]:
    """The names as parts of file names; they differ, too."""
    found: list[str] = []
    for name in names:
        slug = plain = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "run"
        number = 1
        while slug in found:
            number += 1
            slug = f"{plain}-{number}"
        found.append(slug)
    return found


def amount(value: float) -> str:
    """Of things that are counted; a mean over an interval may be a fraction."""
    return "not known" if not math.isfinite(value) else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def number(value: float, digits: int = 3) -> str:
    """Of a measure."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else digits
    return f"{value:,.{digits}f}" if math.isfinite(value) else "not known"


def counted(value: int, what: str) -> str:
    """With the plural."""
    return f"{value:,} {what}{'' if value == 1 else 's'}"

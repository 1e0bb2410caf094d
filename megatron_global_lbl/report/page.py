"""One self-contained page and its pictures as files: the page holds them as data, so it can be sent and opened anywhere."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from megatron_global_lbl.metrics.alarms import Alarm, alarms
from megatron_global_lbl.metrics.reader import Run, read
from megatron_global_lbl.report import curves, experts, facts, loads
from megatron_global_lbl.report.style import Picture, styled
from megatron_global_lbl.specialise.result import FILE_NAME, Specialisation
from megatron_global_lbl.specialise.result import read as read_specialisation

PAGE = "report.html"
_FLAG = r'<span class="flag">\g<0></span>'  # is not broken at its hyphens


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    label: str
    slug: str
    summary: str
    figures: list[facts.Fact]
    alarms: list[Alarm]
    notes: list[str]
    settings: list[tuple[str, str]]
    pictures: list[Picture]
    loads: list[Picture]
    specialisation: Specialisation | None  # of a checkpoint of the run, where it was measured
    about_experts: str
    experts: list[Picture]


def write_report(directories: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw the balance records of one or more directories: `report.html` and a PNG per picture.

    Args:
        directories: as given to `--moe-lbl-metrics-dir`; every run and model in them is shown, several are compared.
        out: where to write; made if it is not there. Default: the folder "report" in the first directory.

    Returns:
        The page.

    Raises:
        RecordError: a directory holds no record, or a broken or foreign one; the message names file and place.
        NotASpecialisation: a specialisation.json in a directory is broken or foreign; the message names it.
        OSError: it cannot be read, or `out` cannot be written.
    """
    runs = [run for directory in directories for run in read(directory)]
    out = Path(directories[0]) / "report" if out is None else Path(out)
    measured = _measured(runs)
    with styled():
        names = labels(runs)
        sections = [_section(*of_run) for of_run in zip(runs, names, slugs(names), measured)]
        compared = _comparison(list(zip([section.label for section in sections], runs))) if len(runs) > 1 else []
    html = _template().render(
        sections=sections,
        compared=compared,
        rows=[facts.row(run, section.label, section.alarms) for run, section in zip(runs, sections)],
        columns=facts.COLUMNS,
        expert_rows=[experts.row(s.specialisation, s.label) for s in sections if s.specialisation is not None],
        expert_columns=experts.COLUMNS,
        made=facts.made(),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, content in _files(sections, compared):
        (out / name).write_bytes(content)
    page = out / PAGE
    page.write_text(html, encoding="utf-8")
    return page


def _measured(runs: list[Run]) -> list[Specialisation | None]:
    """What the experts of each run specialise in; in a directory with several models it is the first one's."""
    found: list[Specialisation | None] = []
    for i, run in enumerate(runs):
        first = run.directory not in [other.directory for other in runs[:i]]
        found.append(read_specialisation(run.directory) if first and (run.directory / FILE_NAME).exists() else None)
    return found


def _section(run: Run, label: str, slug: str, measured: Specialisation | None) -> Section:
    pictures = [curves.lbl(run), curves.max_vio(run), loads.max_vio(run) if len(run.layers) > 1 else None]
    pictures += [curves.entropy(run), curves.uncertainty(run), curves.dead(run)]
    return Section(
        label,
        slug,
        facts.summary(run),
        facts.figures(run),
        alarms(run),
        run.notes,
        facts.settings(run),
        [picture for picture in pictures if picture is not None],
        loads.thirds(run),
        measured,
        "" if measured is None else experts.summary(measured),
        [] if measured is None else experts.pictures(measured),
    )


def _comparison(runs: list[tuple[str, Run]]) -> list[Picture]:
    return [
        picture
        for name, (title, caption) in facts.COMPARED.items()
        if (picture := curves.comparison(runs, name, title, caption)) is not None
    ]


def labels(runs: list[Run]) -> list[str]:
    """Names that differ: with more of the path where two directories are called alike."""
    names = [run.name for run in runs]
    paths = [run.directory.resolve() for run in runs]
    if len(set(names)) < len(names) and len(set(paths)) > 1:
        common = Path(os.path.commonpath(paths))
        names = [f"{path.relative_to(common)}{run.name.removeprefix(path.name)}" for run, path in zip(runs, paths)]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def slugs(labels: list[str]) -> list[str]:
    """The labels as parts of file names, which differ, too."""
    found: list[str] = []
    for label in labels:
        slug = plain = re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.") or "run"
        number = 1
        while slug in found:
            number += 1
            slug = f"{plain}-{number}"
        found.append(slug)
    return found


def _files(sections: list[Section], compared: list[Picture]) -> Iterator[tuple[str, bytes]]:
    for picture in compared:
        yield f"{picture.name}.png", picture.png
    for section in sections:
        prefix = f"{section.slug}-" if len(sections) > 1 else ""
        for picture in [*section.pictures, *section.loads, *section.experts]:
            yield f"{prefix}{picture.name}.png", picture.png


def _template() -> jinja2.Template:
    # Names of directories and notes are other people's words: escaped, and a name that the template gets wrong is an error.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data"] = lambda picture: "data:image/png;base64," + base64.b64encode(picture.png).decode()
    environment.filters["flags"] = lambda text: Markup(re.sub(r"--[a-z][a-z-]*", _FLAG, str(escape(text))))
    source = resources.files("megatron_global_lbl.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source)

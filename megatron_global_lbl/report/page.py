"""One self-contained page: verdicts and tables as HTML, charts as data with the Plotly that draws them, compressed."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from megatron_global_lbl.metrics import Run, read
from megatron_global_lbl.metrics.alarms import alarms
from megatron_global_lbl.metrics.record import printable
from megatron_global_lbl.report import answers, experts
from megatron_global_lbl.report.answers import Told
from megatron_global_lbl.report.chart import COLOURS, DASHES, Chart
from megatron_global_lbl.report.curves import curves
from megatron_global_lbl.report.loads import end_load, heatmaps
from megatron_global_lbl.report.text import labels, record_directory
from megatron_global_lbl.specialise.result import Specialisation
from megatron_global_lbl.specialise.result import read as read_specialisation

PAGE = "report.html"
# Cells of heatmaps in a section: a page of at most 6 MB, with 2 MB of Plotly, at 2.7 to 5.4 bytes a cell.
CELLS = 500_000
_FLAG = r'<span class="flag">\g<0></span>'  # is not broken at its hyphens


def write_report(directories: Sequence[str | Path], out: str | Path | None = None, *, png: bool = False) -> Path:
    """Draw the balance records of one or more directories into `report.html`; its path.

    Args:
        directories: as given to `--moe-lbl-metrics-dir`, or the folders that hold it as "balance"; several are compared.
        out: where to write; made if it is not there. Default: the folder "report" in the first directory.
        png: write every chart as a PNG beside the page, too; needs Matplotlib.

    Raises:
        RecordError, NotASpecialisation: a directory holds no record, or a broken or foreign file; the message names it.
        OSError: it cannot be read, or `out` cannot be written.
    """
    runs = [run for directory in directories for run in read(record_directory(directory))]
    out = Path(directories[0]) / "report" if out is None else Path(out)
    told = [Told(*of_run) for of_run in zip(labels(runs), runs, map(alarms, runs), map(end_load, runs), _measured(runs))]
    named = [(one.label, one.run) for one in told]
    loads, specialised = _fitting(heatmaps(named, [one.end_LE for one in told])), _fitting(_expert_charts(told))
    sections = {"curves": ("Over time", curves(named)), "loads": ("Layers and experts", loads)}
    sections["experts"] = ("What the experts specialise in", specialised)
    charts = [chart for _, charts in sections.values() for chart in charts]
    page = _template().render(
        told=told,
        answers=answers.answers(told),
        rows=[answers.row(one) for one in told],
        columns=answers.COLUMNS,
        sections=sections,
        losses=_losses(told),
        looks=Markup(json.dumps([COLOURS, DASHES])),
        charts=_compressed(json.dumps([chart.as_json() for chart in charts])),
        library=_compressed(get_plotlyjs()),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    out.mkdir(parents=True, exist_ok=True)
    if png:
        from megatron_global_lbl.report.paper import write_pngs

        write_pngs(charts, out)
    (out / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def _measured(runs: list[Run]) -> list[list[Specialisation]]:
    """The checkpoints of each run, in order; in a directory with several models they are the first one's."""
    found = []
    for i, run in enumerate(runs):
        first = run.directory not in [other.directory for other in runs[:i]]
        files = run.directory.glob("specialisation*.json") if first else ()
        found.append(sorted(map(read_specialisation, files), key=lambda result: result.iteration))
    return found


def _expert_charts(told: list[Told]) -> list[Chart]:
    several = len(told) > 1
    measured = [(one.label if several else "", one.measured[-1]) for one in told if one.measured]
    return [c for one in told for c in experts.over_checkpoints(one.label, one.measured)] + experts.charts(measured)


def _fitting(charts: list[Chart]) -> list[Chart]:
    """The charts with as many panels as the page has room for, the largest cut first."""
    while charts and sum(map(_cells, charts)) > CELLS:
        i = max(range(len(charts)), key=lambda i: _cells(charts[i]))
        if len(charts[i].panels) < 2:
            break
        charts[i] = dataclasses.replace(charts[i], panels=charts[i].panels[:-1], left_out=charts[i].left_out + 1)
    return charts


def _cells(chart: Chart) -> int:
    return sum(panel.values.size for panel in chart.panels)


def _losses(told: list[Told]) -> tuple[list[str], list[list[str]]]:
    """A table: a row per domain, a column per checkpoint."""
    columns = {f"{one.label}, iteration {r.iteration:,}": experts.loss_of(r) for one in told for r in one.measured}
    names = dict.fromkeys(name for losses in columns.values() for name in losses)
    rows = [[name, *(f"{of[name]:.4f}" if name in of else "-" for of in columns.values())] for name in names]
    return ["domain", *columns], rows


def _compressed(text: str) -> Markup:
    return Markup(base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode())


def _template() -> jinja2.Template:
    # Names of directories and notes are other people's words: escaped, and a name that the template gets wrong is an error.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: value if isinstance(value, Markup) else printable(value)
    environment.filters["flags"] = lambda text: Markup(re.sub(r"--[a-z][a-z-]*", _FLAG, str(escape(printable(text)))))
    environment.globals |= {"summary": answers.summary, "settings": answers.settings, "about_experts": experts.summary}
    environment.globals |= {"idle_experts": answers.idle_experts, "in_words": answers.in_words, "colours": COLOURS}
    folder = resources.files("megatron_global_lbl.report")
    environment.globals["script"] = Markup(folder.joinpath("page.js").read_text(encoding="utf-8"))
    return environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))

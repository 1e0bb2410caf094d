"""`megatron-lbl report` and `watch` on records of the real writer; the page in a browser is tested in tests/browser."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from synthetic_record import even, write

from megatron_global_lbl.command import main
from megatron_global_lbl.metrics import frames
from megatron_global_lbl.metrics.reader import read
from megatron_global_lbl.report import facts, page, watch
from megatron_global_lbl.report.series import binned, edges, over_layers
from megatron_global_lbl.report.terminal import table


class Page(HTMLParser):
    """What of a page can load something, and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag == "img":
            self.pictures.append(dict(attrs))
        assert tag not in ("script", "link", "iframe", "object")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one healthy run and one with a dead expert and a name that is markup."""
    folder = tmp_path_factory.mktemp("records")
    dead = even(40)
    dead[10:, 1, 5] = 0
    directories = [write(folder / "healthy", even(30)), write(folder / "<b>&", dead, sequences=8)]
    assert main(["report", *map(str, directories), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_page_is_self_contained(report):
    """Nothing to load but what it holds, and each picture is also a file."""
    text = (report / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in found.references)
    assert "url(" not in text and "@import" not in text
    held = {base64.b64decode(picture["src"].partition(",")[2]) for picture in found.pictures}
    assert held == {file.read_bytes() for file in report.glob("*.png")}
    assert len(held) == 4 + 2 * 8 + 1  # compared; per run five over time and three thirds; dead experts of one
    assert all(picture["alt"] and "iteration" in picture["alt"] for picture in found.pictures)


def test_page_says_what_the_record_says(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "<b>&amp;" not in text and "&lt;b&gt;&amp;" in text
    assert "1 expert of layer 3 (number 5) took no token" in text and "since iteration 101" in text
    assert "Balance BSZ 8 (scope global)" in text
    assert text.count("No alarm at the end of the record") == 1
    assert text.count("3 MoE layers of 16 experts, top-2") == 2


def test_dead_expert_is_black(report):
    """It is the first of its row, being the least loaded; black is no colour of the scale."""
    pixels = imread(report / "b-load-last.png")[..., :3]
    black = (pixels == 0).all(axis=-1)
    healthy = (imread(report / "healthy-load-last.png")[..., :3] == 0).all(axis=-1)
    assert black.sum() > 100 and healthy.sum() == 0


def test_default_place_and_one_interval(tmp_path, capsys):
    write(tmp_path / "run", even(1, layers=1, experts=4))
    assert main(["report", str(tmp_path / "run")]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "run" / "report" / "report.html"


def test_counts_are_whole_and_measures_are_not(tmp_path):
    load = even(20, layers=1)
    load[-1, 0, 5] = 0
    (run,) = read(write(tmp_path, load, sequences=1))
    line = dict(zip(facts.COLUMNS, facts.row(run, "a", [])))
    assert (line["Balance BSZ"], line["dead experts"]) == ("1", "1")
    assert line["LBL global"].startswith("1.0") and len(line["LBL global"]) == 5


def test_labels_differ():
    """Directories of one name get more of their path; models of one directory have names."""
    runs = [
        SimpleNamespace(directory=Path(path), name=name)
        for path, name in [("/x/a/balance", "balance"), ("/x/b/balance", "balance")]
    ]
    assert page.labels(runs) == ["a/balance", "b/balance"]
    runs = [SimpleNamespace(directory=Path("/x/a"), name=name) for name in ("a model1", "a model2")]
    assert page.labels(runs) == ["a model1", "a model2"]
    assert page.labels(runs[:1] * 2) == ["a model1 (1)", "a model1 (2)"]
    assert page.slugs(["run 1", "run-1", "run/1", "run-1-2"]) == ["run-1", "run-1-2", "run-1-3", "run-1-2-2"]


def test_text_has_contrast(report):
    """WCAG 2 AA, 4.5 to 1 on white, of every colour that the style gives to text."""
    text = (report / "report.html").read_text(encoding="utf-8")
    colours = re.findall(r"--(?:ink|quiet|alarm|good): (#\w+)", text) + re.findall(r"\ba \{ color: (#\w+)", text)
    assert len(colours) == 5
    for colour in colours:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        part = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5, colour


def broken(directory: Path) -> None:
    file = next(directory.glob("*.balance"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def foreign(directory: Path) -> None:
    next(directory.glob("*.balance")).write_text("something else\n")


def loads_broken(directory: Path) -> None:
    file = next(directory.glob("*.loads"))
    file.write_bytes(bytes([1]) * file.stat().st_size)


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def header_alone(directory: Path) -> None:
    """A disk that is full, or a kill, between the header and the first interval."""
    for file in directory.glob("*.balance"):
        file.write_bytes(frames.packed_header(frames.scan(file).segments[0].header))


@pytest.mark.parametrize("harm", [broken, foreign, loads_broken, empty, header_alone])
@pytest.mark.parametrize("command", ["report", "watch"])
def test_a_record_that_cannot_be_read(tmp_path, capsys, command, harm):
    """One line with the file and the place, status 2."""
    directory = write(tmp_path / "run", even(200))
    harm(directory)
    assert main([command, str(directory), *(["--once"] if command == "watch" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-lbl {command}: error: {directory}")
    assert "byte" in line if harm not in (empty, header_alone) else "no balance record" in line


@pytest.mark.parametrize("command", ["report", "watch"])
def test_a_torn_tail_is_a_note(tmp_path, capsys, command):
    directory = write(tmp_path / "run", even(30))
    file = next(directory.glob("*.balance"))
    file.write_bytes(file.read_bytes()[:-7])
    assert main([command, str(directory), *(["--once"] if command == "watch" else [])]) == 0
    shown = capsys.readouterr().out
    if command == "report":
        shown = Path(shown.strip()).read_text(encoding="utf-8")
    assert "not whole and were left out" in shown and "29 intervals" in shown


def test_watch_says_whether_it_is_healthy(tmp_path, capsys):
    """0 and 1, with the latest values of every layer."""
    load = even(40)
    assert main(["watch", str(write(tmp_path / "healthy", load)), "--once"]) == 0
    shown = capsys.readouterr().out
    for layer, value in zip("234", load[-1].max(axis=-1) - 1):
        assert re.search(rf"^ +{layer} .* {value:.2f} ", shown, re.MULTILINE)
    assert "healthy: no alarm" in shown
    load[20:, 1, 5] = 0
    assert main(["watch", str(write(tmp_path / "dead", load)), "--once"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^ +3 .* dead_experts", shown, re.MULTILINE)
    assert re.search(r"^ALARM dead_experts: 1 expert of layer 3 \(number 5\).*\n +do: ", shown, re.MULTILINE)


def test_watch_reads_only_what_is_new(tmp_path, monkeypatch):
    """Frames that are checked: all at first, none while nothing changes, then the new ones; with the same result."""
    checked = []

    def frames_at(*arguments, frames_at=frames._frames_at):
        found = frames_at(*arguments)
        checked.append(len(found))
        return found

    watched = watch.Watched(write(tmp_path, even(20)))
    monkeypatch.setattr(frames, "_frames_at", frames_at)
    assert watched.refresh() and sum(checked) == 20
    assert not watched.refresh() and sum(checked) == 20
    write(tmp_path, even(23))  # a training from the start, which makes void what there was
    checked.clear()  # the writer looks, too
    file = next(tmp_path.glob("*.balance"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # while it is being written
    assert watched.refresh() and sum(checked) == 22
    file.write_bytes(whole)
    assert watched.refresh() and sum(checked) == 23
    (seen, _), (fresh,) = watched.runs[0], read(tmp_path)
    assert seen.iterations.tolist() == fresh.iterations.tolist() == list(range(10, 240, 10))
    assert seen.metrics["max_vio"].tolist() == fresh.metrics["max_vio"].tolist()
    assert (seen.load([0, 22]) == fresh.load([0, 22])).all()


def test_watch_sees_another_record_in_its_place(tmp_path):
    """Longer than the one that was deleted, so that the size does not tell."""
    watched = watch.Watched(write(tmp_path, even(20)))
    watched.refresh()
    empty(tmp_path)
    load = even(30)
    write(tmp_path, load)
    watched.refresh()
    assert np.allclose(watched.runs[0][0].metrics["max_vio"], load.max(axis=-1) - 1)


def test_few_rows_show_the_worst(tmp_path):
    load = even(20, layers=6)
    load[:, 4, 0] = 5
    (run,) = read(write(tmp_path, load))
    console = Console(file=io.StringIO(), width=120)
    console.print(table(run, [], rows=2))
    shown = console.file.getvalue()
    assert re.search(r"^ +6 ", shown, re.MULTILINE) and "the worst 2 of 6 layers" in shown


def test_points_of_a_long_record():
    """Means of the known values, the worst of any interval; an unknown stretch is a gap."""
    values = np.random.default_rng(0).random((1000, 4)).astype(np.float32)
    values[:43, 0] = np.nan
    values[900:] = np.nan
    series = over_layers(np.arange(1, 1001), values, "max_vio")
    starts = edges(1000)
    stops = [*starts[1:], 1000]
    assert len(starts) == 300 and series.iterations[-1] == 1000
    for i, (start, stop) in enumerate(zip(starts, stops)):
        part = values[start:stop]
        known = [column[np.isfinite(column)] for column in part.T]
        means = [column.mean() for column in known if len(column)]
        if not means:
            assert np.isnan([series.mean[i], series.worst[i]]).all()
        else:
            assert series.mean[i] == pytest.approx(np.mean(means), rel=1e-5)
            assert series.worst[i] == max(column.max() for column in known if len(column))
    assert np.isnan(binned(values, starts)[0, 0]) and series.known
    low = over_layers(np.arange(1, 1001), values, "entropy")
    assert low.worst[0] == np.nanmin(values[: starts[1]])


@pytest.mark.parametrize("command, module", [("report", "matplotlib"), ("report", "jinja2"), ("watch", "rich")])
def test_without_the_extra(tmp_path, command, module):
    """One line that names what to install, in a process in which the module cannot be found; and no PyTorch is needed."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name.split('.')[0] == {module!r} else find(name, *rest)\n"
        "from megatron_global_lbl.command import main\n"
        f"status = main([{command!r}, {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == (
        f"megatron-lbl {command}: error: {module} not installed; pip install '.[report]' in the plugin's source tree\n"
    )

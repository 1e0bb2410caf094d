"""`megatron-lbl report` and `watch` on records of the real writer; the page in a browser is tested in tests/browser."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from synthetic_record import even, write
from test_specialise import measured

from megatron_global_lbl.command import main
from megatron_global_lbl.metrics import record as frames
from megatron_global_lbl.metrics.measures import end_of_run
from megatron_global_lbl.metrics.record import printable, read
from megatron_global_lbl.report import answers, chart, page, watch
from megatron_global_lbl.report.series import binned, edges, over_layers
from megatron_global_lbl.report.terminal import table
from megatron_global_lbl.report.text import labels, slugs
from megatron_global_lbl.specialise import result as specialisation

COMMAND = [sys.executable, "-c", "import sys; from megatron_global_lbl.command import main; sys.exit(main(sys.argv[1:]))"]
# Markup, mathematics, a name that Matplotlib hides, a byte that is not UTF-8, a clear screen, a bidirectional override.
ODD = ("<b>&", "run_$USER_$SLURM_JOB_ID", "_micro", os.fsdecode(b"caf\xe9"), "a\x1b[2Jb", "a\u202eb", "{{ 7*7 }}", "%{x}")


class Page(HTMLParser):
    """What of a page can load something, its text, and its charts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.shown: list[str] = []
        self.html = file.read_text(encoding="utf-8")
        self._in = ""
        self.feed(self.html)
        packed = re.search(r'id="charts" type="text/plain">([^<]*)<', self.html)
        assert packed
        self.charts = {c["name"]: c for c in json.loads(gzip.decompress(base64.b64decode(packed[1])))}

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        assert tag not in ("link", "iframe", "object", "img")

    def handle_data(self, data):
        if self._in not in ("script", "style"):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


def matrix(of: dict, number: int) -> np.ndarray:
    """What page.js makes of it."""
    packed = of["matrices"][number]
    values = np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(packed["shape"])
    return np.where(values == 65535, np.nan, values / 65533 * packed["top"])


def reported(*arguments: Path | str) -> Page:
    """The page of these records."""
    *directories, out = map(str, arguments)
    assert main(["report", *directories, "--out", out]) == 0
    return Page(Path(out) / "report.html")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one healthy run and one with dead and starved experts and a name that is markup."""
    folder = tmp_path_factory.mktemp("records")
    bad = even(40)
    bad[10:, 1, 5] = 0
    bad[10:, 2, 7] = 0.05
    bad[10:, 2, 3] = 12
    directories = [write(folder / "healthy", even(30)), write(folder / "<b>&", bad, sequences=8)]
    return reported(*directories, folder / "out")


def test_page_is_self_contained_and_small(report):
    """Nothing to load but what it holds, Plotly included."""
    assert all(reference.startswith("#") for reference in report.references)
    assert "url(" not in report.html and "@import" not in report.html
    assert len(report.html) < 2.5e6


def test_page_of_the_largest_records_is_at_most_6_megabytes(tmp_path):
    """Six runs of 60 layers of 256 experts, three with 16 domains: what does not fit is left out, and said."""
    random = np.random.default_rng(0)
    runs = [write(tmp_path / f"run{i}", even(12, 60, 256, noise=0.5)) for i in range(6)]
    alike = measured().experts[0]
    domains = [replace(measured().domains[0], name=f"domain {d}") for d in range(16)]
    counts = random.integers(1, 10**6, (16, 60, 256)).tolist()
    layers = [str(layer) for layer in range(60)]
    large = specialisation.Specialisation(7, 256, 8, layers, domains, counts, [[0.5] * 60] * 16, [alike] * 60)
    for run in runs[:3]:
        specialisation.write(large, run)
    found = reported(*runs, tmp_path / "out")
    assert 3e6 < len(found.html) <= 6e6
    assert "more panels are left out" in found.text
    names = [line["label"] for line in found.charts["specialisation-scores"]["lines"]]
    assert names == [f"domain {d}" for d in range(16)]
    looks = {(i % len(chart.COLOURS), (i + i // len(chart.COLOURS)) % len(chart.DASHES)) for i in range(16)}
    assert len(looks) == 16


def test_page_says_what_the_record_says(report):
    assert "<b>&amp;" not in report.html and "&lt;b&gt;&amp;" in report.html
    assert "1 expert of layer 3 (number 5) took no token" in report.text and "since iteration 101" in report.text
    assert "Balance BSZ 8 (scope global)" in report.text
    assert report.text.count("No alarm at the end of the record") == 1
    assert report.text.count("3 MoE layers of 16 experts, top-2") == 2
    for word in ("window", "swing", "moe-lbl/"):
        assert word not in report.text


def answered(directory: Path) -> dict[str, answers.Answer]:
    """The page's answers of a directory with one run."""
    (run,) = read(directory)
    files = sorted(directory.glob("specialisation*.json"))
    results = sorted(map(specialisation.read, files), key=lambda found: found.iteration)
    told = answers.Told("run", run, page.alarms(run), page.end_load(run), results)
    return {question.split()[-1]: of_runs[0] for question, of_runs in answers.answers([told])}


@pytest.mark.parametrize(
    "about, state, says",
    [
        ({}, "good", "Scope global acted."),
        ({"settings": {"start_iter": 101}}, "good", "acted, since iteration 101"),
        ({"settings": {"start_iter": 1000}}, "fair", "until iteration 1000, global after it"),
        ({"scope": "micro"}, "fair", "Scope micro acted"),
        ({"alpha": 0.0}, "bad", "the coefficient is 0"),
        ({"data_parallel": 1, "micro_batches": 1, "sequences": 4}, "bad", "as micro does"),
    ],
)
def test_answer_is_the_loss_on(tmp_path, about, state, says):
    found = answered(write(tmp_path, even(30), **about))["on?"]
    assert found.state == state and says in found.remark


@pytest.mark.parametrize("sequences, state", [(4, "bad"), (64, "fair"), (128, "good")])
def test_answer_over_how_many_sequences(tmp_path, sequences, state):
    found = answered(write(tmp_path, even(30), sequences=sequences))["sequences?"]
    assert (found.state, found.text) == (state, str(sequences)) and "measured in 30 intervals" in found.remark


def test_sequences_are_those_of_every_interval(tmp_path):
    """A scope that changes while training: the end counts, the range is said and drawn."""
    (run,) = read(write(tmp_path, even(30), sequences=512))
    run.frames = run.frames.copy()
    run.frames["sequences"][:20] = 8
    told = answers.Told("run", run, [], page.end_load(run), [])
    ((_, (found,)),) = [entry for entry in answers.answers([told]) if "sequences" in entry[0]]
    assert found.text == "512" and "8 to 512 over the run" in found.remark
    (drawn,) = [one for one in page.curves([("run", run)]) if one.name == "balance-bsz"]
    assert drawn.lines[0].y.tolist() == [8] * 20 + [512] * 10


@pytest.mark.parametrize("most, state", [(1.5, "good"), (3.0, "fair"), (10.0, "bad")])
def test_answer_is_the_load_even(tmp_path, most, state):
    """By the worst layer; the largest possible MaxVio is 7, so that an alarm begins at 3.5."""
    load = np.ones((30, 3, 16))
    load[:, 1] = (16 - most) / 15
    load[:, 1, 0] = most
    found = answered(write(tmp_path, load))["even?"]
    assert found.state == state and f"MaxVio {most - 1:.3f} in the worst layer (3)" in found.remark
    assert "Even up to 1, an alarm above 3.5" in found.remark and found.gauge == pytest.approx((most - 1, 1, 3.5), rel=1e-5)


def test_answer_names_dead_and_starved_experts(report, tmp_path):
    assert "layer 3: dead 5; layer 4: starved 7." in report.text and "1 dead, 1 starved" in report.text
    assert answered(write(tmp_path, even(30)))["starved?"].text == "None"


def test_dead_experts_are_a_sum_over_layers(tmp_path):
    """In the chart, in the table and in `watch`: two in one layer, one in another."""
    load = even(30)
    load[:, 0, :2] = 0
    load[:, 2, 4] = 0
    directory = write(tmp_path / "run", load)
    found = reported(directory, tmp_path / "out")
    assert found.charts["dead"]["lines"][0]["y"][-1] == 3
    assert re.search(r'data-name="dead experts">3<', found.html)
    (run,) = read(directory)
    console = Console(file=io.StringIO(), width=120)
    console.print(table(run, []))
    assert re.search(r"^ +all .* 3 ", console.file.getvalue(), re.MULTILINE)


def test_answers_over_checkpoints_and_domains(tmp_path):
    """Specialisation and held-out loss: the last checkpoint against the first."""
    directory = write(tmp_path, even(30))
    assert answered(directory)["rise?"].text == answered(directory)["loss?"].text == "Not measured"
    first = replace(measured(), tokens_per_expert=[[[1, 1, 1, 1]] * 2] * 3, iteration=5)
    domains = [replace(domain, loss={"lm loss": 1.5 + 0.1 * d}) for d, domain in enumerate(first.domains)]
    specialisation.write(first, directory).rename(directory / "specialisation-5.json")
    assert "one checkpoint" in answered(directory)["rise?"].remark
    specialisation.write(replace(measured(), domains=domains), directory)
    found = answered(directory)
    assert (found["rise?"].state, found["rise?"].text) == ("good", f"Yes, +{measured().contrast_L.mean():.3f}")
    assert found["loss?"].text == "1.600 (-0.400)" and "code 1.500, maths 1.600, prose 1.700" in found["loss?"].remark
    charts = reported(directory, tmp_path / "out").charts
    assert charts["contrast"]["lines"][0]["x"] == [5, 7]
    assert [line["y"] for line in charts["losses"]["lines"]] == [[2, 1.5], [2, 1.6], [2, 1.7]]


def test_one_colour_scale_for_all_runs(report):
    """Loads, and MaxVio by layer, beside each other; a cell names its layer, expert, value and iterations."""
    load, vio = report.charts["load"], report.charts["max-vio-layers"]
    assert [panel["title"].split(",")[0] for panel in load["panels"]] == ["healthy"] * 3 + ["<b>&"] * 3
    assert len(vio["panels"]) == 2 and vio["high"] > 10  # of the uneven run
    end = load["panels"][-1]
    assert end["about"] == "iterations 361 to 400" and end["rows"] == ["2", "3", "4"]
    values, experts = matrix(load, end["values"]), matrix(load, end["experts"])
    assert values[1, 0] == 0 and experts[1, 0] == 5 and values[2, -1] == pytest.approx(12, rel=1e-3) and experts[2, -1] == 3
    for part in ("%{y}", "%{text}", "%{customdata"):
        assert part in load["hover"]
    one = report.charts["load-layer"]
    assert "%{x" in one["hover"] and [panel["about"] for panel in one["panels"]] == [one["panels"][0]["about"], "layer 4"]


def test_dead_is_a_colour_of_its_own():
    """Zero exactly: black, below the scale; in the page as in a PNG."""
    place = chart.on_scale(np.array([0, 1e-6, 0.25, 1, 4, 99]))
    assert place.tolist() == pytest.approx([0, 0.1, 0.1, 0.55, 1, 1])
    assert list(chart.TICKS.values()) == [0, 0.1, 0.325, 0.55, 0.775, 1]
    assert [colour for at, colour in chart.stops("load") if at < 0.05] == [chart.DEAD]
    assert "0.1 + (0.9 *" in Path(page.__file__).with_name("page.js").read_text()  # the same in JavaScript


def test_pictures_only_if_asked_for(tmp_path):
    """A PNG per chart; black pixels are the dead experts of one run."""
    load = even(40)
    directories = [
        write(tmp_path / "a" / "healthy", load),
        write(tmp_path / "b" / "dead", np.where(np.arange(16) == 5, 0, load)),
    ]
    black = []
    for directory in directories:
        assert main(["report", str(directory)]) == 0
        assert [file.name for file in (directory / "report").iterdir()] == ["report.html"]
        assert main(["report", str(directory), "--png"]) == 0
        pictures = {file.stem for file in (directory / "report").glob("*.png")}
        assert pictures == set(Page(directory / "report" / "report.html").charts)
        black.append((imread(directory / "report" / "load.png")[..., :3] < 0.02).all(axis=-1).sum())
    assert black[1] > black[0] + 5000


@pytest.mark.parametrize("name", ODD)
def test_odd_names(tmp_path, name):
    """Neither a traceback, nor a name that vanishes, nor a control character that reaches the page or the terminal."""
    directories = [write(tmp_path / name / "balance", even(30)), write(tmp_path / "other", even(20))]
    specialisation.write(
        replace(measured(), domains=[replace(d, name=name + d.name) for d in measured().domains]), directories[0]
    )
    command = [*COMMAND, "report", *map(str, directories), "--png", "--out", str(tmp_path / f"out{name}")]
    result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    found = Page(tmp_path / f"out{name}" / "report.html")
    safe = printable(name)
    assert safe in found.text and [line["label"] for line in found.charts["balance-bsz"]["lines"]] == [safe, "other"]
    shown = subprocess.run([*COMMAND, "watch", str(tmp_path / name), "--once"], capture_output=True, timeout=120)
    assert shown.returncode == 0 and shown.stdout.decode().startswith(safe)
    missing = subprocess.run([*COMMAND, "watch", str(tmp_path / name / "no"), "--once"], capture_output=True, timeout=120)
    assert missing.returncode == 2 and safe in missing.stderr.decode()
    assert missing.stderr.count(b"\n") == 1
    for output in (result.stdout, shown.stdout, missing.stderr, found.html.encode()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output.decode())


@pytest.mark.parametrize("name", ["_micro", "run_$USER_$SLURM_JOB_ID"])
def test_odd_names_are_in_the_legends_of_pictures(tmp_path, monkeypatch, name):
    """Matplotlib leaves out what begins with "_", and takes "$...$" for mathematics."""
    from matplotlib.figure import Figure

    from megatron_global_lbl.report import paper

    found = []
    monkeypatch.setattr(Figure, "legend", lambda self, *a, legend=Figure.legend, **k: found.append(legend(self, *a, **k)))
    lines = [chart.Line(label, [1, 2], np.ones(2), i) for i, label in enumerate((name, "other"))]
    assert paper.png(chart.Chart("name", "title", "", "", lines)).startswith(b"\x89PNG")
    texts = found[0].get_texts()
    assert [text.get_text().lstrip("\u200b") for text in texts] == [name, "other"]
    assert not any(text.get_parse_math() for text in texts)


def test_a_run_is_found_in_its_folder(tmp_path, capsys):
    """`report RUN_DIR` and `watch RUN_DIR` take RUN_DIR/balance, and call the run RUN_DIR."""
    write(tmp_path / "run" / "balance", even(1, layers=1, experts=4))
    assert main(["report", str(tmp_path / "run")]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "run" / "report" / "report.html"
    assert "Expert balance of run" in Page(tmp_path / "run" / "report" / "report.html").text
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 0
    assert capsys.readouterr().out.startswith("run  scope global")


def test_labels_differ():
    """Directories of one name get more of their path; models of one directory have names."""
    paths = [("/x/a/balance", "balance"), ("/x/b/balance", "balance"), ("/x/b/c", "c"), ("/x/c", "c")]
    runs = [SimpleNamespace(directory=Path(path), name=name) for path, name in paths]
    assert labels(runs[:2]) == ["a", "b"] and labels(runs) == ["a", "b", "b/c", "c"]
    runs = [SimpleNamespace(directory=Path("/x/a"), name=name) for name in ("a model1", "a model2")]
    assert labels(runs) == ["a model1", "a model2"]
    assert labels(runs[:1] * 2) == ["a model1 (1)", "a model1 (2)"]
    assert slugs(["run 1", "run-1", "run/1", "run-1-2"]) == ["run-1", "run-1-2", "run-1-3", "run-1-2-2"]


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""
    light = []
    for colour in (one, other):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        part = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        light.append(np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_colours_have_contrast(report):
    """WCAG 2 AA, by day and at night: 4.5 to 1 for text, 3 to 1 for lines."""
    for style in re.findall(r":root \{ (--page.*?)\}", report.html, re.DOTALL)[:2]:
        colours = dict(re.findall(r"--(\w+): (#\w+)", style))
        text = [colours[name] for name in ("ink", "quiet", "link", "good", "fair", "bad", "open")]
        for ground in (colours["page"], colours["card"]):
            assert min(contrast(colour, ground) for colour in text) >= 4.5
            assert min(contrast(colour, ground) for colour in chart.COLOURS) >= 3


def test_the_end_of_a_run():
    """The last 10 % of the steps, whatever the intervals are; at least one."""
    assert end_of_run(np.full(100, 10)) == 90
    assert end_of_run(np.array([1] * 90 + [10])) == 90
    assert end_of_run(np.array([10] * 9 + [1] * 10)) == 9
    assert end_of_run(np.array([7])) == 0 and end_of_run(np.array([1, 100])) == 1


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
        file.write_bytes(file.read_bytes()[: file.read_bytes().index(b"LBLF")])


@pytest.mark.parametrize(
    "command, harm",
    [
        *((command, harm) for command in ("report", "watch") for harm in (foreign, empty, header_alone)),
        ("report", loads_broken),  # watch does not look at them
    ],
)
def test_a_record_that_cannot_be_read(tmp_path, capsys, command, harm):
    """One line with the file and the place, status 2."""
    directory = write(tmp_path / "run", even(200))
    harm(directory)
    assert main([command, str(directory), *(["--once"] if command == "watch" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-lbl {command}: error: {directory}")
    assert "byte" in line if harm not in (empty, header_alone) else "no balance record" in line


def torn(directory: Path) -> None:
    file = next(directory.glob("*.balance"))
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [torn, broken])
@pytest.mark.parametrize("command", ["report", "watch"])
def test_what_is_broken_is_a_note(tmp_path, capsys, command, harm):
    directory = write(tmp_path / "run", even(30))
    harm(directory)
    assert main([command, str(directory), *(["--once"] if command == "watch" else [])]) == 0
    shown = capsys.readouterr().out
    if command == "report":
        shown = Page(Path(shown.strip())).text
    assert "and were left out" in shown and "29 intervals" in shown


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


def test_watch_to_a_pipe(tmp_path):
    """A block per change, without a terminal's sequences; ends when nobody reads any more, and then says how the run is."""
    directory = write(tmp_path, even(20))
    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "watch", str(directory), "--every", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    seen = b""
    for line in process.stdout:
        seen += line
        if line.startswith(b"healthy") and b"23 intervals" in seen:
            break
        if line.startswith(b"healthy"):
            write(directory, even(23))
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr.read() == b""
    assert b"20 intervals" in seen and b"\x1b" not in seen


def test_watch_once_into_a_closed_pipe(tmp_path):
    """The exit status stays that of the run: rich's own would be an alarm's."""
    process = subprocess.Popen([*COMMAND, "watch", str(write(tmp_path, even(20))), "--once"], stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 0


def test_watch_waits_for_a_record(tmp_path):
    """Until it is there, or as long as it is told to; with --once not at all."""
    directory = tmp_path / "run"
    for more, least in ((["--once"], 0), (["--wait", "1.5"], 1.5), (["--once", "--wait", "1.5"], 1.5)):
        start = time.monotonic()
        result = subprocess.run([*COMMAND, "watch", str(directory), *more], capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and "no such directory" in result.stderr
        assert least <= time.monotonic() - start and ("waiting: " in result.stderr) == bool(least)
    process = subprocess.Popen([*COMMAND, "watch", str(directory), "--once", "--wait", "60"], stderr=subprocess.PIPE)
    assert process.stderr.readline().startswith(b"waiting: ")
    write(directory / "balance", even(20))
    assert process.wait(60) == 0


def test_watch_has_a_trend_over_the_whole_run(tmp_path):
    """Long, a start far above all that follows, and a rise before the last 400 intervals."""
    load = np.ones((1200, 1, 4))
    load[:, 0, 0] = np.concatenate([np.full(20, 4.0), np.full(580, 1.1), np.full(600, 1.4)])
    load[:, 0, 1:] = (4 - load[:, :1, 0]) / 3
    (run,) = read(write(tmp_path, load))
    console = Console(file=io.StringIO(), width=140)
    console.print(table(run, []))
    (trend,) = re.findall(r"[▁▂▃▄▅▆▇█]{24}", console.file.getvalue())
    assert trend[0] == trend[-1] == "█" and trend[5] < "▄" and "since iteration 1 " in console.file.getvalue()


@pytest.mark.parametrize("option", ["--every=0", "--every=nan", "--wait=-1"])
def test_watch_options(tmp_path, capsys, option):
    assert main(["watch", str(tmp_path), option]) == 2
    assert "not allowed; allowed: seconds" in capsys.readouterr().err


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
    write(tmp_path, even(23))  # a training from the start: a run beside it
    checked.clear()
    file = tmp_path / "run2.model1.balance"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # while it is being written
    assert watched.refresh() and sum(checked) == 22
    file.write_bytes(whole)
    assert watched.refresh() and sum(checked) == 23
    (_, seen, _), fresh = watched.runs[-1], read(tmp_path)[-1]
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
    assert np.allclose(watched.runs[0][1].metrics["max_vio"], load.max(axis=-1) - 1)


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
            assert np.isnan([series.middle[i], series.worst[i]]).all()
        else:
            assert series.middle[i] == pytest.approx(np.mean(means), rel=1e-5)
            assert series.worst[i] == max(column.max() for column in known if len(column))
            assert np.nanmax(part[:, series.worst_layer[i]]) == series.worst[i]
    assert np.isnan(binned(values, starts)[0, 0]) and series.known
    low = over_layers(np.arange(1, 1001), values, "entropy")
    assert low.worst[0] == np.nanmin(values[: starts[1]])


@pytest.mark.parametrize("command, module", [("report", "plotly"), ("report", "jinja2"), ("watch", "rich")])
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

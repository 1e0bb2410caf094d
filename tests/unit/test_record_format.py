"""The balance record's writer and reader, without a training: restarts, kills, torn tails, broken files, odd headers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from rich.console import Console

from megatron_global_lbl.metrics import METRICS, RecordError, read
from megatron_global_lbl.metrics.alarms import alarms
from megatron_global_lbl.metrics.measures import end_of_run
from megatron_global_lbl.metrics.record import FORMAT, HEADER, with_crc
from megatron_global_lbl.metrics.writer import Writer
from megatron_global_lbl.report.terminal import view

E = 4


def write(writer, iterations, course, layers=("1", "2"), steps=10):
    """Intervals of 10 iterations, whose every number says which training wrote it."""
    for iteration in iterations:
        mark = np.full(len(layers), course + iteration / 1000, dtype=np.float32)
        writer.append(
            iteration=iteration,
            steps=steps,
            values={name: mark + number for number, name in enumerate(METRICS)},
            load=np.stack([np.full(E, course + number + 1.0) for number in range(len(layers))]),
            sequences=8,
            tokens=64,
        )


def start(directory, layers=("1", "2"), **names):
    return Writer(directory, layers=list(layers), num_experts=E, **names)


def test_numpy_is_all_it_needs():
    code = "import sys, megatron_global_lbl.metrics.writer; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_was_written_is_read(tmp_path):
    about = {"scope": "global", "alpha": 0.01}
    writer = Writer(tmp_path, layers=["2", "mtp.1"], num_experts=E, topk=2, about=about)
    load = np.array([[0, 1e-9, 1, 3], [np.nan] * E])
    values = {name: np.array([number, np.nan]) for number, name in enumerate(METRICS)} | {"more": np.array([9, 8])}
    interval = {"iteration": 5, "steps": 4, "first": 1, "sequences": 32, "tokens": 4096, "micro_sequences": 2}
    writer.append(values=values, load=load, **interval)
    (run,) = read(tmp_path)
    assert (run.header["scope"], run.header["alpha"], run.header["num_experts"], run.header["topk"]) == ("global", 0.01, E, 2)
    assert (run.name, run.directory, run.layers, run.notes) == (tmp_path.name, tmp_path, ["2", "mtp.1"], [])
    assert (run.number, run.latest, run.model, len(run.id)) == (1, True, "model1", 32)
    found = (run.first_iterations, run.iterations, run.steps, run.sequences, run.tokens, run.micro_sequences)
    assert [x.tolist() for x in found] == [[1], [5], [4], [32], [4096], [2]]
    assert {name: run.metrics[name].tolist()[0][0] for name in METRICS} == dict(zip(METRICS, range(len(METRICS))))
    assert all(np.isnan(run.metrics[name][0, 1]) for name in METRICS) and run.metrics["more"].tolist() == [[9, 8]]
    found = run.load([0])[0]
    assert found[0].tolist()[::2] == [0, 1] and found[0, 3] == 3 and 0 < found[0, 1] < 1e-6  # selected, if rarely
    assert np.isnan(found[1]).all()


def test_layers_with_other_numbers_of_experts_are_one_model(tmp_path):
    """Each layer's own numbers; a layer that skips intervals stays in its row."""
    writer = Writer(tmp_path, layers=["0", "1", "2"], num_experts=[2, 6, 4], topk=[1, None, 2])
    load = np.arange(18.0).reshape(3, 6)
    for number in (1, 2):
        skipped = load.copy()
        skipped[number] = np.nan
        writer.append(iteration=number, steps=1, values={"dead": skipped[:, 0]}, load=skipped)
    (run,) = read(tmp_path)
    assert run.num_experts.tolist() == [2, 6, 4] and run.header["num_experts"] == [2, 6, 4]
    assert run.topk.tolist()[::2] == [1, 2] and np.isnan(run.topk[1])
    found = run.load([0, 1])
    assert found.shape == (2, 3, 6) and np.isfinite(found).sum(axis=2).tolist() == [[2, 0, 4], [2, 6, 0]]
    assert found[1, 1].tolist() == load[1].tolist() and found[0, 2, :4].tolist() == load[2, :4].tolist()
    assert np.isnan(run.metrics["dead"]).tolist() == [[False, True, False], [False, False, True]]


def test_restarts_are_one_run(tmp_path):
    write(start(tmp_path), (10, 20, 30, 40), 0)
    write(start(tmp_path, start=41), (50, 60), 1)
    (run,) = read(tmp_path)
    assert run.layers == ["1", "2"] and run.iterations.tolist() == [10, 20, 30, 40, 50, 60] and run.notes == []
    course = np.array([[0, 0]] * 4 + [[1, 1]] * 2)
    np.testing.assert_allclose(run.metrics["lbl_global"], course + run.iterations[:, None] / 1000, rtol=1e-6)
    np.testing.assert_array_equal(run.load(range(6))[..., 0], course + [[1, 2]])
    np.testing.assert_array_equal(run.load([-1, 0]), run.load([5, 0]))


def test_an_older_checkpoint_voids_what_it_trains_again(tmp_path):
    """From 25, with a log interval of 15: no step counts twice, and 41 to 50 of the old course do not come back."""
    write(start(tmp_path), (10, 20, 30, 40, 50), 0)
    write(start(tmp_path, start=26), (40,), 1, steps=15)
    (run,) = read(tmp_path)
    assert run.first_iterations.tolist() == [1, 11, 21, 26] and run.iterations.tolist() == [10, 20, 25, 40]
    assert run.steps.tolist() == [10, 10, 5, 15] and run.steps.sum() == 40
    assert run.load(range(4))[:, 0, 0].tolist() == [1, 1, 1, 2]
    assert run.notes == [
        "iterations 26 to 50 were recorded again after a resume: the later course counts; the interval 21 to 30 counts up to "
        "25, with its mean over 21 to 30"
    ]
    write(start(tmp_path, start=11), (20,), 2)
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [10, 20] and run.load([1])[0, 0, 0] == 3
    assert [note[:19] for note in run.notes] == ["iterations 26 to 50", "iterations 11 to 40"]


def test_the_clock_decides_nothing(tmp_path, monkeypatch):
    """It is set back between two starts, and between two runs."""
    write(start(tmp_path), (10, 20), 0)
    clock = iter(np.arange(time.time(), 0, -86400))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    write(start(tmp_path, start=11), (20, 30), 1)
    write(start(tmp_path), (10,), 2)
    first, second = read(tmp_path)
    assert first.iterations.tolist() == [10, 20, 30] and first.load(range(3))[:, 0, 0].tolist() == [1, 2, 2]
    assert (first.latest, second.latest, second.number, second.load([0])[0, 0, 0]) == (False, True, 2, 3)


def test_a_training_from_the_start_is_a_run_beside(tmp_path):
    """A finished run stays as it is, and a resume continues the newest one."""
    said = []
    write(start(tmp_path), (10, 20, 30), 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(start(tmp_path, say=said.append), (10,), 1)
    assert said == [f"{tmp_path} holds 1 run; this training is run 2 beside it"]
    write(start(tmp_path, start=11, say=said.append), (20,), 2)
    assert said[1:] == [f"the balance record continues run 2 in {tmp_path} with iteration 11"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    old, new = read(tmp_path)
    assert (old.name, new.name) == (f"{tmp_path.name} run 1", f"{tmp_path.name} run 2")
    assert old.iterations.tolist() == [10, 20, 30] and new.iterations.tolist() == [10, 20]
    assert old.notes == new.notes == [] and old.id != new.id


@pytest.mark.parametrize("other", [{"layers": "123"}, {"num_experts": 8}])
def test_another_model_is_a_run_beside(tmp_path, other):
    """Even if it resumes: both stay readable."""
    said = []
    write(start(tmp_path), (10,), 0)
    writer = Writer(tmp_path, **{"layers": ["1", "2"], "num_experts": E, **other}, start=11, say=said.append)
    writer.append(iteration=20, steps=10, values={}, load=np.ones((len(other.get("layers", "12")), 8)))
    assert said == [f"!! run 1 in {tmp_path} is not continued: it is of another model; this training is run 2 beside it"]
    assert [run.iterations.tolist() for run in read(tmp_path)] == [[10], [20]]


def test_models_of_a_training_share_its_run(tmp_path):
    for begin in (1, 11):
        actor = start(tmp_path, model="actor", start=begin)
        write(actor, (begin + 9,), 0)
        critic = Writer(tmp_path, layers=["0"], num_experts=2, model="critic", start=begin, run=actor.run)
        critic.append(iteration=begin + 9, steps=10, values={}, load=np.ones((1, 2)))
    first, second = read(tmp_path)
    assert (first.model, second.model) == ("actor", "critic") and first.id == second.id
    assert (first.name, second.name) == (f"{tmp_path.name} actor", f"{tmp_path.name} critic")
    assert first.iterations.tolist() == second.iterations.tolist() == [10, 20]


def test_notes_say_what_is_missing(tmp_path):
    write(start(tmp_path), (10, 20, 50, 60), 0)
    (run,) = read(tmp_path)
    assert run.notes == ["iterations 21 to 40 are missing"]
    loads = tmp_path / "run1.model1.loads"
    os.truncate(loads, loads.stat().st_size - 1)
    (run,) = read(tmp_path)
    assert run.notes[1:] == ["run1.model1.loads is truncated: no load of single experts for 1 of 4 intervals"]
    assert np.isnan(run.load([2, 3])[:, 0, 0]).tolist() == [False, True]
    write(start(tmp_path, start=61), (70,), 1)
    (run,) = read(tmp_path)
    assert "run1.model1.loads was truncated before iteration 61: loads of single experts are lost" in run.notes
    assert np.isnan(run.load([2, 4])[:, 0, 0]).tolist() == [False, False]
    loads.unlink()
    (run,) = read(tmp_path)
    assert "run1.model1.loads is missing: no load of single experts" in run.notes and np.isnan(run.load([0])[0, 0]).all()


def test_many_notes_are_few_lines(tmp_path):
    write(start(tmp_path), range(20, 2000, 20), 0)
    (run,) = read(tmp_path)
    assert len(run.notes) == 6 and run.notes[-1] == "and 93 more gaps"


def test_other_metrics_after_a_restart(tmp_path):
    """A release or an option that records more: what was not recorded is NaN."""
    for begin, more in ((1, {}), (2, {"b": np.ones(2)}), (3, {"a": np.ones(2) * 2})):
        writer = start(tmp_path, start=begin)
        writer.append(iteration=begin, steps=1, values={"dead": np.zeros(2), **more}, load=np.ones((2, E)))
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [1, 2, 3] and run.metrics["dead"].tolist() == [[0, 0]] * 3
    assert np.nan_to_num(run.metrics["b"][:, 0], nan=-1).tolist() == [-1, 1, -1]
    assert np.nan_to_num(run.metrics["a"][:, 0], nan=-1).tolist() == [-1, -1, 2]


def test_killed_250_times(tmp_path):
    """Real processes, SIGKILL: whatever `append` returned from is there, and every restart goes on behind it."""
    random = np.random.default_rng(0)
    done = 0
    for _ in range(250):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                writer = start(tmp_path, start=done + 1)
                for iteration in range(done + 1, done + 2000):
                    write(writer, (iteration,), 0, steps=1)
                    os.write(tell, iteration.to_bytes(8, "little"))
            finally:
                os._exit(1)
        os.close(tell)
        with os.fdopen(told, "rb") as pipe:
            acknowledged = pipe.read(8 * int(random.integers(1, 4)))
            time.sleep(random.uniform(0, 0.001))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged += pipe.read()
        last = int.from_bytes(acknowledged[-8:], "little")
        if random.random() < 0.1:
            (run,) = read(tmp_path)
            assert run.iterations[-1] >= last, "acknowledged and lost"
        done = max(last, done)
    (run,) = read(tmp_path)
    assert run.steps.sum() == run.iterations[-1] >= done > 250 and (np.diff(run.iterations) == 1).all()
    assert (run.load(range(len(run.iterations)))[:, 0] == 1).all()
    assert not [note for note in run.notes if "recorded again" not in note and "more resumes" not in note]


def test_a_torn_tail_is_left_out_and_recovered(tmp_path):
    """Every length that a kill can leave."""
    writer = start(tmp_path)
    write(writer, (10,), 0)
    path = writer.path
    whole = path.stat().st_size
    write(writer, (20,), 0)
    data, loads = path.read_bytes(), path.with_suffix(".loads").read_bytes()
    sizes = [*range(0, whole, 2), *range(whole, len(data))]
    assert len(sizes) >= 250
    for size in sizes:
        path.write_bytes(data[:size])
        path.with_suffix(".loads").write_bytes(loads[: len(loads) - 3])
        if size >= whole:
            (run,) = read(tmp_path)
            assert run.iterations.tolist() == [10] and len(run.notes) == (size > whole)
            write(start(tmp_path, start=11), (20, 30), 1)
            (run,) = read(tmp_path)
            assert run.iterations.tolist() == [10, 20, 30] and run.notes == []
            assert run.load(range(3))[:, 0, 0].tolist() == [1, 2, 2]
        elif size % 40 == 0:
            write(start(tmp_path, start=11), (20,), 1)
            assert read(tmp_path)[-1].iterations.tolist() == [20]
            for file in tmp_path.glob("run2.*"):
                file.unlink()


@pytest.mark.parametrize("at, named", [(0, "not a balance record (byte 0)"), (9, "byte 0"), ("body", None), (-1, None)])
def test_broken_bytes(tmp_path, at, named):
    """What can be read is read; nothing of it is touched by a training that goes on."""
    writer = start(tmp_path)
    write(writer, (10, 20, 30), 0)
    data = bytearray(writer.path.read_bytes())
    frame = data.index(b"LBLF")
    data[frame + 40 if at == "body" else at] ^= 255
    writer.path.write_bytes(data)
    if named:
        with pytest.raises(RecordError) as error:
            read(tmp_path)
        assert str(writer.path) in str(error.value) and named in str(error.value) and "\n" not in str(error.value)
        write(start(tmp_path, start=31), (40,), 1)
        (run,) = read(tmp_path)
        assert run.iterations.tolist() == [40] and run.notes == [f"left out: {error.value}"]
        assert writer.path.read_bytes() == data
        return
    (run,) = read(tmp_path)
    if at == -1:
        assert run.iterations.tolist() == [10, 20] and "bytes are not whole" in run.notes[0]
    else:
        assert run.iterations.tolist() == [20, 30]
        assert run.notes == [
            f"run1.model1.balance: bytes {frame} to {data.index(b'LBLF', frame + 1) - 1} are broken and were left out"
        ]


def test_broken_loads_and_foreign_files(tmp_path):
    writer = start(tmp_path)
    write(writer, (10, 20), 0)
    loads = writer.path.with_suffix(".loads")
    data = bytearray(loads.read_bytes())
    data[-1] ^= 1
    loads.write_bytes(data)
    (run,) = read(tmp_path)
    assert run.load([0]).shape == (1, 2, E)
    with pytest.raises(RecordError, match=f"{loads}: broken at byte {len(data) // 2}"):
        run.load([1])
    (tmp_path / "other.balance").write_text("iteration,loss\n")
    os.mkfifo(tmp_path / "pipe.balance")
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [10, 20]
    assert run.notes == [
        f"left out: {tmp_path}/other.balance: not a balance record (byte 0)",
        f"left out: {tmp_path}/pipe.balance: not a file",
    ]
    with pytest.raises(RecordError, match="holds no balance record"):
        read(tmp_path.parent)
    with pytest.raises(RecordError, match="no such directory"):
        read(tmp_path / "missing")


def with_header(path, change):
    """The file, its first header changed and its checksum right."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:12], "little")
    text = change(json.loads(data[12 : 12 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(with_crc(HEADER + bytes(4) + len(text).to_bytes(4, "little") + text) + data[12 + length :])


ODD = [0, -1, 10**30, 1e308, float("nan"), float("inf"), "x", "\x1b[2J", None, True, [], [0], ["x"], [[1]], {}, {"a": [0]}]
KEYS = ["layers", "num_experts", "topk", "metrics", "alpha", "scope", "settings", "versions", "started", "data_parallel"]
KEYS += ["micro_batches", "log_interval", "model", "run", "start", "notes", "balancing", "format"]


@pytest.mark.parametrize("key", KEYS)
def test_odd_header_values_are_a_note(tmp_path, key):
    """With a right checksum: reading, the alarms and the terminal's view never end in a traceback or let an escape through."""
    about = {"scope": "global", "alpha": 0.01, "settings": {"scope": "global"}, "versions": {"torch": "2"}, "started": 1.0}
    for number, value in enumerate(ODD):
        directory = tmp_path / str(number)
        writer = start(directory, topk=2, about=about)
        write(writer, (10, 20), 0)
        with_header(writer.path, lambda header, value=value: {**header, key: value})
        write(start(directory), (10,), 1)  # run 2, which is whole
        *odd, good = read(directory)
        noted = [note for run in (*odd, good) for note in run.notes]
        for run in (*odd, good):
            shown = Console(file=io.StringIO(), width=200)
            shown.print(view("record", run, alarms(run)))
            assert not any(char in shown.file.getvalue() + run.name + "".join(run.notes) for char in "\x1b\x00")
            time.gmtime(run.header.get("started", 0))
        if not odd:
            assert key in ("layers", "num_experts", "metrics", "format") and f"left out: {directory}" in noted[0]


@pytest.mark.parametrize("text", [b"null", b"[]", b"{", b"[" * 100_000, b"1" * 5000, b"\xff", b""])
def test_headers_that_are_no_object(tmp_path, text):
    writer = start(tmp_path)
    write(writer, (10,), 0)
    with_header(writer.path, lambda header: text)
    with pytest.raises(RecordError, match="header is not a JSON object"):
        read(tmp_path)


def test_impossible_frames_are_a_note(tmp_path):
    """With a right checksum."""
    writer = start(tmp_path)
    for first, last, steps in (
        (1, 10, 10),
        (-5, 10, 10),
        (11, 2**62, 10),
        (11, 20, 0),
        (11, 20, 11),
        (30, 20, 1),
        (11, 20, 10),
    ):
        writer.append(first=first, iteration=last, steps=steps, values={}, load=np.ones((2, E)))
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [10, 20]
    assert run.notes == ["run1.model1.balance: 5 intervals have impossible numbers, left out"]


def test_an_older_format_is_named(tmp_path):
    text = json.dumps({"layers": ["0"], "num_experts": 4}).encode()
    body = len(text).to_bytes(4, "little") + text
    (tmp_path / "model1.balance").write_bytes(HEADER + zlib.crc32(body).to_bytes(4, "little") + body)
    with pytest.raises(RecordError, match=f"written in format 1; this version reads format {FORMAT}"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["_micro", "run_$USER_$SLURM_JOB_ID", "a/b", ".", "", "\x1b[31m", "\udcff", "x" * 400, "ä%2F"])
def test_odd_names(tmp_path, name):
    """Of models, layers and directories: read back, and printable."""
    directory = tmp_path / (name.replace("/", "").strip(".") or "d")[:100]
    for begin in (1, 11):
        write(start(directory, model=name, layers=[name, "2"], start=begin), (begin + 9,), 0)
    (run,) = read(directory)
    assert run.iterations.tolist() == [10, 20] and run.model.isprintable() and run.layers[0] == run.model
    assert run.name.isprintable() and run.model == (name if name.isprintable() else name.encode("unicode_escape").decode())
    assert all(file.parent == directory for file in directory.rglob("*"))


def test_a_write_that_failed_costs_its_interval_only(tmp_path):
    """A file system without room: the limit on file sizes is that of the process."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{os.path.dirname(__file__)!r}]
from test_record_format import start, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = start({str(tmp_path)!r})
write(writer, (10,), 0)
size = writer.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
for iteration in (20, 30):
    try:
        write(writer, (iteration,), 0)
    except OSError as error:
        print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write(writer, (40,), 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "27\n27\n"
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [10, 40] and run.notes == ["iterations 11 to 30 are missing"]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_room_from_the_start_makes_one_file(tmp_path):
    """Not one per interval."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{os.path.dirname(__file__)!r}]
from test_record_format import start, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
writer = start({str(tmp_path)!r})
for iteration in (10, 20, 30):
    try:
        write(writer, (iteration,), 0)
    except OSError as error:
        print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write(writer, (40,), 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "27\n" * 3
    assert read(tmp_path)[0].iterations.tolist() == [40] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "steps, late", [([10] * 30, 3), ([10] * 9, 1), ([1], 1), ([10] * 19, 1), ([90, 5, 5], 2), ([1, 1, 98], 1), ([], 0)]
)
def test_the_end_of_a_run_is_its_last_tenth(steps, late):
    assert len(steps[end_of_run(np.array(steps)) :]) == late

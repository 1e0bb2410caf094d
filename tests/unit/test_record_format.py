"""The balance record's writer and reader, without a training: restarts, stages, torn tails, broken files, two writers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from megatron_global_lbl.metrics import METRICS, RecordError, directory, read
from megatron_global_lbl.metrics.lock import LOCK, Lock, Locked
from megatron_global_lbl.metrics.writer import Writer
from megatron_global_lbl.settings import ConfigError

E = 4


def write(writer, iterations, course, layers=("1", "2")):
    """Intervals of 10 iterations, whose every number says which training wrote it."""
    for iteration in iterations:
        mark = np.full(len(layers), course + iteration / 1000, dtype=np.float32)
        writer.append(
            iteration=iteration,
            steps=10,
            values={name: mark + number for number, name in enumerate(METRICS)},
            load=np.stack([np.full(E, course + float(layer)) for layer in layers]),
            sequences=8,
            tokens=64,
        )


def start(directory, layers=("1", "2"), **names):
    return Writer(directory, layers=list(layers), num_experts=E, **names)


def test_numpy_is_all_it_needs():
    code = "import sys, megatron_global_lbl.metrics; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_was_written_is_read(tmp_path):
    writer = Writer(tmp_path, layers=["2", "mtp.1"], num_experts=E, about={"scope": "global", "alpha": 0.01})
    load = np.array([[0, 1e-9, 1, 3], [np.nan] * E])
    values = {name: np.array([number, np.nan]) for number, name in enumerate(METRICS)}
    writer.append(iteration=5, steps=5, values=values, load=load, sequences=32, tokens=4096)
    (run,) = read(tmp_path)
    assert (run.header["scope"], run.header["alpha"], run.header["num_experts"]) == ("global", 0.01, E)
    assert (run.name, run.directory, run.layers, run.notes) == (tmp_path.name, tmp_path, ["2", "mtp.1"], [])
    assert [x.tolist() for x in (run.iterations, run.steps, run.sequences, run.tokens)] == [[5], [5], [32], [4096]]
    assert {name: values.tolist()[0][0] for name, values in run.metrics.items()} == dict(zip(METRICS, range(len(METRICS))))
    assert all(np.isnan(values[0, 1]) for values in run.metrics.values())
    found = run.load([0])[0]
    assert found[0].tolist()[::2] == [0, 1] and found[0, 3] == 3 and 0 < found[0, 1] < 1e-6  # selected, if rarely
    assert np.isnan(found[1]).all()


def test_stages_restarts_and_other_layouts_are_one_run(tmp_path):
    write(start(tmp_path, "1", stage="pp0"), (10, 20, 30, 40), 0, "1")
    write(start(tmp_path, "2", stage="pp1"), (10, 20, 30, 40), 0, "2")
    # From a checkpoint at 25, both layers on one stage; 40 of the course that was left does not come back.
    write(start(tmp_path, stage="pp0"), (25, 35), 1)
    (run,) = read(tmp_path)
    assert run.layers == ["1", "2"] and run.iterations.tolist() == [10, 20, 25, 35]
    course = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
    np.testing.assert_allclose(run.metrics["lbl_global"], course + run.iterations[:, None] / 1000, rtol=1e-6)
    np.testing.assert_array_equal(run.load(range(4))[..., 0], course + [[1, 2]])
    np.testing.assert_array_equal(run.load([-1, 0]), run.load([3, 0]))
    assert run.notes == []


def test_notes_say_what_is_missing(tmp_path):
    write(start(tmp_path, "1", stage="pp0"), (10, 20, 50, 60), 0, "1")
    write(start(tmp_path, "2", stage="pp1"), (10, 50), 0, "2")
    (run,) = read(tmp_path)
    assert run.notes == [
        "iterations 21 to 40 are missing",
        "stage pp1 is missing from iteration 51 on",
        "stage pp1 is missing in 1 intervals between iterations 11 and 20",
    ]
    assert np.isnan(run.metrics["cv"]).tolist() == [[False, False], [False, True], [False, False], [False, True]]
    assert np.isnan(run.load([1])[0, 1]).all()
    (tmp_path / "model1.pp0.loads").unlink()
    (run,) = read(tmp_path)
    assert "model1.pp0.loads is missing: no load of single experts" in run.notes and np.isnan(run.load([0])[0, 0]).all()


def test_a_torn_tail_is_left_out_and_recovered(tmp_path):
    writer = start(tmp_path)
    write(writer, (10,), 0)
    path = writer.path
    whole = path.stat().st_size
    write(writer, (20,), 0)
    data, loads = path.read_bytes(), path.with_suffix(".loads").read_bytes()
    for size in (*range(0, whole, 40), *range(whole, len(data), 13)):
        path.write_bytes(data[:size])
        path.with_suffix(".loads").write_bytes(loads[: len(loads) - 3])
        if size >= whole:
            (run,) = read(tmp_path)
            assert run.iterations.tolist() == [10] and len(run.notes) == (size > whole)
            write(start(tmp_path), (20, 30), 1)
            (run,) = read(tmp_path)
            assert run.iterations.tolist() == [10, 20, 30] and run.notes == []
            assert run.load(range(3))[:, 0, 0].tolist() == [1, 2, 2]
        else:
            write(start(tmp_path), (20,), 1)
            assert read(tmp_path)[0].iterations.tolist() == [20]


@pytest.mark.parametrize("at, named", [(0, "byte 0"), (9, "byte 0"), (140, "byte {header}"), (-1, None)])
def test_broken_files_are_named_with_the_byte(tmp_path, at, named):
    writer = start(tmp_path)
    write(writer, (10, 20, 30), 0)
    data = bytearray(writer.path.read_bytes())
    header = data.index(b"LBLF")
    data[at] ^= 255
    writer.path.write_bytes(data)
    if named is None:
        assert read(tmp_path)[0].iterations.tolist() == [10, 20]  # the tail
        return
    for use in (lambda: read(tmp_path), lambda: write(start(tmp_path), (40,), 1)):
        with pytest.raises(RecordError) as error:
            use()
        assert str(writer.path) in str(error.value) and named.format(header=header) in str(error.value)
        assert "\n" not in str(error.value)
    assert writer.path.read_bytes() == data, "what is broken was not touched"


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
    with pytest.raises(RecordError, match="other.balance: not a balance record"):
        read(tmp_path)
    with pytest.raises(RecordError, match="holds no balance record"):
        read(tmp_path.parent)
    with pytest.raises(RecordError, match="no such directory"):
        read(tmp_path / "missing")


def test_a_write_that_failed_costs_its_interval_only(tmp_path):
    writer = start(tmp_path)
    write(writer, (10,), 0)
    loads = writer.path.with_suffix(".loads")
    kept = loads.read_bytes()
    loads.unlink()
    loads.mkdir()
    with pytest.raises(OSError):
        write(writer, (20,), 0)
    loads.rmdir()
    loads.write_bytes(kept)
    write(writer, (30,), 0)
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [10, 30] and run.notes == ["iterations 11 to 20 are missing"]


def test_one_training_at_a_time(tmp_path):
    hold = (
        f"from megatron_global_lbl.metrics.lock import Lock; lock = Lock({str(tmp_path)!r}); print('held', flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(Locked, match=f"process {process.pid} on "):
        Lock(tmp_path)
    process.kill()
    process.wait()
    lock = Lock(tmp_path)  # a process that was killed holds nothing
    lock.release()
    lock.release()
    assert (tmp_path / LOCK).read_text() == "", "for file systems without locks: nobody holds it"
    Lock(tmp_path).release()


def test_a_directory_that_was_refused_is_let_go(tmp_path, monkeypatch):
    """Without RANK a process counts as rank 0, as in Megatron: it is this one that would write."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(directory, "scan", lambda path: (_ for _ in ()).throw(OSError("the disk fails")))
    (tmp_path / "model1.pp0.balance").touch()
    with pytest.raises(ConfigError, match="the disk fails; allowed"):
        directory.RecordDirectory(str(tmp_path))
    assert (tmp_path / LOCK).read_text() == ""
    monkeypatch.undo()
    held = directory.RecordDirectory(str(tmp_path))
    assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()
    held.release()

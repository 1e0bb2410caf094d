"""The record's directory and writer thread while things go wrong: renamed, deleted, locked, linked, hanging."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_global_lbl.metrics import read
from megatron_global_lbl.metrics.directory import HELD, LOCK, RecordDirectory, process_start
from megatron_global_lbl.metrics.writer import Recorder, Writer
from megatron_global_lbl.settings import ConfigError


def append(writer, *iterations):
    """A step per interval, of two layers, to a `Writer` or a `Recorder`."""
    for iteration in iterations:
        interval = {"iteration": iteration, "steps": 1, "values": {}, "load": np.full((2, 4), iteration)}
        if isinstance(writer, Recorder):
            assert writer.append("model1", layers=["0", "1"], num_experts=4, **interval)
            assert writer.flush(20)
        else:
            writer.append(**interval)


def recorded(directory):
    """By run, its iterations, and that the loads are theirs."""
    runs = read(directory)
    for run in runs:
        assert run.load(range(len(run.iterations)))[:, 0, 0].tolist() == run.iterations.tolist()
    return [run.iterations.tolist() for run in runs]


@pytest.fixture
def training(tmp_path):
    """A training that has locked a directory and records: the directory, its lock, its recorder, what it says."""
    said = []
    directory = tmp_path / "balance"
    lock = RecordDirectory(str(directory), leads=True)
    recorder = Recorder(lock, start=1, say=said.append)
    append(recorder, 1, 2)
    yield directory, lock, recorder, said
    recorder.close()
    lock.release()


def test_a_renamed_directory(training):
    """It is written on under its new name; another training may have the old name."""
    directory, _, recorder, said = training
    renamed = directory.rename(directory.parent / "old")
    append(recorder, 3)
    other = RecordDirectory(str(directory), leads=True)
    append(Writer(directory, layers=["0", "1"], num_experts=4, start=1), 1)
    append(recorder, 4, 5)
    assert said == [f"!! {directory} was renamed or replaced; the record goes on in the directory with the new name"]
    assert recorded(renamed) == [[1, 2, 3, 4, 5]] and recorded(directory) == [[1]]
    other.release()


def test_a_deleted_directory(training):
    """It is made and locked again, and the lost beginning is noted."""
    directory, _, recorder, said = training
    shutil.rmtree(directory)
    append(recorder, 3, 4)
    assert said == [
        f"!! {directory} was deleted or replaced; the record goes on in a new directory of that name",
        f"!! run 1 in {directory} cannot be continued, its file was deleted; it begins again with iteration 3",
    ]
    assert recorded(directory) == [[3, 4]]
    (run,) = read(directory)
    assert run.notes == ["begins with iteration 3; iterations before it were recorded as run 1, but its file was deleted"]
    assert_locked(directory)


def assert_locked(directory):
    """For another process."""
    code = (
        "from megatron_global_lbl.metrics.directory import RecordDirectory as D\n"
        f"try: D({str(directory)!r}, leads=True); print('free')\nexcept Exception as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"process {os.getpid()} on {socket.gethostname()} writes there and holds {directory / LOCK}" in said


def test_files_deleted_one_by_one(training):
    """The .loads alone, then the .balance."""
    directory, _, recorder, said = training
    (directory / "run1.model1.loads").unlink()
    append(recorder, 3)
    (run,) = read(directory)
    assert run.iterations.tolist() == [1, 2, 3] and np.isnan(run.load([1])).all() and (run.load([2]) == 3).all()
    assert run.notes == ["run1.model1.loads was deleted before iteration 3: loads of single experts are lost"]
    (directory / "run1.model1.balance").unlink()
    append(recorder, 4)
    assert len(said) == 2 and "run 2 begins with iteration 4" in said[1]
    (run,) = read(directory)
    assert run.iterations.tolist() == [4] and "begins with iteration 4" in run.notes[0]


def test_two_writers_never_mix(training):
    """The second one continues the run, as it may without a lock; the first notices, and goes on in a run of its own."""
    directory, _, recorder, said = training
    second = Writer(directory, layers=["0", "1"], num_experts=4, start=3)
    append(second, 3, 4)
    append(recorder, 3, 4)
    append(second, 5)
    assert recorded(directory) == [[1, 2, 3, 4, 5], [3, 4]]
    assert said == [
        f"!! run 1 in {directory} cannot be continued, another process has written to it; run 2 begins with iteration 3"
    ]
    assert read(directory)[1].notes[0].startswith("begins with iteration 3; iterations before it were recorded as run 1")


def test_the_lock_file_is_gone(training):
    """It is locked again. If another training was faster, one line says so."""
    directory, _, recorder, said = training
    (directory / LOCK).unlink()
    append(recorder, 3)
    assert said == [f"!! the lock {directory / LOCK} was deleted while this training held it; it is locked again"]
    assert_locked(directory)
    (directory / LOCK).unlink()
    with held(directory) as other:
        append(recorder, 4, 5)
    assert len(said) == 2 and f"process {other} on " in said[1] and "each in files of its own" in said[1]
    assert recorded(directory) == [[1, 2, 3, 4, 5]]


class held:
    """Another process that holds the directory."""

    def __init__(self, directory):
        hold = (
            f"from megatron_global_lbl.metrics.directory import RecordDirectory as D; d = D({str(directory)!r}, leads=True); "
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", hold + "print('held', flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"
        return self.process.pid

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def test_one_training_at_a_time(tmp_path):
    with held(tmp_path) as other, pytest.raises(ConfigError, match=f"process {other} on .* holds {tmp_path / LOCK}"):
        RecordDirectory(str(tmp_path), leads=True)
    lock = RecordDirectory(str(tmp_path), leads=True)  # a process that was killed holds nothing
    lock.release()
    lock.release()
    assert (tmp_path / LOCK).read_text() == ""
    RecordDirectory(str(tmp_path), leads=True).release()


def test_only_the_writer_needs_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    RecordDirectory(str(tmp_path / "a")).release()
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("RANK", "0")
    RecordDirectory(str(tmp_path / "a")).release()
    assert (tmp_path / "a" / LOCK).exists()


@pytest.mark.parametrize(
    "change, is_free",
    [
        pytest.param({}, False, id="runs"),
        pytest.param({"started": "another boot 1"}, True, id="its number was given again"),
        pytest.param({"process": 2**22 + 1}, True, id="ended"),
        pytest.param({"host": "elsewhere"}, False, id="another host"),
        pytest.param(None, False, id="empty"),
    ],
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, change, is_free):
    """ENOLCK: a file made exclusively says who writes; the refusal names it."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    parent = os.getppid()
    holder = {"host": socket.gethostname(), "process": parent, "started": process_start(parent)}
    text = "" if change is None else json.dumps({**holder, **change})
    (tmp_path / HELD).write_text(text)
    if is_free:
        lock = RecordDirectory(str(tmp_path), leads=True)
        assert json.loads((tmp_path / HELD).read_text())["process"] == os.getpid()
        lock.release()
        assert not (tmp_path / HELD).exists()
    else:
        with pytest.raises(ConfigError, match=f"says {tmp_path / HELD}; delete that file"):
            RecordDirectory(str(tmp_path), leads=True)
        assert (tmp_path / HELD).read_text() == text


def test_the_end_of_a_process_releases_a_lock_that_is_a_file(tmp_path):
    code = f"""
import errno, fcntl
def lockf(*_):
    raise OSError(errno.ENOLCK, "no locks")
fcntl.lockf = lockf
from megatron_global_lbl.metrics.directory import RecordDirectory
lock = RecordDirectory({str(tmp_path)!r}, leads=True)
print(*sorted(path.name for path in lock.place.path.iterdir()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"{LOCK} {HELD}\n" and not (tmp_path / HELD).exists()


@pytest.mark.parametrize("name", [LOCK, "run1.model1.loads", "run1.model1.balance"])
def test_symbolic_links_are_not_followed(tmp_path, name):
    """What a link points to stays as it is, also where the link appears while a training runs."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    directory = tmp_path / "balance"
    writer = Writer(directory, layers=["0", "1"], num_experts=4)
    append(writer, 1)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(precious)
    if name == LOCK:
        with pytest.raises(ConfigError, match=f"{directory / LOCK} is a symbolic link"):
            RecordDirectory(str(directory), leads=True)
    else:
        append(writer, 2)
        append(Writer(directory, layers=["0", "1"], num_experts=4, start=3), 3)
        assert [run.iterations.tolist() for run in read(directory)][-1] == [2, 3]
    assert precious.read_text() == "precious"


def test_a_hanging_file_system_costs_no_step(tmp_path, monkeypatch):
    """A write does not return: 1,000 intervals are handed over at once, and one line names what is lost."""
    goes_on, said = threading.Event(), []
    write = Writer.append
    monkeypatch.setattr(Writer, "append", lambda self, **interval: goes_on.wait() and write(self, **interval))
    recorder = Recorder(tmp_path, start=1, capacity=20, say=said.append)
    interval = {"steps": 1, "values": {}, "load": np.ones((2, 4))}
    began = time.monotonic()
    kept = [recorder.append("m", layers=["0", "1"], num_experts=4, iteration=i, **interval) for i in range(1, 1001)]
    assert not recorder.flush(0.05)
    assert time.monotonic() - began < 10 and 20 <= sum(kept) <= 21
    lost = kept.index(False) + 1
    assert said == [
        f"!! {tmp_path} does not answer: the balance record lacks intervals from iteration {lost} on until it does; "
        "the training goes on"
    ]
    goes_on.set()
    assert recorder.flush(20) and recorder.append("m", layers=["0", "1"], num_experts=4, iteration=1001, **interval)
    assert recorder.close()
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == [*(np.flatnonzero(kept) + 1), 1001]
    assert run.notes and all(re.fullmatch(r"iterations \d+ to \d+ are missing", note) for note in run.notes)


@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_of_the_process_waits_for_what_is_queued(tmp_path, hangs):
    """For a bounded time."""
    code = f"""
import sys, time, threading
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import numpy as np
from megatron_global_lbl.metrics import writer
writer.Recorder.close.__defaults__ = ({0.5 if hangs else 60},)
write = writer.Writer.append
def slow(self, **interval):
    time.sleep(3600 if {hangs} else 0.01)
    write(self, **interval)
writer.Writer.append = slow
recorder = writer.Recorder({str(tmp_path)!r}, start=1)
for iteration in range(1, 11):
    recorder.append("m", layers=["0"], num_experts=2, iteration=iteration, steps=1, values={{}}, load=np.ones((1, 2)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    if hangs:
        assert (
            result.stdout == f"> moe-lbl: !! {tmp_path} does not answer: the last 10 intervals of the balance record are lost\n"
        )
    else:
        assert result.stdout == "" and read(tmp_path)[0].iterations.tolist() == list(range(1, 11))


def test_models_of_a_recorder_share_a_run(tmp_path):
    said = []
    for begin in (1, 1, 2):
        recorder = Recorder(tmp_path, start=begin, say=said.append)
        for model in ("a", "b"):
            recorder.append(model, layers=["0"], num_experts=2, iteration=begin, steps=1, values={}, load=np.ones((1, 2)))
        assert recorder.close()
    runs = [(run.number, run.model, run.iterations.tolist()) for run in read(tmp_path)]
    assert runs == [(1, "a", [1]), (1, "b", [1]), (2, "a", [1, 2]), (2, "b", [1, 2])]
    assert len({run.id for run in read(tmp_path)}) == 2 and len(said) == 2


def test_an_error_is_said_once(tmp_path):
    """And what can be written later is."""
    said = []
    directory = tmp_path / "balance"
    recorder = Recorder(directory, start=1, say=said.append)
    directory.write_text("")
    append(recorder, 1, 2)
    directory.unlink()
    append(recorder, 3)
    recorder.close()
    assert len(said) == 1 and "lacks the interval that ends with iteration 1: " in said[0]
    assert recorded(directory) == [[3]]

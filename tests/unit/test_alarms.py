"""Alarms: each condition with the layer, since when, once per cause; and none where it came and went, or is too short."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_record import even, record

from megatron_global_lbl.metrics.alarm_log import AlarmLog
from megatron_global_lbl.metrics.alarms import alarms, max_vio_limit


def found(run):
    return {alarm.cause: alarm for alarm in alarms(run)}


def test_an_even_load_has_none(tmp_path):
    assert alarms(record(tmp_path, even(200))) == []


def test_dead_experts(tmp_path):
    """Layer "3" (index 1) loses experts 5 and 9 in interval 40, which begins with iteration 401; layer "4" one later."""
    load = even(60)
    load[40:, 1, [5, 9]] = 0
    load[45:, 2, 0] = 0
    (alarm,) = alarms(record(tmp_path, load))
    assert (alarm.cause, alarm.since, alarm.layers) == ("dead_experts", 401, ("3", "4"))
    assert "2 experts of layer 3 (number 5, 9) took no token" in alarm.finding
    assert "since iteration 401; also layer 4" in alarm.finding
    assert "--moe-lbl-micro-coeff" in alarm.advice


@pytest.mark.parametrize(
    "dead, steps, causes",
    [
        pytest.param(slice(20, 50), 10, [], id="came and went"),
        pytest.param(slice(51, 60), 100, [], id="nine intervals"),
        pytest.param(slice(50, 60), 9, [], id="ninety steps"),
        pytest.param(slice(50, 60), 10, ["dead_experts"], id="long enough"),
    ],
)
def test_how_long_experts_have_to_be_dead(tmp_path, dead, steps, causes):
    load = even(60)
    load[dead, 1, 5] = 0
    assert list(found(record(tmp_path, load, steps=steps))) == causes


def test_another_expert_each_time_is_not_dead(tmp_path):
    load = even(60)
    load[np.arange(60), 1, np.arange(60) % 16] = 0
    assert alarms(record(tmp_path, load)) == []


def test_dead_experts_without_the_file_of_loads(tmp_path):
    """Their number is known, their names are not."""
    load = even(60)
    load[40:, 1, [5, 9]] = 0
    run = record(tmp_path, load)
    next(tmp_path.glob("*.loads")).unlink()
    (alarm,) = alarms(run)
    assert alarm.finding.startswith("2 experts of layer 3 took no token")


def test_max_vio(tmp_path):
    """With 16 experts and top-2 at most 7 is possible, so the limit is 3.5; the other layers stay below."""
    load = even(60)
    load[30:, 0, 3] = 6
    load[30:, 2, 3] = 5
    load[:, 1, 3] = 4
    (alarm,) = alarms(record(tmp_path, load))
    assert (alarm.cause, alarm.since, alarm.layers) == ("max_vio", 301, ("2", "4"))
    assert alarm.finding == "MaxVio of layer 2 is 5.0, above 3.5 since iteration 301; also layer 4"


@pytest.mark.parametrize("experts, topk, limit", [(64, 2, 6.0), (256, 8, 6.0), (16, 2, 3.5), (8, 2, 1.5)])
def test_limit_of_max_vio(experts, topk, limit):
    assert max_vio_limit({"num_experts": experts, "topk": topk}) == limit


def swinging(count, period):
    """Layer "4" swings with that period in intervals, every expert with a phase of its own."""
    load = even(count)
    phase = np.random.default_rng(1).uniform(0, 2 * np.pi, 16)
    load[:, 2] *= np.exp(0.5 * np.sin(2 * np.pi * np.arange(count)[:, None] / period + phase))
    return load


def test_swing(tmp_path):
    """Three windows of 256 intervals; in the first it does not swing."""
    load = swinging(3 * 256, 40)
    load[:256] = even(256)
    load[600:610] = np.nan  # lost with a disk
    (alarm,) = alarms(record(tmp_path, load, steps=2, scope="window"))
    assert (alarm.cause, alarm.since, alarm.layers) == ("swing", 2 * 256 + 1, ("4",))
    assert "period of about 80 steps" in alarm.finding
    assert "--moe-lbl-window-steps" in alarm.advice
    assert "window" not in found(record(tmp_path / "global", load[256:], scope="global"))["swing"].advice


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda n: np.cumsum(0.02 * np.random.default_rng(2).standard_normal((n, 16)), axis=0), id="walk"),
        pytest.param(lambda n: np.exp(-np.arange(n)[:, None] / 50) * np.random.default_rng(3).standard_normal(16), id="decay"),
        pytest.param(lambda n: 0.5 * (-1.0) ** np.arange(n)[:, None] * np.sign(np.arange(16) - 7.5), id="to and fro"),
        pytest.param(lambda n: 0.02 * np.sin(2 * np.pi * np.arange(n)[:, None] / 40 + np.arange(16)), id="too small"),
    ],
)
def test_no_swing(tmp_path, change):
    load = even(256, noise=0.02)
    load[:, 1] *= np.exp(change(256))
    assert alarms(record(tmp_path, load / load.mean(axis=-1, keepdims=True))) == []


def test_balance_bsz(tmp_path):
    (alarm,) = alarms(record(tmp_path, even(20), sequences=31))
    assert (alarm.cause, alarm.since) == ("balance_bsz", 1)
    assert "Balance BSZ 31 (scope global): f is counted over fewer than 32 sequences" in alarm.finding
    assert alarms(record(tmp_path / "enough", even(20), sequences=32)) == []
    assert alarms(record(tmp_path / "unknown", even(20), sequences=np.nan)) == []


@pytest.mark.parametrize(
    "about, cause",
    [
        ({"alpha": 0.0}, "no_coefficient"),
        ({"alpha": 0.0, "scope": "micro"}, None),
        ({"scope": "dp", "data_parallel": 1}, "same_as_micro"),
        ({"scope": "dp", "settings": {"group_size": 1}}, "same_as_micro"),
        ({"data_parallel": 1, "micro_batches": 1}, "same_as_micro"),
        ({"data_parallel": 1, "micro_batches": 2}, None),
        ({"scope": "window", "data_parallel": 1, "micro_batches": 1}, None),
    ],
)
def test_a_scope_that_does_nothing(tmp_path, about, cause):
    assert list(found(record(tmp_path, even(20), **about))) == ([cause] if cause else [])


def test_the_log_says_each_cause_once(tmp_path):
    """When it begins, and again neither in the next interval nor after a way back to a checkpoint."""
    load = swinging(320, 40)
    load[50:, 1, 5] = 0
    log = AlarmLog(["2", "3", "4"], 16, first_stage=True)
    about = {"scope": "window", "topk": 2}
    said = {}

    def train(first, last):
        for number in range(first, last + 1):
            load_LE = load[number - 1]
            values = {"dead": (load_LE == 0).sum(axis=1), "max_vio": load_LE.max(axis=1) - 1}
            interval = {"iteration": 10 * number, "steps": 10, "values": values, "load": load_LE, "sequences": 256 - number}
            for line in log.add(about, **interval):
                said.setdefault(line, []).append(number)

    train(1, 70)
    assert list(said.values()) == [[60]]
    (line,) = said
    assert line.startswith("!! 1 expert of layer 3 (number 5) took no token") and "since iteration 501. Do: a larger" in line
    train(61, 320)
    assert [line[:14] for line in said] == ["!! 1 expert of", "!! The load of", "!! Balance BSZ"]
    # It looks for swings every 32 intervals, and 10 were run again: in its 160th it has 150, enough to tell.
    assert list(said.values())[1:] == [[150], [225]]

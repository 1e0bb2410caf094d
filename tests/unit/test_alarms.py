"""Alarms: each condition with the layer, since when, once per cause; and none where it came and went, or is too short."""

from __future__ import annotations

import re

import numpy as np
import pytest
from synthetic_record import even, record

from megatron_global_lbl.metrics.alarms import alarms, max_vio_limit
from megatron_global_lbl.metrics.live_alarms import LiveAlarms
from megatron_global_lbl.metrics.record import read
from megatron_global_lbl.metrics.writer import Writer


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


def test_balance_bsz(tmp_path):
    (alarm,) = alarms(record(tmp_path, even(20), sequences=15))
    assert (alarm.cause, alarm.since) == ("balance_bsz", 1)
    assert "Balance BSZ 15 (scope global): f is counted over fewer than 16 sequences" in alarm.finding
    assert alarms(record(tmp_path / "enough", even(20), sequences=16)) == []
    assert alarms(record(tmp_path / "unknown", even(20), sequences=np.nan)) == []


@pytest.mark.parametrize(
    "about, cause",
    [
        ({"alpha": 0.0}, "no_coefficient"),
        ({"alpha": 0.0, "scope": "micro"}, None),
        ({"alpha": 0.0, "balancing": ["expert_bias"]}, None),
        ({"scope": "dp", "micro_sequences": 256}, "same_as_micro"),
        ({"scope": "micro", "micro_sequences": 256}, None),
        ({"micro_sequences": 256, "data_parallel": 8}, "same_as_micro"),
        ({"micro_sequences": 128, "data_parallel": 1, "micro_batches": 1}, None),
        ({"micro_sequences": np.nan}, None),
    ],
)
def test_a_scope_that_does_nothing(tmp_path, about, cause):
    """Measured sequences decide, whatever the flags say."""
    assert list(found(record(tmp_path, even(20), **about))) == ([cause] if cause else [])


@pytest.mark.parametrize(
    "balancing, alpha, advised",
    [
        (["aux_loss"], 0.01, ["--moe-aux-loss-coeff"]),
        (["seq_aux_loss"], 0.0, ["--moe-aux-loss-coeff"]),
        (["expert_bias"], 0.0, ["--moe-router-bias-update-rate"]),
        (["seq_aux_loss", "expert_bias"], 0.0, ["--moe-aux-loss-coeff", "--moe-router-bias-update-rate"]),
        (["quantile_balancing"], 0.0, ["--moe-router-quantile-balancing-ema"]),
        (["none"], 0.0, ["--moe-router-load-balancing-type", "--moe-router-enable-expert-bias"]),
        (None, 0.0, []),
    ],
)
def test_advice_is_for_what_balances_the_model(tmp_path, balancing, alpha, advised):
    """And no scope or coefficient of this plugin for somebody without a loss that it acts on."""
    load = even(60)
    load[:, 1, 5] = 0
    load[:, 0, 3] = 6
    about = {"alpha": alpha, "scope": "micro", **({"balancing": balancing} if balancing else {})}
    alarm = found(record(tmp_path, load, sequences=4, **about))
    has_loss = balancing == ["aux_loss"]
    assert set(alarm) == {"dead_experts", "max_vio"} | ({"balance_bsz"} if has_loss else set())
    flags = re.findall("--moe-[a-z-]+", alarm["max_vio"].advice + " " + alarm["dead_experts"].advice)
    assert set(flags) - {"--moe-router-dtype"} == set(advised)
    assert has_loss or not any("--moe-lbl" in x.advice for x in alarm.values())


def test_the_log_says_each_cause_once(tmp_path):
    """When it begins, and again neither in the next interval nor after a way back to a checkpoint."""
    load = even(320)
    load[50:, 1, 5] = 0
    log = LiveAlarms(["2", "3", "4"], 16)
    about = {"scope": "global", "topk": 2, "alpha": 0.01}
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
    assert [line[:14] for line in said] == ["!! 1 expert of", "!! Balance BSZ"]
    assert list(said.values())[1:] == [[241]]


def test_layers_have_their_own_experts(tmp_path):
    """Layer "b" has 4 experts with top-2: its MaxVio can be 1 at most, and half of that is its limit."""
    writer = Writer(tmp_path, layers=["a", "b"], num_experts=[16, 4], topk=[2, 2], about={"alpha": 0.01})
    load = np.ones((2, 16))
    load[1, :4] = [1.6, 1.2, 1.2, 0]
    for number in range(1, 13):
        values = {"max_vio": np.array([0.6, 0.6]), "dead": np.array([0, 1])}
        writer.append(iteration=number * 10, steps=10, values=values, load=load)
    (run,) = read(tmp_path)
    assert [(alarm.cause, alarm.layers) for alarm in alarms(run)] == [("dead_experts", ("b",)), ("max_vio", ("b",))]
    assert "1 expert of layer b (number 3)" in alarms(run)[0].finding

"""What a reader wants to know first, each question answered per run with the range that it is judged by.

Means are over the end of the run (`measures.end_of_run`). Shape suffixes: N intervals, L layers, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.alarms import BALANCE_BSZ_LIMIT, Alarm, max_vio_limit
from megatron_global_lbl.metrics.measures import end_of_run
from megatron_global_lbl.report.experts import loss_of
from megatron_global_lbl.report.series import late, mean, values
from megatron_global_lbl.report.text import amount, counted, number
from megatron_global_lbl.specialise.result import Specialisation

# The paper's perplexity is flat from 128 sequences on.
FLAT_BSZ = 128
# A rule of thumb: no expert takes more than twice its share, and with expert parallelism no rank waits longer than that.
EVEN_MAX_VIO = 1.0
# A rule of thumb, too: an expert that learns from a tenth of the tokens that an even share would be.
STARVED = 0.1
# Differences of the contrast that are shown as one: the last digit that is printed.
RISE = 0.005
FEW = 6  # layers of a list on the page's first screen
COLUMNS = "run|scope|Balance BSZ|LBL global|LBL micro|MaxVio|worst layer|entropy|dead experts|alarms".split("|")


@dataclass(frozen=True)
class Answer:
    """`state` is good, fair, bad or open; `gauge` a value with the ends of "even" and of "uneven"."""

    state: str
    text: str
    remark: str
    gauge: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Told:
    """A run with what is known of it: its name on the page, alarms, mean load at the end [L, E], checkpoints measured."""

    label: str
    run: Any
    alarms: list[Alarm]
    end_LE: np.ndarray
    measured: list[Specialisation]


def answers(told: list[Told]) -> list[tuple[str, list[Answer]]]:
    """The questions, each with an answer per run."""
    first = next((one for one in told if one.measured), None)
    return [
        ("Is the global loss on?", [_on(one.run, {alarm.cause for alarm in one.alarms}) for one in told]),
        ("Over how many sequences?", [_sequences(one.run) for one in told]),
        ("Is the load even?", [_even(one.run) for one in told]),
        ("Which experts are dead or starved?", [_idle(one) for one in told]),
        ("Did specialisation rise?", [_specialised(one, first) for one in told]),
        ("What is the held-out loss?", [_loss(one, first) for one in told]),
    ]


def _on(run: Any, causes: set[str]) -> Answer:
    scope, start = run.header.get("scope"), int((run.header.get("settings") or {}).get("start_iter") or 0)
    if scope is None:
        return Answer("open", "Not known", "The record does not name the scope.")
    if "no_coefficient" in causes:
        return Answer("bad", "No", f"Scope {scope}, but the coefficient is 0.")
    if "same_as_micro" in causes:
        return Answer("bad", "In name only", f"Scope {scope} counts one micro-batch of one rank, as micro does.")
    coefficient = "" if run.header.get("alpha") is None else f" Coefficient {_plain(run.header['alpha'])}."
    if start > run.iterations[-1]:
        return Answer("fair", "Not yet", f"Scope micro acts until iteration {start}, {scope} after it.{coefficient}")
    state, text = ("good", "Yes") if scope == "global" else ("fair", "No")
    return Answer(state, text, f"Scope {scope} acted{f', since iteration {start}' if start > 1 else ''}.{coefficient}")


def _sequences(run: Any) -> Answer:
    known = run.sequences[np.isfinite(run.sequences)]
    if not len(known):
        return Answer("open", "Not known", "The record does not have the Balance BSZ.")
    value = float(np.nanmean(run.sequences[end_of_run(run.steps) :])) if np.isfinite(run.sequences[-1]) else float(known[-1])
    state = "good" if value >= FLAT_BSZ else "fair" if value >= BALANCE_BSZ_LIMIT else "bad"
    low, high = known.min(), known.max()
    span = f"{amount(low)} to {amount(high)} over the run, " if low < high else ""
    tokens = f" ({run.tokens[-1]:,.0f} tokens)" if np.isfinite(run.tokens[-1]) else ""
    judged = f"Good from {FLAT_BSZ}, too few below {BALANCE_BSZ_LIMIT}."
    return Answer(state, amount(value), f"{span}measured in {counted(len(known), 'interval')}{tokens}. {judged}")


def _even(run: Any) -> Answer:
    vio_L, limit_L = late(run, "max_vio"), np.broadcast_to(max_vio_limit(run.header), len(run.layers))
    if not np.isfinite(vio_L).any():
        return Answer("open", "Not known", "The record does not have MaxVio.")
    layer = int(np.nanargmax(vio_L / limit_L))
    worst, limit = float(vio_L[layer]), float(limit_L[layer])
    even = min(EVEN_MAX_VIO, limit)
    state, text = ("good", "Yes") if worst <= even else ("fair", "Not quite") if worst <= limit else ("bad", "No")
    remark = f"MaxVio {number(worst)} in the worst layer ({run.layers[layer]}), {number(mean(vio_L))} in the mean. "
    return Answer(state, text, remark + f"Even up to {even:.3g}, an alarm above {limit:.3g}.", (worst, even, limit))


def idle_experts(one: Told) -> list[tuple[str, list[int], list[int]]]:
    """Layers that have any, with the numbers of their dead and of their starved experts."""
    found = []
    for layer, load_E in zip(one.run.layers, one.end_LE):
        dead, starved = np.flatnonzero(load_E == 0), np.flatnonzero((load_E > 0) & (load_E < STARVED))
        if len(dead) or len(starved):
            found.append((layer, dead.tolist(), starved.tolist()))
    return sorted(found, key=lambda entry: (-len(entry[1]), -len(entry[2])))


def _idle(one: Told) -> Answer:
    if not np.isfinite(one.end_LE).any():
        return Answer("open", "Not known", "The record does not have the loads of single experts.")
    found = idle_experts(one)
    dead, starved = (sum(len(entry[part]) for entry in found) for part in (1, 2))
    judged = f"Starved: below {STARVED:g} of an even share at the end."
    if not found:
        return Answer("good", "None", judged)
    listed = "; ".join(in_words(*entry, few=FEW) for entry in found[: FEW // 2])
    more = f"; {counted(len(found) - FEW // 2, 'more layer')} under Details" if len(found) > FEW // 2 else ""
    text = ", ".join(f"{count} {what}" for count, what in ((dead, "dead"), (starved, "starved")) if count)
    return Answer("bad" if dead else "fair", text, f"{listed}{more}. {judged}")


def in_words(layer: str, dead: list[int], starved: list[int], *, few: int) -> str:
    """One layer's experts."""
    kinds = {"dead": dead, "starved": starved}
    parts = [f"{kind} {', '.join(map(str, ids[:few]))}{', ...' * (len(ids) > few)}" for kind, ids in kinds.items() if ids]
    return f"layer {layer}: {'; '.join(parts)}"


def _before(one: Told, first: Told | None) -> tuple[Specialisation, str] | None:
    """What the run's latest checkpoint is compared with, and its name: the run's first checkpoint, or the first run's."""
    if len(one.measured) > 1:
        return one.measured[0], f"iteration {one.measured[0].iteration:,}"
    return (first.measured[-1], first.label) if one.measured and first is not None and first is not one else None


def _specialised(one: Told, first: Told | None) -> Answer:
    if not one.measured:
        begin = mean(values(one.run, "lbl_micro")[0] - values(one.run, "lbl_global")[0])
        gap = mean(late(one.run, "lbl_micro") - late(one.run, "lbl_global"))
        how = "megatron_global_lbl.specialise measures a checkpoint."
        hint = f" A hint: LBL within micro-batches less LBL over the global batch is {number(gap)}, at first {number(begin)}."
        return Answer("open", "Not measured", how + (hint if np.isfinite(gap) else ""))
    last = one.measured[-1]
    contrast = float(last.contrast_L.mean())
    here = f"Contrast of {counted(len(last.names), 'domain')} {contrast:.3f} at iteration {last.iteration:,}"
    before = _before(one, first)
    if before is None:
        return Answer("open", f"{contrast:.3f}", f"{here}; one checkpoint. 0: all domains use the same experts.")
    change = contrast - float(before[0].contrast_L.mean())
    state, text = ("good", "Yes") if change >= RISE else ("fair", "No") if change <= -RISE else ("open", "Unchanged")
    return Answer(state, f"{text}, {change:+.3f}", f"{here}, against {before[1]}.")


def _loss(one: Told, first: Told | None) -> Answer:
    losses = loss_of(one.measured[-1]) if one.measured else {}
    if not losses:
        return Answer("open", "Not measured", "megatron_global_lbl.specialise measures it, per domain.")
    before = _before(one, first)
    known = loss_of(before[0]) if before is not None else {}
    changes = [value - known[name] for name, value in losses.items() if name in known]
    listed = ", ".join(f"{name} {value:.3f}" for name, value in list(losses.items())[:FEW])
    more = f", {len(losses) - FEW} more under Details" if len(losses) > FEW else ""
    state, text, against = "open", f"{np.mean(list(losses.values())):.3f}", ""
    if before is not None and changes:
        change = float(np.mean(changes))
        state, text = "good" if change < 0 else "fair" if change > 0 else "open", f"{text} ({change:+.3f})"
        against = f" Difference to {before[1]}, mean of {counted(len(changes), 'domain')}."
    return Answer(state, text, f"{listed}{more}.{against}")


def row(one: Told) -> list[str]:
    """The run's line in the table of numbers (COLUMNS)."""
    run, ends = one.run, {name: late(one.run, name) for name in ("lbl_global", "lbl_micro", "max_vio", "entropy", "dead")}
    vio_L, dead_L = ends["max_vio"], ends["dead"]
    worst = f"{number(np.nanmax(vio_L))} (layer {run.layers[int(np.nanargmax(vio_L))]})" if np.isfinite(vio_L).any() else "-"
    dead = amount(float(np.nansum(dead_L)) if np.isfinite(dead_L).any() else np.nan)
    means = [number(mean(ends[name])) for name in ("lbl_global", "lbl_micro", "max_vio")]
    about = [one.label, str(run.header.get("scope", "-")), _sequences(run).text]
    return [*about, *means, worst, number(mean(ends["entropy"]), 4), dead, str(len(one.alarms) or "none")]


def summary(run: Any) -> str:
    """The run in one sentence."""
    topk = f", top-{_plain(run.header['topk'])}" if "topk" in run.header else ""
    layers, experts = counted(len(run.layers), "MoE layer"), _plain(run.header["num_experts"])
    intervals = counted(len(run.iterations), "interval")
    return f"{layers} of {experts} experts{topk}; {intervals} up to iteration {run.iterations[-1]:,}."


def settings(run: Any) -> list[tuple[str, str]]:
    """What the run was, as the training wrote it."""
    header = run.header
    rows = [("record", str(run.directory))]
    if "started" in header:
        rows.append(("started", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(header["started"]))))
    flags = header.get("settings") or {}
    rows += [(f"--moe-lbl-{name.replace('_', '-')}", str(value)) for name, value in flags.items() if value is not None]
    names = {"alpha": "coefficient", "data_parallel": "data-parallel ranks", "micro_batches": "micro-batches per step"}
    names |= {"log_interval": "iterations per interval"}
    rows += [(name, _plain(header[key])) for key, name in names.items() if header.get(key) is not None]
    return [*rows, *((f"version of {name}", str(version)) for name, version in (header.get("versions") or {}).items())]


def _plain(value: Any) -> str:
    each = value if isinstance(value, list) else [value]
    return ", ".join(dict.fromkeys(f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in each))

"""What is wrong with the balance of a run, from its record: each cause once, with the layer, since when, and what to do.

An alarm is a condition that holds at the end of the record, so that "is it healthy now?" has an answer. What came and went is
in the pictures of the report. Every threshold has its source beside it; docs/operations.md repeats them in a table.
Shape suffixes: N intervals, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.reader import Run
from megatron_global_lbl.metrics.streaks import LASTING_INTERVALS, counted, lasting, others, since, worst_first
from megatron_global_lbl.metrics.swing import LEAST_INTERVALS, MOST_INTERVALS, swings

# In docs/reproduction.md (64 experts, top-2) MaxVio is 1 to 4 at the end of a training, and 14 to 24 where a late correction
# overshoots. With few experts the largest possible, E / top-k - 1, is below that: half of it is the limit then.
MAX_VIO_LIMIT = 6.0
MAX_VIO_SHARE_OF_POSSIBLE = 0.5
# The paper's perplexity (3.4A0.6B, 120B tokens) is 8.167 with a Balance BSZ of 4, 8.062 with 32 and 8.038 with 512: below 32
# most of the gain is lost. Its curve is flat from 128.
BALANCE_BSZ_LIMIT = 32
# How many windows are looked at to find since when a load swings.
SWING_WINDOWS = 8


@dataclass(frozen=True)
class Alarm:
    """One cause. `cause` is a stable name, `since` the iteration it began with, `layers` the worst one first."""

    cause: str
    finding: str
    advice: str
    since: int
    layers: tuple[str, ...] = ()


Check = Callable[[Run], Alarm | None]


def no_coefficient(run: Run) -> Alarm | None:
    """The loss is multiplied by 0."""
    alpha = run.header.get("alpha")
    if _scope(run) == "micro" or alpha is None or np.any(np.asarray(alpha, dtype=float) > 0):
        return None
    return Alarm(
        "no_coefficient",
        f"The coefficient of the load-balancing loss is 0: scope {_scope(run)} does nothing",
        "--moe-aux-loss-coeff above 0 (the paper uses 0.008)",
        since(run, 0),
    )


def same_as_micro(run: Run) -> Alarm | None:
    """The scope counts over no more than `micro` does."""
    scope, header = _scope(run), run.header
    ranks = (header.get("settings") or {}).get("group_size") or header.get("data_parallel")
    rounds = header.get("micro_batches") if scope == "global" else 1
    if scope not in ("dp", "global") or ranks != 1 or rounds != 1:
        return None
    return Alarm(
        "same_as_micro",
        f"Scope {scope} does what micro does: f is counted over one micro-batch of one data-parallel rank",
        "scope global with more micro-batches per step (a larger --global-batch-size), or more data-parallel ranks",
        since(run, 0),
    )


def dead_experts(run: Run) -> Alarm | None:
    """Experts without a single selection, interval after interval."""
    dead_NL = run.metrics["dead"]
    start_L = lasting(run, dead_NL > 0)
    worst = worst_first(run, start_L, dead_NL[-1])
    if not worst:
        return None
    layer = worst[0]
    recent = np.arange(len(dead_NL) - LASTING_INTERVALS, len(dead_NL))
    load_NE = run.load(recent)[:, layer]
    experts = np.flatnonzero((load_NE == 0).all(axis=0))
    if len(experts) == 0 and np.isfinite(load_NE).all():  # others at other times: none of them is dead
        return None
    number = len(experts) or int(dead_NL[-1, layer])
    named = f" (number {', '.join(map(str, experts[:8]))}{', ...' if len(experts) > 8 else ''})" if len(experts) else ""
    start = since(run, start_L[layer])
    return Alarm(
        "dead_experts",
        f"{counted(number, 'expert')} of layer {run.layers[layer]}{named} took no token in the last {LASTING_INTERVALS} "
        f"intervals; the layer has had dead experts since iteration {start}" + others(run, worst),
        "a larger --moe-aux-loss-coeff, or --moe-lbl-micro-coeff; --moe-router-dtype fp32; a resume from before that iteration",
        start,
        tuple(run.layers[i] for i in worst),
    )


def max_vio(run: Run) -> Alarm | None:
    """A layer whose fullest expert takes far more than its share."""
    values_NL = run.metrics["max_vio"]
    limit = max_vio_limit(run.header)
    start_L = lasting(run, values_NL > limit)
    worst = worst_first(run, start_L, values_NL[-1])
    if not worst:
        return None
    layer = worst[0]
    return Alarm(
        "max_vio",
        f"MaxVio of layer {run.layers[layer]} is {values_NL[-1, layer]:.1f}, above {limit:.3g} since iteration "
        f"{since(run, start_L[layer])}" + others(run, worst),
        "twice the --moe-aux-loss-coeff; look at the z-loss, the gradient norm and --moe-router-dtype fp32",
        since(run, start_L[layer]),
        tuple(run.layers[i] for i in worst),
    )


def max_vio_limit(header: dict[str, Any]) -> float:
    """The limit for this number of experts and top-k."""
    possible = header["num_experts"] / header.get("topk", 1) - 1
    return min(MAX_VIO_LIMIT, MAX_VIO_SHARE_OF_POSSIBLE * possible)


def swing(run: Run) -> Alarm | None:
    """Experts that are too full and too empty in turn: a correction that comes late."""
    count = len(run.iterations)
    width = min(MOST_INTERVALS, count)
    found: dict[int, int] = {}  # layer -> first interval of the windows in a row in which it swings
    periods: dict[int, int] = {}
    for window in range(SWING_WINDOWS):
        stop = count - window * width
        start = max(0, stop - width)
        if stop - start < LEAST_INTERVALS:
            break
        now = {i: s for i, s in enumerate(swings(run.load(np.arange(start, stop)))) if s is not None}
        if window == 0:
            periods = {layer: s.period for layer, s in now.items()}
            by_size = sorted(now, key=lambda layer: -now[layer].size)
        still = [layer for layer in now if window == 0 or found.get(layer) == stop]
        found |= {layer: start for layer in still}
        if not still:
            break
    if not periods:
        return None
    layer = by_size[0]
    steps = periods[layer] * float(run.steps[-width:].mean())
    advice = (
        "scope global, or a shorter --moe-lbl-window-steps"
        if _scope(run) == "window"
        else "a smaller --moe-aux-loss-coeff or a smaller learning rate: the router overshoots"
    )
    return Alarm(
        "swing",
        f"The load of layer {run.layers[layer]} swings with a period of about {steps:.0f} steps, since iteration "
        f"{since(run, found[layer])} or before" + others(run, by_size),
        advice,
        since(run, found[layer]),
        tuple(run.layers[i] for i in by_size),
    )


def balance_bsz(run: Run) -> Alarm | None:
    """f is counted over few sequences."""
    below_N = (run.sequences > 0) & (run.sequences < BALANCE_BSZ_LIMIT)
    if not below_N[-1]:
        return None
    start = len(below_N) - int(np.argmin(below_N[::-1])) if not below_N.all() else 0
    scope = _scope(run)
    return Alarm(
        "balance_bsz",
        f"Balance BSZ {float(run.sequences[-1]):g} (scope {scope}): f is counted over fewer than {BALANCE_BSZ_LIMIT} sequences "
        f"since iteration {since(run, start)}",
        "--moe-lbl-scope global" if scope in ("micro", "dp") else "a larger --global-batch-size",
        since(run, start),
    )


# The gravest first.
CHECKS: Sequence[Check] = (no_coefficient, same_as_micro, dead_experts, max_vio, swing, balance_bsz)


def alarms(run: Run, checks: Sequence[Check] = CHECKS) -> list[Alarm]:
    """The alarms of a run; an empty record has none.

    Raises:
        RecordError: loads that it has to look at are broken.
    """
    if len(run.iterations) == 0:
        return []
    found = [check(run) for check in checks]
    return [alarm for alarm in found if alarm is not None]


def _scope(run: Run) -> str:
    return str(run.header.get("scope", "micro"))

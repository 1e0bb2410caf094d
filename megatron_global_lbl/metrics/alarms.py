"""What is wrong with the balance of a run, from its record: each cause once, with the layer, since when, and what to do.

An alarm is a condition that holds at the end of the record. Every threshold has its source beside it; docs/operations.md
repeats them in a table. Advice is for what balances the model: the loss this plugin changes, another loss, a bias, or nothing.
Shape suffixes: N intervals, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.record import Run
from megatron_global_lbl.metrics.streaks import LASTING_INTERVALS, counted, lasting, others, since, streak, worst_first

# In docs/reproduction.md (64 experts, top-2) MaxVio is 1 to 4 at the end of a training, and 14 to 24 where a late correction
# overshoots. With few experts the largest possible, E / top-k - 1, is below that: half of it is the limit then.
MAX_VIO_LIMIT = 6.0
MAX_VIO_SHARE_OF_POSSIBLE = 0.5
# The paper's perplexity (3.4A0.6B, 120B tokens) is 8.167 with a Balance BSZ of 4, 8.062 with 32 (four fifths of the gain) and
# 8.038 with 512; the small model of docs/reproduction.md is flat from 16. A step of 32 sequences that is accumulated has a mean
# of 16.5 or more.
BALANCE_BSZ_LIMIT = 16


@dataclass(frozen=True)
class Alarm:
    """One cause. `cause` is a stable name, `since` the iteration it began with, `layers` the worst one first."""

    cause: str
    finding: str
    advice: str
    since: int
    layers: tuple[str, ...] = ()


class Balancing(str, Enum):
    """What evens out the load, as Megatron's `--moe-router-load-balancing-type` and expert bias say."""

    LOSS = "aux_loss"
    """A loss that the scope acts on (`aux_loss`, `global_aux_loss`)."""
    SEQUENCE_LOSS = "seq_aux_loss"
    """A loss within each sequence, which no scope acts on."""
    BIAS = "expert_bias"
    """A bias per expert in the selection (`--moe-router-enable-expert-bias`)."""
    QUANTILE = "quantile_balancing"
    """A bias from quantiles of the scores."""
    SINKHORN = "sinkhorn"
    """An assignment that is even by construction, in training."""


_MORE_BALANCE = {
    Balancing.LOSS: "a larger --moe-aux-loss-coeff",
    Balancing.SEQUENCE_LOSS: "a larger --moe-aux-loss-coeff",
    Balancing.BIAS: "a larger --moe-router-bias-update-rate",
    Balancing.QUANTILE: "a smaller --moe-router-quantile-balancing-ema, so that the bias follows the load sooner",
    Balancing.SINKHORN: "a --moe-router-load-balancing-type that balances evaluation, too",
}
_NOTHING = "a --moe-router-load-balancing-type with a loss, or --moe-router-enable-expert-bias: nothing balances this model"


def balancing(run: Run) -> list[Balancing] | None:
    """What balances the model; None if the record does not say."""
    names = run.header.get("balancing")
    if names is None:  # a coefficient says that there is a loss
        return [Balancing.LOSS] if np.any(_alpha(run) > 0) else None
    names = ["aux_loss" if name == "global_aux_loss" else name for name in names]
    return [kind for kind in Balancing if kind.value in names]


def more_balance(run: Run) -> str:
    """What to change if the load is too uneven."""
    kinds = balancing(run)
    if kinds is None:
        return "more weight for whatever balances the experts"
    return " and ".join(dict.fromkeys(_MORE_BALANCE[kind] for kind in kinds)) or _NOTHING


Check = Callable[[Run], "Alarm | None"]


def no_coefficient(run: Run) -> Alarm | None:
    """The loss is multiplied by 0."""
    alpha, kinds = _alpha(run), balancing(run)
    has_loss = kinds is None or Balancing.LOSS in kinds
    if _scope(run) == "micro" or not has_loss or not len(alpha) or np.any(alpha > 0):
        return None
    return Alarm(
        "no_coefficient",
        f"The coefficient of the load-balancing loss is 0: scope {_scope(run)} does nothing",
        "--moe-aux-loss-coeff above 0 (the paper uses 0.008)",
        since(run, 0),
    )


def same_as_micro(run: Run) -> Alarm | None:
    """f is counted over no more than one micro-batch of one data-parallel rank, as measured."""
    scope = _scope(run)
    if scope not in ("dp", "global") or not _has_loss(run):
        return None
    start = streak(run.sequences <= run.micro_sequences)
    if start is None:
        return None
    return Alarm(
        "same_as_micro",
        f"Scope {scope} does what micro does: f is counted over {run.sequences[-1]:g} sequences, a micro-batch of one "
        f"data-parallel rank, since iteration {since(run, start)}",
        "more data-parallel ranks"
        + (", or more micro-batches per step (a larger --global-batch-size)" if scope == "global" else ", or scope global"),
        since(run, start),
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
    load_NE = run.load(recent)[:, layer, : run.num_experts[layer]]
    experts = np.flatnonzero((load_NE == 0).all(axis=0))
    if len(experts) == 0 and np.isfinite(load_NE).all():  # others at other times: none of them is dead
        return None
    number = len(experts) or int(dead_NL[-1, layer])
    named = f" (number {', '.join(map(str, experts[:8]))}{', ...' if len(experts) > 8 else ''})" if len(experts) else ""
    start = since(run, start_L[layer])
    extra = ", or --moe-lbl-micro-coeff" if _has_loss(run) and _scope(run) != "micro" else ""
    return Alarm(
        "dead_experts",
        f"{counted(number, 'expert')} of layer {run.layers[layer]}{named} took no token in the last {LASTING_INTERVALS} "
        f"intervals; the layer has had dead experts since iteration {start}" + others(run, worst),
        f"{more_balance(run)}{extra}; --moe-router-dtype fp32; a resume from before that iteration",
        start,
        tuple(run.layers[i] for i in worst),
    )


def max_vio(run: Run) -> Alarm | None:
    """A layer whose fullest expert takes far more than its share."""
    values_NL = run.metrics["max_vio"]
    limit_L = np.broadcast_to(max_vio_limit(run.header), len(run.layers))
    start_L = lasting(run, values_NL > limit_L)
    worst = worst_first(run, start_L, values_NL[-1])
    if not worst:
        return None
    layer = worst[0]
    return Alarm(
        "max_vio",
        f"MaxVio of layer {run.layers[layer]} is {values_NL[-1, layer]:.1f}, above {limit_L[layer]:.3g} since iteration "
        f"{since(run, start_L[layer])}" + others(run, worst),
        f"{more_balance(run)}; look at the z-loss, the gradient norm and --moe-router-dtype fp32",
        since(run, start_L[layer]),
        tuple(run.layers[i] for i in worst),
    )


def max_vio_limit(header: dict[str, Any]) -> np.ndarray:
    """The limit for the header's number of experts and top-k: a scalar, or [L] where layers differ."""
    topk = np.asarray([k or 1 for k in header["topk"]] if isinstance(header.get("topk"), list) else header.get("topk", 1))
    return np.minimum(MAX_VIO_LIMIT, MAX_VIO_SHARE_OF_POSSIBLE * (np.asarray(header["num_experts"]) / topk - 1))


def balance_bsz(run: Run) -> Alarm | None:
    """The f of a loss is counted over few sequences, as measured."""
    start = streak((run.sequences > 0) & (run.sequences < BALANCE_BSZ_LIMIT))
    if start is None or not _has_loss(run):
        return None
    scope = _scope(run)
    return Alarm(
        "balance_bsz",
        f"Balance BSZ {float(run.sequences[-1]):g} (scope {scope}): f is counted over fewer than {BALANCE_BSZ_LIMIT} sequences "
        f"since iteration {since(run, start)}",
        "--moe-lbl-scope global" if scope in ("micro", "dp") else "a larger --global-batch-size",
        since(run, start),
    )


# The gravest first.
CHECKS: Sequence[Check] = (no_coefficient, same_as_micro, dead_experts, max_vio, balance_bsz)


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


def _alpha(run: Run) -> np.ndarray:
    return np.atleast_1d(np.asarray(run.header.get("alpha", []), dtype=float))


def _has_loss(run: Run) -> bool:
    """A loss that the scope acts on, with a coefficient."""
    alpha = _alpha(run)
    return Balancing.LOSS in (balancing(run) or ()) and (not len(alpha) or bool(np.any(alpha > 0)))

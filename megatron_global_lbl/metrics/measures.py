"""From sums over a log interval to the measures of balance. NumPy only.

    lbl_global   E * sum_i f_i p_i, f and p over all of the interval's tokens; 1.0 is even (docs/internals.md, alpha = 1)
    lbl_micro    mean of the LBL within each micro-batch of one data-parallel rank, which is Megatron's own `aux_loss`
    max_vio      largest load / mean load - 1                       (Wang et al., arXiv 2408.15664, MaxVio)
    entropy      - sum_i f_i log f_i / log E; 1.0 is even
    dead         experts without a selection; over several layers their sum, every other measure is a mean
    cv           standard deviation of the load / mean load         (Shazeer et al., arXiv 1701.06538)
    effective    exp(- sum_i f_i log f_i), the number of experts of an even load with this entropy
    overload     tokens of the busiest expert-parallel rank / mean over these ranks, which is what makes steps slow
    uncertainty  mean over tokens of the normalised entropy of their scores over experts; 1.0: the router does not choose
    margin       mean over tokens of the score of the last selected rank minus that of the next one; near 0: rounding decides
    moved        share of the selections that are not the top-k of the scores: moved by an expert bias, groups or replay
    bias_spread  largest minus least expert bias; `bias_largest`: the largest magnitude

Where a run stands "at its end" is a mean over the intervals of `end_of_run`, in the log of a demo as in every report.
Shape suffixes: N intervals, L layers, E experts (the largest number of any layer; zeros beyond a layer's own).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Better large; all others are better small.
WORST_IS_LEAST = ("entropy", "effective", "uncertainty", "margin")
BRIEF = ("lbl_global", "lbl_micro", "max_vio", "entropy", "dead")
OF_TOKENS = ("uncertainty", "margin", "moved")
SUMMED = ("dead",)  # over layers
END = 10  # the last tenth of a run's steps


def measures(
    *,
    counts_LE: np.ndarray,
    score_sums_LE: np.ndarray,
    extras_LX: np.ndarray,
    lbl_sums_L: np.ndarray,
    micro_batches_L: np.ndarray,
    topk: int | np.ndarray,
    experts: int | np.ndarray | None = None,
    expert_parallel: int = 1,
) -> dict[str, np.ndarray]:
    """Every measure per layer; NaN where nothing was counted, or what it needs is NaN.

    Args:
        counts_LE: selections per expert over the interval, all data-parallel ranks.
        score_sums_LE: scores summed over the same tokens.
        extras_LX: sums over tokens of entropy, margin and moved selections (core/observer.py); X is 0 without detailed metrics.
        lbl_sums_L: LBL (alpha = 1) summed over micro-batches and data-parallel ranks.
        micro_batches_L: how many those were, without empty ones.
        topk: selections per token, of all layers or of each [L].
        experts: of each layer [L], or of all; default: E.
        expert_parallel: ranks over which the experts of a layer are divided, in order.
    """
    experts_L = _experts(counts_LE, experts)
    there_LE = _there(counts_LE, experts_L)
    with np.errstate(divide="ignore", invalid="ignore"):
        totals_L = counts_LE.sum(axis=1)
        tokens_L = totals_L / topk
        f_LE = counts_LE / totals_L[:, None]
        surprise_LE = -np.log(np.where(f_LE == 0, 1, f_LE))
        products_LE = np.where(there_LE, f_LE * score_sums_LE, 0)
        squares_LE = np.where(there_LE, (f_LE * experts_L[:, None] - 1) ** 2, 0)
        entropy_L = (f_LE * surprise_LE).sum(axis=1)
        values = {
            "lbl_global": experts_L * products_LE.sum(axis=1) / tokens_L,
            "lbl_micro": lbl_sums_L / micro_batches_L,
            "max_vio": f_LE.max(axis=1) * experts_L - 1,
            "entropy": entropy_L / np.log(np.maximum(experts_L, 2)),
            "dead": ((counts_LE == 0) & there_LE).sum(axis=1) + 0 * totals_L / totals_L,
            "cv": np.sqrt(squares_LE.sum(axis=1) / experts_L),
            "effective": np.exp(entropy_L) + 0 * totals_L / totals_L,
        }
        unknown_L = np.full(len(counts_LE), np.nan)
        for index, name in enumerate(OF_TOKENS):
            values[name] = extras_LX[:, index] / tokens_L if extras_LX.shape[1] else unknown_L
        values["moved"] = values["moved"] / topk
        if expert_parallel > 1 and not (experts_L % expert_parallel).any():
            rank_LE = np.arange(counts_LE.shape[1]) * expert_parallel // experts_L[:, None]
            loads = [np.where(rank_LE == rank, counts_LE, 0).sum(axis=1) for rank in range(expert_parallel)]
            values["overload"] = np.max(loads, axis=0) * expert_parallel / totals_L
    return values


def load(counts_LE: np.ndarray, experts: int | np.ndarray | None = None) -> np.ndarray:
    """[L, E] relative to an even load; NaN where nothing was counted, and beyond a layer's own `experts`."""
    experts_L = _experts(counts_LE, experts)
    with np.errstate(divide="ignore", invalid="ignore"):
        loads_LE = counts_LE / (counts_LE.sum(axis=1) / experts_L)[:, None]
    return np.where(_there(counts_LE, experts_L), loads_LE, np.nan)


def _experts(counts_LE: np.ndarray, experts: int | np.ndarray | None) -> np.ndarray:
    return np.broadcast_to(np.asarray(counts_LE.shape[1] if experts is None else experts), (len(counts_LE),))


def _there(counts_LE: np.ndarray, experts_L: np.ndarray) -> np.ndarray:
    return np.arange(counts_LE.shape[1]) < experts_L[:, None]


def end_of_run(steps_N: np.ndarray) -> int:
    """The first interval of the end of a run: the last tenth of its steps, at least one interval.

    Args:
        steps_N: of each interval (`record.Run.steps`).
    """
    steps_N = np.asarray(steps_N, dtype=np.int64)
    before_N = np.cumsum(steps_N) - steps_N
    late = int((END * before_N >= (END - 1) * steps_N.sum()).sum())
    return max(0, len(steps_N) - max(1, late))


def over_layers(name: str, value_L: np.ndarray) -> float:
    """One number for a model: the sum of dead experts, the mean of every other measure; NaN where no layer is known."""
    known = value_L[np.isfinite(value_L)]
    return float(known.sum() if name in SUMMED else known.mean()) if len(known) else np.nan


def summary(values: Mapping[str, np.ndarray], *, detailed: bool) -> dict[str, float]:
    """Few numbers for all layers: "NAME" as `over_layers` and "NAME_worst"; detailed: more names, and "NAME_p50" and "NAME_p90"
    over layers. The record has every layer.

    Args:
        values: [L] by name.
        detailed: whether.
    """
    result: dict[str, float] = {}
    for name, of_layers in values.items():
        there = of_layers[~np.isnan(of_layers)]
        if not len(there) or not (detailed or name in BRIEF):
            continue
        result[name] = over_layers(name, of_layers)
        result[f"{name}_worst"] = float(there.min() if name in WORST_IS_LEAST else there.max())
        if detailed:
            result[f"{name}_p50"], result[f"{name}_p90"] = np.percentile(there, (50, 90)).tolist()
    return result

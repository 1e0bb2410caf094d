"""From sums over a log interval to the measures of balance. NumPy only.

    lbl_global   E * sum_i f_i p_i, f and p over all of the interval's tokens; 1.0 is even (docs/how-it-works.md, alpha = 1)
    lbl_micro    mean of the LBL within each micro-batch of one data-parallel rank, which is Megatron's own `aux_loss`
    max_vio      largest load / mean load - 1                       (Wang et al., arXiv 2408.15664, MaxVio)
    entropy      - sum_i f_i log f_i / log E; 1.0 is even
    dead         experts without a selection
    cv           standard deviation of the load / mean load         (Shazeer et al., arXiv 1701.06538)
    uncertainty  mean over tokens of the normalised entropy of their scores over experts; 1.0: the router does not choose

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# An entropy near 1 is even; all others are better small.
WORST_IS_LEAST = ("entropy", "uncertainty")
BRIEF = ("lbl_global", "lbl_micro", "max_vio", "entropy", "dead")


def measures(
    *,
    counts_LE: np.ndarray,
    score_sums_LE: np.ndarray,
    entropy_sums_L: np.ndarray,
    lbl_sums_L: np.ndarray,
    micro_batches_L: np.ndarray,
    topk: int,
) -> dict[str, np.ndarray]:
    """Every measure per layer; NaN where nothing was counted, or what it needs is NaN.

    Args:
        counts_LE: selections per expert over the interval, all data-parallel ranks.
        score_sums_LE: scores summed over the same tokens.
        entropy_sums_L: normalised entropies of the tokens' scores, summed.
        lbl_sums_L: LBL (alpha = 1) summed over micro-batches and data-parallel ranks.
        micro_batches_L: how many those were, without empty ones.
        topk: selections per token.
    """
    experts = counts_LE.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        totals_L1 = counts_LE.sum(axis=1, keepdims=True)
        tokens_L1 = totals_L1 / topk
        f_LE = counts_LE / totals_L1
        surprise_LE = -np.log(np.where(f_LE == 0, 1, f_LE))
        values = {
            "lbl_global": experts * (f_LE * score_sums_LE / tokens_L1).sum(axis=1),
            "lbl_micro": lbl_sums_L / micro_batches_L,
            "max_vio": f_LE.max(axis=1) * experts - 1,
            "entropy": (f_LE * surprise_LE).sum(axis=1) / np.log(max(experts, 2)),
            "dead": (counts_LE == 0).sum(axis=1) + 0 * totals_L1[:, 0] / totals_L1[:, 0],
            "cv": f_LE.std(axis=1) * experts,
            "uncertainty": entropy_sums_L / tokens_L1[:, 0],
        }
    return values


def load(counts_LE: np.ndarray) -> np.ndarray:
    """[L, E] relative to an even load; NaN where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return counts_LE / counts_LE.mean(axis=1, keepdims=True)


def summary(values: Mapping[str, np.ndarray], numbers: Sequence[int], *, detailed: bool) -> dict[str, float]:
    """Few numbers for all layers: "NAME" the mean, "NAME_worst" and "NAME_worst_layer"; detailed: more names, and "NAME_p50"
    and "NAME_p90" over layers.

    Args:
        values: [L] by name.
        numbers: [L] how Megatron's log numbers the layers.
        detailed: whether.
    """
    result: dict[str, float] = {}
    for name, of_layers in values.items():
        known = np.flatnonzero(~np.isnan(of_layers))
        if not len(known) or not (detailed or name in BRIEF):
            continue
        there = of_layers[known]
        worst = int(np.argmin(there) if name in WORST_IS_LEAST else np.argmax(there))
        result[name] = float(there.mean())
        result[f"{name}_worst"] = float(there[worst])
        result[f"{name}_worst_layer"] = float(numbers[known[worst]])
        if detailed:
            result[f"{name}_p50"], result[f"{name}_p90"] = np.percentile(there, (50, 90)).tolist()
    return result

"""Charts of what the experts of checkpoints specialise in (`specialisation.json`).

Shape suffixes: D domains, L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_global_lbl.report.chart import Chart, Line, Panel
from megatron_global_lbl.specialise.result import Specialisation

SOME_LAYERS = 8  # that have a line of their own
TEXTS = {
    "experts": ("Which experts each domain uses", "A row per layer, the experts in the same order in all panels."),
    "overlap": (
        "What domains share",
        "Of their routing; and of their main experts, the fewest that take half of it.",
    ),
    "scores": ("Sum of a token's selected scores", "1: the router is sure; at the grey line all experts look alike to it."),
    "similarity": ("How alike the experts of a layer are", "Cosine of two experts; mean, and 10 % to 90 %, of all pairs."),
    "norms": ("Output norm against score", "1: a token's mean norm. A line that falls: the router prefers larger outputs."),
}


def summary(result: Specialisation) -> str:
    """What was measured, in one sentence."""
    tokens = ", ".join(f"{domain.name} ({domain.tokens:,} tokens)" for domain in result.domains)
    missing = dict.fromkeys(reason for layer in result.experts for reason in layer.not_measured)
    lacks = "".join(f" Not measured: {reason}." for reason in missing)
    return f"The checkpoint of iteration {result.iteration:,}, evaluated on {tokens}.{lacks}"


def loss_of(result: Specialisation) -> dict[str, float]:
    """The held-out loss of each domain that has one: the first of Megatron's losses, the language model's."""
    return {domain.name: float(next(iter(domain.loss.values()))) for domain in result.domains if domain.loss}


def over_checkpoints(label: str, results: list[Specialisation]) -> list[Chart]:
    """Contrast and held-out losses of one run; none of a single checkpoint."""
    if len(results) < 2:
        return []
    x, losses = [result.iteration for result in results], [loss_of(result) for result in results]
    contrasts = np.array([result.contrast_L.mean() for result in results])
    names = dict.fromkeys(name for of_one in losses for name in of_one)
    lines = [Line(n, x, np.array([one.get(n, np.nan) for one in losses]), i, about="loss") for i, n in enumerate(names)]
    alt = f"Contrast from {contrasts[0]:.3f} at iteration {x[0]} to {contrasts[-1]:.3f} at iteration {x[-1]}."
    contrast = [Line(label, x, contrasts, about="contrast")]
    found = [Chart("contrast", f"Contrast of domains, {label}", "0: all domains use the same experts.", alt, contrast)]
    return [*found, *([Chart("losses", f"Held-out loss, {label}", "A line per domain.", alt, lines)] if lines else [])]


def charts(measured: list[tuple[str, Specialisation]]) -> list[Chart]:
    """Of one checkpoint per run, the shares on one colour scale."""
    high = max((float(result.specialisation_DL.max()) for _, result in measured), default=1.0)
    found = []
    for name, draw in zip(TEXTS, (_experts, _overlap, _scores, _similarity, _norms)):
        for label, result in measured:
            if (drawn := draw(result, high)) is not None:
                title, caption = TEXTS[name]
                found.append(Chart(f"specialisation-{name}", f"{title}, {label}" if label else title, caption, **drawn))
    return found


def _experts(result: Specialisation, high: float) -> dict[str, Any]:
    shares_DLE, even = result.shares_DLE, 1 / result.num_experts
    # An expert's number means nothing: ordered, layer by layer, by the domain that uses it the most, then by how much.
    order_LE = np.stack([np.lexsort((-shares_DE.max(0), shares_DE.argmax(0))) for shares_DE in shares_DLE.swapaxes(0, 1)])
    shares_DLE = np.take_along_axis(shares_DLE, order_LE[None], axis=2)
    columns = range(result.num_experts)
    panels = [Panel(name, shares, result.layers, columns, name, order_LE) for name, shares in zip(result.names, shares_DLE)]
    d, layer = np.unravel_index(result.specialisation_DL.argmax(), result.specialisation_DL.shape)
    top = result.specialisation_DL[d, layer]
    alt = f"Largest share: {top:.2f}, of {result.names[d]} in layer {result.layers[layer]}."
    hover = "layer %{y}, expert %{text}<br>%{customdata:.3f} of the selections"
    ticks = {f"even {even:.3g}": even / high, f"{high:.2f}": 1.0}
    return {"alt": alt, "panels": panels, "x_title": "expert", "high": high, "ticks": ticks, "hover": hover, "columns": 3}


def _overlap(result: Specialisation, high: float) -> dict[str, Any] | None:
    names, itself = result.names, np.eye(len(result.domains), dtype=bool)  # with itself it is 1
    if len(names) < 2:
        return None
    matrices = {"shared routing": result.overlap_DD, "shared main experts": result.main_overlap_DD}
    panels = [Panel(name, np.where(itself, np.nan, matrix), names, names) for name, matrix in matrices.items()]
    shared = panels[0].values
    (a, b), (c, d) = (np.unravel_index(find(shared), shared.shape) for find in (np.nanargmax, np.nanargmin))
    most, least = f"{names[a]} and {names[b]} ({shared[a, b]:.2f})", f"{names[c]} and {names[d]} ({shared[c, d]:.2f})"
    alt = f"Most is shared by {most}, least by {least}."
    hover, ticks = "%{y} and %{x}<br>%{customdata:.2f} shared", {"0: nothing": 0.0, "1: all": 1.0}
    return {"alt": alt, "panels": panels, "x_title": "", "y_title": "", "ticks": ticks, "hover": hover, "columns": 2}


def _scores(result: Specialisation, high: float) -> dict[str, Any]:
    means, names = np.mean(result.score_sums, axis=1), result.names
    low, top = int(means.argmin()), int(means.argmax())
    alt = f"Mean of the layers from {means[low]:.2f} ({names[low]}) to {means[top]:.2f} ({names[top]})."
    lines = [Line(name, result.layers, np.array(sums_L), d) for d, (name, sums_L) in enumerate(zip(names, result.score_sums))]
    undecided = result.topk / result.num_experts
    return {"alt": alt, "lines": lines, "x_title": "layer", "y_range": (0, 1.02), "reference": undecided}


def _similarity(result: Specialisation, high: float) -> dict[str, Any] | None:
    lines, told = [], []
    for k, what in enumerate(("weights", "outputs", "gates")):
        values = [getattr(layer, what) for layer in result.experts]
        if all(value is None for value in values):
            continue
        middle, low, top = (np.array([np.nan if v is None else v[part] for v in values]) for part in ("mean", "p10", "p90"))
        lines.append(Line(what, result.layers, middle, k, low, top))
        told.append(f"{what} from {middle[0]:.2f} in the first to {middle[-1]:.2f} in the last layer")
    alt = f"Mean cosine of {'; of '.join(told)}."
    return {"alt": alt, "lines": lines, "x_title": "layer", "reference": 0.0} if lines else None


def _norms(result: Specialisation, high: float) -> dict[str, Any] | None:
    curves = [(name, e.norm_by_score_rank) for name, e in zip(result.layers, result.experts) if e.norm_by_score_rank]
    if not curves:
        return None
    some = [curves[i] for i in np.unique(np.linspace(0, len(curves) - 1, SOME_LAYERS).round().astype(int))]
    known = [e.norm_score_correlation for e in result.experts if e.norm_score_correlation is not None]
    ranks = range(1, result.num_experts + 1)
    lines = [Line(f"layer {name}", ranks, np.array(norms_E), i) for i, (name, norms_E) in enumerate(some)]
    alt = f"Rank correlation of norm and score from {min(known):.2f} to {max(known):.2f} over the layers."
    return {"alt": alt, "lines": lines, "x_title": "rank of the expert's score (1: highest)", "reference": 1.0}

"""Pictures of what the experts of a checkpoint specialise in (`specialisation.json`).

Shape suffixes: D domains, L layers, E experts.
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from megatron_global_lbl.report.style import COLOURS, DASHES, INK, QUIET, Picture, figure, png
from megatron_global_lbl.specialise.result import Specialisation

WIDTH, HEIGHT = 5.2, 3.2
PANELS = 3  # domains beside each other
MAP = "viridis"
MARKERS = "os^Dv<"


COLUMNS = ("run", "checkpoint", "contrast of domains", "share of the most used expert", "sum of scores")


def summary(result: Specialisation) -> str:
    """What was measured, in one sentence."""
    tokens = ", ".join(f"{domain.name} ({domain.tokens:,} tokens)" for domain in result.domains)
    missing = dict.fromkeys(reason for layer in result.experts for reason in layer.not_measured)
    return f"The checkpoint of iteration {result.iteration:,}, evaluated on {tokens}." + "".join(
        f" Not measured: {reason}." for reason in missing
    )


def row(result: Specialisation, label: str) -> list[str]:
    """The run's line in the table of runs (COLUMNS); means over domains and layers."""
    shares, score_sums = result.specialisation_DL.mean(), np.mean(result.score_sums)
    return [label, f"{result.iteration:,}", f"{result.contrast_L.mean():.3f}", f"{shares:.3f}", f"{score_sums:.3f}"]


def pictures(result: Specialisation) -> list[Picture]:
    """All of them; made within `style.styled()`."""
    found = [experts(result), overlap(result), scores(result), similarity(result), norms(result)]
    return [picture for picture in found if picture is not None]


def experts(result: Specialisation) -> Picture:
    """A panel per domain: layers down, experts across, colour: the share of the domain's selections."""
    shares_DLE = result.shares_DLE
    # An expert's number means nothing: ordered, layer by layer, by the domain that uses it the most, then by how much.
    order_LE = np.stack([np.lexsort((-shares_DE.max(0), shares_DE.argmax(0))) for shares_DE in shares_DLE.swapaxes(0, 1)])
    shares_DLE = np.take_along_axis(shares_DLE, order_LE[None], axis=2)
    domains, layers, _ = shares_DLE.shape
    columns = min(PANELS, domains)
    rows = -(-domains // columns)
    height = min(3.0, max(1.2, 0.5 + 0.16 * layers))
    drawn = Figure(figsize=(10.8, height * rows + 0.5), layout="constrained")
    panels = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, name, shares_LE in zip(panels.flat, result.names, shares_DLE):
        image = axes.imshow(shares_LE, aspect="auto", cmap=MAP, vmin=0, vmax=shares_DLE.max(), interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        _layers(axes.yaxis, result.layers)
        _bare(axes)
    for axes in panels.flat[domains:]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    bar = drawn.colorbar(image, ax=panels, pad=0.01, aspect=30)
    bar.set_label("share of the domain's selections")
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.plot([-0.35], [1 / result.num_experts], marker=">", color=INK, markersize=7, clip_on=False)
    d, layer = np.unravel_index(result.specialisation_DL.argmax(), result.specialisation_DL.shape)
    return Picture(
        "specialisation-experts",
        "Which experts each domain uses",
        f"One row per layer, one column per expert ({result.num_experts}, in the same order in all panels): where panels are "
        "bright in different places, domains have experts of their own (arrow at the scale: an even share).",
        f"Largest share: {result.specialisation_DL[d, layer]:.2f}, of {result.names[d]} in layer {result.layers[layer]}.",
        png(drawn),
        wide=True,
    )


def overlap(result: Specialisation) -> Picture | None:
    """Two matrices over domains: shared routing, and shared main experts."""
    domains = len(result.domains)
    if domains < 2:
        return None
    drawn = Figure(figsize=(10.8, min(5.4, max(3.0, 0.45 * domains + 1.4))), layout="constrained")
    panels = drawn.subplots(1, 2)
    matrices = {"shared routing": result.overlap_DD, "shared main experts": result.main_overlap_DD}
    for axes, (title, matrix) in zip(panels, matrices.items()):
        shown = np.where(np.eye(domains, dtype=bool), np.nan, matrix)  # with itself it is 1
        image = axes.imshow(shown, cmap=MAP, vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(shown):
            if value == value and domains <= 12:
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(domains), result.names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(domains), result.names)
        axes.set_title(title, fontsize=10)
        _bare(axes)
    bar = drawn.colorbar(image, ax=panels, pad=0.01, shrink=0.85)
    bar.set_label("0: nothing, 1: all")
    bar.outline.set_visible(False)  # type: ignore[operator]
    apart = np.where(np.eye(domains, dtype=bool), np.nan, result.overlap_DD)
    (a, b), (c, d) = (np.unravel_index(find(apart), apart.shape) for find in (np.nanargmax, np.nanargmin))
    return Picture(
        "specialisation-overlap",
        "What domains share",
        "Left: the part of their routing that two domains have in common, mean of the layers; right: of their main experts "
        "(the fewest that take half of a domain's tokens) the part that both have. Related domains share experts.",
        f"Most is shared by {result.names[a]} and {result.names[b]} ({apart[a, b]:.2f}), least by {result.names[c]} and "
        f"{result.names[d]} ({apart[c, d]:.2f}).",
        png(drawn),
        wide=True,
    )


def scores(result: Specialisation) -> Picture:
    """The sum of the selected scores over depth, a line per domain."""
    drawn, axes = figure(WIDTH, HEIGHT)
    undecided = result.topk / result.num_experts
    axes.axhline(undecided, color=QUIET, linestyle=":", linewidth=1)
    for d, (name, sums_L) in enumerate(zip(result.names, result.score_sums)):
        axes.plot(sums_L, label=name, **_look(d))
    _depth(axes, result)
    axes.set_ylim(0, 1)
    drawn.legend(loc="outside upper center", ncols=min(4, len(result.domains)))
    means = [sum(sums_L) / len(sums_L) for sums_L in result.score_sums]
    return Picture(
        "specialisation-scores",
        f"Sum of a token's top-{result.topk} scores",
        "How sure the router is: 1 is sure of its choice, at the dotted line all experts look alike to it. Higher is more "
        "specialised.",
        f"Mean of the layers from {min(means):.2f} ({result.names[int(np.argmin(means))]}) to {max(means):.2f} "
        f"({result.names[int(np.argmax(means))]}); undecided would be {undecided:.3f}.",
        png(drawn),
    )


def similarity(result: Specialisation) -> Picture | None:
    """How alike two experts of a layer are, over depth."""
    drawn, axes = figure(WIDTH, HEIGHT)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    told = []
    for k, what in enumerate(("weights", "outputs", "gates")):
        values = [getattr(layer, what) for layer in result.experts]
        if all(value is None for value in values):
            continue
        mean, low, high = (
            np.array([np.nan if value is None else value[part] for value in values]) for part in ("mean", "p10", "p90")
        )
        at_L = np.arange(len(values)) + 0.06 * (k - 1)
        axes.errorbar(at_L, mean, yerr=(mean - low, high - mean), label=what, capsize=2, elinewidth=0.8, **_look(k))
        told.append(f"{what} from {mean[0]:.2f} in the first to {mean[-1]:.2f} in the last layer")
    if not told:
        return None
    _depth(axes, result)
    drawn.legend(loc="outside upper center", ncols=3)
    return Picture(
        "specialisation-similarity",
        "How alike the experts of a layer are",
        "Cosine between two experts, mean of all pairs (bars: 10 % to 90 % of them): near 0 they have nothing in common, near "
        "1 they are the same; outputs are for the same tokens, gates are rows of the router.",
        f"Mean cosine of {'; of '.join(told)}.",
        png(drawn),
    )


def norms(result: Specialisation) -> Picture | None:
    """Output norm against the rank of the score, a line per layer."""
    curves = [(name, e.norm_by_score_rank) for name, e in zip(result.layers, result.experts) if e.norm_by_score_rank]
    if not curves:
        return None
    drawn, axes = figure(WIDTH, HEIGHT)
    axes.axhline(1, color=QUIET, linestyle=":", linewidth=1)
    few = len(curves) <= len(COLOURS)
    for i, (name, norms_E) in enumerate(curves):
        named = few or i in (0, len(curves) // 2, len(curves) - 1)
        # Many layers go from dark to bright with depth; the palest colours are left out.
        look = _look(i) | {"marker": ""} if few else {"color": colormaps[MAP](0.85 * i / (len(curves) - 1)), "linewidth": 1}
        axes.plot(range(1, len(norms_E) + 1), norms_E, label=f"layer {name}" if named else None, **look)
    axes.set_xlabel("rank of the expert's score (1: highest)")
    axes.set_xlim(1, result.num_experts)
    drawn.legend(loc="outside upper center", ncols=min(4, len(curves)))
    correlations = [e.norm_score_correlation for e in result.experts if e.norm_score_correlation is not None]
    return Picture(
        "specialisation-norms",
        "Output norm against score",
        "Each token's experts in the order of their scores, and how large their outputs are (1: the mean for that token): a "
        "line that falls says that the router prefers the experts that say more.",
        f"Rank correlation of norm and score from {min(correlations):.2f} to {max(correlations):.2f} over the layers.",
        png(drawn),
    )


def _look(i: int) -> dict:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 5,
    }


def _depth(axes: Axes, result: Specialisation) -> None:
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, len(result.layers) - 0.5)
    _layers(axes.xaxis, result.layers)


def _layers(axis: Axis, layers: list[str]) -> None:
    step = -(-len(layers) // 12)
    axis.set_ticks(list(range(0, len(layers), step)), layers[::step])


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)

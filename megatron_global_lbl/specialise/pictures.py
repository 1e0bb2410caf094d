"""The pictures of one measurement. Colours for any colour vision: viridis, Okabe and Ito's with markers."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a machine without a display

import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_global_lbl.specialise.result import FREQUENT, Specialisation

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>P"
STYLE: dict = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "figure.dpi": 110}
COLUMNS = 3

# Name of the file, and how to read it.
CAPTIONS = {
    "experts": "Each row is a layer, each column an expert; a bright cell is an expert that gets much of the domain's tokens. "
    "Where panels have their bright cells in different places, domains have experts of their own.",
    "overlap": "How much two domains share. Left: the part of their routing that is the same. Right: of the experts that are "
    "frequent in one of the two, the part that is frequent in both.",
    "scores": "The sum of a token's selected scores: near 1 the router is sure of its choice, at the dotted line undecided.",
    "similarity": "Left: how alike the experts of a layer are (0: unrelated). Right: whether experts with a higher score also "
    "have the larger output; a falling line says that the router prefers those that say more.",
}


def draw(result: Specialisation, directory: Path) -> list[Path]:
    """Draw every picture there is data for; their paths."""
    made = []
    makers = {"experts": experts, "overlap": overlap, "scores": scores, "similarity": similarity}
    with plt.rc_context(STYLE):
        for name, make in makers.items():
            figure = make(result)
            path = directory / f"specialisation-{name}.png"
            figure.savefig(path)
            plt.close(figure)
            made.append(path)
    return made


def experts(result: Specialisation) -> Figure:
    """A panel per domain: layers down, experts across, colour: the share of the domain's selections."""
    shares_DLE = result.shares_DLE
    # An expert's number means nothing: ordered, layer by layer, by the domain that uses it the most, then by how much.
    order_LE = numpy.stack([numpy.lexsort((-shares_DE.max(0), shares_DE.argmax(0))) for shares_DE in shares_DLE.swapaxes(0, 1)])
    shares_DLE = numpy.take_along_axis(shares_DLE, order_LE[None], axis=2)
    domains, layers, _ = shares_DLE.shape
    columns = min(COLUMNS, domains)
    rows = -(-domains // columns)
    height = min(3.6, max(1.3, 0.28 * layers + 0.8))
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns + 1.2, height * rows + 0.7),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes, name, shares_LE in zip(panels.flat, result.names, shares_DLE):
        image = axes.imshow(shares_LE, aspect="auto", cmap="viridis", vmin=0, vmax=shares_DLE.max(), interpolation="nearest")
        axes.set_title(name)
        axes.set_xticks([])
        _layer_ticks(axes.yaxis, result.layers)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in panels.flat[domains:]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, pad=0.01)
    bar.set_label("share of the domain's selections")
    bar.ax.plot([-0.35], [1 / result.num_experts], marker=">", color="black", markersize=8, clip_on=False)
    figure.suptitle(
        f"Which experts each domain uses ({result.num_experts} per layer, ordered by favourite domain; arrow: even share)",
        fontsize=12,
    )
    return figure


def overlap(result: Specialisation) -> Figure:
    """Two matrices over domains: shared routing, and shared frequent experts."""
    domains = len(result.domains)
    size = max(3.2, 0.62 * domains + 1.2)
    figure, panels = plt.subplots(1, 2, figsize=(2 * size + 0.8, size + 0.4), layout="constrained")
    titles = ("shared routing", f"shared frequent experts (from {FREQUENT:g} x even share)")
    for axes, matrix, title in zip(panels, (result.overlap_DD, result.frequent_overlap_DD), titles):
        shown = numpy.where(numpy.eye(domains, dtype=bool), numpy.nan, matrix)  # with itself it is 1
        image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=1)
        for (row, column), value in numpy.ndenumerate(shown):
            if value == value:
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color="black" if value > 0.6 else "white"
                )
        axes.set_xticks(range(domains), result.names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(domains), result.names)
        axes.tick_params(length=0)
        axes.set_title(title)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.colorbar(image, ax=panels, pad=0.01, shrink=0.85).set_label("0: nothing, 1: all")
    return figure


def scores(result: Specialisation) -> Figure:
    """The sum of the selected scores over depth, a line per domain."""
    figure, axes = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
    for d, (name, sums_L) in enumerate(zip(result.names, result.score_sums)):
        axes.plot(
            sums_L, label=name, color=COLOURS[d % len(COLOURS)], marker=MARKERS[d % len(MARKERS)], markersize=6, linewidth=1.6
        )
    axes.axhline(result.topk / result.num_experts, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        "undecided router",
        (0.995, result.topk / result.num_experts),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=9,
    )
    axes.set_ylim(0, 1)
    _layers_below(axes, result)
    axes.set_ylabel(f"sum of the top-{result.topk} scores")
    axes.set_title("How sure the router is")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def similarity(result: Specialisation) -> Figure:
    """How alike experts are over depth, and output norm against score."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    layers = numpy.arange(len(result.layers))
    for k, what in enumerate(("weights", "outputs", "gates")):
        values = [getattr(layer, what) for layer in result.experts]
        if all(value is None for value in values):
            continue
        mean, low, high = (
            numpy.array([numpy.nan if value is None else value[part] for value in values]) for part in ("mean", "p10", "p90")
        )
        left.errorbar(
            layers + 0.06 * (k - 1),
            mean,
            yerr=(mean - low, high - mean),
            label=what,
            color=COLOURS[k],
            marker=MARKERS[k],
            capsize=3,
            linewidth=1.6,
        )
    left.axhline(0, color="black", linewidth=0.8)
    _layers_below(left, result)
    left.set_ylabel("cosine between two experts")
    left.set_title("Similarity of experts (bars: 10 % to 90 % of pairs)", fontsize=11)
    left.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    curves = [
        (name, layer.norm_by_score_rank) for name, layer in zip(result.layers, result.experts) if layer.norm_by_score_rank
    ]
    for i, (name, norms_E) in enumerate(curves):
        # Over depth from dark to bright; the brightest yellow is left out.
        colour = plt.get_cmap("viridis")(0.85 * i / max(1, len(curves) - 1))
        labelled = len(curves) <= 6 or i in (0, len(curves) // 2, len(curves) - 1)
        right.plot(
            range(1, len(norms_E) + 1), norms_E, color=colour, linewidth=1.6, label=f"layer {name}" if labelled else None
        )
    right.axhline(1, color="black", linestyle=":", linewidth=1)
    right.set_xlabel("rank of the expert's score (1: highest)")
    right.set_ylabel("output norm / mean norm")
    right.set_title("Output norm against score", fontsize=11)
    if curves:
        right.legend(frameon=False)
    return figure


def _layers_below(axes: Axes, result: Specialisation) -> None:
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, len(result.layers) - 0.5)
    _layer_ticks(axes.xaxis, result.layers)
    axes.grid(alpha=0.25)


def _layer_ticks(axis: matplotlib.axis.Axis, layers: list[str]) -> None:
    step = max(1, len(layers) // 10)
    axis.set_ticks(list(range(0, len(layers), step)), layers[::step])

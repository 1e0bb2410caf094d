"""The demo's picture: which expert each domain uses in each run."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # a machine without a display

import matplotlib.pyplot as plt
import numpy
from matplotlib.layout_engine import ConstrainedLayoutEngine

from demo.results import Result

plt.rcParams.update(
    {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "figure.dpi": 110}
)


def expert_heatmaps(results: list[Result], path: Path) -> None:
    """One panel per run: domains down, the experts of each layer across, colour: part of the domain's routed tokens."""
    domains = results[0].experts.names
    num_domains, num_layers, num_experts = results[0].experts.shares_DLE.shape
    top = max(result.experts.shares_DLE.max() for result in results)
    figure, panels = plt.subplots(
        1,
        len(results),
        figsize=(4.6 * len(results), 3.9),
        sharey=True,
        squeeze=False,
        layout=ConstrainedLayoutEngine(wspace=0.05),
    )
    for axes, result in zip(panels[0], results):
        shares_DLE = result.experts.shares_DLE
        gap_D1 = numpy.full((num_domains, 1), numpy.nan)  # an empty column between layers
        columns = [gap_D1]
        for layer in range(num_layers):
            columns += [shares_DLE[:, layer, _by_favourite(shares_DLE[:, layer])], gap_D1]
        image = axes.imshow(numpy.concatenate(columns[1:-1], axis=1), aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_xticks(
            [layer * (num_experts + 1) + (num_experts - 1) / 2 for layer in range(num_layers)],
            [f"layer {layer}" for layer in results[0].experts.layers],
        )
        axes.set_yticks(range(len(domains)), domains)
        axes.tick_params(length=0)
        axes.set_title(f"{result.scope}   (specialisation {mean(result.specialisation.values()):.3f})")
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(image, ax=panels[0], pad=0.01)
    bar.set_label("share of the domain's routed tokens")
    bar.ax.plot([-0.35], [1 / num_experts], marker=">", color="black", markersize=8, clip_on=False)
    figure.suptitle(
        f"Which expert each domain uses ({num_experts} per layer, ordered by favourite domain; arrow at the scale: even share)",
        fontsize=12,
    )
    figure.savefig(path)
    plt.close(figure)


def _by_favourite(shares_DE: numpy.ndarray) -> numpy.ndarray:
    """Order of the experts: by the domain that uses each the most, then by how much. Their own numbers mean nothing."""
    return numpy.lexsort((-shares_DE.max(axis=0), shares_DE.argmax(axis=0)))

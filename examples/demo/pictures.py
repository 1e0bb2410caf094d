"""The demo's two pictures: the loss curves, and which expert each domain uses in each run."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a machine without a display

import matplotlib.pyplot as plt
import numpy
from matplotlib.layout_engine import ConstrainedLayoutEngine

from demo.results import Result

# Okabe and Ito's palette: told apart with any colour vision, and in grey by their line styles.
COLOURS = {"micro": "#D55E00", "global": "#0072B2", "window": "#009E73"}
STYLES = {"micro": "-", "global": "-", "window": (0, (5, 1.5))}
MARKERS = {"micro": "o", "global": "s", "window": "^"}
SMOOTHING_STEPS = 10

plt.rcParams.update(
    {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "figure.dpi": 110}
)


def loss_curves(results: list[Result], path: Path) -> None:
    """Loss minus the first run's: of one seed, so it shows that nothing goes wrong, and no more."""
    figure, axes = plt.subplots(figsize=(8.6, 4.2), layout="constrained")
    reference_train, reference_valid = _smooth(results[0]), _validation(results[0])
    for result in results:
        look: dict[str, Any] = {"color": COLOURS[result.scope], "linestyle": STYLES[result.scope], "linewidth": 1.8}
        points: dict[str, Any] = {
            "color": COLOURS[result.scope],
            "marker": MARKERS[result.scope],
            "markersize": 7,
            "linestyle": "none",
        }
        points |= {"markeredgecolor": "white", "markeredgewidth": 0.8}
        train, valid = _smooth(result), _validation(result)
        axes.plot(list(train), [loss - reference_train[i] for i, loss in train.items()], label=result.scope, **look)
        axes.plot(list(valid), [loss - reference_valid[i] for i, loss in valid.items()], **points)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("difference in loss (nats per byte)")
    axes.set_title(
        f"Loss minus that of {results[0].scope}: training (lines, mean of {SMOOTHING_STEPS} steps), validation (points)\n"
        "one seed: differences of this size prove nothing",
        fontsize=11,
    )
    axes.legend(frameon=False, title="--moe-lbl-scope")
    axes.grid(alpha=0.25)
    span = max(abs(loss - reference_valid[i]) for result in results for i, loss in _validation(result).items())
    axes.set_ylim(-max(2.5 * span, 0.01), max(2.5 * span, 0.01))
    figure.savefig(path)
    plt.close(figure)


def expert_heatmaps(results: list[Result], path: Path) -> None:
    """One panel per run: domains down, the experts of each layer across, colour: part of the domain's routed tokens."""
    domains = results[0].domains
    num_layers, num_experts = numpy.shape(results[0].frequencies[domains[0]])
    top = max(share for result in results for layers in result.frequencies.values() for layer in layers for share in layer)
    figure, panels = plt.subplots(
        1,
        len(results),
        figsize=(4.6 * len(results), 3.9),
        sharey=True,
        squeeze=False,
        layout=ConstrainedLayoutEngine(wspace=0.05),
    )
    for axes, result in zip(panels[0], results):
        shares_DLE = numpy.array([result.frequencies[domain] for domain in domains])
        gap_D1 = numpy.full((len(domains), 1), numpy.nan)  # an empty column between layers
        columns = [gap_D1]
        for layer in range(num_layers):
            columns += [shares_DLE[:, layer, _by_favourite(shares_DLE[:, layer])], gap_D1]
        image = axes.imshow(numpy.concatenate(columns[1:-1], axis=1), aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_xticks(
            [layer * (num_experts + 1) + (num_experts - 1) / 2 for layer in range(num_layers)],
            [f"layer {layer + 1}" for layer in range(num_layers)],
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


def _smooth(result: Result) -> dict[int, float]:
    """Mean of the last steps; the first ones, where the loss falls steeply, are left out."""
    losses = [loss for _, loss in result.train_loss]
    window = max(1, min(SMOOTHING_STEPS, len(losses) // 3))
    return {
        iteration: mean(losses[index - window + 1 : index + 1])
        for index, (iteration, _) in enumerate(result.train_loss)
        if index >= window - 1
    }


def _validation(result: Result) -> dict[int, float]:
    return {iteration: mean(by_domain.values()) for iteration, by_domain in sorted(result.valid_loss.items())}


def _by_favourite(shares_DE: numpy.ndarray) -> numpy.ndarray:
    """Order of the experts: by the domain that uses each the most, then by how much. Their own numbers mean nothing."""
    return numpy.lexsort((-shares_DE.max(axis=0), shares_DE.argmax(axis=0)))

"""The demo's two pictures: the loss curves, and which expert each domain uses in each run."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # a machine without a display

import matplotlib.pyplot as plt
import numpy

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
    """Left: training and validation loss. Right: the same minus the first run's, to make small differences visible."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.3), layout="constrained")
    reference_train = _smooth(results[0])
    reference_valid = _validation(results[0])
    for result in results:
        look = {"color": COLOURS[result.scope], "linestyle": STYLES[result.scope], "linewidth": 1.8}
        points = {"color": COLOURS[result.scope], "marker": MARKERS[result.scope], "markersize": 7, "linestyle": "none"}
        points |= {"markeredgecolor": "white", "markeredgewidth": 0.8}
        train, valid = _smooth(result), _validation(result)
        left.plot(list(train), list(train.values()), label=result.scope, **look)
        left.plot(list(valid), list(valid.values()), **points)
        right.plot(list(train), [loss - reference_train[i] for i, loss in train.items()], label=result.scope, **look)
        right.plot(list(valid), [loss - reference_valid[i] for i, loss in valid.items()], **points)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    left.set_ylabel("loss (nats per byte)")
    left.set_title(f"Loss: training (lines, mean of {SMOOTHING_STEPS} steps), validation (points)")
    left.legend(frameon=False, title="--moe-lbl-scope")
    right.set_title(f"Difference from {results[0].scope} (below 0 is better)")
    right.set_ylabel("difference in loss")
    span = max(abs(loss - reference_valid[i]) for result in results for i, loss in _validation(result).items())
    right.set_ylim(-max(2.5 * span, 0.01), max(2.5 * span, 0.01))
    figure.savefig(path)
    plt.close(figure)


def expert_heatmaps(results: list[Result], path: Path) -> None:
    """One panel per run: domains down, the experts of each layer across, colour: part of the domain's routed tokens."""
    domains = results[0].domains
    num_layers, num_experts = numpy.shape(results[0].frequencies[domains[0]])
    top = max(share for result in results for layers in result.frequencies.values() for layer in layers for share in layer)
    figure, panels = plt.subplots(
        1, len(results), figsize=(4.6 * len(results), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, result in zip(panels[0], results):
        shares_DLE = numpy.array([result.frequencies[domain] for domain in domains])
        columns = [shares_DLE[:, layer, _by_favourite(shares_DLE[:, layer])] for layer in range(num_layers)]
        image = axes.imshow(numpy.concatenate(columns, axis=1), aspect="auto", cmap="viridis", vmin=0, vmax=top)
        for layer in range(1, num_layers):
            axes.axvline(layer * num_experts - 0.5, color="white", linewidth=2.5)
        axes.set_xticks(
            [layer * num_experts + (num_experts - 1) / 2 for layer in range(num_layers)],
            [f"layer {layer + 1}" for layer in range(num_layers)],
        )
        axes.set_yticks(range(len(domains)), domains)
        axes.tick_params(length=0)
        axes.set_title(f"{result.scope}   (specialisation {mean(result.specialisation.values()):.3f})")
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(image, ax=panels[0], pad=0.01)
    bar.set_label("share of the domain's routed tokens")
    bar.ax.axhline(1 / num_experts, color="white", linewidth=1.5)
    figure.suptitle(
        f"Which expert each domain uses ({num_experts} per layer, ordered by favourite domain; white line: even share)",
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

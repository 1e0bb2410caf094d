"""The pictures of docs/reproduction.md, from the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from reproduce import tables
from reproduce.experiments import ALPHAS, GLOBAL, MICRO, changed
from reproduce.results import Results, by_seed, common, loss, read
from reproduce.settings import Setting

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reproduction.md"
TABLES = "TABLES.md"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: told apart by everybody


def make(folder: Path, images: Path, document: Path = DOCUMENT) -> None:
    """Every picture and every table that the results allow; all tables go beside the results.

    Raises:
        SystemExit: no results.
    """
    results = read(folder)
    if not list(results):
        raise SystemExit(f"no results under {folder}: `run.py EXPERIMENT` and `run.py gather` make them")
    images.mkdir(parents=True, exist_ok=True)
    for name, draw in (("bsz", balance_bsz), ("specialisation", specialisation)):
        figure = draw(results)
        if figure is not None:
            figure.savefig(images / f"reproduce-{name}.png", dpi=90, bbox_inches="tight")
            plt.close(figure)
            print(images / f"reproduce-{name}.png")
    tables.write(results, folder / TABLES)
    print(folder / TABLES)
    if document.exists():
        tables.fill(results, document)
        print(document)


def summary(folder: Path, of: dict[str, Callable[[], list[Setting]]]) -> None:
    """Prints a plain table per experiment: every setting against the first."""
    results = read(folder)
    for name, experiment in of.items():
        settings = experiment()
        named = [(setting.name, setting) for setting in settings]
        print(f"{name}: {experiment.__doc__}\n\n{tables.rows(results, named)}")


def balance_bsz(results: Results) -> Any:
    """Loss and specialisation against the number of sequences that f counts over."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    sizes = (1, 2, 4, 8, 16, 32)
    for alpha, colour in zip(ALPHAS, COLOURS):
        curve = [changed(MICRO, over=f"sequences:{n}", alpha=alpha) for n in sizes[:-1]] + [changed(GLOBAL, alpha=alpha)]
        there = [(n, setting) for n, setting in zip(sizes, curve) if results[setting]]
        pairs = common(results, [setting for _, setting in there])
        if len(there) < 2 or not pairs:
            continue
        base = results[there[0][1]]
        gains = [(n, by_seed({pair: loss(results[s][pair]) - loss(base[pair]) for pair in pairs})) for n, s in there]
        left.plot([n for n, _ in gains], [mean(v) for _, v in gains], "-", color=colour, label=f"alpha {alpha}")
        for n, values in gains:
            left.plot([n] * len(values), values, ".", color=colour)
        contrast = [by_seed({pair: results[setting][pair]["contrast"] for pair in pairs}) for _, setting in there]
        right.plot([n for n, _ in there], [mean(values) for values in contrast], "-", color=colour, label=f"alpha {alpha}")
        for (n, _), values in zip(there, contrast):
            right.plot([n] * len(values), values, ".", color=colour)
    for axes, label in ((left, "validation loss less that of 1 sequence\n(nats per byte)"), (right, "contrast of domains")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel("Balance BSZ: sequences that f counts over")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    left.axhline(0, color="black", linewidth=0.8)
    figure.tight_layout()
    return figure


def specialisation(results: Results) -> Any:
    """Where each domain's tokens go, with micro and global: layers one above the other, experts in order of use."""
    both = []
    for name, setting in (("micro", MICRO), ("global", GLOBAL)):
        both += [(name, run) for run in results[setting].values() if "frequencies" in run][:1]
    if len(both) < 2:
        return None
    layers = len(both[0][1]["frequencies"][0])
    most = max(x for _, run in both for domain in run["frequencies"] for layer in domain for x in layer)
    figure, grid = plt.subplots(layers, 2, figsize=(11, 3.1 * layers), sharey=True, layout="constrained")
    for column, (name, run) in enumerate(both):
        for layer in range(layers):
            shares = [domain[layer] for domain in run["frequencies"]]
            # Experts in the order of the domain that uses them most: a specialised layer is a staircase.
            order = sorted(range(len(shares[0])), key=lambda e: (max(range(len(shares)), key=lambda d: shares[d][e]), e))
            axes = grid[layer][column]
            picture = axes.imshow([[row[e] for e in order] for row in shares], vmin=0, vmax=most, cmap="viridis", aspect="auto")
            axes.set_title(f"{name}, layer {layer}", fontsize=10)
            axes.set_yticks(range(len(run["domains"])), run["domains"], fontsize=7)
            axes.set_xticks([])
            axes.set_xlabel("experts" if layer == layers - 1 else "")
    figure.colorbar(picture, ax=grid, label="share of the domain's selections", shrink=0.6)
    return figure

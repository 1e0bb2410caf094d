"""What the scripts of this folder share: truth, upstream and plugin side by side, on the installed Megatron-Core.

"truth" is the float64 formula of tests/distributed/truth.py; "upstream" is Megatron's own `global_aux_loss`, "plugin" is
`--moe-lbl-scope global` in the same model. The gradients are `main_grad` after Megatron's own schedule, DDP and
`finalize_model_grads` on gloo (tests/distributed/harness.py).

Exit status of every script: 0 when the defect was shown and the plugin is right, 1 if either is not so (a release that mends
a defect is to be noticed), 2 when the release has no `global_aux_loss`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DISTRIBUTED = HERE.parents[1] / "tests" / "distributed"
for folder in (str(HERE), str(DISTRIBUTED)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import harness  # noqa: E402
import torch  # noqa: E402
import truth  # noqa: E402
from layout import Layout  # noqa: E402
from truth import Problem  # noqa: E402
from workers import Pool  # noqa: E402

from megatron_global_lbl.command.defects import DEFECTS, Defect  # noqa: E402

UPSTREAM = {"load_balancing_type": "global_aux_loss"}
PLUGIN = {"scope": "global"}
# The contract: relative error of the gradient in fp32 models.
RELATIVE_ERROR = 1e-5
# Upstream counts as off from here on: far above rounding, far below any of the defects.
OFF = 1e-3

SHOWN, NOT_SHOWN, NO_GLOBAL_AUX_LOSS = 0, 1, 2


@dataclass
class Finding:
    """What one script saw.

    Attributes:
        defect: which one.
        upstream_off: the defect was seen; None when this release has no `global_aux_loss`.
        plugin_right: the plugin gave the truth in every case of the table.
        summary: one line for the table of all.
        header: of the table, one title per column.
        rows: of the table.
        notes: what cannot be seen in the table.
    """

    defect: Defect
    upstream_off: bool | None
    plugin_right: bool | None
    summary: str
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The script's exit status."""
        if self.upstream_off is None:
            return NO_GLOBAL_AUX_LOSS
        return SHOWN if self.upstream_off and self.plugin_right else NOT_SHOWN

    def __str__(self) -> str:
        verdict = {
            SHOWN: "shown: upstream is off, the plugin is right",
            NO_GLOBAL_AUX_LOSS: "not in this release: it has no global_aux_loss",
        }.get(self.status)
        if verdict is None:
            off = "upstream is off" if self.upstream_off else "upstream is NOT off here (mended, or not in this release)"
            verdict = f"{off}; the plugin is {'right' if self.plugin_right else 'WRONG'}"
        lines = [f"{self.defect.id}  {self.defect.text}", "", *table(self.header, self.rows), ""]
        lines += [*(f"note: {note}" for note in self.notes), f"{self.defect.id}: {verdict}"]
        return "\n".join(lines)


def defect(id: str) -> Defect:
    """The defect of that id."""
    return next(entry for entry in DEFECTS if entry.id == id)


@dataclass
class Comparison:
    """Two gradients against the truth, all parameters together.

    Attributes:
        upstream: norm over the truth's norm.
        upstream_direction: relative error once the norm is mended, 0 for a merely scaled gradient.
        plugin, plugin_direction: the same of the plugin's.
        plugin_error: relative error.
    """

    upstream: float
    upstream_direction: float
    plugin: float
    plugin_direction: float
    plugin_error: float

    HEADER = ("truth", "upstream", "its direction off by", "plugin", "its relative error")

    @property
    def upstream_is_off(self) -> bool:
        return abs(self.upstream - 1) > OFF or self.upstream_direction > OFF

    @property
    def plugin_is_right(self) -> bool:
        return self.plugin_error <= RELATIVE_ERROR

    def cells(self) -> tuple[str, ...]:
        """Cells for `HEADER`; gradients as multiples of the truth's norm."""
        return (
            "1.00",
            f"{self.upstream:.2f}",
            f"{self.upstream_direction:.1%}",
            f"{self.plugin:.2f}",
            f"{self.plugin_error:.0e}",
        )


def compare(pool: Pool, problem: Problem, layout: Layout | None = None) -> Comparison:
    """Run a problem with upstream's loss and with the plugin; `main_grad` of rank 0 against the truth."""
    layout = layout or Layout()
    true = torch.cat([g.flatten() for step in truth.gradients(problem) for pair in step for g in pair])
    upstream = main_grad(pool, problem, layout, None, UPSTREAM)
    plugin = main_grad(pool, problem, layout, PLUGIN, {})
    return Comparison(
        upstream=float(upstream.norm() / true.norm()),
        upstream_direction=float((upstream / upstream.norm() - true / true.norm()).norm()),
        plugin=float(plugin.norm() / true.norm()),
        plugin_direction=float((plugin / plugin.norm() - true / true.norm()).norm()),
        plugin_error=float((plugin - true).norm() / true.norm()),
    )


def worst_error(comparisons: Iterable[Comparison]) -> str:
    """For a summary: how far the plugin's gradient is from the truth at most."""
    return f"plugin's gradient off by {max(comparison.plugin_error for comparison in comparisons):.0e}"


def main_grad(pool: Pool, problem: Problem, layout: Layout, register: dict[str, Any] | None, extra: dict) -> torch.Tensor:
    """All gradients of rank 0, in the order of `truth.gradients`, as one float64 vector."""
    ranks = pool.run(harness.run, layout.world_size(problem), problem, layout, register, extra)
    steps = ranks[0]["grads"]
    return torch.cat([g.double().flatten() for step in steps for number in sorted(step) for g in step[number]])


def true_values(problem: Problem) -> tuple[float, float]:
    """In float64, mean over layers: (LBL of the whole global batch, mean over micro-batches of the LBL with the counts so far),
    for even tokens and no padding."""
    whole, prefix = [], []
    for C_mi, S_mi, N_m in truth.sums(problem, 0):
        p_mi = S_mi / N_m.unsqueeze(-1)
        f_i, f_mi = C_mi.sum(0) / C_mi.sum(), C_mi.cumsum(0) / C_mi.cumsum(0).sum(-1, keepdim=True)
        whole.append(problem.experts * float((f_i * p_mi.mean(0)).sum()))
        prefix.append(problem.experts * float((f_mi * p_mi).sum(-1).mean()))
    return sum(whole) / len(whole), sum(prefix) / len(prefix)


def takes_padding_mask() -> bool:
    """Whether the routers of this release know of padding (since 0.16): read from the source, nothing is imported."""
    return "padding_mask" in _source("megatron.core.transformer.moe.router")


def has_global_aux_loss() -> bool:
    """Whether there is something to look at (since 0.15)."""
    return "_apply_global_aux_loss" in _source("megatron.core.transformer.moe.router")


def _source(module: str) -> str:
    # find_spec of the module itself would import its parents, and Megatron belongs into the worker processes.
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"no module {package}: install megatron-core"
    for folder in spec.submodule_search_locations:
        path = Path(folder, *rest).with_suffix(".py")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise SystemExit(f"no {module} in {list(spec.submodule_search_locations)}; allowed: Megatron-Core 0.14 to 0.19")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a plain text table, in columns."""
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of the same table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (header, tuple("---" for _ in header), *rows)] if rows else []


def start_pool() -> Pool:
    """Four processes with gloo and real Megatron; they import this folder's and the tests' modules."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(DISTRIBUTED), os.environ.get("PYTHONPATH", "")])
    return Pool(4)


def find(defect_id: str, show: Callable[[Pool], Finding], pool: Pool) -> Finding:
    """`show(pool)`, or that there is nothing to show."""
    if not has_global_aux_loss():
        return Finding(defect(defect_id), None, None, "this release has no global_aux_loss")
    return show(pool)


def main(defect_id: str, show: Callable[[Pool], Finding]) -> int:
    """Run one script by itself; its exit status."""
    pool = start_pool()
    try:
        finding = find(defect_id, show, pool)
    finally:
        pool.close()
    print(finding)
    return finding.status

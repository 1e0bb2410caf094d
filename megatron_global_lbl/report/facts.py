"""What the page says in numbers and words: what the run was, where it stands, and the table of several runs."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from megatron_global_lbl.metrics.alarms import Alarm
from megatron_global_lbl.metrics.reader import Run
from megatron_global_lbl.report.series import late

COLUMNS = (
    "run",
    "scope",
    "Balance BSZ",
    "LBL global",
    "LBL micro",
    "MaxVio",
    "worst layer",
    "entropy",
    "dead experts",
    "alarms",
)
COMPARED = {
    "lbl_global": ("LBL over the global batch", "The mean of the layers: 1.0 is even, the lowest line is the most even load."),
    "lbl_micro": (
        "LBL within micro-batches",
        "The mean of the layers: a higher line is a run whose micro-batches use experts unevenly, as specialised ones are.",
    ),
    "max_vio": (
        "MaxVio",
        "The mean of the layers: the lowest line is the run whose fullest experts are closest to their share.",
    ),
    "entropy": ("Entropy of the load", "The mean of the layers: 1 is an even load, the highest line is the most even run."),
}


class Fact(NamedTuple):
    """A number with its name and a remark."""

    name: str
    value: str
    remark: str


def summary(run: Run) -> str:
    """The run in one sentence."""
    header = run.header
    topk = f", top-{header['topk']}" if "topk" in header else ""
    intervals = f"{len(run.iterations):,} {'interval' if len(run.iterations) == 1 else 'intervals'}"
    return (
        f"{len(run.layers)} MoE {'layer' if len(run.layers) == 1 else 'layers'} of {header['num_experts']} experts{topk}; "
        f"{intervals} up to iteration {run.iterations[-1]:,}."
    )


def figures(run: Run) -> list[Fact]:
    """Where the run stands: means over the last tenth of the record."""
    vio_L = late(run.metrics["max_vio"])
    entropy_L = late(run.metrics["entropy"])
    layers = run.layers
    return [
        Fact("scope", str(run.header.get("scope", "not known")), _coefficient(run)),
        Fact("Balance BSZ", _amount(run.sequences[-1]), "sequences" + _tokens(run)),
        Fact("LBL, global batch", _number(_mean(late(run.metrics["lbl_global"]))), "1.0 is even"),
        Fact("LBL, micro-batches", _number(_mean(late(run.metrics["lbl_micro"]))), "mean of the layers"),
        Fact("MaxVio", _number(_mean(vio_L)), _worst(vio_L, layers, highest=True)),
        Fact("entropy of the load", _number(_mean(entropy_L), 4), _worst(entropy_L, layers, highest=False, digits=4)),
        Fact("dead experts", _dead(run), "in the last interval"),
    ]


def row(run: Run, label: str, found: list[Alarm]) -> list[str]:
    """The run's line in the table of runs (COLUMNS)."""
    vio_L = late(run.metrics["max_vio"])
    return [
        label,
        str(run.header.get("scope", "-")),
        _amount(run.sequences[-1]),
        _number(_mean(late(run.metrics["lbl_global"]))),
        _number(_mean(late(run.metrics["lbl_micro"]))),
        _number(_mean(vio_L)),
        _worst(vio_L, run.layers, highest=True, short=True),
        _number(_mean(late(run.metrics["entropy"])), 4),
        _dead(run),
        str(len(found)) if found else "none",
    ]


def settings(run: Run) -> list[tuple[str, str]]:
    """What the run was, as the training wrote it."""
    header = run.header
    rows = [("record", str(run.directory))]
    if "started" in header:
        rows.append(("started", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(header["started"]))))
    flags = header.get("settings") or {}
    rows += [(f"--moe-lbl-{name.replace('_', '-')}", str(value)) for name, value in flags.items() if value is not None]
    names = {"alpha": "coefficient", "data_parallel": "data-parallel ranks", "micro_batches": "micro-batches per step"}
    names |= {"log_interval": "iterations per interval"}
    rows += [(name, _plain(header[key])) for key, name in names.items() if header.get(key) is not None]
    rows += [(f"version of {name}", str(version)) for name, version in (header.get("versions") or {}).items()]
    return rows


def made() -> str:
    """When the page was made."""
    return f"Made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"


def _plain(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    texts = list(dict.fromkeys(f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in values))
    return ", ".join(texts)


def _coefficient(run: Run) -> str:
    alpha = run.header.get("alpha")
    return "" if alpha is None else f"coefficient {_plain(alpha)}"


def _tokens(run: Run) -> str:
    return f", {run.tokens[-1]:,.0f} tokens" if np.isfinite(run.tokens[-1]) else ""


def _worst(value_L: np.ndarray, layers: list[str], *, highest: bool, digits: int = 3, short: bool = False) -> str:
    if not np.isfinite(value_L).any():
        return "-" if short else "not in the record"
    layer = int(np.nanargmax(value_L) if highest else np.nanargmin(value_L))
    value = _number(value_L[layer], digits)
    return f"{value} (layer {layers[layer]})" if short else f"worst {value}, layer {layers[layer]}"


def _mean(value_L: np.ndarray) -> float:
    return float(np.nanmean(value_L)) if np.isfinite(value_L).any() else np.nan


def _dead(run: Run) -> str:
    """Experts of all layers, in the last interval."""
    dead_L = run.metrics["dead"][-1]
    return _amount(np.nansum(dead_L) if np.isfinite(dead_L).any() else np.nan)


def _amount(value: float) -> str:
    """Of things that are counted; a mean over an interval may be a fraction."""
    if not np.isfinite(value):
        return "not known"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _number(value: float, digits: int = 3) -> str:
    if not np.isfinite(value):
        return "not known"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits if abs(value) < 10 else 1}f}"

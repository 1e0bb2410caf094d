"""The report of `gpu.py`: Markdown from the JSON, whatever of it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from report import table

QUESTIONS = {
    "versions": "What is here",
    "tests": "tests/gpu",
    "gloo": "Four processes on one GPU against the float64 truth",
    "nccl": "Forced NCCL all-reduces: no host synchronisation, CUDA graphs, constant memory",
    "kernels": "Kernels and GPU time, per layer and micro-batch",
    "sweep": "The Triton kernels against the memory's bandwidth",
    "steps": "Step time against `aux_loss`, with delayed all-reduces",
}


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    title = "# On a GPU" if not results["cpu"] else "# Tried out on a CPU: no figure means anything"
    parts = [title, f"{results['date']}. `{results['command']}`", table_of_stages(results)]
    for name, stage in results["stages"].items():
        parts += [f"## {QUESTIONS[name]}", *_problems(stage), *TABLES[name](stage["data"]), *_checks(stage)]
    return "\n\n".join(part for part in parts if part)


def table_of_stages(results: dict[str, Any]) -> str:
    """One row per stage, and what failed below it."""
    rows, failed = [], []
    for name, stage in results["stages"].items():
        by_result = {
            result: [check for check in stage["checks"] if check["passed"] is result] for result in (True, False, None)
        }
        rows.append(
            [name, *(len(by_result[result]) for result in (True, False, None)), stage["ended"], f"{stage['seconds']:g}"]
        )
        failed += [f"- {name}: {check['name']}: {_last(check['detail'])}" for check in by_result[False]]
    head = ["stage", "passed", "failed", "skipped", "ended", "seconds"]
    return table(head, rows) + ("\n\nFailed:\n\n" + "\n".join(failed) if failed else "")


def _last(detail: str) -> str:
    return (detail.strip().splitlines() or [""])[-1].strip()[:300]


def _problems(stage: dict[str, Any]) -> list[str]:
    lines = stage["log"]
    return (
        []
        if stage["ended"] == "well"
        else [f"Ended: {stage['ended']}.", *(["```\n" + "\n".join(lines) + "\n```"] if lines else [])]
    )


def _checks(stage: dict[str, Any]) -> list[str]:
    """Every check with its figures; tracebacks of failures below."""
    if not stage["checks"]:
        return []
    words = {True: "passed", False: "FAILED", None: "skipped"}
    rows, details = [], []
    for check in stage["checks"]:
        figures = [f"{key}: {value}" for key, value in check.items() if key not in ("name", "passed", "detail", "seconds")]
        figures += [_last(check["detail"])] * (check["passed"] is None)
        rows.append(
            [check["name"].replace("|", "/"), words[check["passed"]], "; ".join(figures), f"{check.get('seconds', 0):g}"]
        )
        if check["passed"] is False:
            details.append(f"{check['name']}:\n\n```\n{check['detail']}\n```")
    return [table(["check", "result", "", "seconds"], rows), *details]


def _versions(data: dict[str, Any]) -> list[str]:
    return [", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items()) + "."]


def _tests(data: dict[str, Any]) -> list[str]:
    return []


def _gloo(data: dict[str, Any]) -> list[str]:
    staged = "; ".join(data.get("staged through the host", []))
    return [
        "NCCL refuses two ranks on one GPU, so they talk through gloo with CUDA tensors. Every rank's `main_grad`, every step, "
        f"to 1e-5 (bf16: direction 1e-2, norm 1e-3). What gloo does not take of CUDA tensors: {staged}."
    ]


def _nccl(data: dict[str, Any]) -> list[str]:
    return [
        'At world size 1 the collectives are left out, and here they are not. `torch.cuda.set_sync_debug_mode("error")` over '
        "forward, backward and the step's end; gradients of replayed graphs against the float64 truth, to 1e-5."
    ]


def _kernels(data: dict[str, Any]) -> list[str]:
    """First what the loss adds to a router without one, then everything."""
    fields = ["kernels_forward", "kernels_backward", "kernel_time", "replay", "forward", "backward"]
    heads = [
        "kernels forward",
        "kernels backward",
        "sum of kernel times, us",
        "graph replay, us",
        "forward, us",
        "backward, us",
    ]
    parts = [
        f"bf16 model, router dtype {data.get('router_dtype')}, a chunk of {data.get('layers')} layers; figures per layer. What "
        "each loss adds to routers without one (their row: everything); a registration's first step is in no figure. Kernels "
        "and their times from torch.profiler; the others between CUDA events, medians of "
        f"{data.get('rounds')} interleaved rounds. Forward and backward between events contain the host's launching; the "
        "replay of a CUDA graph of both does not.",
        "\n".join(f"- {name}: {path}" for name, path in data.get("how each loss was computed", {}).items() if path),
    ]
    for size in data.get("sizes", []):
        rows, not_captured = [], []
        for row in size["rows"]:
            figures = row["all"] if row["loss"] == "none" else row["more"]
            sign = "" if row["loss"] == "none" else "+"
            rows.append([row["loss"], *(f"{figures[name]:{sign}.1f}" if name in figures else "-" for name in fields)])
            if row["not captured"]:
                not_captured.append(f"- {row['loss']} was not captured: {_last(row['not captured'])}")
        parts += [f"### {size['model']}, {size['tokens']} tokens", table(["loss", *heads], rows), "\n".join(not_captured)]
    return parts


def _sweep(data: dict[str, Any]) -> list[str]:
    """Per kernel and size the limit, what the code has, and the best settings."""
    parts = [
        "The limit is the time of a copy that moves as many bytes. Times between CUDA events, medians over launches; of all "
        "settings those in the code and the best five."
    ]
    for size in data.get("sizes", []):
        limit = size["limit, us"]
        chosen = [row for row in size["rows"] if row["chosen"]]
        best = sorted((row for row in size["rows"] if row["us"] is not None), key=lambda row: row["us"])[:5]
        rows = [
            [
                f"{'chosen' if row['chosen'] else 'best'}",
                row["block"],
                row["programs"] or "-",
                row["warps"],
                *_over(row["us"], limit),
            ]
            for row in [*chosen, *best]
        ]
        parts += [
            f"### {size['kernel']}, {size['tokens']} x {size['experts']}: limit {limit} us",
            table(["", "block", "programs", "warps", "us", "over the limit"], rows),
        ]
    return parts


def _over(microseconds: float | None, limit: float) -> list[str]:
    return ["-", "-"] if microseconds is None else [f"{microseconds:.1f}", f"{microseconds / limit:.2f}"]


def _steps(data: dict[str, Any]) -> list[str]:
    rows = data.get("rows", [])
    if not rows:
        return []
    delays = list(dict.fromkeys(row["delay"] for row in rows))
    by_loss: dict[str, list] = {}
    for row in rows:
        cell = f"{row['ratio']:.3f} ({row['smallest']:.3f} to {row['largest']:.3f})"
        by_loss.setdefault(row["loss"], []).append(cell)
    milliseconds = {row["loss"]: f"{row['step, ms']:.1f}" for row in rows if row["delay"] == delays[0]}
    issued = {row["loss"]: row["all-reduces of the loss per step"] for row in rows}
    lines = [[loss, issued[loss], milliseconds[loss], *cells] for loss, cells in by_loss.items()]
    shape = ", ".join(f"{name} {value}" for name, value in data["model"].items())
    measured = ", ".join(f"{asked} us took {took}" for asked, took in data.get("delay, measured in us", {}).items())
    return [
        f"Megatron's MoELayer, router and dispatcher in layers with PyTorch's attention and grouped experts: {shape}. Forward, "
        "backward and the step's end in Megatron's schedule and DDP, no optimizer. One GPU: the loss' all-reduces are forced "
        "and delayed, all others are not. Step time over that with `aux_loss` in the same round: median (smallest to largest) "
        f"of {rows[0]['rounds']} rounds. `aux_loss (again)` is the same thing measured twice. Delays as measured: {measured}. "
        f"The host had launched a step after {data.get('launched after, of a step', '-')} of its time. Memory "
        f"{data.get('memory, GiB', '-')} GiB.",
        table(["loss", "all-reduces per step", "step, ms", *(f"{delay:g} us" for delay in delays)], lines),
    ]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "versions": _versions,
    "tests": _tests,
    "gloo": _gloo,
    "nccl": _nccl,
    "kernels": _kernels,
    "sweep": _sweep,
    "steps": _steps,
}

"""The demo's table, for the terminal and as Markdown. It shows what was measured, whichever way it falls."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from rich.console import Console
from rich.table import Table

from demo.megatron_args import EXPERTS, TOPK
from demo.results import LAST_PART, Result

Row = tuple[str, str, list[str]]  # group, what, one value per run


def rows(results: list[Result]) -> list[Row]:
    """All figures, formatted."""
    found: list[Row] = []

    def add(group: str, what: str, figure: Callable[[Result], float], digits: int = 3) -> None:
        found.append((group, what, [f"{figure(result):.{digits}f}" for result in results]))

    for domain in results[0].experts.names:
        add("specialisation", domain, lambda result, name=domain: result.specialisation[name])  # type: ignore[misc]
    add("specialisation", "mean", lambda result: mean(result.specialisation.values()))
    add("specialisation", "contrast of domains", lambda result: result.contrast)
    add("specialisation", "sum of scores", lambda result: result.score_sum)
    add("load balance", "global LBL", lambda result: result.lbl_global)
    add("load balance", "micro LBL", lambda result: result.lbl_micro)
    add("load balance", "MaxVio", lambda result: result.max_vio)
    return found


def notes() -> str:
    """What the figures mean."""
    return (
        "Specialisation: the share of its most used expert among a domain's routed tokens, mean over layers "
        f"({1 / EXPERTS:.3f} is none, {1 / TOPK:.3f} the most possible). Contrast: how far a domain's shares are from the mean "
        "over domains (total variation; 0: all domains are routed alike). Sum of scores: of a token's selected experts "
        f"({TOPK / EXPERTS:.3f}: the router is undecided; 1: it is sure). All three on held-out text. LBL: E x sum f p, 1 is "
        "perfect balance; counted over the global batch, and within each micro-batch. MaxVio: max load / mean load - 1 over "
        f"the global batch. Balance figures are means over layers and the last {LAST_PART:.0%} of the steps."
    )


def show(results: list[Result], console: Console) -> None:
    """Prints the table."""
    table = Table(title="The same model, data and seed; only the scope of the load-balancing loss differs")
    table.add_column("")
    table.add_column("")
    for result in results:
        table.add_column(result.scope, justify="right")
    group_before = ""
    for group, what, values in rows(results):
        if group_before and group != group_before:
            table.add_section()
        summary = what == "mean"
        table.add_row("" if group == group_before else group, what, *values, style="bold" if summary else None)
        group_before = group
    console.print(table)
    console.print(notes(), style="dim")


def markdown(results: list[Result]) -> str:
    """The same table for a README."""
    lines = ["| | | " + " | ".join(result.scope for result in results) + " |", "|---|---|" + "---:|" * len(results)]
    group_before = ""
    for group, what, values in rows(results):
        lines.append(f"| {'' if group == group_before else group} | {what} | " + " | ".join(values) + " |")
        group_before = group
    return "\n".join([*lines, "", notes(), ""])

"""The figures of the runs, and the table of them: what was measured, whichever way it falls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_global_lbl import metrics
from megatron_global_lbl.metrics import measures
from megatron_global_lbl.specialise import result as specialise
from megatron_global_lbl.specialise.result import Specialisation

from demo.megatron_args import EXPERTS, Run

NOTES = (
    "All but MaxVio are of the trained model on held-out text. Loss: nats per byte, mean over domains. Contrast: how far a "
    "domain's routing is from the mean of all domains (total variation; 0: all alike), mean over layers. Favourite expert: its "
    f"share of a domain's tokens, mean over domains and layers (even: {1 / EXPERTS:.3f}). MaxVio: the fullest expert's load in "
    f"a global batch / mean load - 1 (0: even), mean over layers and the last 10 % of the steps."
)


@dataclass(frozen=True)
class Result:
    """One run's figures; all but `max_vio` are of its checkpoint on held-out text."""

    run: Run
    experts: Specialisation
    max_vio: float
    train_loss: list[tuple[int, float]]  # by iteration

    @property
    def loss(self) -> float:
        """Nats per byte, mean over domains."""
        return mean(domain.loss["lm loss"] for domain in self.experts.domains)

    @property
    def contrast(self) -> float:
        """How differently the domains are routed, mean over layers."""
        return float(self.experts.contrast_L.mean())

    @property
    def favourite(self) -> float:
        """Share of a domain's selections that its most used expert has, mean over domains and layers."""
        return float(self.experts.specialisation_DL.mean())

    def as_json(self) -> dict[str, Any]:
        """The figures; the measurement itself is in the run's specialisation.json."""
        own = {name: getattr(self, name) for name in ("loss", "contrast", "favourite", "max_vio", "train_loss")}
        return {"scope": self.run.scope, "coefficient": self.run.coefficient, **own}


def read(run: Run, folder: Path, losses: list[tuple[int, float]]) -> Result:
    """The result of a training that has ended."""
    (record,) = metrics.read(folder)
    return Result(run, specialise.read(folder), end_of_run(record, "max_vio"), losses)


def end_of_run(record: metrics.Run, name: str) -> float:
    """A measure at the end of a training: mean over layers and the last 10 % of the steps."""
    return float(record.metrics[name][measures.end_of_run(record.steps) :].mean())


def rows(results: list[Result]) -> list[list[str]]:
    """The table; its first row is the head."""
    return [
        ["scope, coefficient", *(f"{result.run.scope}, {result.run.coefficient:g}" for result in results)],
        ["held-out loss", *(f"{result.loss:.3f}" for result in results)],
        ["contrast of domains", *(f"{result.contrast:.2f}" for result in results)],
        ["favourite expert", *(f"{result.favourite:.3f}" for result in results)],
        ["MaxVio", *(f"{result.max_vio:.2f}" for result in results)],
    ]


def show(results: list[Result], console: Console) -> None:
    """Print the table."""
    head, *lines = rows(results)
    table = Table(title="The same model, data and seed")
    for i, text in enumerate(head):
        table.add_column(text, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(NOTES, style="dim", highlight=False)


def markdown(results: list[Result]) -> str:
    """The same for a README."""
    head, *lines = [f"| {' | '.join(line)} |" for line in rows(results)]
    return "\n".join([head, "|---|" + "---:|" * len(results), *lines, "", NOTES, ""])

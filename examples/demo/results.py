"""From what a training and the measurement after it wrote to the numbers of the table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import mean
from typing import Any

from megatron_global_lbl import metrics
from megatron_global_lbl.specialise import result as specialise
from megatron_global_lbl.specialise.result import Specialisation

from demo.launch import RunFiles, Step

LAST_PART = 0.2  # balance figures are means over the last fifth of the steps


@dataclass(frozen=True)
class Result:
    """One training's figures."""

    scope: str
    experts: Specialisation  # of its checkpoint, on held-out text
    lbl_global: float
    lbl_micro: float
    max_vio: float
    train_loss: list[tuple[int, float]]  # by iteration
    seconds_per_step: float

    @property
    def specialisation(self) -> dict[str, float]:
        """For each domain the mean over layers of its most used expert's share. 1 / E is none, 1 / topk the most."""
        return dict(zip(self.experts.names, self.experts.specialisation_DL.mean(axis=1).tolist()))

    @property
    def contrast(self) -> float:
        """How differently the domains are routed, mean over layers."""
        return float(self.experts.contrast_L.mean())

    @property
    def score_sum(self) -> float:
        """How sure the router is: the sum of a token's selected scores, mean over domains and layers."""
        return mean(mean(sums) for sums in self.experts.score_sums)

    def as_json(self) -> dict[str, Any]:
        """The derived figures; the measurement itself is in the run's specialisation.json."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "experts"}
        return {**own, "specialisation": self.specialisation, "contrast": self.contrast, "score_sum": self.score_sum}


def read(scope: str, files: RunFiles, steps: list[Step]) -> Result:
    """Collects the result of a training that has ended."""
    (balance,) = metrics.read(files.metrics)
    last = slice(-max(1, round(LAST_PART * len(balance.iterations))), None)
    times = sorted(step.milliseconds for step in steps)
    return Result(
        scope=scope,
        experts=specialise.read(files.metrics),
        lbl_global=float(balance.metrics["lbl_global"][last].mean()),
        lbl_micro=float(balance.metrics["lbl_micro"][last].mean()),
        max_vio=float(balance.metrics["max_vio"][last].mean()),
        train_loss=[(step.iteration, step.loss) for step in steps],
        seconds_per_step=times[len(times) // 2] / 1000,
    )

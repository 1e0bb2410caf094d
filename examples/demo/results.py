"""From what a training wrote (Megatron's log, validation report, balance record) to the numbers of the table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from megatron_global_lbl import metrics

from demo.launch import RunFiles, Step

LAST_PART = 0.2  # balance figures are means over the last fifth of the steps


@dataclass(frozen=True)
class Result:
    """One training's figures. Shapes: [D] domains, [L] layers, [E] experts."""

    scope: str
    train_loss: list[tuple[int, float]]  # by iteration
    valid_loss: dict[int, dict[str, float]]  # by iteration, then domain
    frequencies: dict[str, list[list[float]]]  # domain -> [L][E], share of the domain's selections, at the end
    lbl_global: float
    lbl_micro: float
    max_vio: float
    seconds_per_step: float

    @property
    def domains(self) -> list[str]:
        return list(self.frequencies)

    @property
    def final_loss(self) -> dict[str, float]:
        return self.valid_loss[max(self.valid_loss)]

    @property
    def overall_loss(self) -> float:
        """Mean over domains; every domain has the same number of validation tokens."""
        return mean(self.final_loss.values())

    @property
    def specialisation(self) -> dict[str, float]:
        """For each domain the mean over layers of its most used expert's share. 1 / E is none, 1 / topk the most."""
        return {domain: mean(max(layer) for layer in layers) for domain, layers in self.frequencies.items()}

    @property
    def contrast(self) -> float:
        """How differently the domains are routed: the total variation distance between a domain's shares and the mean
        over domains, averaged over domains and layers. 0: every domain uses the experts alike. Unlike specialisation,
        it does not rise where one expert serves all domains.
        """
        distances = []
        for layers in zip(*self.frequencies.values()):  # one layer of every domain
            average = [mean(shares) for shares in zip(*layers)]
            distances += [sum(abs(x - y) for x, y in zip(shares, average)) / 2 for shares in layers]
        return mean(distances)

    def as_json(self) -> dict[str, Any]:
        """Everything, derived figures included."""
        derived = {"overall_loss": self.overall_loss, "specialisation": self.specialisation, "contrast": self.contrast}
        return {**asdict(self), **derived}


def read(scope: str, files: RunFiles, steps: list[Step]) -> Result:
    """Collects the result of a training that has ended."""
    valid_loss: dict[int, dict[str, float]] = {}
    frequencies: dict[str, list[list[float]]] = {}
    for entry in json.loads(files.validation.read_text(encoding="utf-8")):
        valid_loss.setdefault(entry["iteration"], {})[entry["name"]] = entry["loss"]
        # The last evaluation, after the training, wins.
        frequencies[entry["name"]] = [[count / sum(layer) for count in layer] for layer in entry["tokens_per_expert"]]
    (balance,) = metrics.read(files.balance)
    last = slice(-max(1, round(LAST_PART * len(balance.iterations))), None)
    times = sorted(step.milliseconds for step in steps)
    return Result(
        scope=scope,
        train_loss=[(step.iteration, step.loss) for step in steps],
        valid_loss=valid_loss,
        frequencies=frequencies,
        lbl_global=float(balance.metrics["lbl_global"][last].mean()),
        lbl_micro=float(balance.metrics["lbl_micro"][last].mean()),
        max_vio=float(balance.metrics["max_vio"][last].mean()),
        seconds_per_step=times[len(times) // 2] / 1000,
    )

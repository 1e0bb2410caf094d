"""Results of runs: read, gathered into one file that is kept with the repository, and compared in pairs: of equal seed, on the
same machine with the same versions, since rounding alone parts trainings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from reproduce.settings import Setting

GATHERED = "results.jsonl"
HEATMAPS = ("over=sequences-1", "scope=global")  # their frequencies are kept, of the first seed

Result = dict[str, Any]
Pair = tuple[int, str]
"""What the runs of a comparison have in common: the seed, and the machine with its versions."""


def machine(result: Result) -> str:
    """The processor and the versions that a run was made with."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['machine']['processor']}, {result['machine']['cores']} cores; {versions}"


class Results:
    """By setting, then seed and machine."""

    def __init__(self, found: list[Result]) -> None:
        self._by_setting: dict[str, dict[Pair, Result]] = {}
        for result in found:
            name = Setting(**result["setting"]).name
            self._by_setting.setdefault(name, {})[result["seed"], machine(result)] = result

    def __getitem__(self, setting: Setting) -> dict[Pair, Result]:
        """The runs of a setting, those of a seed together; empty if there are none."""
        return dict(sorted(self._by_setting.get(setting.name, {}).items()))

    def __iter__(self):
        return (result for runs in self._by_setting.values() for _, result in sorted(runs.items()))


def swing(result: Result) -> list[float]:
    """Autocorrelation of an expert's load at lags of 1, 2, ... steps, of means over two steps in a row; empty if not measured.

    Megatron's blend goes round the domains, so two steps of half as many sequences as there are domains see different ones, and
    the load jumps to and fro with period 2 whatever the loss does. The mean over two steps has none of that.
    """
    plain = [1.0, *result["autocorrelation"]]
    return [(plain[d - 1] + 2 * plain[d] + plain[d + 1]) / (2 + 2 * plain[1]) for d in range(1, len(plain) - 1)]


def read(folder: Path) -> Results:
    """Every result under a folder: one file per run, or gathered. The newer of two of one run is what a folder has alone.

    Raises:
        SystemExit: the runs were trained on different data, which may not be compared.
    """
    found: list[Result] = []
    for path in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found += [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    digests = {result["data"] for result in found}
    if len(digests) > 1:
        raise SystemExit(f"results of {len(digests)} different data under {folder}: {', '.join(sorted(digests))}; allowed: one")
    return Results(found)


def gather(out: Path, kept: Path) -> int:
    """Adds the results under `out` to the file under `kept`; returns the number of runs there. What is there stays."""
    kept.mkdir(parents=True, exist_ok=True)
    both = read(kept)
    names = {(Setting(**result["setting"]).name, result["seed"], machine(result)) for result in both}
    lines = [json.dumps(result) for result in both]
    for result in read(out):
        name = Setting(**result["setting"]).name
        if (name, result["seed"], machine(result)) in names:
            continue
        if not (result["seed"] == 0 and name in HEATMAPS):
            result.pop("frequencies", None)
        lines.append(json.dumps(result))
    (kept / GATHERED).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    read(kept)  # refuses a mixture
    return len(lines)


def loss(result: Result) -> float:
    """Validation loss, nats per byte: mean over domains, which have the same number of tokens."""
    return mean(result["valid_loss"].values())


@dataclass(frozen=True)
class Difference:
    """A measured number less that of the same seed, on the same machine, in another setting."""

    values: list[float]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over pairs; 0 where there is one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        if not self.values:
            return "not run"
        if len(self.values) == 1:
            return f"{self.mean:+.3f} (one pair)"
        same = sum(value * self.mean > 0 for value in self.values)
        return f"{self.mean:+.3f} ± {self.spread:.3f} ({same} of {len(self.values)})"


def difference(results: Results, setting: Setting, base: Setting) -> Difference:
    """Of the validation loss, over the pairs that there are."""
    ours, theirs = results[setting], results[base]
    return Difference([loss(ours[pair]) - loss(theirs[pair]) for pair in ours if pair in theirs])


def average(results: Results, setting: Setting, key: str) -> float | None:
    """Mean over runs of a number; `loss` is the validation loss, `max_vio` that of the last fifth of the steps."""
    runs = results[setting].values()
    if not runs:
        return None
    if key == "loss":
        return mean(map(loss, runs))
    if key == "max_vio":
        return mean(mean(run["max_vio"][-max(1, len(run["max_vio"]) // 5) :]) for run in runs)
    return mean(run[key] for run in runs)

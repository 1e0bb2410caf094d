"""Results of runs: read, gathered into one file that is kept with the repository, and compared by seed.

Two runs are compared if seed, machine, versions and data are the same, since rounding alone parts trainings. The sample is the
seeds: the same seed on a second machine is no new sample, so differences of one seed are averaged before anything is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from reproduce.settings import Setting

GATHERED = "results.jsonl"
HEATMAPS = ("over=sequences-1", "scope=global")  # their frequencies are kept, of the first seed

Result = dict[str, Any]
Pair = tuple[int, str, str]
"""What two runs that are compared have in common: the seed, the machine with its versions, the data."""


def machine(result: Result) -> str:
    """The processor and the versions that a run was made with."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['machine']['processor']}, {result['machine']['cores']} cores; {versions}"


def pair(result: Result) -> Pair:
    """See `Pair`."""
    return result["seed"], machine(result), result["data"]


class Results:
    """By setting, then by pair."""

    def __init__(self, found: Iterable[Result]) -> None:
        self._by_setting: dict[str, dict[Pair, Result]] = {}
        for result in found:
            name = Setting.stored(result["setting"]).name
            self._by_setting.setdefault(name, {})[pair(result)] = result

    def __getitem__(self, setting: Setting) -> dict[Pair, Result]:
        """The runs of a setting, those of a seed together; empty if there are none."""
        return dict(sorted(self._by_setting.get(setting.name, {}).items()))

    def __iter__(self):
        return (result for runs in self._by_setting.values() for _, result in sorted(runs.items()))


def lines(folder: Path) -> list[Result]:
    """Every result under a folder: gathered, then one file per run."""
    found = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return found + [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def read(folder: Path) -> Results:
    """Every result under a folder."""
    return Results(lines(folder))


def gather(out: Path, kept: Path) -> int:
    """Adds the results under `out` to the file under `kept`; returns the number of runs there. What is there stays."""
    kept.mkdir(parents=True, exist_ok=True)
    path = kept / GATHERED
    stored = path.read_text("utf-8").splitlines() if path.exists() else []
    there = {(Setting.stored(result["setting"]).name, pair(result)) for result in map(json.loads, stored)}
    for result in lines(out):
        name = Setting.stored(result["setting"]).name
        if (name, pair(result)) in there:
            continue
        if not (result["seed"] == 0 and name in HEATMAPS):
            result.pop("frequencies", None)
        stored.append(json.dumps(result))
    path.write_text("".join(line + "\n" for line in stored), encoding="utf-8")
    return len(stored)


def loss(result: Result) -> float:
    """Validation loss, nats per byte: mean over domains, which have the same number of tokens."""
    return mean(result["valid_loss"].values())


def max_vio(result: Result) -> float:
    """MaxVio over the step, in the last fifth of the steps."""
    blocks = result["max_vio"]
    return mean(blocks[-max(1, len(blocks) // 5) :])


def early_max_vio(result: Result) -> float:
    """The greatest MaxVio of steps 40 to 80."""
    return max(result["max_vio_first"][40:80])


def steps_until_even(result: Result) -> int | None:
    """The first of ten steps from which MaxVio, over blocks of ten, stays below 1; None if it does not."""
    blocks = result["max_vio"]
    uneven = [number for number, value in enumerate(blocks) if value >= 1]
    at = uneven[-1] + 1 if uneven else 0
    return 10 * at if at < len(blocks) else None


Measure = Callable[[Result], float]


def by_seed(values: Mapping[Pair, float]) -> list[float]:
    """A number per seed: the mean over its machines and data."""
    seeds = sorted({seed for seed, *_ in values})
    return [mean(value for (of, *_), value in values.items() if of == seed) for seed in seeds]


def common(results: Results, settings: Iterable[Setting]) -> list[Pair]:
    """The pairs that every setting with a result has: means over them subtract."""
    runs = [set(results[setting]) for setting in settings if results[setting]]
    return sorted(set.intersection(*runs)) if runs else []


def difference(results: Results, setting: Setting, base: Setting, measure: Measure = loss) -> list[float]:
    """A measured number less that of `base`, by seed; empty if the two have no pair in common."""
    ours, theirs = results[setting], results[base]
    return by_seed({key: measure(ours[key]) - measure(theirs[key]) for key in ours if key in theirs})


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "no pair"
    if len(values) == 1:
        return f"{values[0]:{sign}.{digits}f} (one seed)"
    return f"{mean(values):{sign}.{digits}f} ± {stdev(values):.{digits}f}"


def signed(values: list[float], digits: int = 3) -> str:
    """The same of differences, and how many seeds have the sign of the mean."""
    text = spread(values, digits, "+")
    if len(values) < 2:
        return text
    same = sum(value * mean(values) > 0 for value in values)
    return f"{text} ({same} of {len(values)})"

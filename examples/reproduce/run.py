"""The paper's findings on the real plugin and real Megatron, at a size for CPUs (docs/reproduction.md).

    python examples/reproduce/run.py EXPERIMENT [EXPERIMENT ...]    train what is missing ("all": every experiment)
    python examples/reproduce/run.py gather                         results under --out into the file that is kept
    python examples/reproduce/run.py figure                         tables and pictures from the results
    python examples/reproduce/run.py list                           the experiments and their runs
    python examples/reproduce/run.py data                           only make the data, to carry it to another machine

A run that has its result is not trained again; one that was interrupted starts anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a script: the folder above makes `reproduce` and `demo` packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reproduce import data
from reproduce.experiments import EXPERIMENTS, GPU_EXPERIMENTS
from reproduce.settings import Run

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Train, draw or list; returns the exit code: 1 if a training failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        nargs="+",
        choices=[*EXPERIMENTS, *GPU_EXPERIMENTS, "all", "gather", "figure", "list", "data"],
        metavar="EXPERIMENT",
    )
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-2"), help='of every setting, as "0-2" (default) or "3,5"')
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, one core for each of their ranks (2)")
    parser.add_argument("--out", type=Path, default=Path("reproduce-out"), help="data, logs, and results under results/")
    parser.add_argument("--data", type=Path, help="data that was made before (default: OUT/data, made if it is not there)")
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu", help="gpu: 8 GPUs, see gpu.sh")
    parser.add_argument("--text", nargs="+", metavar="NAME=FILE", help="data: a file of text per domain, for --size gpu")
    parser.add_argument("--limit-seconds", type=float, help="start and finish what fits, then stop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="gather, figure: where the kept results are")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="figure: where the pictures go")
    options = parser.parse_args(argv)
    of_size = EXPERIMENTS if options.size == "cpu" else GPU_EXPERIMENTS
    names = list(of_size) if "all" in options.what else options.what
    if "list" in options.what:
        for name, experiment in of_size.items():
            print(f"{name}: {(experiment.__doc__ or '').strip()}")
            print("".join(f"    {setting.name}\n" for setting in experiment()), end="")
        return 0
    if "figure" in options.what:
        from reproduce import figures

        if options.size == "cpu":
            figures.make(options.results, options.images)
        else:
            figures.summary(options.results, GPU_EXPERIMENTS)
        return 0
    out = options.out.resolve()
    if "gather" in options.what:
        from reproduce.results import gather

        print(f"{gather(out / 'results', options.results)} runs in {options.results}")
        return 0
    folder = (options.data or out / "data").resolve()
    if other := [name for name in names if name not in of_size and name != "data"]:
        parser.error(f"{', '.join(other)}: not of --size {options.size}; allowed: {', '.join(of_size)}")
    texts = dict(word.split("=", 1) for word in options.text) if options.text else None
    data.prepare(folder, texts and {name: Path(path) for name, path in texts.items()})
    if "data" in options.what:
        return 0
    from reproduce.trainings import train_all

    runs = queue_of(names, options.seeds)
    return train_all(runs, size=options.size, data=folder, out=out, jobs=options.jobs, limit=options.limit_seconds)


def seeds_of(text: str) -> list[int]:
    """Seeds from "3", "3,5", "3-7"."""
    ends = [[int(end) for end in part.split("-", 1)] for part in text.split(",")]
    return [seed for first, *last in ends for seed in range(first, (last or [first])[0] + 1)]


def queue_of(names: list[str], seeds: list[int]) -> list[Run]:
    """Experiments in order; in each all settings of the first seed, so that pairs are complete early. Every run once."""
    runs = [Run(setting, seed) for name in names for seed in seeds for setting in (EXPERIMENTS | GPU_EXPERIMENTS)[name]()]
    return list(dict.fromkeys(runs))


if __name__ == "__main__":
    raise SystemExit(main())

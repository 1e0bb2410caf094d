"""`make demo`: one small MoE trained with `micro` and `global`, at two coefficients, and what its experts specialise in.

    python examples/demo/run.py --out demo-out [--steps N] [--seed N] [--scopes micro dp global] [--coefficients 0.1 0.01]

Everything is written under --out: the data, a folder per training (logs, checkpoint, metrics), results.json, table.md, the
picture and the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

# Run as a script: the folder above makes `demo` a package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from demo import picture, results
from demo.launch import RunFailedError, Training
from demo.megatron_args import EVALUATED_AT_ONCE, RANKS, SEQUENCE_LENGTH, Run, Size
from demo.prepare import Paths, prepare
from demo.progress import TrainingProgress


def main() -> int:
    """Prepare, train, compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of everything that is written")
    parser.add_argument("--scopes", nargs="+", default=("micro", "global"), choices=("micro", "dp", "global"))
    parser.add_argument("--coefficients", nargs="+", type=float, default=(0.1, 0.01), metavar="A", help="default: 0.1 0.01")
    parser.add_argument("--steps", type=int, default=Size.steps, help=f"training steps of each run ({Size.steps})")
    parser.add_argument("--seed", type=int, default=Size.seed, help="of the weights and of the order of the data (0)")
    parser.add_argument(
        "--valid-sequences", type=int, default=Size.valid_sequences, help=f"per domain, a multiple of {EVALUATED_AT_ONCE}"
    )
    options = parser.parse_args()
    # What importing Megatron without its GPU libraries prints; the demo needs none of them.
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    console = Console(soft_wrap=True)
    began = time.monotonic()
    out = options.out.resolve()
    size = Size(options.steps, options.valid_sequences, options.seed)
    runs = [Run(scope, coefficient) for coefficient in options.coefficients for scope in options.scopes]

    paths = prepare(out / "data", sequence_length=SEQUENCE_LENGTH, valid_sequences=size.valid_sequences)
    console.print(f"Generated text of {len(paths)} domains: {', '.join(paths)}.", highlight=False)
    console.print(f"{len(runs)} trainings of {size.steps} steps on {RANKS} processes, then their experts on held-out text:")
    try:
        found = train(runs, size, paths, out, console, max(2, (os.cpu_count() or 1) // RANKS))
    except RunFailedError as error:
        console.print(str(error), markup=False, highlight=False)
        return 1

    results.show(found, console)
    (out / "table.md").write_text(results.markdown(found), encoding="utf-8")
    content = {"seed": size.seed, "steps": size.steps, "runs": [result.as_json() for result in found]}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    picture.draw(found, out / "experts.png")
    console.print(f"\nPicture: {out / 'experts.png'}\nReport:", highlight=False)
    report = [str(Path(sys.executable).with_name("megatron-lbl")), "report", *(str(out / run.name) for run in runs)]
    code = subprocess.run([*report, "--out", str(out / "report")]).returncode
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(f"All of it under {out}. Took {minutes} min {seconds} s.", highlight=False)
    return code


def train(runs: list[Run], size: Size, paths: Paths, out: Path, console: Console, jobs: int) -> list[results.Result]:
    """The results of the runs, so many of them at once.

    Raises:
        RunFailedError: one did not end well; the others are stopped.
    """
    waiting = list(runs)
    running: list[Training] = []
    done: dict[Run, results.Result] = {}
    with TrainingProgress(console, runs, size.steps, len(paths)) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(Training(waiting[0], size, paths, out / waiting.pop(0).name))
                for training in list(running):
                    ended = training.ended()
                    progress.show(training, ended)
                    if ended:
                        running.remove(training)
                        done[training.run] = results.read(training.run, training.folder, training.losses)
                time.sleep(0.2)
        finally:
            for training in running:  # Ctrl-C, or one of them failed: leave no process behind
                training.stop()
    return [done[run] for run in runs]


if __name__ == "__main__":
    raise SystemExit(main())

"""`make demo`: one small MoE trained with `micro` and `global`, and what its experts specialise in.

    python examples/demo/run.py --out demo-out [--steps N] [--scopes micro global window]

Everything is written under --out: the data, each training's logs, checkpoint and metrics, results.json, table.md and the
picture.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

# Run as a script: the folder above makes `demo` a package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Said once per import of Megatron without its GPU libraries; the demo needs none of them.
warnings.filterwarnings("ignore", category=UserWarning)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

from rich.console import Console  # noqa: E402

from megatron_global_lbl.report.page import write_report  # noqa: E402

from demo import pictures, results, table  # noqa: E402
from demo.launch import RunFailedError, RunFiles, specialise, train  # noqa: E402
from demo.megatron_args import SCOPES, Size  # noqa: E402
from demo.prepare import prepare  # noqa: E402
from demo.progress import TrainingProgress  # noqa: E402


def main() -> int:
    """Prepares, trains, compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of everything that is written")
    parser.add_argument("--scopes", nargs="+", default=SCOPES, choices=("micro", "dp", "global", "window"), help=f"{SCOPES}")
    parser.add_argument("--steps", type=int, default=Size.steps, help=f"training steps of each run ({Size.steps})")
    parser.add_argument("--global-batch", type=int, default=Size.global_batch, help="sequences of a step")
    parser.add_argument("--processes", type=int, default=Size.processes, help="of a training, an even number")
    parser.add_argument("--valid-sequences", type=int, default=Size.valid_sequences, help="held out, per domain")
    options = parser.parse_args()
    console = Console()
    began = time.monotonic()
    out = options.out.resolve()
    say = partial(console.print, highlight=False, soft_wrap=True)
    size = Size(
        steps=options.steps,
        global_batch=options.global_batch,
        valid_sequences=options.valid_sequences,
        processes=options.processes,
    )

    console.print("[bold]1/3[/] Text from the files of this installation, into Megatron's indexed datasets")
    paths = prepare(out / "data", sequence_length=size.sequence_length, valid_sequences=size.valid_sequences, say=say)

    console.print(f"[bold]2/3[/] Training on {size.processes} processes, {size.steps} steps, once per scope; then its experts")
    found = []
    for scope in options.scopes:
        files = RunFiles(out / scope)
        try:
            with TrainingProgress(console, scope, size, len(paths)) as progress:
                steps = train(scope, size, paths, files, data=out / "data", on_step=progress.step)
                specialise(size, paths, files, data=out / "data", on_domain=progress.domain)
        except RunFailedError as error:
            console.print(str(error), markup=False, highlight=False)
            return 1
        found.append(results.read(scope, files, steps))

    console.print("[bold]3/3[/] Results\n")
    table.show(found, console)
    (out / "table.md").write_text(table.markdown(found), encoding="utf-8")
    (out / "results.json").write_text(json.dumps([result.as_json() for result in found], indent=1) + "\n", encoding="utf-8")
    pictures.expert_heatmaps(found, out / "experts.png")
    report = write_report([RunFiles(out / scope).metrics for scope in options.scopes], out / "report")
    say(f"\nPicture: {out / 'experts.png'}\nReport:  {report}")
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    say(f"All of it under {out}. Took {minutes} min {seconds} s.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How long do `megatron-lbl report` and `watch --once` take on a long record, and how much memory?

Writes a record with the real writer (100,000 log intervals of 60 layers with 256 experts by default: 3.2 GB), runs the commands
on it as a user would, each in a process of its own, and deletes it. Every interval has one of 64 sets of loads: what they are
costs nothing, how many they are does.

    python benchmarks/report_size.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from report import machine, table

from megatron_global_lbl.metrics.record import METRICS
from megatron_global_lbl.metrics.writer import Writer

COMMAND = "import sys; from megatron_global_lbl.command import main; sys.exit(main(sys.argv[1:]))"


def write(directory: Path, *, intervals: int, layers: int, experts: int) -> None:
    """One pipeline stage, 10 steps per interval."""
    about = {"scope": "global", "alpha": 0.01, "topk": 8, "data_parallel": 128, "micro_batches": 4, "log_interval": 10}
    writer = Writer(directory, layers=[str(i + 1) for i in range(layers)], num_experts=experts, about=about)
    random = np.random.default_rng(0)
    some_SLE = np.exp(0.2 * random.standard_normal((64, layers, experts))).astype(np.float32)
    some_SLE /= some_SLE.mean(axis=-1, keepdims=True)
    for interval in range(1, intervals + 1):
        load_LE = some_SLE[random.integers(64)]
        values = dict.fromkeys(METRICS, np.float32(1) + 0.1 * random.random(layers, dtype=np.float32)) | {
            "dead": np.zeros(layers)
        }
        writer.append(iteration=10 * interval, steps=10, values=values, load=load_LE, sequences=512, tokens=512 * 4096)


def measured(*arguments: str) -> list[str]:
    """Wall seconds, CPU seconds and the largest resident memory of one command, which has to succeed."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    assert os.waitstatus_to_exitcode(status) == 0, f"{arguments} failed"
    return [f"{seconds:.1f}", f"{usage.ru_utime + usage.ru_stime:.1f}", f"{usage.ru_maxrss / 2**20:.2f}"]


def main() -> None:
    """Print the report in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        start = time.monotonic()
        write(record, intervals=args.intervals, layers=args.layers, experts=args.experts)
        each = (time.monotonic() - start) / args.intervals
        size = sum(file.stat().st_size for file in record.iterdir())
        rows = [
            ["report", *measured("report", str(record), "--out", f"{folder}/out")],
            ["watch --once", *measured("watch", str(record), "--once")],
        ]
    print(machine(gpu=False))
    print(f"\n{args.intervals:,} intervals of {args.layers} layers with {args.experts} experts: {size / 1e9:.2f} GB, ", end="")
    print(f"{size / args.intervals / 1024:.1f} KiB and {1000 * each:.2f} ms per interval to write\n")
    print(table(["command", "seconds", "CPU seconds", "GiB"], rows))


if __name__ == "__main__":
    main()

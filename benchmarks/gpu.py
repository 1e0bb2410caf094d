"""Everything about this plugin that only a GPU can tell, in one command: one GPU, no network, under ten minutes.

    python benchmarks/gpu.py --out gpu-results                     # everything
    python benchmarks/gpu.py --out gpu-results --quick             # less of each, under four minutes
    python benchmarks/gpu.py --out gpu-results --stages nccl,steps
    python benchmarks/gpu.py --report gpu-results/results.json > benchmarks/DATE-gpu.md

Stages, each in a process of its own with a time limit, so that a crash or a hang ends that one alone:

    versions   what is here
    tests      tests/gpu
    gloo       four processes on the one GPU against the float64 truth
    nccl       forced NCCL all-reduces: no host synchronisation, CUDA graphs, constant memory
    kernels    kernels and GPU time of every loss, per layer and micro-batch (router_cost.py)
    sweep      the Triton kernels with other block sizes, programs and warps, against the memory's bandwidth
    steps      step time of 8 Qwen3-30B-A3B-shaped layers against aux_loss, with delayed all-reduces (step_cost.py)

DIR/results.json is written after every stage, a stage's own DIR/STAGE.json after each of its parts, DIR/STAGE.log holds its
output. Exit code 1 if any check failed or a stage did not end well. Tests that are skipped are listed with their reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from on_gpu.summary import markdown, table_of_stages

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which a stage is ended: (everything, quick). Most need much less; `steps` uses what it has.
LIMITS = {
    "versions": (40, 40),
    "tests": (130, 75),
    "gloo": (110, 50),
    "nccl": (80, 60),
    "kernels": (100, 45),
    "sweep": (90, 40),
    "steps": (150, 60),
}
BUDGETS = (540, 240)
SCRIPTS = {"kernels": "router_cost.py", "steps": "step_cost.py"}  # of stages that are more than that
KEPT = 25  # seconds of the budget that a stage leaves to each of those after it
CPU_FACTOR = 5  # a processor is slower
GRACE = 5  # seconds beyond what the stage was told
ENVIRONMENT = {
    # The one interface that a machine without a network has.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCHDYNAMO_DISABLE": "1",  # nothing that is measured is compiled, and compiling takes minutes
}


def run_stage(name: str, out: Path, seconds: float, options: list[str]) -> dict[str, Any]:
    """Run one stage in a process group of its own and end it, and all that it started, when its time is up."""
    result_file, log_file = out / f"{name}.json", out / f"{name}.log"
    result_file.unlink(missing_ok=True)
    script = ROOT / "benchmarks" / SCRIPTS.get(name, f"on_gpu/stage_{name}.py")
    command = [sys.executable, str(script), "--json", str(result_file)]
    command += ["--seconds", str(seconds), *options]
    begin = time.monotonic()
    with log_file.open("w", encoding="utf-8") as log:
        environment = {**ENVIRONMENT, **os.environ}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            code = "time limit"
        finally:
            _end(process)
    written = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {"checks": [], "data": {}}
    ended = "well" if code == 0 else f"{code}" if isinstance(code, str) else f"with exit code {code}"
    tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    return {"ended": ended, "seconds": round(time.monotonic() - begin, 1), **written, "log": [] if code == 0 else tail}


def _end(process: subprocess.Popen) -> None:
    """The stage's process group: pool workers may have outlived it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def failures(results: dict[str, Any]) -> int:
    """Failed checks, and stages that did not end well."""
    stages = results["stages"].values()
    failed = sum(check["passed"] is False for stage in stages for check in stage["checks"])
    return failed + sum(stage["ended"] != "well" for stage in stages)


def save(results: dict[str, Any], out: Path) -> None:
    unfinished = out / "results.tmp"
    unfinished.write_text(json.dumps(results, indent=1), encoding="utf-8")
    unfinished.replace(out / "results.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results and logs go")
    parser.add_argument("--stages", default=",".join(LIMITS), help="comma-separated; default: all")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for everything; default {} ({} with --quick)".format(*BUDGETS)
    )
    parser.add_argument("--quick", action="store_true", help="less of each stage")
    parser.add_argument(
        "--cpu", action="store_true", help="try the script out without a GPU: small sizes, no figure means anything"
    )
    parser.add_argument("--report", type=Path, metavar="RESULTS.json", help="print the report of an earlier run and end")
    args = parser.parse_args()
    args.stages = [name for name in args.stages.split(",") if name]
    unknown = [name for name in args.stages if name not in LIMITS]
    if unknown or not args.stages:
        parser.error(f"--stages {','.join(unknown) or '(empty)'}: unknown; allowed: {', '.join(LIMITS)}")
    if args.budget is None:
        args.budget = BUDGETS[args.quick] * (CPU_FACTOR if args.cpu else 1)
    if args.budget <= 0:
        parser.error(f"--budget {args.budget:g}: not allowed; allowed: seconds > 0")
    if (args.out is None) == (args.report is None):
        parser.error("one of --out DIR (run) and --report RESULTS.json (print) is needed")
    if args.out is not None and not args.cpu and not gpu_is_here():
        parser.error("--out: PyTorch finds no CUDA device; allowed: a machine with one, or --cpu to try the script out")
    return args


def gpu_is_here() -> bool:
    """Whether stages would find a CUDA device: said once here, not by an error of every stage."""
    import torch

    return torch.cuda.is_available()


def main() -> int:
    """Run the stages, or print a report; the exit code."""
    args = parse_arguments()
    if args.report is not None:
        print(markdown(json.loads(args.report.read_text(encoding="utf-8"))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    results: dict[str, Any] = {"command": command, "date": time.strftime("%Y-%m-%d"), "cpu": args.cpu, "stages": {}}
    options = ["--quick"] * args.quick + ["--cpu"] * args.cpu
    deadline = time.monotonic() + args.budget
    for position, name in enumerate(args.stages):
        limit = LIMITS[name][args.quick] * (CPU_FACTOR if args.cpu else 1)
        seconds = min(limit, deadline - time.monotonic() - GRACE - KEPT * (len(args.stages) - 1 - position))
        if seconds < GRACE:
            results["stages"][name] = {
                "ended": "not begun: --budget is used up",
                "seconds": 0,
                "checks": [],
                "data": {},
                "log": [],
            }
        else:
            print(f"== {name} (at most {seconds:.0f} s)", flush=True)
            results["stages"][name] = run_stage(name, args.out, seconds, options)
            print(f"   {results['stages'][name]['ended']}, {results['stages'][name]['seconds']} s", flush=True)
        save(results, args.out)
    (args.out / "report.md").write_text(markdown(results) + "\n", encoding="utf-8")
    print(table_of_stages(results))
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())

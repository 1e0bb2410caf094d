"""Stage 2: four processes on one GPU against the float64 truth, in the layouts that several ranks allow.

NCCL refuses two ranks on one GPU, so the ranks talk through gloo, with CUDA tensors; what gloo does not take of them is staged
through the host (tests/distributed/gloo_on_gpu.py).
"""

from __future__ import annotations

from stage import Stage, paths

paths()

SCOPES = ("dp", "global")
RANKS = 4
RESTARTS = 3  # a worker that hangs costs the pool; more of them would cost the stage


def cases(quick: bool):
    """(name, problem, layout), the essential ones first."""
    from layout import Layout
    from truth import Problem

    layouts = {
        "dp4": (4, Layout()),
        "tp2 dp2, sequence parallel": (2, Layout(tp=2)),
        "pp2 dp2": (2, Layout(pp=2)),
        "ep2 dp4, MoE layers": (4, Layout(moe="layer", ep=2)),
    }
    if not quick:
        layouts |= {
            "dp4, distributed optimizer": (4, Layout(distributed_optimizer=True)),
            "dp4, full recomputation": (4, Layout(recompute="full")),
            "tp2 pp2": (1, Layout(tp=2, pp=2)),
            "ep2 etp2 tp2, MoE layers": (2, Layout(tp=2, moe="layer", ep=2, etp=2)),
        }
    for name, (dp, layout) in layouts.items():
        for scope in SCOPES:
            yield f"{name}, {scope}", Problem(scope, dp, 4, 3, masks="uneven"), layout
    for scope in SCOPES:
        yield f"plain path, dp4, {scope}", Problem(scope, 4, 4, 3, masks="uneven"), Layout()
    for scope in SCOPES:
        options = {"dtype": "bfloat16", "hidden": 64, "seq": 64, "batch": 4, "masks": "uneven"}
        yield f"dp4 bf16, {scope}", Problem(scope, 4, 3, 2, **options), Layout()


def main() -> None:
    stage = Stage("gloo")
    from compare import check
    from gloo_on_gpu import STAGED
    from workers import Pool

    stage.data["staged through the host"] = STAGED
    pool = Pool(RANKS) if stage.cpu else Pool(RANKS, device="cuda", backend="gloo")
    restarts = 0
    try:
        for name, problem, layout in cases(stage.quick):
            if restarts > RESTARTS or stage.left < 10:
                stage.skip(name, "the workers had to be started again too often" if restarts > RESTARTS else "no time left")
                continue
            extra = {"router_dtype": "fp32"} if problem.dtype == "bfloat16" else {}
            fused = False if name.startswith("plain path") else None if stage.cpu else True
            with stage.check(name) as entry:
                check(pool, problem, layout, fused=fused, **extra)
            if "CUDA error" in entry["detail"]:  # after one a process is of no use
                pool.close()
            restarts += not pool.alive
    finally:
        pool.close()


if __name__ == "__main__":
    main()

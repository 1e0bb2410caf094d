"""Stage 4: kernels and GPU time of one layer's loss per micro-batch, and the same replayed as a CUDA graph.

`router_cost.time_on_gpu` measures; an event time of few tokens is the host's launching, so a replay shows what the GPU needs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from stage import Stage, last_lines, paths

paths()

import torch  # noqa: E402
from launches import GpuWork  # noqa: E402
from models import MODELS  # noqa: E402
from routers import BASELINE, VARIANTS, build, end_of_step, micro_batch, start, stop  # noqa: E402

TOKENS = (4096, 16384, 65536)
REPLAYS = 10
LOSS_PATHS: dict[str, str] = {}  # how each loss was computed, as the registration says
SECONDS_OF_A_ROW = 15  # no row is begun with less left


def times_of_replay(model: str, variants: Sequence[str], *, tokens: int, rounds: int) -> dict[str, float | str]:
    """Microseconds of a forward with its backward inside one CUDA graph, medians over interleaved rounds; the error of a loss
    that cannot be captured."""
    size = MODELS[model]
    hidden, gradient = micro_batch(size, tokens)
    graphs: dict[str, tuple] = {}
    found: dict[str, float | str] = {}
    # All are built first: building sets the scale of auxiliary losses, a tensor that a captured backward reads.
    routers = {name: build(size, VARIANTS[name], "fp32") for name in variants}
    for name, router in routers.items():
        try:
            graphs[name] = _captured(name, router, hidden, gradient)
        except Exception as error:
            found[name] = last_lines(f"{type(error).__name__}: {error}", 2)
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, *_) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) * 1000 / REPLAYS)
    for name, (_, of_layers, *_) in graphs.items():
        LOSS_PATHS[name] = ", ".join(sorted(set(of_layers.values())))
    return found | {name: statistics.median(times) for name, times in seconds.items()}


def _captured(name: str, router: torch.nn.Module, hidden: torch.Tensor, gradient: torch.Tensor) -> tuple:
    """(graph, path of each layer, what has to live as long: the registration's tensors, in which the replays count)."""

    def both():
        probs, _ = router(hidden)
        return torch.autograd.grad(probs, (hidden, router.weight), gradient.to(probs.dtype))

    with VARIANTS[name].active() as handle:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                both()
                end_of_step(router)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = both()
        of_layers = {} if handle is None else handle.loss_paths
        end_of_step(router)
    return graph, of_layers, gradients, router, handle, getattr(handle, "_engine", None)


def rows_of(times: dict, replay: dict) -> list[dict]:
    """One row per loss: its own figures, and how much more they are than those without a loss."""
    rows = []
    for name, measured in times.items():
        figures = {key: round(value, 2) for key, value in vars(measured).items()}
        none = vars(times[BASELINE])
        more = {key: round(value - none[key], 2) for key, value in vars(measured).items()}
        of_replay = replay.get(name)
        if isinstance(of_replay, float):
            figures["replay"] = round(of_replay, 2)
            if isinstance(replay.get(BASELINE), float):
                more["replay"] = round(of_replay - replay[BASELINE], 2)
        rows.append({"loss": name, "all": figures, "more": more, "not captured": None if figures.get("replay") else of_replay})
    return rows


def _without_profiler(work: Callable[[], Any], repeats: int) -> GpuWork:
    """Instead of `kernels_on_gpu`, without a GPU: only does the work."""
    for _ in range(repeats):
        work()
    return GpuWork(0, 0)


def main() -> None:
    stage = Stage("kernels")
    if stage.cpu:
        import megatron_cpu

        megatron_cpu.install()
    import router_cost

    if stage.cpu:
        router_cost.kernels_on_gpu = _without_profiler
    start(gpu=not stage.cpu)
    names = [name for name in VARIANTS if "blocking" not in name]
    models = ["qwen3-30b-a3b"] if stage.quick else list(MODELS)
    rounds = 1 if stage.cpu else 10 if stage.quick else 20
    stage.data.update(rounds=rounds, router_dtype="fp32", sizes=[])
    for model in models:
        for tokens in (64, 128) if stage.cpu else TOKENS:
            what = f"{model}, {tokens} tokens"
            if stage.left < SECONDS_OF_A_ROW:
                stage.skip(what, "no time left")
                continue
            with stage.check(what):
                times = router_cost.time_on_gpu(model, names, tokens=tokens, router_dtype="fp32", rounds=rounds)
                replay = {} if stage.cpu else times_of_replay(model, names, tokens=tokens, rounds=rounds)
                stage.data["sizes"].append({"model": model, "tokens": tokens, "rows": rows_of(times, replay)})
                stage.data["how each loss was computed"] = LOSS_PATHS
            torch.cuda.empty_cache()
    if not stage.cpu:
        with stage.check("the Triton kernels computed what they should, and nothing else"):
            for name, path in LOSS_PATHS.items():
                if VARIANTS[name].register:
                    assert path.startswith("plain" if VARIANTS[name].plain else "fused"), f"{name}: {path}"
    _check_launches(stage)
    stop()


def _check_launches(stage: Stage) -> None:
    """The promise: no more kernels than Megatron's own loss."""
    for size in stage.data["sizes"]:
        kernels = {row["loss"]: row["all"]["kernels_forward"] + row["all"]["kernels_backward"] for row in size["rows"]}
        for name in kernels.keys() - {BASELINE, "aux_loss", "global_aux_loss"}:
            if not stage.cpu:
                with stage.check(f"kernels of {name} <= aux_loss: {size['model']}, {size['tokens']} tokens"):
                    assert kernels[name] <= kernels["aux_loss"], kernels


if __name__ == "__main__":
    main()

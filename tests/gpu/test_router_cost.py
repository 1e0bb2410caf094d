"""On a GPU: the loss of one layer needs no more kernels than Megatron's `aux_loss`, fewer than `global_aux_loss`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_global_lbl.core.fused.choice import triton_problem

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: counts the kernels that really ran"),
]
TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    import routers

    routers.start(gpu=True)
    yield
    routers.stop()


@pytest.mark.parametrize("router_dtype", ["fp32", None])
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3", "paper-3.4b-a0.6b"])
def test_kernels(model, router_dtype):
    from router_cost import time_on_gpu

    losses = ["none", "aux_loss", "global_aux_loss", "dp", "global", "window"]
    times = time_on_gpu(model, losses, tokens=TOKENS, router_dtype=router_dtype, rounds=1)
    kernels = {name: figures.kernels_forward + figures.kernels_backward for name, figures in times.items()}
    for scope in ("dp", "global", "window"):
        assert kernels[scope] <= kernels["aux_loss"], kernels
        assert kernels[scope] < kernels["global_aux_loss"], kernels
    if triton_problem() is None:
        more = {name: round(kernels[name] - kernels["none"], 2) for name in losses}
        # All three forwards of the step come first here, so the first backward finds two micro-batches' counts more to add.
        assert more["window"] <= 2 and more["dp"] <= 3 and more["global"] <= 4, more


def test_bytes_kept_by_the_allocator():
    """What tests/distributed/test_loss_cost.py counts without a GPU, asked of CUDA's allocator."""
    from models import MODELS
    from routers import VARIANTS, build, end_of_step, micro_batch

    size = MODELS["qwen3-30b-a3b"]
    kept = {}
    for name in ("aux_loss", "dp", "global", "window"):
        router = build(size, VARIANTS[name], "fp32")
        hidden, gradient = micro_batch(size, TOKENS)
        with VARIANTS[name].active():
            for _ in range(2):
                before = torch.cuda.memory_allocated()
                probs, routing_map = router(hidden)
                kept[name] = torch.cuda.memory_allocated() - before
                probs.backward(gradient)
                end_of_step(router)
                del probs, routing_map
    for scope in ("dp", "global", "window"):
        # The allocator rounds every tensor up to 512 bytes; the score function's [T, E] is 2 MiB.
        assert kept[scope] <= kept["aux_loss"] + 1024, kept

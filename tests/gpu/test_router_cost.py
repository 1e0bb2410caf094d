"""On a GPU: the loss needs fewer kernels than Megatron's `aux_loss` and `global_aux_loss`, and keeps no more."""

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
    from router_cost import LAYERS, time_on_gpu

    losses = ["none", "aux_loss", "global_aux_loss", "dp", "global"]
    times = time_on_gpu(model, losses, tokens=TOKENS, router_dtype=router_dtype, rounds=1)
    kernels = {name: figures.kernels_forward + figures.kernels_backward for name, figures in times.items()}
    for scope in ("dp", "global"):
        assert kernels[scope] < kernels["aux_loss"], kernels
        assert kernels[scope] < kernels["global_aux_loss"], kernels
    if triton_problem() is None:
        more = {name: round(kernels[name] - kernels["none"], 2) for name in losses}
        # Two of each layer, and those of the micro-batch for all layers.
        assert all(more[scope] <= 2 + 8 / LAYERS for scope in ("dp", "global")), more


def test_bytes_kept_by_the_allocator():
    """What tests/distributed/test_loss_cost.py counts without a GPU, asked of CUDA's allocator."""
    from models import MODELS
    from router_cost import LAYERS
    from routers import VARIANTS, backward, build, end_of_step, micro_batch

    size = MODELS["qwen3-30b-a3b"]
    kept = {}
    for name in ("aux_loss", "dp", "global"):
        stack = build(size, VARIANTS[name], "fp32", layers=LAYERS)
        hidden, gradient = micro_batch(size, TOKENS)
        with VARIANTS[name].active(stack):
            for _ in range(2):
                before = torch.cuda.memory_allocated()
                outputs = stack(hidden)
                kept[name] = torch.cuda.memory_allocated() - before
                backward(outputs, gradient)
                end_of_step(stack)
                del outputs
    for scope in ("dp", "global"):
        # The allocator rounds every tensor up to 512 bytes; the score function's [T, E] is 2 MiB per layer.
        assert kept[scope] <= kept["aux_loss"] + 1024, kept

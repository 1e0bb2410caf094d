"""Recomputation through Transformer Engine's checkpoint function (`te_checkpoint`: fp8, fp4).

Transformer Engine needs a GPU, so its class is written down here: the signature of `_CheckpointFunction.forward` in
transformer_engine/pytorch/distributed.py (2.x), and what of it matters, that the function runs twice.
"""

from __future__ import annotations

import harness
import pytest
from compare import compare_exact, register_arguments
from layout import Layout
from truth import Problem, gradients


def recomputed_by_transformer_engine(problem, register):
    """In a worker."""
    import sys
    import types

    import torch
    import toy

    class _CheckpointFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, run_function, distribute_saved_activations, get_rng_state_tracker, tp_group, context_fn, kwargs, *args
        ):
            ctx.run_function, ctx.kwargs = run_function, kwargs
            ctx.save_for_backward(*args)
            with torch.no_grad():
                return run_function(*args, **kwargs)

        @staticmethod
        def backward(ctx, *gradients):
            inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                outputs = ctx.run_function(*inputs, **ctx.kwargs)
            torch.autograd.backward((outputs,), gradients)
            return (None,) * 6 + tuple(tensor.grad for tensor in inputs)

    name, original = "transformer_engine.pytorch.distributed", toy.tensor_parallel.checkpoint
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name]._CheckpointFunction = _CheckpointFunction
    toy.tensor_parallel.checkpoint = lambda function, distribute, *inputs: _CheckpointFunction.apply(
        function, distribute, None, None, None, {}, *inputs
    )
    try:
        result = harness.run(problem, Layout(recompute="full"), register)
        assert "apply" not in vars(_CheckpointFunction), "not undone"
        return result
    finally:
        toy.tensor_parallel.checkpoint = original
        del sys.modules[name]


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_gradient(workers, scope):
    problem = Problem(scope, 2, 3, 3, masks="uneven")
    ranks = workers.run(recomputed_by_transformer_engine, 2, problem, register_arguments(problem))
    expected = gradients(problem)
    for rank in ranks:
        assert "transformer_engine.pytorch.distributed._CheckpointFunction.apply" in rank["hooked"]
        for step, by_layer in enumerate(rank["grads"]):
            for number, pair in by_layer.items():
                for actual, true in zip(pair, expected[step][number - 1]):
                    compare_exact(actual, true, f"step {step} layer {number}")
    assert expected[-1][0][1].norm() > 0

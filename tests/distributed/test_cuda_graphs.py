"""A router in a CUDA graph: what its replay must do without Python. The capture flag is faked and the graph recorded on the
CPU (recorded_graph.py); tests/gpu has the same with real graphs."""

from __future__ import annotations

import harness
import pytest
import torch
import truth
from compare import _compare, register_arguments
from layout import Layout
from truth import Problem, inputs, weights
from workers import CaseFailed


def train_captured(problem: Problem, register: dict) -> dict:
    """Gradients of one layer's router, [step], whose forward and backward are captured once and replayed ever after."""
    from recorded_graph import RecordedGraph

    import megatron_global_lbl as lbl
    from megatron_global_lbl import balance, collective, engine

    modules = (balance, collective, engine)
    with lbl.registered(**register):
        _, _, (chunk,) = harness.build(problem, Layout(), {})
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        router = chunk.blocks[0].router
        rank = torch.distributed.get_rank()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / problem.micro_batches))
        static = inputs(problem, 0)[0][0, rank].clone()

        def forward():
            return router(static @ chunk.blocks[0].below.t())[0]

        def backward(probs):
            return torch.autograd.grad(probs, router.weight, torch.zeros_like(probs))[0]

        chunk.load(weights(problem, 0))
        backward(forward())  # warm-up, not counted
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads.__globals__["reset_model_temporary_tensors"](router.config, [chunk])
        graphs = RecordedGraph(), RecordedGraph()
        for module in modules:
            module.is_capturing = lambda tensor: True
        try:
            with graphs[0]:
                probs = forward()
            assert not chunk_is_waiting(lbl), "a reduction that was captured is not waited for within the capture"
            with graphs[1]:
                gradient = backward(probs)
        finally:
            for module in modules:
                module.is_capturing = collective_is_capturing
        finalize_model_grads.__globals__["reset_model_temporary_tensors"](router.config, [chunk])
        steps = []
        for step in range(problem.steps):
            chunk.load(weights(problem, step))
            total = torch.zeros_like(gradient)
            for m in range(problem.micro_batches):
                static.copy_(inputs(problem, step)[0][m, rank])
                for graph in graphs:
                    graph.replay()
                total += gradient
            torch.distributed.all_reduce(total)
            steps.append(total / problem.dp)
            lbl.end_step()
    return {"grads": steps, "forward": graphs[0].names()}


def collective_is_capturing(tensor) -> bool:
    return False


def chunk_is_waiting(lbl) -> bool:
    from megatron_global_lbl import registry

    return any(layer.started for layer in registry._active._engine._layers.values())


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_replay_counts_and_gives_the_gradient(workers, scope):
    problem = Problem(scope, 2, 3, 4, layers=1, window_steps=2)
    ranks = workers.run(train_captured, 2, problem, register_arguments(problem))
    expected = truth.gradients(problem)
    for result in ranks:
        collectives = [name for name in result["forward"] if "allreduce" in name]
        assert len(collectives) == (scope != "window"), "the collective belongs into the captured forward"
        for step, actual in enumerate(result["grads"]):
            _compare(actual, expected[step][0][1], f"step {step}")
    assert expected[-1][0][1].norm() > 0


@pytest.mark.parametrize("option", [{"metrics_dir": "x"}, {"start_iter": 1}])
def test_what_needs_python_in_every_forward_is_refused(workers, option):
    problem = Problem("global", 1, 1, layers=1)
    with pytest.raises(CaseFailed, match="not supported with CUDA graphs"):
        workers.run(train_captured, 1, problem, {"scope": "global", **option})


def test_graphs_of_the_whole_iteration_are_refused(workers):
    problem = Problem("global", 1, 1)
    with pytest.raises(CaseFailed, match="full_iteration CUDA graphs; allowed: CUDA graphs of layers"):
        workers.run(_with_graphs, 1, problem)


def _with_graphs(problem):
    original = harness.build

    def build(*arguments):
        config, model, chunks = original(*arguments)
        config.cuda_graph_impl = "full_iteration"
        return config, model, chunks

    harness.build = build
    try:
        return harness.run(problem, Layout(), {"scope": "global"})
    finally:
        harness.build = original

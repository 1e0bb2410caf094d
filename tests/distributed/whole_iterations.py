"""Trains the toy model with Megatron's `FullCudaGraphWrapper`: steps in Python, then one capture of forwards, backwards and
`finalize_model_grads`, which is replayed ever after. An evaluation between the steps has a graph of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import torch
import truth
from compare import compare_exact
from faked_graph import faked_cuda_graphs
from layout import Layout
from logged import of_the_log
from megatron_log import forget_logged_losses, reported
from truth import Problem, weights

WARM_UP = 2


def train(
    problem: Problem,
    layout: Layout,
    register: dict,
    overflow_at: int | None = None,
    extra: dict | None = None,
    warm_up: int = WARM_UP,
    on_gpu: bool = False,
) -> dict:
    """One rank's part: {"grads": as `harness.run` has them, "logged": Megatron's load_balancing_loss summed over the steps,
    "captured": the stages that have a graph at the end}.

    Args:
        problem: of more steps than the warm-up.
        layout: without pipeline parallelism.
        register: arguments of `lbl.register`.
        overflow_at: a step whose first attempt Megatron's `PagedStashRunner` gives up (since 0.18).
        extra: fields of TransformerConfig, as `harness.run` takes them.
        warm_up: steps before the capture.
        on_gpu: real CUDA graphs; otherwise faked ones.
    """
    import megatron_global_lbl as lbl

    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(lbl.registered(**register))
        stack.enter_context(_forgotten_graphs(on_gpu))
        forget_logged_losses()
        with _capture_stream():
            _, model, (chunk,) = harness.build(problem, layout, extra or {})
        if on_gpu:  # what Megatron's arguments see to: generators that a graph can hold
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed as seed

            seed(1, use_cudagraphable_rng=True, force_reset_rng=True)
            stack.callback(seed, 1, force_reset_rng=True)
        run, evaluate = _wrapper(warm_up), _wrapper(warm_up)
        train_step = run if overflow_at is None else _runner(run, model, overflow_at)
        grads = []
        for step in range(problem.steps):
            chunk.load(weights(problem, step))
            model[0].zero_grad_buffer()
            model[0].train()
            _call(train_step, problem, layout, model, step, forward_only=False)
            grads.append({block.number: harness._main_grads(block, layout) for block in chunk.blocks})
            model[0].eval()
            with torch.no_grad():
                _call(evaluate, problem, layout, model, problem.steps + step, forward_only=True)
        logged = reported(["load_balancing_loss"], problem.micro_batches, problem.layers).get("load_balancing_loss")
        told = handle.metrics() if register.get("metrics") else {}
        harness.make_collectable(model)
        return {"grads": grads, "logged": logged, "captured": _captured(), "metrics": told}


def check(ranks: list[dict], problem: Problem) -> None:
    """Every step's gradients on every rank, and the log of all steps."""
    expected = truth.gradients(problem)
    for rank, result in enumerate(ranks):
        assert result["captured"] == ["training", "validation"]
        assert result["logged"] == pytest.approx(of_the_log(dataclasses.replace(problem, micro_coeff=0)), rel=1e-5)
        for step, by_layer in enumerate(result["grads"]):
            for number, pair in by_layer.items():
                for name, actual, true in zip(("below", "router"), pair, expected[step][number - 1], strict=True):
                    compare_exact(actual, true, f"rank {rank} step {step} layer {number} {name}")
    assert all(pair[1].norm() > 0 for step in expected[1:] for pair in step)


@contextlib.contextmanager
def _capture_stream() -> Iterator[None]:
    """Where Megatron wraps a model in DDP, so that what its gradients are added by is not bound to another stream."""
    from megatron.core import full_cuda_graph

    stream = getattr(full_cuda_graph, "get_shared_capture_stream", torch.cuda.Stream)()  # since 0.18
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _wrapper(warm_up: int) -> Any:
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return FullCudaGraphWrapper(get_forward_backward_func(), cuda_graph_warmup_steps=warm_up)


def _captured() -> list[str]:
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    return sorted(name for name, graph in FullCudaGraphWrapper.cuda_graph.items() if graph is not None)


def _runner(run: Callable, model: list, overflow_at: int) -> Any:
    """A `PagedStashRunner` around the graph, without buffers that could overflow: that they do is said after one attempt."""
    from megatron.core.transformer.moe.paged_stash import PagedStashRunner

    runner = object.__new__(PagedStashRunner)
    runner.stash_manager = SimpleNamespace(overflow=None, host_spill=None, release_stash_buffers=lambda: None)
    runner.config = SimpleNamespace(moe_paged_stash=False)
    runner.model, runner.moe_layers, runner._configs_to_sync_moe_paged_stash = model, [], []
    runner.optimizer, runner.copy_main_params, runner.forward_backward_func = None, False, run
    attempts = itertools.count()
    runner.check_moe_overflow = lambda: (int(next(attempts) == overflow_at), 0, 0)
    return runner


def _call(run: Callable, problem: Problem, layout: Layout, model: list, step: int, *, forward_only: bool) -> None:
    shards = harness._my_shards(problem, layout, step)
    batches = [{"x": x, **({} if padding is None else {"padding": padding})} for x, padding in shards]
    run(
        forward_step_func=partial(_forward_step, problem),
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=problem.seq,
        micro_batch_size=problem.batch,
        forward_only=forward_only,
    )


def _forward_step(problem: Problem, data_iterator: Iterator, model: Any):
    batch = next(data_iterator)
    return harness._forward_step(problem, 0.0, iter([(batch["x"], batch.get("padding"))]), model)


@contextlib.contextmanager
def _forgotten_graphs(on_gpu: bool) -> Iterator[None]:
    """Megatron keeps its graphs and their inputs in classes: none is left from before, none is left behind."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

    def forget() -> None:
        for stage in ("training", "validation"):
            FullCudaGraphWrapper.curr_iteration[stage] = 0
            FullCudaGraphWrapper.cuda_graph[stage] = FullCudaGraphWrapper.result[stage] = None
            StaticBufferLoader.static_buffers[stage] = []

    forget()
    with contextlib.nullcontext() if on_gpu else faked_cuda_graphs():
        yield
    forget()

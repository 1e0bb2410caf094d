"""Trains one router whose forward and backward are captured once and replayed ever after."""

from __future__ import annotations

import harness
import torch
from faked_graph import FakedGraph
from layout import Layout
from megatron_log import forget_logged_losses, reported
from truth import Problem, inputs, weights

from megatron_global_lbl.core.fused.choice import FUSED


def train_captured(
    problem: Problem, register: dict, on_gpu: bool = False, fused: bool | None = None, combined: bool = False
) -> dict:
    """One rank's part: {"grads": [step] gradient of the router's weight, "collectives": how many the captured forward holds,
    "logged": Megatron's load_balancing_loss, summed over the steps, "fused": whether the kernels computed the loss}.

    Args:
        problem: of one layer; data parallelism only.
        register: arguments of `lbl.register`.
        on_gpu: real CUDA graphs; otherwise recorded operations and a faked capture flag.
        combined: the configuration asks for combined 1F1B.
        fused: by the Triton kernels or in plain PyTorch; None: as it comes.
    """
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    import megatron_global_lbl as lbl

    with harness.loss_path(fused), lbl.registered(**register) as handle:
        forget_logged_losses()
        with _on_side_stream(
            on_gpu
        ):  # as Megatron wraps in DDP: a graph cannot hold gradients that accumulate on the legacy stream
            _, (wrapped,), (chunk,) = harness.build(problem, Layout(combined=combined), {})
        block, rank = chunk.blocks[0], torch.distributed.get_rank()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0 / problem.micro_batches]).cuda())
        static = inputs(problem, 0)[0][0, rank].clone().cuda()

        def forward():
            return block.router(static @ block.below.t())[0]

        def backward(probs):
            return torch.autograd.grad(probs, block.router.weight, torch.zeros_like(probs))[0]

        def forget_uncounted():
            # What Megatron calls after warm-up and capture, whose forwards are no training.
            finalize_model_grads.__globals__["reset_model_temporary_tensors"](block.router.config, [chunk])

        chunk.load(weights(problem, 0))
        wrapped.zero_grad_buffer()
        with _on_side_stream(on_gpu):
            backward(forward())
        forget_uncounted()
        make = _CudaGraph if on_gpu else FakedGraph
        forward_graph, backward_graph = make(), make()
        with forward_graph:
            probs = forward()
        with backward_graph:
            gradient = backward(probs)
        forget_uncounted()

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                forward_graph.replay()
                return x * 1

            @staticmethod
            def backward(ctx, incoming):
                backward_graph.replay()
                return incoming

        from megatron.core.distributed.data_parallel_base import _BaseDataParallel

        class Replayed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.chunk = chunk

            def forward(self, x):
                return Replay.apply(x)

        model = _BaseDataParallel(block.router.config, Replayed())
        x = torch.zeros(1, requires_grad=True)

        def micro_batch():
            model(x).sum().backward()

        steps = []
        for step in range(problem.steps):
            chunk.load(weights(problem, step))
            if step == 1:  # a step that fails after its first micro-batch
                micro_batch()
            if step == 2:  # the same in a loop without DDP
                forward_graph.replay()
                handle.discard_step()
                counted = next(iter(handle._steps.layers.values())).chunk
                assert not counted.counts_LE.any() and not counted.replayed.counts_RE.any(), "counts of a step that failed"
            wrapped.zero_grad_buffer()
            total = torch.zeros_like(gradient)
            for m in range(problem.micro_batches):
                static.copy_(inputs(problem, step)[0][m, rank])
                micro_batch()
                total += gradient
            torch.distributed.all_reduce(total)
            steps.append((total / problem.dp).cpu())
            lbl.end_step()
        logged = reported(["load_balancing_loss"], problem.micro_batches, 1)["load_balancing_loss"]
        paths = set(handle.loss_paths.values())
        told = handle.metrics() if register.get("metrics") else {}
    return {
        "metrics": told,
        "grads": steps,
        "collectives": forward_graph.collectives(),
        "logged": logged,
        "fused": paths == {FUSED},
    }


class _CudaGraph:
    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._capture = torch.cuda.graph(self._graph)

    def __enter__(self) -> None:
        self._capture.__enter__()

    def __exit__(self, *exception) -> None:
        self._capture.__exit__(*exception)

    def replay(self) -> None:
        self._graph.replay()

    def collectives(self) -> None:
        return None  # not visible from outside


class _on_side_stream:
    """As PyTorch asks for it of a model, and of its warm-up before a capture."""

    def __init__(self, on_gpu: bool) -> None:
        self._stream = torch.cuda.Stream()
        self._context = torch.cuda.stream(self._stream)
        self._on_gpu = on_gpu

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._context.__enter__()

    def __exit__(self, *exception) -> None:
        self._context.__exit__(*exception)
        torch.cuda.current_stream().wait_stream(self._stream)

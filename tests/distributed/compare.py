"""Compares what arrived in `main_grad` on every rank with the truth."""

from __future__ import annotations

import dataclasses

import harness
import torch
import truth
from core_cases import masks_of_release
from layout import Layout
from truth import Problem

from megatron_global_lbl.core.fused.choice import FUSED

RELATIVE_ERROR = 1e-5
DATA_PARALLEL = Layout()
# Low-precision activations, f exact.
DIRECTION_ERROR = 1e-2
NORM_ERROR = 1e-3


def register_arguments(problem: Problem) -> dict:
    """Arguments of `lbl.register` for a problem."""
    arguments = {"scope": problem.scope, "group_size": problem.group_size}
    arguments |= {"micro_coeff": problem.micro_coeff, "start_iter": problem.start_iter}
    return arguments


def run_ranks(
    workers, problem: Problem, layout: Layout, register: dict | None, fused: bool | None = None, **extra
) -> list[dict]:
    """What `harness.run` returns, of every rank."""
    problem = dataclasses.replace(problem, pipeline=(layout.pp, layout.chunks), combined=layout.combined)
    return workers.run(harness.run_with_path, layout.world_size(problem), fused, problem, layout, register, extra)


def check(
    workers,
    problem: Problem,
    layout: Layout = DATA_PARALLEL,
    *,
    without: dict | None = None,
    fused: bool | None = None,
    register: dict | None = None,
    **extra,
):
    """Every layer's gradients on every rank, every step, against the truth.

    Args:
        problem: what is computed.
        layout: how.
        without: fields of TransformerConfig for a run of Megatron alone whose gradient is subtracted: its own other losses.
        fused: every loss has to be computed by the Triton kernels, or none; None: as it comes.
        register: more arguments of `lbl.register`.
        extra: more fields of TransformerConfig.
    """
    masks = masks_of_release(problem, layout)
    problem = dataclasses.replace(problem, pipeline=(layout.pp, layout.chunks), combined=layout.combined, masks=masks)
    registered = register_arguments(problem) | (register or {})
    ranks = run_ranks(workers, problem, layout, registered, fused, **extra)
    low_precision = problem.dtype != "float32"
    expected = truth.gradients(problem, assembled_selections(problem, ranks) if low_precision else None)
    baseline = None if without is None else run_ranks(workers, problem, layout, None, **{**extra, **without})
    if fused is not None:
        paths = {path for rank in ranks for path in rank["loss_paths"].values()}
        assert {path == FUSED for path in paths} == {fused}, f"another path than asked for: {paths}"
    compared = overflowed = 0
    for rank, result in enumerate(ranks):
        for step, by_layer in enumerate(result["grads"]):
            for number, pair in by_layer.items():
                for name, position in (("below", 0), ("router", 1)):
                    actual, true = pair[position], expected[step][number - 1][position]
                    if actual is None:
                        continue
                    if baseline is not None:
                        actual = actual - baseline[rank]["grads"][step][number][position]
                    if step == layout.overflow_at:
                        overflowed += not actual.isfinite().all()
                        continue
                    where = f"rank {rank} step {step} layer {number} {name}"
                    (_compare_low_precision if low_precision else compare_exact)(actual, true, where)
                    compared += int(true.norm() > 0)
    assert compared >= problem.layers - len(problem.dense), "nothing but zero gradients was compared"
    assert (overflowed > 0) == (layout.overflow_at is not None)


def compare_exact(actual: torch.Tensor, true: torch.Tensor, where: str) -> None:
    """To 1e-5 relative; a true gradient of zero must be zero to 1e-5."""
    difference = float((actual.double() - true).norm())
    error = difference / float(true.norm()) if true.norm() > 0 else difference
    assert error <= RELATIVE_ERROR, f"{where}: relative error {error:.2e}"


def _compare_low_precision(actual: torch.Tensor, true: torch.Tensor, where: str) -> None:
    if true.norm() == 0:
        assert actual.norm() == 0, f"{where}: should be zero"
        return
    direction = float((actual.double() / actual.double().norm() - true / true.norm()).norm())
    norm = abs(float(actual.double().norm() / true.norm()) - 1)
    assert direction <= DIRECTION_ERROR, f"{where}: direction {direction:.2e}"
    assert norm <= NORM_ERROR, f"{where}: norm {norm:.2e}"


def assembled_selections(problem: Problem, ranks: list[dict]) -> list[list[torch.Tensor | None]]:
    """[step][block] -> [M, D, S, B, E] bool, put together from what the ranks' routers selected."""
    result: list[list[torch.Tensor | None]] = []
    for step in range(problem.steps):
        blocks: list[torch.Tensor | None] = [None] * problem.blocks
        shape = (problem.micro_batches_at(step), problem.dp, problem.seq, problem.batch, problem.experts)
        for rank in ranks:
            d, part, parts = rank["place"]
            rows = slice(part * problem.seq // parts, (part + 1) * problem.seq // parts)
            for number, maps in rank["selections"][step].items():
                if blocks[number - 1] is None:
                    blocks[number - 1] = torch.zeros(shape, dtype=torch.bool)
                for m, selection in enumerate(maps):
                    blocks[number - 1][m, d, rows] = selection
        result.append(blocks)
    return result

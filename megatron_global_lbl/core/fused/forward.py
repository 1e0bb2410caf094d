"""A forward that the kernels count, and its backward. No host synchronisation, nothing that a CUDA graph cannot hold.

Shape suffixes: T tokens on this rank, E experts, R rows of a micro-batch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from megatron_global_lbl.core.fused.kernels import BY_NAME, count_kernel, logits_kernel, rows_kernel

if TYPE_CHECKING:
    from megatron_global_lbl.core.forward import CountedForward

# Numbers of a block: with 4 warps 16 in every thread, which leaves the registers for what is computed from them.
BLOCK = 2048
# Programs of the forward: about one per multiprocessor of today's GPUs. More would be more shares to add up at the end.
PROGRAMS = 128
# From 3.6 on a compiled kernel takes its constants as well (read in 3.6.0 and 3.7.1, PyTorch 2.11 to 2.13).
DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def count(
    counted: CountedForward, logits: Tensor, selection: Tensor, padding_mask: Tensor | None, *, score_function: str
) -> None:
    """Count a forward and sum its scores into its row of the micro-batch.

    Args:
        counted: its row.
        logits: [T, E] of the router.
        selection: [T, E] bool, the experts that the router selected for each token.
        padding_mask: [T] bool, True for padding; None when every token is valid.
        score_function: Megatron's name of it.
    """
    counts_E, sums_E = counted.tables()
    if counted.batch is None:  # a replay; several may come in a row
        replay_E, replay_sums_E = torch.empty_like(counts_E), torch.empty_like(sums_E)
    else:
        replay_E, replay_sums_E = counts_E, sums_E
        counted.batch.fused = True
    logits = logits if logits.is_contiguous() else logits.detach().contiguous()
    ticket = counted.layer.ticket
    count_into(replay_E, replay_sums_E, logits, selection, padding_mask, score_function=score_function, ticket=ticket)
    if counted.batch is None:
        counts_E.add_(replay_E)
        sums_E.add_(replay_sums_E)


def count_into(
    counts_E: Tensor,
    sums_E: Tensor,
    logits: Tensor,
    selection: Tensor,
    padding_mask: Tensor | None,
    *,
    score_function: str,
    ticket: Tensor,
) -> None:
    """Selections and summed scores of the valid tokens.

    Args:
        counts_E: [E] int32, written.
        sums_E: [E] float32, written.
        logits: [T, E] float32, bfloat16 or float16, contiguous.
        selection: [T, E] bool.
        padding_mask: [T] bool, True for padding, or None.
        score_function: one of `BY_NAME`.
        ticket: a zero, int32; no two launches may use one at the same time.
    """
    (tokens, experts), device = logits.shape, logits.device
    block_E, block_T = _blocks(experts)
    programs = max(1, min((tokens + block_T - 1) // block_T, PROGRAMS))
    selected = _as_bytes(selection)
    padding = selected if padding_mask is None else _as_bytes(padding_mask)
    shares = torch.empty((programs, block_E), dtype=torch.int32, device=device)
    share_sums = torch.empty((programs, block_E), device=device)
    _launch(
        count_kernel,
        programs,
        (logits, selected, padding, shares, share_sums, ticket, counts_E, sums_E, tokens),
        # E, BLOCK_E, BLOCK_T, FUNCTION, PADDED
        (experts, block_E, block_T, BY_NAME[score_function], padding_mask is not None),
        (logits.dtype, device),
        logits.data_ptr() | selected.data_ptr() | padding.data_ptr(),
    )


def gradient_rows(counts_RE: Tensor, own_RE: Tensor | None, factor: Tensor | float) -> Tensor:
    """[R, E] float32, factor * E * f [/ selections in own_RE] of all layers.

    Args:
        counts_RE: [R, E] int32 or int64, over which f is counted.
        own_RE: [R, E] int32; None: not divided.
        factor: a number, or [R, 1] float32.
    """
    rows, experts = counts_RE.shape
    gradients_RE = torch.empty(rows, experts, device=counts_RE.device)
    own = counts_RE if own_RE is None else own_RE
    unlike = isinstance(factor, Tensor)
    _launch(
        rows_kernel,
        rows,
        (
            *(counts_RE, counts_RE.stride(0), own, own.stride(0)),
            *(0.0 if unlike else factor, factor if unlike else gradients_RE, gradients_RE),
        ),
        # E, BLOCK_E, MEAN, UNLIKE
        (experts, _blocks(experts)[0], own_RE is not None, unlike),
        (counts_RE.dtype, own.dtype, counts_RE.device),
        counts_RE.data_ptr() | own.data_ptr() | (factor.data_ptr() if isinstance(factor, Tensor) else 0),
    )
    return gradients_RE


def add_to_gradient(
    logits: Tensor, padding_mask: Tensor | None, gradient_E: Tensor, factor: float, incoming: Tensor, *, score_function: str
) -> Tensor:
    """[T, E] gradient of the logits: `incoming`, and that of scores whose every valid row has the gradient `gradient_E`
    (float32) times `factor`."""
    (tokens, experts), device = logits.shape, logits.device
    block_E, block_T = _blocks(experts)
    incoming = incoming.contiguous()
    outgoing = torch.empty_like(incoming)
    if tokens == 0:
        return outgoing
    logits = logits if logits.is_contiguous() else logits.contiguous()
    padding = logits if padding_mask is None else _as_bytes(padding_mask)
    _launch(
        logits_kernel,
        (tokens + block_T - 1) // block_T,
        (logits, padding, gradient_E, float(factor), incoming, outgoing, tokens),
        # E, BLOCK_E, BLOCK_T, FUNCTION, PADDED
        (experts, block_E, block_T, BY_NAME[score_function], padding_mask is not None),
        (logits.dtype, incoming.dtype, device),
        logits.data_ptr() | padding.data_ptr() | incoming.data_ptr(),
    )
    return outgoing


@functools.cache
def _blocks(experts: int) -> tuple[int, int]:
    """BLOCK_E and BLOCK_T of the kernels on [T, E]."""
    block_E = triton.next_power_of_2(experts)
    return block_E, max(1, BLOCK // block_E)


_compiled: dict[tuple, CompiledKernel] = {}
"""What Triton compiled, by everything that it is compiled for."""


def _launch(kernel: Any, programs: int, arguments: tuple, constants: tuple, kind: tuple, addresses: int) -> None:
    """Launch a kernel. Triton looks up for every launch which of its compiled kernels is meant, which takes 10 us of the host's
    time; a compiled kernel is launched in 3 (benchmarks/host_cost.py).

    Args:
        kernel: what to launch.
        programs: of its grid.
        arguments: those that are not constants. Their types follow from `kind`; no number is specialized (do_not_specialize).
        constants: in the order of the kernel's parameters, after the arguments.
        kind: types and device of the arguments.
        addresses: of the tensors that are specialized and come from elsewhere, combined by "or".
    """
    if addresses % 16:  # Triton compiles for the alignment that it finds
        kernel[(programs,)](*arguments, *constants)
        return
    key = (kernel.__name__, constants, kind)  # a kernel's own hash is computed in Python
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    compiled = kernel[(programs,)](*arguments, *constants)
    if DIRECT and isinstance(compiled, CompiledKernel):  # not in Triton's interpreter
        _compiled[key] = compiled


def _as_bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)

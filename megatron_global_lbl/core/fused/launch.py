"""Starts the kernels, on the current stream: no host synchronisation, nothing that a CUDA graph cannot hold.

Shape suffixes: T tokens on this rank, E experts, C = E + 1 counts (selections per expert, and forwards).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_global_lbl.core.fused.count_kernel import count_kernel
from megatron_global_lbl.core.fused.logits_kernel import logits_kernel
from megatron_global_lbl.core.fused.score_functions import BY_NAME
from megatron_global_lbl.core.fused.vector_kernel import BY_SCOPE, vector_kernel
from megatron_global_lbl.settings import Scope

# Numbers of a block: with 4 warps 16 in every thread, which leaves the registers for what is worked out of them.
BLOCK = 2048
# Programs of the forward: about one per multiprocessor of today's GPUs. More would be more shares to add up at the end.
PROGRAMS = 128


def count(
    logits: Tensor,
    selection: Tensor,
    padding_mask: Tensor | None,
    *,
    score_function: str,
    copies: int,
    ticket: Tensor,
    step_C: Tensor,
    scope: Scope,
    add_sums_to: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Selections and summed scores of the valid tokens.

    Args:
        logits: [T, E] float32, bfloat16 or float16.
        selection: [T, E] bool.
        padding_mask: [T] bool, True for padding, or None.
        score_function: one of `BY_NAME`.
        copies: of the counts to make: what is summed over ranks is summed in place.
        ticket: a zero, int32; no two launches may use one at the same time.
        step_C: [C] int64; GLOBAL adds the forward to it, WINDOW the forward and its counts.
        scope: the balance batch.
        add_sums_to: [E] float32 to add the summed scores to; None puts them into a tensor of their own.

    Returns:
        [copies, E] int32, [E] float32 (`add_sums_to` if it is given).
    """
    tokens, experts = logits.shape
    constants = _constants(logits, padding_mask, score_function)
    programs = max(1, min(triton.cdiv(tokens, constants["BLOCK_T"]), PROGRAMS))
    shares = (programs, constants["BLOCK_E"])
    counts = torch.empty((copies, experts), dtype=torch.int32, device=logits.device)
    sums = torch.empty(experts, dtype=torch.float32, device=logits.device) if add_sums_to is None else add_sums_to
    selected = _as_bytes(selection)
    count_kernel[(programs,)](
        logits,
        selected,
        selected if padding_mask is None else _as_bytes(padding_mask),
        torch.empty(shares, dtype=torch.int32, device=logits.device),
        torch.empty(shares, dtype=torch.float32, device=logits.device),
        ticket,
        counts,
        step_C,
        sums,
        tokens,
        **constants,
        COPIES=copies,
        STEP={Scope.DP: 0, Scope.GLOBAL: 1, Scope.WINDOW: 2}[scope],
        ADD_SUMS=add_sums_to is not None,
    )
    return counts, sums


def score_gradient(
    *,
    scope: Scope,
    own_E: Tensor,
    step_C: Tensor,
    pending_E: Tensor | None,
    micro_E: Tensor | None,
    window_E: Tensor | None,
    sums_E: Tensor,
    step_sums_E: Tensor,
    coeff: float,
    micro_coeff: float,
    topk: int,
    ranks: int,
    per_token: bool,
) -> Tensor:
    """What `CountedForward.score_gradient` gives, [E] float32; brings the step's counts and summed scores up to date.

    Args:
        scope: the balance batch.
        own_E: int32 counts of this micro-batch over the ranks.
        step_C: int64 counts of the step, added to in GLOBAL.
        pending_E: int32 counts that are added to them, or None.
        micro_E: int32 counts of this micro-batch on this data-parallel rank; None without a micro-batch LBL.
        window_E: float32 gradient for alpha = 1, in WINDOW.
        sums_E: summed scores of this micro-batch.
        step_sums_E: summed scores of the step, added to (but in WINDOW).
        coeff: alpha.
        micro_coeff: of the micro-batch LBL.
        topk: experts per token.
        ranks: data-parallel ranks that were counted.
        per_token: p is not divided.
    """
    experts = len(sums_E)
    gradient_E = torch.empty(experts, dtype=torch.float32, device=sums_E.device)
    vector_kernel[(1,)](
        own_E,
        step_C,
        own_E if pending_E is None else pending_E,
        int(pending_E is not None),
        own_E if micro_E is None else micro_E,
        sums_E if window_E is None else window_E,
        sums_E,
        step_sums_E,
        gradient_E,
        float(coeff),
        float(topk * ranks),
        float(micro_coeff),
        float(topk),
        E=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        SCOPE=BY_SCOPE[scope.value],
        PER_TOKEN=per_token,
        MICRO=micro_E is not None,
    )
    return gradient_E


def add_to_gradient(
    logits: Tensor,
    padding_mask: Tensor | None,
    gradient_E: Tensor,
    factor: float,
    scale: Tensor | float,
    incoming: Tensor,
    *,
    score_function: str,
) -> Tensor:
    """[T, E] gradient of the logits: `incoming`, and that of scores whose every valid row has the gradient `gradient_E`
    (float32) times `factor` times `scale` (a number, or a tensor of one)."""
    tokens = len(logits)
    constants = _constants(logits, padding_mask, score_function)
    incoming = incoming.contiguous()
    outgoing = torch.empty_like(incoming)
    if tokens == 0:
        return outgoing
    scaled = isinstance(scale, Tensor)
    if isinstance(scale, Tensor):
        scale = scale.to(device=logits.device, dtype=torch.float32)
    else:
        factor = factor * scale
    logits_kernel[(triton.cdiv(tokens, constants["BLOCK_T"]),)](
        logits,
        logits if padding_mask is None else _as_bytes(padding_mask),
        gradient_E,
        float(factor),
        scale if scaled else gradient_E,
        incoming,
        outgoing,
        tokens,
        **constants,
        SCALED=scaled,
    )
    return outgoing


def _constants(logits: Tensor, padding_mask: Tensor | None, score_function: str) -> dict[str, int]:
    """What the kernels on [T, E] are compiled for."""
    experts = logits.shape[1]
    block_E = triton.next_power_of_2(experts)
    sizes = {"E": experts, "BLOCK_E": block_E, "BLOCK_T": max(1, BLOCK // block_E)}
    return sizes | {"FUNCTION": BY_NAME[score_function], "PADDED": padding_mask is not None}


def _as_bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)

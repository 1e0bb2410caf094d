"""Backward, on E numbers: the step's counts, f, and the gradient with respect to a token's scores. What it computes is
`CountedForward.score_gradient` (balance.py), and the log's sums with it."""

import triton
import triton.language as tl

DP = tl.constexpr(0)
GLOBAL = tl.constexpr(1)
WINDOW = tl.constexpr(2)
BY_SCOPE = {"dp": 0, "global": 1, "window": 2}


@triton.jit
def _part(counts, selections, factor, E: tl.constexpr):
    """[E] factor * E * f_i / selections, as `loss.score_gradient`."""
    return counts.to(tl.float32) / tl.maximum(tl.sum(counts, 0).to(tl.float32) * selections, 1.0) * (factor * E)


@triton.jit(do_not_specialize=["own", "step", "pending", "add_pending", "micro", "window", "sums", "step_sums"])
def vector_kernel(
    own,  # [E] int32 counts of this micro-batch over the ranks; not in WINDOW
    step,  # [E + 1] int64 counts of the step; read and added to in GLOBAL
    pending,  # [E] int32 that the step has not got yet
    add_pending,  # whether there are any
    micro,  # [E] int32 counts of this micro-batch on this data-parallel rank; read if MICRO
    window,  # [E] float32 gradient for alpha = 1 that the window has worked out; read in WINDOW
    sums,  # [E] float32 summed scores; not in WINDOW
    step_sums,  # [E] float32 summed scores of the step, for the log (in DP: times f, whatever alpha), added to; not in WINDOW
    gradient,  # [E] float32, written
    coeff,  # alpha
    per_rank,  # top-k times ranks: selections over all ranks, divided by it, are the tokens of a rank
    micro_coeff,
    micro_per_rank,  # top-k
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCOPE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MICRO: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    if SCOPE == WINDOW:
        g = tl.load(window + e, mask=inside, other=0.0) * coeff
    else:
        own_E = tl.load(own + e, mask=inside, other=0).to(tl.int64)
        selections = tl.sum(own_E, 0).to(tl.float32)
        log = tl.load(sums + e, mask=inside, other=0.0)
        if SCOPE == DP:
            counts = own_E
            log = log * _part(counts, selections, per_rank, E)
        else:
            counts = tl.load(step + e, mask=inside, other=0)
            counts += tl.load(pending + e, mask=inside & (add_pending != 0), other=0).to(tl.int64)
            tl.store(step + e, counts, mask=inside)
        tl.store(step_sums + e, tl.load(step_sums + e, mask=inside, other=0.0) + log, mask=inside)
        if PER_TOKEN:
            g = _part(counts, 1.0, coeff, E)
        else:
            g = _part(counts, selections, coeff * per_rank, E)
    if MICRO:
        micro_E = tl.load(micro + e, mask=inside, other=0).to(tl.int64)
        if PER_TOKEN:
            g += _part(micro_E, 1.0, micro_coeff, E)
        else:
            g += _part(micro_E, tl.sum(micro_E, 0).to(tl.float32), micro_coeff * micro_per_rank, E)
    tl.store(gradient + e, g, mask=inside)

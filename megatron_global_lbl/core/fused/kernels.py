"""The kernels: count (forward), logits (backward), and rows (once per micro-batch for all layers).

Scores and their slope are worked out in float32, as Megatron computes them:

    s = a / sum_j a_j with a = exp(x) (softmax), sigmoid(x) or sqrt(softplus(x))
    d_j = slope_j * (g_j - sum_i s_i g_i), the logits' gradient of a gradient g of the scores; slope = a'(x) / sum_j a_j
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SQRTSOFTPLUS = tl.constexpr(2)
BY_NAME = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}


@triton.jit
def scores_and_slopes(logits, columns, FUNCTION: tl.constexpr):
    """(s, slope) of a block of rows; zero beyond the columns.

    Args:
        logits: [rows, columns] float32.
        columns: [1, columns] bool, the experts that there are.
        FUNCTION: one of the above.
    """
    if FUNCTION == SOFTMAX:
        logits = tl.where(columns, logits, float("-inf"))
        a = tl.exp(logits - tl.max(logits, 1)[:, None])
        slope = a
        total = tl.sum(a, 1)[:, None]
    else:
        small = tl.exp(-tl.abs(logits))  # in (0, 1]: no overflow, no cancellation below
        if FUNCTION == SIGMOID:
            a = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
            slope = small / ((1.0 + small) * (1.0 + small))
        else:
            # softplus(x) = max(x, 0) + log(1 + exp(-|x|)), and log(1 + u) = 2 artanh(u / (2 + u)): a series in z^2 <= 1/9.
            z = small / (2.0 + small)
            q = z * z
            series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17)))
            series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series))))
            a = tl.sqrt(tl.maximum(logits, 0.0) + 2.0 * z * series)
            sigmoid = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
            slope = tl.where(a > 0, sigmoid / (2.0 * a), 0.0)
        a = tl.where(columns, a, 0.0)
        slope = tl.where(columns, slope, 0.0)
        total = tl.sum(a, 1)[:, None] + 1e-20  # Megatron's
    return a / total, slope / total


@triton.jit(do_not_specialize=["tokens", "counts", "sums", "ticket"])
def count_kernel(
    logits,  # [T, E] float32, bfloat16 or float16
    selection,  # [T, E] uint8
    padding,  # [T] uint8, nonzero for padding; read if PADDED
    partial_counts,  # [programs, BLOCK_E] int32, scratch
    partial_sums,  # [programs, BLOCK_E] float32, scratch
    ticket,  # [1] int32, zero before and after
    counts,  # [E] int32, written
    sums,  # [E] float32, summed scores, written
    tokens,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FUNCTION: tl.constexpr,
    PADDED: tl.constexpr,
):
    """What a micro-batch's tokens selected, and their scores summed, in one pass over logits and selection."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, BLOCK_E)
    rows = tl.arange(0, BLOCK_T)
    columns = (e < E)[None, :]
    counted = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    summed = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(program * BLOCK_T, tokens, programs * BLOCK_T):
        t = start + rows
        valid = t < tokens
        if PADDED:
            valid = valid & (tl.load(padding + t, mask=valid, other=1) == 0)
        inside = valid[:, None] & columns
        at = t.to(tl.int64)[:, None] * E + e[None, :]
        scores, _ = scores_and_slopes(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32), columns, FUNCTION)
        summed += tl.where(inside, scores, 0.0)
        counted += (tl.load(selection + at, mask=inside, other=0) != 0).to(tl.int32)
    # Every program leaves its share, and the last one to do so adds them up, in the order of the programs: no buffer has to be
    # zeroed beforehand, and the sums are the same in every run.
    tl.store(partial_counts + program * BLOCK_E + e, tl.sum(counted, 0))
    tl.store(partial_sums + program * BLOCK_E + e, tl.sum(summed, 0))
    tl.debug_barrier()  # all threads of this program have stored
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        tl.store(ticket, 0)
        all_counted = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        all_summed = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for first in range(0, programs, BLOCK_T):
            share = (first + rows)[:, None]
            at = share * BLOCK_E + e[None, :]
            # Past the L1 cache, which does not see what other programs stored.
            all_counted += tl.load(partial_counts + at, mask=share < programs, other=0, cache_modifier=".cg")
            all_summed += tl.load(partial_sums + at, mask=share < programs, other=0.0, cache_modifier=".cg")
        counts_E = tl.sum(all_counted, 0)
        sums_E = tl.sum(all_summed, 0)
        tl.store(counts + e, counts_E, mask=e < E)
        tl.store(sums + e, sums_E, mask=e < E)


@triton.jit(do_not_specialize=["tokens", "gradient", "factor"])
def logits_kernel(
    logits,  # [T, E] float32, bfloat16 or float16
    padding,  # [T] uint8, nonzero for padding; read if PADDED
    gradient,  # [E] float32, of the scores of any valid token
    factor,  # what it is multiplied with
    incoming,  # [T, E] of the logits' type
    outgoing,  # [T, E] of the logits' type, written
    tokens,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FUNCTION: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The gradient of the routing comes in, and goes out with the loss' added."""
    e = tl.arange(0, BLOCK_E)
    columns = (e < E)[None, :]
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = t < tokens
    inside = rows[:, None] & columns
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    g = tl.load(gradient + e, mask=e < E, other=0.0) * factor
    g = g[None, :]
    scores, slopes = scores_and_slopes(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32), columns, FUNCTION)
    d = slopes * (g - tl.sum(scores * g, 1)[:, None])
    if PADDED:
        d = tl.where((tl.load(padding + t, mask=rows, other=1) == 0)[:, None], d, 0.0)
    d += tl.load(incoming + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(outgoing + at, d.to(outgoing.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["counts_stride", "own_stride", "factor"])
def rows_kernel(
    counts,  # [R, E] int32 or int64, over which f is counted
    counts_stride,
    own,  # [R, E] int32, whose sum p is divided by; read if MEAN
    own_stride,
    factor,
    factors,  # [R] float32; read if UNLIKE
    gradients,  # [R, E] float32, written
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MEAN: tl.constexpr,
    UNLIKE: tl.constexpr,
):
    """The gradient rows of all layers, as `score_gradient` computes them."""
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counted = tl.load(counts + row * counts_stride + e, mask=e < E, other=0)
    total = tl.sum(counted, 0).to(tl.float32)
    if MEAN:
        total *= tl.sum(tl.load(own + row * own_stride + e, mask=e < E, other=0), 0).to(tl.float32)
    if UNLIKE:
        factor = tl.load(factors + row)
    g = counted.to(tl.float32) / tl.maximum(total, 1.0) * (factor * E)
    tl.store(gradients + row * E + e, g, mask=e < E)

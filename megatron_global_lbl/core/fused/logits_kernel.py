"""Backward, on [T, E]: the gradient of the routing comes in, and goes out with the loss' added."""

import triton
import triton.language as tl

from megatron_global_lbl.core.fused.score_functions import scores_and_slopes


@triton.jit(do_not_specialize=["tokens", "gradient", "scale"])
def logits_kernel(
    logits,  # [T, E] float32, bfloat16 or float16
    padding,  # [T] uint8, nonzero for padding; read if PADDED
    gradient,  # [E] float32, of the scores of any valid token
    factor,  # what it is multiplied with,
    scale,  # and [1] float32, what else; read if SCALED
    incoming,  # [T, E] of the logits' type
    outgoing,  # [T, E] of the logits' type, written
    tokens,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FUNCTION: tl.constexpr,
    PADDED: tl.constexpr,
    SCALED: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    columns = (e < E)[None, :]
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = t < tokens
    inside = rows[:, None] & columns
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    g = tl.load(gradient + e, mask=e < E, other=0.0) * factor
    if SCALED:
        g *= tl.load(scale)
    g = g[None, :]
    scores, slopes = scores_and_slopes(tl.load(logits + at, mask=inside, other=0.0).to(tl.float32), columns, FUNCTION)
    d = slopes * (g - tl.sum(scores * g, 1)[:, None])
    if PADDED:
        d = tl.where((tl.load(padding + t, mask=rows, other=1) == 0)[:, None], d, 0.0)
    d += tl.load(incoming + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(outgoing + at, d.to(outgoing.dtype.element_ty), mask=inside)

"""Forward: what a micro-batch's tokens selected, and their scores summed, in one pass over logits and selection."""

import triton
import triton.language as tl

from megatron_global_lbl.core.fused.score_functions import scores_and_slopes


@triton.jit(do_not_specialize=["tokens", "counts", "step", "sums", "ticket"])
def count_kernel(
    logits,  # [T, E] float32, bfloat16 or float16
    selection,  # [T, E] uint8
    padding,  # [T] uint8, nonzero for padding; read if PADDED
    partial_counts,  # [programs, BLOCK_E] int32, scratch
    partial_sums,  # [programs, BLOCK_E] float32, scratch
    ticket,  # [1] int32, zero before and after
    counts,  # [COPIES, E] int32, written
    step,  # [E + 1] int64: counts and forwards of the step, added to as STEP says
    sums,  # [E] float32, summed scores: written, or added to if ADD_SUMS
    tokens,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FUNCTION: tl.constexpr,
    PADDED: tl.constexpr,
    COPIES: tl.constexpr,
    STEP: tl.constexpr,  # 0: nothing; 1: forwards; 2: counts, too
    ADD_SUMS: tl.constexpr,
):
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
        for copy in tl.static_range(COPIES):
            tl.store(counts + copy * E + e, counts_E, mask=e < E)
        if STEP == 2:
            tl.store(step + e, tl.load(step + e, mask=e < E, other=0) + counts_E.to(tl.int64), mask=e < E)
        if STEP > 0:
            tl.store(step + E, tl.load(step + E) + 1)
        if ADD_SUMS:
            sums_E += tl.load(sums + e, mask=e < E, other=0.0)
        tl.store(sums + e, sums_E, mask=e < E)

"""The order of forwards and backwards in Megatron's pipeline schedules, written down from their description.

1F1B (Narayanan et al., arXiv 2104.04473, section 2.2): a stage runs the warm-up forwards that the stages after it need, then
one forward and one backward in turn, then the remaining backwards. With v model chunks per stage (interleaved), forwards come
in groups of as many micro-batches as there are stages, chunk after chunk; backwards the same with the chunks reversed.
"""

from __future__ import annotations


def events(micro_batches: int, stage: int, stages: int, chunks: int) -> list[tuple[str, int, int]]:
    """("F" or "B", micro-batch, chunk) of one stage, in the order in which they run."""
    order = [
        (m, chunk)
        for first in range(0, micro_batches, stages if chunks > 1 else micro_batches)
        for chunk in range(chunks)
        for m in range(first, min(first + (stages if chunks > 1 else micro_batches), micro_batches))
    ]
    forwards = [("F", m, chunk) for m, chunk in order]
    backwards = [("B", m, chunks - 1 - chunk) for m, chunk in order]
    warm_up = stages - 1 - stage if chunks == 1 else (stages - 1 - stage) * 2 + (chunks - 1) * stages
    warm_up = min(warm_up, len(order))
    result = forwards[:warm_up]
    for k in range(len(order) - warm_up):
        result += [forwards[warm_up + k], backwards[k]]
    return result + backwards[len(order) - warm_up :]


def seen_in_backward(micro_batches: int, stage: int, chunk: int, stages: int, chunks: int) -> list[set[int]]:
    """By micro-batch: the micro-batches whose forward of `chunk` has run on `stage` when its backward runs."""
    seen: set[int] = set()
    result: list[set[int]] = [set() for _ in range(micro_batches)]
    for kind, m, of_chunk in events(micro_batches, stage, stages, chunks):
        if of_chunk == chunk and kind == "F":
            seen.add(m)
        elif of_chunk == chunk:
            result[m] = set(seen)
    return result

"""The order of forwards and backwards in Megatron's pipeline schedules, written down from their description.

1F1B (Narayanan et al., arXiv 2104.04473, section 2.2): a stage runs the warm-up forwards that the stages after it need, then
one forward and one backward in turn, then the remaining backwards. With v model chunks per stage (interleaved), forwards come
in groups of as many micro-batches as there are stages, chunk after chunk; backwards the same with the chunks reversed.

Combined 1F1B (`--overlap-moe-expert-parallel-comm`, from the description in Megatron's combined_1f1b.py): one more warm-up
forward, with and without pipeline parallelism, after which each forward runs together with a backward of another micro-batch:
its first layer with that one's last layer, and so on, of each pair of layers the router's forward before the router's backward.
"""

from __future__ import annotations


def events(
    micro_batches: int, stage: int, stages: int, chunks: int, combined_layers: int = 0
) -> list[tuple[str, int, int, int | None]]:
    """("F" or "B", micro-batch, chunk, layer of the chunk) of one stage, in the order in which they run; None: all layers.

    Args:
        micro_batches: of the step.
        stage: of `stages`.
        stages: of the pipeline.
        chunks: model chunks per stage.
        combined_layers: layers per chunk in combined 1F1B; 0: another schedule.
    """
    order = [
        (m, chunk)
        for first in range(0, micro_batches, stages if chunks > 1 else micro_batches)
        for chunk in range(chunks)
        for m in range(first, min(first + (stages if chunks > 1 else micro_batches), micro_batches))
    ]
    forwards = [("F", m, chunk, None) for m, chunk in order]
    backwards = [("B", m, chunks - 1 - chunk, None) for m, chunk in order]
    warm_up = stages - 1 - stage if chunks == 1 else (stages - 1 - stage) * 2 + (chunks - 1) * stages
    warm_up = min(warm_up + (combined_layers > 0), len(order))
    result: list[tuple[str, int, int, int | None]] = [*forwards[:warm_up]]
    for k in range(len(order) - warm_up):
        pair = forwards[warm_up + k], backwards[k]
        if not combined_layers:
            result += pair
        for layer in range(combined_layers):
            result += [(*pair[0][:3], layer), (*pair[1][:3], combined_layers - 1 - layer)]
    return result + backwards[len(order) - warm_up :]


def seen_in_backward(
    micro_batches: int, stage: int, chunk: int, layer: int, stages: int, chunks: int, combined_layers: int = 0
) -> list[set[int]]:
    """By micro-batch: the micro-batches whose forward of a layer of `chunk` has run on `stage` when its backward runs."""
    seen: set[int] = set()
    result: list[set[int]] = [set() for _ in range(micro_batches)]
    for kind, m, of_chunk, of_layer in events(micro_batches, stage, stages, chunks, combined_layers):
        if of_chunk != chunk or of_layer not in (None, layer):
            continue
        if kind == "F":
            seen.add(m)
        else:
            result[m] = set(seen)
    return result

"""What layers are called in the record, and their numbers in the log, in which multi-token prediction comes last."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_global_lbl.core.layers import Layer


def names_of(layers: Sequence[Layer]) -> list[str]:
    """A name for each; one that comes again (multi-token prediction before Megatron-Core 0.17) gets a number."""
    names: list[str] = []
    for layer in layers:
        name = layer.info.key
        twins = sum(earlier.partition("#")[0] == name for earlier in names)
        names.append(f"{name}#{twins + 1}" if twins else name)
    return names


def numbers_of(layers: Sequence[Layer]) -> list[int]:
    """The index of each in Megatron's log; -1 for a layer outside of a model."""
    numbers = []
    for layer in layers:
        prefix, _, number = layer.info.key.rpartition(".")
        before = layer.info.num_layers - layer.info.mtp_layers if prefix else 0
        numbers.append(int(number) + before if number.isdigit() else -1)
    return numbers

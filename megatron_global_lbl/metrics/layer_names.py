"""How layers are numbered: as in Megatron's own log (`moe/load_balancing_loss_layer_3`) and its checkpoints
(`decoder.layers.3`), from 0. Layers of multi-token prediction are "mtp.0" and so on; their numbers in the log come last.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_global_lbl.core.layers import Layer


def names_of(layers: Sequence[Layer]) -> list[str]:
    """A name for each; one that comes again (multi-token prediction before Megatron-Core 0.17) gets a number."""
    names: list[str] = []
    for layer in layers:
        name = name_of(layer.info.key)
        twins = sum(earlier.partition("#")[0] == name for earlier in names)
        names.append(f"{name}#{twins + 1}" if twins else name)
    return names


def name_of(key: str) -> str:
    """The name of the layer with this `RouterInfo.key`."""
    prefix, _, number = key.rpartition(".")
    return f"{prefix}.{_from_0(number)}" if prefix else _from_0(number)


def numbers_of(layers: Sequence[Layer]) -> list[int]:
    """The index of each in Megatron's log; -1 for a layer outside of a model."""
    numbers = []
    for layer in layers:
        prefix, _, number = layer.info.key.rpartition(".")
        before = layer.info.num_layers - layer.info.mtp_layers if prefix else 0
        numbers.append(int(number) - 1 + before if number.isdigit() else -1)
    return numbers


def _from_0(number: str) -> str:
    return str(int(number) - 1) if number.isdigit() else number

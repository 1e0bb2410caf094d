"""What of a layer travels in a checkpoint: plain numbers, and a tensor on the CPU that does not depend on TP, CP or PP."""

from __future__ import annotations

from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.settings import ConfigError


def saved_state(layer: Layer) -> dict:
    """{"steps": completed optimizer steps}; in scope `window` also "counts" [steps, G, E + 1] int64, oldest step first, and
    what their meaning depends on."""
    state: dict = {"steps": layer.steps}
    if layer.table.window is not None:
        state |= _depends_on(layer) | {"counts": layer.table.window.state(layer.row)}
    return state


def restore(layer: Layer, state: dict) -> None:
    """Continue from `saved_state`.

    Raises:
        ConfigError: the counts are those of other experts, another top-k or other groups.
    """
    layer.steps = state["steps"]
    if layer.table.window is None or "counts" not in state:
        return
    here = _depends_on(layer)
    saved = {name: state.get(name) for name in here}
    if saved != here:
        there, now = (", ".join(f"{name} {number}" for name, number in side.items()) for side in (saved, here))
        raise ConfigError(
            f"the saved window of MoE layer {layer.info.key} was counted with {there}; this run has {now}; allowed: the "
            "same, or a checkpoint saved with --moe-lbl-scope global, after which the window starts anew"
        )
    layer.table.window.load(layer.row, state["counts"])


def _depends_on(layer: Layer) -> dict[str, int]:
    return {"experts": layer.info.num_experts, "top-k": layer.info.topk, "groups": layer.table.group.parts}

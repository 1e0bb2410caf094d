"""Forwards and backwards belong together: a forward that was counted is trained on, in the step in which it was counted."""

from __future__ import annotations

from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.settings import ConfigError


class AwaitedBackward:
    """A forward of a layer, and whether its backward is still to come."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._dropped, self._awaited = layer.dropped, False

    def await_backward(self) -> None:
        """A backward of this forward will come: a step's end before it would be wrong."""
        self._awaited = True
        self.layer.awaited += 1

    def backward_has_come(self) -> None:
        """No more backward is waited for.

        Raises:
            ConfigError: as `require_counts`.
        """
        self.require_counts()
        self.layer.awaited -= self._awaited
        self._awaited = False
        self.layer.trained = True

    def require_counts(self) -> None:
        """
        Raises:
            ConfigError: what this forward counted is not there any more.
        """
        name = f"MoE layer {self.layer.info.key}"
        if self.layer.table.removed:
            raise ConfigError(
                f"the registration was removed before a backward of {name}; allowed: keep it until the step's end"
            )
        if self.layer.dropped != self._dropped:
            raise ConfigError(
                f"the gradient buffer was zeroed between a forward of {name} and its backward, which dropped what it counted; "
                "allowed: zero_grad_buffer before a step's first forward"
            )

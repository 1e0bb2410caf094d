"""Which forward of a MoE layer is counted, when activations are recomputed.

A checkpointed call runs forward twice: first without gradients, and again inside the backward, recorded by autograd. The
first one is counted: it belongs to the micro-batches "whose forward has run", its reduction has the whole time until the
backward to finish, and it keeps the order of collectives that of the forwards. The second one takes up what was counted.

What belongs together is kept with the call itself (`FirstForwards` stands in for the function that is checkpointed), not
found by an order: backwards may come in any.

| autograd records | within a checkpointed call | pass |
|---|---|---|
| yes | none | ONLY: no recompute; count, and attach the loss |
| no | its first run | FIRST: count |
| yes | its second run | SECOND: attach the loss with what was counted |
| no | the first run of a call within the second run of another | HANDED_DOWN: its first forward was counted already |
| no | none | NONE: a forward that is not trained on |
| yes, in a backward | none | UNKNOWN: recomputed by something that was not bound |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_global_lbl.settings import ConfigError

if TYPE_CHECKING:
    from megatron_global_lbl.core.chunk import Layer
    from megatron_global_lbl.core.forward import CountedForward


class Pass(Enum):
    """What a router's forward is; see the table above."""

    NONE = auto()
    ONLY = auto()
    FIRST = auto()
    SECOND = auto()
    HANDED_DOWN = auto()
    UNKNOWN = auto()


class FirstForwards:
    """A function that is checkpointed, with what the router forwards of its first run counted."""

    def __init__(self, function: Callable, calls: list[FirstForwards], trained: bool) -> None:
        self.trained = trained
        self.second_run = False
        self._function, self._calls = function, calls
        self._has_run = False
        self._forwards: list[tuple[Layer, CountedForward | None]] = []  # None: not to be counted
        self._next: Iterator[tuple[Layer, CountedForward | None]] = iter(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.second_run, self._has_run = self._has_run, True
        for _, counted in self._forwards:
            if counted is not None:  # else the second forward would silently be Megatron's
                counted.require_counts()
        self._next = iter(self._forwards)
        self._calls.append(self)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._calls.pop()

    def keep(self, layer: Layer, counted: CountedForward | None) -> None:
        """Take what a forward of the first run counted."""
        self._forwards.append((layer, counted))

    def take_up(self, layer: Layer) -> CountedForward | None:
        """What the forward of the second run that is running now counted in the first run.

        Raises:
            ConfigError: the second run is not a repetition of the first.
        """
        of_layer, counted = next(self._next, (None, None))
        if of_layer is not layer:
            raise ConfigError(
                f"the recompute of MoE layer {layer.info.key} does not repeat the first forward, so what that counted "
                "cannot be found: a checkpointed function must run the same routers both times, all of them trained "
                "(call model.eval() for the others)"
            )
        return counted


class Recompute:
    """The checkpointed calls that are running, from the outermost to the innermost."""

    def __init__(self) -> None:
        self._calls: list[FirstForwards] = []

    def bind(self, function: Callable, inputs: tuple[Any, ...]) -> Callable:
        """What to checkpoint instead of `function`; called where the checkpoint is made, outside of it.

        Args:
            function: what is checkpointed.
            inputs: its arguments. Without a gradient for any of them the second run never comes.
        """
        if not torch.is_grad_enabled():  # nothing will be recomputed; within another call's first run that one keeps all
            return function
        trained = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)
        return FirstForwards(function, self._calls, trained)

    @property
    def call(self) -> FirstForwards:
        """The innermost checkpointed call."""
        return self._calls[-1]

    def current_pass(self) -> Pass:
        """The pass of a router's forward in training mode that is running now."""
        call = self._calls[-1] if self._calls else None
        if torch.is_grad_enabled():
            if call is not None and call.second_run:
                return Pass.SECOND
            # The number of the backward that this thread is running, -1 if none; torch.utils.checkpoint asks in the same way.
            return Pass.ONLY if torch._C._current_graph_task_id() == -1 else Pass.UNKNOWN
        if call is None or call.second_run:
            return Pass.NONE
        return Pass.HANDED_DOWN if len(self._calls) > 1 else Pass.FIRST

    def hand_down(self, layer: Layer) -> None:
        """Give what the outer call's first run counted to the call within it."""
        self._calls[-1].keep(layer, self._calls[-2].take_up(layer))


def refuse_unknown_recompute(layer_name: str) -> None:
    """
    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"the router of MoE layer {layer_name} runs inside a backward, but its first forward was not counted: it is "
        "recomputed by something other than Megatron's own. Use --recompute-granularity full, or selective with moe in "
        "--recompute-modules (in a config: recompute_granularity, recompute_modules)"
    )

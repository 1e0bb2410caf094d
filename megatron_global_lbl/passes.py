"""Which forward of a MoE layer is counted, when activations are recomputed.

A checkpointed layer runs forward twice: first without gradients, and again inside the backward, recorded by autograd. The
first one is counted: it belongs to the micro-batches "whose forward has run", its reduction has the whole time until the
backward to finish, and it keeps the order of collectives that of the forwards. The second one takes up what was counted.

| autograd records | inside a backward | pass |
|---|---|---|
| yes | no | RECORDED: no recomputation; count, and attach the loss |
| no | no | AHEAD: the first forward of a recomputed layer; count |
| yes | yes | AGAIN: its second forward; attach the loss with what was counted |
| no | yes | NONE: checkpoints within checkpoints, the inner first forward once more |
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import Generic, TypeVar

import torch

from megatron_global_lbl.settings import ConfigError

Counted = TypeVar("Counted")


class Pass(Enum):
    """What a router's forward is."""

    NONE = auto()
    """Nothing to do with training: evaluation, or a forward that is repeated for another's sake."""
    RECORDED = auto()
    """The only forward of this micro-batch."""
    AHEAD = auto()
    """The first of two."""
    AGAIN = auto()
    """The second of two."""


def current_pass(*, training: bool, recomputed: bool) -> Pass:
    """The pass that a router's forward which is running now belongs to.

    Args:
        training: the router's `training` mode.
        recomputed: Megatron's configuration recomputes routers. Without it a forward without gradients is a forward for
            something else (log-probabilities, say), even in training mode.
    """
    # The number of the backward that this thread is running, -1 if none; torch.utils.checkpoint asks in the same way.
    in_backward = torch._C._current_graph_task_id() != -1
    if not training:
        return Pass.NONE
    if torch.is_grad_enabled():
        return Pass.AGAIN if in_backward else Pass.RECORDED
    return Pass.AHEAD if recomputed and not in_backward else Pass.NONE


class CountedAhead(Generic[Counted]):
    """What the first forwards of one layer counted, until their second forwards take it up."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._waiting: deque[Counted] = deque()
        self._taken_up = 0

    def put(self, counted: Counted) -> None:
        """Keep what a first forward counted."""
        self._waiting.append(counted)

    def take_up(self) -> Counted:
        """What belongs to the second forward that is running now: the oldest, because a layer's backwards come in the order
        of its forwards, in every schedule of Megatron.

        Raises:
            ConfigError: there was no first forward.
        """
        if not self._waiting:
            raise ConfigError(
                f"the router of MoE layer {self._layer} runs inside a backward, but its first forward was not counted: it is "
                "recomputed by something other than Megatron's own; allowed: --recompute-granularity full, or selective "
                "with moe in --recompute-modules (in a config: recompute_granularity, recompute_modules)"
            )
        self._taken_up += 1
        return self._waiting.popleft()

    def check(self) -> None:
        """At the step's end: every first forward had its second one, or (below frozen parameters) none had.

        Raises:
            ConfigError: some had not, so counts of one micro-batch may have been used for another.
        """
        if self._waiting and self._taken_up:
            raise ConfigError(
                f"{len(self._waiting)} forwards of the router of MoE layer {self._layer} ran in training mode without "
                "gradients and were not recomputed: with --recompute-granularity they were counted as training; call "
                "model.eval() for forwards that are not trained on"
            )

    def clear(self) -> None:
        """Forget the step."""
        self._waiting.clear()
        self._taken_up = 0

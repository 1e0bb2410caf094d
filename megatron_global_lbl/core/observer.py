"""What the metrics are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_global_lbl.core.chunk import Chunk, MicroBatch

EXTRAS = ("entropy", "margin", "moved")
"""Sums over the valid tokens of a router forward that are computed for detailed metrics only: the entropy of the scores over
experts (in units of log E), the score of the last selected expert minus that of the first one left out, and selections that the
expert bias moved."""


class Observer(Protocol):
    """Records micro-batches. Nothing that it does may cost a host synchronisation before an interval ends.

    Attributes:
        wants_extras: `EXTRAS` are to be computed.
    """

    wants_extras: bool

    def add(self, batch: MicroBatch) -> None:
        """A micro-batch has closed. Its score sums are complete at the step's end."""

    def drop(self, chunks: list[Chunk]) -> None:
        """Forget the micro-batches of these chunks since their last step's end."""

    def end_step(self, model: int, chunks: list[Chunk], iteration: int) -> None:
        """The step of a model's chunks on this rank is over (before it is forgotten); `iteration` is 0-based."""

    def take_back(self, chunks: list[Chunk]) -> None:
        """The step of these chunks that ended last is run again: forget it, unless its interval is over."""

    def settle(self) -> None:
        """Wait for reductions that are under way."""

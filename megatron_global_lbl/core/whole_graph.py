"""CUDA graphs of a whole step: forwards, their backwards and `finalize_model_grads` in one, replayed without any Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_global_lbl.core.collective import Reduction


class WholeGraph:
    """A CUDA graph that holds forwards and their backwards, and what it started: each reduction is waited for where it is used
    first. Other graphs hold a forward alone, and what they start they wait for at once.

    Attributes:
        is_open: what is captured now goes into such a graph.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._started: list[Reduction] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The step that runs within goes into such a graph, if it is captured."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False
            self._started.clear()

    def add(self, reduction: Reduction) -> None:
        """The capture has come to its start."""
        self._started.append(reduction)

    def join(self) -> None:
        """The capture has come to its end: it waits for what nobody has used."""
        for reduction in self._started:
            reduction.join()
        self._started.clear()

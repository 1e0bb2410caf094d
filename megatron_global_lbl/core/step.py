"""The chunks of a registration and their optimizer steps: what was counted belongs to a step, until it ends or fails.

A step is that of the chunks of one model; another model's step is not touched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from megatron_global_lbl.core.chunk import Chunk, ChunkReport, Layer, MicroBatch
from megatron_global_lbl.core.collective import WholeGraph, is_capturing
from megatron_global_lbl.core.observer import Observer
from megatron_global_lbl.core.router import RouterInfo
from megatron_global_lbl.settings import ConfigError, Scope, Settings

_held_by_graphs: list[Chunk] = []
"""Of registrations that were removed: replays of a CUDA graph that was captured before go on writing there."""


class Ended(NamedTuple):
    """A model's step on this rank.

    Attributes:
        model: its number, from 1, in the order of the models' first step ends: the same on all ranks.
        iteration: 0-based.
        reports: of its chunks that counted, or may have in a replay.
        reported: a router's forward was seen, or may have been replayed.
    """

    model: int
    iteration: int
    reports: list[ChunkReport]
    reported: bool


class Steps:
    """The model chunks of one registration and their steps."""

    def __init__(self, settings: Settings, clock: Callable[[], int | None], observer: Observer | None) -> None:
        """
        Args:
            settings: the registration's.
            clock: 0-based iteration of the training loop; None if nothing tells it.
            observer: records micro-batches.
        """
        self.settings, self.observer = settings, observer
        self.whole_graph = WholeGraph()
        self.find: Callable[[nn.Module], RouterInfo] = _no_hook
        self.clock, self.was_used = clock, False
        self.loss_paths: dict[str, str] = {}  # by layer, of its last forward in scope
        self.layers: WeakKeyDictionary[nn.Module, Layer] = WeakKeyDictionary()
        self._routers: WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = WeakKeyDictionary()  # by chunk's module
        self._homes: WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = WeakKeyDictionary()  # chunk's module, by router
        self._open: set[Chunk] = set()  # may have counted since their last step's end
        self._models: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # numbers, by the first chunk on this rank
        self._met = 0
        self._ended: dict[int, int] = {}  # steps of each model, also on stages without MoE layers
        self._idle_ends: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._logged: set[str] = set()

    # Chunks.

    def knows(self, module: nn.Module) -> bool:
        """True if the module is a chunk."""
        return module in self._routers

    def know(self, module: nn.Module, routers: Sequence[nn.Module]) -> None:
        """This module is a model chunk, with these routers in the model's order."""
        self._routers[module] = [weakref.ref(router) for router in routers]
        for router in routers:
            self._homes.setdefault(router, weakref.ref(module))

    def routers_of(self, module: nn.Module) -> list[nn.Module]:
        """Those that `know` was told, as far as they are still there."""
        return [router for router in (ref() for ref in self._routers[module]) if router is not None]

    def was_trained(self, module: nn.Module) -> bool:
        """True if a backward has run since the last step's end of a chunk."""
        return any(chunk.trained for chunk in self.chunks_of(module))

    def chunks_of(self, module: nn.Module) -> list[Chunk]:
        """The chunk of a module that `know` was told, made when it is asked for first (several: parts of it are chunks)."""
        routers = self.routers_of(module)
        new = [router for router in routers if router not in self.layers]
        if new:
            observer = self.observer
            chunk = Chunk(
                new,
                self.find,
                self.settings,
                self.whole_graph,
                extras=observer is not None and observer.wants_extras,
                in_scope=self._in_scope,
            )
            chunk.on_close = None if observer is None else observer.add
            self.layers.update({router: layer for router, layer in zip(new, chunk.layers)})
        return list(dict.fromkeys(self.layers[router].chunk for router in routers))

    def layer_of(self, router: nn.Module) -> Layer:
        """
        Raises:
            ConfigError: the router is in no model chunk.
        """
        home = self._homes[router]() if router in self._homes else None
        if home is None:
            raise ConfigError(
                f"MoE layer {self.find(router).key} was trained outside of Megatron's DistributedDataParallel, so its "
                "micro-batches are unknown: call megatron_global_lbl.chunk(model) once for each model chunk, after "
                "`register` and before the first step"
            )
        if router not in self.layers:
            self.chunks_of(home)
        return self.layers[router]

    @contextmanager
    def forward(self, module: nn.Module, sequences: int | None) -> Iterator[list[MicroBatch]]:
        """The forward of a chunk that is trained runs within. Gives the micro-batches whose backward is replayed."""
        chunks = [chunk for chunk in self.chunks_of(module) if not chunk.in_forward]
        for chunk in chunks:
            chunk.begin_forward(sequences)
        replayed: list[MicroBatch] = []
        try:
            yield replayed
        except BaseException:
            for chunk in chunks:
                chunk.abort_forward()
            raise
        finally:
            self._open.update(chunks)
        for chunk in chunks:
            chunk.end_forward()
            if chunk.replays and chunk.closed is not None:
                replayed.append(chunk.closed)

    def has_run(self, chunk: Chunk) -> None:
        """A router forward of the chunk has run."""
        self.was_used = True
        self._open.add(chunk)

    # Steps.

    @property
    def has_counted(self) -> bool:
        """True if a forward has run in Python since the last step's end, of any model."""
        return any(chunk.ran for chunk in self._open)

    @property
    def may_have_counted(self) -> bool:
        """The same, or a CUDA graph may have been replayed, which runs no Python."""
        return bool(self._open)

    def _in_scope(self, chunk: Chunk) -> bool:
        if self.settings.scope is Scope.MICRO:
            return False
        iteration = self.clock()  # 0-based; without a clock the chunk's steps that have ended
        return (chunk.steps if iteration is None else iteration) >= self.settings.start_iter

    def begin(self, routers: Collection[nn.Module]) -> None:
        """A step of these routers begins with zero gradients: what was counted for them and did not end is dropped.

        Raises:
            ConfigError: no step's end is ever found.
        """
        left = self._open_of(routers)
        if not left:
            return
        # A step can fail, and a warm-up is not ended. Two in a row are a loop whose step ends are not seen.
        for chunk in left:
            chunk.unfinished += chunk.trained
        if any(chunk.unfinished > 1 for chunk in left):
            raise ConfigError(
                "two steps in a row began before the one before them was ended: call Megatron's finalize_model_grads, or "
                "megatron_global_lbl.end_step() after the last backward of a step"
            )
        if not any(chunk.captured for chunk in left):  # otherwise it is the warm-up of CUDA graphs
            self.log_once("forwards were counted that no step's end followed; their counts are dropped", left[0])
        self._drop(left)

    def discard(self, routers: Collection[nn.Module] | None = None) -> None:
        """Forget what was counted since the last step's end: no optimizer step follows it. None: of all routers."""
        self._drop(self._open_of(routers))

    def take_back(self, routers: Collection[nn.Module] | None) -> None:
        """The step of these routers that ended last is run again (None: of all routers)."""
        self.discard(routers)
        layers = self.layers.values() if routers is None else [self.layers[r] for r in routers if r in self.layers]
        clock = self.clock()
        chunks = list(dict.fromkeys(layer.chunk for layer in layers if clock in (None, layer.chunk.ended_at)))
        for chunk in chunks:
            chunk.take_back_step()
        if self.observer is not None:
            self.observer.take_back(chunks)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All forwards and backwards of a step run within: in Python, or in a CUDA graph that is captured or replayed. The
        step's end comes after it."""
        with self.whole_graph.opened():
            yield

    def finish_capture(self) -> None:
        """A CUDA graph that holds a whole step is captured to its end."""
        for chunk in self._open:
            chunk.log_rest()
        self.whole_graph.join()

    def end(self, routers: Collection[nn.Module] | None, module: nn.Module | None) -> Ended | None:
        """The backwards of a step are over.

        Args:
            routers: of the model whose step it is; None: all that ran.
            module: the model's first chunk on this rank, which names the model; None: the first that ran.

        Returns:
            None if there is no model.

        Raises:
            ConfigError: forwards that were counted had no backward; or a CUDA graph is being captured, whose replays would not
                end the step.
        """
        ended = self._open_of(routers)
        for chunk in ended:
            _refuse_unended(chunk)
        if module is None and ended:
            module = self._homes[ended[0].layers[0].router]() if ended[0].layers[0].router is not None else None
        if module is None:
            return None
        if module not in self._models:
            self._met += 1
            self._models[module] = self._met
        number = self._models[module]
        clock = self.clock()
        iteration = self._ended.get(number, 0) if clock is None else clock
        self._ended[number] = iteration + 1
        if ended and self.settings.scope is not Scope.MICRO and iteration >= self.settings.start_iter:
            self._log_zero_coefficient(ended)
        for chunk in ended:
            chunk.ended_at = iteration
            chunk.log_rest()
        reports = [chunk.report() for chunk in ended if chunk.may_have_counted]
        reported = any(layer.forwards or layer.captured_forwards for chunk in ended for layer in chunk.layers)
        if self.observer is not None:
            self.observer.end_step(number, ended, iteration)
        for chunk in ended:
            chunk.end_step()
        self._close(ended)
        return Ended(number, iteration, reports, reported)

    def close(self) -> None:
        """Leave nothing under way; a backward that still comes raises."""
        for chunk in {*(layer.chunk for layer in self.layers.values()), *self._open}:
            chunk.settle()
            chunk.removed = True
            if chunk.captured:
                _held_by_graphs.append(chunk)
        if self.observer is not None:
            self.observer.settle()

    def log_once(self, text: str, chunk: Chunk) -> None:
        """Printed by the first rank of the chunk's pipeline stage."""
        if text not in self._logged and chunk.layers[0].info.leads_stage:
            print(f"> moe-lbl: {text}", flush=True)
        self._logged.add(text)

    def _open_of(self, routers: Collection[nn.Module] | None) -> list[Chunk]:
        if routers is None:
            return list(dict.fromkeys(layer.chunk for layer in self.layers.values() if layer.chunk in self._open))
        chunks = dict.fromkeys(self.layers[router].chunk for router in routers if router in self.layers)
        return [chunk for chunk in chunks if chunk in self._open]

    def _close(self, chunks: list[Chunk]) -> None:
        self._open -= {chunk for chunk in chunks if not chunk.captured}  # a replay tells nothing

    def _drop(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            chunk.drop_step()
        self._close(chunks)
        if self.observer is not None and chunks:
            self.observer.drop(chunks)

    def refuse_nothing_to_act_on(self, routers: Collection[nn.Module]) -> None:
        """At a step's end. A model without a loss may stand beside one with, whose first step is still to come: so not at its
        first end.

        Raises:
            ConfigError: no router of this process has a loss for the scope.
        """
        if self.settings.scope is Scope.MICRO or any(layer.info.has_loss for layer in self.layers.values()):
            return
        for router in routers:
            self._idle_ends[router] = self._idle_ends.get(router, 0) + 1
        if any(self._idle_ends[router] > 1 for router in routers):
            raise ConfigError(
                f"--moe-lbl-scope {self.settings.scope.value} has nothing to act on: no router of this step has "
                "aux_loss or global_aux_loss in --moe-router-load-balancing-type"
            )

    def _log_zero_coefficient(self, chunks: list[Chunk]) -> None:
        with_loss = [chunk for chunk in chunks if chunk.has_loss]
        if (
            not with_loss
            or any(layer.kind for chunk in with_loss for layer in chunk.layers)
            or any(c.captured for c in with_loss)
        ):
            return
        if any(layer.forwards and layer.loss is None for chunk in with_loss for layer in chunk.layers):
            scope = self.settings.scope.value
            self.log_once(
                f"!! the coefficient of the load-balancing loss is 0: scope {scope} does nothing until it is raised",
                with_loss[0],
            )


def _no_hook(router: nn.Module) -> RouterInfo:
    raise NotImplementedError("the hook sets Steps.find")


def _refuse_unended(chunk: Chunk) -> None:
    if is_capturing(chunk.layers[0].ticket):
        raise ConfigError(
            "the step's end is captured in a CUDA graph, so no replay would end its step: use Megatron's "
            "FullCudaGraphWrapper, or call finalize_model_grads outside of the graph"
        )
    for layer in chunk.layers:
        if layer.awaited:
            raise ConfigError(
                f"{layer.awaited} forwards of MoE layer {layer.info.key} were counted, and the step ended without their "
                "backward: run forwards that are not trained on under torch.no_grad() or after model.eval(), and end a model's "
                "step after all its backwards"
            )

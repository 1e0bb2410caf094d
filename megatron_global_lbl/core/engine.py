"""What one registration does in the course of a training step; knows no symbol of Megatron.

The hook tells it of every router forward (`begin`, `finish`), of the end of a model's step (`end_step`), of a step that starts
from zero gradients (`begin_step`), of forwards that were no training (`discard`: warm-up of CUDA graphs) and of a step that did
not count (`repeat_step`). Everything is done for the routers that are named: another model's step is not touched.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megatron_global_lbl.core.attach import attach_loss
from megatron_global_lbl.core.balance import CountedForward, count, selections_per_expert
from megatron_global_lbl.core.collective import BalanceGroup, is_capturing
from megatron_global_lbl.core.fused.attach import LossOnLogits, attach_to_logits
from megatron_global_lbl.core.fused.choice import FUSED, Choice, why_not
from megatron_global_lbl.core.layers import Layer, LayerTable
from megatron_global_lbl.core.observe import observed
from megatron_global_lbl.core.recompute import FirstForward, Pass, Recomputation
from megatron_global_lbl.core.router_forward import Record, RouterForward
from megatron_global_lbl.core.router_info import RouterInfo, RouterLoss
from megatron_global_lbl.core.saved import restore, saved_state
from megatron_global_lbl.core.whole_graph import WholeGraph
from megatron_global_lbl.settings import ConfigError, Scope, Settings

Routers = Collection[nn.Module]

_held_by_graphs: list[LayerTable] = []
"""Of registrations that were removed: the replays of a CUDA graph that was captured before go on writing there."""


class Engine:
    """State of one registration."""

    def __init__(self, settings: Settings, clock: Callable[[], int | None], record: Record | None) -> None:
        """
        Args:
            settings: what was registered.
            clock: 0-based iteration of the training loop; None in a loop that has no clock.
            record: what looks on, if anything does.

        Raises:
            ConfigError: the environment variable of fused/choice.py has a value that is not allowed.
        """
        self.settings = settings
        self.recomputation = Recomputation()
        self._choice = Choice.read()
        self.whole_graph = WholeGraph()
        self._clock, self._record = clock, record
        self._layers: WeakKeyDictionary[nn.Module, Layer] = WeakKeyDictionary()
        self._tables: list[LayerTable] = []
        self._groups: dict[tuple[int, int], BalanceGroup] = {}
        self._met: set[str] = set()
        self._met_twice = self._acts = False
        self._loaded_by_key: dict[str, dict] = {}
        self._loaded: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()
        self._without_loss: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._said: set[str] = set()

    @property
    def has_counted(self) -> bool:
        """Whether a forward has run in Python since the last step's end, of any model."""
        return any(layer.ran for layer in self._layers_of(None))

    @property
    def looks_on(self) -> bool:
        """Whether forwards without a loss of the scope's are worth telling."""
        return self._record is not None

    @property
    def may_have_counted(self) -> bool:
        """The same, or a CUDA graph may have been replayed, which runs no Python."""
        return any(layer.may_have_counted for layer in self._layers_of(None))

    @property
    def loss_paths(self) -> dict[str, str]:
        """How the last forward in scope of each layer computed its loss, by the layer's key; of several models the last."""
        return {layer.info.key: layer.path for layer in self._layers_of(None) if layer.path}

    def was_trained(self, router: nn.Module) -> bool:
        """Whether a backward of the router has run since its last step's end."""
        return router in self._layers and self._layers[router].trained

    def begin(self, router: nn.Module, find: Callable[[], RouterInfo], loss: RouterLoss | None) -> RouterForward | None:
        """A forward of a router in training mode starts; None if it is not one to look at.

        Args:
            router: whose forward it is.
            find: gives what is to be known of it; asked once.
            loss: its auxiliary loss in this forward; None if the coefficient is 0.
        """
        layer = self._layers.get(router)
        which = self.recomputation.current_pass(lambda: (layer.info if layer else find()).key)
        if which is Pass.NONE:
            return None
        if layer is None:
            layer = self._new_layer(router, find())
        if which is Pass.HANDED_DOWN:
            self.recomputation.hand_down(layer)
            return None
        if which is Pass.SECOND:
            counted = self.recomputation.call.take_up(layer).counted
            return RouterForward(layer, which, loss, counted is not None and counted.in_scope, counted)
        acts = self.settings.scope is not Scope.MICRO and layer.info.acts
        return RouterForward(layer, which, loss, acts and self._iteration(layer) >= self.settings.start_iter)

    def before_selection(self, forward: RouterForward, logits: Tensor, score_function: str | None) -> Tensor:
        """The router selects next; decides whether the kernels take this forward.

        Args:
            forward: what `begin` gave.
            logits: [T, E] from which it selects.
            score_function: that of the auxiliary loss, or None if its scores for these logits are not those of the kernels.

        Returns:
            logits, with the loss attached if it is one of the kernels' to attach.
        """
        if not forward.replaces:
            return logits
        reason = self._why_not_fused(forward, logits, score_function)
        forward.layer.path = FUSED if reason is None else f"plain: {reason}"
        if logits.is_cuda:
            self._say_once(f"loss {forward.layer.path}", forward.layer)
        if reason is not None or score_function is None:
            return logits
        forward.logits = logits
        if forward.which is Pass.FIRST or not logits.requires_grad:
            return logits
        forward.attached = LossOnLogits(score_function)
        return attach_to_logits(logits, forward.attached)

    def finish(self, forward: RouterForward, *, probs: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The forward is over.

        Args:
            forward: what `begin` gave.
            probs: [T, E] the router's output.
            padding_mask: [T] bool, True for padding, or None.

        Returns:
            probs, with the loss attached if it is this plugin's to attach.
        """
        layer, selection, scores = forward.layer, forward.selection, forward.scores
        assert selection is not None
        layer.ran = True
        if is_capturing(selection):
            self._refuse_capture()
        counted = forward.counted
        # A window fills before `--moe-lbl-start-iter`, too; and f holds forwards whose own coefficient is 0.
        counts = forward.which is not Pass.SECOND and (forward.in_scope or layer.table.window is not None)
        record = self._record if forward.which is not Pass.FIRST else None
        counts_E = score_sums_E = None
        if forward.logits is None and (counts or record is not None):
            counts_E = selections_per_expert(selection, padding_mask)
        if scores is not None:
            score_sums_E = scores.detach().sum(dim=0, dtype=torch.float32)
        if counts:
            counted = self._count(forward, counts_E, selection, padding_mask)
        if record is not None:
            record.observe(layer, observed(forward, counted, counts_E, score_sums_E, record.wants_entropy))
        if forward.which is Pass.FIRST:
            call = self.recomputation.call
            call.keep(FirstForward(layer, counted))
            if forward.in_scope and call.trained and counted is not None:
                counted.await_backward()
            return probs
        if not forward.in_scope or counted is None:
            return probs
        trained = forward.attached is not None or probs.requires_grad or (scores is not None and scores.requires_grad)
        if forward.loss is None or not trained:
            counted.backward_has_come()  # the coefficient is 0, or all that leads here is frozen
            return probs
        score_sums_E = counted.score_sums_E if counted.is_fused else score_sums_E
        assert score_sums_E is not None
        layer.kind = forward.loss.kind
        counted.observe(score_sums_E)
        if forward.which is Pass.ONLY:
            counted.await_backward()
        if forward.attached is not None:
            forward.attached.fill(counted, forward.loss.coeff, padding_mask)
            return probs
        assert scores is not None
        return attach_loss(probs=probs, scores=scores, counted=counted, coeff=forward.loss.coeff)

    def _count(
        self, forward: RouterForward, counts_E: Tensor | None, selection: Tensor, padding_mask: Tensor | None
    ) -> CountedForward:
        if counts_E is not None:  # summed over ranks in place, so what looks on keeps another
            counts_E = counts_E if self._record is None else counts_E.clone()
            return count(forward.layer, counts_E, in_scope=forward.in_scope)
        assert forward.logits is not None
        # Imported here: it needs Triton.
        from megatron_global_lbl.core.fused.counted import count as count_fused

        return count_fused(
            forward.layer,
            forward.logits,
            selection,
            padding_mask,
            score_function=forward.score_function,
            log=forward.attached is not None,
            keep=self._record is not None,
        )

    def _why_not_fused(self, forward: RouterForward, logits: Tensor, score_function: str | None) -> str | None:
        if self._record is not None and self._record.wants_entropy:
            return "--moe-lbl-metrics detailed needs the scores"
        if forward.loss is not None and not forward.loss.alone:
            return "another auxiliary loss of the router needs the scores"
        if forward.counted is not None and not forward.counted.is_fused:
            return "the first forward of a recomputed layer was counted without the kernels"
        return why_not(self._choice, logits, score_function)

    def note_router_without_loss(self, router: nn.Module) -> None:
        """A forward of a router that has no auxiliary loss for the scope to act on, whatever its coefficients."""
        self._without_loss.setdefault(router, 0)

    def begin_step(self, routers: Routers) -> None:
        """The gradients of these routers are zero: what was counted for them counts for nothing.

        Raises:
            ConfigError: no step's end is ever found, without which scope `window` and `--moe-lbl-start-iter` do nothing.
        """
        left = [layer for layer in self._layers_of(routers) if layer.may_have_counted]
        if not left:
            return
        # A step can fail, and a warm-up is not ended. Two in a row are a loop whose step ends are not seen.
        for layer in left:
            layer.unfinished += layer.trained
        if any(layer.unfinished > 1 for layer in left):
            raise ConfigError(
                "two steps in a row began before the one before them was ended; allowed: a loop that calls Megatron's "
                "finalize_model_grads, or megatron_global_lbl.end_step() after the last backward of a step"
            )
        self._say_dropped(left)
        self._drop(left)

    def discard(self, routers: Routers | None = None) -> None:
        """Forget what was counted since the last step's end: no optimizer step follows it. None: of all routers."""
        self._drop([layer for layer in self._layers_of(routers) if layer.may_have_counted])

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """All forwards and backwards of a step run within: in Python, or in a CUDA graph that is captured or replayed. The
        step's end comes after it."""
        for table in self._tables:
            if table.window is not None:  # a graph reads f where it lies, and must not hold the wait for it
                table.window.settle()
        with self.whole_graph.opened():
            yield

    def end_step(self, routers: Routers | None) -> bool:
        """The optimizer step's backward passes of these routers are over (None: of all that ran); whether any was counted.

        Raises:
            ConfigError: the step's routers had no auxiliary loss to act on, or forwards that were counted were not trained on;
                or a CUDA graph is being captured, whose replays would not end the step.
        """
        ended = [layer for layer in self._layers_of(routers) if layer.may_have_counted]
        for layer in ended:
            if is_capturing(layer.counts_C):
                raise ConfigError(
                    "the step's end is captured in a CUDA graph, so no replay would end its step; allowed: Megatron's "
                    "FullCudaGraphWrapper, or finalize_model_grads outside of the graph"
                )
            if layer.awaited:
                raise ConfigError(
                    f"{layer.awaited} forwards of MoE layer {layer.info.key} were counted, and the step ended without their "
                    "backward; allowed: forwards that are not trained on under torch.no_grad() or after model.eval(), and a "
                    "model's step end after all its backwards"
                )
        if routers is not None:  # of one model
            self._refuse_uneven_forwards(ended)
        if not any(layer.info.acts for layer in ended):
            self._refuse_nothing_to_act_on(routers)
        if not ended:
            return False
        iteration = self._iteration(ended[0])
        acting = [layer for layer in ended if layer.info.acts]
        if acting and not any(layer.kind for layer in acting) and iteration >= self.settings.start_iter:
            self._say_coefficient_is_zero(acting[0])
        for table in list(self._tables):
            of_table = [layer for layer in table.layers if layer in ended]
            if of_table and len(of_table) < len(table.layers):
                at = self._tables.index(table)
                self._tables[at : at + 1] = table.parted(of_table)
                table = self._tables[at]
            if of_table:
                table.end_step()
        if self._record is not None:
            self._record.end_step(ended, iteration)
        return True

    def begin_iteration(self) -> None:
        """An iteration of the training loop begins that is no repetition: what ended before it stays."""
        for table in self._tables:
            table.can_repeat = False

    def repeat_step(self, routers: Routers | None = None) -> None:
        """The step of these routers that ended last is run again, or a checkpoint goes back before it."""
        self.discard(routers)
        layers = self._layers_of(routers)
        for table in self._tables:
            if any(layer in layers for layer in table.layers):
                table.repeat_step()
        if self._record is not None:
            self._record.repeat_step(layers)

    def close(self) -> None:
        """Leave nothing under way; a backward that still comes says that it comes too late."""
        for table in self._tables:
            table.settle()
            table.removed = True
        if self._record is not None:
            self._record.settle()
        _held_by_graphs.extend(table for table in self._tables if any(layer.captured for layer in table.layers))

    def state(self, routers: Mapping[str, nn.Module] | None) -> dict[str, dict]:
        """What must travel in a checkpoint, by the routers' names; None: of all layers that were met.

        Returns:
            {name: {"steps": completed, and for `window` "counts" [steps, G, E + 1] int64 with what they depend on}}.

        Raises:
            ConfigError: no routers were named, and layers of several models were met.
        """
        if routers is None:
            self._require_one_model("state_dict", True)
            return {**self._loaded_by_key, **{layer.info.key: saved_state(layer) for layer in self._layers_of(None)}}
        found = {name: self._layers.get(router) for name, router in routers.items()}
        entries = {name: saved_state(layer) for name, layer in found.items() if layer is not None}
        waiting = {name: self._loaded[router] for name, router in routers.items() if router in self._loaded}
        return {**waiting, **entries}

    def load(self, state: dict[str, dict], routers: Mapping[str, nn.Module] | None) -> None:
        """Continue from `state()`; routers whose first forward is still to come take theirs up then.

        Raises:
            ConfigError: it belongs to another model; or no routers were named, and layers of several models were met.
        """
        if routers is None:
            gc.collect()  # on all ranks alike: a model that was replaced is gone, or it is still somebody's
            self._require_one_model("load_state_dict", len(self._layers) == len(self._layers_of(None)))
            self._loaded_by_key = dict(state)
            for layer in self._layers_of(None):
                if layer.info.key in state:
                    restore(layer, self._loaded_by_key.pop(layer.info.key))
            return
        for name, router in routers.items():
            if name in state and router in self._layers:
                restore(self._layers[router], state[name])
            elif name in state:
                self._loaded[router] = state[name]

    def _layers_of(self, routers: Routers | None) -> list[Layer]:
        """In the order in which they were met, the same on all ranks of a stage; None: those of models that are gone, too."""
        if routers is None:
            return [layer for table in self._tables for layer in table.layers]
        return [self._layers[router] for router in routers if router in self._layers]

    def _iteration(self, layer: Layer) -> int:
        iteration = self._clock()
        return layer.steps if iteration is None else iteration

    def _new_layer(self, router: nn.Module, info: RouterInfo) -> Layer:
        group = self._groups.get((id(info.stage), id(info.model)))
        if group is None:
            group = BalanceGroup.create(info.stage, info.model, self.settings.group_size)
            self._groups[id(info.stage), id(info.model)] = group
        self._forget_models_that_are_gone()
        table = next((table for table in self._tables if table.takes(info, group)), None)
        if table is None:
            table = LayerTable(info.num_layers, info, group, self.settings, self.whole_graph)
            self._tables.append(table)
        layer = self._layers[router] = Layer(info, table)
        self._met_twice |= info.key in self._met
        self._met.add(info.key)
        self._acts |= info.acts
        loaded = self._loaded.pop(router, None) or self._loaded_by_key.pop(info.key, None)
        if loaded is not None:
            restore(layer, loaded)
        return layer

    def _forget_models_that_are_gone(self) -> None:
        """Ranks collect them at different times: so only tables that no layer will join and no step's end will ask for."""
        alive = set(self._layers.values())
        gone = [
            table
            for table in self._tables
            if not table.takes_more and not any(layer in alive or layer.may_have_counted for layer in table.layers)
        ]
        self._tables = [table for table in self._tables if table not in gone]
        if self._record is not None:
            self._record.forget([layer for table in gone for layer in table.layers])

    def _drop(self, layers: list[Layer]) -> None:
        for table in self._tables:
            of_table = [layer for layer in table.layers if layer in layers]
            if of_table:
                table.drop_step(of_table)
        if self._record is not None and layers:
            self._record.drop(layers)

    def _refuse_capture(self) -> None:
        if self.settings.start_iter:
            raise ConfigError(
                f"--moe-lbl-start-iter {self.settings.start_iter} is not supported with CUDA graphs of the router; allowed: "
                "without it, or graphs of other modules"
            )
        if self._record is not None:
            self._record.refuse_capture()

    def _refuse_uneven_forwards(self, layers: list[Layer]) -> None:
        """A layer that runs only where the data wants it: its reductions meet those of another layer on another rank."""
        if self.settings.scope not in (Scope.DP, Scope.GLOBAL):
            return
        by_number = {
            layer.forwards // layer.info.applications: layer for layer in layers if layer.forwards and not layer.captured
        }
        if len(by_number) > 1:
            few, many = min(by_number), max(by_number)
            raise ConfigError(
                f"in this step MoE layer {by_number[few].info.key} ran {few} times, and {by_number[many].info.key} of the same "
                f"model {many} times; allowed with --moe-lbl-scope {self.settings.scope.value}: models whose MoE layers all "
                "run in every micro-batch, on every rank in the same order, which is how their counts are summed; scope window "
                "takes others"
            )

    def _refuse_nothing_to_act_on(self, routers: Routers | None) -> None:
        """A model without a loss may stand beside one with, whose first step is still to come: so not at its first end."""
        if self.settings.scope is Scope.MICRO:
            return
        of_step = [router for router in self._without_loss if routers is None or router in routers]
        for router in of_step:
            self._without_loss[router] += 1
        if not self._acts and any(self._without_loss[router] > 1 for router in of_step):
            raise ConfigError(
                f"--moe-lbl-scope {self.settings.scope.value} has nothing to act on: no router of this step has "
                "aux_loss or global_aux_loss in --moe-router-load-balancing-type"
            )

    def _say_dropped(self, layers: list[Layer]) -> None:
        if not any(layer.captured for layer in layers):  # else it is the warm-up of CUDA graphs
            self._say_once("forwards were counted that no step's end followed; their counts are dropped", layers[0])

    def _say_coefficient_is_zero(self, layer: Layer) -> None:
        if self.settings.scope is not Scope.MICRO and not layer.captured:
            scope = self.settings.scope.value
            self._say_once(
                f"!! the coefficient of the load-balancing loss is 0: scope {scope} does nothing until it is raised", layer
            )

    def _say_once(self, text: str, layer: Layer) -> None:
        """The first rank of the layer's pipeline stage says it."""
        if text not in self._said and layer.info.leads_stage:
            print(f"> moe-lbl: {text}", flush=True)
        self._said.add(text)

    def _require_one_model(self, verb: str, is_there: bool) -> None:
        if self._met_twice or not is_there:
            raise ConfigError(
                f"{verb} was not told whose state is meant, and the registration has met several models, or one that is gone; "
                f"allowed: {verb}(..., model=...) with the model or its chunks"
            )

"""What one registration does in the course of a training step; knows no symbol of Megatron.

The hook tells it of every router forward (`route`), of the end of a step (`end_step`) and of a step that was not one
(`discard`: warm-up of CUDA graphs). It owns the layers' counts and the window.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from megatron_global_lbl.attach import attach_loss
from megatron_global_lbl.balance import LayerBalance
from megatron_global_lbl.collective import BalanceGroup
from megatron_global_lbl.facts import RouterFacts
from megatron_global_lbl.record import BalanceRecord
from megatron_global_lbl.settings import ConfigError, Scope, Settings, Sync
from megatron_global_lbl.window import Window


class Engine:
    """State of one registration."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.window = Window(settings.window_steps) if settings.window_steps is not None else None
        self.record = BalanceRecord(settings) if settings.metrics_dir is not None else None
        self.steps_completed = 0
        self._layers: WeakKeyDictionary[nn.Module, LayerBalance] = WeakKeyDictionary()
        self._facts: WeakKeyDictionary[nn.Module, RouterFacts] = WeakKeyDictionary()
        self._groups: dict[tuple[int, int], BalanceGroup] = {}
        self._counted = False
        self._routers_without_loss = False

    def replaces_loss(self, iteration: int | None) -> bool:
        """Whether Megatron's own auxiliary loss is replaced in the iteration (0-based; None: count completed steps)."""
        if self.settings.scope is Scope.MICRO:
            return False
        return (self.steps_completed if iteration is None else iteration) >= self.settings.start_iter

    def counts_now(self, iteration: int | None) -> bool:
        """Whether routers are counted in the iteration: a window fills before `--moe-lbl-start-iter` as well."""
        return self.replaces_loss(iteration) or self.settings.scope is Scope.WINDOW

    def route(
        self,
        router: nn.Module,
        facts: Callable[[], RouterFacts],
        *,
        probs: Tensor,
        scores: Tensor,
        selection: Tensor,
        padding_mask: Tensor | None,
        iteration: int | None,
    ) -> Tensor:
        """A router's forward that autograd records.

        Args:
            router: whose forward it is.
            facts: called once per router.
            probs: [T, E] the router's output.
            scores: [T, E] the scores of its auxiliary loss.
            selection: [T, E] bool, the experts it selected.
            padding_mask: [T] bool, True for padding, or None.
            iteration: of the training loop, 0-based, or None when there is none.

        Returns:
            probs, with the loss attached if it is this plugin's to attach.
        """
        if router not in self._facts:
            self._facts[router] = facts()
        router_facts = self._facts[router]
        self._counted = True
        if self.record is not None:
            self.record.observe(router_facts, scores=scores, selection=selection, padding_mask=padding_mask)
        if not self.counts_now(iteration):
            return probs
        layer = self._layers.get(router)
        if layer is None:
            layer = self._layers[router] = self._new_layer(router_facts, scores)
        micro_batch = layer.count(selection, padding_mask, router_facts.coeff)
        if not self.replaces_loss(iteration):
            return probs
        return attach_loss(
            probs=probs,
            scores=scores,
            micro_batch=micro_batch,
            backward_scale=router_facts.backward_scale,
            per_token=router_facts.per_token,
        )

    def route_without_loss(self) -> None:
        """A router's training forward whose configuration has no loss that the scope could act on."""
        self._routers_without_loss = True

    def end_step(self, iteration: int | None) -> None:
        """The optimizer step's backward passes are over: log, feed the window, forget the counts.

        Raises:
            ConfigError: the step's routers had no auxiliary loss to act on.
        """
        if not self._counted:
            if self._routers_without_loss:
                raise ConfigError(
                    f"--moe-lbl-scope {self.settings.scope.value} has nothing to act on: no router of this step has "
                    "aux_loss or global_aux_loss in --moe-router-load-balancing-type with a --moe-aux-loss-coeff > 0"
                )
            return
        if self.replaces_loss(iteration):
            for router, layer in self._layers.items():
                self._facts[router].log(layer.loss_sum)
        if self.window is not None:
            counts = [(layer.window, layer.step_counts) for layer in self._layers.values() if layer.window is not None]
            self.window.step_completed(counts, blocking=self.settings.sync is Sync.BLOCKING)
        if self.record is not None:
            self.record.write(self.steps_completed + 1 if iteration is None else iteration + 1)
        self._forget_step()
        self.steps_completed += 1

    def discard(self) -> None:
        """Forget what was counted since the last step: no optimizer step follows it."""
        self._forget_step()
        if self.record is not None:
            self.record.reset()

    def _forget_step(self) -> None:
        for layer in self._layers.values():
            layer.reset()
        self._counted = False

    def _new_layer(self, facts: RouterFacts, scores: Tensor) -> LayerBalance:
        group = self._groups.get((id(facts.stage), id(facts.model)))
        if group is None:
            group = BalanceGroup.create(facts.stage, facts.model, self.settings.group_size)
            self._groups[id(facts.stage), id(facts.model)] = group
        num_experts = scores.shape[1]
        key, twins = facts.key, 2
        taken = {layer.key for layer in self._layers.values()}
        while key in taken:  # a second model in the process, or a layer number used twice by multi-token prediction
            key, twins = f"{facts.key}#{twins}", twins + 1
        layer = LayerBalance(key, num_experts, scores.device, group, self.settings)
        if self.window is not None:
            layer.window = self.window.add_layer(key, group, num_experts + 2, scores.device)
        return layer

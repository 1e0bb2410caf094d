"""What one registration does in the course of a training step; knows no symbol of Megatron.

The hook tells it of every router forward (`route`), of the end of a step (`end_step`), of a step that was not one (`discard`:
warm-up of CUDA graphs) and of one that did not count (`repeat_step`). It owns the layers' counts and the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_global_lbl.attach import attach_loss
from megatron_global_lbl.balance import LayerBalance
from megatron_global_lbl.collective import BalanceGroup, is_capturing
from megatron_global_lbl.facts import RouterFacts
from megatron_global_lbl.hook.log import takeover_notice
from megatron_global_lbl.logged_loss import step_losses
from megatron_global_lbl.passes import Pass
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
        self.takeover_is_said = False
        self._layers: WeakKeyDictionary[nn.Module, LayerBalance] = WeakKeyDictionary()
        self._facts: WeakKeyDictionary[nn.Module, RouterFacts | None] = WeakKeyDictionary()
        self._groups: dict[tuple[int, int], BalanceGroup] = {}
        self._counted = False
        self._routers_without_loss = False

    @property
    def has_counted(self) -> bool:
        """Whether a router has reported since the last step; a replayed CUDA graph counts without reporting."""
        return self._counted or any(layer.captured for layer in self._layers.values())

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
        facts: RouterFacts,
        *,
        which: Pass,
        probs: Tensor,
        scores: Tensor | None,
        selection: Tensor,
        padding_mask: Tensor | None,
        iteration: int | None,
    ) -> Tensor:
        """A router's forward in training.

        Args:
            router: whose forward it is.
            facts: of the router.
            which: RECORDED, or one of the two forwards of a recomputed layer.
            probs: [T, E] the router's output.
            scores: [T, E] the scores of its auxiliary loss; None in the first of two forwards.
            selection: [T, E] bool, the experts it selected.
            padding_mask: [T] bool, True for padding, or None.
            iteration: of the training loop, 0-based, or None when there is none.

        Returns:
            probs, with the loss attached if it is this plugin's to attach.
        """
        self._counted = True
        if is_capturing(selection) and (self.record is not None or self.settings.start_iter):
            raise ConfigError(
                "--moe-lbl-metrics-dir and --moe-lbl-start-iter are not supported with CUDA graphs of the router; allowed: "
                "without them, or graphs of other modules"
            )
        if self.record is not None and scores is not None:
            self.record.observe(facts, scores=scores, selection=selection, padding_mask=padding_mask)
        if not self.counts_now(iteration):
            return probs
        layer = self._layers.get(router)
        if layer is None:
            layer = self._layers[router] = self._new_layer(facts, selection)
        if which is Pass.AHEAD:
            layer.ahead.put(layer.count(selection, padding_mask))
            return probs
        micro_batch = layer.ahead.take_up() if which is Pass.AGAIN else layer.count(selection, padding_mask)
        if not self.replaces_loss(iteration):
            return probs
        assert scores is not None
        return attach_loss(
            probs=probs,
            scores=scores,
            micro_batch=micro_batch,
            backward_scale=facts.backward_scale,
            per_token=facts.per_token,
        )

    def facts(self, router: nn.Module, find: Callable[[], RouterFacts | None]) -> RouterFacts | None:
        """The router's facts, asked for once; None for a router without a loss that the scope could act on."""
        if router not in self._facts:
            found = find()
            if found is not None:
                self._refuse_unclear_order(found)
                self._say_takeover(found)
                found = replace(found, key=self._free_key(found.key))
            self._facts[router] = found
        self._routers_without_loss |= self._facts[router] is None
        return self._facts[router]

    def _free_key(self, key: str) -> str:
        """`key`, or with a number: a second model in the process, or (before 0.17) a layer of multi-token prediction, whose
        number is that of another layer."""
        taken = {facts.key for facts in self._facts.values() if facts is not None}
        free, twins = key, 2
        while free in taken:
            free, twins = f"{key}#{twins}", twins + 1
        return free

    def _refuse_unclear_order(self, facts: RouterFacts) -> None:
        own_counts = self.settings.scope is Scope.DP or self.settings.micro_coeff > 0
        if facts.recomputed and facts.applications > 1 and own_counts:
            # The repetitions of a micro-batch come back in reverse order; only sums over them are the same.
            raise ConfigError(
                "--moe-lbl-scope dp and --moe-lbl-micro-coeff are not supported with --mtp-use-repeated-layer and "
                "recomputation; allowed: --moe-lbl-scope global or window, or no --recompute-granularity"
            )

    def _say_takeover(self, facts: RouterFacts) -> None:
        if self.takeover_is_said or facts.loss_type != "global_aux_loss" or self.settings.scope is Scope.MICRO:
            return
        self.takeover_is_said = True
        if dist.get_rank() == min(dist.get_process_group_ranks(facts.stage)):
            print(f"> moe-lbl: {takeover_notice(facts.stage.size() // facts.model.size())}", flush=True)

    def end_step(self, iteration: int | None) -> None:
        """The optimizer step's backward passes are over: log, feed the window, forget the counts.

        Raises:
            ConfigError: the step's routers had no auxiliary loss to act on, or forwards that were counted were not trained on.
        """
        captured = any(layer.captured for layer in self._layers.values())
        if not self.has_counted:
            if self._routers_without_loss:
                raise ConfigError(
                    f"--moe-lbl-scope {self.settings.scope.value} has nothing to act on: no router of this step has "
                    "aux_loss or global_aux_loss in --moe-router-load-balancing-type with a --moe-aux-loss-coeff > 0"
                )
            return
        for layer in self._layers.values():
            layer.ahead.check()
        if self.replaces_loss(iteration):
            self._log()
        if self.window is not None:
            counts = [(layer.window, layer.step_counts) for layer in self._layers.values() if layer.window is not None]
            self.window.step_completed(counts, blocking=self.settings.sync is Sync.BLOCKING)
            if captured:  # nobody asks for f in the next step: the graph reads it where it lies
                self.window.settle()
        if self.record is not None:
            self.record.write(self.steps_completed + 1 if iteration is None else iteration + 1)
        self._forget_step()
        self.steps_completed += 1

    def discard(self) -> None:
        """Forget what was counted since the last step: no optimizer step follows it."""
        self._forget_step()
        if self.record is not None:
            self.record.reset()

    def repeat_step(self) -> None:
        """The step that ended last is run again, or a checkpoint goes back before it."""
        self.discard()
        if self.window is not None:
            self.window.forget_newest()

    def close(self) -> None:
        """Leave nothing under way."""
        self.discard()
        if self.window is not None:
            self.window.settle()

    def _forget_step(self) -> None:
        # Two launches for all layers: one per dtype.
        for tensors in zip(*(layer.forget() for layer in self._layers.values())):
            torch._foreach_zero_(tensors)
        self._counted = False

    def _log(self) -> None:
        alike: dict[tuple, list[tuple[RouterFacts, LayerBalance]]] = {}
        for router, layer in self._layers.items():
            facts = self._facts[router]
            assert facts is not None
            alike.setdefault((layer.num_experts, layer.topk, id(layer.group)), []).append((facts, layer))
        for pairs in alike.values():
            for (facts, _), loss in zip(pairs, step_losses([layer for _, layer in pairs])):
                facts.log(loss)

    def _new_layer(self, facts: RouterFacts, selection: Tensor) -> LayerBalance:
        group = self._groups.get((id(facts.stage), id(facts.model)))
        if group is None:
            group = BalanceGroup.create(facts.stage, facts.model, self.settings.group_size)
            self._groups[id(facts.stage), id(facts.model)] = group
        num_experts, device = selection.shape[1], selection.device
        # A layer that is applied several times per micro-batch adds its loss as often.
        micro_coeff = self.settings.micro_coeff / facts.applications
        layer = LayerBalance(facts.key, num_experts, facts.topk, facts.coeff, micro_coeff, device, group, self.settings)
        if self.window is not None:
            layer.window = self.window.add_layer(facts.key, group, num_experts, facts.topk, device)
        return layer

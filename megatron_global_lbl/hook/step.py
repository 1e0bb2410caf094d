"""Hooks the forward of a model chunk, and the beginning and the end of its optimizer step (0.14 to 0.19).

`finalize_model_grads` itself is handed around by value (the training loop, Megatron Bridge), so a symbol that it looks up
when it runs is replaced instead:

    _BaseDataParallel.forward                    a model chunk's forward: a micro-batch opens and closes. DDP and Megatron FSDP
                                                 inherit it
    _allreduce_non_tensor_model_parallel_grads   called once per step, after the last backward, by `finalize_model_grads` alone
    reset_model_temporary_tensors                since 0.15: called after it, and after the capture of CUDA graphs, whose
                                                 warm-up forwards must not be counted
    DistributedDataParallel.zero_grad_buffer     a step starts from zero gradients: what a failed one counted is void
    FullCudaGraphWrapper.__call__                runs a step with its `finalize_model_grads`, or replays it without any Python:
                                                 the step ends after it
    forward_step_calc_loss                       sees how many values the loss function returns, with per-token loss
    ParamAndGradBuffer.zero_grad                 the same of Megatron FSDP, whose `zero_grad_buffer` is handed around by value
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from megatron_global_lbl.core.step import Steps
from megatron_global_lbl.hook import compatibility, refusals
from megatron_global_lbl.hook.announcement import Announcement
from megatron_global_lbl.hook.models import refuse_other_routers, routers_of
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.hook.router import Bypasses, gradients_are_gone, is_seen
from megatron_global_lbl.settings import ConfigError, Scope

FINALIZE = "megatron.core.distributed.finalize_model_grads"
BASE = "megatron.core.distributed.data_parallel_base"
DDP = "megatron.core.distributed.distributed_data_parallel"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"
WHOLE_GRAPH = "megatron.core.full_cuda_graph"
FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"


class StepHooks:
    """The model chunks of this process, and the steps of their models."""

    def __init__(self, steps: Steps, bypasses: Bypasses, announcement: Announcement) -> None:
        self._steps, self._bypasses, self._announcement = steps, bypasses, announcement
        self._chosen = refusals.asked_for(steps.settings)
        self._named: WeakKeyDictionary[nn.Module, Callable | None] = WeakKeyDictionary()  # with a `forward` of the instance

    def _know(self, module: nn.Module) -> bool:
        """Make the module a chunk, if it is none yet. False without MoE layers."""
        if not self._steps.knows(module):
            refuse_other_routers(module, self._chosen)
            observed = self._steps.observer is not None
            routers = [router for router in routers_of(module).values() if is_seen(router, observed)]
            for router in routers:
                self._bypasses.watch(router)
            self._steps.know(module, routers)
        return bool(self._steps.routers_of(module))

    def forward(self, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run `original(*args, **kwargs)`, the forward of a chunk."""
        if not module.training or not torch.is_grad_enabled() or not self._know(module):
            return original(*args, **kwargs)
        if module in self._named and self._steps.was_trained(module):  # no wrapper says when a step begins
            routers = self._steps.routers_of(module)
            if gradients_are_gone(routers):
                self._steps.begin(routers)
        with self._steps.forward(module, _packed_sequences(kwargs)) as replayed:
            result = original(*args, **kwargs)
        if replayed:  # CUDA graphs of layers: their backwards are replayed after this tensor's
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            batch = replayed[0]
            scale = batch.chunk.layers[0].info.backward_scale
            if leaves:  # otherwise no backward comes
                leaves[0].register_hook(lambda _: batch.prepare_replays(scale()))
        return result

    def name_chunk(self, module: nn.Module) -> None:
        """Let a module's forward be that of a chunk, in a loop without Megatron's wrapper.

        Raises:
            ConfigError: it has no MoE layer.
        """
        from megatron.core.distributed.data_parallel_base import _BaseDataParallel

        if isinstance(module, _BaseDataParallel) or module in self._named:
            return
        if not self._know(module):
            raise ConfigError(f"chunk({type(module).__name__}): no MoE layer for {self._chosen} in it")
        own = vars(module).get("forward")

        def forward(called, *args, **kwargs):
            original = type(called).forward.__get__(called) if own is None else own
            return self.forward(called, original, args, kwargs)

        module.forward = MethodType(forward, module)
        self._named[module] = own

    def begin(self, module: nn.Module) -> None:
        """A step begins from zero gradients."""
        routers = self._steps.routers_of(module) if self._know(module) else []
        for router in routers:
            self._bypasses.watch(router)  # a method of an instance may be new
        if self._steps.may_have_counted:
            self._steps.begin(routers)

    def end(self, model: list[nn.Module] | None, lost: list[str]) -> None:
        """A model's step ends (None: that of all models that ran).

        Raises:
            ConfigError: a router did not report, or nothing was trained that the scope could act on.
        """
        steps = self._steps
        routers = None if model is None else list(routers_of(model).values())
        self._bypasses.refuse(routers, lost)
        if routers is None or model is None:
            ended = steps.end(None, None)
        else:
            ended = steps.end(routers, model[0])
            if ended is None or not ended.reported:
                training = [router for router in routers if router.training]
                if training:
                    refusals.refuse_replaced_symbols(lost)
                steps.refuse_nothing_to_act_on(training)
        if ended is not None:
            self._announcement.step_ended(ended, None if model is None else model[0])

    def remove(self) -> None:
        self._bypasses.remove()
        for module, own in self._named.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def install(patches: Patches, steps: Steps, hooks: StepHooks) -> None:
    """Let the chunks and steps of every model report."""
    chosen = refusals.asked_for(steps.settings)

    def wrap_forward(original):
        def forward(self, *args, **kwargs):
            return hooks.forward(self, original.__get__(self), args, kwargs)

        return forward

    def wrap_begin(original):
        def zero_grad_buffer(self, *args, **kwargs):
            # Megatron FSDP's buffer is no module, and holds the model.
            hooks.begin(self if isinstance(self, nn.Module) else self.module)
            return original(self, *args, **kwargs)

        return zero_grad_buffer

    def wrap_end(original):
        def allreduce_non_tensor_model_parallel_grads(model, *args, **kwargs):
            refusals.refuse_model(model, chosen)
            if steps.whole_graph.is_open:
                steps.finish_capture()
            else:
                hooks.end(model, patches.lost)
            return original(model, *args, **kwargs)

        return allreduce_non_tensor_model_parallel_grads

    def wrap_reset(original):
        def reset_model_temporary_tensors(config, model, *args, **kwargs):
            # In `finalize_model_grads` the step has ended already, or its end is still to come.
            if steps.has_counted and not steps.whole_graph.is_open:
                steps.discard(routers_of(model).values())
            return original(config, model, *args, **kwargs)

        return reset_model_temporary_tensors

    def wrap_whole_step(original):
        def __call__(self, *args, **kwargs):
            if kwargs.get("forward_only"):
                return original(self, *args, **kwargs)
            with steps.whole():
                result = original(self, *args, **kwargs)
            model = kwargs["model"]
            hooks.end(model if isinstance(model, list) else [model], patches.lost)
            return result

        return __call__

    def wrap_calc_loss(original):
        def forward_step_calc_loss(model, output_tensor, loss_func, config, *args, **kwargs):
            if loss_func is not None and config.calculate_per_token_loss and torch.is_grad_enabled():
                given = loss_func

                def loss_func(*args, **kwargs):
                    result = given(*args, **kwargs)
                    if not kwargs.get("non_loss_data"):
                        refusals.refuse_two_values(result, config, chosen)
                    return result

            return original(model, output_tensor, loss_func, config, *args, **kwargs)

        return forward_step_calc_loss

    patches.wrap(BASE, "_BaseDataParallel.forward", wrap_forward)
    if steps.settings.scope is not Scope.MICRO:
        patches.wrap(SCHEDULES, "forward_step_calc_loss", wrap_calc_loss)
    patches.wrap(DDP, "DistributedDataParallel.zero_grad_buffer", wrap_begin)
    if FSDP in sys.modules:  # `megatron.core.distributed` has imported it by now, if it can be
        patches.wrap(FSDP, "ParamAndGradBuffer.zero_grad", wrap_begin)
    patches.wrap(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap_end)
    patches.wrap(WHOLE_GRAPH, "FullCudaGraphWrapper.__call__", wrap_whole_step)
    if compatibility.has_global_aux_loss():
        patches.wrap(FINALIZE, "reset_model_temporary_tensors", wrap_reset)


def _packed_sequences(kwargs: dict[str, Any]) -> int | None:
    """Sequences of a packed micro-batch (`packed_seq_params`); None if it is not packed."""
    boundaries = getattr(kwargs.get("packed_seq_params"), "cu_seqlens_q", None)
    return None if boundaries is None else max(boundaries.numel() - 1, 1)


def current_iteration() -> int | None:
    """0-based iteration of Megatron's training loop, or None outside of it (a loop of the user's own)."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    args = getattr(global_vars, "_GLOBAL_ARGS", None)
    return getattr(args, "curr_iteration", None)

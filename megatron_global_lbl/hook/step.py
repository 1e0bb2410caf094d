"""Hooks the beginning and the end of a model's optimizer step (0.14 to 0.19).

`finalize_model_grads` itself is handed around by value (the training loop, Megatron Bridge), so a symbol that it looks up
when it runs is replaced instead:

    _allreduce_non_tensor_model_parallel_grads   called once per step, after the last backward, by it alone
    reset_model_temporary_tensors                since 0.15: called after it, and after the capture of CUDA graphs, whose
                                                 warm-up forwards must not be counted
    DistributedDataParallel.zero_grad_buffer     a step starts from zero gradients: what a failed one counted is void
    FullCudaGraphWrapper.__call__                runs a step with its `finalize_model_grads`, or replays it without any Python:
                                                 the step ends after it
    ParamAndGradBuffer.zero_grad                 the same of Megatron FSDP, whose `zero_grad_buffer` is handed around by value
"""

from __future__ import annotations

import sys

from torch import nn

from megatron_global_lbl.core.engine import Engine
from megatron_global_lbl.hook import compatibility, refusals
from megatron_global_lbl.hook.models import routers_of
from megatron_global_lbl.hook.patching import Patches

FINALIZE = "megatron.core.distributed.finalize_model_grads"
DDP = "megatron.core.distributed.distributed_data_parallel"
WHOLE_GRAPH = "megatron.core.full_cuda_graph"
FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"


def install(patches: Patches, engine: Engine) -> None:
    """Let the steps of every model report to `engine`."""
    chosen = refusals.asked_for(engine.settings)

    def wrap_begin(original):
        def zero_grad_buffer(self, *args, **kwargs):
            if engine.may_have_counted:
                # Megatron FSDP's buffer is no module, and holds the model.
                engine.begin_step(routers_of(self if isinstance(self, nn.Module) else self.module).values())
            return original(self, *args, **kwargs)

        return zero_grad_buffer

    def end(model):
        routers = routers_of(model).values()
        counted = engine.end_step(routers)
        if not counted and any(router.training for router in routers):
            refusals.refuse_replaced_symbols(patches.lost)

    def wrap_end(original):
        def allreduce_non_tensor_model_parallel_grads(model, *args, **kwargs):
            refusals.refuse_model(model, chosen)
            if engine.whole_graph.is_open:
                engine.whole_graph.join()
            else:
                end(model)
            return original(model, *args, **kwargs)

        return allreduce_non_tensor_model_parallel_grads

    def wrap_reset(original):
        def reset_model_temporary_tensors(config, model, *args, **kwargs):
            # In `finalize_model_grads` the step has ended already, or its end is still to come.
            if engine.has_counted and not engine.whole_graph.is_open:
                engine.discard(routers_of(model).values())
            return original(config, model, *args, **kwargs)

        return reset_model_temporary_tensors

    def wrap_whole_step(original):
        def __call__(self, *args, **kwargs):
            if kwargs.get("forward_only"):
                return original(self, *args, **kwargs)
            with engine.whole_step():
                result = original(self, *args, **kwargs)
            end(kwargs["model"])
            return result

        return __call__

    patches.wrap(DDP, "DistributedDataParallel.zero_grad_buffer", wrap_begin)
    if FSDP in sys.modules:  # `megatron.core.distributed` has imported it by now, if it can be
        patches.wrap(FSDP, "ParamAndGradBuffer.zero_grad", wrap_begin)
    patches.wrap(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap_end)
    patches.wrap(WHOLE_GRAPH, "FullCudaGraphWrapper.__call__", wrap_whole_step)
    if compatibility.has_global_aux_loss():
        patches.wrap(FINALIZE, "reset_model_temporary_tensors", wrap_reset)


def current_iteration() -> int | None:
    """0-based iteration of Megatron's training loop, or None outside of it (a loop of the user's own)."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    args = getattr(global_vars, "_GLOBAL_ARGS", None)
    return getattr(args, "curr_iteration", None)

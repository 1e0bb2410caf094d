"""Hooks the end of an optimizer step in `finalize_model_grads` (0.14 to 0.19).

`finalize_model_grads` itself is handed around by value (the training loop, Megatron Bridge), so a symbol that it looks up
when it runs is replaced instead:

    _allreduce_non_tensor_model_parallel_grads   called once per step, after the last backward, by it alone
    reset_model_temporary_tensors                since 0.15: called after it, and after the capture of CUDA graphs, whose
                                                 warm-up forwards must not be counted
"""

from __future__ import annotations

import sys

from megatron_global_lbl.engine import Engine
from megatron_global_lbl.hook import compatibility
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.settings import ConfigError

FINALIZE = "megatron.core.distributed.finalize_model_grads"


def install(patches: Patches, engine: Engine) -> None:
    """Let the end of every step report to `engine`."""

    def wrap_end(original):
        def allreduce_non_tensor_model_parallel_grads(model, *args, **kwargs):
            compatibility.refuse_unsupported_model(model)
            if not engine.has_counted and patches.lost and compatibility.has_routers(model):
                raise ConfigError(
                    f"no router of this step reported to --moe-lbl-scope: {', '.join(patches.lost)} was replaced after "
                    "`register`; allowed: register after whatever replaces it"
                )
            engine.end_step(current_iteration())
            return original(model, *args, **kwargs)

        return allreduce_non_tensor_model_parallel_grads

    def wrap_reset(original):
        def reset_model_temporary_tensors(*args, **kwargs):
            engine.discard()
            return original(*args, **kwargs)

        return reset_model_temporary_tensors

    patches.wrap(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap_end)
    if compatibility.has_global_aux_loss():
        patches.wrap(FINALIZE, "reset_model_temporary_tensors", wrap_reset)


def current_iteration() -> int | None:
    """0-based iteration of Megatron's training loop, or None outside of it (a loop of the user's own)."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    args = getattr(global_vars, "_GLOBAL_ARGS", None)
    return getattr(args, "curr_iteration", None)

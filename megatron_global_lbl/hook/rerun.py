"""Iterations that Megatron runs again (0.14 to 0.19).

After a result that is not plausible (`--rerun-mode`), or when a buffer overflowed (`--moe-expert-rank-capacity-factor`, since
0.18), the forwards and backwards of an iteration run a second time from the same state. The first run is taken out of log and
metrics. Replaced are

    RerunStateMachine.should_run_forward_backward   says that the iteration is run again
    PagedStashRunner.prepare_for_rerun              its own repetition, outside of the state machine
"""

from __future__ import annotations

import importlib
import importlib.util

from megatron_global_lbl.core.step import Steps
from megatron_global_lbl.hook.models import routers_of
from megatron_global_lbl.hook.patching import Patches

RERUN = "megatron.core.rerun_state_machine"
PAGED_STASH = "megatron.core.transformer.moe.paged_stash"


def install(patches: Patches, steps: Steps) -> None:
    """Let every iteration that is run again count once."""

    def wrap_run(original):
        def should_run_forward_backward(machine, *args, **kwargs):
            from megatron.core.rerun_state_machine import RerunState

            runs = original(machine, *args, **kwargs)
            if runs and machine.state is RerunState.RERUNNING_IN_PLACE:
                steps.take_back(None)
            return runs

        return should_run_forward_backward

    def wrap_paged_stash(original):
        def prepare_for_rerun(runner, is_training=True):
            if is_training:
                steps.take_back(list(routers_of(runner.model).values()))
            return original(runner, is_training=is_training)

        return prepare_for_rerun

    patches.wrap(RERUN, "RerunStateMachine.should_run_forward_backward", wrap_run)
    if importlib.util.find_spec(PAGED_STASH) is not None:
        if hasattr(importlib.import_module(PAGED_STASH), "PagedStashRunner"):
            patches.wrap(PAGED_STASH, "PagedStashRunner.prepare_for_rerun", wrap_paged_stash)

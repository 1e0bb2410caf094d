"""Iterations that Megatron runs again (`--rerun-mode`, `megatron.core.rerun_state_machine`, 0.14 to 0.19).

After a result that is not plausible the forwards and backwards of an iteration run a second time from the same state. Only
scope `window` remembers anything beyond them. Replaced are

    RerunStateMachine.should_run_forward_backward   says that the iteration is run again
    RerunStateMachine.should_checkpoint_and_exit    says that a checkpoint is written from which the iteration is run again
"""

from __future__ import annotations

from megatron_global_lbl.engine import Engine
from megatron_global_lbl.hook.patching import Patches

RERUN = "megatron.core.rerun_state_machine"


def install(patches: Patches, engine: Engine) -> None:
    """Let every iteration that is run again take its first run back from `engine`."""

    def wrap_run(original):
        def should_run_forward_backward(machine, *args, **kwargs):
            from megatron.core.rerun_state_machine import RerunState

            runs = original(machine, *args, **kwargs)
            if runs and machine.state is RerunState.RERUNNING_IN_PLACE:
                engine.repeat_step()
            return runs

        return should_run_forward_backward

    def wrap_checkpoint(original):
        def should_checkpoint_and_exit(machine, *args, **kwargs):
            result = original(machine, *args, **kwargs)
            if result[0]:
                engine.repeat_step()
            return result

        return should_checkpoint_and_exit

    patches.wrap(RERUN, "RerunStateMachine.should_run_forward_backward", wrap_run)
    patches.wrap(RERUN, "RerunStateMachine.should_checkpoint_and_exit", wrap_checkpoint)

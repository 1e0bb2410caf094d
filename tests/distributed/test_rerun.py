"""Iterations that Megatron's own RerunStateMachine runs again count once."""

from __future__ import annotations

import harness
import pytest
import several
from compare import check
from layout import Layout
from truth import Problem


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_a_step_that_is_run_again(workers, scope):
    check(workers, Problem(scope, 2, 2, 5, window_steps=2, masks="uneven"), Layout(rerun_at=2))


def window_after(problem, layout, writes_checkpoint: bool):
    """In a worker: what a checkpoint holds after the last step, or when that step is to be run again from it."""
    from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine

    import megatron_global_lbl as lbl

    with lbl.registered(scope="window", window_steps=2) as handle:
        harness._train(problem, layout, {})
        if writes_checkpoint:
            machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
            machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
            assert machine.should_checkpoint_and_exit()[:2] == (True, True)
        return {key: layer["counts"] for key, layer in handle.state_dict()["layers"].items()}


def test_a_checkpoint_from_which_a_step_is_run_again(workers):
    """It lacks that step, and holds again the one that had left the window."""
    two, three = Problem("window", 2, 2, 2, window_steps=2), Problem("window", 2, 2, 3, window_steps=2)
    expected = workers.run(window_after, 2, two, Layout(), False)
    found = workers.run(window_after, 2, three, Layout(), True)
    undone = workers.run(window_after, 2, three, Layout(), False)
    for rank in range(2):
        for key in ("0", "1"):
            assert found[rank][key].equal(expected[rank][key]) and not undone[rank][key].equal(expected[rank][key])


def with_a_paged_stash(a, handle):
    """Steps of which the second is run again, as `PagedStashRunner` does it when its buffers overflow (0.18, 0.19)."""
    from types import SimpleNamespace

    import torch
    from megatron.core.transformer.moe.paged_stash import PagedStashRunner

    runner = object.__new__(PagedStashRunner)
    runner.stash_manager = SimpleNamespace(overflow=None, host_spill=None, release_stash_buffers=lambda: None)
    runner.model, runner.moe_layers, runner._configs_to_sync_moe_paged_stash = a.chunks, [], []
    runner.optimizer = runner.forward_backward_func = None
    runner.copy_main_params, runner._required_recv_capacity = False, None  # the second since 0.20
    a.step()
    a.step(a.step_number)
    runner.prepare_for_rerun(is_training=True)
    a.step()
    a.step()
    for chunk in a.chunks:
        chunk.eval()
    for _ in range(2):
        with torch.no_grad():
            a.forward(0)
        runner.prepare_for_rerun(is_training=False)
    a.step()
    a.step()


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_a_step_that_a_paged_stash_runs_again(workers, scope):
    """Its first run counts nothing, and a validation that is run again takes nothing back."""
    several.check(workers, with_a_paged_stash, Problem(scope, 2, 2, 5, window_steps=2, masks="uneven"))

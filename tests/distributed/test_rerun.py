"""Iterations that Megatron's own RerunStateMachine runs again count once."""

from __future__ import annotations

import pytest
import several
from compare import check
from layout import Layout
from truth import Problem


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_a_step_that_is_run_again(workers, scope):
    check(workers, Problem(scope, 2, 2, 5, masks="uneven"), Layout(rerun_at=2))


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


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_a_step_that_a_paged_stash_runs_again(workers, scope):
    """Its first run counts nothing, and a validation that is run again takes nothing back."""
    several.check(workers, with_a_paged_stash, Problem(scope, 2, 2, 5, masks="uneven"))

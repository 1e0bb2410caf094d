"""The window's sums are exact, step by step, and survive being saved and loaded."""

from types import SimpleNamespace

import pytest
import torch

from megatron_global_lbl.core.collective import BalanceGroup
from megatron_global_lbl.core.window import Window

ONE_RANK = SimpleNamespace(size=lambda: 1)
GROUP = BalanceGroup(stage=ONE_RANK, model=ONE_RANK, counted=ONE_RANK, size=1, index=0, parts=1, leads=True)


def window_of(steps: int, layers: int = 1) -> Window:
    return Window(steps, GROUP, torch.zeros(layers, 4, dtype=torch.int64), 2)


def completed(window: Window, step: int) -> torch.Tensor:
    """Complete a step whose counts are known: 3 experts, micro-batches."""
    counts = torch.tensor([step, 2 * step + 1, 5, 2])
    window.step_completed(counts.view(1, 4), blocking=False)
    return counts


def test_sums_the_last_steps_exactly():
    window = window_of(4)
    assert window.counts().tolist() == [[0] * 4], "f is uniform before the first step"
    history = []
    for step in range(600):
        history.append(completed(window, step))
        assert window.counts()[0].equal(sum(history[-4:]))
    assert window.counts().dtype == torch.int64
    counts = sum(history[-4:]).double()
    tokens = counts[:3].sum() / 2 / counts[3]  # top-2; per micro-batch
    expected = 3 * counts[:3] / counts[:3].sum()
    torch.testing.assert_close(window.score_gradient(per_token=True)[0].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(window.score_gradient(per_token=False)[0].double(), expected / tokens, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps, kept", [(4, 4), (2, 2), (9, 4)])
def test_continues_from_its_state(steps, kept):
    window = window_of(4)
    history = [completed(window, step) for step in range(6)]
    resumed = window_of(steps)
    resumed.load(0, window.state(0))
    assert resumed.counts()[0].equal(sum(history[-kept:]))
    history.append(completed(resumed, 6))
    assert resumed.counts()[0].equal(sum(history[-min(steps, kept + 1) :]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_layers_continue_that_have_completed_other_numbers_of_steps(order):
    """Each forgets its own oldest step when it has W of them."""
    states = [torch.randint(9, (steps, 1, 4)) for steps in (2, 3)]
    window, history = window_of(3, layers=2), [list(state[:, 0]) for state in states]
    for row in order:
        window.load(row, states[row])
    for step in range(5):
        for row in (0, 1):
            assert window.counts()[row].equal(sum(history[row][-3:])), f"layer {row} after {step} steps"
        counts = torch.randint(9, (2, 4))
        window.step_completed(counts, blocking=False)
        for row in (0, 1):
            history[row].append(counts[row])


def test_layers_that_part_keep_their_steps():
    window, history = window_of(3, layers=3), []
    for _ in range(5):
        history.append(torch.randint(9, (3, 4)))
        window.step_completed(history[-1], blocking=False)
    parted = window.with_rows([0, 2])
    assert parted.counts().equal(sum(history[-3:])[[0, 2]])
    assert parted.score_gradient(per_token=False).equal(window.score_gradient(per_token=False)[[0, 2]])


def test_the_newest_step_can_be_taken_back():
    """As often as Megatron runs an iteration again, and in a checkpoint that goes back before it."""
    window, undisturbed = window_of(3), window_of(3)
    for step in range(8):
        completed(undisturbed, step)
        for other in (99, 77):
            before = window.state(0)
            completed(window, other)
            window.take_back()
            assert window.state(0).equal(before)
        completed(window, step)
        assert window.counts().equal(undisturbed.counts())
        assert window.score_gradient(per_token=False).equal(undisturbed.score_gradient(per_token=False))

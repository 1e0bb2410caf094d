"""The window's sums are exact, step by step, and survive being saved and loaded."""

from types import SimpleNamespace

import pytest
import torch

from megatron_global_lbl.collective import BalanceGroup
from megatron_global_lbl.window import Window

ONE_RANK = SimpleNamespace(size=lambda: 1)
GROUP = BalanceGroup(stage=ONE_RANK, model=ONE_RANK, counted=ONE_RANK, size=1, index=0, parts=1)
CPU = torch.device("cpu")


def completed(window: Window, step: int) -> torch.Tensor:
    """Complete a step whose counts are known: 3 experts, micro-batches."""
    counts = torch.tensor([step, 2 * step + 1, 5, 2])
    window.step_completed([(window._layers["1"], counts)], blocking=False)
    return counts


def test_sums_the_last_steps_exactly():
    window = Window(4)
    layer = window.add_layer("1", GROUP, 3, 2, CPU)
    assert layer.counts.tolist() == [0] * 4, "f is uniform before the first step"
    history = []
    for step in range(600):
        history.append(completed(window, step))
        assert layer.counts.equal(sum(history[-4:]))
    assert layer.counts.dtype == torch.int64
    counts = sum(history[-4:]).double()
    tokens = counts[:3].sum() / 2 / counts[3]  # top-2; per micro-batch
    expected = 3 * counts[:3] / counts[:3].sum()
    torch.testing.assert_close(layer.score_gradient(per_token=True).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.score_gradient(per_token=False).double(), expected / tokens, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps, kept", [(4, 4), (2, 2), (9, 4)])
def test_continues_from_its_state(steps, kept):
    window = Window(4)
    window.add_layer("1", GROUP, 3, 2, CPU)
    history = [completed(window, step) for step in range(6)]
    resumed = Window(steps)
    resumed.load(window.state())
    assert resumed.state().keys() == {"1"}, "what was loaded is kept for layers that were not met yet"
    layer = resumed.add_layer("1", GROUP, 3, 2, CPU)
    assert layer.counts.equal(sum(history[-kept:]))
    history.append(completed(resumed, 6))
    assert layer.counts.equal(sum(history[-min(steps, kept + 1) :]))


def test_the_newest_step_can_be_taken_back():
    """As often as Megatron runs an iteration again, and in a checkpoint that goes back before it."""
    window, undisturbed = Window(3), Window(3)
    layers = [w.add_layer("1", GROUP, 3, 2, CPU) for w in (window, undisturbed)]
    for step in range(8):
        completed(undisturbed, step)
        for other in (99, 77):
            before = window.state()["1"]
            completed(window, other)
            window.forget_newest()
            assert window.state()["1"].equal(before)
            window.forget_newest()
            assert window.state()["1"].equal(before), "there is no newer step to be taken back"
        completed(window, step)
        assert layers[0].counts.equal(layers[1].counts)
        assert layers[0].score_gradient(per_token=False).equal(layers[1].score_gradient(per_token=False))


def test_state_of_another_model_is_refused():
    window = Window(4)
    window.load({"1": torch.zeros(2, 1, 9, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"\(1, 9\).*this run \(1, 4\)"):
        window.add_layer("1", GROUP, 3, 2, CPU)

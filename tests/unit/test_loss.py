"""The pure mathematics against its formula, in float64."""

import pytest
import torch

import megatron_global_lbl as lbl


def formula(scores, counts, coeff, tokens):
    E = scores.shape[1]
    return coeff * E * sum(counts[i].double() / counts.sum() * scores[:, i].sum() / tokens for i in range(E))


def random_problem(tokens=12, experts=5):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    return scores, torch.randint(1, 100, (experts,), generator=generator)


def test_value_and_gradient_are_the_formulas():
    scores, counts = random_problem()
    loss = lbl.load_balancing_loss(scores=scores, tokens_per_expert=counts, coeff=0.3)
    expected = formula(scores, counts, 0.3, 12)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (actual,) = torch.autograd.grad(loss, scores)
    (wanted,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=0)


def test_perfect_balance_is_one():
    loss = lbl.load_balancing_loss(scores=torch.full((6, 4), 0.25), tokens_per_expert=torch.full((4,), 3))
    assert loss.item() == pytest.approx(1.0, rel=1e-6)


def test_ranks_add_up_to_the_whole_batch():
    scores, counts = random_problem()
    whole = lbl.load_balancing_loss(scores=scores, tokens_per_expert=counts)
    parts = [lbl.load_balancing_loss(scores=part, tokens_per_expert=counts, num_tokens=12) for part in scores.split([5, 7])]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_padding_counts_nowhere():
    scores, counts = random_problem()
    mask = torch.arange(12) >= 7
    loss = lbl.load_balancing_loss(scores=scores, tokens_per_expert=counts, padding_mask=mask)
    torch.testing.assert_close(loss, formula(scores[:7], counts, 1.0, 7), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[7:].abs().sum() == 0 and gradient[:7].abs().min() > 0


def test_nothing_counted_gives_zero_not_nan():
    loss = lbl.load_balancing_loss(scores=torch.rand(3, 4), tokens_per_expert=torch.zeros(4, dtype=torch.int64))
    assert loss.item() == 0.0
    everything = torch.ones(3, dtype=torch.bool)
    counts = torch.ones(4, dtype=torch.int64)
    assert lbl.load_balancing_loss(scores=torch.rand(3, 4), tokens_per_expert=counts, padding_mask=everything).item() == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens_per_expert": torch.ones(5)}, "integer"),
        ({"tokens_per_expert": torch.ones(4, dtype=torch.int64)}, r"allowed: \[5\]"),
        ({"scores": torch.rand(3, 4, 5)}, r"allowed: \[tokens, experts\]"),
        ({"padding_mask": torch.zeros(12)}, "torch.bool"),
    ],
)
def test_bad_input_is_named(change, message):
    scores, counts = random_problem()
    with pytest.raises(ValueError, match=message):
        lbl.load_balancing_loss(**{"scores": scores, "tokens_per_expert": counts, **change})

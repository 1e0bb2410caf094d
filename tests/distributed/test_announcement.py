"""What is announced after a model's first step is what its routers did, as measured."""

from __future__ import annotations

from unittest import mock

import harness
import pytest
import several
from layout import Layout
from several import Spec, check
from truth import Problem


def steps(a, handle):
    for _ in range(a.problem.steps):
        a.step()


def announced(ranks: list[dict]) -> list[list[str]]:
    """By rank."""
    return [[line for line in rank["printed"].splitlines() if " acted on " in line] for rank in ranks]


def test_all_stages_in_one_line_of_rank_0(workers):
    problem = Problem("global", 2, 2, 2, layers=4, pipeline=(2, 1))
    mine, *others = announced(check(workers, steps, problem, layout=Layout(pp=2)))
    (line,) = mine
    assert line.startswith("> moe-lbl: iteration 1: scope global acted on 4 of 4 MoE layers with a loss; ")
    assert "the balance batch is 8 sequences (2 dp ranks x 2 micro-batches x 2 sequences)" in line
    assert others == [[], [], []]


def test_the_mean_balance_batch_under_accumulation(workers):
    """(M + 1) / 2M of the step."""
    ((line,), _) = announced(check(workers, steps, Problem("global", 2, 3)))
    assert "is 12 sequences (2 dp ranks x 3 micro-batches x 2 sequences); on average over the step's micro-batches" in line
    assert "f was counted over 8 sequences, 64 tokens; plain: tensors on cpu" in line
    assert "!!" not in line and "expert bias" not in line


def without_a_clock(a, register):
    import megatron_global_lbl as lbl

    with lbl.registered(**register):
        for _ in range(a.problem.steps):
            a.step()


def test_stages_without_moe_layers_agree_on_the_iteration(workers):
    """A loop without a clock that crosses `start_iter`: the stages exchange what they did in the same step."""
    problem = Problem("global", 2, 2, 4, layers=2, pipeline=(2, 1), dense=(1,), start_iter=2)
    arguments = {"scope": "global", "start_iter": 2}
    ranks = check(workers, without_a_clock, problem, layout=Layout(pp=2), register={}, args=(arguments,))
    mine, *others = announced(ranks)
    assert [line.split(": scope")[0] for line in mine] == ["> moe-lbl: iteration 3"] and others == [[], [], []]


def test_the_balance_batch_of_dp(workers):
    ((line,), _) = announced(check(workers, steps, Problem("dp", 2, 3)))
    assert "is 4 sequences (2 dp ranks x 2 sequences); on average" in line and "over 4 sequences, 32 tokens;" in line


def with_log_interval(a, interval, handle):
    from megatron_global_lbl.hook import announcement

    with mock.patch.object(announcement, "LOG_INTERVAL", interval):
        steps(a, handle)


@pytest.mark.parametrize("interval, iterations", [(1, [1, 2, 3, 5]), (2, [1, 3, 5]), (3, [1, 4]), (100, [1])])
def test_a_schedule_is_announced_once_per_log_interval(workers, interval, iterations):
    """`--step-batch-size-schedule`: the number of micro-batches changes in iterations 2, 3 and 5."""
    problem = Problem("global", 2, 5, 5, ramp_up=(1, 2, 3, 3))
    lines, others = announced(check(workers, with_log_interval, problem, args=(interval,)))
    assert [int(line.split("iteration ")[1].split(":")[0]) for line in lines] == iterations and others == []
    for line, iteration in zip(lines, iterations):
        assert f"(2 dp ranks x {problem.micro_batches_at(iteration - 1)} micro-batches x 2" in line


def with_metrics(a, handle):
    for step in range(a.problem.steps):
        a.step()
        if step % 2:
            handle.metrics()


MICRO = "!! that is what scope micro counts: global needs more data-parallel ranks or micro-batches"
REGISTER = {"scope": "global", "metrics": "brief"}


def test_one_rank_and_one_micro_batch(workers):
    (rank,) = check(workers, with_metrics, Problem("global", 1, 1, 4), register=REGISTER)
    ((line,),) = announced([rank])
    assert line.endswith(MICRO) and rank["printed"].count("Scope global does what micro does") == 1


def test_a_schedule_raises_no_false_alarm(workers):
    (rank,) = check(workers, with_metrics, Problem("global", 1, 3, 4, ramp_up=(1, 2)), register=REGISTER)
    ((line,),) = announced([rank])
    assert line.endswith(MICRO)  # as measured in the first step
    assert "does what micro does" not in rank["printed"]


def packed(a, sequences, handle):
    """Megatron's own loop, in which the wrapper is given `packed_seq_params`."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    boundaries = torch.arange(sequences + 1, dtype=torch.int32)
    forward = a.toy.forward
    a.toy.forward = lambda x, padding, packed_seq_params: forward(x, padding)
    for _ in range(a.problem.steps):
        a.begin()
        for shard in a._shards:
            a.backward(a.chunks[0](*shard, packed_seq_params=PackedSeqParams(cu_seqlens_q=boundaries)))
        a.end()
    return handle.metrics()


def test_packed_sequences_count(workers):
    (rank, other) = check(workers, packed, Problem("global", 2, 3, 2), register=REGISTER, args=(16,))
    ((line,),) = announced([rank])
    assert "is 96 sequences (2 dp ranks x 3 micro-batches x 16 sequences)" in line and "over 64 sequences, 64 tokens" in line
    assert rank["value"]["moe_lbl/balance_sequences"] == 64
    assert "Balance BSZ" not in rank["printed"]
    (rank, other) = check(workers, packed, Problem("global", 2, 3, 2), register=REGISTER, args=(3,))
    assert "Balance BSZ 12 (scope global)" in rank["printed"]


def test_an_expert_bias_beside_the_loss(workers):
    problem = Spec(Problem("global", 2, 2, score="sigmoid", bias=True), {"moe_router_bias_update_rate": 0.0})
    ((line,), _) = announced(check(workers, steps, problem))
    assert line.endswith("; the expert bias asks for an even load over the global batch, too, so the loss' gradient is small")


def upstreams_counter(a, handle):
    a.begin()
    a.micro_batch(0)
    counter = a.toy.blocks[0].router.global_tokens_per_expert.clone()
    a.end()
    return counter


def test_a_counter_that_stays_zero_is_said(workers):
    problem = Spec(Problem("global", 2, 1), {"moe_router_load_balancing_type": "global_aux_loss"})
    rank, other = check(workers, upstreams_counter, problem)
    assert not rank["value"].any() and rank["printed"].count("global_tokens_per_expert stays 0") == 1
    assert "global_tokens_per_expert" not in other["printed"]


def with_two_values(a, handle):
    forward_step = harness._forward_step

    def two_values(*arguments):
        output, loss_func = forward_step(*arguments)
        return output, lambda output: loss_func(output)[::2]

    with mock.patch.object(harness, "_forward_step", two_values):
        a.step()


def test_a_loss_function_of_two_values(workers):
    """With per-token loss upstream divides nothing by the number of tokens, which is then 0."""
    refused = "--calculate-per-token-loss: the loss function returned 2 values, .* Let it return 3 values"
    check(workers, with_two_values, Problem("global", 1, 2, per_token=True), refused=refused)
    check(workers, steps, Problem("global", 1, 2, per_token=True))


def no_tokens(a, handle):
    a.step()
    return handle.metrics()


def test_an_interval_without_a_valid_token(workers):
    """Nothing rather than zeros, which would look like a perfect balance."""
    problem = Problem("global", 1, 2, masks="empty_rank")
    (rank,) = workers.run(several.run, 1, no_tokens, (Spec(problem),), Layout(), REGISTER, True, ())
    assert rank["refused"] is None and rank["value"] == {}

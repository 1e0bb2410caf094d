"""Part of the model is frozen: its layers stay in Megatron's log and in the metrics, with the values of an unfrozen run."""

from __future__ import annotations

import contextlib
import io

import harness
import pytest
from layout import Layout
from logged import of_the_log
from megatron_log import reported
from truth import Problem


def trained(problem, layout, freeze, fused, register):
    """In a worker: (`load_balancing_loss` as Megatron logs it, what `Handle.metrics` says, what was printed)."""
    import megatron_global_lbl as lbl

    build, printed = harness.build, io.StringIO()

    def build_and_freeze(*arguments):
        config, model, chunks = build(*arguments)
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(freeze not in name)
            if freeze == "blocks.0.":  # and the embedding: a checkpointed call has no second run, and no backward comes
                chunk.pre_process = False
        return config, model, chunks

    if freeze is not None:
        harness.build = build_and_freeze
    try:
        with harness.loss_path(fused), contextlib.redirect_stdout(printed), lbl.registered(**register) as handle:
            harness._train(problem, layout, {})
            metrics = handle.metrics()
    finally:
        harness.build = build
    return reported(["load_balancing_loss"], problem.micro_batches, problem.layers), metrics, printed.getvalue()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("freeze", ["weight", "below", "blocks.0.", "blocks.1.", "blocks."])
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_the_log_is_that_of_an_unfrozen_run(workers, scope, freeze, recompute, fused):
    """All routers, all layers below them, the embedding with the first layer, the last layer, and all layers."""
    problem, layout = Problem(scope, 1, 2, 2, masks="uneven"), Layout(recompute=recompute)
    arguments = (fused, {"scope": scope, "metrics": "brief"})
    ((_, unfrozen, _),) = workers.run(trained, 1, problem, layout, None, *arguments)
    ((logged, metrics, printed),) = workers.run(trained, 1, problem, layout, freeze, *arguments)
    assert logged["load_balancing_loss"] == pytest.approx(of_the_log(problem), rel=1e-5)
    of_tokens = {name: value for name, value in unfrozen.items() if "balance" not in name}
    assert {name: metrics[name] for name in of_tokens} == pytest.approx(of_tokens, rel=1e-5)
    assert "acted on 2 of 2 MoE layers" in printed and "coefficient" not in printed


def test_a_coefficient_of_zero_is_still_said(workers):
    problem = Problem("global", 1, 2, coeff=0.0)
    ((_, _, printed),) = workers.run(trained, 1, problem, Layout(), None, False, {"scope": "global", "metrics": "brief"})
    assert "!! the coefficient of the load-balancing loss is 0" in printed

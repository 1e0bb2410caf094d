"""`metrics`: what every rank is told of the balance, in every layout, against the sums of the formula."""

from __future__ import annotations

import harness
import numpy as np
import pytest
import several
from compare import check
from layout import Layout
from test_balance_record import assert_step, expected, steps_by_run
from truth import Problem, sums

LAYOUTS = [
    Layout(pp=2),
    Layout(tp=2, recompute="full"),
    Layout(tp=2, cp=2),
    Layout(pp=2, chunks=2, recompute="selective"),
]
NAMES = ("lbl_global", "lbl_micro", "max_vio", "entropy", "dead", "cv", "uncertainty")
DETAILED = ("effective", "margin", "moved")


def trained(problem, layout, register, extra=None):
    """In a worker. What `Handle.metrics` says after the last step."""
    import megatron_global_lbl as lbl

    with lbl.registered(**register) as handle:
        harness._train(problem, layout, extra or {})
        return handle.metrics()


def problem_for(layout: Layout, scope: str = "global", steps: int = 2, **options) -> Problem:
    dp = 4 // (layout.tp * layout.cp * layout.pp)
    layers = max(2, layout.pp * layout.chunks)
    sizes = {"layers": layers, "pipeline": (layout.pp, layout.chunks), **options}
    return Problem(scope, dp, 4 if layout.chunks > 1 else 3, steps, **sizes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(workers, tmp_path, layout):
    problem = problem_for(layout, steps=1, masks="uneven")
    register = {"scope": "global", "metrics": "detailed", "metrics_dir": str(tmp_path)}
    told, *others = workers.run(trained, layout.world_size(problem), problem, layout, register)
    assert told and all(other == told for other in others)
    (steps,) = steps_by_run(tmp_path)
    for step, found in enumerate(steps):
        assert_step(found, expected(problem, step, "global"))
    last = steps[-1]
    layers = [int(name) for name in last["layers"]]
    assert layers == list(range(problem.layers))
    for name in NAMES:
        values = last[name].astype(float)
        worst = np.argmin(values) if name in ("entropy", "uncertainty") else np.argmax(values)
        for key, value in {
            name: values.sum() if name == "dead" else values.mean(),
            f"{name}_worst": values[worst],
            f"{name}_p50": np.percentile(values, 50),
            f"{name}_p90": np.percentile(values, 90),
        }.items():
            assert told[f"moe_lbl/{key}"] == pytest.approx(value, rel=1e-5), key
    assert (told["moe_lbl/balance_sequences"], told["moe_lbl/balance_tokens"]) == pytest.approx(last["balance"])
    assert len(told) == 4 * (len(NAMES) + len(DETAILED)) + 2


def with_a_dense_stage(problem, layout, register):
    """In a worker. What every rank is told, and whether it has a MoE layer."""
    import megatron_global_lbl as lbl

    with lbl.registered(**register) as handle:
        result = harness._train(problem, layout, {})
        return handle.metrics(), any(pair[1] is not None for pair in result["grads"][0].values())


def test_a_stage_without_moe_layers(workers):
    """It takes part, and its ranks are told the same; layers are numbered as if it were there."""
    layout = Layout(pp=2)
    problem = problem_for(layout, dense=(1,))
    ranks = workers.run(with_a_dense_stage, 4, problem, layout, {"scope": "dp", "metrics": "brief"})
    assert {has_moe for _, has_moe in ranks} == {True, False}
    assert all(told == ranks[0][0] for told, _ in ranks)
    told = ranks[0][0]
    assert told["moe_lbl/balance_sequences"] == problem.dp * problem.batch
    assert len(told) == 2 * 5 + 2 and "moe_lbl/uncertainty" not in told


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_kernels_tell_the_same(workers, tmp_path, scope):
    """The Triton kernels hand over their own sums, also when a layer is recomputed."""
    problem = Problem(scope, 2, 2, 2, masks="uneven", micro_coeff=0.003 * (scope == "dp"))
    layout = Layout(recompute="full" if scope == "global" else None)
    check(workers, problem, layout, fused=True, register={"metrics": "brief", "metrics_dir": str(tmp_path)})
    (steps,) = steps_by_run(tmp_path)
    for step, found in enumerate(steps):
        assert_step(found, expected(problem, step, scope))


@pytest.mark.parametrize("kind", ["none", "seq_aux_loss"])
def test_without_a_loss_to_act_on(workers, tmp_path, kind):
    """Expert bias alone: the load is seen; what needs scores only where another loss has them."""
    problem = problem_for(Layout(pp=2), "micro", bias=True, score="sigmoid")
    register = {"scope": "micro", "metrics": "detailed", "metrics_dir": str(tmp_path)}
    told = workers.run(trained, 4, problem, Layout(pp=2), register, {"load_balancing_type": kind})[0]
    (steps,) = steps_by_run(tmp_path)
    needs_scores = {"lbl_global", "lbl_micro"}
    for step, found in enumerate(steps):
        truth = expected(problem, step, "micro")
        if kind == "none":
            assert all(np.isnan(found[name]).all() for name in (*needs_scores, "uncertainty"))
            truth = {name: values for name, values in truth.items() if name not in needs_scores}
        assert_step(found, truth)
    assert ("moe_lbl/lbl_global" in told) == (kind != "none") and told["moe_lbl/max_vio"] > 0


def asked_twice(a, b, handle):
    """A custom loop that writes a record, which ends an interval with every step."""
    told = []
    for _ in range(2):
        for model in (a, b, a, b):
            model.step()
        told.append(handle.metrics())
    return told


def test_metrics_since_the_last_call(workers, tmp_path):
    """Of all steps and all models, also where every step is an interval of the record."""
    a = Problem("global", 2, 2, 4)
    b = Problem("global", 2, 3, 4, seed=99)
    register = {"scope": "global", "metrics": "brief", "metrics_dir": str(tmp_path)}
    for rank in several.check(workers, asked_twice, a, b, register=register):
        for call, told in enumerate(rank["value"]):
            for problem, prefix in ((a, "moe_lbl/"), (b, "moe_lbl/model2/")):
                of_layers = zip(*(sums(problem, step) for step in (2 * call, 2 * call + 1)))
                loads = [sum(C.sum(0) for C, _, _ in of_steps) for of_steps in of_layers]
                worst = max(float(load_E.max() / load_E.mean()) - 1 for load_E in loads)
                assert told[f"{prefix}max_vio_worst"] == pytest.approx(worst, rel=1e-5)


def selected_and_told(problem, register, extra):
    """In a worker. The largest excess of what the routers selected, and the metrics."""
    import megatron_global_lbl as lbl

    with lbl.registered(**register) as handle:
        result = harness._train(problem, Layout(), extra)
        told = handle.metrics()
    loads = [sum(map_.float().sum((0, 1)) for map_ in maps) for maps in result["selections"][0].values()]
    return max(float(load.max() / load.mean() - 1) for load in loads), told


def test_quantile_balancing_is_recorded(workers):
    """It selects by a bias from quantiles, and no loss has scores."""
    extra = {"load_balancing_type": "quantile_balancing", "aux_loss_coeff": 0.0}
    problem = Problem("micro", 1, 3)
    ((worst, told),) = workers.run(selected_and_told, 1, problem, {"scope": "micro", "metrics": "brief"}, extra)
    assert told["moe_lbl/max_vio_worst"] == pytest.approx(worst, rel=1e-5) and "moe_lbl/lbl_global" not in told

"""What the loss of one layer launches and keeps, against Megatron's own, on two data-parallel ranks. Counts, no times.

The GPU's own counts are in tests/gpu/test_router_cost.py, times in benchmarks/router_cost.py.
"""

from __future__ import annotations

import pytest

SCOPES = ["dp", "global", "window"]


def measure(model: str, losses: list[str], router_dtype: str | None):
    """In a worker. By loss: (launches beyond a router without a loss, host waits, collectives, kept (bytes per token, bytes),
    launches at the end of a step)."""
    import router_cost
    import routers

    routers.start_megatron()
    none = router_cost.count(model, "none", tokens=64, router_dtype=router_dtype)
    result = {}
    for loss in losses:
        counts = router_cost.count(model, loss, tokens=64, router_dtype=router_dtype)
        launches = len(counts.forward) + len(counts.backward) - len(none.forward) - len(none.backward)
        kept = router_cost.kept_bytes(model, loss, router_dtype)
        at_end = len(counts.step_end) / router_cost.LAYERS
        result[loss] = (launches, counts.host_waits, counts.collectives, kept, at_end)
    return result


@pytest.mark.parametrize(
    "model, router_dtype", [("qwen3-30b-a3b", "fp32"), ("deepseek-v3", "fp32"), ("paper-3.4b-a0.6b", None)]
)
def test_no_more_than_aux_loss(workers, model, router_dtype):
    costs = workers.run(measure, 2, model, ["aux_loss", "global_aux_loss", *SCOPES], router_dtype)[0]
    launches, _, collectives, kept, at_end = costs["aux_loss"]
    assert launches > 10 and not collectives, "Megatron's aux_loss was not measured"
    assert costs["global_aux_loss"][2] == ["allreduce_"]
    for scope in SCOPES:
        assert costs[scope][0] <= launches, f"{scope} launches more than aux_loss: {costs}"
        assert costs[scope][0] < costs["global_aux_loss"][0], f"{scope} launches as much as global_aux_loss: {costs}"
        assert costs[scope][0] + costs[scope][4] <= launches + at_end, f"{scope}: more in a step of one micro-batch: {costs}"
        assert costs[scope][1] == [], f"{scope} makes the host wait for the device"
        assert costs[scope][2] == ([] if scope == "window" else ["allreduce_"]), "one reduction per layer and micro-batch"
        # The score function's own output is the same for all; what is added to it must be less.
        assert costs[scope][3][0] <= kept[0] and costs[scope][3][1] < kept[1], f"{scope} keeps more than aux_loss: {costs}"

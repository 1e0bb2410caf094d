"""D8: what Megatron logs with `global_aux_loss`.

A substring test in the training loop (`"aux_loss" in "global_aux_loss"`) makes it log a `load_balancing_loss` that does not
exist, as 0. The `global_load_balancing_loss` beside it is the mean over micro-batches of the loss with the counts so far (a
mean of prefixes), not the balance of the global batch, and its strength is not the gradient's (D2).

Shown: the names that Megatron's own training loop chooses (its own lines, executed), the values that its own tracker reports
for them after one step, and the balance of the whole global batch, which in scope `global` the plugin logs and writes to its
record (`--moe-lbl-metrics-dir`). The wheels before 0.17 carry no training loop: run this on a source tree there.

    python benchmarks/upstream/d8_logging.py

Threads: NVIDIA/Megatron-LM #1494, #7172.
"""

from __future__ import annotations

import math
import sys
import tempfile

import side_by_side
from logged import logged
from logged_names import logged_names
from side_by_side import Finding, Layout, Pool, Problem, true_values

from megatron_global_lbl.metrics import read

PROBLEM = Problem("global", 2, 3)


def show(pool: Pool) -> Finding:
    whole, prefix = true_values(PROBLEM)
    names = pool.run(logged_names, 1, "global_aux_loss")[0]
    own_names = pool.run(logged_names, 1, "aux_loss")[0] or ["load_balancing_loss"]
    upstream = logged(pool, PROBLEM, Layout(), None, side_by_side.UPSTREAM, names)
    with tempfile.TemporaryDirectory() as folder:
        plugin = logged(pool, PROBLEM, Layout(), {**side_by_side.PLUGIN, "metrics_dir": folder}, {}, own_names)
        (run,) = read(folder)
    recorded = float(run.metrics["lbl_global"][-1].mean())
    rows = []
    spurious = "load_balancing_loss" in upstream
    if names is not None:
        shown = f"{upstream['load_balancing_loss']:.4f}" if spurious else "not logged"
        rows.append(("load_balancing_loss (with global_aux_loss there is none)", "not logged", shown, "not logged"))
    loss = upstream["global_load_balancing_loss"]
    rows += [
        ("logged LBL, against that of the global batch", f"{whole:.4f}", f"{loss:.4f}", f"{plugin['load_balancing_loss']:.4f}"),
        ("recorded LBL of the global batch", f"{whole:.4f}", "no record", f"{recorded:.4f}"),
    ]
    right = set(plugin) == {"load_balancing_loss"} and all(
        math.isclose(value, whole, rel_tol=side_by_side.RELATIVE_ERROR) for value in (plugin["load_balancing_loss"], recorded)
    )
    notes = [f"the mean over micro-batches of the loss with the counts so far is {prefix:.4f}: what upstream logs"]
    notes += [
        "plugin: with --moe-router-load-balancing-type aux_loss; over a taken-over global_aux_loss Megatron logs the 0, too"
    ]
    if names is None:
        notes.append("no megatron.training beside this Megatron-Core: which names it logs was not looked at")
    no_such = (
        f"a load_balancing_loss of {upstream['load_balancing_loss']:g} that does not exist" if spurious else "no spurious name"
    )
    return Finding(
        side_by_side.defect("D8"),
        upstream_off=spurious or not math.isclose(loss, whole, rel_tol=side_by_side.OFF),
        plugin_right=right,
        summary=f"{no_such if names else 'names not looked at'}; logs {loss:.3f} where the global batch has {whole:.3f}; "
        f"plugin {plugin['load_balancing_loss']:.3f}",
        header=("dp 2, 3 micro-batches", "truth", "upstream", "plugin"),
        rows=rows,
        notes=notes,
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D8", show))

"""Which of the defects in `defects.py` the installed Megatron-Core has, found by running its router, not by its version.

    python -m megatron_global_lbl.hook.upstream_probes      one line of JSON: {"D1": {"present": true, "seen": "..."}, ...}

Works without a GPU and in one process: the process groups are PyTorch's `fake` ones, in which an all-reduce is answered as if
all ranks held the same tokens. Then every scope of f is the same, so `global_aux_loss` must have the gradient of `aux_loss`.
`doctor` runs it in a process of its own, because the stand-ins of CPU mode last for a process. The scripts in
`benchmarks/upstream` show the same in real training steps on real process groups, and a test compares the two.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

TOLERANCE = 1e-3


class Finding(NamedTuple):
    """`present` is None where it cannot be found out here; `seen` says what was seen."""

    present: bool | None
    seen: str


def probe_all() -> dict[str, Finding]:
    """A finding per defect, in a process in which nothing of Megatron has been imported. Installs CPU mode."""
    import megatron_cpu

    megatron_cpu.install()
    findings = {}
    for defect, probe in PROBES.items():
        try:
            findings[defect] = probe()
        except Exception as error:  # one probe that fails must not hide the others
            findings[defect] = Finding(None, f"the probe failed: {type(error).__name__}: {error}")
    return findings


@contextmanager
def identical_ranks(world_size: int, tensor_parallel: int = 1) -> Iterator[None]:
    """Process groups of `world_size` ranks that all hold the tokens of this process."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    all_reduce = dist.all_reduce

    def all_reduce_of_identical_ranks(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op == dist.ReduceOp.SUM:
            tensor.mul_(dist.get_world_size(group))
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    dist.all_reduce = all_reduce_of_identical_ranks
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel, create_gloo_process_groups=False)
        yield
    finally:
        dist.all_reduce = all_reduce
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _logits(tokens: int, seed: int = 0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=generator) + torch.linspace(0, 1.5, 8)


def _read(loss_type: str, micro_batches: list, **options: Any) -> list:
    from megatron_global_lbl.hook import one_router

    return one_router.read(loss_type, micro_batches, **options)


def _no_padding(tokens: int):
    import torch

    return torch.zeros(tokens, dtype=torch.bool)


def _takes_padding_mask() -> bool:
    from megatron_global_lbl.hook import one_router

    return one_router.takes_padding_mask()


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * abs(b)


def d1_rounded_counters() -> Finding:
    """The same micro-batch 300 times: f must stay what it was."""
    with identical_ranks(1):
        readings = _read("global_aux_loss", [(_logits(64), None)] * 300, bf16=True)
    first, last = readings[0].frequencies(), readings[-1].frequencies()
    off = float((last / first.clamp(min=1e-9) - 1).abs().max())
    return Finding(
        off > TOLERANCE, f"f off by {off:.0%} after 300 equal micro-batches in bf16, sum of f {float(last.sum()):.2f}"
    )


def _strength(padding: bool, per_token: bool, tensor_parallel: int = 1, data_parallel: int = 2) -> float:
    """Norm of the gradient over what it should be, in units in which DDP or `finalize_model_grads` average afterwards."""
    tokens = 16
    micro_batch = [(_logits(tokens), _no_padding(tokens) if padding else None)]
    with identical_ranks(data_parallel * tensor_parallel, tensor_parallel):
        (own,) = _read("global_aux_loss", micro_batch, calculate_per_token_loss=per_token)
    # alpha * E * f / tokens of the TP x CP group; with per-token loss not divided by tokens.
    true = own.selections.double() / own.selections.sum() * own.gradient.numel()
    if not per_token:
        true = true / (tokens * tensor_parallel)
    return float(own.gradient.norm() / true.norm())


def d2_strength() -> Finding:
    seen = {dp: _strength(padding=False, per_token=False, data_parallel=dp) for dp in (2, 4)}
    text = ", ".join(f"{strength:.2f} of the true gradient at dp {dp}" for dp, strength in seen.items())
    return Finding(not all(_same(strength, 1) for strength in seen.values()), text)


def d3_uneven_tokens() -> Finding:
    with identical_ranks(1):
        readings = _read("global_aux_loss", [(_logits(tokens, seed=tokens), None) for tokens in (48, 16, 32)])
    sums = [float(reading.frequencies().sum()) for reading in readings]
    text = "sum of f " + ", ".join(f"{s:.2f}" for s in sums) + " for micro-batches of 48, 16, 32 tokens"
    return Finding(not all(_same(s, 1) for s in sums), text)


def d4_token_count() -> Finding:
    if not _takes_padding_mask():
        return Finding(False, "this release's router takes no padding mask")
    without, with_mask = (_strength(padding=padding, per_token=True) for padding in (False, True))
    text = f"a mask without any padding changes the per-token strength at dp 2 by a factor of {with_mask / without:.2f}"
    return Finding(not _same(with_mask, without), text)


def d5_strength_by_flags() -> Finding:
    masks = (False, True) if _takes_padding_mask() else (False,)
    seen = [_strength(padding=mask, per_token=per_token, tensor_parallel=2) for mask in masks for per_token in (False, True)]
    text = f"{min(seen):.2f} to {max(seen):.2f} of the true gradient at dp 2, tp 2, by per-token loss and padding mask"
    return Finding(not _same(min(seen), max(seen)), text)


def d6_selection() -> Finding:
    import torch

    with identical_ranks(1):
        (reading,) = _read(
            "global_aux_loss",
            [(_logits(64), None)],
            expert_bias=torch.linspace(0.5, -0.5, 8),
            moe_router_score_function="sigmoid",
        )
    true = reading.selections.double() / reading.selections.sum()
    off = float((reading.frequencies() - true).abs().max())
    return Finding(off > TOLERANCE, f"with an expert bias f is off by up to {off:.2f}")


def d7_blocking_collectives() -> Finding:
    import torch.distributed as dist

    with identical_ranks(2):
        counted, all_reduce = [], dist.all_reduce

        def count(*args, **kwargs):
            counted.append(bool(kwargs.get("async_op", False)))
            return all_reduce(*args, **kwargs)

        dist.all_reduce = count
        try:
            _read("global_aux_loss", [(_logits(16), None)] * 3)
        finally:
            dist.all_reduce = all_reduce
    blocking = counted.count(False)
    return Finding(blocking > 0, f"{blocking} blocking all-reduces in one layer's 3 micro-batches")


def logged_names(loss_type: str) -> list[str] | None:
    """What Megatron's training loop logs for a loss type: its own lines, executed. None without a training loop."""
    folder = training_folder()
    if folder is None:
        return None
    tree = ast.parse((folder / "training.py").read_text(encoding="utf-8"))
    log = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "training_log")
    lines = [node for node in ast.walk(log) if isinstance(node, ast.If) and _appends_a_name(node)]
    lines.sort(key=lambda node: node.lineno)
    names: list[str] = []
    args = SimpleNamespace(moe_router_load_balancing_type=loss_type)
    module = ast.Module(body=list(lines), type_ignores=[])
    exec(compile(module, str(folder / "training.py"), "exec"), {"args": args, "track_names": names})
    return names


def _appends_a_name(node: ast.If) -> bool:
    return "moe_router_load_balancing_type" in ast.unparse(node.test) and "track_names" in ast.unparse(node.body[0])


def training_folder() -> Path | None:
    """The folder of `megatron.training` beside the installed `megatron.core`; one of another release does not count."""
    core = importlib.util.find_spec("megatron.core")
    if core is None or core.origin is None:
        return None
    folder = Path(core.origin).parent.parent / "training"
    return folder if (folder / "training.py").is_file() else None


def d8_logging() -> Finding:
    names = logged_names("global_aux_loss")
    if names is None:
        return Finding(None, "no megatron.training beside this Megatron-Core: nothing to look at")
    return Finding("load_balancing_loss" in names, "global_aux_loss alone is logged as " + " and ".join(names))


def d9_fused_count_dtype() -> Finding:
    if not _takes_padding_mask():
        return Finding(False, "this release's router takes no padding mask")
    with identical_ranks(1):
        (reading,) = _read("global_aux_loss", [(_logits(16), _no_padding(16))])
    count = reading.loss_arguments.get("total_num_tokens")
    kind = str(getattr(count, "dtype", type(count).__name__))
    return Finding("float" in kind, f"the token count is handed over as {kind}")


PROBES: dict[str, Callable[[], Finding]] = {
    "D1": d1_rounded_counters,
    "D2": d2_strength,
    "D3": d3_uneven_tokens,
    "D4": d4_token_count,
    "D5": d5_strength_by_flags,
    "D6": d6_selection,
    "D7": d7_blocking_collectives,
    "D8": d8_logging,
    "D9": d9_fused_count_dtype,
}


def has_global_aux_loss() -> bool:
    """Whether there is a `global_aux_loss` at all (since 0.15)."""
    import megatron_cpu

    megatron_cpu.install()
    router_class = importlib.import_module("megatron.core.transformer.moe.router").TopKRouter
    return hasattr(router_class, "_apply_global_aux_loss")


def main() -> None:
    """Print all findings as one line of JSON; an empty object for a release without `global_aux_loss`."""
    found = probe_all() if has_global_aux_loss() else {}
    print(json.dumps({defect: finding._asdict() for defect, finding in found.items()}), flush=True)


if __name__ == "__main__":
    main()

"""Balance records of made-up loads, written by the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.record import Run, read
from megatron_global_lbl.metrics.writer import Writer


def write(
    directory: Path, load_NLE: np.ndarray, *, steps: int = 10, sequences: float = 256, micro_sequences: float = 4, **about: Any
) -> Path:
    """A record with these loads, their MaxVio, dead experts and the like; LBL as if scores followed the loads by half."""
    count, layers, experts = load_NLE.shape
    settings = {"scope": "global", "alpha": 0.01, "data_parallel": 4, "micro_batches": 2, "settings": {}, **about}
    writer = Writer(directory, layers=[str(i + 2) for i in range(layers)], num_experts=experts, topk=2, about=settings)
    for number, load_LE in enumerate(load_NLE, 1):
        share_LE = load_LE / experts
        values = {
            "lbl_global": 1 + load_LE.var(axis=1) / 2,
            "lbl_micro": 1.3 + load_LE.var(axis=1) / 2,
            "max_vio": load_LE.max(axis=1) - 1,
            "entropy": -(share_LE * np.log(np.maximum(share_LE, 1e-9))).sum(axis=1) / np.log(experts),
            "dead": (load_LE == 0).sum(axis=1),
            "cv": load_LE.std(axis=1),
            "uncertainty": np.full(layers, 0.8),
        }
        balance = {"sequences": sequences, "tokens": 4096, "micro_sequences": micro_sequences}
        writer.append(iteration=number * steps, steps=steps, values=values, load=load_LE, **balance)
    return directory


def record(directory: Path, load_NLE: np.ndarray, **options: Any) -> Run:
    """The same, read."""
    (run,) = read(write(directory, load_NLE, **options))
    return run


def even(count: int, layers: int = 3, experts: int = 16, *, noise: float = 0.2) -> np.ndarray:
    """[N, L, E] loads around an even one."""
    load = np.exp(noise * np.random.default_rng(count).standard_normal((count, layers, experts)))
    return load / load.mean(axis=-1, keepdims=True)

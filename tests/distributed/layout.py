"""A layout: how a problem is spread over ranks, and the options of Megatron that must not change its gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from truth import Problem


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and options; data parallelism takes the ranks that are left."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    chunks: int = 1  # model chunks per pipeline stage (virtual pipeline)
    ep: int = 1
    etp: int | None = None  # tensor parallelism of the experts; None: as the rest
    moe: str = "router"  # router | layer: a bare TopKRouter, or a whole MoELayer with experts and dispatcher
    loss_scale: float = 1.0
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = False
    fsdp: str | None = None  # Megatron FSDP with this sharding strategy, instead of DDP
    instances: int = 1  # Megatron FSDP: outer data parallelism, over whole copies of what is sharded
    recompute: str | None = None  # full | selective | nested (one within the other)
    combined: bool = False  # combined 1F1B: --overlap-moe-expert-parallel-comm
    frozen: str | None = None  # router | below: parameters without gradient
    evaluate_between: bool = False
    rerun_at: int | None = None  # the step whose forwards and backwards Megatron runs twice
    overflow_at: int | None = None  # the step whose gradients are not finite
    config: dict[str, Any] = field(default_factory=dict, hash=False)  # more fields of TransformerConfig

    def world_size(self, problem: Problem) -> int:
        return self.tp * self.cp * self.pp * problem.dp

    def __str__(self) -> str:
        words = [f"{name}{getattr(self, name)}" for name in ("tp", "cp", "pp", "ep") if getattr(self, name) > 1]
        words += [f"vpp{self.chunks}"] * (self.chunks > 1) + [f"etp{self.etp}"] * (self.etp is not None)
        words += [self.moe] * (self.moe != "router") + [f"recompute-{self.recompute}"] * (self.recompute is not None)
        words += ["combined"] * self.combined
        words += [f"frozen-{self.frozen}"] * (self.frozen is not None)
        words += ["overlap"] * self.overlap_grad_reduce + ["distopt"] * self.distributed_optimizer
        words += [f"fsdp-{self.fsdp}"] * (self.fsdp is not None) + [f"instances{self.instances}"] * (self.instances > 1)
        return "-".join(words) or "data"

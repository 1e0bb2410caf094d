"""What differs between the supported releases, each difference in one function that says which release ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.hook.versions import require_supported


def has_global_aux_loss() -> bool:
    """Upstream's own `global_aux_loss` exists since 0.15."""
    return require_supported() >= (0, 15)


def process_groups(router) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The router's (TP x CP x DP) and (TP x CP) groups."""
    stage = getattr(router, "tp_dp_cp_group", None)
    if stage is None:  # the attribute ends this at 0.15
        from megatron.core import parallel_state

        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return stage, router.tp_cp_group


def takes_sigmoid_in_float32() -> bool:
    """Sigmoid scores of logits in another type are computed in float32 since 0.17."""
    return require_supported() >= (0, 17)


def proven_fsdp() -> str | None:
    """The class of Megatron FSDP whose gradients were compared with the formula in this release, None if none was. PyTorch's is
    TorchFullyShardedDataParallel."""
    return {(0, 19): "FullyShardedDataParallel", (0, 20): "FullyShardedDataParallelV1"}.get(require_supported())


def pipeline_group() -> dist.ProcessGroup | None:
    """One rank of each pipeline stage, this one among them; None without Megatron's global groups."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group() if parallel_state.model_parallel_is_initialized() else None


def pipeline_of(module: Any) -> dist.ProcessGroup | None:
    """The pipeline group over which the stages of a model agree, by the configuration of its first chunk on this rank; None if
    it has one stage, or none of Megatron's global groups."""
    stages = getattr(getattr(module, "config", None), "pipeline_model_parallel_size", 1)
    group = pipeline_group()
    return group if group is not None and group.size() == stages > 1 else None


def backward_scale(config) -> Callable[[], Tensor | float]:
    """Reads the factor that the schedule sets for auxiliary losses before each backward.

    It is loss_scale * cp / micro-batches, or loss_scale with per-token loss; DDP then divides by dp * cp, or
    `finalize_model_grads` by the step's tokens. Before 0.16 the schedule forgot cp, which is made up for here.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    forgotten = 1.0
    if require_supported() < (0, 16) and not config.calculate_per_token_loss:
        forgotten = float(config.context_parallel_size)

    def scale() -> Tensor | float:
        set_by_schedule = MoEAuxLossAutoScaler.main_loss_backward_scale
        if set_by_schedule is None:
            return forgotten
        return set_by_schedule if forgotten == 1.0 else set_by_schedule * forgotten

    return scale


def cuda_graphs(config) -> str:
    """What is captured in CUDA graphs: "none", "layers" or "iteration" (forward, backward and the step's end in one graph).

    Args:
        config: a TransformerConfig, or Megatron's arguments, which name these fields alike.
    """
    implementation = getattr(config, "cuda_graph_impl", "none") or "none"  # a field since 0.15
    if implementation == "none" and not (
        getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False)
    ):
        return "none"
    # A string, an enum member or a list of either, by release; since 0.18 an implementation of its own.
    parts = getattr(config, "cuda_graph_scope", None) or []
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    names = [implementation, *(getattr(part, "name", part) for part in parts)]
    return "iteration" if "full_iteration" in names else "layers"

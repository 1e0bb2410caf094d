"""What differs between the supported releases, each difference in one function that says which release ends it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.hook.versions import require_supported
from megatron_global_lbl.settings import ConfigError


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


def tells_mtp_routers() -> bool:
    """Routers know that they belong to multi-token prediction since 0.17."""
    return require_supported() >= (0, 17)


def recomputes_router(config) -> bool:
    """Whether Megatron may run a router's forward a second time, inside the backward."""
    granularity = config.recompute_granularity
    return granularity == "full" or (granularity == "selective" and "moe" in (config.recompute_modules or ()))


def pipeline_stage() -> int:
    """Index of this rank's pipeline stage."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def backward_scale(model: dist.ProcessGroup, config) -> Callable[[], Tensor | float]:
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
        return forgotten if set_by_schedule is None else set_by_schedule * forgotten

    return scale


@functools.cache
def _has_metrics_tracker() -> bool:
    return importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None


def log_aux_loss(name: str, loss: Tensor, layer_number: int, num_layers: int, model: dist.ProcessGroup) -> None:
    """Hand a layer's loss to Megatron's own logging, which sums over TP x CP and averages over data-parallel ranks."""
    if _has_metrics_tracker():
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(name, loss, layer_number, num_layers, reduce_group=model)
    else:  # the tracker of 0.18 ends this
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, loss, layer_number, num_layers, reduce_group=model)


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


def refuse_unsupported_config(config) -> None:
    """
    Raises:
        ConfigError: a configuration in which counts or gradients would be silently wrong.
    """
    if cuda_graphs(config) == "iteration":  # the step's end would be replayed without the Python that keeps the books
        raise ConfigError("--moe-lbl-scope is not supported with full_iteration CUDA graphs; allowed: CUDA graphs of layers")


def has_routers(model: list) -> bool:
    """Whether the model chunks have MoE routers that train."""
    from megatron.core.transformer.moe.router import TopKRouter

    return any(isinstance(module, TopKRouter) and module.training for chunk in model for module in chunk.modules())


def refuse_unsupported_model(model: list) -> None:
    """
    Args:
        model: the wrapped model chunks that `finalize_model_grads` was given.

    Raises:
        ConfigError: they are wrapped in something whose gradient reduction was not proven right.
    """
    for chunk in model:
        name = type(chunk).__name__
        if "FullyShardedDataParallel" in name:
            raise ConfigError(
                f"--moe-lbl-scope is not supported with {name} (Megatron FSDP, FSDP2) yet; allowed: Megatron's DDP"
            )

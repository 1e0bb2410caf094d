"""What differs between the supported releases, each difference in one function that says which release ends it."""

from __future__ import annotations

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


def log_aux_loss(name: str, loss: Tensor, layer_number: int, num_layers: int, model: dist.ProcessGroup) -> None:
    """Hand a layer's loss to Megatron's own logging, which sums over TP x CP and averages over data-parallel ranks."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging"):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(name, loss, layer_number, num_layers, reduce_group=model)
    else:  # the tracker of 0.18 ends this
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, loss, layer_number, num_layers, reduce_group=model)


def refuse_unsupported_config(config) -> None:
    """
    Raises:
        ConfigError: a configuration in which counts or gradients would be silently wrong.
    """
    # A replayed graph does not run the Python code that counts.
    if getattr(config, "enable_cuda_graph", False) or getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise ConfigError("--cuda-graph-impl (or --enable-cuda-graph) is not supported with --moe-lbl-scope yet; allowed: none")

"""The toy model under Megatron FSDP: wrapped as Megatron's training wraps a model, its weights and gradients as its optimizer
sees them, distributed tensors of which each rank holds some rows.
"""

from __future__ import annotations

import torch
from layout import Layout
from torch import Tensor

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def wrap(config, layout: Layout, module: torch.nn.Module):
    """A chunk of toy.py, in Float16Module or not, in Megatron FSDP; its blocks are what is gathered and released together."""
    from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel
    from toy import Block

    config.gradient_accumulation_fusion = False
    for block in _blocks(module):
        block.below._tensor_parallel_mode = "replicated"  # Megatron knows this of its own layers
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=layout.fsdp,
        num_distributed_optimizer_instances=layout.instances,
        gradient_reduce_div_fusion=False,  # NCCL only
    )
    return FullyShardedDataParallel(config=config, ddp_config=ddp_config, module=module, fsdp_unit_modules=[Block])


def load(wrapped, weights: list[tuple[Tensor, Tensor]]) -> None:
    """Set the toy's weights as an optimizer's step does: this rank's shards of the main weights, from them the model's."""
    fsdp = wrapped.module
    with torch.no_grad():
        for name, parameter in fsdp.param_and_grad_buffer.optimizer_named_parameters:
            position = 0 if name.endswith("below") else 1 if name.endswith(("moe.weight", "router.weight")) else None
            if position is not None:
                number = _blocks(fsdp.module)[int(name.removeprefix("module.").split(".")[1])].number
                parameter._local_tensor.copy_(weights[number - 1][position][_place(parameter)])
    fsdp.install_optimized_model_weights()
    fsdp.start_param_sync()


def _blocks(module: torch.nn.Module) -> torch.nn.ModuleList:
    return module.module.blocks if hasattr(module, "module") else module.blocks


def main_grad(parameter) -> Tensor:
    """The whole gradient that the optimizer is given for a parameter, put together from the ranks' shards."""
    buffer = parameter._megatron_fsdp_model.param_and_grad_buffer
    (name,) = (name for name, other in buffer.optimizer_named_parameters if other is parameter)
    grad = buffer.dist_main_grad[name]
    whole = torch.zeros(grad.shape)
    whole[_place(grad)] = grad.to_local()
    for dimension, placement in enumerate(grad.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(whole, group=grad.device_mesh.get_group(dimension))
    return whole


def _place(tensor) -> tuple[slice, ...]:
    """Where this rank's rows are in the whole."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import uneven_dtensor

    chunk = uneven_dtensor.gather_and_compute_chunk_metadata(tensor)
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def remove_hooks(wrapped) -> None:
    """Those at parameters, which hold the model in cycles that Python cannot collect."""
    for hook in wrapped.module.grad_acc_hooks.values():
        hook.remove()

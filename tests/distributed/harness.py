"""Runs a `Problem` in a layout: real routers and MoE layers inside Megatron's own schedules, DDP and `finalize_model_grads`.

Every rank returns the `main_grad` of its layers, step by step, and what its routers selected.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import fully_sharded
import torch
from layout import Layout
from megatron_log import forget_logged_losses
from truth import LENGTHS, Problem, inputs, weights


def run(problem: Problem, layout: Layout, register: dict[str, Any] | None, extra: dict[str, Any] | None = None):
    """One rank's part.

    Args:
        problem: its `pipeline` is set from the layout.
        layout: of all ranks.
        register: arguments of `lbl.register`; None for Megatron alone.
        extra: fields of TransformerConfig, by their names or by "load_balancing_type", "aux_loss_coeff", "router_dtype".

    Returns:
        {"grads": [step] {layer number: (W, router) main_grad, None where there is no such parameter},
         "hooked": [...],
         "loss_paths": {layer: ...} as the handle says,
         "place": (data-parallel rank, part of the sequence, parts),
         "selections": [step] {layer number: [micro-batch] [rows, B, E] bool}}
    """
    import megatron_global_lbl as lbl

    if register is None:
        return {**_train(problem, layout, extra or {}), "hooked": []}
    with lbl.registered(**register) as handle:
        return {**_train(problem, layout, extra or {}), "hooked": handle.hooked, "loss_paths": handle.loss_paths}


@contextmanager
def loss_path(fused: bool | None):
    """By the Triton kernels (which Triton's interpreter runs where there is no GPU) or in plain PyTorch; None: as it comes."""
    with mock.patch.dict(os.environ, {} if fused is None else {"MEGATRON_GLOBAL_LBL_FUSED": str(int(fused))}):
        yield


def run_with_path(fused: bool | None, *arguments):
    """`run` with this path of the loss."""
    with loss_path(fused):
        return run(*arguments)


def build(problem: Problem, layout: Layout, extra: dict[str, Any]):
    """(config, model chunks wrapped in DDP, the chunks themselves) of this rank, its process groups made first."""
    initialize(layout)
    return build_model(problem, layout, extra)


def initialize(layout: Layout) -> None:
    """Megatron's process groups of a layout."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=layout.instances,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build_model(problem: Problem, layout: Layout, extra: dict[str, Any], groups: Any = None):
    """(config, model chunks wrapped in DDP, the chunks themselves) of this rank.

    Args:
        problem: what is computed.
        layout: how.
        extra: more fields of TransformerConfig.
        groups: a `ProcessGroupCollection` instead of the groups that `initialize` made.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.transformer import TransformerConfig
    from toy import Chunk

    config = TransformerConfig(**_config_fields(problem, layout, extra))
    config.finalize_model_grads_func = finalize_model_grads
    config.overlap_moe_expert_parallel_comm = layout.combined  # here, because Megatron wants it in bf16 only
    if layout.loss_scale != 1.0:
        config.grad_scale_func = lambda loss: loss * layout.loss_scale
    stage = parallel_state.get_pipeline_model_parallel_rank() if groups is None else groups.pp.rank()
    chunks = [Chunk(config, problem, layout, stage, chunk, groups).cuda() for chunk in range(layout.chunks)]
    model: list[Any] = [_wrap(config, problem, layout, chunk, groups) for chunk in chunks]
    if layout.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in model]
        config.no_sync_func = functions if len(model) > 1 else functions[0]
    return config, model, chunks


def load(chunk, wrapped, layout: Layout, of_step) -> None:
    """Set a chunk's weights to those of a step."""
    if layout.fsdp is None:
        chunk.load(of_step)
    else:
        fully_sharded.load(wrapped, of_step)


def _wrap(config, problem: Problem, layout: Layout, chunk, groups: Any):
    """The chunk in Megatron's DDP, or its FSDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    module = chunk if problem.dtype == "float32" else Float16Module(config, chunk)
    if layout.fsdp is not None:
        return fully_sharded.wrap(config, layout, module)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    arguments = {} if groups is None else {"pg_collection": groups}
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=module, **arguments)


def _config_fields(problem: Problem, layout: Layout, extra: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, problem.dtype)
    fields = {
        "num_layers": problem.layers,
        "hidden_size": problem.hidden,
        "num_attention_heads": 4,
        "ffn_hidden_size": 8,
        "num_moe_experts": problem.experts,
        "moe_router_topk": problem.topk,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": problem.coeff,
        "moe_router_score_function": problem.score,
        "moe_router_enable_expert_bias": problem.bias,
        "calculate_per_token_loss": problem.per_token,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.chunks if layout.chunks > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": dtype,
        "add_bias_linear": False,
    }
    if problem.masks in LENGTHS and layout.pp > 1:
        fields |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    if problem.groups is not None:
        fields |= {"moe_router_num_groups": problem.groups[0], "moe_router_group_topk": problem.groups[1]}
    if problem.mtp_applications:
        fields |= {"mtp_num_layers": problem.mtp_applications, "mtp_use_repeated_layer": problem.mtp_applications > 1}
    if layout.chunks > 1:  # what Megatron demands for two stages: else messages of both directions get mixed up
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if layout.recompute in ("full", "nested"):
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif layout.recompute == "selective":
        fields |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    names = {"load_balancing_type": "moe_router_load_balancing_type", "aux_loss_coeff": "moe_aux_loss_coeff"}
    names |= {"router_dtype": "moe_router_dtype"}
    return fields | {names.get(name, name): value for name, value in {**layout.config, **extra}.items()}


def _train(problem: Problem, layout: Layout, extra: dict[str, Any]):
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    unset_num_microbatches_calculator()
    forget_logged_losses()  # the tracker is sized by the first model of a process
    config, model, chunks = build(problem, layout, extra)
    selections = _record_selections(chunks)
    grads, selected = [], []
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    for step in range(problem.steps):
        for chunk, wrapped in zip(chunks, model, strict=True):
            load(chunk, wrapped, layout, weights(problem, step))
        shards = _my_shards(problem, layout, step)
        while machine.should_run_forward_backward(None):
            for wrapped in model:
                wrapped.zero_grad_buffer()
                wrapped.train()
            get_forward_backward_func()(
                forward_step_func=partial(_forward_step, problem, math.inf if step == layout.overflow_at else 0.0),
                data_iterator=[iter(shards) for _ in chunks] if layout.chunks > 1 else iter(shards),
                model=model if layout.chunks > 1 else model[0],
                num_microbatches=len(shards),
                seq_length=problem.seq,
                micro_batch_size=problem.batch,
                forward_only=False,
            )
            # What a loss that is not plausible makes Megatron do when it turns out to be reproducible.
            machine.rerun_requested = machine.continue_requested = step == layout.rerun_at
        if layout.distributed_optimizer:
            _gather_shards(model)
        grads.append({block.number: _main_grads(block, layout) for chunk in chunks for block in chunk.blocks})
        selected.append({number: list(maps) for number, maps in selections.items()})
        for maps in selections.values():
            maps.clear()
        if layout.evaluate_between:
            for wrapped in model:
                wrapped.eval()
                with torch.no_grad():
                    for shard in shards:
                        wrapped(*shard)
    make_collectable(model)
    rank, part, parts = _place(layout)
    assert parallel_state.get_data_parallel_world_size() == problem.dp
    return {"grads": grads, "place": (rank, part, parts), "selections": selected}


def make_collectable(model) -> None:
    """Break cycles through autograd's C++ nodes, which Python cannot collect: they would keep a model and all its groups."""
    for wrapped in model:
        if hasattr(wrapped, "grad_accs"):
            wrapped.grad_accs.clear()
        else:
            fully_sharded.remove_hooks(wrapped)
        for module in wrapped.modules():
            vars(module).pop("token_dispatcher", None)


def _main_grads(block, layout: Layout):
    """Copies of (W, router) `main_grad` on the CPU; None for a parameter that is frozen or not there."""
    pair = (block.below, None if block.moe is None else block.router.weight)
    scale = layout.loss_scale
    if layout.fsdp is not None:
        return tuple(None if p is None else (fully_sharded.main_grad(p) / scale).cpu() for p in pair)
    return tuple((p.main_grad.clone() / scale).cpu() if p is not None and hasattr(p, "main_grad") else None for p in pair)


def _record_selections(chunks) -> dict[int, list]:
    """Lists that fill with every counted forward's routing map, by layer number."""
    selections: dict[int, list] = {}

    def remember(maps, router, arguments, output):
        if router.training and torch._C._current_graph_task_id() == -1:
            rows, batch = arguments[0].shape[:2]
            maps.append(output[1].detach().bool().view(rows, batch, -1).cpu().clone())

    for chunk in chunks:
        for block in chunk.blocks:
            if block.moe is not None:
                selections[block.number] = []
                block.router.register_forward_hook(partial(remember, selections[block.number]))
    return selections


def _gather_shards(model) -> None:
    """With the distributed optimizer each rank's shard of a bucket holds the sum; bring all shards together to compare."""
    import torch.distributed as dist

    for chunk in model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather(list(bucket.grad_data.view(group.size(), -1)), shard, group=group)


def _place(layout: Layout) -> tuple[int, int, int]:
    """(data-parallel rank, part of the sequence, number of parts): CP cuts first, then TP (sequence parallelism)."""
    from megatron.core import parallel_state

    part = parallel_state.get_context_parallel_rank() * layout.tp + parallel_state.get_tensor_model_parallel_rank()
    return parallel_state.get_data_parallel_rank(), part, layout.cp * layout.tp


def _my_shards(problem: Problem, layout: Layout, step: int):
    """(x, padding or None) per micro-batch: this rank's slice of the sequence."""
    return shards_at(problem, step, *_place(layout))


def shards_at(problem: Problem, step: int, rank: int, part: int, parts: int):
    """(x, padding or None) per micro-batch at a place as `_place` gives it."""
    x, padding = inputs(problem, step)
    shards = []
    for m in range(x.shape[0]):
        length = int((~padding[m, rank, :, 0]).sum()) if problem.masks in LENGTHS else problem.seq
        rows = slice(part * length // parts, (part + 1) * length // parts)
        masked = problem.masks not in ("none", *LENGTHS)
        shards.append((x[m, rank, rows].cuda(), padding[m, rank, rows].cuda() if masked else None))
    return shards


def _forward_step(problem: Problem, factor: float, data_iterator, model, return_schedule_plan: bool = False):
    """The main loss is the output times `factor`: without a gradient, or overflowing."""
    x, padding = next(data_iterator)
    output = (model.build_schedule_plan if return_schedule_plan else model)(x, padding)

    def loss_func(output):
        # CP ranks hold parts of a sequence, TP ranks too (sequence parallelism), so tokens are summed over both.
        tokens = (~padding).sum() if padding is not None else torch.full((), x.shape[0] * x.shape[1], device=x.device)
        if problem.per_token:
            from megatron.core import parallel_state

            torch.distributed.all_reduce(tokens, group=parallel_state.get_tensor_model_parallel_group())
            return output.float().sum() * factor, tokens.int(), {}
        return output.float().sum() * factor, {}

    return output, loss_func

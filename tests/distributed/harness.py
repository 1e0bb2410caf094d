"""Runs a `Problem` in a layout: real `TopKRouter`s inside Megatron's own schedule, DDP and `finalize_model_grads`.

Every rank returns the `main_grad` of its layers, step by step. The toy model is the one described in truth.py.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from truth import Problem, expert_bias, inputs, weights


@dataclass(frozen=True)
class Layout:
    """How the problem is spread over ranks; data parallelism takes what is left."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    bf16: bool = False
    loss_scale: float = 1.0
    overlap_grad_reduce: bool = False

    def world_size(self, problem: Problem) -> int:
        return self.tp * self.cp * self.pp * problem.dp


def run(problem: Problem, layout: Layout, register: dict[str, Any] | None, extra: dict[str, Any] | None = None):
    """One rank's part. Returns {"grads": [step][layer number] -> (W, router) main_grad, "hooked": [...]}."""
    import megatron_global_lbl as lbl

    if register is None:
        return {"grads": _train(problem, layout, extra or {}), "hooked": []}
    with lbl.registered(**register) as handle:
        return {"grads": _train(problem, layout, extra or {}), "hooked": handle.hooked}


def _train(problem: Problem, layout: Layout, extra: dict[str, Any]):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=problem.layers,
        hidden_size=problem.hidden,
        num_attention_heads=4,
        num_moe_experts=problem.experts,
        moe_router_topk=problem.topk,
        moe_router_load_balancing_type=extra.get("load_balancing_type", "aux_loss"),
        moe_aux_loss_coeff=extra.get("aux_loss_coeff", problem.coeff),
        moe_router_score_function=problem.score,
        moe_router_enable_expert_bias=problem.bias,
        moe_router_dtype=extra.get("router_dtype"),
        calculate_per_token_loss=problem.per_token,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.tp > 1,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        add_bias_linear=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if layout.loss_scale != 1.0:
        config.grad_scale_func = lambda loss: loss * layout.loss_scale
    model: Any = _stage_class()(config, problem)
    if layout.bf16:
        from megatron.core.transformer.module import Float16Module

        model = Float16Module(config, model)
    model = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=layout.overlap_grad_reduce,
        ),
        module=model,
    )
    if layout.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    stage = model.module.module if layout.bf16 else model.module
    grads = []
    for step in range(problem.steps):
        stage.load(weights(problem, step))
        model.zero_grad_buffer()
        model.train()
        get_forward_backward_func()(
            forward_step_func=_forward_step(problem, stage),
            data_iterator=iter(_my_shards(problem, layout, step)),
            model=model,
            num_microbatches=problem.micro_batches,
            seq_length=problem.seq,
            micro_batch_size=problem.batch,
            forward_only=False,
        )
        grads.append(
            {
                number: tuple(parameter.main_grad.clone() / layout.loss_scale for parameter in pair)
                for number, pair in stage.parameters_by_layer().items()
            }
        )
        if extra.get("evaluate_between"):
            model.eval()
            with torch.no_grad():
                for shard in _my_shards(problem, layout, step):
                    model(*shard)
    return grads


def _my_shards(problem: Problem, layout: Layout, step: int):
    """(x, padding) per micro-batch: this rank's slice of the sequence, over CP first, then TP (sequence parallelism)."""
    from megatron.core import parallel_state

    x, padding = inputs(problem, step)
    parts = layout.cp * layout.tp
    part = parallel_state.get_context_parallel_rank() * layout.tp + parallel_state.get_tensor_model_parallel_rank()
    rows = slice(part * problem.seq // parts, (part + 1) * problem.seq // parts)
    rank = parallel_state.get_data_parallel_rank()
    return [(x[m, rank, rows], padding[m, rank, rows]) for m in range(problem.micro_batches)]


def _forward_step(problem: Problem, stage):
    def forward_step(data_iterator, model):
        x, padding = next(data_iterator)
        output = model(x, padding)

        def loss_func(output):
            # CP ranks hold parts of a sequence, TP ranks too (sequence parallelism), so tokens are summed over both.
            tokens = (~padding).sum()
            if problem.per_token:
                from megatron.core import parallel_state

                torch.distributed.all_reduce(tokens, group=parallel_state.get_tensor_model_parallel_group())
                return output.float().sum() * 0.0, tokens.int(), {}
            return output.float().sum() * 0.0, {}

        return output, loss_func

    return forward_step


def _stage_class():
    """The toy model's layers of one pipeline stage; a function because Megatron is imported in workers only."""
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.router import TopKRouter

    class Stage(MegatronModule):
        def __init__(self, config, problem: Problem) -> None:
            super().__init__(config)
            stages = parallel_state.get_pipeline_model_parallel_world_size()
            stage = parallel_state.get_pipeline_model_parallel_rank()
            per_stage = problem.layers // stages
            self.numbers = [stage * per_stage + i + 1 for i in range(per_stage)]
            self.problem = problem
            self.model_type = ModelType.encoder_or_decoder
            self.share_embeddings_and_output_weights = False
            self.pre_process, self.post_process = stage == 0, stage == stages - 1
            self.input_tensor = None
            self.below = torch.nn.ParameterList()
            self.routers = torch.nn.ModuleList()
            for number in self.numbers:
                weight = torch.nn.Parameter(torch.empty(problem.hidden, problem.hidden, dtype=config.params_dtype))
                weight.sequence_parallel = config.sequence_parallel
                self.below.append(weight)
                router = TopKRouter(config=config, **_process_groups(TopKRouter))
                router.set_layer_number(number)
                if problem.bias:
                    router.expert_bias.copy_(expert_bias(problem))
                self.routers.append(router)

        def set_input_tensor(self, input_tensor):
            self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

        def load(self, by_layer) -> None:
            for number, below, router in zip(self.numbers, self.below, self.routers):
                below.data.copy_(by_layer[number - 1][0])
                router.weight.data.copy_(by_layer[number - 1][1])

        def parameters_by_layer(self):
            return {n: (below, router.weight) for n, below, router in zip(self.numbers, self.below, self.routers)}

        def forward(self, x, padding):
            h = x if self.input_tensor is None else self.input_tensor
            h = h.to(self.config.params_dtype)
            mask = {"padding_mask": padding} if self.problem.masks != "none" else {}
            for below, router in zip(self.below, self.routers):
                a = h @ below.t()
                probs, _ = router(a, **mask)
                # probs carries the loss' backward; times zero it adds nothing to the value.
                h = torch.tanh(a) + probs.sum().to(a.dtype) * 0
            return h

    return Stage


def _process_groups(router_class) -> dict[str, Any]:
    """The router's process-group argument: `pg_collection`, before 0.15 `model_comm_pgs`."""
    from megatron.core.transformer.moe import moe_utils

    if "pg_collection" in inspect.signature(router_class.__init__).parameters:
        return {"pg_collection": moe_utils.get_default_pg_collection()}
    return {"model_comm_pgs": moe_utils.get_default_model_comm_pgs()}

"""A custom training loop on Megatron-Core alone, without `megatron.training`: where the plugin is registered.

    torchrun --nproc-per-node 2 examples/plain_core_loop.py --scope global
    torchrun --nproc-per-node 2 -m megatron_global_lbl --cpu examples/plain_core_loop.py --distributed-backend gloo \
        --scope global

The first needs 2 GPUs, the second none. Model, DDP, schedule and optimizer are Megatron-Core's; two lines are the plugin's,
marked with (1) and (2), and (2) only for a loop that does not call `finalize_model_grads`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import track_moe_metrics

import megatron_global_lbl as lbl

SEQUENCE, VOCABULARY, MICRO_BATCH, MICRO_BATCHES = 32, 128, 2, 4


def build_model() -> DistributedDataParallel:
    """A GPT with 8 experts in each of its 2 layers."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_load_balancing_type="aux_loss",  # the loss that the scope acts on
        moe_aux_loss_coeff=1e-2,
        moe_token_dispatcher_type="alltoall",
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
    ).cuda()
    return DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def batches(rank: int):
    """Micro-batches that count upwards in steps of 1 to 3: the next token follows from the last two."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        start = torch.randint(VOCABULARY, (MICRO_BATCH, 1), generator=generator)
        stride = torch.randint(1, 4, (MICRO_BATCH, 1), generator=generator)
        text = (start + stride * torch.arange(SEQUENCE + 1)) % VOCABULARY
        yield text[:, :-1].cuda(), text[:, 1:].cuda()


def forward_step(data, model):
    """One micro-batch, in the form that Megatron's schedules ask for."""
    tokens, labels = next(data)
    positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=labels)
    return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def main() -> None:
    """Train, and print the loss and the load-balancing loss of every step on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scope", default="global", help="micro, dp or global")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--distributed-backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--own-step-end", action="store_true", help="reduce the gradients without finalize_model_grads")
    args = parser.parse_args()

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(args.distributed_backend)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)

    # (1) On every rank, before the first step; before or after the model is built.
    lbl.register(scope=args.scope)

    model = build_model()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), [model])
    model.config.grad_scale_func = optimizer.scale_loss
    if not args.own_step_end:
        model.config.finalize_model_grads_func = finalize_model_grads  # here the plugin finds the step's end
    model.train()
    data = batches(parallel_state.get_data_parallel_rank())
    for step in range(1, args.steps + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        if args.own_step_end:
            model.finish_grad_sync()
            lbl.end_step()  # (2)
        optimizer.step()
        losses: dict[str, torch.Tensor] = {}
        track_moe_metrics(
            loss_scale=1 / MICRO_BATCHES,
            iteration=step,
            writer=None,
            total_loss_dict=losses,
            track_names=["load_balancing_loss"],
            force_initialize=True,
            num_layers=model.config.num_layers,
        )
        loss = torch.stack([micro_batch["loss"] for micro_batch in reduced]).mean()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            mean, balance = loss.item() / dist.get_world_size(), losses["load_balancing_loss"].item()
            print(f"step {step}: loss {mean:.6f}, load balancing {balance:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

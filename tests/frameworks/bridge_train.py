"""Megatron Bridge's own `pretrain` of a small MoE, without a GPU. usage: torchrun ... bridge_train.py JSON"""
# ruff: noqa: E402

from __future__ import annotations

import json
import sys

import megatron_cpu

megatron_cpu.install()
# Before the stand-ins: Megatron-Core asks at its import what is installed.
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.transformer.moe.moe_layer
import megatron.training  # noqa: F401
import torch
from absent import stand_in_for
from common import checksum

with stand_in_for("transformer_engine", "modelopt", "nvidia_resiliency_ext", "megatron.energon"):
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        DistributedInitConfig,
        LoggerConfig,
        MockGPTDatasetConfig,
        OptimizerConfig,
        RNGConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
        ValidationConfig,
    )
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megatron_global_lbl.frameworks.bridge import LoadBalancing


def config(options: dict) -> ConfigContainer:
    """A model of two MoE layers, and as few steps as show a resume."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    model = GPTModelProvider(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        moe_ffn_hidden_size=32,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_load_balancing_type=options.get("type", "aux_loss"),
        moe_aux_loss_coeff=1e-2,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        transformer_layer_spec=local_layer_spec,
        seq_length=32,
        vocab_size=64,
        make_vocab_size_divisible_by=1,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.float32,
    )
    return ConfigContainer(
        model=model,
        train=TrainingConfig(train_iters=options["iterations"], global_batch_size=8, micro_batch_size=2, manual_gc=False),
        validation=ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-2, bf16=False, use_distributed_optimizer=False),
        scheduler=SchedulerConfig(
            lr_warmup_iters=0,
            lr_decay_iters=100,
            lr_decay_style="constant",
            start_weight_decay=0.0,
            end_weight_decay=0.0,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=False),
        dist=DistributedInitConfig(distributed_backend="gloo"),
        dataset=MockGPTDatasetConfig(
            random_seed=1234,
            seq_length=32,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            persistent_workers=False,
            data_sharding=True,
            dataloader_type="single",
        ),
        logger=LoggerConfig(log_interval=1, tensorboard_dir=options.get("tensorboard")),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=63),
        checkpoint=CheckpointConfig(
            save=options.get("save"),
            load=options.get("load"),
            save_interval=2,
            ckpt_format="torch_dist",
            async_save=options.get("async_save", False),
            async_strategy="mcore",
        ),
        rng=RNGConfig(seed=7),
    )


class Report(Callback):
    """Prints what two trainings are compared by."""

    def on_train_end(self, context) -> None:
        print("parameters", checksum(context.model), flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    callbacks = [LoadBalancing(**options["register"])] if "register" in options else []
    pretrain(config(options), forward_step, callbacks=[*callbacks, Report()])


if __name__ == "__main__":
    main()

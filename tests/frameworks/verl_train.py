"""verl's own SFT trainer with its Megatron engine, without a GPU. usage: torchrun ... verl_train.py FOLDER JSON

The JSON lists trainings, which run one after the other in this process. What they are compared by goes to FOLDER/results.pt.
"""
# ruff: noqa: E402

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import megatron_cpu

megatron_cpu.install()
# Before the stand-ins: Megatron-Core asks at its import what is installed.
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.transformer.moe.moe_layer
import megatron.training  # noqa: F401
import torch
import torch.distributed as dist
from absent import stand_in_for
from common import checksum
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from router_watch import RouterWatch

with stand_in_for("transformer_engine", "modelopt", "nvidia_resiliency_ext", "megatron.energon", "uvicorn", "fastapi"):
    from hydra import compose, initialize_config_module
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.training import config as bridge_config  # noqa: F401  verl imports it later
    from verl.plugin.platform import set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA
    from verl.trainer.sft_trainer import SFTTrainer
    from verl.utils import tensordict_utils as tu
    from verl.utils.distributed import initialize_global_process_group
    from verl.workers.engine.megatron import transformer_impl  # noqa: F401

# What only works on a GPU, switched off the way a user of verl would.
WITHOUT_GPU = {
    "attention_backend": "unfused",
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "use_cpu_initialization": True,
}


class Platform(PlatformCUDA):
    """CUDA as CPU mode shows it, with gloo for its collectives."""

    def communication_backend_name(self) -> str:
        return "gloo"


class PackedAttention(DotProductAttention):
    """Megatron's plain attention for packed sequences; without Transformer Engine it has none."""

    def forward(self, query, key, value, attention_mask, *args, packed_seq_params, **kwargs):
        """Args: query, key, value: [T, heads, head size] of sequences one after the other. Returns [T, 1, hidden]."""
        position_T = torch.arange(len(query))
        sequence_T = torch.bucketize(position_T, packed_seq_params.cu_seqlens_q[1:], right=True)
        others_TT = sequence_T[:, None] != sequence_T[None, :]
        later_TT = position_T[None, :] > position_T[:, None]
        mask = (others_TT | later_TT)[None, None]
        return super().forward(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask, *args, **kwargs)


def use_local_layers() -> None:
    """Bridge builds its models from Megatron's local layers, since there is no Transformer Engine."""
    LocalSpecProvider.core_attention = lambda self: PackedAttention
    to_provider = AutoBridge.to_megatron_provider

    def to_local_provider(self, *args, **kwargs):
        provider = to_provider(self, *args, **kwargs)
        provider.transformer_layer_spec = local_layer_spec
        return provider

    AutoBridge.to_megatron_provider = to_local_provider


def configuration(folder: Path, name: str, training: dict):
    """verl's SFT configuration: 2 optimizer steps of 16 conversations, on 2 ranks 4 micro-batches of 2 each."""
    transformer = WITHOUT_GPU | {"moe_router_dtype": "fp32"} | training.get("transformer", {})
    overrides = [
        *("engine=megatron", "optim=megatron", "optim.lr=1e-2"),
        *(f"++engine.override_transformer_config.{key}={value}" for key, value in transformer.items()),
        *(f"model.path={folder}/model", f"model.external_lib={training.get('external_lib', 'null')}"),
        *(f"data.train_files={folder}/conversations.parquet", f"data.val_files={folder}/conversations.parquet"),
        *("data.train_max_samples=32", "data.train_batch_size=16", "data.val_max_samples=16", "data.num_workers=0"),
        *("data.micro_batch_size_per_gpu=2", "data.use_dynamic_bsz=False"),
        *("trainer.logger=[console]", "trainer.total_epochs=1", "trainer.test_freq=1", "trainer.resume_mode=disable"),
        # The whole model would be saved as one for Transformers, too, which needs ModelOpt.
        *(f"trainer.default_local_dir={folder}/{name}", "checkpoint.save_contents=[optimizer,extra]"),
        *training.get("overrides", []),
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("sft_trainer_engine", overrides)


def handle_of(training: dict):
    """What `register` gave in the module that verl imported; None without one."""
    return getattr(sys.modules.get(training.get("external_lib")), "handle", None)


def train(config, training: dict, steps: list[dict]) -> str:
    """One training; `steps` gets what the routers did in each step, and its metrics. Returns a checksum of the model."""
    trainer = SFTTrainer(config)
    (model,), handle = trainer.engine.module, handle_of(training)
    watch, optimizer_step = RouterWatch(model), trainer.engine.optimizer_step

    def step():
        steps.append(watch.step())
        if handle is not None and handle.settings.observes:
            steps[-1]["metrics"] = handle.metrics()
        return optimizer_step()

    trainer.engine.optimizer_step = step
    trainer.fit()
    parameters = checksum([model])
    if training.get("mini_batches"):
        update_as_actor(trainer, training["mini_batches"])
    return parameters


def update_as_actor(trainer, mini_batches: int) -> None:
    """One more batch, in the loop over mini-batches in which verl updates the actor of a reinforcement learning."""
    (batch, *_) = trainer.train_dataloader
    settings = {"temperature": 1.0, "micro_batch_size_per_gpu": 2, "use_dynamic_bsz": False, "num_mini_batch": mini_batches}
    settings |= {"pad_mode": "no_padding", "global_batch_size": trainer.global_batch_size // mini_batches}
    trainer.training_client.train_mini_batch(tu.get_tensordict(tensor_dict=batch, non_tensor_dict=settings))


def main() -> None:
    folder, trainings = Path(sys.argv[1]), json.loads(sys.argv[2])
    set_platform(Platform())
    use_local_layers()
    initialize_global_process_group(timeout_second=240)
    results, handle = {}, None
    for name, training in trainings.items():
        if handle is not None:
            handle.remove()
        results[name] = {"steps": []}
        try:
            results[name]["parameters"] = train(configuration(folder, name, training), training, results[name]["steps"])
        except Exception as error:  # on both ranks, or the next collective says so
            traceback.print_exc()
            results[name]["error"] = str(error)
        handle = handle_of(training)
        if dist.get_rank() == 0:
            torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main()

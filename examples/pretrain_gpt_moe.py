"""Pre-training of a GPT (MoE) model on `megatron.training`: a plain Megatron script, in the shape of `pretrain_gpt.py`.

It knows nothing of the plugin. The launcher adds the flags of the load-balancing loss:

    torchrun --nproc-per-node 4 -m megatron_global_lbl --cpu examples/pretrain_gpt_moe.py MEGATRON_ARGS \
        --moe-lbl-scope global

Needs megatron-core 0.19 (its wheel for Python 3.12 carries `megatron.training`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Training, validation and test data, from the data arguments of Megatron."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    print_rank_0("> building the datasets ...")
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()


# Every rank reads its own samples (equal on the ranks of one tensor- or pipeline-parallel group), so that no batch has
# to be broadcast. Costs a little reading, saves a hundred lines.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The next micro-batch, cut to this context-parallel rank's part."""
    names = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
    sample = next(data_iterator)
    batch = {name: sample[name].cuda(non_blocking=True) for name in names if name in sample}
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group())
    return batch


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses and the number of tokens; Megatron divides."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    return (loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])})


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: GPTModel) -> tuple[torch.Tensor, Any]:
    """One micro-batch."""
    batch = get_batch(data_iterator)
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def main() -> None:
    """Megatron's own training."""
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

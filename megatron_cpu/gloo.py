"""What gloo does not take from Megatron as NCCL's machines would hand it over. One thing."""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Let `torch.distributed.all_to_all_single` take its split sizes as tensors.

    Megatron's all-to-all dispatcher copies its split sizes from the GPU into numpy arrays; tensors that are on the CPU
    already it passes on as they are, and the collective takes sequences only.
    """
    all_to_all_single = torch.distributed.all_to_all_single

    def with_tensor_splits(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return all_to_all_single(output, input, _as_list(output_split_sizes), _as_list(input_split_sizes), *args, **kwargs)

    torch.distributed.all_to_all_single = with_tensor_splits


def _as_list(splits: Any) -> Any:
    return splits.tolist() if isinstance(splits, torch.Tensor) else splits

"""Sizes of the models that the benchmarks are about. No import of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """What of a model the cost of its load-balancing loss depends on.

    Attributes:
        experts: E.
        topk: experts per token.
        hidden: hidden size H.
        moe_layers: of the whole model.
        source: where the numbers are from.
        router: further fields of Megatron's `TransformerConfig`.
    """

    experts: int
    topk: int
    hidden: int
    moe_layers: int
    source: str
    router: tuple[tuple[str, Any], ...] = ()


MODELS = {
    "qwen3-30b-a3b": ModelSize(128, 8, 2048, 48, "Qwen3-30B-A3B's config.json: softmax, norm_topk_prob"),
    "deepseek-v3": ModelSize(
        256,
        8,
        7168,
        58,
        "DeepSeek-V3's config.json: sigmoid, expert bias, 4 of 8 groups; 61 layers, the first 3 dense",
        (
            ("moe_router_score_function", "sigmoid"),
            ("moe_router_enable_expert_bias", True),
            ("moe_router_num_groups", 8),
            ("moe_router_group_topk", 4),
            ("moe_router_topk_scaling_factor", 2.5),
        ),
    ),
    # The paper gives 64 experts and top-4; hidden size and number of layers are not in it and stand for its 3.4A0.6B.
    "paper-3.4b-a0.6b": ModelSize(64, 4, 1024, 24, "arXiv 2501.11873: 64 experts, top-4; hidden size and layers assumed"),
}

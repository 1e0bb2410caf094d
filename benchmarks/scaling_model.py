"""What the load-balancing losses add to a training step on 64 to 16,384 GPUs: a model, not a measurement.

    python benchmarks/scaling_model.py            # the table of the newest report DATE-scaling-model.md

Imports nothing but the standard library. Times in microseconds, sizes in bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from models import MODELS, ModelSize

# --- The latency of a small all-reduce: NCCL's own cost model, for the algorithm that it picks for these sizes. ---
# NCCL 2.30.7, src/graph/tuning.cc (commit 5067397c): ncclTunerConstantsDefaults and ncclTopoTuneModel, Tree / LL.
NCCL_BASE = 6.8  # baseLatencies, Tree, LL
NCCL_NVLINK = 0.6  # hwLatencies, NVLink, Tree, LL
NCCL_NETWORK = 5.0  # hwLatencies, network, Tree, LL
GPUS_PER_NODE = 8  # HGX / DGX H100
# From NCCL's log in github.com/NVIDIA/nccl/issues/1453 (two nodes of 8 H100): it predicts 25.200924 us for 8 bytes, which is
# this formula's 25.2, and 25.874907 us for 4096 bytes: 6.07 GB/s.
NCCL_BYTES_PER_US = (4096 - 8) / (25.874907 - 25.200924)
# The same issue's measured time for 8 bytes, 64.18 us, over NCCL's prediction: what a real, complained-about cluster needs.
SLOW_CLUSTER = 64.18 / 25.200924

# --- The compute that the latency hides behind, or adds to. ---
H100_BF16_FLOPS_PER_US = 989e6  # dense bf16, H100 SXM data sheet: 989 TFLOP/s
MODEL_FLOPS_UTILISATION = 0.4  # assumed; a higher one makes layers shorter, so latency shows earlier
TOKENS = [4096, 1024, 256]  # per GPU and micro-batch: a sequence of 4096, or what TP leaves of one, or short sequences
BACKWARD_OVER_FORWARD = 2.0  # two matrix products per forward one; no recompute
AFTER_ROUTER = 0.5  # assumed share of a layer's time behind its router: its experts (attention is before it)

UPSTREAM_BYTES = 8  # per expert: Megatron's global_aux_loss sends int64
BYTES = 4  # per expert and layer: dp and global send int32, all layers of a stage together


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        model: key of `MODELS`.
        active: parameters that a token uses, without embedding and output layer.
        head: parameters of the output layer.
        layers: transformer layers that `active` is spread over.
        pipeline: pipeline stages.
        micro_batches: per step.
        smallest: GPUs below which the model does not fit in this layout.
        source: of the numbers.
        tokens: per GPU and micro-batch.
    """

    model: str
    active: float
    head: float
    layers: int
    pipeline: int
    micro_batches: int
    smallest: int
    source: str
    tokens: int = TOKENS[0]

    @property
    def size(self) -> ModelSize:
        return MODELS[self.model]

    @property
    def moe_layers_per_stage(self) -> int:
        return math.ceil(self.size.moe_layers / self.pipeline)

    @property
    def layer_forward(self) -> float:
        """Forward of one layer and micro-batch on one GPU."""
        return self._forward(self.active / self.layers)

    @property
    def head_forward(self) -> float:
        """Forward of the output layer, which the last pipeline stage has."""
        return self._forward(self.head)

    def _forward(self, parameters: float) -> float:
        return 2 * parameters * self.tokens / (H100_BF16_FLOPS_PER_US * MODEL_FLOPS_UTILISATION)

    @property
    def hides(self) -> float:
        """Between the start of a micro-batch's all-reduce, at the end of its forward, and the first router's backward on the
        last stage: the backward of the output layer and of the last layer's experts. Other stages, and other micro-batches
        under 1F1B, only add time to hide in."""
        return BACKWARD_OVER_FORWARD * (self.head_forward + AFTER_ROUTER * self.layer_forward)

    @property
    def slots(self) -> int:
        """Micro-batch times that a step takes on a stage: 1F1B's bubble included."""
        return self.micro_batches + self.pipeline - 1

    @property
    def step(self) -> float:
        """Compute of a step, without optimizer and gradient reduction, which are the same for all losses."""
        return self.slots * self.moe_layers_per_stage * self.layer_forward * (1 + BACKWARD_OVER_FORWARD)


TRAININGS = [
    Training(
        "qwen3-30b-a3b",
        3.3e9 - 2 * 151_936 * 2048,
        151_936 * 2048,
        48,
        1,
        8,
        8,
        "3.3 B active parameters (model card) less embedding and output layer (vocabulary 151,936, hidden 2048)",
    ),
    Training(
        "deepseek-v3",
        37e9 - 2 * 129_280 * 7168,
        129_280 * 7168,
        61,
        16,
        64,
        128,
        "37 B active parameters, 16 pipeline stages (arXiv 2412.19437), less embedding and output layer (129,280 x 7168)",
    ),
    Training(
        "paper-3.4b-a0.6b",
        0.6e9,
        151_936 * 1024,
        24,
        1,
        8,
        8,
        "0.6 B active parameters (arXiv 2501.11873); 24 layers, vocabulary 151,936 and hidden 1024 assumed",
    ),
]
GPUS = [64, 1024, 16384]


def all_reduce(ranks: int, payload: int, slowdown: float = 1.0) -> float:
    """Time of an all-reduce of `payload` bytes over `ranks` GPUs, the nodes full; 0 for one rank."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / GPUS_PER_NODE)
    in_node = min(ranks, GPUS_PER_NODE) - 1
    hops = in_node * NCCL_NVLINK + math.floor(math.log2(nodes)) * NCCL_NETWORK
    return slowdown * (NCCL_BASE + 2 * hops + payload / NCCL_BYTES_PER_US)


@dataclass(frozen=True)
class Added:
    """Microseconds that a step takes longer than without any collective for the loss, and the latency of `dp` and `global`."""

    latency: float
    upstream: float
    ours: float


def added(training: Training, gpus: int, slowdown: float) -> Added:
    """The model for one training on `gpus` GPUs; TP = CP = 1, so the data-parallel size is gpus / pipeline."""
    ranks, layers = gpus // training.pipeline, training.moe_layers_per_stage
    upstream = all_reduce(ranks, training.size.experts * UPSTREAM_BYTES, slowdown)
    ours = all_reduce(ranks, layers * training.size.experts * BYTES, slowdown)
    # Upstream's all-reduce stands in the forward of every layer of every micro-batch.
    return Added(ours, training.slots * layers * upstream, training.slots * max(0.0, ours - training.hides))


HEAD = [
    "model",
    "GPUs",
    "all-reduce, us",
    "tokens",
    "a layer's forward, us",
    "hides, us",
    "`global_aux_loss` adds",
    "`dp`, `global` add",
    "add nothing from, tokens",
]


def compared() -> Iterator[tuple[Training, int]]:
    """Trainings and numbers of GPUs, a row of the table each."""
    for training in TRAININGS:
        for gpus in GPUS:
            for tokens in TOKENS:
                if gpus >= training.smallest:
                    yield dataclasses.replace(training, tokens=tokens), gpus


def table() -> str:
    """Markdown: what the models are, and one table of what losses add to their step."""
    lines = []
    for training in TRAININGS:
        size, stages = training.size, f"{training.pipeline} pipeline stage" + "s" * (training.pipeline > 1)
        lines.append(
            f"- {training.model}: {size.experts} experts, top-{size.topk}, {size.moe_layers} MoE layers, {stages}, "
            f"{training.micro_batches} micro-batches. {training.source}."
        )
    rows = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1)]
    rows += [_row(training, gpus) for training, gpus in compared()]
    return "\n".join([*lines, "", *("| " + " | ".join(row) + " |" for row in rows)])


def _row(training: Training, gpus: int) -> list[str]:
    step = training.step
    both = [added(training, gpus, slowdown) for slowdown in (1.0, SLOW_CLUSTER)]

    def of_step(times: list[float]) -> str:
        return " / ".join(f"{time / step:.1%}" for time in times)

    return [
        training.model,
        f"{gpus:,}",
        " / ".join(f"{one.latency:.0f}" for one in both),
        f"{training.tokens:,}",
        f"{training.layer_forward:,.0f}",
        f"{training.hides:,.0f}",
        of_step([one.upstream for one in both]),
        of_step([one.ours for one in both]),
        " / ".join(f"{math.ceil(one.latency / training.hides * training.tokens):,}" for one in both),
    ]


if __name__ == "__main__":
    print(table())

"""The model and the training of the demo, as the arguments a Megatron launch script would have.

Small enough that four trainings end in minutes on two cores, and the paper's setting in what matters: a micro-batch is one
sequence of one domain, so `micro` asks for balance inside every sequence, and a step has 32 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.prepare import VOCAB_SIZE, Paths

LAYERS = 2
EXPERTS = 16
TOPK = 2
SEQUENCE_LENGTH = 128
RANKS = 2  # data-parallel, each with 16 micro-batches of one sequence
GLOBAL_BATCH = 32
EVALUATED_AT_ONCE = 16  # sequences


@dataclass(frozen=True)
class Size:
    """What a longer, shorter or other demo changes."""

    steps: int = 64
    valid_sequences: int = 64  # per domain; a multiple of EVALUATED_AT_ONCE
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """A training: the load-balancing loss's scope and coefficient; everything else is the same in all of them."""

    scope: str
    coefficient: float

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{self.scope}-{self.coefficient:g}"


def training_arguments(run: Run, size: Size, paths: Paths, folder: Path) -> list[str]:
    """All arguments of the training in `folder`, the plugin's at the end."""
    model = f"""
        --num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 2
        --seq-length {SEQUENCE_LENGTH} --max-position-embeddings {SEQUENCE_LENGTH}
        --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.09
    """
    moe = f"""
        --num-experts {EXPERTS} --moe-router-topk {TOPK} --moe-ffn-hidden-size 48 --moe-router-dtype fp32
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {run.coefficient:g}
        --moe-token-dispatcher-type allgather
    """
    training = f"""
        --micro-batch-size 1 --global-batch-size {GLOBAL_BATCH} --train-iters {size.steps} --seed {1234 + size.seed}
        --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters {max(1, size.steps // 10)}
        --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    """
    # Plain PyTorch: no Transformer Engine, no fused kernels. These flags are right on a GPU too, only slower. Saving in
    # Megatron's default format starts a process per rank, which imports Megatron again.
    plain = f"""
        --transformer-impl local --distributed-backend gloo
        --no-persist-layer-norm --no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion
        --no-rope-fusion --no-create-attention-mask-in-dataloader --num-workers 0 --log-interval 1
        --eval-iters 0 --eval-interval 1000
        --ckpt-format torch --save-interval {size.steps} --no-save-optim --no-save-rng
    """
    text = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 1"
    arguments = f"{model} {moe} {training} {plain} {text}".split()
    arguments += ["--save", str(folder / "checkpoint"), "--data-cache-path", str(folder / "cache")]
    arguments += ["--train-data-path", *(part for path in paths.values() for part in ("1", path["train"]))]
    return [*arguments, "--moe-lbl-scope", run.scope, "--moe-lbl-metrics-dir", str(folder)]


def evaluation_arguments(size: Size, paths: Paths, folder: Path) -> list[str]:
    """What the measurement on the training's checkpoint needs beside the training's arguments."""
    iterations = size.valid_sequences // EVALUATED_AT_ONCE
    batch = f"--eval-micro-batch-size {EVALUATED_AT_ONCE} --eval-global-batch-size {EVALUATED_AT_ONCE}"
    arguments = f"{batch} --eval-iters {iterations} --load {folder / 'checkpoint'}".split()
    return [*arguments, "--moe-lbl-domains", *(f"{name}={path['valid']}" for name, path in paths.items())]

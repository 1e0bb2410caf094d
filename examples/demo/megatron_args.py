"""The model and the training of the demo, as the arguments a Megatron launch script would have.

Small enough that two trainings end in minutes on two cores, and the paper's setting in what matters: a micro-batch is
one sequence of one domain, so that `micro` asks for balance inside each sequence, and a step has many of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """What a longer or shorter demo changes."""

    steps: int = 48
    sequence_length: int = 256
    global_batch: int = 16  # sequences: 4 data-parallel ranks x 4 micro-batches of one sequence
    valid_sequences: int = 48  # per domain; a multiple of the number of processes
    processes: int = 4
    evaluation_processes: int = 2  # a checkpoint is read by any number of them; starting one takes longer than what it does


LAYERS = 2
EXPERTS = 8
TOPK = 2
SCOPES = ("micro", "global")
WINDOW_STEPS = 8  # for who asks for the third scope


def training_arguments(size: Size, paths: dict[str, dict[str, str]], data: Path) -> list[str]:
    """Everything but the scope, which the launcher's own flags choose.

    Args:
        size: of the demo.
        paths: domain, then split, then prefix of a dataset.
        data: the folder of the data, for Megatron's cache.
    """
    from demo.prepare import VOCAB_SIZE

    model = f"""
        --num-layers {LAYERS} --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4
        --seq-length {size.sequence_length} --max-position-embeddings {size.sequence_length}
        --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.09
    """
    moe = f"""
        --num-experts {EXPERTS} --moe-router-topk {TOPK} --moe-ffn-hidden-size 128 --moe-router-dtype fp32
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
        --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall
    """
    training = f"""
        --micro-batch-size 1 --global-batch-size {size.global_batch} --train-iters {size.steps} --seed 1234
        --lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters {max(1, size.steps // 10)}
        --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    """
    # Plain PyTorch: no Transformer Engine, no fused kernels. These flags are right on a GPU too, only slower. The first
    # checkpoint in Megatron's default format starts a process per rank, which imports Megatron again.
    plain = """
        --ckpt-format torch
        --transformer-impl local --distributed-backend gloo
        --no-persist-layer-norm --no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion
        --no-rope-fusion --no-create-attention-mask-in-dataloader --num-workers 0 --log-interval 1
        --eval-iters 0 --eval-interval 1000
    """
    text = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 1"
    arguments = f"{model} {moe} {training} {plain} {text}".split()
    arguments += ["--data-cache-path", str(data / "cache")]
    arguments += ["--train-data-path", *(part for path in paths.values() for part in ("1", path["train"]))]
    return arguments


def evaluation_arguments(size: Size) -> list[str]:
    """What the measurement needs beside the training's arguments: how much of each domain to read, at a time and in all."""
    batch = ["--eval-micro-batch-size", "1", "--eval-global-batch-size", str(size.evaluation_processes)]
    return [*batch, "--eval-iters", str(size.valid_sequences // size.evaluation_processes)]

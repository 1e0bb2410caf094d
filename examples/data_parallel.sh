#!/usr/bin/env bash
# Data parallelism: a model of the paper's size, 3.4 B parameters of which 0.6 B are active ("3.4A0.6B", arXiv 2501.11873).
#
#   examples/data_parallel.sh [MEGATRON_FLAGS ...]      made for 8 GPUs of 80 GB; environment: see launch.sh
#
# Why these settings: model and optimizer fit on one GPU, so every GPU is a data-parallel rank. Megatron's aux_loss would
# balance each 4 sequences by themselves; --moe-lbl-scope global balances all 512 of the step.
set -euo pipefail

# From the paper: 64 experts, top-4, 4 shared experts, softmax, z-loss, dropless, LBL weight 0.008, 120 B tokens in batches of
# 512 sequences of 4096. It does not give the widths: these make 3.43 B parameters, 0.60 B active (with the embedding).
model=(
  --num-layers 24 --hidden-size 1024 --ffn-hidden-size 5120
  --num-attention-heads 16 --group-query-attention --num-query-groups 4 --kv-channels 64 --qk-layernorm
  --max-position-embeddings 4096 --position-embedding-type rope --rotary-base 10000
  --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
moe=(
  --num-experts 64 --moe-router-topk 4 --moe-ffn-hidden-size 640
  --moe-shared-expert-intermediate-size 2560 # 4 shared experts of 640, as Megatron writes them: one of 2560
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 8e-3 --moe-z-loss-coeff 1e-3
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion
)
training=(
  --micro-batch-size 4 --global-batch-size 512 --seq-length 4096 --train-iters 57221
  --lr 4e-4 --min-lr 4e-5
)

export VOCAB_SIZE=${VOCAB_SIZE:-151936}
exec "$(dirname "$0")/launch.sh" "${model[@]}" "${moe[@]}" "${training[@]}" -- "$@"

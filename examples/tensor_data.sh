#!/usr/bin/env bash
# Tensor + data parallelism: Mixtral-8x7B-like, 46.7 B parameters, 12.9 B active.
#
#   examples/tensor_data.sh [MEGATRON_FLAGS ...]        made for 4 nodes of 8 GPUs of 80 GB; environment: see launch.sh
#
# Why these settings: a slice of every expert is on every GPU of a node, so however the router spreads its tokens no GPU waits
# for another: balance is a matter of the model alone. Eight experts this wide still give large GEMMs when cut in eight.
set -euo pipefail

# Sizes: the model's own configuration; initialisation, LBL weight, batch and learning rate: Megatron-LM's examples/mixtral.
model=(
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --untie-embeddings-and-output-weights
  --max-position-embeddings 32768 --position-embedding-type rope --rotary-base 1000000
  --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.01
)
moe=(
  --num-experts 8 --moe-router-topk 2
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion
)
training=(
  --micro-batch-size 1 --global-batch-size 256 --seq-length 4096 --train-iters 500000
  --lr 1e-4 --min-lr 1e-5
)

export TP=${TP:-8} VOCAB_SIZE=${VOCAB_SIZE:-32000}
exec "$(dirname "$0")/launch.sh" "${model[@]}" "${moe[@]}" "${training[@]}" -- "$@"

#!/usr/bin/env bash
# Expert + data parallelism: Qwen3-30B-A3B-like, 30.5 B parameters, 3.3 B active.
#
#   examples/expert_data.sh [MEGATRON_FLAGS ...]        made for 4 nodes of 8 GPUs of 80 GB; environment: see launch.sh
#
# Why these settings: 128 narrow experts are too small to cut, so each GPU of a node holds 16 whole ones and tokens travel
# within the node (EP 8). Attention is not split: all 32 GPUs are data-parallel ranks, with one sequence each at a time.
set -euo pipefail

# Sizes: the model's own configuration (top-8 probabilities normalised: softmax after top-k is the same). LBL weight: its own,
# and Qwen3 was itself trained with the global-batch loss. --make-vocab-size-divisible-by gives its 151936 rows.
model=(
  --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
  --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm
  --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1187
  --max-position-embeddings 40960 --position-embedding-type rope --rotary-base 1000000
  --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
moe=(
  --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion
)
training=(
  --micro-batch-size 1 --global-batch-size 256 --seq-length 4096 --train-iters 500000
  --lr 1.2e-4 --min-lr 1.2e-5
  --recompute-granularity selective --recompute-modules moe_act layernorm
)

export EP=${EP:-8} VOCAB_SIZE=${VOCAB_SIZE:-151936}
exec "$(dirname "$0")/launch.sh" "${model[@]}" "${moe[@]}" "${training[@]}" -- "$@"

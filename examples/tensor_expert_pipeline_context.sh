#!/usr/bin/env bash
# Tensor + expert + pipeline + context parallelism: Qwen3-30B-A3B-like at 32k tokens (its long-context stage).
#
#   examples/tensor_expert_pipeline_context.sh [MEGATRON_FLAGS ...]
#                                                       made for 4 nodes of 8 GPUs of 80 GB; environment: see launch.sh
#
# Why these settings: TP 2 x CP 4 cut a sequence of 32k into 4k per GPU and, folded into EP 8 with whole experts (ETP 1), fill
# one node; PP 2 (interleaved) crosses nodes. That leaves 2 data-parallel ranks: only a global scope sees more than 1 sequence.
set -euo pipefail

# The model is that of expert_data.sh.
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
  --micro-batch-size 1 --global-batch-size 64 --seq-length 32768 --train-iters 50000
  --lr 1.2e-4 --min-lr 1.2e-5
  --cp-comm-type p2p
  --recompute-granularity selective --recompute-modules moe_act layernorm
)

export TP=${TP:-2} CP=${CP:-4} PP=${PP:-2} VPP=${VPP:-4} EP=${EP:-8} ETP=${ETP:-1} VOCAB_SIZE=${VOCAB_SIZE:-151936}
exec "$(dirname "$0")/launch.sh" "${model[@]}" "${moe[@]}" "${training[@]}" -- "$@"

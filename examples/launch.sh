#!/usr/bin/env bash
# Starts Megatron-LM pre-training with the plugin on this node. Every script in this folder ends here, and so do the SLURM jobs.
#
#   examples/launch.sh MEGATRON_FLAGS ... [-- MORE_MEGATRON_FLAGS ...]
#
# Flags after `--` come last on the command line, so they win. The training is pretrain_gpt.py of the Megatron-LM tree in
# MEGATRON_LM_DIR, or pretrain_gpt_moe.py beside this file (on the training loop in Megatron-Core's wheel, >= 0.19).
#
# Environment, defaults in brackets:
#   DRY_RUN=1          print the command and exit
#   CPU=1              the same layout, shrunk to four processes of a tiny model on this machine (gloo, no GPU, mock data);
#                      a line says what was shrunk
#   MEGATRON_LM_DIR    a Megatron-LM source tree [none: Megatron-Core's wheel]
#   PYTHON             [python3; with CPU=1 that of this repository's .venv, if there is one]
#   TP PP CP EP        sizes of tensor, pipeline, context and expert parallelism [1]
#   ETP                tensor parallelism inside the experts [TP, as Megatron has it]
#   VPP                virtual stages per pipeline rank (interleaved schedule) [1]
#   MICRO_BATCH GLOBAL_BATCH SEQ_LENGTH TRAIN_ITERS    sequences per micro-batch and per step, tokens per sequence, steps
#                      [as the flags say; CPU=1: 1, 8, 64, 3]
#   DATA_PATH          Megatron's blend: "PREFIX" or "0.7 PREFIX 0.3 PREFIX" [none: mock data]
#   TOKENIZER_MODEL    a Hugging Face tokenizer, by name or path; goes with DATA_PATH
#   VOCAB_SIZE         size of the vocabulary of the mock data [32000]
#   RUN_DIR            checkpoints (saved, and resumed from) and TensorBoard files go there [none: nothing is written];
#                      with more than one node on a file system that all of them share, and so LBL_METRICS_DIR
#   LBL_METRICS_DIR    --moe-lbl-metrics-dir; empty: no record of the balance [RUN_DIR/balance, none without RUN_DIR]
#   SAVE_INTERVAL      steps between checkpoints [500]
#   LBL_SCOPE          --moe-lbl-scope: micro, dp or global [global]
#   LBL_GROUP_SIZE     --moe-lbl-group-size [the plugin's]
#   GPUS_PER_NODE      processes on this node [what SLURM gave, else 8; CPU=1: 4 in all]
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT           for more than one node: start this on each [1 0 localhost 29500]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "launch.sh: error: $*" >&2; exit 2; }
tell() { echo "launch.sh: $*" >&2; }

flags=()
while (($#)) && [[ $1 != -- ]]; do flags+=("$1"); shift; done
[[ ${1:-} == -- ]] && shift
last_flags=("$@")
((${#flags[@]})) || fail "no flags for Megatron; try examples/data_parallel.sh, or see the head of $here/launch.sh"

CPU=${CPU:-0}
tp=${TP:-1} pp=${PP:-1} cp=${CP:-1} ep=${EP:-1} etp=${ETP:-} vpp=${VPP:-1}
nnodes=${NNODES:-1}

if [[ $CPU == 1 ]]; then
  default_processes=$((nnodes < 4 ? 4 / nnodes : 1))
  : "${GPUS_PER_NODE:=$default_processes}" "${MICRO_BATCH:=1}" "${GLOBAL_BATCH:=8}" "${SEQ_LENGTH:=64}" "${TRAIN_ITERS:=3}"
  [[ -z ${PYTHON:-} && -x $here/../.venv/bin/python ]] && PYTHON=$here/../.venv/bin/python
fi
if [[ $CPU == 1 && -n ${MEGATRON_LM_DIR:-} ]]; then
  # The tree compiles a helper with python3 (pybind11) and python3-config, which must be those of PYTHON. A virtual environment
  # has no python3-config; the Python that it was made from does.
  python=$(command -v "${PYTHON:-python3}") || fail "PYTHON $PYTHON: no such program"
  PATH=$(dirname "$python"):$("$python" -c 'import sys; print(sys.base_prefix)')/bin:$PATH
fi
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
world=$((nnodes * gpus))

min() { echo $(($1 < $2 ? $1 : $2)); }
# NAME [VALUE] only if the model has NAME: a model without shared experts shall not get any.
shrunk=()
shrink() { [[ " ${flags[*]} " != *" $1 "* ]] || shrunk+=("$@"); }
if [[ $CPU == 1 ]]; then
  layout() { echo "TP $tp x CP $cp x PP $pp, EP $ep${etp:+, ETP $etp}, VPP $vpp"; }
  asked=$(layout) why=""
  ((cp > 1)) && why=" (CP is 1: the attention of context parallelism is in Transformer Engine only, which needs a GPU)"
  cp=1
  pp=$(min "$pp" "$(min 2 "$world")")
  tp=$(min "$tp" "$(min 2 $((world / pp)))")
  ep=$(min "$ep" $((world / pp)))
  etp=${etp:+$(min "$etp" "$tp")}
  vpp=$((pp == 1 ? 1 : $(min "$vpp" 2)))
  layers=$((pp * vpp < 2 ? 2 : pp * vpp))
  shrunk=(--num-layers "$layers" --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --max-position-embeddings "$SEQ_LENGTH")
  shrunk+=(--lr-warmup-iters 1 --eval-iters 0)
  shrink --num-query-groups 2
  shrink --kv-channels 16
  shrink --num-experts 8
  shrink --moe-router-topk 2
  shrink --moe-ffn-hidden-size 64
  shrink --moe-shared-expert-intermediate-size 64
  shrink --make-vocab-size-divisible-by 128
  tell "CPU=1: $asked -> $(layout) on $world processes; $layers layers, hidden size 64, top-2 of 8 experts$why"
fi
fits() { (($1 % (tp * cp * pp) == 0 && $1 / pp % (ep * ${etp:-$tp}) == 0)); } # the layout on $1 processes
enough_nodes() {
  for ((n = nnodes + 1; n <= nnodes + 1024; n++)); do
    fits $((n * gpus)) && { echo "; NNODES=$n would do"; return; }
  done
}
((world % (tp * cp * pp) == 0)) ||
  fail "NNODES $nnodes x GPUS_PER_NODE $gpus = $world processes; allowed: a multiple of TP $tp x CP $cp x PP $pp = $((tp * cp * pp))$(enough_nodes)"
dp=$((world / (tp * cp * pp)))
fits "$world" ||
  fail "EP $ep x ETP ${etp:-$tp}; allowed: a divisor of TP $tp x CP $cp x DP $dp = $((tp * cp * dp))$(enough_nodes)"

parallel=(
  --tensor-model-parallel-size "$tp"
  --pipeline-model-parallel-size "$pp"
  --context-parallel-size "$cp"
  --expert-model-parallel-size "$ep"
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)
[[ -n $etp ]] && parallel+=(--expert-tensor-parallel-size "$etp")
((tp > 1)) && parallel+=(--sequence-parallel) # MoE with tensor parallelism needs it
((vpp > 1)) && parallel+=(--num-virtual-stages-per-pipeline-rank "$vpp")

training=(
  --bf16
  --lr-decay-style cosine
  --lr-warmup-iters 2000
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --clip-grad 1.0
  --eval-interval 1000
  --eval-iters 10
  --log-interval 1
  --manual-gc
  --manual-gc-interval 100
  --attention-softmax-in-fp32
  --cross-entropy-loss-fusion
  --no-create-attention-mask-in-dataloader
)

sizes=()
[[ -n ${MICRO_BATCH:-} ]] && sizes+=(--micro-batch-size "$MICRO_BATCH")
[[ -n ${GLOBAL_BATCH:-} ]] && sizes+=(--global-batch-size "$GLOBAL_BATCH")
[[ -n ${SEQ_LENGTH:-} ]] && sizes+=(--seq-length "$SEQ_LENGTH")
[[ -n ${TRAIN_ITERS:-} ]] && sizes+=(--train-iters "$TRAIN_ITERS")

if [[ -n ${DATA_PATH:-} && $CPU != 1 ]]; then
  [[ -n ${TOKENIZER_MODEL:-} ]] || fail "DATA_PATH is set, TOKENIZER_MODEL is not; allowed: the tokenizer that the data was made with"
  read -ra blend <<<"$DATA_PATH"
  data=(--data-path "${blend[@]}" --split "${SPLIT:-99,1,0}" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER_MODEL")
  [[ -n ${RUN_DIR:-} ]] && data+=(--data-cache-path "$RUN_DIR/data-cache")
else
  # Until 0.15 Megatron's mock data counts up to 4095, whatever the vocabulary.
  [[ $CPU == 1 ]] && VOCAB_SIZE=4224
  # Megatron adds one token, the end of a document.
  data=(--mock-data --split "99,1,0" --tokenizer-type NullTokenizer --vocab-size "$((${VOCAB_SIZE:-32000} - 1))")
  tell "mock data: the loss means nothing (set DATA_PATH and TOKENIZER_MODEL)"
fi

output=()
if [[ -n ${RUN_DIR:-} ]]; then
  checkpoints=$RUN_DIR/checkpoints
  output=(--save "$checkpoints" --load "$checkpoints" --save-interval "${SAVE_INTERVAL:-500}")
  output+=(--tensorboard-dir "$RUN_DIR/tensorboard" --tensorboard-log-interval 1)
  LBL_METRICS_DIR=${LBL_METRICS_DIR-$RUN_DIR/balance}
fi

case ${LBL_SCOPE:=global} in
  micro | dp | global) ;;
  *) fail "LBL_SCOPE $LBL_SCOPE: unknown; allowed: micro, dp, global" ;;
esac
lbl=(--moe-lbl-scope "$LBL_SCOPE")
[[ -n ${LBL_GROUP_SIZE:-} ]] && lbl+=(--moe-lbl-group-size "$LBL_GROUP_SIZE")
[[ -n ${LBL_METRICS_DIR:-} ]] && lbl+=(--moe-lbl-metrics-dir "$LBL_METRICS_DIR")

if [[ -n ${MEGATRON_LM_DIR:-} ]]; then
  script=$MEGATRON_LM_DIR/pretrain_gpt.py
  [[ -f $script ]] || fail "MEGATRON_LM_DIR $MEGATRON_LM_DIR: no pretrain_gpt.py in it; allowed: a Megatron-LM source tree"
else
  script=$here/pretrain_gpt_moe.py
fi

rendezvous=(--standalone)
if ((nnodes > 1)); then
  rendezvous=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-0}")
  rendezvous+=(--master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
fi

export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # the plugin needs no installation
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Megatron insists on it for tensor and context parallelism on GPUs before Blackwell, and later ones do not mind.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

command=("${PYTHON:-python3}" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$gpus" -m megatron_global_lbl)
[[ $CPU == 1 ]] && command+=(--cpu)
command+=("$script" "${training[@]}" "${flags[@]}" "${sizes[@]}" "${parallel[@]}" "${data[@]}" "${output[@]}" "${lbl[@]}" "${shrunk[@]}" "${last_flags[@]}")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf 'PYTHONPATH=%q OMP_NUM_THREADS=%q CUDA_DEVICE_MAX_CONNECTIONS=%q' "$PYTHONPATH" "$OMP_NUM_THREADS" "$CUDA_DEVICE_MAX_CONNECTIONS"
  for word in "${command[@]}"; do
    # A new line for every flag of the training, so that the command can be read.
    [[ $word == -* ]] && printf ' \\\n   '
    printf ' %q' "$word"
  done
  printf '\n'
  exit 0
fi
exec "${command[@]}"

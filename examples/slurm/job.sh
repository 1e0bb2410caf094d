#!/usr/bin/env bash
# The body of every SLURM job in this folder. It runs once per job, on the first node:
#
#   examples/slurm/job.sh LAUNCH_SCRIPT [MEGATRON_FLAGS ...]        for example examples/expert_data.sh
#
# starts node.sh on every node with one srun, and decides afterwards whether the job is done, has failed or goes on:
#
#   the time limit is near (USR1, asked for with --signal)   every training process gets SIGTERM, upon which Megatron
#                      (--exit-signal-handler) finishes the step and saves; then the job is requeued and resumes
#   a rank has died    srun ends all nodes at once (--kill-on-bad-exit); the job is requeued and resumes from the last checkpoint
#   MAX_ATTEMPTS attempts in a row without a new checkpoint    the job ends with the last exit code
#
# Environment, defaults in brackets (and that of examples/launch.sh):
#   RUN_DIR            on a file system that all nodes share: checkpoints, TensorBoard files, logs of the nodes [required]
#   MAX_ATTEMPTS       [3]
#   MASTER_ADDR MASTER_PORT    [address of the job's first node; a port made from the job's number]
#   CONTAINER_IMAGE    run the nodes in this container: an image for pyxis/enroot (srun --container-image) [none]
#   CONTAINER_MOUNTS   what it sees, as pyxis writes it [this repository, RUN_DIR and MEGATRON_LM_DIR]; data must be added
#   SRUN_ARGS          more options for srun, in words
#   DRY_RUN=1          print the srun command and what every node would start; also outside of SLURM, on NNODES made-up nodes [1]
set -uo pipefail

fail() { echo "job.sh: error: $*" >&2; exit 2; }
tell() { echo "job.sh: $(date '+%F %T') job ${SLURM_JOB_ID:-none}, attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dry_run=${DRY_RUN:-0}
[[ -n ${SLURM_JOB_ID:-} || $dry_run == 1 ]] ||
  fail "not in a SLURM job; submit examples/slurm/one_node.sbatch or multi_node.sbatch, or set DRY_RUN=1"
(($#)) || fail "no launch script; allowed: one of $repo/examples/*.sh"
[[ -f $1 ]] || fail "no such launch script: $1; allowed: one of $repo/examples/*.sh, seen from $PWD"
[[ -n ${RUN_DIR:-} ]] || fail "RUN_DIR is not set; allowed: a folder on a file system that all nodes share"
[[ $dry_run == 1 ]] || mkdir -p "$RUN_DIR/logs" || fail "RUN_DIR $RUN_DIR cannot be made"
RUN_DIR=$(realpath -m "$RUN_DIR")
export RUN_DIR

# Rank 0 is on the first node of the list, as SLURM orders it (SLURM_NODEID 0).
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
  mapfile -t nodes < <(seq -f "node-%g" 0 $((${NNODES:-1} - 1)))
  SLURM_JOB_ID=0 SLURM_CPUS_ON_NODE=CPUS_ON_NODE MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}}
fi
: "${MASTER_ADDR:=$(scontrol show node -o "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}"
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}" # two jobs on one node do not meet
export MASTER_ADDR MASTER_PORT

srun=(
  srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" # else a task gets a single CPU, for all its GPUs
  --kill-on-bad-exit=1
  --output="$RUN_DIR/logs/%x-%j-node%n-%N.log" --open-mode=append
)
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
  mounts=$repo:$repo,$RUN_DIR:$RUN_DIR${MEGATRON_LM_DIR:+,$MEGATRON_LM_DIR:$MEGATRON_LM_DIR}
  srun+=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$mounts}" --container-workdir="$PWD")
fi
read -ra more <<<"${SRUN_ARGS:-}"
srun+=("${more[@]}" bash "$repo/examples/slurm/node.sh" "$@")

tell "nodes ${nodes[*]}; rendezvous at $MASTER_ADDR:$MASTER_PORT; logs in $RUN_DIR/logs"
if [[ $dry_run == 1 ]]; then
  printf '%q ' "${srun[@]}"
  printf '\n'
  NNODES=${#nodes[@]} NODE_RANK=0 exec bash "$@"
fi

checkpoint() { cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }
before=$(checkpoint)

signalled=0
"${srun[@]}" &
pid=$!
# Sent to this shell only (--signal=B:USR1@...); srun hands it on to node.sh on every node.
trap 'signalled=1; tell "USR1: the training shall save and end"; kill -USR1 "$pid"' USR1
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a signal ends wait, not srun
wait "$pid"
code=$?

after=$(checkpoint)
tell "srun ended with $code; checkpoint before: $before, now: $after"
((code == 0 && !signalled)) && exit 0

# Without this a job that cannot work would be requeued for ever.
count=$RUN_DIR/attempts-without-progress
attempts=0
[[ $after == "$before" ]] && attempts=$(($(cat "$count" 2>/dev/null || echo 0) + 1))
echo "$attempts" >"$count"
if ((attempts >= ${MAX_ATTEMPTS:-3})); then
  tell "$attempts attempts in a row without a new checkpoint: not requeued. Logs: $RUN_DIR/logs"
  exit $((code ? code : 1))
fi
tell "requeued"
scontrol requeue "$SLURM_JOB_ID"
exit "$code"

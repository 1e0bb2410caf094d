#!/usr/bin/env bash
# What srun starts, once per node (see job.sh): one torchrun, through the launch script. Its output is the node's log.
#
# Signals. USR1 (save and end) and TERM (SLURM ends the job: preemption, scancel) go on to the training processes as SIGTERM,
# past torchrun, which would give them 30 seconds and then kill them in the middle of the checkpoint. Depending on SLURM's
# process tracking, USR1 also reaches every process below this one, so it is ignored there. Needs pkill (procps).
set -uo pipefail
[[ -n ${SLURM_JOB_NUM_NODES:-} ]] || { echo "node.sh: error: not in a SLURM job; job.sh starts it there (DRY_RUN=1 shows with what)" >&2; exit 2; }
command -v pkill >/dev/null || { echo "node.sh: error: no pkill here; allowed: an image with procps" >&2; exit 2; }

export NNODES=$SLURM_JOB_NUM_NODES NODE_RANK=$SLURM_NODEID
echo "node.sh: $(date '+%F %T') node $NODE_RANK of $NNODES (${SLURMD_NODENAME:-$HOSTNAME}), attempt $((${SLURM_RESTART_COUNT:-0} + 1))"

(
  trap '' USR1
  exec bash "$@" --exit-signal-handler
) &
torchrun=$! # the launch scripts exec, so this stays its process id
# Again until there is a training process to tell: the signal comes only once.
trap 'until pkill -TERM -P "$torchrun" || ! kill -0 "$torchrun" 2>/dev/null; do sleep 1; done' USR1 TERM
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
wait "$torchrun"

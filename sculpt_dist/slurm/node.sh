#!/usr/bin/env bash
# node.sh ARGUMENTS...: run `sculpt-dist ARGUMENTS` on this node's ranks by torchrun; to be started once on every node.
# Under Slurm all is known (LAUNCH=torchrun, see job.sh). Elsewhere, on each of two nodes with eight GPUs, with the first one's name:
#   NODES=2 RANKS_PER_NODE=8 MASTER_ADDR=node1 MASTER_PORT=29500 bash launch/node.sh unlearn CONFIG
# To stop it: touch STOP in the run folder, or Ctrl-C on any node; torchrun itself ends with 1 whenever a rank does not end with 0.
set -euo pipefail
: "${MASTER_ADDR:?export the name of the first node}" "${MASTER_PORT:?export a port that is free there}"
nodes=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
ranks=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A signal must reach the ranks, and they need time to save: torchrun would die of USR1, and kill the ranks 30 s after a TERM.
exec python -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id "${SCULPT_JOB:-sculpt-dist}-${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 300 -m sculpt_dist "$@"

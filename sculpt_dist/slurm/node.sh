#!/usr/bin/env bash
# node.sh ARGUMENTS...: run `sculpt-dist ARGUMENTS` on this node's ranks with torchrun. Start it once on every node.
# Under Slurm it needs no further settings (LAUNCH=torchrun, see job.sh). Elsewhere, run this on each node, here on two
# nodes with eight GPUs, with the name of the first node:
#   NODES=2 RANKS_PER_NODE=8 MASTER_ADDR=node1 MASTER_PORT=29500 bash launch/node.sh unlearn CONFIG
# To stop the run, touch STOP in the run folder, or press Ctrl-C on any node. torchrun exits with 1 whenever a rank
# exits with another code than 0.
set -euo pipefail
: "${MASTER_ADDR:?export the name of the first node}" "${MASTER_PORT:?export a port that is free on the first node}"
nodes=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
ranks=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun must pass signals on and give the ranks time to save. By default USR1 kills it, and it kills the ranks 30 s
# after TERM.
exec python -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id "${SCULPT_JOB:-sculpt-dist}-${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 300 -m sculpt_dist "$@"

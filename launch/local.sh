#!/usr/bin/env bash
# local.sh RANKS ARGUMENTS...: run `sculpt-dist ARGUMENTS` on RANKS processes of this machine, its cores shared out evenly.
#   bash launch/local.sh 2 unlearn configs/canvas/dm_cal.yaml engine.stage=3
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ranks=${1:?"usage: local.sh RANKS ARGUMENTS..., for example: local.sh 2 unlearn configs/canvas/dm_cal.yaml"}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
exec torchrun --nproc-per-node "$ranks" --master-port "$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" \
    -m sculpt_dist "$@"

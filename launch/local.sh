#!/usr/bin/env bash
# local.sh RANKS ARGUMENTS...: run `sculpt-dist ARGUMENTS` in RANKS processes on this machine, with its cores divided
# evenly among them.
#   bash launch/local.sh 2 unlearn configs/canvas/dm_cal.yaml engine.stage=3
# If a rank fails, the script ends the others and exits with the code of the first failure. Ctrl-C reaches all ranks.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ranks=${1:?"usage: local.sh RANKS ARGUMENTS..., for example: local.sh 2 unlearn configs/canvas/dm_cal.yaml"}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
export SCULPT_JOB=${SCULPT_JOB:-local-$$} MASTER_ADDR=127.0.0.1 WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$ranks
MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT

pids=()
for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank LOCAL_RANK=$rank python -m sculpt_dist "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

code=0
left=$ranks
while ((left > 0)); do
    ended=0
    wait -n "${pids[@]}" 2>/dev/null || ended=$?
    # A signal interrupts wait itself; the ranks are still saving.
    if ((ended > 128)) && jobs -rp | grep -q .; then continue; fi
    left=$((left - 1))
    if ((ended != 0 && code == 0)); then
        code=$ended
        ((code == 75)) || { sleep 2; kill -TERM $(jobs -rp) 2>/dev/null || true; }
    fi
done
exit "$code"

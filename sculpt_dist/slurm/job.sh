# Sourced by the batch scripts: starts the ranks, passes Slurm's signals on, and requeues a job that stopped early.
#   run_ranks COMMAND CONFIG [key=value ...]   sculpt-dist COMMAND on all tasks of the job: one per GPU, or per CPU node
#   run_alone COMMAND [...]                    sculpt-dist COMMAND as one task, for commands that start ranks themselves
# Environment:
#   LAUNCH       srun (default): one task is one rank; torchrun: one launcher per node starts the ranks of that node
#   MAX_REQUEUE  how often this job may be requeued (default 50)
#   SCULPT_ENV   the site file; default: slurm/env.sh in the folder that you submitted from, or else the one next to
#                this file
#
# How a job stops. With `--signal=B:USR1@300` in the batch script, Slurm sends USR1 to this shell 300 s (and up to 60 s
# more) before the time limit, and the shell touches RUN/STOP. Preemption sends SIGTERM to the ranks directly. In both
# cases all ranks stop after the same step, save, and leave RUN/REQUEUE. This shell then requeues the job, which
# resumes. Without RUN/REQUEUE the job exits with the code of its ranks: 0 done, 2 invalid input, anything else a crash.
set -uo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
restarts=${SLURM_RESTART_COUNT:-0}
SRUN_OPTIONS=() RUNNER=() launched="" stop_file="" stopping=""

ask_to_stop() {
    stopping=yes
    echo "job $SLURM_JOB_ID: $1 after $SECONDS s, stopping" >&2
    if [ -n "$stop_file" ]; then touch "$stop_file"; elif [ -n "$launched" ]; then kill -USR1 "$launched"; fi
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

site=slurm/env.sh
[ -f "$site" ] || site=$scripts/env.sh
source "${SCULPT_ENV:-$site}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below the ephemeral ports of Linux, and different for each job.
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
# A killed build leaves a lock behind, on which the next start would hang.
export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/sculpt-dist-$SLURM_JOB_ID-$restarts
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Recent versions of srun do not inherit this from the job.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# If a rank dies, end the others, which would wait for it.
STEP=(srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}")
ONE=("${STEP[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1)
SCULPT=("${RUNNER[@]}" python -m sculpt_dist)

run_ranks() {
    local folder
    set -- "${@/#--fresh/run.fresh=true}"
    set -- "${@/#--override/run.override=true}"
    folder=$("${ONE[@]}" "${SCULPT[@]}" folder "${@:2}") || end $?  # reports errors in the configuration first
    mkdir -p "$folder"
    # A job requeued after its run began must resume, even with run.fresh.
    if grep -qsE "job .*\b$SLURM_JOB_ID(\.|\$)" "$folder/log.txt"; then set -- "$@" run.fresh=false; fi
    rm -f "$folder/STOP" "$folder/REQUEUE"
    stop_file=$folder/STOP
    if [ -n "$stopping" ]; then touch "$stop_file"; fi  # the signal came while the configuration was read
    case "${LAUNCH:-srun}" in
        srun) "${STEP[@]}" "${SCULPT[@]}" "$@" & ;;
        torchrun) start_torchrun "$@" & ;;
        *) echo "LAUNCH=$LAUNCH: choose srun or torchrun" >&2; exit 2 ;;
    esac
    wait_for $!
    if [ -e "$folder/REQUEUE" ]; then requeue; fi
    end "$code"
}

start_torchrun() {
    local nodes=$SLURM_JOB_NUM_NODES
    export RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
    exec "${STEP[@]}" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none \
        --cpus-per-task=$((RANKS_PER_NODE * ${SLURM_CPUS_PER_TASK:-1})) "${RUNNER[@]}" bash "$scripts/node.sh" "$@"
}

run_alone() {
    "${ONE[@]}" "${SCULPT[@]}" "$@" &
    wait_for $!
    if [ "$code" = 75 ]; then requeue; fi  # srun passes on the exit code of a single task
    end "$code"
}

wait_for() {
    launched=$1 code=0
    while :; do  # a signal interrupts `wait`, not the process
        code=0
        wait "$launched" || code=$?
        kill -0 "$launched" 2>/dev/null || break
    done
}

end() {  # $1: an exit code. A job preempted before its ranks could write RUN/REQUEUE is requeued all the same.
    if [ "$1" != 0 ] && job_has 'PreemptTime=[0-9]'; then requeue; fi
    exit "$1"
}

requeue() {
    if [ "$restarts" -ge "${MAX_REQUEUE:-50}" ]; then
        echo "job $SLURM_JOB_ID: stopped and saved, but not requeued: MAX_REQUEUE=${MAX_REQUEUE:-50} is reached" >&2
    elif ! job_has 'JobState=RUNNING' && ! job_has 'PreemptTime=[0-9]'; then  # a requeue would revive a cancelled job
        echo "job $SLURM_JOB_ID: cancelled, not requeued; submit it again to resume" >&2
    else
        echo "job $SLURM_JOB_ID: stopped; requeued ($((restarts + 1)))" >&2
        trap '' USR1 TERM
        # Slurm now sends TERM, which must end the sleep: else the nodes stay taken for Slurm's KillWait, often 30 s.
        scontrol requeue "$SLURM_JOB_ID" && { trap : USR1 TERM; sleep 300; }
    fi
    exit 75
}

job_has() { scontrol show job "$SLURM_JOB_ID" | grep -q "$1"; }

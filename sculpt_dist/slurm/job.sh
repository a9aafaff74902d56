# Sourced by the batch scripts: start the ranks, pass on what Slurm announces, and requeue a job that stopped before its end.
#   run_ranks COMMAND CONFIG [key=value ...]   sculpt-dist COMMAND on all tasks of this job, one task per GPU (or per node on CPU)
#   run_alone COMMAND [...]                    sculpt-dist COMMAND as one task, for commands that start ranks themselves
# From the environment:
#   LAUNCH       srun (default): one task is one rank; torchrun: one launcher per node, which starts that node's ranks
#   MAX_REQUEUE  how often this job may be requeued (default 50)
#   SCULPT_ENV   the site file; default: slurm/env.sh where you submitted, or else the one beside this file
#
# How a stop works. `--signal=B:USR1@300` in the batch script has Slurm send USR1 to this shell 300 s (and up to 60 s more) before the
# time limit; it touches RUN/STOP. Preemption sends SIGTERM to the ranks themselves. Either way all ranks stop after the same step,
# save, and leave RUN/REQUEUE, and this shell then requeues the job, which goes on from there. Without that mark the job ends with
# the exit code of its ranks: 0 done, 2 your input, anything else a crash.
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
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below the ports that Linux hands out, another for each job
export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/sculpt-dist-$SLURM_JOB_ID-$restarts  # a killed build's lock would hang the next start
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi  # srun no longer takes it from the job

STEP=(srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}")  # a rank that dies must end the others, who would wait for it
ONE=("${STEP[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1)
SCULPT=("${RUNNER[@]}" python -m sculpt_dist)

run_ranks() {
    local folder
    set -- "${@/#--fresh/run.fresh=true}"
    set -- "${@/#--override/run.override=true}"
    folder=$("${ONE[@]}" "${SCULPT[@]}" folder "${@:2}") || end $?  # says what is wrong with the configuration before anything starts
    mkdir -p "$folder"
    if grep -qsE "job .*\b$SLURM_JOB_ID(\.|\$)" "$folder/log.txt"; then set -- "$@" run.fresh=false; fi  # requeued after it began: it goes on
    rm -f "$folder/STOP" "$folder/REQUEUE"
    stop_file=$folder/STOP
    if [ -n "$stopping" ]; then touch "$stop_file"; fi  # asked while the configuration was read
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
    if [ "$code" = 75 ]; then requeue; fi  # one task's own exit code, which srun passes on
    end "$code"
}

wait_for() {
    launched=$1 code=0
    while :; do  # a signal ends `wait`, not what it waits for
        code=0
        wait "$launched" || code=$?
        kill -0 "$launched" 2>/dev/null || break
    done
}

end() {  # $1: an exit code. A preempted job whose ranks were not yet able to note it has no mark, but is to be requeued all the same.
    if [ "$1" != 0 ] && job_has 'PreemptTime=[0-9]'; then requeue; fi
    exit "$1"
}

requeue() {
    if [ "$restarts" -ge "${MAX_REQUEUE:-50}" ]; then
        echo "job $SLURM_JOB_ID: stopped and saved, and not requeued: MAX_REQUEUE=${MAX_REQUEUE:-50} is reached" >&2
    elif ! job_has 'JobState=RUNNING' && ! job_has 'PreemptTime=[0-9]'; then  # a requeue would bring a cancelled job back to life
        echo "job $SLURM_JOB_ID: cancelled, not requeued; submitted again, it goes on from here" >&2
    else
        echo "job $SLURM_JOB_ID: stopped; requeued ($((restarts + 1)))" >&2
        trap '' USR1 TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 300  # Slurm ends this shell within moments
    fi
    exit 75
}

job_has() { scontrol show job "$SLURM_JOB_ID" | grep -q "$1"; }

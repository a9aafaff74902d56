#!/usr/bin/env bash
# chain.sh CONFIG [key=value ...]: three jobs, each after the one before ended well: prepare, unlearn, evaluate.
# Options of sbatch for each: PREPARE="--nodes=1 ..." UNLEARN="--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 ..." EVALUATE="..."
# Scores of the finished model come from the last job (RUN/evaluation/model); those between concepts are left out.
set -euo pipefail
: "${1:?"usage: chain.sh CONFIG [key=value ...]"}"
SCULPT_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SCULPT_SLURM

after=()
for command in prepare unlearn evaluate; do
    options=${command^^}
    read -ra options <<< "${!options:-}"
    scores=()
    [ "$command" != unlearn ] || scores=(evaluate.enabled=false)
    job=$(COMMAND=$command sbatch --parsable --job-name="$command" "${after[@]}" "${options[@]}" "$SCULPT_SLURM/unlearn.sbatch" "$@" "${scores[@]}")
    job=${job%%;*}  # the cluster's name may follow
    echo "$command: job $job"
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done

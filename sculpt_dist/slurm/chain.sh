#!/usr/bin/env bash
# chain.sh CONFIG [key=value ...]: jobs that prepare, unlearn and evaluate; each starts after the previous one succeeds.
# Options of sbatch for each: PREPARE="--nodes=1 ..." EVALUATE="..."
#   UNLEARN="--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 ..."
# The last job scores the finished model (RUN/evaluation/model); there are no scores between concepts.
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
    job=$(COMMAND=$command sbatch --parsable --job-name="$command" "${after[@]}" "${options[@]}" \
        "$SCULPT_SLURM/unlearn.sbatch" "$@" "${scores[@]}")
    job=${job%%;*}  # the name of the cluster may follow
    echo "$command: job $job"
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done

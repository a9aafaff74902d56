#!/usr/bin/env bash
# Install what is missing and run the tests; with --all the slow ones too. Further arguments go to pytest.
# Tests of one rank run side by side, a worker per core; then those that take several cores, or measure time, one by one.
# The slow ones run jobs on a Slurm of their own: with --all, root gets Debian's package of it; without it they are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
left_out="not exhaustive and not huge"
if [ "${1:-}" = --all ]; then
    shift
    if ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm; } >/dev/null 2>&1 || echo "Slurm could not be installed" >&2
    fi
else
    left_out="not slow and $left_out"
fi
export OMP_NUM_THREADS=1

run_tests() {  # $1: which; the rest goes to pytest. That none was chosen is no failure
    local code=0
    python -m pytest -m "$1 and $left_out" "${@:2}" || code=$?
    ((code == 5)) || return "$code"
}

failed=0
run_tests "not two_ranks" -n "$((cores < 8 ? cores : 8))" --dist loadfile "$@" || failed=$?
run_tests two_ranks "$@" || failed=$?
exit "$failed"

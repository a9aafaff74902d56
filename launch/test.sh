#!/usr/bin/env bash
# Install what is missing and run the tests; with --all the slow ones too. Further arguments go to pytest.
# The slow ones run jobs on a Slurm of their own: with --all, root gets Debian's package of it; without it those tests are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
chosen=(-m "not slow and not exhaustive and not huge")
if [ "${1:-}" = --all ]; then
    shift
    chosen=(-m "not exhaustive and not huge")
    if ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm; } >/dev/null 2>&1 || echo "Slurm could not be installed" >&2
    fi
fi
export OMP_NUM_THREADS=1
exec python -m pytest "${chosen[@]}" "$@"

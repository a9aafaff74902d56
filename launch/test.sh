#!/usr/bin/env bash
# Install what is missing and run the tests; with --all the slow ones too. Further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
chosen=(-m "not slow and not exhaustive and not huge")
if [ "${1:-}" = --all ]; then
    shift
    chosen=(-m "not exhaustive and not huge")
fi
export OMP_NUM_THREADS=1
exec python -m pytest "${chosen[@]}" "$@"

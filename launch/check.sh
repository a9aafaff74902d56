#!/usr/bin/env bash
# Check lint, format, layers, spelling and types of the whole repository. Prints one line per tool, and a tool's output
# only when it fails.
#   bash launch/check.sh --fix   lets ruff fix what it can first
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if [ "${1:-}" = --fix ]; then
    ruff check --quiet --fix . || true
    ruff format --quiet .
fi

failed=0
check() {  # $1: name; the rest: the command
    local name=$1 began=$SECONDS output
    shift
    if output=$("$@" 2>&1); then
        echo "ok      $name ($((SECONDS - began)) s)"
    else
        echo "failed  $name ($((SECONDS - began)) s)"
        echo "$output"
        failed=1
    fi
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "import-linter" lint-imports
check "codespell" codespell
check "mypy" mypy
exit "$failed"

#!/usr/bin/env bash
# Builds the documentation into site/. `launch/docs.sh serve` shows it on a local port and rebuilds it after each edit.
SCULPT_EXTRAS=${SCULPT_EXTRAS:-dev},docs
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

export NO_MKDOCS_2_WARNING=1  # mkdocs-material announces a future release of mkdocs at every build
case "${1:-build}" in
    build) mkdocs build --strict -d site ;;
    serve) mkdocs serve "${@:2}" ;;
    *) echo "usage: bash launch/docs.sh [build|serve [MKDOCS OPTIONS]]; found: $1" >&2; exit 2 ;;
esac

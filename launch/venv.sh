# Sourced by the other scripts: changes to the project folder, creates .venv and installs the missing packages. A second
# call installs nothing.
#   SCULPT_TORCH_INDEX  package index for torch; without a GPU, use PyTorch's CPU index (see pytorch.org, "get started")
#   SCULPT_PYTHON       the Python that creates .venv (default python3; 3.10 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_venv() {
    local python=${SCULPT_PYTHON:-python3}
    command -v "$python" >/dev/null ||
        { echo "$python is not installed: on Debian, apt-get install python3 python3-venv" >&2; exit 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "$("$python" --version) is too old: set SCULPT_PYTHON to Python 3.10 or newer" >&2; exit 2; }
    "$python" -c 'import ensurepip' 2>/dev/null ||
        { echo "$python cannot create virtual environments: on Debian, apt-get install python3-venv" >&2; exit 2; }
    "$python" -m venv .venv
}

install_packages() {  # $1: the extras to install
    local stamp
    stamp=.venv/installed-$(cat pyproject.toml constraints.txt <(echo "$1") | sha256sum | cut -c1-16)
    [ -e "$stamp" ] && return
    echo "installing into .venv (once) ..." >&2
    if [ -n "${SCULPT_TORCH_INDEX:-}" ]; then
        .venv/bin/pip install --disable-pip-version-check -q -c constraints.txt --index-url "$SCULPT_TORCH_INDEX" torch
    elif ! command -v nvidia-smi >/dev/null && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        echo "no GPU found: if pip now downloads CUDA packages (several GB), stop it and set SCULPT_TORCH_INDEX" \
            "to PyTorch's CPU index" >&2
    fi
    .venv/bin/pip install --disable-pip-version-check -q -c constraints.txt -e ".[$1]"
    touch "$stamp"
}

[ -x .venv/bin/python ] || make_venv
install_packages "${SCULPT_EXTRAS:-dev}"
export PATH=$PWD/.venv/bin:$PATH

cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')

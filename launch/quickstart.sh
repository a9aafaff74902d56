#!/usr/bin/env bash
# The main job on the embedded default: cat, house and car unlearned one after another from a tiny Stable Diffusion 1.5.
# Further arguments are overrides, for example train.seed=1.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((cores > 1 ? 2 : 1))
((gpus > 0 && gpus < ranks)) && ranks=$gpus
exec bash launch/local.sh "$ranks" unlearn configs/canvas/dm_cal.yaml "$@"

#!/usr/bin/env bash
# The main job on the embedded default: cat, house and car unlearned one after another from a tiny Stable Diffusion 1.5.
#   --arch sdxl | sana   the same on a tiny SDXL or SANA
# Further arguments are overrides, for example train.seed=1.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
config=configs/canvas/dm_cal.yaml
if [ "${1:-}" = --arch ]; then
    arch=${2:?"usage: quickstart.sh [--arch sd15|sdxl|sana] [key=value ...]"}
    shift 2
    [ "$arch" = sd15 ] || config=configs/canvas/dm_cal_$arch.yaml
    [ -f "$config" ] || { echo "there is no $config: --arch knows sd15$(ls configs/canvas | sed -n 's/^dm_cal_\(.*\).yaml$/, \1/p' | tr -d '\n')" >&2; exit 2; }
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((cores > 1 ? 2 : 1))
((gpus > 0 && gpus < ranks)) && ranks=$gpus
exec bash launch/local.sh "$ranks" unlearn "$config" "$@"

#!/usr/bin/env bash
# The default run on the embedded canvas: a tiny Stable Diffusion 1.5 unlearns cat, house and car one after another.
#   --arch sdxl | sana   the same on a tiny SDXL or SANA
# Further arguments are overrides, for example train.seed=1.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
config=configs/canvas/dm_cal.yaml
if [ "${1:-}" = --arch ]; then
    arch=${2:?"usage: quickstart.sh [--arch sd15|sdxl|sana] [key=value ...]"}
    shift 2
    [ "$arch" = sd15 ] || config=configs/canvas/dm_cal_$arch.yaml
    if [ ! -f "$config" ]; then
        others=$(ls configs/canvas | sed -n 's/^dm_cal_\(.*\).yaml$/, \1/p' | tr -d '\n')
        echo "--arch $arch: no such file $config; choose one of sd15$others" >&2
        exit 2
    fi
fi
gpus=0
if compgen -G "/dev/nvidia[0-9]*" >/dev/null || [ -e /dev/kfd ] || command -v nvidia-smi >/dev/null; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
ranks=$((cores > 1 ? 2 : 1))
((gpus > 0 && gpus < ranks)) && ranks=$gpus
exec bash launch/local.sh "$ranks" unlearn "$config" "$@"

#!/usr/bin/env bash
# The default run on the embedded canvas: a tiny Stable Diffusion 1.5 unlearns cat, house and car one after another.
#   --arch sdxl | sana   the same on a tiny SDXL or SANA
#   --world gallery      ten objects of the gallery's real pictures instead (about ten minutes)
# Further arguments are overrides, for example train.seed=1.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
usage="usage: quickstart.sh [--world canvas|gallery] [--arch sd15|sdxl|sana] [key=value ...]"
world=canvas arch=sd15
while [[ "${1:-}" == --* ]]; do
    case $1 in
        --world) world=${2:?"$usage"} ;;
        --arch) arch=${2:?"$usage"} ;;
        *) echo "$1: unknown; $usage" >&2 && exit 2 ;;
    esac
    shift 2
done
config=configs/$world/dm_cal.yaml
[ "$arch" = sd15 ] || config=configs/$world/dm_cal_$arch.yaml
if [ ! -f "$config" ]; then
    echo "--world $world --arch $arch: no such file $config; choose one of" configs/{canvas,gallery}/dm_cal*.yaml >&2
    exit 2
fi
gpus=0
if compgen -G "/dev/nvidia[0-9]*" >/dev/null || [ -e /dev/kfd ] || command -v nvidia-smi >/dev/null; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
ranks=$((cores > 1 ? 2 : 1))
((gpus > 0 && gpus < ranks)) && ranks=$gpus
exec bash launch/local.sh "$ranks" unlearn "$config" "$@"

# The one file to fit to your site; every job sources it, on the batch node, before it starts anything. As it is, it takes the .venv of
# the folder that you submit from, or else the python of your shell. A copy of your own elsewhere: export SCULPT_ENV=FILE.

# --- Modules. What Python or the drivers need here:
# module purge
# module load python/3.11 cuda/12.8

# --- Python. The virtual environment must lie where all nodes see it.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
# source /shared/venvs/sculpt-dist/bin/activate

# --- Or a container, with sculpt-dist installed in it. Folders of models and runs must be mounted at the same place.
# pyxis, options of srun:
# SRUN_OPTIONS+=(--container-image=/shared/images/sculpt-dist.sqsh --container-mounts="$PWD,/shared" --container-workdir="$PWD")
# apptainer, a command before python (--nv for NVIDIA, --rocm for AMD):
# RUNNER=(apptainer exec --nv --bind /shared --pwd "$PWD" /shared/images/sculpt-dist.sif)

# --- NCCL. Without InfiniBand, or when start-up hangs, name the network between the nodes (see `ip address`):
# export NCCL_SOCKET_IFNAME=ib0         # the interface of its sockets; gloo has GLOO_SOCKET_IFNAME
# export NCCL_IB_HCA=mlx5               # the InfiniBand cards to use; NCCL_IB_DISABLE=1 uses none
# export NCCL_DEBUG=INFO                # what it found, in the job's log
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank whose peer is gone ends with an error instead of waiting for ever

# --- Models. Compute nodes often have no network: fetch on the login node, and read the cache here.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# --- Weights & Biases. No network on the nodes: write beside the run, and `wandb sync` later.
# export WANDB_MODE=offline

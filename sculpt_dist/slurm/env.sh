# Adapt this file to your site. Every job sources it on the batch node before it starts anything. Unchanged, it uses the
# .venv of the folder that you submit from, or else the python of your shell. To keep your own copy elsewhere, export
# SCULPT_ENV=FILE.

# --- Modules that Python or the drivers need:
# module purge
# module load python/3.11 cuda/12.8

# --- Python. All nodes must be able to read the virtual environment.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
# source /shared/venvs/sculpt-dist/bin/activate

# --- Or a container with sculpt-dist installed. Mount the folders of models and runs at the same paths.
# pyxis, options of srun:
# SRUN_OPTIONS+=(--container-image=/shared/images/sculpt-dist.sqsh)
# SRUN_OPTIONS+=(--container-mounts="$PWD,/shared" --container-workdir="$PWD")
# apptainer, a command before python (--nv for NVIDIA, --rocm for AMD):
# RUNNER=(apptainer exec --nv --bind /shared --pwd "$PWD" /shared/images/sculpt-dist.sif)

# --- NCCL. Without InfiniBand, or if start-up hangs, name the network between the nodes (see `ip address`):
# export NCCL_SOCKET_IFNAME=ib0         # the interface for its sockets; for gloo, GLOO_SOCKET_IFNAME
# export NCCL_IB_HCA=mlx5               # the InfiniBand cards to use; NCCL_IB_DISABLE=1 uses none
# export NCCL_DEBUG=INFO                # print what NCCL detects to the job's log
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank that loses a peer fails instead of hanging

# --- Models. Compute nodes often have no network: download on the login node and read the cache here.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# --- Weights & Biases. Without network on the nodes, log offline and run `wandb sync` later.
# export WANDB_MODE=offline

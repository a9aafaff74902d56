#!/usr/bin/env bash
# deepspeed.sh HOSTFILE ARGUMENTS...: run `sculpt-dist ARGUMENTS` on the hosts of HOSTFILE by DeepSpeed's launcher, for clusters without
# Slurm. A line of the file is `node1 slots=8`; several hosts need pdsh and ssh without a password, and the same folders on all of them.
# To stop it: touch STOP in the run folder (the launcher ends the ranks at Ctrl-C, which also save). Given again, it goes on.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
hostfile=${1:?"usage: deepspeed.sh HOSTFILE ARGUMENTS..., for example: deepspeed.sh hosts.txt unlearn configs/canvas/dm_cal.yaml"}
shift
[ -f "$hostfile" ] || { echo "there is no hostfile $hostfile: write lines such as 'node1 slots=8'" >&2; exit 2; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
alone=()
[ "$(grep -c 'slots=' "$hostfile")" != 1 ] || alone=(--no_ssh_check --master_addr 127.0.0.1)  # one host needs no ssh
exec deepspeed --hostfile "$hostfile" "${alone[@]}" --no_local_rank --module sculpt_dist "$@"

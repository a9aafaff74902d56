#!/usr/bin/env bash
# deepspeed.sh HOSTFILE ARGUMENTS...: run `sculpt-dist ARGUMENTS` on the hosts of HOSTFILE with DeepSpeed's launcher,
# for clusters without Slurm. A line of the file reads `node1 slots=8`. Several hosts need pdsh, ssh without a password,
# and the same folders on every host.
# To stop the run, touch STOP in the run folder, or press Ctrl-C: the launcher then ends the ranks, which save first.
# The same command resumes.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
usage="usage: deepspeed.sh HOSTFILE ARGUMENTS..., for example deepspeed.sh hosts.txt unlearn configs/canvas/dm_cal.yaml"
hostfile=${1:?$usage}
shift
[ -f "$hostfile" ] || { echo "no such hostfile: $hostfile; create it with lines such as 'node1 slots=8'" >&2; exit 2; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
alone=()
[ "$(grep -c 'slots=' "$hostfile")" != 1 ] || alone=(--no_ssh_check --master_addr 127.0.0.1)  # one host needs no ssh
exec deepspeed --hostfile "$hostfile" "${alone[@]}" --no_local_rank --module sculpt_dist "$@"

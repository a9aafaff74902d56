"""A Slurm for the tests: a controller and two virtual nodes on this machine, with ports and a folder of their own.

The nodes are daemons on one host (`slurmd -N NAME`), named by their loopback addresses. Without munge, cgroups and
accounting, `scontrol` reports the state of a job. An existing Slurm on the machine is never contacted.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import PROJECT, free_port, rank_environment

NODES = 2
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONF = """
ClusterName=sculpttest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=120
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
LogTimeFormat=iso8601_ms
SlurmdDebug=info
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can start here; None if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: on Debian, apt-get install --no-install-recommends slurm-wlm"
    return None if os.getuid() == 0 else "slurmd starts jobs as root only"


Job = int | str  # an id, or ARRAY_INDEX


class Cluster:
    """The running cluster. `folder` holds its state, its logs and the logs of the jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        self.names = [f"127.0.0.{i + 1}" for i in range(NODES)]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 RealMemory=4000 "
            "State=UNKNOWN"
            for name in self.names
        ]
        (folder / "state").mkdir()
        self.conf.write_text(CONF.format(host=host, port=free_port(), folder=folder, nodes="\n".join(nodes)))
        outer = {
            name: value
            for name, value in rank_environment().items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "SCULPT"))
        }
        bin_folder = str(Path(sys.executable).parent)
        self.env = outer | {
            "SLURM_CONF": str(self.conf),
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{bin_folder}:/usr/sbin:{outer['PATH']}",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._daemon("slurmctld", "-D", "-c")
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name)
        self._until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split() == self.names,
            60,
            "the nodes are idle",
        )

    def stop(self) -> None:
        """End every job, then the daemons."""
        self.run("scancel", "--partition=low,high")
        self._until(lambda: not self.run("squeue", "-h"), 60, "the queue is empty")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(30)

    def run(self, *command: str, **environment: str) -> str:
        """Run a command in the project folder and return what it prints."""
        done = subprocess.run(
            command, env=self.env | environment, cwd=PROJECT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> int:
        """Submit a shipped script with sbatch; `log(job)` returns its log."""
        log = f"--output={self.folder}/job-%j.txt"
        return int(
            self.run("sbatch", "--parsable", log, *options, str(PROJECT / "slurm" / script), *arguments, **environment)
        )

    def log(self, job: Job) -> str:
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.is_file() else ""

    def job(self, job: Job) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job))))

    def wait(self, job: Job, until: Callable[[dict[str, str]], bool], what: str, timeout: float) -> dict[str, str]:
        """Wait until the job is in the wanted state; fails if it ends in another state."""
        state: dict[str, str] = {}

        def reached() -> bool:
            nonlocal state
            state = self.job(job)
            assert until(state) or state["JobState"] not in ENDED, (
                f"job {job} {state['JobState']} before {what}:\n{self.log(job)[-6000:]}"
            )
            return until(state)

        self._until(reached, timeout, f"job {job}: {what}", lambda: self.log(job)[-6000:])
        return state

    def wait_ended(self, job: Job, timeout: float = 180) -> dict[str, str]:
        return self.wait(job, lambda state: state["JobState"] in ENDED, "its end", timeout)

    def wait_completed(self, job: Job, timeout: float = 180) -> dict[str, str]:
        state = self.wait_ended(job, timeout)
        assert state["JobState"] == "COMPLETED", f"{state}\n{self.log(job)[-6000:]}"
        return state

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{command[-1]}.log").open(
            "wb"
        ) as log:  # the daemon ends whenever the tests end
            self.daemons.append(
                subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command], env=self.env, stdout=log, stderr=log)
            )

    def _until(self, true: Callable[[], bool], timeout: float, what: str, details: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{details()}"
            assert all(daemon.poll() is None for daemon in self.daemons), f"a daemon of Slurm ended; see {self.folder}"
            time.sleep(0.2)

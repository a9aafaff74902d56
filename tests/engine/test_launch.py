"""How a rank learns its place and its device from the launcher."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import pytest
import torch
from harness import PROJECT, free_port, python, rank_environment

from sculpt_dist.engine import launch

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", *SLURM)


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("local_rank", "gpus", "index"),
    [(3, 8, 3), (3, 1, 0), (5, 4, 1)],  # a node's GPUs for all its ranks; one for each; several jobs on a node
)
def test_the_device_of_a_rank_is_one_that_it_sees_and_the_one_that_deepspeed_takes(
    environment, local_rank, gpus, index
):
    chosen: list[torch.device] = []
    environment.setenv("LOCAL_RANK", str(local_rank))
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: gpus)
    environment.setattr(torch.cuda, "set_device", chosen.append)
    device = launch.choose_device()
    assert chosen == [device] == [torch.device("cuda", index)]
    assert launch.os.environ["LOCAL_RANK"] == str(index)


def test_one_process_in_an_allocation_of_several_tasks_is_alone(environment):
    for name, value in SLURM.items():
        environment.setenv(name, value)
    assert not launch.describe_rank_to_torch()
    for name, value in {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}.items():
        environment.setenv(name, value)
    environment.setenv("MASTER_ADDR", "node1")
    assert launch.describe_rank_to_torch()
    found = {name: launch.os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    assert found == {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "10007"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_rank_that_waits_for_the_others_can_be_ended(tmp_path, number, code):
    config = str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")
    port = free_port()
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [python(), "-m", "sculpt_dist", "unlearn", config, f"run.folder={tmp_path / 'run'}"],
        env=rank_environment() | alone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):  # until it waits there
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=10)
    assert process.returncode == code and "Traceback" not in printed, printed

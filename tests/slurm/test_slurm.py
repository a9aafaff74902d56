"""Jobs on a real Slurm of two virtual nodes: launched, stopped, preempted, requeued, killed, as arrays and chains."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from cluster import ENDED, Cluster, Job, missing
from harness import PROJECT, sculpt, weights

pytestmark = [pytest.mark.slow, pytest.mark.two_ranks]
CONFIG = str(PROJECT / "configs" / "canvas" / "dm_cal_sana.yaml")
RUN = [
    "prepare.samples=6",
    "prepare.steps=2",
    "prepare.batch=3",
    "train.batch=4",
    "train.steps=60",
    "mask.collect=2",
    "mask.refresh=10",
    "evaluate.enabled=false",
    "concepts=[{target: bird, superclass: animal}]",
]
LAST = 61  # 2 collect steps and 59 that train
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--partition=low")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    why = missing()
    if why is not None:
        pytest.skip(why)
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The final weights of an undisturbed run on two ranks without Slurm."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    sculpt("unlearn", CONFIG, *RUN, f"run.folder={folder}", ranks=2)
    return weights(folder)


def steps(folder: Path) -> list[int]:
    """The steps in metrics.jsonl; a repeated step occurs more than once."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Assert that the run trained every step once and ended with exactly these weights."""
    found = weights(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert steps(folder) == list(range(LAST + 1))
    assert not (folder / "REQUEUE").exists()


@contextmanager
def held_at(cluster: Cluster, job: Job, folder: Path, step: int) -> Iterator[dict[int, int]]:
    """Freeze the ranks after this step, so that what is sent to them meanwhile reaches them there on any machine.

    Yields their process ids by rank.
    """
    deadline = time.monotonic() + 180
    while not any(reached >= step for reached in steps(folder)):
        if cluster.job(job)["JobState"] in ENDED or time.monotonic() > deadline:
            raise AssertionError(f"job {job} never reached step {step}:\n{cluster.log(job)[-6000:]}")
        time.sleep(0.02)
    ranks = processes(folder) or forked(folder)
    assert ranks, f"no process works in {folder}"
    for pid in ranks.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        yield ranks
    finally:
        for pid in ranks.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def processes(folder: Path) -> dict[int, int]:
    """Process ids of the ranks that work in a run folder, by rank; launchers are not among them."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            launches = b"srun" in words or b"torch.distributed.run" in words
            if f"run.folder={folder}".encode() in words and b"sculpt_dist" in words and not launches:
                number = re.search(rb"(?:^|\0)SLURM_PROCID=(\d+)", (path / "environ").read_bytes())
                found[int(number[1]) if number else 0] = int(path.name)
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
    return found


def forked(folder: Path) -> dict[int, int]:
    """The holder of a run folder: the command line of a comparison's cell is that of the process that it was forked
    from.
    """
    return {0: int(json.loads((folder / ".lock").read_text())["pid"])}


def test_two_nodes_train_what_two_local_ranks_do(cluster, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    command = ["sculpt-dist", "submit", CONFIG, *RUN, f"run.folder={folder}", "--nodes", "2", "--partition", "low"]
    printed = cluster.run(*command, "--option", f"output={cluster.folder}/job-%j.txt")
    state = cluster.wait_completed(printed.removeprefix("job: "))
    assert state["Restarts"] == "0" and state["NumNodes"] == "2"
    assert_same(folder, uninterrupted)


def test_a_job_at_its_time_limit_and_preempted_later_is_requeued_twice_and_loses_no_step(
    cluster, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    options = (*TWO_NODES, "--time=20", "--signal=B:USR1@110")
    job = cluster.submit("unlearn.sbatch", CONFIG, *RUN, "run.fresh=true", f"run.folder={folder}", options=options)
    with held_at(cluster, job, folder, 5):
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # the next check finds it near its end
        cluster.wait(job, lambda _: "USR1 after" in cluster.log(job), "the signal", 60)
    cluster.wait(job, lambda _: "requeued (1)" in cluster.log(job), "its first requeue", 120)
    cluster.wait(job, lambda state: state["Restarts"] == "1", "the end of its shell, long before KillWait", 5)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    first = len(steps(folder))
    with held_at(cluster, job, folder, first + 5):
        preempt(cluster, job)
    cluster.wait(job, lambda state: state["Restarts"] == "2", "its second requeue", 120)
    assert 5 < first < len(steps(folder)) < LAST
    cluster.wait_completed(job)
    assert "requeued (1)" in cluster.log(job) and "requeued (2)" in cluster.log(job)
    assert_same(folder, uninterrupted)


@pytest.mark.exhaustive  # CI preempts a job under srun
def test_a_preempted_job_under_torchrun_is_requeued_and_loses_no_step(cluster, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    job = cluster.submit("unlearn.sbatch", CONFIG, *RUN, f"run.folder={folder}", options=TWO_NODES, LAUNCH="torchrun")
    with held_at(cluster, job, folder, 5):
        urgent = preempt(cluster, job)
    cluster.wait(job, lambda state: state["Restarts"] == "1", "its requeue", 120)
    assert 5 < len(steps(folder)) < LAST
    cluster.wait_completed(urgent)
    cluster.wait_completed(job)
    assert_same(folder, uninterrupted)


def preempt(cluster: Cluster, job: Job) -> int:
    """Submit a short job of higher priority that takes both nodes; returns once Slurm has told `job` to make room.

    Slurm wakes held ranks when it tells them, so the job may be back in the queue by then.
    """
    options = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    before = cluster.job(job)["Restarts"]
    urgent = int(cluster.run("sbatch", *options, "--wrap", "true"))

    def is_told(state: dict[str, str]) -> bool:
        return state.get("PreemptTime", "None") != "None" or state["Restarts"] != before

    cluster.wait(job, is_told, "its preemption", 60)
    return urgent


def test_no_more_requeues_than_allowed_and_none_when_cancelled(cluster, tmp_path):
    folder = tmp_path / "run"
    job = cluster.submit("unlearn.sbatch", CONFIG, *RUN, f"run.folder={folder}", options=TWO_NODES, MAX_REQUEUE="0")
    with held_at(cluster, job, folder, 5):
        cluster.run("scancel", "--batch", "--signal=USR1", str(job))
        cluster.wait(job, lambda _: "USR1 after" in cluster.log(job), "the signal", 60)
    state = cluster.wait_ended(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "75:0", "0")
    assert "MAX_REQUEUE=0 is reached" in cluster.log(job) and (folder / "REQUEUE").exists()
    saved = len(steps(folder))
    job = cluster.submit("unlearn.sbatch", CONFIG, *RUN, f"run.folder={folder}", options=TWO_NODES)
    with held_at(cluster, job, folder, saved + 3):
        cluster.run("scancel", str(job))
    state = cluster.wait_ended(job)
    cluster.wait(job, lambda _: not processes(folder) and "requeued" in cluster.log(job), "the end of its ranks", 60)
    assert (
        state["JobState"] == "CANCELLED"
        and cluster.job(job)["Restarts"] == "0"
        and "cancelled, not requeued" in cluster.log(job)
    )
    assert list((folder / "checkpoints").glob("step-*"))


def test_a_killed_rank_ends_the_job_within_5_s_and_leaves_no_process(cluster, tmp_path):
    folder = tmp_path / "run"
    job = cluster.submit("unlearn.sbatch", CONFIG, *RUN, f"run.folder={folder}", options=TWO_NODES)
    with held_at(cluster, job, folder, 5) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    state = cluster.wait_ended(job, 30)
    assert time.monotonic() - began < 5
    assert state["JobState"] == "FAILED" and state["Restarts"] == "0" and not processes(folder)
    assert "rank 1 died" in (folder / "log.txt").read_text().splitlines()[-1]


def test_a_user_error_is_reported_and_not_requeued(cluster, tmp_path):
    bad = cluster.submit(
        "unlearn.sbatch", CONFIG, *RUN, "train.stepz=3", f"run.folder={tmp_path / 'bad'}", options=TWO_NODES
    )
    odd = cluster.submit(
        "unlearn.sbatch", CONFIG, *RUN, "train.batch=5", f"run.folder={tmp_path / 'odd'}", options=TWO_NODES
    )
    for job, message in ((bad, "Did you mean: 'steps'"), (odd, "train.batch=5 is not divisible by ranks 2")):
        state = cluster.wait_ended(job)
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), cluster.log(job)
        assert message in cluster.log(job)


SCORED = [
    "evaluate.enabled=true",
    "evaluate.images=1",
    "evaluate.paraphrase_images=0",
    "evaluate.steps=1",
    "evaluate.bootstrap=20",
]


@pytest.mark.exhaustive  # CI runs an array of a sweep's trials
def test_an_array_runs_the_cells_of_a_comparison_and_a_stopped_task_resumes(cluster, tmp_path):
    file, runs = tmp_path / "comparison.yaml", tmp_path / "runs"
    file.write_text(
        f"folder: {runs}\nagainst: plain\nsequences: {{one: [{{target: bird, superclass: animal}}]}}\noverrides: "
        f"{json.dumps([*RUN[:-1], *SCORED, 'train.steps=60'])}\n"  # its cells, which start at once, end soon
        f"rows: [{{name: plain, config: {CONFIG}}}]\ntables: "
        f"[{{title: All, sequence: one, backbones: [sana], seeds: [0, 1]}}]\n"
    )
    job = cluster.submit("compare.sbatch", str(file), options=("--array=0-1", "--partition=low"))
    cells = [runs / "one" / "sana" / "plain" / f"seed-{seed}" for seed in range(2)]
    with held_at(cluster, f"{job}_0", cells[0], 5):
        cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
        cluster.wait(f"{job}_0", lambda _: "USR1 after" in cluster.log(f"{job}_0"), "the signal", 60)
    cluster.wait(f"{job}_0", lambda state: state["Restarts"] == "1", "its requeue", 120)
    for index, cell in enumerate(cells):
        assert cluster.wait_completed(f"{job}_{index}")["Restarts"] == str(1 - index)
        assert steps(cell) == list(range(62)) and (cell / "report" / "report.json").is_file()


def test_an_array_runs_the_points_of_a_sweep(cluster, tmp_path):
    pytest.importorskip("sculpt_dist.experiments.sweep")
    words = [
        "${interpreter}",
        "-m",
        "sculpt_dist",
        "unlearn",
        CONFIG,
        *RUN,
        *SCORED,
        "train.steps=4",
        "mask.refresh=1",
        "${args_no_hyphens}",
    ]
    grid = {"train.lr": {"values": [1e-4, 1e-3]}}
    sweep = {
        "name": "small",
        "program": "sculpt_dist/__main__.py",
        "method": "grid",
        "metric": {"name": "H", "goal": "maximize"},
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(sweep | {"parameters": grid, "command": words}))
    job = cluster.submit(
        "sweep.sbatch", str(file), "--folder", str(tmp_path / "runs"), options=("--array=0-1", "--partition=low")
    )
    for index in range(2):
        cluster.wait_completed(f"{job}_{index}")
    reports = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("report.json")]
    assert len(reports) == 2 and all(report["after"]["UA"] is not None for report in reports)


def test_a_chain_prepares_unlearns_and_evaluates(cluster, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    log = f"--output={cluster.folder}/job-%j.txt --partition=low"
    printed = cluster.run(
        "bash",
        "slurm/chain.sh",
        CONFIG,
        *RUN,
        *SCORED,
        f"run.folder={folder}",
        PREPARE=log,
        UNLEARN=f"{log} --nodes=2",
        EVALUATE=log,
    )
    jobs = {line.partition(":")[0]: int(line.split()[-1]) for line in printed.splitlines()}
    assert list(jobs) == ["prepare", "unlearn", "evaluate"]
    assert cluster.job(jobs["evaluate"])["JobState"] == "PENDING"
    for job in jobs.values():
        cluster.wait_completed(job)
    assert_same(folder, uninterrupted)
    assert json.loads((folder / "evaluation" / "model" / "scores.json").read_text())["plain"]["UA"] is not None

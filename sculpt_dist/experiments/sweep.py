"""Runs a W&B sweep file without a server, in one process or in the tasks of a job array.

Each trial is a run folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sculpt_dist.core.errors import ConfigError, NonFiniteError, RunFolderError
from sculpt_dist.core.locks import Lock
from sculpt_dist.experiments.jobs import Failure, Job, run_jobs, settings_of_many
from sculpt_dist.experiments.ledger import (
    DONE,
    FAILED,
    Outcome,
    claim_sweep,
    claim_trial,
    known_trials,
    outcome,
    record_outcome,
    trial_of,
    write_failure,
)
from sculpt_dist.experiments.summary import write_summary
from sculpt_dist.experiments.trials import Sweep, Trial, read_sweep

LASTING = (ConfigError.__name__, NonFiniteError.__name__)  # caused by the trial's own point: would recur


def run_sweep(
    file: Path,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    seed: int = 0,
    index: int | None = None,
    parallel: int = 1,
    ranks: int = 1,
    run: bool = True,
    gpus: int | None = None,
) -> Path:
    """Run the unfinished trials of a sweep, `parallel` at a time, write its summary, and return its folder.

    Each trial has `ranks` processes and `gpus` GPUs (None: one per rank).

    With `index` only that trial runs, as one task of a job array, and no summary is written. With `run=False` no trial
    runs. Several processes may work in one folder: each takes trials that no other process holds.

    Raises ConfigError before anything runs if the sweep is invalid, and at the end if a trial failed. Raises
    RunFolderError if another process holds the trial `index`, and StopRequested after a signal.
    """
    plan = _claimed(file, overrides, folder, seed, index, ranks)
    worker = SweepWorker(plan)
    failed: dict[str, Failure] = {}
    if run:
        failed = run_jobs(
            worker.jobs(range(plan.count) if index is None else [index]), parallel, ranks, worker.job_ended, gpus
        )
    if index is not None:
        _check_index(worker, index)
    else:
        if worker.elsewhere:
            print(f"run by another process: {', '.join(f'trial {number}' for number in worker.elsewhere)}", flush=True)
        outcomes = [outcome(trial) for trial in known_trials(plan)]
        write_summary(plan, outcomes)
        _check_metric(plan, outcomes)
    reasons = [f"{label}: {failure}" for label, failure in failed.items()] + worker.failed_before
    if reasons:
        raise ConfigError(f"{len(reasons)} of {plan.count} trials failed: {'; '.join(reasons)}")
    return plan.folder


def trial_arguments(
    file: Path, overrides: Sequence[str], folder: Path | None, seed: int, index: int
) -> tuple[str, ...]:
    """The command line of one trial, for the user's own launcher."""
    plan = _claimed(file, overrides, folder, seed, index, 1)
    return _arguments(plan, trial_of(plan, index))


def _claimed(
    file: Path, overrides: Sequence[str], folder: Path | None, seed: int, index: int | None, ranks: int
) -> Sweep:
    """Read and check the sweep and claim its folder. Raises ConfigError and RunFolderError."""
    plan = read_sweep(file, overrides, folder, seed, ranks)
    plan.check()
    if index is not None and not 0 <= index < plan.count:
        raise ConfigError(f"index={index}: the sweep has {plan.count} trials, 0 to {plan.count - 1}")
    claim_sweep(plan)
    return plan


def _arguments(plan: Sweep, trial: Trial) -> tuple[str, ...]:
    return ("unlearn", str(plan.config), *settings_of_many(plan.folder), *trial.overrides)


class SweepWorker:
    """The work of one process on a sweep."""

    def __init__(self, plan: Sweep) -> None:
        self.plan = plan
        self.elsewhere: dict[int, str] = {}  # trials that another process holds, and which
        self.failed_before: list[str] = []
        self._held: dict[str, tuple[Trial, Lock]] = {}  # trial and its lock, by the job's label

    def jobs(self, indices: Sequence[int]) -> Iterator[Job]:
        """Jobs for the open trials that no process holds; each is claimed when it is taken."""
        for index in indices:
            lock = claim_trial(self.plan, index)
            if isinstance(lock, str):
                self.elsewhere[index] = lock
                continue
            trial = trial_of(self.plan, index)
            ended = outcome(trial)
            label = f"trial {index}"
            if ended.state == FAILED:
                self.failed_before.append(
                    f"{label}: {ended.reason} (remove {trial.folder.with_suffix('.failed')} to run it again)"
                )
            if ended.state in (DONE, FAILED):
                record_outcome(self.plan, ended)  # a killed process may not have recorded it
                lock.release()
                continue
            self._held[label] = trial, lock
            yield Job(label, _arguments(self.plan, trial), trial.folder)

    def job_ended(self, job: Job, failure: Failure | None) -> None:
        """Print how a trial ended, record an error caused by its point, and release the trial."""
        trial, lock = self._held.pop(job.label)
        if failure is not None and failure.error in LASTING:
            write_failure(trial, failure.line)
        ended = outcome(trial)
        record_outcome(self.plan, ended)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in ended.scores.items() if value is not None)
        print(f"{job.label} ({_point_text(trial)}): {failure or scores or 'done'}", flush=True)
        lock.release()


def _point_text(trial: Trial) -> str:
    return ", ".join(f"{name}={value}" for name, value in trial.point.items())


def _check_metric(plan: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Raises ConfigError if no finished trial has the metric."""
    done = [ended.scores for ended in outcomes if ended.state == DONE]
    name = plan.settings.metric.name
    if done and all(scores[name] is None for scores in done):
        measured = ", ".join(score for score, value in done[0].items() if value is not None)
        raise ConfigError(f"metric.name={name}: no trial's report has this score; choose one of: {measured}")


def _check_index(worker: SweepWorker, index: int) -> None:
    if index in worker.elsewhere:
        raise RunFolderError(
            f"trial {index} is being run by {worker.elsewhere[index]}: wait for it, or run another trial"
        )

"""What a sweep's folder knows, shared by all processes that work in it: whose folder it is, the points of bayes, and how trials ended.

SWEEP/plan.json             what decides the trials; another sweep is refused
SWEEP/points.jsonl          bayes: the point of every trial that was asked for, and how it ended, written under points.lock
SWEEP/trials/0003/          the run folder of trial 3; its report is the trial's result
SWEEP/trials/0003.lock      held while a process runs the trial
SWEEP/trials/0003.failed    why it cannot run; remove it to try again
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.core.files import derived_seed, write_atomically
from sculpt_dist.experiments.compare import finished_report
from sculpt_dist.experiments.trials import Sweep, Trial
from sculpt_dist.maths.comparison import harmonic

DONE, FAILED, OPEN = "done", "failed", "open"
ATTEMPTS = 100  # at a point that no other trial has


@dataclass(frozen=True)
class Outcome:
    """How a trial stands: done with scores, failed with a reason, or open (not run, or not to its end)."""

    trial: Trial
    state: str
    scores: Mapping[str, float | None]
    reason: str = ""


def claim_sweep(sweep: Sweep) -> None:
    """Raises RunFolderError when the folder holds another sweep."""
    (sweep.folder / "trials").mkdir(parents=True, exist_ok=True)
    file, mine = sweep.folder / "plan.json", json.dumps(sweep.identity, indent=1, default=str) + "\n"
    with FileLock(sweep.folder / "plan.lock"):
        if not file.is_file():
            write_atomically(file, mine.encode())
        theirs = json.loads(file.read_text())
    changed = [key for key, value in json.loads(mine).items() if theirs.get(key) != value]
    if changed:
        told = "; ".join(f"{key}: {theirs.get(key)} there, {json.loads(mine)[key]} here" for key in changed)
        raise RunFolderError(f"{sweep.folder} holds another sweep ({told}): choose another --folder, or remove it")


def claim_trial(sweep: Sweep, index: int) -> FileLock | None:
    """The trial, for this process alone until the lock is released; None while another process has it."""
    lock = FileLock(sweep.folder / "trials" / f"{index:04d}.lock", thread_local=False)
    try:
        return lock.acquire(timeout=0).lock
    except Timeout:
        return None


def outcome(trial: Trial) -> Outcome:
    """From the report in its folder, or the record of its failure."""
    report = finished_report(trial.folder, trial.fingerprint)
    if report is not None:
        after = report["after"]
        scores = {name: after.get(name) for name in ("UA", "IRA", "CRA", "SA")}
        return Outcome(trial, DONE, scores | {"H": harmonic(scores)})
    note = trial.folder.with_suffix(".failed")
    return Outcome(trial, FAILED, {}, note.read_text().strip()) if note.is_file() else Outcome(trial, OPEN, {})


def retention(scores: Mapping[str, float | None]) -> float | None:
    """The harmonic mean of IRA and CRA, or the one that there is."""
    return harmonic(scores, ("IRA", "CRA"))


def write_failure(trial: Trial, line: str) -> None:
    write_atomically(trial.folder.with_suffix(".failed"), (line + "\n").encode())


def trial_of(sweep: Sweep, index: int) -> Trial:
    """A trial with its point; bayes is asked for one when the trial has none yet."""
    if sweep.settings.method != "bayes":
        return sweep.trial(index, sweep.point(index))
    with FileLock(sweep.folder / "points.lock"):
        entries = _read_entries(sweep)
        if index not in entries:
            shares = _new_shares(sweep, index, entries)
            entries[index] = {
                "trial": index,
                "shares": shares,
                "point": sweep.point_at(shares),
                "state": OPEN,
                "value": None,
            }
            _write_entries(sweep, entries)
    return sweep.trial(index, sweep.point_at(entries[index]["shares"]))


def record_outcome(sweep: Sweep, ended: Outcome) -> None:
    """Let bayes know how a trial ended; told twice is told once."""
    if sweep.settings.method != "bayes":
        return
    with FileLock(sweep.folder / "points.lock"):
        entries = _read_entries(sweep)
        entries[ended.trial.index] |= {"state": ended.state, "value": ended.scores.get(sweep.settings.metric.name)}
        _write_entries(sweep, entries)


def known_trials(sweep: Sweep) -> list[Trial]:
    """All trials; of bayes those that have a point."""
    if sweep.settings.method == "bayes":
        return [
            sweep.trial(index, sweep.point_at(entry["shares"])) for index, entry in sorted(_read_entries(sweep).items())
        ]
    return [trial_of(sweep, index) for index in range(sweep.count)]


def _read_entries(sweep: Sweep) -> dict[int, dict[str, Any]]:
    file = sweep.folder / "points.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {entry["trial"]: entry for entry in entries}


def _write_entries(sweep: Sweep, entries: Mapping[int, Mapping[str, Any]]) -> None:
    write_atomically(
        sweep.folder / "points.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries.values()).encode()
    )


def _new_shares(sweep: Sweep, index: int, entries: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """A point that no trial has, given how the others ended; those that have not count as bad, which keeps this one away from them."""
    taken = [sweep.point_at(entry["shares"]) for entry in entries.values()]
    for attempt in range(ATTEMPTS):
        shares = _suggest(sweep, list(entries.values()), derived_seed(sweep.seed, index, attempt) % 2**31)
        if sweep.point_at(shares) not in taken:
            return shares
    raise ConfigError(
        f"trial {index}: bayes found no point that is not among the {len(taken)} tried ones: lower run_cap to {len(taken)}"
    )


def _suggest(sweep: Sweep, told: Sequence[Mapping[str, Any]], seed: int) -> dict[str, float]:
    try:
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution
    except ImportError as error:
        raise ConfigError(
            "method bayes needs optuna: pip install 'sculpt-dist[sweeps]', or use method random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = [parameter for parameter in sweep.parameters if parameter.kind != "constant"]
    space: dict[str, Any] = {
        parameter.name: CategoricalDistribution(_middles(parameter.options["values"]))
        if parameter.kind == "categorical"
        else FloatDistribution(0.0, 1.0)
        for parameter in searched
    }
    study = optuna.create_study(
        direction=sweep.settings.metric.goal, sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    )
    states = {
        DONE: optuna.trial.TrialState.COMPLETE,
        FAILED: optuna.trial.TrialState.FAIL,
        OPEN: optuna.trial.TrialState.RUNNING,
    }
    for entry in told:
        state = states[FAILED if entry["state"] == DONE and entry["value"] is None else entry["state"]]
        params = {name: entry["shares"][name] for name in space}
        study.add_trial(
            optuna.trial.create_trial(state=state, params=params, distributions=space, value=entry["value"])
        )
    fixed = {parameter.name: 0.5 for parameter in sweep.parameters if parameter.kind == "constant"}
    return study.ask(space).params | fixed


def _middles(values: Sequence[Any]) -> list[float]:
    """The share in the middle of each of several equally likely values."""
    return [(number + 0.5) / len(values) for number in range(len(values))]

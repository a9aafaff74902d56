"""The folder of a sweep, which all processes that work on the sweep share.

SWEEP/plan.json             the settings that determine the trials; a different sweep is refused
SWEEP/points.jsonl          bayes: the point and the outcome of every trial so far, written under points.lock
SWEEP/trials/0003/          the run folder of trial 3; its report is the result of the trial
SWEEP/trials/0003.lock      held while a process runs the trial
SWEEP/trials/0003.failed    why the trial failed; remove it to run the trial again
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.core.files import derived_seed, make_folder, read_object, write_atomically
from sculpt_dist.core.locks import Lock
from sculpt_dist.experiments.compare import finished_report
from sculpt_dist.experiments.trials import Sweep, Trial
from sculpt_dist.maths.comparison import harmonic

DONE, FAILED, OPEN = "done", "failed", "open"
ATTEMPTS = 100  # to find a point that no other trial has


@dataclass(frozen=True)
class Outcome:
    """The state of a trial: done with scores, failed with a reason, or open (not finished)."""

    trial: Trial
    state: str
    scores: Mapping[str, float | None]
    reason: str = ""


def claim_sweep(sweep: Sweep) -> None:
    """Record the sweep in its folder. Raises RunFolderError if the folder holds another sweep."""
    make_folder(sweep.folder / "trials")
    file, plan = sweep.folder / "plan.json", json.dumps(sweep.identity, indent=1, default=str) + "\n"
    with Lock(sweep.folder / "plan.lock"):
        if not file.is_file():
            write_atomically(file, plan.encode())
        recorded = read_object(file, "remove it if the trials beside it are of this sweep")
    changed = {key: value for key, value in json.loads(plan).items() if recorded.get(key) != value}
    if changed:
        details = "; ".join(f"{key}: {recorded.get(key)} there, {value} here" for key, value in changed.items())
        raise RunFolderError(f"{sweep.folder} holds another sweep ({details}): choose another --folder, or remove it")


def claim_trial(sweep: Sweep, index: int) -> Lock | str:
    """Lock a trial for this process. Returns the lock to release, or who holds it."""
    lock = Lock(sweep.folder / "trials" / f"{index:04d}.lock")
    return lock.acquire() or lock


def outcome(trial: Trial) -> Outcome:
    """Read a trial's outcome from its report or from its .failed file."""
    report = finished_report(trial.folder, trial.fingerprint)
    if report is not None:
        after = report["after"]
        scores = {name: after.get(name) for name in ("UA", "IRA", "CRA", "SA")}
        return Outcome(trial, DONE, scores | {"H": harmonic(scores)})
    reason = _failure(trial)
    return Outcome(trial, OPEN, {}) if reason is None else Outcome(trial, FAILED, {}, reason)


def retention(scores: Mapping[str, float | None]) -> float | None:
    """The harmonic mean of IRA and CRA, or the only one measured."""
    return harmonic(scores, ("IRA", "CRA"))


def write_failure(trial: Trial, line: str) -> None:
    """Note why a trial failed, and what it was: the note counts for no other configuration or number of ranks."""
    note = {"reason": line, "config": trial.fingerprint, "ranks": trial.ranks}
    write_atomically(trial.folder.with_suffix(".failed"), (json.dumps(note) + "\n").encode())


def _failure(trial: Trial) -> str | None:
    """Why this trial failed, None if it did not; a note of another one is removed."""
    file = trial.folder.with_suffix(".failed")
    if not file.is_file():
        return None
    text = file.read_text().strip()
    try:
        note = json.loads(text)
    except ValueError:  # of an earlier version
        return text
    if (note["config"], note["ranks"]) == (trial.fingerprint, trial.ranks):
        return str(note["reason"])
    file.unlink()
    return None


def trial_of(sweep: Sweep, index: int) -> Trial:
    """A trial with its point. Under bayes, a trial without a point gets a new one."""
    if sweep.settings.method != "bayes":
        return sweep.trial(index, sweep.point(index))
    with Lock(sweep.folder / "points.lock"):
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
    """Record for bayes how a trial ended; recording it twice has no further effect. Other methods need no record."""
    if sweep.settings.method != "bayes":
        return
    with Lock(sweep.folder / "points.lock"):
        entries = _read_entries(sweep)
        entries[ended.trial.index] |= {"state": ended.state, "value": ended.scores.get(sweep.settings.metric.name)}
        _write_entries(sweep, entries)


def known_trials(sweep: Sweep) -> list[Trial]:
    """All trials; under bayes, those that have a point."""
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
    """A new point, based on the outcomes so far.

    Trials still running count as bad, which keeps the new point away from theirs (optuna's constant liar).
    """
    taken = [sweep.point_at(entry["shares"]) for entry in entries.values()]
    for attempt in range(ATTEMPTS):
        shares = _suggest(sweep, list(entries.values()), derived_seed(sweep.seed, index, attempt) % 2**31)
        if sweep.point_at(shares) not in taken:
            return shares
    raise ConfigError(
        f"trial {index}: bayes found no point besides the {len(taken)} tried ones: lower run_cap to {len(taken)}"
    )


def _suggest(sweep: Sweep, entries: Sequence[Mapping[str, Any]], seed: int) -> dict[str, float]:
    try:
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution
        from optuna.study import StudyDirection
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
    directions = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(direction=directions[sweep.settings.metric.goal], sampler=sampler)
    states = {
        DONE: optuna.trial.TrialState.COMPLETE,
        FAILED: optuna.trial.TrialState.FAIL,
        OPEN: optuna.trial.TrialState.RUNNING,
    }
    for entry in entries:
        state = states[FAILED if entry["state"] == DONE and entry["value"] is None else entry["state"]]
        params = {name: entry["shares"][name] for name in space}
        study.add_trial(
            optuna.trial.create_trial(state=state, params=params, distributions=space, value=entry["value"])
        )
    fixed = {parameter.name: 0.5 for parameter in sweep.parameters if parameter.kind == "constant"}
    return study.ask(space).params | fixed


def _middles(values: Sequence[Any]) -> list[float]:
    """The middle of each value's interval when [0, 1] is divided evenly among the values."""
    return [(number + 0.5) / len(values) for number in range(len(values))]

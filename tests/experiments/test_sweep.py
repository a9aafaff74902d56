"""Sweeps: W&B accepts the files, the points of the trials, the message for each mistake, and small real sweeps."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import PROJECT, python, rank_environment, sculpt

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, RunFolderError
from sculpt_dist.core.locks import Lock
from sculpt_dist.experiments import trials
from sculpt_dist.experiments.jobs import settings_of_many
from sculpt_dist.experiments.ledger import (
    _new_shares,
    claim_sweep,
    claim_trial,
    known_trials,
    outcome,
    record_outcome,
    trial_of,
    write_failure,
)
from sculpt_dist.experiments.summary import as_markdown, summary_rows, write_summary
from sculpt_dist.experiments.sweep import run_sweep, trial_arguments
from sculpt_dist.experiments.trials import read_sweep
from sculpt_dist.run.fingerprint import config_fingerprint

FILES = sorted((PROJECT / "configs" / "sweeps").glob("*.yaml"))
CANVAS = PROJECT / "configs" / "canvas"
SWEEP = """
name: small
method: grid
metric: {name: H, goal: maximize}
parameters:
  train.lr: {values: [1.0e-3, 1.0e-2]}
  mask.keep: {values: [0.3, 1.0]}
command: ["${env}", "${interpreter}", -m, sculpt_dist, unlearn, CANVAS/dm_cal_sana.yaml, train.steps=4, train.batch=2,
  mask.collect=1, mask.refresh=0, "concepts=[{target: bird, superclass: animal}]", prepare.samples=2, prepare.steps=2,
  evaluate.steps=2, evaluate.images=1, "evaluate.paraphrases=[]", evaluate.bootstrap=10, train.checkpoint_every=0.1,
  "${args_no_hyphens}", track.wandb=true, "run.folder=runs/${oc.env:WANDB_RUN_ID}"]
"""
BAYES = (
    ("method: grid", "method: bayes\nrun_cap: 30"),
    ("{values: [1.0e-3, 1.0e-2]}", "{distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}"),
)


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    text = SWEEP.replace("CANVAS", str(CANVAS))
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def write_fake_report(trial, **scores: float) -> None:
    """Write the report that a finished run of this trial would leave."""
    report = trial.folder / "report" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"config": config_fingerprint(trial.config), "finished": True, "after": scores}))


# --- W&B accepts the files


def command_line(file: Path, folder: Path, point: dict, monkeypatch) -> list[str]:
    """The command line that W&B's own agent runs for a point from its server.

    The program on the PATH writes its arguments and environment to a file.
    """
    from wandb.sdk.launch.sweeps.utils import load_sweep_config
    from wandb.wandb_agent import Agent

    content = load_sweep_config(str(file))
    call = folder / "call.json"
    program = folder / content["command"][0].replace("${interpreter}", "python")
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\njson.dump([sys.argv, dict(os.environ)], open({str(call)!r}, 'w'))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for name, value in {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "WANDB_SWEEP_ID": "s1",
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    agent = Agent(None, None, sweep_id="s1")
    agent._sweep_command = content["command"]
    sent = {name: {"value": value} for name, value in point.items()}
    agent._command_run({"run_id": "r7", "program": content["program"], "args": sent})
    agent._run_processes["r7"]._popen.wait(timeout=30)
    arguments, environment = json.loads(call.read_text())
    assert environment["WANDB_RUN_ID"] == "r7" and environment["WANDB_SWEEP_ID"] == "s1"
    return [Path(arguments[0]).name, *arguments[1:]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_wandbs_agent_runs_the_same_configuration_as_the_local_backend(file, tmp_path, monkeypatch):
    plan = read_sweep(file)
    point = plan.point(1) if plan.settings.method != "bayes" else plan.point_at({p.name: 0.3 for p in plan.parameters})
    words = command_line(file, tmp_path, dict(point), monkeypatch)
    assert words[words.index("python") :][:4] == ["python", "-m", "sculpt_dist", "unlearn"]
    config, *given = words[words.index("unlearn") + 1 :]
    assert Path(config) == plan.config
    # The point arrives as plain key=value.
    assert [f"{name}={value}" for name, value in point.items()] == given[-3 - len(point) : -3]
    assert given[-3:] == [
        "track.wandb=true",
        f"track.group={plan.name}",
        f"run.folder=runs/sweeps/{plan.name}/${{oc.env:WANDB_RUN_ID}}",
    ]
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    by_agent = load_config(PROJECT / config, given)
    assert by_agent.track.wandb and by_agent.track.group == plan.name
    assert by_agent.run.folder == f"runs/sweeps/{plan.name}/r7"
    local = load_config(
        PROJECT / plan.config, plan.overrides + tuple(f"{name}={value}" for name, value in point.items())
    )
    assert config_fingerprint(local) == config_fingerprint(by_agent) and not local.track.wandb


@pytest.mark.skipif(
    importlib.util.find_spec("sweeps") is None, reason="W&B's own sweep package is not installed (it pins numpy<2)"
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_wandbs_own_schema_accepts_the_file_and_its_grid_has_our_order(file):
    import yaml
    from sweeps import schema_violations_from_proposed_config
    from sweeps.grid_search import grid_search_next_runs

    content = yaml.safe_load(file.read_text())
    assert schema_violations_from_proposed_config(content) == []
    plan = read_sweep(file)
    if plan.settings.method == "grid":
        runs = grid_search_next_runs([], content, validate=True, n=plan.count)
        assert [{name: part["value"] for name, part in run.config.items()} for run in runs] == [
            plan.point(i) for i in range(plan.count)
        ]


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("canvas")], ids=lambda file: file.stem)
def test_every_trial_of_a_shipped_sweep_is_valid(file, monkeypatch):
    monkeypatch.chdir(PROJECT)
    plan = read_sweep(file)
    plan.check()
    assert plan.settings.metric.name == "H" and plan.settings.metric.goal == "maximize" and plan.count >= 9


# --- points


def test_a_grid_orders_parameters_by_name_and_the_last_changes_fastest(tmp_path):
    plan = read_sweep(written(tmp_path))
    assert [tuple(plan.point(i).values()) for i in range(plan.count)] == [
        (0.3, 1e-3),
        (0.3, 1e-2),
        (1.0, 1e-3),
        (1.0, 1e-2),
    ]
    assert list(plan.point(0)) == ["mask.keep", "train.lr"]
    swapped = read_sweep(
        written(
            tmp_path,
            ("  train.lr: {values: [1.0e-3, 1.0e-2]}\n", ""),
            ("\ncommand", "\n  train.lr: {values: [1.0e-3, 1.0e-2]}\ncommand"),
        )
    )
    assert [plan.point(i) for i in range(4)] == [swapped.point(i) for i in range(4)]
    assert read_sweep(written(tmp_path, ("method: grid", "method: grid\nrun_cap: 3"))).count == 3


def test_a_sweep_of_a_million_points_is_read_and_checked_without_making_them(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "MOST_CHECKED", 5)
    plan = read_sweep(
        written(
            tmp_path,
            ("{values: [1.0e-3, 1.0e-2]}", "{distribution: q_uniform, min: 1.0e-4, max: 1.0e-1, q: 1.0e-4}"),
            ("  mask.keep: {values: [0.3, 1.0]}", "  train.seed: {distribution: int_uniform, min: 1, max: 1002}"),
        )
    )
    plan.check()
    assert plan.count == 999 * 1002 > 1e6 and len(plan._trials) == 5
    assert plan.point(plan.count - 1) == {"train.lr": 0.0999, "train.seed": 1002}
    bad = written(tmp_path, ("{values: [1.0e-3, 1.0e-2]}", "{distribution: int_uniform, min: -90000, max: -1}"))
    with pytest.raises(ConfigError, match="train.lr=-.*must be a finite number, not negative"):
        read_sweep(bad).check()


def test_a_random_trial_depends_only_on_its_seed_and_number(tmp_path):
    change = ("method: grid", "method: random\nrun_cap: 5"), BAYES[1]
    plan = read_sweep(written(tmp_path, *change))
    points = [plan.point(i) for i in range(5)]
    assert len({point["train.lr"] for point in points}) == 5 and all(
        1e-4 <= point["train.lr"] <= 1e-1 for point in points
    )
    code = (
        "from pathlib import Path; from sculpt_dist.experiments.trials import read_sweep; "
        f"print(read_sweep(Path({str(tmp_path / 'sweep.yaml')!r})).point(4))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=rank_environment() | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == str(points[4])  # in another process, without the earlier trials
    more = read_sweep(
        written(
            tmp_path,
            *change,
            ("run_cap: 5", "run_cap: 50"),
            ("parameters:\n", "parameters:\n  train.clip: {min: 0.0, max: 1.0}\n"),
        )
    )
    assert [point["train.lr"] for point in points] == [more.point(i)["train.lr"] for i in range(5)]
    assert read_sweep(written(tmp_path, *change), seed=1).point(0) != points[0]


def test_a_trial_has_the_configuration_that_its_command_line_gives(tmp_path):
    file = written(tmp_path)
    plan = read_sweep(file, ["train.clip=0.5", "train.lr=7"], tmp_path / "out")
    trial = plan.trial(3, plan.point(3))
    assert trial.config == load_config(plan.config, trial.overrides)
    assert (trial.config.mask.keep, trial.config.train.lr, trial.config.train.clip) == (
        1.0,
        1e-2,
        0.5,
    )  # the point wins
    assert (
        trial.folder == tmp_path / "out" / "trials" / "0003"
        and trial.config.track.group == "small"
        and not trial.config.track.wandb
    )
    assert trial_arguments(file, ["train.clip=0.5", "train.lr=7"], tmp_path / "out", 0, 3) == (
        "unlearn",
        str(plan.config),
        *settings_of_many(tmp_path / "out"),
        *trial.overrides,
    )


# --- bayes


def test_bayes_gets_closer_to_the_best_point_than_chance(tmp_path):
    pytest.importorskip("optuna")
    file = written(tmp_path, *BAYES)

    def distance(point) -> float:  # from the best point
        return abs(math.log10(point["train.lr"] / 1e-3)) + (point["mask.keep"] != 0.3)

    distances = []
    for seed in range(5):
        plan, entries = read_sweep(file, seed=seed), {}
        for index in range(plan.count):
            shares = _new_shares(plan, index, entries)
            entries[index] = {"shares": shares, "state": "done", "value": 1 / (1 + distance(plan.point_at(shares)))}
        distances.append([distance(plan.point_at(entry["shares"])) for entry in entries.values()])
    start, end = (
        sum(sum(tried[part]) for tried in distances) for part in (slice(10), slice(-10, None))
    )  # the first ten are drawn at random
    assert end < 2 / 3 * start


def test_bayes_records_the_point_and_the_outcome_of_a_trial(tmp_path):
    pytest.importorskip("optuna")
    plan = read_sweep(written(tmp_path, *BAYES), folder=tmp_path / "out")
    claim_sweep(plan)
    trials = [trial_of(plan, index) for index in (0, 7, 1)]
    write_fake_report(trials[1], UA=1.0, IRA=0.5, CRA=1.0)
    record_outcome(plan, outcome(trials[1]))
    entries = {
        entry["trial"]: (entry["state"], entry["value"])
        for entry in map(json.loads, (plan.folder / "points.jsonl").read_text().splitlines())
    }
    assert entries == {0: ("open", None), 7: ("done", pytest.approx(0.75)), 1: ("open", None)}
    again = read_sweep(tmp_path / "sweep.yaml", folder=tmp_path / "out")
    assert [trial_of(again, index).point for index in (0, 7, 1)] == [trial.point for trial in trials]
    assert [trial.index for trial in known_trials(again)] == [0, 1, 7]


@pytest.mark.two_ranks
def test_concurrent_processes_get_different_points(tmp_path):
    pytest.importorskip("optuna")
    plan = read_sweep(written(tmp_path, *BAYES), folder=tmp_path / "out")
    claim_sweep(plan)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=trial_of, args=(plan, index)) for index in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text().splitlines()]
    assert (
        sorted(line["trial"] for line in lines) == list(range(6))
        and len({json.dumps(line["point"]) for line in lines}) == 6
    )


def test_bayes_raises_once_every_point_was_tried(tmp_path):
    pytest.importorskip("optuna")
    plan = read_sweep(written(tmp_path, BAYES[0]), folder=tmp_path / "out")
    claim_sweep(plan)
    points = [trial_of(plan, index).point for index in range(4)]
    assert len({json.dumps(point) for point in points}) == 4  # all four points, none twice
    with pytest.raises(ConfigError, match="trial 4: bayes found no point.*lower run_cap to 4"):
        trial_of(plan, 4)


# --- mistakes


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("train.lr:", "train.lrr:", "trial 0: override 'train.lrr=0.001': .*Did you mean: 'lr'"),
        ("train.lr:", "method.label_guidnce:", "Key 'label_guidnce' not in .*'label_guidance'"),
        ("train.lr:", "run.folder:", "parameter run.folder: is set by the sweep itself"),
        ("values: [1.0e-3, 1.0e-2]", "values: []", r"parameter train.lr: values is \[\]; give a list of at least one"),
        ("values: [1.0e-3, 1.0e-2]", "values: [1.0e-3, null]", "null cannot be passed"),
        ("values: [1.0e-3, 1.0e-2]", "values: [2, 2]", "contains one value twice"),
        ("values: [1.0e-3, 1.0e-2]", "value: 1, q: 3", "constant needs value; found: value, q"),
        (
            "values: [1.0e-3, 1.0e-2]",
            "distribution: beta, a: 1",
            "unknown distribution 'beta'; choose one of: constant, ",
        ),
        ("values: [1.0e-3, 1.0e-2]", "distribution: normal, sigma: 1", "a grid takes values, .*not normal"),
        ("values: [1.0e-3, 1.0e-2]", "min: 0.5, max: 0.1", "min=0.5 is not below max=0.1"),
        ("values: [1.0e-3, 1.0e-2]", "min: 1e-4, max: 0.1", "min='1e-4' is not a number"),
        ("values: [1.0e-3, 1.0e-2]", "distribution: log_uniform_values, min: 0.0, max: 0.1", "needs numbers above 0"),
        ("values: [1.0e-3, 1.0e-2]", "distribution: int_uniform, min: 0.5, max: 2", "both must be whole numbers"),
        (
            "values: [1.0e-3, 1.0e-2]",
            "values: [1, 2], probabilities: [0.5, 0.6]",
            "one for each of the 2 values, with sum 1",
        ),
        ("values: [1.0e-3, 1.0e-2]", "parameters: {a: {value: 1}}", "is nested; write its keys with dots"),
        ("{values: [0.3, 1.0]}", "{values: [0.3, 1.5]}", "trial 2: mask.keep=1.5: is a share"),
        ("name: H", "name: loss", "metric.name=loss; no report has it: choose one of UA, IRA, CRA, SA, H"),
        ("goal: maximize", "goal: max", "metric.goal=max: choose one of minimize, maximize"),
        ("method: grid", "method: gird", "method=gird: choose one of grid, random, bayes"),
        ("method: grid", "method: random", "set the number of trials, run_cap: 20"),
        ("method: grid", "method: grid\nearly_terminate: {type: hyperband}", "early_terminate needs W&B's server"),
        ("method: grid", "method: grid\nruncap: 3", "Key 'runcap' not in"),
        ('"${args_no_hyphens}"', '"${args}"', r"write it as \[.*args_no_hyphens"),
        (
            "train.batch=2",
            "train.batch=3, train.accumulate=2",
            "trial 0: train.batch=3 is not divisible by ranks 1 x train.accumulate 2",
        ),
        ("train.steps=4", "more.yaml", "names 2 configuration files"),
        ("values: [1.0e-3, 1.0e-2]", "min: 1, max: 900000000", "a grid takes at most 100,000 values"),
        ("values: [1.0e-3, 1.0e-2]", f"min: 1, max: {'9' * 400}", "is not a number"),
        ("train.steps=4", "evaluate.enabled=false", "its report has no metric H"),
        ("dm_cal_sana.yaml", "dm_kal.yaml", "no such configuration file"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_runs(tmp_path, before, after, message):
    with pytest.raises(ConfigError, match=message):
        run_sweep(written(tmp_path, (before, after)), folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bayes_refuses_probabilities_and_invalid_ends(tmp_path):
    chances = ("{values: [0.3, 1.0]}", "{values: [0.3, 1.0], probabilities: [0.5, 0.5]}")
    with pytest.raises(ConfigError, match="remove the probabilities"):
        run_sweep(written(tmp_path, *BAYES, chances), folder=tmp_path / "out")
    with pytest.raises(ConfigError, match="train.lr=0.0: must be greater"):
        run_sweep(
            written(tmp_path, BAYES[0], ("{values: [1.0e-3, 1.0e-2]}", "{distribution: normal}")),
            folder=tmp_path / "out",
        )


def test_the_error_for_an_index_out_of_range_names_the_number_of_trials(tmp_path):
    for index in (4, -1):
        with pytest.raises(ConfigError, match=f"index={index}: the sweep has 4 trials, 0 to 3"):
            run_sweep(written(tmp_path), folder=tmp_path / "out", index=index)


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    run_sweep(written(tmp_path), folder=tmp_path / "out", run=False)
    run_sweep(
        written(tmp_path, ("goal: maximize", "goal: minimize"), ("method: grid", "method: grid\nrun_cap: 3")),
        folder=tmp_path / "out",
        run=False,
    )
    with pytest.raises(RunFolderError, match="holds another sweep .parameters: .*choose another --folder"):
        run_sweep(written(tmp_path, ("[0.3, 1.0]", "[0.3, 0.9]")), folder=tmp_path / "out", run=False)
    with pytest.raises(RunFolderError, match="overrides: .*train.clip=1"):
        run_sweep(written(tmp_path), ["train.clip=1"], folder=tmp_path / "out", run=False)


def test_a_metric_that_no_report_has_is_an_error(tmp_path):
    file = written(tmp_path, ("name: H", "name: CRA"))
    plan = read_sweep(file, folder=tmp_path / "out")
    write_fake_report(plan.trial(0, plan.point(0)), UA=1.0, IRA=0.5, CRA=None)
    with pytest.raises(ConfigError, match="metric.name=CRA: no trial's report has this score; choose one of: UA, IRA"):
        run_sweep(file, folder=tmp_path / "out", run=False)


def test_the_error_for_a_trial_of_another_process_names_that_process(tmp_path):
    file = written(tmp_path)
    plan = read_sweep(file, folder=tmp_path / "out")
    claim_sweep(plan)
    lock = claim_trial(plan, 2)
    assert isinstance(lock, Lock)
    with pytest.raises(
        RunFolderError, match=f"trial 2 is being run by process {os.getpid()} on {platform.node()}: wait"
    ):
        run_sweep(file, folder=tmp_path / "out", index=2)
    lock.release()
    assert isinstance(claim_trial(plan, 2), Lock)


# --- the summary


def test_the_summary_sorts_by_the_metric_and_marks_the_front(tmp_path):
    plan = read_sweep(written(tmp_path), folder=tmp_path / "out")
    claim_sweep(plan)
    trials = known_trials(plan)
    write_fake_report(trials[0], UA=0.2, IRA=1.0, CRA=1.0, SA=0.1)
    write_fake_report(trials[1], UA=0.9, IRA=0.5, CRA=1.0, SA=None)
    write_fake_report(trials[3], UA=0.8, IRA=0.5, CRA=0.5)
    write_failure(trials[2], "NonFiniteError: the loss is nan | at step 3")
    rows = summary_rows(plan, [outcome(trial) for trial in trials])
    assert [(row["trial"], row["state"], row["front"]) for row in rows] == [
        (1, "done", True),
        (3, "done", False),
        (0, "done", True),
        (2, "failed", False),
    ]
    assert rows[0]["scores"]["H"] == pytest.approx(3 / (1 / 0.9 + 1 / 0.5 + 1)) and rows[0]["kept"] == pytest.approx(
        2 / 3
    )
    text = as_markdown(plan, rows)
    assert (
        "| 1 | 0.3 | 0.01 | 0.900 | 0.500 | 1.000 | - | 0.730 | 0.667 | yes |  |" in text
        and r"failed NonFiniteError: the loss is nan \| at" in text
    )
    write_summary(plan, [outcome(trial) for trial in trials])
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "3 of 4 trials are done" in page and "NonFiniteError" in page
    assert '<div class="scroll" tabindex="0" role="region" aria-label="trials">' in page and "<caption>Trials" in page
    assert "<th>" not in page and page.count('<th scope="row"') == 4 and "Content-Security-Policy" in page
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"] == rows
    with pytest.raises(
        ConfigError, match="1 of 4 trials failed: trial 2: NonFiniteError.*remove .*0002.failed to run it again"
    ):
        run_sweep(tmp_path / "sweep.yaml", folder=tmp_path / "out", index=2)


def test_the_metric_may_be_minimised(tmp_path):
    plan = read_sweep(
        written(tmp_path, ("{name: H, goal: maximize}", "{name: SA, goal: minimize}")), folder=tmp_path / "out"
    )
    trials = known_trials(plan)
    for trial, score in zip(trials, (0.3, 0.1, 0.2, None)):
        write_fake_report(trial, UA=0.5, IRA=None, CRA=0.5, SA=score)
    rows = summary_rows(plan, [outcome(trial) for trial in trials])
    assert (
        [row["trial"] for row in rows] == [1, 2, 0, 3]
        and {row["kept"] for row in rows} == {0.5}
        and rows[0]["scores"]["H"] == pytest.approx(0.5)
    )  # of the measured scores


def test_trials_are_checked_for_their_ranks_and_a_note_counts_for_its_own_command_only(tmp_path):
    file = written(tmp_path, ("train.steps=4", "train.steps=4, train.batch=2"))
    read_sweep(file, ranks=2).check()
    with pytest.raises(ConfigError, match=r"trial 0: .*not divisible by ranks 4"):
        run_sweep(file, folder=tmp_path / "out", ranks=4, run=False)
    plan = read_sweep(file, folder=tmp_path / "out")
    claim_sweep(plan)
    write_failure(trial_of(plan, 1), "NonFiniteError: the loss")
    assert (outcome(trial_of(plan, 1)).state, outcome(trial_of(plan, 1)).reason) == (
        "failed",
        "NonFiniteError: the loss",
    )
    other = read_sweep(file, ["train.clip=0.5"], tmp_path / "out")
    assert outcome(trial_of(other, 1)).state == "open" and not list(tmp_path.rglob("*.failed"))
    write_failure(trial_of(plan, 1), "ConfigError: for one rank")
    assert outcome(trial_of(read_sweep(file, folder=tmp_path / "out", ranks=2), 1)).state == "open"
    (tmp_path / "out" / "trials" / "0001.failed").write_text("of an earlier version\n")
    assert outcome(trial_of(plan, 1)).reason == "of an earlier version"


@pytest.mark.parametrize("name", ["../../../evil", "/evil", "..", "a/b"])
def test_a_sweeps_name_cannot_lead_out_of_its_folder(tmp_path, name):
    with pytest.raises(ConfigError, match="becomes a folder's name"):
        read_sweep(written(tmp_path, ("method: grid", f"method: grid\nname: {name}")))


# --- real runs


def scores_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "report" / "report.json").read_text())["after"]


@pytest.mark.two_ranks
@pytest.mark.exhaustive  # CI runs an array on Slurm, and stops and resumes a comparison
def test_a_grid_runs_as_an_array_resumes_after_a_kill_and_is_summarised(tmp_path):
    out = tmp_path / "out"
    file = written(tmp_path, ("train.steps=4", "train.steps=60"))
    arguments = ["sweep", str(file), "--folder", str(out)]
    assert "trial 2 (mask.keep=1.0, train.lr=0.001): UA" in sculpt(*arguments, "--index", "2")
    assert (
        sorted(path.name for path in (out / "trials").iterdir() if path.is_dir()) == ["0002"]
        and not (out / "sweep.json").exists()
    )
    before = (out / "trials/0002/report/report.json").stat().st_mtime_ns
    process = subprocess.Popen(
        [python(), "-m", "sculpt_dist", *arguments], env=rank_environment(), stdout=subprocess.DEVNULL
    )
    first = out / "trials" / "0000"
    deadline = time.monotonic() + 120
    while not list(first.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    pid = json.loads((first / ".lock").read_text())["pid"]
    process.kill()
    process.wait()
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1][:4]:
        assert time.monotonic() < deadline  # the trial saves and ends by itself: no process is left
        time.sleep(0.1)
    assert not (first / "report").exists()
    printed = sculpt(*arguments, "--jobs", "2")
    assert "trial 2" not in printed and printed.count("): UA") == 3
    assert (out / "trials/0002/report/report.json").stat().st_mtime_ns == before
    steps = [json.loads(line)["step"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert len(set(steps)) == 61 and len(steps) < 90  # resumed: only the steps after the last checkpoint ran again
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["state"] for row in rows] == ["done"] * 4 and [row["scores"]["H"] for row in rows] == sorted(
        (row["scores"]["H"] for row in rows), reverse=True
    )
    for row in rows:
        scores = scores_of(out / "trials" / f"{row['trial']:04d}")
        assert {name: row["scores"][name] for name in ("UA", "IRA", "CRA", "SA")} == {
            name: scores[name] for name in ("UA", "IRA", "CRA", "SA")
        }
        config = load_config(out / "trials" / f"{row['trial']:04d}" / "config.yaml")
        assert row["point"] == {"mask.keep": config.mask.keep, "train.lr": config.train.lr}
    assert any(row["front"] for row in rows) and (out / "sweep.html").read_text().count("data:image/png") == 2
    assert "): UA" not in sculpt(*arguments)  # nothing is left to run


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_the_others_run(tmp_path):
    out = tmp_path / "out"
    file = written(tmp_path, ("[0.3, 1.0]", "[1.0]"), ("[1.0e-3, 1.0e-2]", "[1.0e+30, 1.0e-3]"))
    printed = sculpt("sweep", str(file), "--folder", str(out), code=2)
    assert "trial 0 (mask.keep=1.0, train.lr=1e+30): NonFiniteError: the loss is not finite" in printed
    assert (
        "trial 1 (mask.keep=1.0, train.lr=0.001): UA" in printed
        and "1 of 2 trials failed: trial 0: NonFiniteError" in printed
    )
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["trial"], row["state"]) for row in rows] == [(1, "done"), (0, "failed")] and "not finite" in rows[1][
        "reason"
    ]
    printed = sculpt("sweep", str(file), "--folder", str(out), code=2)
    assert "0000.failed to run it again" in printed
    assert "): " not in printed.split("ConfigError")[0]  # reported again, not run again


@pytest.mark.exhaustive  # CI stops a comparison
def test_a_stopped_sweep_saves_its_running_trials(tmp_path):
    out = tmp_path / "out"
    command = [
        python(),
        "-m",
        "sculpt_dist",
        "sweep",
        str(written(tmp_path, ("train.steps=4", "train.steps=2000"))),
        "--folder",
        str(out),
        "--index",
        "1",
    ]
    process = subprocess.Popen(
        command, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, deadline = out / "trials/0001/metrics.jsonl", time.monotonic() + 120
    while not (lines.is_file() and lines.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)  # as Slurm does before the time limit
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "what was running is saved" in printed
    assert list((lines.parent / "checkpoints").glob("step-*")) and not (out / "trials" / "0001.failed").exists()


@pytest.mark.exhaustive
def test_two_processes_on_a_bayes_sweep_take_trials_of_their_own(tmp_path):
    pytest.importorskip("optuna")
    out = tmp_path / "out"
    file = written(tmp_path, *BAYES, ("run_cap: 30", "run_cap: 3"))
    command = [python(), "-m", "sculpt_dist", "sweep", str(file), "--folder", str(out)]
    both = [
        subprocess.Popen(command, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    ran = [set(re.findall(r"^trial (\d) \(.*\): UA", text, re.M)) for text in printed]
    assert ran[0] | ran[1] == {"0", "1", "2"} and not ran[0] & ran[1] and all(ran)
    points = [json.loads(line)["point"] for line in (out / "points.jsonl").read_text().splitlines()]
    assert len(points) == 3 == len({json.dumps(point) for point in points})
    assert "): UA" not in sculpt("sweep", str(file), "--folder", str(out))
    assert {row["state"] for row in json.loads((out / "sweep.json").read_text())["rows"]} == {"done"}

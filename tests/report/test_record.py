"""Reading a run folder: the lines of metrics.jsonl, and errors for damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from handmade_run import Page, edit_json, read_report, write_run

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.report.record import read_run
from sculpt_dist.report.report import write_report
from sculpt_dist.report.steps import read_metrics


def test_the_later_of_two_lines_of_a_step_counts_and_steps_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [(0, 1, 2.0), (1, 0, 3.0), (0, 0, 1.0), (0, 1, 4.0)]
    path.write_text("".join(json.dumps({"concept": c, "step": s, "loss": loss}) + "\n" for c, s, loss in rows))
    steps = read_metrics(path)
    found = [(line["concept"], line["step"], line["loss"]) for line in steps.lines]
    assert found == [(0, 0, 1.0), (0, 1, 4.0), (1, 0, 3.0)] and steps.is_whole


@pytest.mark.parametrize("resumed", [False, True])
def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path: Path, resumed: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"concept": 0, "step": step, "loss": 0.5}) for step in range(3)]
    path.write_text(
        "\n".join([*whole[:2], '{"concept": 0, "step": 2, "lo']) + ("" if not resumed else "\n" + whole[2] + "\n")
    )
    steps = read_metrics(path)
    assert [line["step"] for line in steps.lines] == ([0, 1, 2] if resumed else [0, 1])
    assert steps.num_unreadable == 1


def test_missing_steps_are_counted_up_to_the_last_line_or_to_the_end_of_finished_concepts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    present = [(0, 0), (0, 1), (0, 3), (2, 0), (2, 1)]  # of concepts of 4 steps

    def missing(num_finished: int, **more: int) -> int:
        path.write_text("".join(json.dumps({"concept": c, "step": s, **more}) + "\n" for c, s in present))
        return read_metrics(path).num_missing(num_finished)

    assert missing(0, steps=4) == 1 + 4 and missing(3, steps=4) == 1 + 4 + 2 and missing(4, steps=4) == 1 + 4 + 2 + 4
    assert missing(0) == missing(3) == 1, "of earlier versions' lines, only a gap between two steps is known"


def test_a_long_record_of_steps_is_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"concept": 0, "step": step}) + "\n" for step in range(1000)))
    steps = read_metrics(path, most=300)
    assert [line["step"] for line in steps.lines] == list(range(0, 1000, 4)) and steps.interval == 4


def test_errors_name_a_folder_that_is_not_a_run_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="config.yaml"):
        write_report(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "evaluation" / "after-00" / "scores.json").write_text('{"plain": {')
    with pytest.raises(RunFolderError, match="after-00/scores.json is damaged"):
        write_report(folder)
    edit = write_run(tmp_path / "other")
    (edit / "evaluation" / "before" / "images" / "cat--neon.png").write_bytes(b"\x89PNG")
    with pytest.raises(RunFolderError, match="cat--neon.png is damaged"):
        write_report(edit)


def test_scores_that_other_settings_made_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for stage, made_by in (("before", "a"), ("after-00", "a"), ("after-01", "b")):
        file = folder / "evaluation" / stage / "scores.json"
        edit_json(file, plain=json.loads(file.read_text())["plain"] | {"made_by": made_by})
    run = read_run(folder)
    assert run.stages["before"] == run.stages["after-00"] == {}
    page = Page(write_report(folder))
    assert "The scores of before, after-00 were made with other settings of evaluate" in page.words
    report = read_report(folder)
    assert report["before"]["UA"] is None and report["after"]["UA"] is not None

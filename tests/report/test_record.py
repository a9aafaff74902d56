"""Reading a run folder: the lines of metrics.jsonl, and errors for damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from handmade_run import Page, edit_json, read_report, write_run

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.report.record import read_metrics, read_run
from sculpt_dist.report.report import write_report


def test_the_later_of_two_lines_of_a_step_counts_and_steps_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [(0, 1, 2.0), (1, 0, 3.0), (0, 0, 1.0), (0, 1, 4.0)]
    path.write_text("".join(json.dumps({"concept": c, "step": s, "loss": loss}) + "\n" for c, s, loss in rows))
    lines, num_unreadable = read_metrics(path)
    assert [(line["concept"], line["step"], line["loss"]) for line in lines] == [(0, 0, 1.0), (0, 1, 4.0), (1, 0, 3.0)]
    assert num_unreadable == 0


@pytest.mark.parametrize("resumed", [False, True])
def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path: Path, resumed: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"concept": 0, "step": step, "loss": 0.5}) for step in range(3)]
    path.write_text(
        "\n".join([*whole[:2], '{"concept": 0, "step": 2, "lo']) + ("" if not resumed else "\n" + whole[2] + "\n")
    )
    lines, num_unreadable = read_metrics(path)
    assert [line["step"] for line in lines] == ([0, 1, 2] if resumed else [0, 1])
    assert num_unreadable == 1


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
    assert run.outdated == ["before", "after-00"] and run.stages["before"] == run.stages["after-00"] == {}
    page = Page(write_report(folder))
    assert "The scores of before, after-00 were made with other settings of evaluate" in page.words
    report = read_report(folder)
    assert report["before"]["UA"] is None and report["after"]["UA"] is not None

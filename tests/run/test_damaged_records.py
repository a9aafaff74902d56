"""Damaged json files of a run folder, and a disk that refuses: one line that names the file and the cure."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
from harness import TINIEST, sculpt
from runs import passes

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import read_object, write_atomically
from sculpt_dist.report.record import read_run
from sculpt_dist.report.report import write_report

CONTENTS = {"cut": b'{"ranks": 1, "of_', "empty": b"", "list": b"[1, 2]", "lacking": b"{}", "deep": b"[" * 100_000}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("costs.json", "cut"),
        ("costs.json", "folder"),
        ("manifest.json", "list"),
        ("manifest.json", "folder"),
        ("evaluation/after-00/scores.json", "empty"),
        ("evaluation/after-00/scores.json", "lacking"),
        ("evaluation/before/scores.json", "deep"),
    ],
)
def test_a_damaged_record_is_named_with_its_cure_and_the_cure_works(
    finished_run, canvas_config, tmp_path, name, damage
):
    run, file = tmp_path / "run", tmp_path / "run" / name
    shutil.copytree(finished_run, run)
    file.unlink()
    file.mkdir() if damage == "folder" else file.write_bytes(CONTENTS[damage])
    given = ["unlearn", canvas_config, *TINIEST, f"run.folder={run}"]
    printed = sculpt(*given, code=2)
    assert f"RunFolderError: {file} is damaged (" in printed and "remove " in printed and "Traceback" not in printed
    file.rmdir() if damage == "folder" else file.unlink()
    sculpt(*given)
    if "before" not in name:  # which is not scored again
        assert passes(run) == passes(finished_run) and min(passes(run).values()) > 0, "passes do not rest on costs.json"


def test_scores_of_other_settings_are_made_anew_or_left_out(finished_run, canvas_config, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    given = ["unlearn", canvas_config, *TINIEST, "evaluate.images=3", "--override", f"run.folder={tmp_path / 'run'}"]
    sculpt(*given)
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["before"]["UA"] is None and report["after"]["images"] == {"target": 3, "other": 3}
    assert "The scores of before were made with other settings" in (tmp_path / "run/report/report.html").read_text()


def test_a_changed_digit_is_refused_and_a_missing_or_changed_step_is_said(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    steps = (run / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2
    for kept, note in (
        ([steps[0]], "metrics.jsonl lacks 1 step of the run."),
        (
            [steps[0], changed_digit(steps[1])],
            "1 line of metrics.jsonl changed after the run",
        ),
        ([], "metrics.jsonl holds no step of the run."),
    ):
        (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
        notes = json.loads(write_report(run).with_name("report.json").read_text())["notes"]
        assert any(note in one for one in notes) and note in (run / "report" / "report.html").read_text()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.002"))
    assert "config.yaml was changed after the run wrote it." in read_run(run).notes
    for name in ("evaluation/after-00/scores.json", "costs.json", "manifest.json"):
        whole = (run / name).read_text()
        (run / name).write_text(changed_digit(whole))
        printed = sculpt("report", str(run), code=2)
        assert f"RunFolderError: {run / name} is damaged (its values differ from its checksum): remove " in printed
        (run / name).write_text(whole)
    image = run / "evaluation" / "after-00" / "images" / "bird--neon.png"
    shutil.copy(run / "evaluation" / "before" / "images" / "boat--neon.png", image)
    with pytest.raises(RunFolderError, match=r"bird--neon\.png is damaged \(it differs from its checksum\)"):
        write_report(run)


def changed_digit(text: str) -> str:
    """The text with another first digit after a point: the last ones of a long number may not change its value."""
    place = re.search(r"\d\.\d", text)
    assert place is not None
    at = place.end() - 1
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]


@pytest.mark.parametrize("damage", CONTENTS)
def test_an_object_is_read_or_the_file_named(tmp_path, damage):
    (tmp_path / "a.json").write_bytes(CONTENTS[damage])
    with pytest.raises(RunFolderError, match=r"a\.json is damaged \(.*\): try this"):
        read_object(tmp_path / "a.json", "try this", ("ranks",))


def test_a_full_disk_is_told_with_the_place_and_leaves_the_earlier_content(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", b"before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.json: cannot be written: No space left on device \(.* GB free\)") as error:
        write_atomically(tmp_path / "a.json", b"after")
    assert isinstance(error.value, RunFolderError)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"before"}

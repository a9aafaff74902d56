"""Damaged json files of a run folder, and a disk that refuses: one line that names the file and the cure."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from harness import SMALL, sculpt

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import read_object, write_atomically

TINY = [*SMALL, "train.steps=1", "mask.collect=1", "prepare.samples=2", "train.batch=2", "evaluate.objects=[bird,boat]"]
TINY += ["evaluate.paraphrase_images=0", "evaluate.styles=[neon]", "concepts=[{target: bird, superclass: animal}]"]
CONTENTS = {"cut": b'{"ranks": 1, "of_', "empty": b"", "list": b"[1, 2]", "lacking": b"{}", "deep": b"[" * 100_000}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, canvas_config) -> Path:
    folder = tmp_path_factory.mktemp("records") / "run"
    sculpt("unlearn", canvas_config, *TINY, f"run.folder={folder}")
    return folder


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
def test_a_damaged_record_is_named_with_its_cure_and_the_cure_works(finished, canvas_config, tmp_path, name, damage):
    run, file = tmp_path / "run", tmp_path / "run" / name
    shutil.copytree(finished, run)
    file.unlink()
    file.mkdir() if damage == "folder" else file.write_bytes(CONTENTS[damage])
    given = ["unlearn", canvas_config, *TINY, f"run.folder={run}"]
    printed = sculpt(*given, code=2)
    assert f"RunFolderError: {file} is damaged (" in printed and "remove " in printed and "Traceback" not in printed
    file.rmdir() if damage == "folder" else file.unlink()
    sculpt(*given)


def test_scores_of_other_settings_are_made_anew_or_left_out(finished, canvas_config, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    given = ["unlearn", canvas_config, *TINY, "evaluate.images=3", "--override", f"run.folder={tmp_path / 'run'}"]
    sculpt(*given)
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["before"]["UA"] is None and report["after"]["images"] == {"target": 3, "other": 3}
    assert "The scores of before were made with other settings" in (tmp_path / "run/report/report.html").read_text()


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

"""Runs share samples and scores of the base model: the first draws them, the others take the same."""

from __future__ import annotations

import json
import os
import shutil
import threading

import pytest
import torch
from harness import SMALL, sculpt, weights

from sculpt_dist.core.errors import StopRequested
from sculpt_dist.core.locks import Lock
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.run.store import LIST, Store


@pytest.fixture
def store(tmp_path):
    group = Group(60)
    return Store(tmp_path / "shared", group, StopRequest(group, tmp_path))


@pytest.fixture
def made(tmp_path):
    (tmp_path / "made" / "images").mkdir(parents=True)
    (tmp_path / "made" / "scores.json").write_text("{}")
    (tmp_path / "made" / "images" / ".note").write_text("x")
    return tmp_path / "made"


def test_what_one_run_keeps_another_takes(store, made, tmp_path):
    assert not store.take("scores", ["a", 1], tmp_path / "b")
    store.keep("scores", ["a", 1], made)
    assert not store.take("scores", ["a", 2], tmp_path / "b") and not (tmp_path / "b").exists()
    assert store.take("scores", ["a", 1], tmp_path / "b")
    assert (tmp_path / "b" / "images" / ".note").read_text() == "x"
    assert os.path.samefile(tmp_path / "b" / "scores.json", made / "scores.json")  # a link, not a copy


@pytest.mark.parametrize("damage", ["flip", "missing", "list", "outside"])
def test_a_damaged_entry_is_not_taken_and_made_anew(store, made, tmp_path, damage):
    store.keep("scores", "key", made)
    (entry,) = (path for path in (tmp_path / "shared").iterdir() if path.is_dir())
    if damage == "flip":
        (entry / "scores.json").unlink()  # the link of the run stays as it is
        (entry / "scores.json").write_text("[]")
    elif damage == "missing":
        (entry / "scores.json").unlink()
    elif damage == "list":
        (entry / LIST).write_text("{")
    else:
        content = json.loads((entry / LIST).read_text())
        sha256 = content["files"].pop("scores.json")
        shutil.copy(made / "scores.json", tmp_path / "outside.json")
        (entry / LIST).write_text(json.dumps(content | {"files": {"../../outside.json": sha256}}))
    assert not store.take("scores", "key", tmp_path / "run" / "b") and not (tmp_path / "run").exists()
    store.keep("scores", "key", made)
    assert store.take("scores", "key", tmp_path / "run" / "b")


def test_another_run_waits_for_the_holder_and_can_be_stopped_meanwhile(store, tmp_path):
    (tmp_path / "shared").mkdir()
    other = Lock(store._entry("drawing", 1).with_suffix(".lock"))
    assert other.acquire() is None
    threading.Timer(0.5, other.release).start()
    with store.held("drawing", 1):
        assert Lock(other.file).acquire() is not None
    assert other.acquire() is None
    store.stop.requested = True
    with pytest.raises(StopRequested, match="another run holds"), store.held("drawing", 1):
        pass
    other.release()


def test_a_second_run_draws_nothing_and_ends_as_it_would_alone(canvas_config, tmp_path):
    small = [*SMALL, "model.arch=sana", "train.steps=3", "evaluate.objects=[car]", "evaluate.styles=[neon]"]
    shared = f"prepare.folder={tmp_path / 'shared'}"
    for name, more in (("alone", []), ("first", [shared]), ("second", [shared])):
        sculpt("unlearn", canvas_config, *small, *more, f"run.folder={tmp_path / name}")
    runs = {name: weights(tmp_path / name) for name in ("alone", "first", "second")}
    assert all(torch.equal(tensor, runs["second"][name]) for name, tensor in runs["alone"].items())
    costs = {name: json.loads((tmp_path / name / "costs.json").read_text()) for name in runs}
    assert costs["alone"]["passes"] == costs["first"]["passes"] == costs["second"]["passes"]
    assert costs["second"]["seconds"]["prepare"] < costs["first"]["seconds"]["prepare"] / 2
    scores = {name: (tmp_path / name / "evaluation" / "before" / "scores.json").read_bytes() for name in runs}
    assert scores["alone"] == scores["first"] == scores["second"]
    for part in ("data/object-bird/target/00000.tar", "evaluation/before/scores.json"):
        assert os.path.samefile(tmp_path / "first" / part, tmp_path / "second" / part)

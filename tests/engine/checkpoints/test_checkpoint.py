"""Checkpoints survive a kill at any file event, damage and a full disk: what is read is what was written."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.engine.checkpoints import restore as checkpoint
from sculpt_dist.engine.checkpoints.save import KEPT, Saver
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.sharding import Fragment, Shard

KINDS = ("flat", "saliency", "opened", "moments.momentum", "moments.variance")
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "os.truncate")


@pytest.fixture(scope="module")
def group() -> Group:
    return Group(60)


def shard_of(step: int) -> Shard:
    """A shard whose content identifies its step."""
    shard = Shard(torch.nn.Parameter(torch.zeros(300)), [Fragment("a", 0, 0, 0, 200), Fragment("b", 1, 0, 200, 100)])
    for i, kind in enumerate(KINDS):
        attrgetter(kind)(shard).copy_(torch.arange(300) % 7 + step + i)
    return shard


def save(folder: Path, group: Group, step: int) -> None:
    with Saver(folder, group) as saver:
        saver.save((0, step), [shard_of(step)], {}, {"step": step})


def loaded(folder: Path, group: Group) -> int:
    """The step of the newest checkpoint, after checking all of its content."""
    path, state = checkpoint.newest(folder, group)
    shard = shard_of(0)
    checkpoint.load(path, [shard], [])
    for kind in KINDS:
        assert torch.equal(attrgetter(kind)(shard), attrgetter(kind)(shard_of(state["step"]))), kind
    return state["step"]


def test_the_newest_checkpoint_is_kept_and_found_beyond_a_thousand_concepts(group, tmp_path):
    with Saver(tmp_path, group, background=False) as saver:
        for concept in range(990, 1200):
            saver.save((concept, 10_000_000 if concept == 999 else 0), [shard_of(concept)], {}, {"step": concept})
            assert loaded(tmp_path, group) == concept
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-1198-000000", "step-1199-000000"}
    (tmp_path / "step-999-000000").mkdir()  # sorts after them as text
    assert loaded(tmp_path, group) == 1199
    checkpoint.set_aside_later(tmp_path / "step-1198-000000")
    assert (tmp_path / "step-999-000000").is_dir() and not (tmp_path / "step-1199-000000").exists()


def killed_at(folder: Path, group: Group, event: int) -> bool:
    """Save step 3 in a child process that dies at this file event; returns whether it died."""
    child = os.fork()
    if child == 0:
        seen = [0]

        def count(name: str, arguments: tuple) -> None:
            writes = (
                name == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if (name in EVENTS or writes) and str(folder) in str(arguments[0]):
                if seen[0] == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1

        sys.addaudithook(count)
        save(folder, group, 3)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_after_a_kill_at_any_file_event_the_newest_checkpoint_is_intact_and_the_next_save_works(group, tmp_path):
    found, event = [], 0
    while True:
        folder = tmp_path / str(event)
        save(folder, group, 1)
        save(folder, group, 2)
        died = killed_at(folder, group, event)
        found.append(loaded(folder, group))
        save(folder, group, 4)
        assert loaded(folder, group) == 4 and not list(folder.glob(".writing-*"))
        if not died:
            break
        event += 1
    assert event >= 10 and found[-1] == 3 and set(found) == {2, 3}, found
    assert found == sorted(found), "an earlier kill got further than a later one"


def damaged(path: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint at random; returns a description."""
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "cut", "empty", "zero", "append", "delete", "swap", "link"])
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[:at]
    elif kind == "empty":
        content = bytearray()
    elif kind == "zero":
        length = min(64, len(content) - at)
        if not any(content[at : at + length]):
            content[at] = 1
        else:
            content[at : at + length] = bytes(length)
    elif kind == "append":
        content += b"x"
    elif kind == "swap":
        content = bytearray((path.with_name("step-000-000001") / file.name).read_bytes())
    if kind == "link":
        elsewhere = path.parent.with_name(f"{file.name}-elsewhere")
        shutil.copy(file, elsewhere)
        file.unlink()
        file.symlink_to(elsewhere)
    elif kind == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{kind} {file.name} at {at}"


def test_all_of_200_randomly_damaged_checkpoints_are_skipped_for_the_previous_one(group, tmp_path):
    whole, rng, kinds = tmp_path / "whole", random.Random(0), set()
    save(whole, group, 1)
    save(whole, group, 2)
    assert loaded(whole, group) == 2
    for number in range(200):
        folder = tmp_path / f"damaged-{number}" / "checkpoints"
        shutil.copytree(whole, folder)
        how = damaged(folder / "step-000-000002", rng)
        kinds.add(how.split()[0])
        assert loaded(folder, group) == 1, how
        shutil.rmtree(folder.parent)
    assert len(kinds) == 8


def test_damaged_checkpoints_do_not_count_among_the_kept_ones(group, tmp_path):
    save(tmp_path, group, 1)
    save(tmp_path, group, 2)
    (tmp_path / "step-000-000002" / "rank-0.safetensors").write_bytes(b"")
    path, _ = checkpoint.newest(tmp_path, group)
    checkpoint.set_aside_later(path)
    save(tmp_path, group, 3)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000-000001", "step-000-000003"] and KEPT == 2


def test_training_may_change_its_state_while_a_checkpoint_is_written(group, tmp_path):
    shard = shard_of(5)
    with Saver(tmp_path, group) as saver:
        saver.save((0, 5), [shard], {}, {"step": 5})
        for kind in KINDS:
            attrgetter(kind)(shard).zero_()
    assert loaded(tmp_path, group) == 5


def test_a_full_disk_is_reported_with_the_folder_and_keeps_the_previous_checkpoint(group, tmp_path):
    save(tmp_path, group, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(RunFolderError, match=f"{tmp_path}: a checkpoint could not be written: .*GB free.*are kept"):
            save(tmp_path, group, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert loaded(tmp_path, group) == 1 and not list(tmp_path.glob(".writing-*"))


def test_deleted_checkpoints_are_an_error_not_a_fresh_start(group, tmp_path):
    assert checkpoint.newest(tmp_path, group) is None
    save(tmp_path, group, 1)
    shutil.rmtree(tmp_path / "step-000-000001")
    with pytest.raises(RunFolderError, match="those that were written are gone.*--fresh"):
        checkpoint.newest(tmp_path, group)


@pytest.mark.parametrize("hint", ["", "garbage", "../elsewhere", None])
def test_the_newest_checkpoint_is_found_without_a_valid_hint(group, tmp_path, hint):
    save(tmp_path, group, 1)
    (tmp_path / "latest").unlink() if hint is None else (tmp_path / "latest").write_text(hint)
    assert loaded(tmp_path, group) == 1


def test_a_checkpoint_with_a_newer_schema_is_refused_with_both_numbers(group, tmp_path):
    import hashlib

    save(tmp_path, group, 1)
    file = tmp_path / "step-000-000001" / "manifest.json"
    body = json.loads(file.read_text())["body"].replace(f'"schema": {checkpoint.SCHEMA}', '"schema": 99')
    file.write_text(json.dumps({"seal": hashlib.sha256(body.encode()).hexdigest(), "body": body}))
    with pytest.raises(RunFolderError, match=f"schema 99, this version reads {checkpoint.SCHEMA}"):
        checkpoint.newest(tmp_path, group)

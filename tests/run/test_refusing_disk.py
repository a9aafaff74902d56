"""A disk that is full, read-only or of another user: one line with the place, and nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import PROJECT, SMALL, launch

from sculpt_dist.config.load import load_config, to_yaml
from sculpt_dist.config.schema import TrackConfig
from sculpt_dist.core.errors import RunFolderError, WriteError
from sculpt_dist.core.files import append_line, make_folder, write_atomically, written_aside
from sculpt_dist.core.tensorfile import Entry, write_tensors
from sculpt_dist.data.shards import Sample, write_shard
from sculpt_dist.evaluation.drawn_images import save_image
from sculpt_dist.run.folder import claim_folder, release_folder
from sculpt_dist.track.sinks.jsonl import Sink

ALONE = SimpleNamespace(is_first=True, on_first=lambda work: work())
NOBODY = 65534


@contextmanager
def full_after(size: int):
    """No file may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_folder(path: Path) -> None:
    with written_aside(path) as aside:
        aside.mkdir()
        (aside / "part").write_bytes(bytes(9000))


def write_metrics(path: Path) -> None:
    sink = Sink(TrackConfig(), {}, path.parent, 0)
    for step in range(1000):
        sink.log({"step": step})


def write_picture(path: Path) -> None:
    path.parent.mkdir()
    pixels = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    save_image(path, pixels, {"prompt": "a cat"})


WRITERS = {
    "config.yaml": lambda path: write_atomically(path, bytes(9000)),
    "log.txt": lambda path: [append_line(path, "x" * 500) for _ in range(20)],
    "unet.safetensors": lambda path: write_tensors(
        path, [Entry("a", torch.float32, (5000,))], [("a", torch.zeros(5000))]
    ),
    "small.safetensors": lambda path: write_tensors(  # fails when what is buffered is written
        path, [Entry("a", torch.float32, (1100,))], [("a", torch.zeros(1100))]
    ),
    "00000.tar": lambda path: write_shard(path.parent, path.name, [Sample(torch.zeros(4, 32, 32), "a cat", 0)]),
    "model": write_folder,
    "metrics.jsonl": write_metrics,
    "images/cat.png": write_picture,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_writer_tells_of_a_full_disk_with_the_place_and_the_free_room_and_leaves_no_debris(tmp_path, name, capsys):
    (tmp_path / "earlier").write_text("kept")
    with (
        full_after(4200),
        pytest.raises(WriteError, match=r"cannot be written: File too large \(\d.* GB free\)") as told,
    ):
        WRITERS[name](tmp_path / name)
    assert str(told.value).startswith(str(tmp_path / name))
    assert not list(tmp_path.rglob(".*")) and (tmp_path / "earlier").read_text() == "kept"
    if name not in ("log.txt", "metrics.jsonl"):
        assert not (tmp_path / name).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_files_of_another_user_are_told_in_a_line(canvas_config):
    folder = Path(tempfile.mkdtemp())
    run = folder / "run"
    (run / "data").mkdir(parents=True)
    (run / ".lock").touch()
    folder.chmod(0o755)
    run.chmod(0o777)
    config = load_config(Path(canvas_config), [f"run.folder={run}"])
    os.seteuid(NOBODY)
    try:
        with pytest.raises(RunFolderError, match="cannot be used .*Permission denied: .*/run/.lock.*choose another"):
            claim_folder(config, ALONE)
        with pytest.raises(WriteError, match="run/data/object-cat: cannot be written: Permission denied"):
            make_folder(run / "data" / "object-cat")
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_what_killed_writers_left_is_removed_when_the_next_run_starts(canvas_config, tmp_path):
    dead = 2**22 + 1  # beyond any process id
    left = [tmp_path / name for name in ("", "checkpoints", "data/object-cat/target", "evaluation/before", "report")]
    left = [place / f".x.json.{dead}.tmp" for place in left] + [tmp_path / f".y.{os.getpid()}.tmp"]
    kept = [
        tmp_path / ".x.json.1.tmp",
        tmp_path / ".hidden",
        tmp_path / ".cache.tmp",
    ]  # the first is of a living process
    for file in (*left, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    (tmp_path / f".model.{dead}.tmp" / "unet").mkdir(parents=True)
    config = load_config(Path(canvas_config), [f"run.folder={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    claim_folder(config, ALONE)
    release_folder(tmp_path)
    assert not [file for file in left if file.exists()] and all(file.exists() for file in kept)
    assert not (tmp_path / f".model.{dead}.tmp").exists()


@pytest.mark.slow
def test_a_run_tells_of_every_place_that_the_disk_refuses_and_goes_on_when_it_has_room(canvas_config, tmp_path):
    worker, short = str(PROJECT / "tests" / "workers" / "refusing_disk.py"), ["train.steps=3", "mask.collect=1"]
    one = [*short, "evaluate.paraphrases=[]", "concepts=[{target: bird, superclass: animal}]"]
    printed = launch(1, worker, canvas_config, *SMALL, *one, f"run.folder={tmp_path / 'run'}").splitlines()
    told = [line for line in printed if ": WriteError: " in line or ": RunFolderError: " in line]
    assert len(told) == 20 and "nothing: finished" in printed
    for line in told:
        place, _, message = line.partition(": ")
        assert ("run/model:" if place == "CHECKSUMS" else place.strip("/")) in message
        assert "cannot be written: " in message or "cannot be used (" in message, line
    assert "run-2/checkpoints: cannot be written: No such file or directory" in told[-1]

"""Prompts, shards and streams: exact, independent of the number of ranks and workers, and safe to read."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import torch
from stream_folders import make_stream

from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import ShardError
from sculpt_dist.core.files import file_sha256
from sculpt_dist.core.types import TextCond
from sculpt_dist.data import shards
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts, fill
from sculpt_dist.data.shards import ShardReader, read_index, scan_shard, write_index
from sculpt_dist.data.sources import LateSources, PromptReader
from sculpt_dist.data.streams import ConceptStreams, Draws, GlobalOrder, Layout, load, micro_batches


def test_text_in_brackets_is_dropped_without_a_style():
    assert (
        fill("a photo of a {object}[ in {style} style]", object="cat", style="neon") == "a photo of a cat in neon style"
    )
    assert fill("a photo of a {object}[ in {style} style]", object="cat", style=None) == "a photo of a cat"
    assert fill("a [{style} ]picture", style=None) == "a picture"


def test_a_concept_has_prompts_of_its_kind_with_and_without_its_name():
    cat = concept_prompts(Concept("cat", "animal", keep=["dog"]), PrepareConfig())
    assert (cat.target, cat.superclass, cat.negative, cat.keep) == (
        ("a photo of cat",),
        ("a photo of animal",),
        "a photo of cat",
        ("a photo of dog",),
    )
    neon = concept_prompts(Concept("neon", kind="style", prompts=["a bird[ in {concept} style]"]), PrepareConfig())
    assert (neon.target, neon.superclass) == (("a bird in neon style",), ("a bird",))


def test_written_samples_are_read_back_by_position(tmp_path):
    reader = ShardReader(make_stream(tmp_path / "s", 10))
    assert len(reader) == 10
    assert [int(reader[i].latent[0, 0, 0]) for i in (9, 0, 5)] == [9, 0, 5]
    assert reader[5].prompt == "prompt 2" and reader[5].key == 5
    recipe, records = read_index(tmp_path / "s")
    assert recipe == {"count": 10} and [r.count for r in records] == [4, 4, 2]


def test_sixty_concepts_of_many_shards_are_streamed_with_few_open_files(tmp_path):
    """A hundred shards more than a process may have open files, each of them read in every concept that distils it."""
    folders = [make_stream(tmp_path / str(number), 6, size=1) for number in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        for number in (1, 30, 59):
            earlier = [ShardReader(folder) for folder in folders[:number]]
            readers = {"target": [ShardReader(folders[number])], "anchor": earlier}
            streams = ConceptStreams(readers, Layout(4, 1, 0, 1), 0, number)
            drawn = {sample.key for item in range(number * 6 // 4 + 1) for sample in streams[item]["anchor"]}
            assert drawn == set(range(6))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_was_drawn_again_is_read_anew(tmp_path):
    folder = make_stream(tmp_path / "s", 4)
    assert float(ShardReader(folder)[0].latent[0, 0, 0]) == 0
    shutil.rmtree(folder)
    make_stream(folder, 4, offset=7)
    assert float(ShardReader(folder)[0].latent[0, 0, 0]) == 7


def test_webdataset_reads_our_shards(tmp_path):
    import webdataset

    make_stream(tmp_path / "s", 4)
    rows = list(webdataset.WebDataset(str(tmp_path / "s" / "00000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == [f"{i:08d}" for i in range(4)]
    assert np.load(io.BytesIO(rows[2]["latent.npy"]))[0, 0, 0] == 2


def damages(path):
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[700] ^= 1
    return {
        "cut in a header": content[:300],
        "cut at a member": content[:1024],
        "cut in data": content[:600],
        "bit flip": bytes(flipped),
        "hole": content[:512] + bytes(512) + content[1024:],
        "empty": b"",
        "another file": b"<html>" * 1000,
    }


@pytest.mark.parametrize(
    "kind", ["cut in a header", "cut at a member", "cut in data", "bit flip", "hole", "empty", "another file"]
)
def test_every_damage_of_a_shard_is_detected_and_the_error_names_the_shard(tmp_path, kind):
    shard = make_stream(tmp_path / "s", 10) / "00004.tar"
    shard.write_bytes(damages(shard)[kind])
    with pytest.raises(ShardError, match="00004.tar.*prepare"):
        ShardReader(tmp_path / "s")


def test_a_process_hashes_a_shard_once_and_again_when_it_was_changed(tmp_path, monkeypatch):
    folder = make_stream(tmp_path / "s", 10)
    hashed = []
    monkeypatch.setattr(shards, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    for _ in range(3):
        ShardReader(folder)
    assert hashed == ["00000.tar", "00004.tar", "00008.tar"]
    changed = folder / "00004.tar"
    content = bytearray(changed.read_bytes())
    content[600] ^= 1
    changed.write_bytes(content)
    with pytest.raises(ShardError, match="00004.tar does not match its checksum"):
        ShardReader(folder)


def test_errors_name_a_missing_shard_and_a_broken_index(tmp_path):
    folder = make_stream(tmp_path / "s", 10)
    (folder / "00008.tar").unlink()
    with pytest.raises(ShardError, match="00008.tar is missing"):
        ShardReader(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ShardError, match="index.json"):
        ShardReader(folder)


@pytest.mark.parametrize(
    "name", ["00000000.pyd", "00000000.latent.pkl", "../00000000.json", "00000000.latent.npy.gz", "x.json"]
)
def test_foreign_files_in_a_shard_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ShardError, match="contains only"):
        scan_shard(tmp_path / "bad.tar", "bad.tar", 0)


def test_links_and_incomplete_samples_are_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("00000000.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ShardError, match="contains only"):
        scan_shard(tmp_path / "link.tar", "link.tar", 0)
    with tarfile.open(tmp_path / "half.tar", "w") as tar:
        info = tarfile.TarInfo("00000000.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(ShardError, match="lacks.*latent.npy"):
        scan_shard(tmp_path / "half.tar", "half.tar", 0)


class Marker:
    def __reduce__(self):
        return (print, ("executed",))


def write_raw(folder, latent: bytes):
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in (
            ("00000000.latent.npy", latent),
            ("00000000.json", json.dumps({"key": 0, "prompt": "p"}).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_index(folder, {}, [scan_shard(folder / "00000.tar", "00000.tar", 0)])
    return ShardReader(folder)


def npy(array, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_a_pickle_in_an_array_is_not_executed(tmp_path, capsys):
    reader = write_raw(tmp_path / "s", npy(np.array([Marker()], dtype=object), allow_pickle=True))
    with pytest.raises(ShardError, match="damaged"):
        reader[0]
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "array", [np.full((1, 2, 2), np.nan, np.float32), np.zeros((1, 2, 2), np.float64), np.zeros((2, 2), np.float32)]
)
def test_latents_that_are_not_finite_float32_maps_are_refused(tmp_path, array):
    with pytest.raises(ShardError, match="sample 0"):
        write_raw(tmp_path / "s", npy(array))[0]


def test_an_epoch_shows_every_sample_once_and_epochs_differ():
    order = GlobalOrder(7, [0, 1])
    first, second = [order[i] for i in range(7)], [order[i] for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert [GlobalOrder(7, [0, 1])[i] for i in range(14)] == first + second


def keys(tmp_path, ranks: int, accumulate: int, workers: int, first_step: int = 0, steps: int = 6):
    """The target and anchor keys of each step, in global order."""
    readers = {
        "target": [ShardReader(tmp_path / "t")],
        "superclass": [ShardReader(tmp_path / "s")],
        "anchor": [ShardReader(tmp_path / "t"), ShardReader(tmp_path / "s")],
    }
    per_step: dict[int, list] = {}
    for rank in range(ranks):
        layout = Layout(8, ranks, rank, accumulate)
        streams = ConceptStreams(readers, layout, 3, 1)

        def embed(prompts):
            return TextCond(torch.zeros(len(prompts), 1, 1))

        prompts = tuple(f"prompt {i}" for i in range(3))
        names = ConceptPrompts(prompts, prompts, "", ())
        batches = micro_batches(streams, embed, names, torch.device("cpu"), first_step, steps, workers)
        for number, batch in enumerate(batches):
            step, micro = divmod(number, accumulate)
            for i, position in enumerate(layout.positions(micro)):
                entry = (
                    position,
                    batch.target.keys[i],
                    batch.superclass.keys[i],
                    float(batch.anchor.latents[i].mean()),
                )
                per_step.setdefault(first_step + step, []).append(entry)
    return {step: sorted(entries) for step, entries in per_step.items()}


def test_samples_do_not_depend_on_ranks_accumulation_workers_or_the_first_step(tmp_path):
    make_stream(tmp_path / "t", 10)
    make_stream(tmp_path / "s", 9, offset=100)
    reference = keys(tmp_path, 1, 1, 0)
    assert all(len(entries) == 8 for entries in reference.values()) and len(reference) == 6
    for ranks, accumulate, workers in ((2, 1, 0), (4, 2, 0), (1, 4, 0), (2, 2, 2)):
        assert keys(tmp_path, ranks, accumulate, workers) == reference
    later = keys(tmp_path, 2, 1, 0, first_step=4)
    assert later == {step: reference[step] for step in (4, 5)}


def test_workers_ignore_the_stop_signals_that_a_launcher_sends_to_the_process_group(tmp_path):
    make_stream(tmp_path / "t", 10)
    streams = ConceptStreams({"target": [ShardReader(tmp_path / "t")]}, Layout(2, 1, 0, 1), 0, 0)
    items = iter(load(streams, range(20), 1))
    found = [[sample.key for sample in next(items)["target"]]]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    time.sleep(0.2)  # long enough for a signal to end the worker
    found += [[sample.key for sample in item["target"]] for item in items]
    assert found == [[sample.key for sample in streams[i]["target"]] for i in range(20)]
    worker.join(10)
    assert worker.exitcode == 0


def test_anchor_stream_is_split_evenly_between_its_sources(tmp_path):
    make_stream(tmp_path / "t", 10)
    make_stream(tmp_path / "s", 9, offset=100)
    for entries in keys(tmp_path, 1, 1, 0).values():
        assert sum(entry[3] >= 100 for entry in entries) == 4


@pytest.mark.parametrize("share", [None, 0.25, 0.5])
@pytest.mark.parametrize("earlier", [1, 3, 100])
def test_over_an_epoch_every_earlier_target_is_an_anchor_equally_often(earlier, share):
    samples, batch = 6, 4
    readers = [PromptReader([f"target {i}"], samples, None) for i in range(earlier)]
    readers.append(PromptReader(["superclass"], samples, None))
    fixed = {} if share is None else {"anchor": (earlier, share)}
    share = 1 / (earlier + 1) if share is None else share
    steps = round(samples * earlier / (1 - share)) // batch
    seen: Counter[tuple[str, int]] = Counter()
    for rank in range(2):
        streams = ConceptStreams({"anchor": readers}, Layout(batch, 2, rank, 1), 3, 1, fixed=fixed)
        seen.update((sample.prompt, sample.key) for step in range(steps) for sample in streams[step]["anchor"])
    superclass = sum(count for (prompt, _), count in seen.items() if prompt == "superclass")
    assert abs(superclass - share * batch * steps) < 1
    targets = Counter(count for (prompt, _), count in seen.items() if prompt != "superclass")
    left_over = samples * earlier - (batch * steps - superclass)  # an epoch need not end with a batch
    assert targets == Counter({1: samples * earlier - left_over}) and 0 <= left_over < batch


def test_draws_depend_on_the_place_in_the_global_batch_not_on_the_rank():
    whole = Draws(0, 1, 2, range(8), torch.device("cpu"))
    half = Draws(0, 1, 2, range(4, 8), torch.device("cpu"))
    assert torch.equal(whole.normal("noise", (1, 2, 2))[4:], half.normal("noise", (1, 2, 2)))
    assert torch.equal(whole.uniform("time")[4:], half.uniform("time"))
    assert not torch.equal(whole.normal("noise", (1, 2, 2)), whole.normal("other", (1, 2, 2)))
    assert not torch.equal(whole.uniform("time"), Draws(0, 1, 3, range(8), torch.device("cpu")).uniform("time"))


def test_of_many_sources_only_those_with_a_turn_are_opened_and_the_samples_are_the_same():
    opened = []

    def source(number: int) -> PromptReader:
        opened.append(number)
        return PromptReader([f"thing {number}, sample {i}" for i in range(9)], 9, None)

    def prompts(sources: list[PromptReader] | LateSources) -> list[str]:
        streams = ConceptStreams({"anchor": sources}, Layout(4, 1, 0, 1), 3, 1)
        return [sample.prompt for item in range(2) for sample in streams[item]["anchor"]]

    found = prompts(LateSources(1000, source))
    assert opened == list(range(8)) and found == prompts([source(number) for number in range(1000)])

"""Files: atomic writes, logs, checksums and seeds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sculpt_dist.core.files import (
    append_line,
    by_number,
    derived_seed,
    file_part,
    file_sha256,
    text_sha256,
    write_atomically,
)


def test_an_atomic_write_replaces_the_file_and_leaves_no_temporary_one(tmp_path):
    write_atomically(tmp_path / "a.json", b"old")
    write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path, monkeypatch):
    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    write_atomically(tmp_path / "a.json", b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_a_log_entry_is_one_line_after_those_before(tmp_path):
    append_line(tmp_path / "log.txt", "first")
    append_line(tmp_path / "log.txt", "second\nof two lines")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith(" first") and second.endswith(" second of two lines")


def test_a_file_has_the_checksum_of_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "a.txt") == text_sha256("abc") == expected


def test_seeds_are_the_same_on_every_machine():
    assert derived_seed(0, "prepare", "object cat target", 7) == 6091311548437331219


def test_seeds_fit_into_63_bits_and_differ_by_key():
    seeds = [derived_seed(0, "noise", i) for i in range(1000)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1) != derived_seed("1")


def test_names_become_parts_of_file_names_that_every_system_keeps():
    for plain in ("cat", "van gogh", "Hello Kitty-2.0", "猫", "a+b"):
        assert file_part(plain) == plain
    odd = ["a/b", "a-b/", "a:b", "a\\b", ".", "..", " a", "a.", "x" * 280, "猫" * 80, "e\u0301", "a*b"]
    parts = [file_part(name) for name in odd]
    assert len(set(parts)) == len(odd)
    assert all(len(part.encode()) <= 80 and not set(part) & set('/\\:*?"<>|') and part[0] not in " ." for part in parts)


def test_files_sort_by_the_numbers_in_their_names():
    names = ["step-1000-000002", "step-999-1000000", "step-999-000010", "after-100", "after-99", "after-09"]
    assert [path.name for path in sorted(map(Path, names), key=by_number)] == [
        "after-09",
        "after-99",
        "after-100",
        "step-999-000010",
        "step-999-1000000",
        "step-1000-000002",
    ]

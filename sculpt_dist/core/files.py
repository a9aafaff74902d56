"""Files that are either absent, as before, or complete; checksums; seeds."""

from __future__ import annotations

import datetime
import hashlib
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The checksum of a file's content, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, sync, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def append_line(path: Path, text: str) -> None:
    """Add a line with the time to a log, in one piece whoever else writes to it."""
    line = f"{datetime.datetime.now().isoformat(' ', 'seconds')} {' '.join(text.splitlines())}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_sha256(text: str) -> str:
    """The checksum of a text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine and Python."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1

"""Atomic writes, append-only logs, checksums and seeds.

A sealed record is a json object that holds its own checksum under the key "sha256". The checksum covers the content as
json with sorted keys, so spaces and line breaks do not matter. Records of earlier versions have none, and are taken as
they are.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sculpt_dist.core.errors import RunFolderError, WriteError
from sculpt_dist.core.messages import redacted

SEAL = "sha256"  # the key of a sealed record, and the last line of a sealed text


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's content; returns its SHA-256, as hex."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as copy:
        while block := read.read(1 << 20):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()


def read_object(path: Path, remedy: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a json file that we wrote, with at least these keys, and without its checksum.

    Raises RunFolderError for one that is damaged, which names the file and ends with the `remedy`.
    """
    try:
        content = json.loads(path.read_bytes())
        fault = None if isinstance(content, dict) else f"it holds a {type(content).__name__}"
        if fault is None and is_intact(content) is False:
            fault = "its values differ from its checksum"
    except (OSError, ValueError, RecursionError) as error:
        content, fault = {}, str(error)[:200] or type(error).__name__
    lacking = [key for key in keys if fault is None and key not in content]
    if fault is not None or lacking:
        raise RunFolderError(f"{path} is damaged ({fault or f'it lacks {lacking[0]}'}): {remedy}")
    return unsealed(cast(dict[str, Any], content))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as json would give it back, with its checksum."""
    plain = json.loads(json.dumps(dict(content)))
    return {**plain, SEAL: _record_sha256(plain)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without its checksum."""
    return {key: value for key, value in content.items() if key != SEAL}


def is_intact(content: Mapping[str, Any]) -> bool | None:
    """Whether a record is as it was sealed; None where it has no checksum."""
    return content[SEAL] == _record_sha256(unsealed(content)) if SEAL in content else None


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sealed json file; after a crash it holds the old content or the new."""
    write_atomically(path, json.dumps(sealed(content), indent=1).encode())


def sealed_text(text: str) -> str:
    """A text of whole lines, and a comment with their checksum."""
    return f"{text}# {SEAL}: {text_sha256(text)}\n"


def is_text_intact(text: str) -> bool | None:
    """Whether a text is as it was sealed; None where it has no checksum."""
    body, comment, checksum = text.rpartition(f"# {SEAL}: ")
    return text_sha256(body) == checksum.strip() if comment else None


def _record_sha256(content: Mapping[str, Any]) -> str:
    return text_sha256(json.dumps(content, sort_keys=True))


def is_folder_name(name: str) -> bool:
    """Whether a name from a file may become a folder's: one part of a path, and not of the folder above."""
    return bool(name.strip()) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def file_part(name: str, most: int = 80) -> str:
    """A name as part of a file's name: as it is where every system can keep it, else cleaned, cut and with a checksum.

    At most so many bytes; different names give different parts.
    """
    clean = re.sub(r"[^\w .+-]", "_", unicodedata.normalize("NFC", name))
    if clean == name == name.strip(" .") and len(name.encode()) <= most:
        return name
    cut = clean.encode()[: most - 9].decode(errors="ignore").strip(" .")
    return f"{cut}-{text_sha256(name)[:8]}"


def by_number(path: Path) -> tuple[tuple[int, ...], str]:
    """Sorts files by the numbers in their names: step-999-000010 comes before step-1000-000002."""
    return tuple(int(digits) for digits in re.findall(r"\d+", path.name)), path.name


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path`: turns what the disk refuses into a WriteError with the place and the free room."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        cause = error.strerror or error
        raise WriteError(f"{path}: cannot be written: {cause} ({free_space(path.parent)})") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing. Raises WriteError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def written_aside(path: Path, synced: bool = True) -> Iterator[Path]:
    """A name beside `path` for the block to write a file or folder under, which is then renamed to `path`.

    After a kill `path` is as before or complete; with `synced` also after a crash of the machine. When the block fails,
    nothing is left. Raises WriteError when the disk refuses.
    """
    aside = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield aside
            if synced and aside.is_file():
                sync(aside)
            os.replace(aside, path)
    except BaseException:
        _remove(aside)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; after a crash it holds the old content or the new, never part of either.

    Raises WriteError, which is an OSError too, and leaves nothing behind, when the disk refuses.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder under a name of `written_aside`.

    Only for a folder that this process has locked: processes of other machines look dead here.
    """
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        process = re.search(r"\.(\d+)\.tmp$", path.name)
        if process and (int(process[1]) == os.getpid() or not Path(f"/proc/{process[1]}").exists()):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def free_space(folder: Path) -> str:
    """How much room the disk of a folder has, for messages."""
    with contextlib.suppress(OSError):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    return "its disk does not answer"


def append_line(path: Path, text: str) -> None:
    """Append one line with a timestamp to a log, without passwords. Raises WriteError.

    A single write keeps it whole when several processes append.
    """
    line = f"{datetime.datetime.now().isoformat(' ', 'seconds')} {' '.join(redacted(text).splitlines())}\n"
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode(errors="backslashreplace"))
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
    """SHA-256 of a text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed derived from a key; the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1

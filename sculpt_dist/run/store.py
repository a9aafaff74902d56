"""A folder in which runs share what does not depend on their method: samples and scores of the base model.

Every entry is a folder, named after a checksum of what decides its content. It appears whole or not at all, with the
checksums of its files. Runs have hard links to these files where the disk allows it, and copies elsewhere; nobody
changes a file in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import (
    file_sha256,
    make_folder,
    read_object,
    text_sha256,
    write_record,
    writing,
    written_aside,
)
from sculpt_dist.core.locks import Lock
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest

LIST = ".entry.json"  # of an entry's files, with their checksums


class Store:
    """The folder `prepare.folder`; without one, nothing is found and nothing kept. All ranks call each method."""

    def __init__(self, folder: Path | None, group: Group, stop: StopRequest) -> None:
        self.folder, self.group, self.stop = folder, group, stop

    @contextlib.contextmanager
    def held(self, kind: str, key: Any) -> Iterator[None]:
        """Hold the entry of this key, which decides the content; another run waits, then takes what this one keeps.

        `kind` is a readable part of the entry's name.
        """
        if self.folder is None:
            yield
            return
        lock = Lock(self._entry(kind, key).with_suffix(".lock"))
        while not self.group.on_first(lambda: self._acquire(lock)):
            self.stop.check(f"{lock.file}, which another run holds")
            time.sleep(0.2)
        try:
            yield
        finally:
            lock.release()  # nothing on the other ranks

    def take(self, kind: str, key: Any, into: Path) -> bool:
        """Link the entry's files into a folder; returns whether there is an entry.

        A damaged entry is removed: it will be made anew.
        """
        return self.folder is not None and self.group.on_first(lambda: self._take(kind, key, into))

    def keep(self, kind: str, key: Any, source: Path) -> None:
        """Keep the files of a folder as the entry of this key; nothing if there is one."""
        if self.folder is not None:
            self.group.on_first(lambda: self._keep(kind, key, source))

    def _acquire(self, lock: Lock) -> bool:
        make_folder(lock.file.parent)
        with writing(lock.file):
            return lock.acquire() is None

    def _take(self, kind: str, key: Any, into: Path) -> bool:
        entry = self._entry(kind, key)
        if not entry.is_dir():
            return False
        try:
            content = read_object(entry / LIST, "it is made anew", ("files",))
            files: dict[str, str] = content["files"]
            whole = all(file_sha256(entry / name) == sha256 for name, sha256 in files.items())
            whole = whole and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
        except (OSError, RunFolderError, AttributeError):
            whole = False
        if not whole:
            shutil.rmtree(entry)
            return False
        with writing(into):
            for name in files:
                _link(entry / name, into / name)
        return True

    def _keep(self, kind: str, key: Any, source: Path) -> None:
        entry = self._entry(kind, key)
        if entry.exists():
            return
        files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        with written_aside(entry) as aside:
            for file in files:
                _link(source / file, aside / file)
            content = {"key": key, "files": {str(file): file_sha256(aside / file) for file in files}}
            write_record(aside / LIST, content)

    def _entry(self, kind: str, key: Any) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}-{text_sha256(json.dumps(key, sort_keys=True))[:24]}"


def _link(file: Path, place: Path) -> None:
    """Give a file a second name, or copy it where the disk has no such links; replaces what is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)
    except OSError:
        shutil.copy(file, aside)
    os.replace(aside, place)

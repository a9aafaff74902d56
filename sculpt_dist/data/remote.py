"""Files and folders at a URL (`https://`, `s3://`, `gs://`, `hf://`, whatever fsspec reads), copied to this machine.

A copy lies in the user's cache, under a checksum of the URL and of what the other side tells of its files: what changes
there is copied anew. Where it tells neither times nor tags, each process makes a copy of its own.
"""

from __future__ import annotations

import json
import os
import uuid
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.files import make_folder, text_sha256, written_aside
from sculpt_dist.core.messages import redacted, shown

CHANGING = "etag last-modified lastmodified last_modified mtime created updated md5hash generation blob_id".split()


def is_remote(place: str | Path) -> bool:
    """Whether a place is a URL."""
    return "://" in str(place)


@cache
def local_copy(url: str) -> Path:
    """A copy of the file, or of the folder with all that lies in it. Raises ConfigError where it cannot be had."""
    import fsspec  # type: ignore[import-untyped]  # ships no types

    named = shown(redacted(url))
    try:
        system, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")
        found = {path: _about(system, path, info) for path, info in system.find(root, detail=True).items()}
        if not found:
            raise FileNotFoundError("nothing is there")
        known = all(set(map(str.lower, info)) & set(CHANGING) for info in found.values())
        told = json.dumps([url, found, None if known else uuid.uuid4().hex], sort_keys=True, default=str)
        copy = _cache() / text_sha256(told)[:24] / (PurePosixPath(root).name or "files")
        if not copy.exists():
            make_folder(copy.parent)
            with written_aside(copy) as aside:
                for path in found:
                    part = PurePosixPath(path).relative_to(root)
                    if ".." in part.parts:
                        raise ConfigError(f"{named}: names a file outside of itself: {shown(path)}")
                    (aside / part).parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(path, str(aside / part))
    except ConfigError:
        raise
    except Exception as error:  # each kind of storage raises errors of its own, also for a package that is missing
        raise ConfigError(f"{named}: cannot be read ({type(error).__name__}: {shown(redacted(str(error)))})") from error
    return copy


def _about(system: Any, path: str, info: dict[str, Any]) -> dict[str, Any]:
    """What the other side tells of a file; of a web server, a listing tells less than a question."""
    told: dict[str, Any] = info if set(map(str.lower, info)) & set(CHANGING) else system.info(path)
    return told


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sculpt-dist" / "remote"

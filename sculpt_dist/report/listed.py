"""The images of a stage that images.csv lists, with their checksums."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import file_sha256


def listed_images(stage: Path, scores: Mapping[str, Any]) -> dict[str, str]:
    """File name -> sha256 of the kept images of a stage with these scores; empty where an earlier version drew them.

    Raises RunFolderError where images.csv is not the one that the scores name.
    """
    file, expected = stage / "images.csv", (scores.get("files") or {}).get("images.csv")
    if expected is None:
        return {}
    if not file.is_file() or file_sha256(file) != expected:
        fault = "was changed" if file.is_file() else "is missing"
        raise RunFolderError(f"{file} {fault} since the images were scored: remove {stage}, and repeat the command")
    with file.open(newline="", encoding="utf-8") as text:
        try:
            return {row["file"]: row["sha256"] for row in csv.DictReader(text) if row["file"]}
        except (csv.Error, KeyError, UnicodeDecodeError) as error:
            raise RunFolderError(f"{file} is damaged ({error}): remove {stage}, and repeat the command") from error

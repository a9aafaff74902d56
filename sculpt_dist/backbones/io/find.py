"""Where a model comes from: a folder, a hub id, or the canvas models that are shipped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sculpt_dist.core.errors import ModelError


def find_folder(path: str | None, arch: str, revision: str | None) -> Path:
    """The local pipeline folder that `model.path` means: a folder, a hub id, or (null) the shipped canvas model of `arch`."""
    if path is None:
        shipped = Path(__file__).parents[2] / "assets" / "canvas" / arch
        if not (shipped / "model_index.json").is_file():
            raise ModelError(f"model.path is not set, and there is no shipped canvas model for model.arch={arch}")
        return shipped
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.endswith((".safetensors", ".ckpt")):
        raise ModelError(f"model.path={path}: there is no such file")
    if folder.is_absolute() or path.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ModelError(
            f"model.path={path}: there is no such folder; give a diffusers pipeline folder or a hub id owner/name"
        )
    return _from_hub(path, revision)


SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
WANTED = [*SETTINGS, "*/*.safetensors"]  # no pickles, and not the whole original model beside the components
SECONDS = 5.0  # that the hub may take for an answer


def find_settings(path: str | None, public: str | None, revision: str | None) -> Path:
    """The folder whose settings and tokenizers a single file is read with: `model.config`, or the hub's public model of this kind."""
    if path is not None and Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    name = path or public
    if name is None:
        raise ModelError(
            "model.path: a single file of this model.arch cannot be read; give a diffusers pipeline folder"
        )
    try:
        return _from_hub(name, revision if path else None, SETTINGS)
    except ModelError as error:
        raise ModelError(f"model.config={path}: the settings that a single file lacks: {error}") from error


def _from_hub(name: str, revision: str | None, wanted: list[str] = WANTED) -> Path:
    """The hub's folder in the local cache, fetched where it is missing or older; the cache alone where the hub cannot be asked."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import filter_repo_objects

    transport_error = HfHubHTTPError.__bases__[
        0
    ]  # httpx's or its successor's HTTPError, as the installed hub client has it
    why, ignored = "HF_HUB_OFFLINE is set", None
    offline, files = constants.HF_HUB_OFFLINE, []
    try:
        if not offline:
            held = [
                file.rfilename for file in HfApi().repo_info(name, revision=revision, timeout=SECONDS).siblings or []
            ]
            ignored = [file for file in held if _is_spare(file, held)]
            files = list(filter_repo_objects(held, allow_patterns=wanted, ignore_patterns=ignored))
            for file in files[
                :1
            ]:  # a hub that answers no more is found out here, before the client's own minutes of trying again
                get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model.path={name}, model.revision={revision}: the hub knows no such model (or needs a login): {first_line(error)}"
        ) from error
    except (transport_error, OSError) as error:
        offline, why = True, f"{type(error).__name__}: {first_line(error)}"
    try:
        if offline:
            return Path(
                snapshot_download(
                    name, revision=revision, local_files_only=True, allow_patterns=wanted, ignore_patterns=ignored
                )
            )
        # One by one: each request has a time limit, while snapshot_download lists the files once more and would wait for that for ever.
        places = {_fetched(hf_hub_download, name, file, revision) for file in files}
        if len(places) != 1:
            state = "holds no file of a pipeline" if not places else "was changed while it was fetched; call again"
            raise ModelError(f"model.path={name}, model.revision={revision}: the hub's model {state}")
        return places.pop()
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.path={name}: is no local folder and not in the cache, and the hub cannot be asked: network ({why}); "
            "fetch it on a machine with a network (hf download), or give a folder"
        ) from error
    except (transport_error, OSError) as error:
        raise ModelError(
            f"model.path={name}: the hub did not give it: network ({type(error).__name__}: {first_line(error)})"
        ) from error


def _fetched(download: Callable[..., str], name: str, file: str, revision: str | None) -> Path:
    """The folder of the revision in the cache, with this file in it."""
    return Path(download(name, file, revision=revision, etag_timeout=SECONDS)).parents[file.count("/")]


def _is_spare(file: str, held: list[str]) -> bool:
    """Whether a weight file is a variant (model.fp16.safetensors) of one that is there in full."""
    folder, _, name = file.rpartition("/")
    plain = [
        other
        for other in held
        if other.startswith(f"{folder}/")
        and other.endswith(".safetensors")
        and other.rpartition("/")[2].count(".") == 1
    ]
    return name.endswith(".safetensors") and name.count(".") > 1 and bool(plain)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]

"""Where a model comes from: a folder, the Hugging Face hub, or the models of a world that are shipped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sculpt_dist.core.errors import ModelError

SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
WANTED = [*SETTINGS, "*/*.safetensors", "README.md"]  # no pickles, and no original single file beside the components
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SECONDS = 5.0  # to wait for an answer of the hub


def find_folder(path: str | None, arch: str, revision: str | None, world: str = "canvas") -> Path:
    """The local pipeline folder for `model.path`: a folder, a hub id, or (null) the shipped model of `world`."""
    if path is None:
        shipped = Path(__file__).parents[2] / "assets" / world / arch
        if not (shipped / "model_index.json").is_file():
            raise ModelError(
                f"model.path is not set, and there is no shipped model for model.world={world} model.arch={arch}"
            )
        return shipped
    check_path(path)
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else _from_hub(path, revision)


def check_path(path: str | None) -> None:
    """Raises ModelError where `model.path` can be neither a folder, nor a file, nor a hub id; asks no hub."""
    if path is None or Path(path).expanduser().exists():
        return
    if path.endswith((".safetensors", ".ckpt")):
        raise ModelError(f"model.path={path}: there is no such file")
    if Path(path).expanduser().is_absolute() or path.startswith((".", "~")) or not HUB_ID.fullmatch(path):
        raise ModelError(
            f"model.path={path}: there is no such folder; give a diffusers pipeline folder or a hub id owner/name"
        )


def find_settings(path: str | None, public: str | None, revision: str | None) -> Path:
    """The folder whose settings and tokenizers complete a single file: `model.config`, or the hub's `public` model."""
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
        raise ModelError(f"model.config={path}: no settings for the single file: {error}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def _from_hub(name: str, revision: str | None, wanted: list[str] = WANTED) -> Path:
    """The model's folder in the local cache, updated from the hub; only the cache when the hub does not answer."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base is the HTTPError of whichever HTTP library the installed hub client uses.
    network_errors: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)
    where = f"model.path={name}, model.revision={revision}"
    offline, why = constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set"
    files: list[str] = []
    try:
        if not offline:
            files = _listed(name, revision, wanted)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(f"{where}: the hub has no such model (or needs a login): {first_line(error)}") from error
    except network_errors as error:
        offline, why = True, f"{type(error).__name__}: {first_line(error)}"
    try:
        if offline:
            return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=wanted))
        # One by one, each with a time limit: snapshot_download would list the files again, without one.
        places = {_fetched(hf_hub_download, name, file, revision) for file in files}
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.path={name}: is neither a local folder nor in the cache, and the hub does not answer: network "
            f"({why}); fetch it on a machine with a network (hf download), or give a folder"
        ) from error
    except network_errors as error:
        raise ModelError(
            f"model.path={name}: the download failed: network ({type(error).__name__}: {first_line(error)})"
        ) from error
    if len(places) != 1:
        state = "holds no file of a pipeline" if not places else "changed while it was fetched; run the command again"
        raise ModelError(f"{where}: the hub's model {state}")
    return places.pop()


def _listed(name: str, revision: str | None, wanted: list[str]) -> list[str]:
    """The files of a hub model that are wanted, without spare variants."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import filter_repo_objects

    siblings = HfApi().model_info(name, revision=revision, timeout=SECONDS).siblings or []
    held = [file.rfilename for file in siblings]
    spares = [file for file in held if _is_spare(file, held)]
    files = list(filter_repo_objects(held, allow_patterns=wanted, ignore_patterns=spares))
    for file in files[:1]:  # detects a hub that stops answering; the client itself would retry for minutes
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=SECONDS)
    return files


def _fetched(download: Callable[..., str], name: str, file: str, revision: str | None) -> Path:
    """The revision's folder in the cache, with this file in it."""
    return Path(download(name, file, revision=revision, etag_timeout=SECONDS)).parents[file.count("/")]


def _is_spare(file: str, held: list[str]) -> bool:
    """Whether a weight file is a variant (model.fp16.safetensors) beside the plain weights of the same component."""
    folder, _, name = file.rpartition("/")
    if not name.endswith(".safetensors") or name.count(".") == 1:
        return False
    same = [other.rpartition("/")[2] for other in held if other.startswith(f"{folder}/")]
    return any(other.endswith(".safetensors") and other.count(".") == 1 for other in same)

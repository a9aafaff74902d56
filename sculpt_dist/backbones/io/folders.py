"""Diffusers pipeline folders, read: checked before anything is loaded, loaded strictly. No pickle is ever read."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_dist.backbones.io.tensorfile import Entry, entries, pickled
from sculpt_dist.core.errors import ModelError

DENOISERS = ("unet", "transformer")
CHECKSUMS = "CHECKSUMS"  # file of a pipeline folder that we wrote
STOCHASTIC = ("Ancestral", "SDE", "sde", "LCM", "TCD", "DDPM", "SASolver")


def check_folder(
    folder: Path, pipeline_class: str, classes: Mapping[str, str], settings_only: bool = False
) -> None:
    """Raises ModelError when a pipeline folder is of another class, or a component is missing or visibly damaged; reads headers only.

    `kinds`: the components that are used, by subfolder. `settings_only`: components may lack their weights.
    """
    index = pipeline_index(folder, pipeline_class)
    for (
        part
    ) in folder.iterdir():  # a component that is not used here is copied into exports, so it may hold no pickles either
        if (
            is_named(index, part.name)
            and part.name not in classes
            and (part / "config.json").is_file()
            and not has_weights(part)
        ):
            for file in sorted(part.glob("*.bin")):
                raise pickled(file)
    for name, expected in classes.items():
        part = folder / name
        if not (part / "config.json").is_file():
            raise ModelError(f"{part}: the pipeline lacks this component (no config.json)")
        said = component_config(folder, name).get(
            "_class_name", expected
        )  # transformers' settings do not say it there
        if said != expected:
            raise ModelError(f"{part}: holds a {said}, not a {expected}: it is of another model")
        if not has_weights(part):
            for file in sorted(part.glob("*.bin")):
                raise pickled(file)
            if settings_only:
                continue
            found = ", ".join(sorted(p.name for p in part.iterdir()))
            raise ModelError(f"{part}: no .safetensors weights (found {found}): fetch the component again")
        _check_index(part)
        _check_one_dtype(part)


def has_weights(part: Path) -> bool:
    """Whether a component's folder holds safetensors of any kind."""
    return any(part.glob("*.safetensors"))


def _check_index(part: Path) -> None:
    """A shard that lacks a tensor which its index promises was damaged; diffusers would not notice."""
    for index in _indices(part):
        promised = read_json(index)["weight_map"]
        held = {entry.name: file.name for file in weight_files(part) for entry in entries(file)}
        wrong = sorted(name for name in {*promised, *held} if promised.get(name) != held.get(name))
        if wrong:
            there = f"is in {held[wrong[0]]}" if wrong[0] in held else "is in none of the shards"
            said = f"should be in {promised[wrong[0]]}" if wrong[0] in promised else "is not named"
            raise ModelError(
                f"{index}: {len(wrong)} weights are not where it says, first {wrong[0]}, which {said} and {there}: fetch both again"
            )


def _indices(part: Path) -> list[Path]:
    """The index of the weights that are loaded, where they lie in several files."""
    variant = variant_of(part)
    return sorted(part.glob(f"*.safetensors.index{'.' + variant if variant else ''}.json"))[:1]


def _check_one_dtype(part: Path) -> None:
    """A component stored partly in one dtype and partly in another was put together from two."""
    kinds: dict[torch.dtype, list[str]] = {}
    for entry in stored_entries(part):
        if entry.dtype.is_floating_point:
            kinds.setdefault(entry.dtype, []).append(entry.name)
    if len(kinds) > 1:
        told = "; ".join(
            f"{len(names)} in {str(dtype).removeprefix('torch.')} ({names[0]}, ...)" for dtype, names in kinds.items()
        )
        raise ModelError(
            f"{part}: its weights have mixed dtypes, {told}: save it in one, pipeline.to(dtype).save_pretrained(...)"
        )


def pipeline_index(folder: Path, expected: str) -> dict[str, Any]:
    """The folder's model_index.json. Raises ModelError when the folder holds no pipeline, or one of another class."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder}: is no diffusers pipeline folder (no model_index.json); save one with pipeline.save_pretrained()"
        )
    content = read_json(index)
    if content.get("_class_name") != expected:
        raise ModelError(
            f"{folder}: holds a {content.get('_class_name')}, model.arch expects {expected}; set model.arch to the kind of this model, if there is one"
        )
    return content


def is_named(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json names a component of this name that the pipeline has."""
    value = index.get(name)
    return isinstance(value, list) and value[:1] != [None]


def component_config(folder: Path, name: str) -> dict[str, Any]:
    """The settings of one component."""
    return read_json(folder / name / "config.json")


@lru_cache(maxsize=8)
def load_tokenizer(folder: Path, name: str) -> Any:
    """A tokenizer of the pipeline. Raises ModelError when it is missing or damaged."""
    from transformers import AutoTokenizer

    if not (folder / name).is_dir():
        raise ModelError(f"{folder / name}: the pipeline lacks this component")
    try:
        return AutoTokenizer.from_pretrained(folder / name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / name}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def load_component(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One model of a pipeline, with every weight present. Raises ModelError that names what is missing."""
    quiet_libraries()
    part = folder / name
    try:
        model, report = kind.from_pretrained(
            part,
            dtype=dtype,
            variant=variant_of(part),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{part}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    wrong = [f"missing {key}" for key in sorted(report["missing_keys"]) if not key.endswith("position_ids")]
    wrong += [f"other shape {entry}" for entry in report["mismatched_keys"]]
    if name in DENOISERS:  # text encoders carry more than is used
        wrong += [f"unknown {key}" for key in sorted(report["unexpected_keys"])]
    if wrong:
        raise ModelError(
            f"{part}: {len(wrong)} weights do not fit its config: {'; '.join(wrong[:3])}; the checkpoint is damaged or of another model"
        )
    broken = [tensor_name for tensor_name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"{part}: {len(broken)} weights hold values that are not finite ({broken[0]}, ...); the checkpoint is damaged"
        )
    return model.eval().requires_grad_(False)


def empty_component(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One model of a pipeline on the meta device, built from its settings alone. Raises ModelError when they are no settings of one."""
    from diffusers import ConfigMixin
    from huggingface_hub.errors import StrictDataclassError  # what transformers' settings raise

    quiet_libraries()
    settings = component_config(folder, name)
    try:
        with torch.device("meta"):
            model = (
                kind.from_config(settings)
                if issubclass(kind, ConfigMixin)
                else kind(kind.config_class.from_dict(settings))
            )
    except (StrictDataclassError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder / name / 'config.json'}: no {kind.__name__} can be built from it: {said}") from error
    return model.to(dtype).eval().requires_grad_(False)


def quiet_libraries() -> None:
    """Their bars and hints would bury ours; what is wrong with a folder we say ourselves."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def weight_files(part: Path) -> list[Path]:
    """The files of weights that are loaded: those that the index names, or the plain one, or that of one variant where only it is there.

    Raises ModelError when the index names a file that is not there.
    """
    variant = variant_of(part)
    for index in _indices(part):
        said = read_json(index).get("weight_map")
        named = sorted({part / str(name) for name in said.values()}) if isinstance(said, dict) else []
        missing = [file.name for file in named if not file.is_file()]
        if missing or not named:
            raise ModelError(
                f"{index}: names {len(missing)} shards that are not there ({', '.join(missing[:3])}): fetch them again"
            )
        return named
    files = sorted(part.glob("*.safetensors"))
    return [file for file in files if (f".{variant}" in file.name if variant else file.name.count(".") == 1)]


def variant_of(part: Path) -> str | None:
    """The variant ("fp16") whose weights are loaded; None where plain ones are there."""
    names = sorted(file.name for file in part.glob("*.safetensors"))
    plain = not names or any(name.count(".") == 1 for name in names)
    return None if plain else names[0].split(".")[-2].split("-")[0]


def expected_checksums(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The sha256 that files should have, where it is known: from CHECKSUMS, or from the hub's cache, which names large files by it."""
    known = {}
    for file in files:
        stored = file.resolve()
        if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
            known[file] = stored.name
    if (folder / CHECKSUMS).is_file():
        lines = (folder / CHECKSUMS).read_text().splitlines()
        named = {folder / name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        known |= {file: named[file] for file in files if file in named}
    return known


def read_json(file: Path) -> dict[str, Any]:
    """A json file's object. Raises ModelError when it holds none."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: is damaged, no readable json ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is damaged, it holds a {type(content).__name__} in place of named settings")
    return content


def load_scheduler(folder: Path, forced: Mapping[str, Any]) -> Any:
    """The pipeline's own scheduler class with its own configuration; `forced`: what the pipeline class sets in it, whatever it says."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ModelError(f"{file}: the pipeline lacks its scheduler")
    settings = read_json(file)
    name = settings.get("_class_name", "")
    if any(word in name + str(settings.get("algorithm_type")) for word in STOCHASTIC) or settings.get(
        "stochastic_sampling"
    ):
        raise ModelError(
            f"{file}: {name} adds noise of its own, so equal seeds would not give equal images; save the pipeline with a deterministic "
            "scheduler such as DPMSolverMultistepScheduler"
        )
    scheduler = getattr(importlib.import_module("diffusers"), name, None)
    if scheduler is None or not name.endswith("Scheduler"):
        raise ModelError(f"{file}: _class_name {name!r} is no scheduler of diffusers")
    loaded = scheduler.from_pretrained(folder, subfolder="scheduler")
    return scheduler.from_config(loaded.config, **{key: value for key, value in forced.items() if key in loaded.config})


def stored_entries(part: Path) -> list[Entry]:
    """A component's tensors, in the order of `stored_weights`; only headers are read. Raises ModelError for a damaged file."""
    return [entry for file in weight_files(part) for entry in entries(file)]


def stored_weights(folder: Path, name: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """A component's tensors (or those wanted) as the folder stores them, one at a time, in their stored dtype."""
    for file in weight_files(folder / name):
        yield from file_tensors(file, wanted)


def file_tensors(file: Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one safetensors file (or those wanted), one at a time, in the order of `entries`."""
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        for entry in entries(file):
            if wanted is None or entry.name in wanted:
                yield entry.name, content.get_tensor(entry.name)

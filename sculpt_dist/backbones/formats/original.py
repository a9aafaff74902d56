"""Single-file checkpoints of Stable Diffusion 1.x and SDXL in Stability's original layout, one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from sculpt_dist.backbones.formats.about import About, metadata
from sculpt_dist.backbones.formats.original_names import (
    PREFIXES,
    Original,
    looks_like,
    originals,
    pipeline_kind,
    plain_name,
    settings,
)
from sculpt_dist.backbones.io.folders import is_named, weight_files
from sculpt_dist.backbones.io.tensorfile import entries, unwrapped
from sculpt_dist.backbones.io.writing import set_dtype, settings_files
from sculpt_dist.core.errors import ModelError
from sculpt_dist.core.files import make_folder, written_aside
from sculpt_dist.core.tensorfile import Entry, write_tensors

__all__ = ["looks_like", "read_single_file", "write_single_file"]

NAMES = {
    "sd15": "Stable Diffusion 1.x",
    "sdxl": "SDXL",
    "sd2": "Stable Diffusion 2.x",
    "lora": "a LoRA",
    "unknown": "no complete Stable Diffusion 1.x or SDXL",
}
# Parts of a pipeline without weights.
UNWEIGHTED = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
# Tensors of single files that no diffusers model has: moving averages and losses of the training, leftovers of CLIP.
IGNORED = re.compile(
    r"first_stage_model\.loss\.|model_ema\.|\.position_ids$|\.logit_scale$|\.transformer\.(text_model\.)?text_projection\b"
)
Fetch = Callable[[Path, str], Tensor]


class Stored(NamedTuple):
    """Where a tensor is stored, and under which name."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


Piece = tuple[Original, list[Stored]]

# Writing


def check_single_file(folder: Path, file: Path | None) -> None:
    """Raises ModelError when a pipeline folder has no original layout, or the file's name has another ending."""
    pipeline_kind(folder)
    if file is not None and file.suffix != ".safetensors":
        raise ModelError(f"{file}: ComfyUI and A1111 know the format by its ending; let it end in .safetensors")


def write_single_file(folder: Path, file: Path, about: About | None = None) -> None:
    """Write a diffusers pipeline folder (SD 1.x or SDXL) as one .safetensors file, in its stored dtypes.

    The file is absent, as before, or complete; about one tensor is in memory at a time. `about`: goes into the
    metadata. Raises ModelError when the folder is no such pipeline, or its weights do not fit its configs.
    """
    check_single_file(folder, file)
    plan = originals(folder, pipeline_kind(folder))
    pieces: list[Piece] = []
    for part, content in plan.items():
        stored = _stored(folder / part, content)
        pieces += [(entry, [stored[source] for source in entry.sources]) for entry in content]
    for entry, sources in pieces:
        if len({source.dtype for source in sources}) > 1:
            held = ", ".join(f"{source.name} {source.dtype}" for source in sources)
            raise ModelError(
                f"{sources[0].file}: mixed dtypes ({held}) cannot be stacked into {entry.name}; save the model in "
                "one dtype"
            )
    planned = [Entry(entry.name, sources[0].dtype, entry.shape) for entry, sources in pieces]
    marks = [Entry(mark, torch.float32, (0,)) for mark in _marks(folder)]
    make_folder(file.parent)
    with ExitStack() as stack:
        marking = ((mark.name, torch.empty(0)) for mark in marks)
        header = {"format": "pt"} | metadata(about, folder, "sgm")
        write_tensors(file, [*planned, *marks], chain(_converted(pieces, _fetcher(stack)), marking), header)


def _marks(folder: Path) -> list[str]:
    """Names of empty tensors that mark SDXL's v-prediction for ComfyUI (comfy/supported_models.py, SDXL.model_type)."""
    scheduler = settings(folder / "scheduler" / "scheduler_config.json")
    if pipeline_kind(folder) != "sdxl" or scheduler.get("prediction_type") != "v_prediction":
        return []
    return ["v_pred", "ztsnr"] if scheduler.get("rescale_betas_zero_snr") else ["v_pred"]


def _stored(part: Path, plan: list[Original]) -> dict[str, Stored]:
    """The tensors of one model of the folder, under the plan's names. Raises ModelError when they differ from it."""
    stored: dict[str, Stored] = {}
    for file in weight_files(part):
        for name, dtype, shape in entries(file):
            plain = plain_name(part.name, name)
            if plain in stored:
                raise ModelError(
                    f"{file}: {name} is also in {stored[plain].file.name}; keep one set of weights in the folder"
                )
            if not name.endswith("position_ids"):  # a constant that older versions stored
                stored[plain] = Stored(file, name, dtype, shape)
    if not stored:
        raise ModelError(f"{part}: no .safetensors weights; save the pipeline with pipeline.save_pretrained()")
    expected = {source: entry.source_shape for entry in plan for source in entry.sources}
    wrong = [f"missing {name}" for name in expected if name not in stored]
    wrong += [f"unknown {name}" for name in stored if name not in expected]
    for name in [name for name in expected if name in stored]:
        if stored[name].shape != expected[name]:
            wrong.append(f"{name} is {stored[name].shape}, not {expected[name]}")
    if wrong:
        raise ModelError(
            f"{part}: {len(wrong)} weights do not fit its config: {'; '.join(wrong[:3])}; the folder is damaged or of "
            "another model"
        )
    return stored


def _fetcher(stack: ExitStack) -> Fetch:
    """Reads tensors by file and name; each file is opened once, and stays mapped until the stack ends."""
    opened: dict[Path, Any] = {}

    def fetch(file: Path, name: str) -> Tensor:
        if file not in opened:
            opened[file] = stack.enter_context(safe_open(file, "pt"))
        return opened[file].get_tensor(name)

    return fetch


def _converted(pieces: Iterable[Piece], fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    for entry, sources in pieces:
        tensors = [fetch(source.file, source.name) for source in sources]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        yield entry.name, tensor.T if entry.change == "transposed" else tensor.reshape(entry.shape)


# Reading


def check_single_kind(file: Path) -> None:
    """Raises ModelError when a single file is damaged, or of a kind that is not read; only its header is needed."""
    looks = looks_like(unwrapped(entry.name) for entry in entries(file))
    if looks not in PREFIXES:
        readable = " and ".join(NAMES[kind] for kind in PREFIXES)
        raise ModelError(f"{file}: looks like {NAMES[looks]}; single files of {readable} are read")


def read_single_file(file: Path, template: Path, folder: Path) -> None:
    """Write a single file in the original layout as a diffusers pipeline folder, in the stored dtypes.

    `template` is a pipeline folder of the same kind. It gives configs, tokenizers and scheduler (with the prediction
    type, unless the file is marked as v-prediction), but no weights. A safety checker, which single files lack, is left
    out. `folder` must not exist; it is absent or complete. About one tensor is in memory at a time.
    Raises ModelError when the file is missing, pickled, damaged, of another kind or size than the template.
    """
    if folder.exists():
        raise ModelError(f"{folder}: exists already; name a folder that does not")
    kind = pipeline_kind(template)
    held = entries(file)
    looks = looks_like(unwrapped(entry.name) for entry in held)
    if looks != kind:
        first = ", ".join(entry.name for entry in held[:3])
        raise ModelError(
            f"{file}: looks like {NAMES[looks]} ({first}, ...), {template} is {NAMES[kind]}; give a template of the "
            "file's kind"
        )
    plan = originals(template, kind)
    found = _found(file, held, PREFIXES[kind])
    _check(file, template, [entry for part in plan.values() for entry in part], found)
    make_folder(folder.parent)
    with written_aside(folder) as aside:
        aside.mkdir()
        _copy_settings(template, aside, plan)
        with ExitStack() as stack:
            fetch = _fetcher(stack)
            for part, content in plan.items():
                _write_part(aside / part, content, found, fetch)
        _apply_marks(aside, {entry.name for entry in held})


def _apply_marks(folder: Path, names: set[str]) -> None:
    """Set the scheduler to v-prediction where the file is marked so (see _marks)."""
    if "v_pred" in names:
        file = folder / "scheduler" / "scheduler_config.json"
        changes = {"prediction_type": "v_prediction"} | ({"rescale_betas_zero_snr": True} if "ztsnr" in names else {})
        file.write_text(json.dumps(settings(file) | changes, indent=2) + "\n")


def _found(file: Path, held: list[Entry], prefixes: dict[str, str]) -> dict[str, Stored]:
    """The file's tensors that belong to the models, under the names of the original layout."""
    found = {}
    head = prefixes["text_encoder"]
    bare = tuple(head + part for part in ("embeddings.", "encoder.", "final_layer_norm."))
    for stored, dtype, shape in held:
        name = unwrapped(stored)
        if name.startswith(tuple(prefixes.values())) and not IGNORED.search(name):
            # Some merges were saved by a transformers that drops `text_model.` from the names.
            full = f"{head}text_model.{name.removeprefix(head)}" if name.startswith(bare) else name
            found[full] = Stored(file, stored, dtype, shape)
    return found


def _check(file: Path, template: Path, plan: list[Original], found: dict[str, Stored]) -> None:
    """Raises ModelError when the file's tensors are not those of the template."""
    missing = [entry.name for entry in plan if entry.name not in found]
    if missing:
        raise ModelError(
            f"{file}: lacks {len(missing)} tensors of {template}: {', '.join(missing[:3])}; give the file of a "
            "complete model, and its template"
        )
    extra = sorted(set(found) - {entry.name for entry in plan})
    if extra:
        raise ModelError(
            f"{file}: holds {len(extra)} tensors beyond {template}: {', '.join(extra[:3])}; give a template of the "
            "file's size"
        )
    for entry in plan:
        shape = found[entry.name].shape
        as_matrix = entry.change == "conv" and shape == entry.shape[:2]  # some tools save these kernels as matrices
        if shape != entry.shape and not as_matrix:
            remedy = "give a template of the file's size"
            if entry.name.endswith("input_blocks.0.0.weight") and shape[1:2] == (9,):
                remedy = "this is an inpainting model: give the text-to-image model that it was made from"
            raise ModelError(f"{file}: {entry.name} is {shape}, {template} asks for {entry.shape}; {remedy}")


def _copy_settings(template: Path, folder: Path, plan: dict[str, list[Original]]) -> None:
    """Copy the template without its weights, and without the components that a single file cannot fill."""
    index = settings(template / "model_index.json")
    named = [name for name in index if is_named(index, name)]
    unnamed = [part for part in plan if part not in named]
    if unnamed:
        raise ModelError(
            f"{template / 'model_index.json'}: does not name {', '.join(unnamed)}; give a complete diffusers pipeline "
            "folder"
        )
    for part in named:
        if part not in plan and part not in UNWEIGHTED:
            index[part] = [None, None]
            continue
        if not (template / part).is_dir():
            raise ModelError(
                f"{template / part}: the template lacks this component; give a complete diffusers pipeline folder"
            )
        (folder / part).mkdir()
        for source in settings_files(template / part):
            shutil.copy(source, folder / part)
    if index.get("safety_checker", [None]) == [None, None] and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_part(part: Path, plan: list[Original], found: dict[str, Stored], fetch: Fetch) -> None:
    """Write one model's weights, and their most frequent dtype into its config."""
    planned = [Entry(source, found[entry.name].dtype, entry.source_shape) for entry in plan for source in entry.sources]

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for entry in plan:
            tensor = fetch(found[entry.name].file, found[entry.name].name)
            shape = entry.source_shape
            for source, piece in zip(entry.sources, tensor.chunk(len(entry.sources))):
                yield source, piece.T if entry.change == "transposed" else piece.reshape(shape)

    stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
    write_tensors(part / f"{stem}.safetensors", planned, pieces())
    dtype = Counter(entry.dtype for entry in planned if entry.dtype.is_floating_point).most_common(1)[0][0]
    set_dtype(part / "config.json", dtype)

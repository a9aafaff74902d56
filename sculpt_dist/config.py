"""The configuration: dataclass defaults < yaml file < `key=value`, merged one at a time so that a bad key is named."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sculpt_dist.errors import ConfigError

Section = TypeVar("Section")


@dataclass(frozen=True)
class ModelConfig:
    path: Optional[str] = None  # diffusers folder or hub id; null = the shipped canvas model of `arch`
    arch: str = "sd15"
    revision: Optional[str] = None  # of a hub id
    dtype: str = "float32"  # of the frozen parts, of drawing, and of the export


@dataclass(frozen=True)
class Concept:
    """One concept to forget, or the name of a style with `kind: style`."""

    target: str = MISSING
    superclass: Optional[str] = None  # an object needs one; a style without one turns into the style-free prompt
    kind: str = "object"
    prompts: Optional[list[str]] = None  # templates with {concept}; null = prepare.prompts of this kind
    keep: list[str] = field(default_factory=list)  # concepts of the same kind to hold in place by distillation


@dataclass(frozen=True)
class PromptsConfig:
    """Templates: {concept} is replaced; text in [square brackets] is dropped when a style has no superclass."""

    object: list[str] = field(default_factory=lambda: ["a photo of {concept}"])
    style: list[str] = field(default_factory=lambda: ["a photo[ in {concept} style]"])


@dataclass(frozen=True)
class PrepareConfig:
    samples: int = 100  # per concept and stream
    steps: int = 50
    guidance: float = 7.5
    batch: int = 16  # samples drawn together, and the size of a shard
    images: Optional[str] = None  # folder with one subfolder of images per concept name, used instead of drawing
    prompts: PromptsConfig = field(default_factory=PromptsConfig)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 450  # updates per concept, after the collect steps
    batch: int = 2  # per stream, global over ranks and accumulation
    accumulate: int = 1
    lr: float = 3e-6
    warmup: float = 0.3  # share of the updates in which the one-cycle schedule rises
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 0.0  # norm of the masked gradient; 0 = no clipping
    seed: int = 0
    checkpoint_every: float = 60.0  # seconds; 0 = only at each concept's end
    workers: int = 0  # loader processes per rank


@dataclass(frozen=True)
class MaskConfig:
    keep: float = 0.5  # share of the weights that may move
    scope: str = "matrix"  # matrix or global
    collect: float = 50  # steps before training; below 1: share of train.steps
    refresh: float = 100  # updates between turnovers; below 1: share of train.steps; 0 = static mask
    turnover: float = 0.2  # share of open weights swapped at a refresh, decayed by a cosine
    until: float = 0.8  # no turnover after this progress
    saliency: str = "abs_sum"  # abs_sum |sum g|, sum_abs sum |g|, sum_sq sum g^2, random


@dataclass(frozen=True)
class EngineConfig:
    stage: int = 2  # ZeRO stage 0-3
    precision: str = "fp32"  # fp32 or bf16
    timeout: float = 600.0  # seconds that a collective may wait


@dataclass(frozen=True)
class EvaluateConfig:
    enabled: bool = True
    images: int = 10  # per object x style pair, plain prompts
    paraphrase_images: int = 2  # per object x style pair and paraphrase
    steps: int = 25
    guidance: float = 7.5
    batch: int = 32
    seed: int = 20000  # image i of a pair has its own seed, whatever the number of ranks
    classifier: str = "canvas"  # canvas, clip:FOLDER, image:FOLDER, own:package.module:Class
    prompt: str = "a photo of a {object}[ in {style} style]"
    paraphrases: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)  # empty = all that the canvas has; targets are added
    styles: list[str] = field(default_factory=list)
    members: dict[str, list[str]] = field(default_factory=dict)  # superclass -> its objects, for SA
    bootstrap: int = 2000
    reference: Optional[str] = None  # folder of images for FID and KID
    clip: Optional[str] = None  # folder of a CLIP model for CLIPScore, and for FID and KID features


@dataclass(frozen=True)
class RunFolderConfig:
    folder: str = "runs/unlearn"
    fresh: bool = False  # discard what the folder holds of this run


@dataclass(frozen=True)
class TrackConfig:
    wandb: bool = False
    project: str = "sculpt-dist"
    name: Optional[str] = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; `method` stays untyped here but for its name (see build.method)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    concepts: list[Concept] = field(default_factory=list)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dm_cal"})
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "mask.scope": ("matrix", "global"),
    "mask.saliency": ("abs_sum", "sum_abs", "sum_sq", "random"),
    "engine.stage": (0, 1, 2, 3),
    "engine.precision": ("fp32", "bf16"),
}
POSITIVE = (
    "prepare.samples prepare.steps prepare.batch train.steps train.batch train.accumulate train.lr mask.keep engine.timeout "
    "evaluate.images evaluate.steps evaluate.batch evaluate.bootstrap"
).split()
SHARES = "train.warmup mask.keep mask.turnover mask.until".split()


def load_config(file: Path | None, overrides: Sequence[str] | DictConfig = ()) -> RunConfig:
    """Defaults, then the yaml file, then the overrides (`key=value` strings or a nested mapping).

    Raises ConfigError that names the file or override, the key, what was found and what there is.
    """
    merged = _writable(OmegaConf.structured(RunConfig))
    if file is not None:
        merged = _merge(merged, _read_yaml(file), str(file))
    if isinstance(overrides, DictConfig):
        merged = _merge(merged, overrides, "arguments")
    else:
        for override in overrides:
            merged = _merge(merged, _parse_override(override), f"override {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file or 'configuration'}: {_first_line(error)}") from error
    check(config)
    return config


def merge_section(section: type[Section], values: dict[str, Any], where: str) -> Section:
    """Fill one dataclass from plain values, with the same merge and the same errors as the whole configuration."""
    merged = _merge(_writable(OmegaConf.structured(section)), OmegaConf.create(values), where, prefix="method.")
    filled = OmegaConf.to_object(merged)
    _check_numbers(filled, "method.")
    return filled


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as yaml; loading it gives the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check(config: RunConfig) -> None:
    """Ranges, choices and combinations that the types alone do not catch. Raises ConfigError."""
    _check_numbers(config, "")
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            raise ConfigError(f"{key}={_value(config, key)}: choose one of {', '.join(map(str, choices))}")
    for key in POSITIVE:
        if _value(config, key) <= 0:
            raise ConfigError(f"{key}={_value(config, key)}: must be greater than 0")
    for key in SHARES:
        if _value(config, key) > 1:
            raise ConfigError(f"{key}={_value(config, key)}: is a share, at most 1")
    if max(config.train.betas) >= 1:
        raise ConfigError(f"train.betas={list(config.train.betas)}: each must be below 1, as in [0.9, 0.999]")
    if not config.run.folder.strip():
        raise ConfigError("run.folder is empty: name the folder of this run")
    if config.engine.precision == "bf16" and config.engine.stage < 2:
        raise ConfigError(
            f"engine.precision=bf16 with engine.stage={config.engine.stage}: DeepSpeed trains bf16 correctly on stages 2 and 3 "
            "only; use engine.stage=2, or engine.precision=fp32"
        )
    _check_concepts(config)


def check_batch(config: RunConfig, ranks: int) -> int:
    """The micro-batch of one rank. Raises ConfigError when the global batch does not divide."""
    share = ranks * config.train.accumulate
    if config.train.batch % share:
        raise ConfigError(
            f"train.batch={config.train.batch} is not divisible by ranks {ranks} x train.accumulate {config.train.accumulate}: "
            f"use a multiple of {share}"
        )
    return config.train.batch // share


def as_steps(value: float, total: int) -> int:
    """A count of steps given as such, or (below 1) as a share of `total`."""
    return round(value * total) if value < 1 else round(value)


def normal(name: str) -> str:
    """A concept name for comparison: no case, single spaces."""
    return " ".join(name.split()).casefold()


def _check_concepts(config: RunConfig) -> None:
    seen: set[str] = set()
    for i, concept in enumerate(config.concepts):
        key = f"concepts[{i}]"
        if concept.kind not in ("object", "style"):
            raise ConfigError(f"{key}.kind={concept.kind}: choose object or style")
        if not normal(concept.target):
            raise ConfigError(f"{key}.target is empty: name the concept to forget")
        if concept.kind == "object" and not normal(concept.superclass or ""):
            raise ConfigError(f"{key}.superclass is missing: name the broader class that {concept.target!r} should turn into")
        if normal(concept.target) == normal(concept.superclass or ""):
            raise ConfigError(f"{key}: target and superclass are both {concept.target!r}; name a broader class")
        if normal(concept.target) in seen:
            raise ConfigError(f"{key}: the target {concept.target!r} is named twice; remove one")
        seen.add(normal(concept.target))
        for kept in concept.keep:
            if not normal(kept):
                raise ConfigError(f"{key}.keep holds an empty name: remove it")
            if normal(kept) in (normal(other.target) for other in config.concepts):
                raise ConfigError(f"{key}.keep holds {kept!r}, which is a target; remove it from one of them")
    lists = {"prepare.prompts.object": config.prepare.prompts.object, "prepare.prompts.style": config.prepare.prompts.style}
    lists |= {f"concepts[{i}].prompts": c.prompts for i, c in enumerate(config.concepts) if c.prompts is not None}
    for key, templates in lists.items():
        if not templates:
            raise ConfigError(f"{key} is empty: give at least one template with {{concept}}")
        for template in templates:
            if "{concept}" not in template:
                raise ConfigError(f"{key}: the prompt {template!r} does not hold {{concept}}, where the name goes")
    for key, names in (("evaluate.objects", config.evaluate.objects), ("evaluate.styles", config.evaluate.styles)):
        if not all(normal(name) for name in names):
            raise ConfigError(f"{key} holds an empty name: remove it")
    for template in (config.evaluate.prompt, *config.evaluate.paraphrases):
        if "{object}" not in template:
            raise ConfigError(f"evaluate prompt {template!r} does not hold {{object}}, where the name goes")


def _check_numbers(section: Any, prefix: str) -> None:
    for f in fields(section):
        value, key = getattr(section, f.name), prefix + f.name
        if is_dataclass(value):
            _check_numbers(value, key + ".")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and (number < 0 or not math.isfinite(number)):
                raise ConfigError(f"{key}={number}: must be a finite number, not negative")


def _value(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _read_yaml(file: Path) -> DictConfig:
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such configuration file")
    try:
        content = OmegaConf.load(file)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not readable as yaml: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file}: holds {type(content).__name__}, expected sections such as 'train:'")
    return content


def _parse_override(override: str) -> DictConfig:
    if not re.match(r"[A-Za-z_][\w.\[\]]*=", override):
        raise ConfigError(f"override {override!r}: write key=value, for example train.lr=1e-5")
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"override {override!r}: {_first_line(error)}") from error


def _merge(base: DictConfig, update: DictConfig, where: str, prefix: str = "") -> DictConfig:
    try:
        return OmegaConf.merge(base, update)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = prefix + str(getattr(error, "full_key", "") or "")
        message = _first_line(error)
        keys = list(_dotted(base, prefix))
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) if key not in keys else []
        hint = f" Did you mean {close[0]!r}?" if close and "Did you mean" not in message else ""
        there = ", ".join(sorted(k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]))
        listed = f" There are: {there}." if key not in keys and there else ""
        raise ConfigError(f"{where}: {key}: {message}.{hint}{listed}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _dotted(node: DictConfig, prefix: str) -> Iterable[str]:
    for key in node:
        yield prefix + str(key)
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _dotted(child, f"{prefix}{key}.")


def _writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses arrive read-only; they are merged while still open and frozen when made into objects."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _writable(child)
    return node

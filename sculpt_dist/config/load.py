"""The configuration: dataclass defaults < yaml files < `key=value`, merged one at a time so that a bad key is named."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sculpt_dist.config.interpolation import environment_texts, with_texts, without_values
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError

Section = TypeVar("Section")
CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "train.schedule": ("one_cycle", "cosine", "linear", "constant"),
    "mask.scope": ("matrix", "global"),
    "mask.saliency": ("abs_sum", "sum_abs", "sum_sq", "random"),
    "engine.stage": (0, 1, 2, 3),
    "engine.precision": ("fp32", "bf16"),
    "engine.moments": ("all", "open"),
    "engine.kernel": ("auto", "plain", "fused"),
    "track.artifact": ("none", "reference", "files"),
}
POSITIVE = (
    "prepare.samples prepare.steps prepare.batch train.steps train.batch train.accumulate train.lr mask.keep engine.timeout engine.grace "
    "engine.gathered evaluate.images evaluate.steps evaluate.batch evaluate.bootstrap"
).split()
SHARES = "train.warmup mask.keep mask.turnover mask.until".split()


def load_config(file: Path | None, overrides: Sequence[str] | DictConfig = ()) -> RunConfig:
    """Defaults, then the yaml file (after the one that its `include` names), then the overrides (`key=value` strings or a nested mapping).

    Raises ConfigError that names the file or override, the key, what was found and what there is.
    """
    updates = [(str(source), content) for source, content in _with_included(file, ())] if file is not None else []
    if isinstance(overrides, DictConfig):
        updates.append(("arguments", overrides))
    else:
        updates += [(f"override {override!r}", _parse_override(override)) for override in overrides]
    merged = _merged(_defaults(RunConfig), updates)
    try:
        texts = environment_texts(OmegaConf.to_container(merged))
        config = with_texts(OmegaConf.to_object(merged), texts)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file or 'configuration'}: {_first_line(error)}") from error
    check(config)
    return config


def merge_section(section: type[Section], values: Mapping[str, Any], where: str, prefix: str = "method.") -> Section:
    """Fill one dataclass from plain values, with the same merge and the same errors as the whole configuration."""
    try:
        merged = _merged(_defaults(section), [(where, OmegaConf.create(values))], prefix)
        if environment_texts(OmegaConf.to_container(merged)):
            raise ConfigError(f"{where}: takes a value from the environment, which only a run's own configuration may")
        filled = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    _check_numbers(filled, prefix)
    return filled


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as yaml; loading it gives the same configuration. Values of the environment are not in it."""
    return OmegaConf.to_yaml(OmegaConf.structured(without_values(config)))


def plain_values(config: RunConfig) -> dict[str, Any]:
    """What loading `to_yaml` gives, as dicts and lists, without going through the text."""
    return json.loads(json.dumps(asdict(without_values(config))))


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
    if config.model.path is not None and not config.model.path.strip():
        raise ConfigError("model.path is empty: give the folder, hub id or single .safetensors file of the checkpoint")
    if not config.run.folder.strip():
        raise ConfigError("run.folder is empty: name the folder of this run")
    if config.engine.precision == "bf16" and config.engine.stage < 2:
        raise ConfigError(
            f"engine.precision=bf16 with engine.stage={config.engine.stage}: DeepSpeed trains bf16 correctly on stages 2 and 3 "
            "only; use engine.stage=2, or engine.precision=fp32"
        )
    if config.engine.compile and config.engine.stage == 3:
        raise ConfigError(
            "engine.compile=true with engine.stage=3: the hooks that gather weights cannot be compiled; use stage 2 or less"
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
    """A count of steps given as such, or (below 1) as a share of `total`; of a share above 0 at least one."""
    return max(int(value > 0), round(value * total)) if value < 1 else round(value)


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
            raise ConfigError(
                f"{key}.superclass is missing: name the broader class that {concept.target!r} should turn into"
            )
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
    lists = {
        "prepare.prompts.object": config.prepare.prompts.object,
        "prepare.prompts.style": config.prepare.prompts.style,
    }
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
        twice = [name for i, name in enumerate(names) if normal(name) in map(normal, names[:i])]
        if twice:
            raise ConfigError(f"{key} holds {twice[0]!r} twice: remove one")
    for name in config.prepare.prompts.files:
        if normal(name) not in seen:
            there = ", ".join(concept.target for concept in config.concepts)
            raise ConfigError(f"prepare.prompts.files names {name!r}, which is no target; there are: {there or 'none'}")
    measured = config.evaluate.reference or config.evaluate.clip or config.evaluate.metrics
    if config.evaluate.retain_prompts and not measured:
        raise ConfigError(
            f"evaluate.retain_prompts={config.evaluate.retain_prompts}: FID, KID and CLIPScore are taken of these images: give "
            "evaluate.reference or evaluate.clip"
        )
    for template in (config.evaluate.prompt, *config.evaluate.paraphrases):
        if "{object}" not in template:
            raise ConfigError(f"evaluate prompt {template!r} does not hold {{object}}, where the name goes")


def _check_numbers(section: Any, prefix: str) -> None:
    for f in fields(section):
        value, key = getattr(section, f.name), prefix + f.name
        if is_dataclass(value):
            _check_numbers(value, key + ".")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if (
                isinstance(number, (int, float))
                and not isinstance(number, bool)
                and (number < 0 or not math.isfinite(number))
            ):
                raise ConfigError(f"{key}={number}: must be a finite number, not negative")


def _value(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with_included(file: Path, includers: Sequence[Path]) -> Iterator[tuple[Path, DictConfig]]:
    """The files whose sections are merged, first to last: `include: other.yaml` (beside the file) comes before the file itself."""
    if file.resolve() in includers:
        raise ConfigError(f"{file}: includes itself, by way of {', '.join(path.name for path in includers)}")
    content = read_yaml(file)
    included = OmegaConf.to_container(content).get("include")
    content.pop("include", None)
    if included is not None:
        yield from _with_included(file.parent / str(included), (*includers, file.resolve()))
    yield file, content


def read_yaml(file: Path) -> DictConfig:
    """A configuration file's sections. Raises ConfigError that names the file."""
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


def _merged(base: DictConfig, updates: Sequence[tuple[str, DictConfig]], prefix: str = "") -> DictConfig:
    """`base` with each (where it is from, what it sets) over it. Raises ConfigError that names the first one that does not fit."""
    try:
        return OmegaConf.merge(base, *(update for _, update in updates))  # at once: every merge copies the base
    except (OmegaConfBaseException, ValueError, TypeError):
        for where, update in updates:
            base = _merge(base, update, where, prefix)
        return base


def _merge(base: DictConfig, update: DictConfig, where: str, prefix: str) -> DictConfig:
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


@cache
def _defaults(section: type) -> DictConfig:
    """A dataclass's defaults, to merge over."""
    return _writable(OmegaConf.structured(section))


def _writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses arrive read-only; they are merged while still open and frozen when made into objects."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _writable(child)
    return node

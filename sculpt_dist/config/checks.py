"""Checks of a configuration: ranges, choices, and combinations of keys."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.messages import shown

DTYPES = ("float32", "bfloat16", "float16")
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": DTYPES,
    "model.text_dtype": (*DTYPES, None),
    "model.vae_dtype": (*DTYPES, None),
    "model.export_dtype": (*DTYPES, "source", None),
    "prepare.images_missing": ("refuse", "draw"),
    "hold.source": ("original", "teacher"),
    "train.schedule": ("one_cycle", "cosine", "linear", "constant"),
    "mask.scope": ("matrix", "global"),
    "mask.saliency": ("abs_sum", "sum_abs", "sum_sq", "random"),
    "engine.stage": (0, 1, 2, 3),
    "engine.precision": ("fp32", "bf16"),
    "engine.moments": ("all", "open"),
    "engine.kernel": ("auto", "plain", "fused"),
    "attack.budget": ("light", "published"),
    "engine.draw": ("sharded", "whole", "auto"),
    "evaluate.keep_images": ("all", "some", "none", None),
    "track.artifact": ("none", "reference", "files"),
}
POSITIVE = (
    "prepare.samples prepare.steps prepare.batch hold.samples hold.share hold.weight train.steps train.batch "
    "adversarial.radius adversarial.lr train.accumulate train.lr train.checkpoint_share mask.keep engine.timeout "
    "engine.grace engine.gathered "
    "evaluate.images evaluate.steps evaluate.batch evaluate.bootstrap attack.cases model.text_batch"
).split()
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, half of a pair, line and paragraph ends
SHARES = "adversarial.share train.warmup train.checkpoint_share mask.keep mask.turnover mask.until".split()
MOST = {  # (limit, its unit) of the keys that it applies to
    (1000, "steps, as many as a sampler has"): "prepare.steps evaluate.steps",
    (1e6, "workers"): "train.workers",
    (1e7, "seconds, 115 days"): "engine.timeout engine.grace train.checkpoint_every",
    (1e9, ""): (
        "prepare.samples prepare.batch train.steps train.batch train.accumulate mask.collect mask.refresh "
        "evaluate.images evaluate.paraphrase_images evaluate.batch evaluate.bootstrap attack.cases model.text_batch"
    ),
}


def check(config: RunConfig) -> None:
    """Check ranges, choices and combinations, which the types alone do not catch. Raises ConfigError."""
    check_numbers(config, "")
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            raise ConfigError(f"{key}={shown(_value(config, key))}: choose one of {_listed(choices)}")
    for key in POSITIVE:
        if _value(config, key) <= 0:
            raise ConfigError(f"{key}={_value(config, key)}: must be greater than 0")
    for (most, unit), keys in MOST.items():
        for key in keys.split():
            if _value(config, key) > most:
                raise ConfigError(f"{key}={_value(config, key):g}: must be at most {f'{most:,.0f} {unit}'.strip()}")
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
            f"engine.precision=bf16 with engine.stage={config.engine.stage}: DeepSpeed trains bf16 correctly on stages "
            "2 and 3 only; use engine.stage=2, or engine.precision=fp32"
        )
    if config.engine.compile and config.engine.stage == 3:
        raise ConfigError(
            "engine.compile=true with engine.stage=3: the hooks that gather weights cannot be compiled; use stage 2 or "
            "less"
        )
    _check_concepts(config)
    _check_prompts(config)
    _check_evaluation(config)


def check_batch(config: RunConfig, ranks: int) -> int:
    """The micro-batch of one rank. Raises ConfigError when the global batch does not divide."""
    share = ranks * config.train.accumulate
    if config.train.batch % share:
        raise ConfigError(
            f"train.batch={config.train.batch} is not divisible by ranks {ranks} x train.accumulate "
            f"{config.train.accumulate}: use a multiple of {share}"
        )
    return config.train.batch // share


def as_steps(value: float, total: int) -> int:
    """A number of steps, given as such or (below 1) as a share of `total`; a share above 0 is at least one step."""
    return max(int(value > 0), round(value * total)) if value < 1 else round(value)


@lru_cache(1 << 16)
def normal(name: str) -> str:
    """A concept name for comparison: no case, single spaces, composed characters."""
    return unicodedata.normalize("NFC", " ".join(name.split()).casefold())


def check_name(key: str, name: str) -> None:
    """Raises ConfigError for a name with a character that no reader sees: it would be another concept, or break a line.

    The joiners of scripts that write with them are allowed.
    """
    unseen = [mark for mark in name if unicodedata.category(mark) in UNSEEN and mark not in "\u200c\u200d"]
    if unseen:
        raise ConfigError(f"{key}={shown(name)!r}: contains the invisible character U+{ord(unseen[0]):04X}; remove it")


def _check_concepts(config: RunConfig) -> None:
    seen: set[str] = set()
    targets = {normal(concept.target) for concept in config.concepts}
    for i, concept in enumerate(config.concepts):
        key = f"concepts[{i}]"
        for part, name in (("target", concept.target), ("superclass", concept.superclass or "")):
            check_name(f"{key}.{part}", name)
        if concept.kind not in ("object", "style"):
            raise ConfigError(f"{key}.kind={shown(concept.kind)}: choose object or style")
        if not normal(concept.target):
            raise ConfigError(f"{key}.target is empty: name the concept to forget")
        if concept.kind == "object" and not normal(concept.superclass or ""):
            raise ConfigError(
                f"{key}.superclass is missing: name the broader class that {shown(concept.target)!r} should turn into"
            )
        if normal(concept.target) == normal(concept.superclass or ""):
            raise ConfigError(f"{key}: target and superclass are both {shown(concept.target)!r}; name a broader class")
        if normal(concept.target) in seen:
            raise ConfigError(f"{key}: the target {shown(concept.target)!r} is named twice; remove one")
        seen.add(normal(concept.target))
        if concept.superclass and normal(concept.superclass) in targets:
            raise ConfigError(
                f"{key}.superclass={shown(concept.superclass)} is itself a target: {shown(concept.target)!r} would "
                "turn into what is forgotten; remove one of the two, or name another superclass"
            )
        for kept in concept.keep:
            check_name(f"{key}.keep", kept)
            if not normal(kept):
                raise ConfigError(f"{key}.keep contains an empty name: remove it")
            if normal(kept) in targets:
                raise ConfigError(f"{key}.keep contains {shown(kept)!r}, which is also a target: remove one of the two")


def _check_prompts(config: RunConfig) -> None:
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
                raise ConfigError(
                    f"{key}: the template {shown(template)!r} lacks {{concept}}, the placeholder for the name"
                )
    targets = {normal(concept.target) for concept in config.concepts}
    for name in config.prepare.prompts.files:
        if normal(name) not in targets:
            known = shown(", ".join(concept.target for concept in config.concepts))
            raise ConfigError(
                f"prepare.prompts.files names {shown(name)!r}, which is not a target; there are: {known or 'none'}"
            )


def is_scored(at: Any, done: int, total: int) -> bool:
    """Whether `evaluate.at` asks for scores after `done` of `total` concepts; before the first, `done` is 0.

    Raises ConfigError for a value that is none of its forms.
    """
    every = re.fullmatch(r"every:([1-9]\d{0,8})", at) if isinstance(at, str) else None
    listed = isinstance(at, list) and all(isinstance(number, int) and number > 0 for number in at)
    if at not in ("all", "last") and not every and not listed:
        raise ConfigError(f"evaluate.at={str(at)[:200]}: give all, last, every:K, or a list of numbers such as [1, 10]")
    if done in (0, total) or at == "all":
        return True
    return done % int(every[1]) == 0 if every else listed and done in at


def _check_evaluation(config: RunConfig) -> None:
    is_scored(config.evaluate.at, 0, len(config.concepts))
    if config.evaluate.subset == 0:
        raise ConfigError("evaluate.subset=0: must be greater than 0; evaluate.at=last scores no stage in between")
    for key, names in (("evaluate.objects", config.evaluate.objects), ("evaluate.styles", config.evaluate.styles)):
        for name in names:
            check_name(key, name)
        if not all(normal(name) for name in names):
            raise ConfigError(f"{key} contains an empty name: remove it")
        repeated = [name for i, name in enumerate(names) if normal(name) in map(normal, names[:i])]
        if repeated:
            raise ConfigError(f"{key} contains {shown(repeated[0])!r} twice: remove one")
    judges = [
        (judge or "").removesuffix(":classifier") for judge in (config.evaluate.classifier, config.evaluate.witness)
    ]
    if judges[0] and judges[0] == judges[1]:
        raise ConfigError(
            f"evaluate.witness={shown(config.evaluate.witness)}: is the classifier itself; name another one, or null"
        )
    measured = config.evaluate.reference or config.evaluate.clip or config.evaluate.metrics
    if config.evaluate.retain_prompts and not measured:
        raise ConfigError(
            f"evaluate.retain_prompts={shown(config.evaluate.retain_prompts)}: FID, KID and CLIPScore are of these "
            "images: give evaluate.reference or evaluate.clip"
        )
    for template in (config.evaluate.prompt, *config.evaluate.paraphrases):
        if "{object}" not in template:
            raise ConfigError(f"evaluate prompt {shown(template)!r} lacks {{object}}, the placeholder for the name")


def check_numbers(section: Any, prefix: str) -> None:
    """Raises ConfigError for a number that is negative or not finite."""
    for f in fields(section):
        value, key = getattr(section, f.name), prefix + f.name
        if is_dataclass(value):
            check_numbers(value, key + ".")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if (
                isinstance(number, (int, float))
                and not isinstance(number, bool)
                and not 0 <= number <= sys.float_info.max
            ):
                raise ConfigError(f"{key}={shown(number)}: must be a finite number, not negative")


def _listed(choices: Iterable[Any]) -> str:
    return ", ".join("null" if choice is None else str(choice) for choice in choices)


def _value(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)

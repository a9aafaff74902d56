"""The keys that decide the result of a run, and the checksum over them that checkpoints record."""

from __future__ import annotations

import json
from typing import Any

from sculpt_dist.config.load import plain_values
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.files import text_sha256
from sculpt_dist.data.prompt_files import read_prompts

NEUTRAL = (  # keys that do not change the result
    "run track engine.timeout engine.grace train.checkpoint_every train.background_save train.workers "
    "train.checkpoint_share model.text_batch evaluate.keep_images evaluate.attacks attack prepare.folder engine.draw"
).split()
LATER: dict[str, Any] = {  # omitted at these values, which equal the behaviour before the key existed
    "model.world": "canvas",
    "model.text_dtype": None,
    "model.vae_dtype": None,
    "model.export_dtype": None,
    "prepare.prompts.files": {},
    "prepare.images_missing": "refuse",
    "hold.prompts": None,
    "hold.share": 1.0,
    "hold.weight": 1.0,
    "hold.samples": 1000,
    "hold.source": "original",
    "adversarial.steps": 0,
    "adversarial.radius": 0.3,
    "adversarial.lr": 0.5,
    "adversarial.share": 0.5,
    "evaluate.at": "all",
    "evaluate.subset": None,
    "evaluate.without": [],
    "evaluate.witness": None,
    "evaluate.prompts": {},
    "evaluate.retain_prompts": None,
    "evaluate.metrics": {},
    "train.together": False,
    "train.schedule": "one_cycle",
    "train.l1sp": 0.0,
    "train.l2sp": 0.0,
    "engine.moments": "all",
    "engine.kernel": "auto",
    "engine.gathered": 1e9,
    "engine.checkpointing": False,
    "engine.compile": False,
}


def config_fingerprint(config: RunConfig) -> str:
    """A checksum over all keys that decide the result, and over the content of the files of prompts."""
    return text_sha256(json.dumps(deciding_keys(plain_values(config)) | list_checksums(config), sort_keys=True))


def deciding_keys(content: dict[Any, Any]) -> dict[str, Any]:
    """All keys that decide the result, flat and dotted, from a configuration as plain values."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if key in NEUTRAL or (key in LATER and value == LATER[key]):
            return
        if isinstance(value, dict) and value:
            for name, member in value.items():
                walk(member, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    walk(content, "")
    return flat


def list_checksums(config: RunConfig) -> dict[str, str]:
    """File -> checksum over the prompts that are read from it. Raises ConfigError for a file that cannot be read."""
    lists = (config.hold.prompts, config.evaluate.retain_prompts)
    files = [
        *config.prepare.prompts.files.values(),
        *(config.evaluate.prompts or {}).values(),
        *(file for file in lists if file),
    ]
    return {file: text_sha256(repr(read_prompts(file))) for file in files}

"""What an exported file says of itself in its metadata, under the keys that other programs show.

`modelspec.*` is Stability's ModelSpec (ComfyUI, A1111, SwarmUI), `ss_*` are the names of kohya's trainer (A1111), and
`sculpt_dist.*` are ours. Only what is known is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from sculpt_dist.backbones.io.folders import component_config, pipeline_index, read_json

ARCHITECTURES = {  # ModelSpec's names
    "StableDiffusionPipeline": "stable-diffusion-v1",
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "SanaPipeline": "sana",
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


class About(NamedTuple):
    """What a run knows of its result."""

    title: str
    concepts: tuple[str, ...]
    method: str
    base: str
    version: str  # of this program
    image_size: int  # in pixels
    licence: str | None = None

    @property
    def description(self) -> str:
        return f"{self.base}, made to forget {', '.join(self.concepts)} by {self.method} (sculpt-dist {self.version})"


def metadata(about: About | None, folder: Path, implementation: str, adapter: str = "") -> dict[str, str]:
    """The metadata of a file made from a pipeline folder; `adapter`: its kind, such as "lora"."""
    if about is None:
        return {}
    prediction = read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type")
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(folder, prediction) + (f"/{adapter}" if adapter else ""),
        "modelspec.implementation": implementation,
        "modelspec.title": about.title,
        "modelspec.description": about.description,
        "modelspec.tags": "unlearning, sculpt-dist",
        "modelspec.resolution": f"{about.image_size}x{about.image_size}",
        "modelspec.prediction_type": PREDICTIONS.get(str(prediction)),
        "modelspec.license": about.licence,
        "ss_sd_model_name": about.base,
        "ss_output_name": about.title,
        "ss_training_comment": about.description,
        "sculpt_dist.concepts": json.dumps(about.concepts),
        "sculpt_dist.method": about.method,
        "sculpt_dist.base": about.base,
        "sculpt_dist.version": about.version,
    }
    return {key: value for key, value in found.items() if value is not None}


def _architecture(folder: Path, prediction: object) -> str:
    pipeline = str(pipeline_index(folder).get("_class_name"))
    if pipeline == "StableDiffusionPipeline" and component_config(folder, "unet").get("use_linear_projection"):
        return "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"
    return ARCHITECTURES.get(pipeline, pipeline)

"""The images that an evaluation keeps, and images.csv, which lists all that it drew, so that anyone can score again."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sculpt_dist.core.files import writing
from sculpt_dist.evaluation.requests import Evaluation, ImageRequest

if TYPE_CHECKING:
    from torch import Tensor

ALL_BELOW = 2000  # images of one stage
Checksums = Mapping[str, str]  # file name -> sha256


def kept_names(evaluation: Evaluation) -> dict[ImageRequest, str]:
    """The file names of the images that `evaluate.keep_images` keeps. Equal requests give one image."""
    requests = evaluation.requests
    keep = evaluation.settings.keep_images or ("all" if len(requests) < ALL_BELOW else "some")
    numbered = {request: request.shown or f"{i:06d}.png" for i, request in enumerate(requests)}
    return {request: name for request, name in numbered.items() if keep == "all" or (request.shown and keep == "some")}


def save_image(file: Path, image: Tensor, request: ImageRequest, evaluation: Evaluation) -> str:
    """Save an image, uint8 [3, h, w], as PNG with its request as text; returns the file's sha256."""
    from PIL import Image, PngImagePlugin

    about = PngImagePlugin.PngInfo()
    for key, value in _columns(request, evaluation).items():
        about.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG", pnginfo=about)
    with writing(file):
        file.unlink(missing_ok=True)  # it may be a link to an image that runs share
        file.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def images_csv(evaluation: Evaluation, names: Mapping[ImageRequest, str], checksums: Checksums) -> str:
    """A line for every image that was drawn; `file` and `sha256` are empty where it was not kept."""
    text = io.StringIO()
    rows = [
        {"file": name} | _columns(request, evaluation) | {"sha256": checksums.get(name, "")}
        for request in evaluation.requests
        for name in [names.get(request, "")]
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns(request: ImageRequest, evaluation: Evaluation) -> dict[str, str]:
    world = evaluation.world
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "guidance": str(request.guidance),
        "object": world.objects[request.object] if request.object >= 0 else "",
        "style": world.styles[request.style] if request.style >= 0 else "",
        "judged": "yes" if request.judged else "no",
    }

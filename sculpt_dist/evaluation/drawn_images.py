"""The images of an evaluation on disk, and images.csv, which lists all that it drew, so that anyone can score again."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import deque
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from sculpt_dist.core.files import file_sha256, written_aside
from sculpt_dist.evaluation.requests import Evaluation, ImageRequest

if TYPE_CHECKING:
    from torch import Tensor

ALL_BELOW = 2000  # images of one stage
OWN_NAME = re.compile(r"\d{6,}\.png|.+--.+\.png")  # as `file_names` gives them


class DrawnImages:
    """The images of one stage in a folder. Another thread writes each batch as soon as it is drawn.

    With `made_by`, which names the weights and all that decides how they draw, all images are written, and an
    evaluation that was stopped finds its own again. Once the scores are written, those that `evaluate.keep_images` does
    not keep are removed.
    """

    def __init__(self, folder: Path, evaluation: Evaluation, made_by: str | None) -> None:
        self.folder, self.evaluation, self.made_by = folder, evaluation, made_by
        self.kept = kept_names(evaluation)
        self._names = file_names(evaluation) if made_by is not None else self.kept
        self._checksums: dict[str, str] = {}  # of this rank's files
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[tuple[str, Future[str]]] = deque()

    def __enter__(self) -> DrawnImages:
        return self

    def __exit__(self, *failure: object) -> None:
        self._writer.shutdown(wait=True)

    def save(self, batch: Sequence[ImageRequest], images: Tensor, passes: int) -> None:
        """Write drawn images, uint8 [B, 3, h, w]; each took so many passes. Raises WriteError, also of earlier ones."""
        for request, image in zip(batch, images.cpu()):
            if name := self._names.get(request):
                about = self._about(request) | {"passes": str(passes)}
                self._writes.append((name, self._writer.submit(save_image, self.folder / name, image, about)))
        while len(self._writes) > 2 * len(batch):
            self._finish_one()

    def load(self, batch: Sequence[ImageRequest]) -> tuple[Tensor, int] | None:
        """A batch that an earlier call wrote, uint8 [B, 3, h, w], and the passes of each image.

        None where one is missing, is damaged, or shows something else.
        """
        import torch

        found = [self._load(request) for request in batch]
        whole = [image for image in found if image is not None]
        if len(whole) < len(batch) or len({image.shape for image, _ in whole}) > 1:
            return None
        return torch.stack([image for image, _ in whole]), whole[0][1]

    def take(self, batch: Sequence[ImageRequest]) -> None:
        """Count the files of a batch that an earlier call wrote as this rank's."""
        for request in batch:
            name = self._names[request]
            self._checksums[name] = file_sha256(self.folder / name)

    def finish(self) -> dict[str, str]:
        """Wait for this rank's files; returns the checksums of those to keep."""
        while self._writes:
            self._finish_one()
        kept = set(self.kept.values())
        return {name: sha256 for name, sha256 in self._checksums.items() if name in kept}

    def remove(self, keep: Container[str] = ()) -> None:
        """Remove what an evaluation of these settings or of others has written here, except these names."""
        for file in self.folder.glob("*.png"):
            if file.name not in keep and OWN_NAME.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _finish_one(self) -> None:
        name, write = self._writes.popleft()
        self._checksums[name] = write.result()

    def _load(self, request: ImageRequest) -> tuple[Tensor, int] | None:
        import numpy as np
        import torch
        from PIL import Image

        try:
            with Image.open(self.folder / self._names[request], formats=["PNG"]) as image:
                pixels, about = np.array(image.convert("RGB")), dict(getattr(image, "text", {}))
            passes = int(about.pop("passes"))
        except Exception:  # Pillow's plugins raise whatever a damaged file makes them raise; the image is drawn again
            return None
        if about != self._about(request):
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1), passes

    def _about(self, request: ImageRequest) -> dict[str, str]:
        return columns(request, self.evaluation) | ({} if self.made_by is None else {"made_by": self.made_by})


def file_names(evaluation: Evaluation) -> dict[ImageRequest, str]:
    """A file name for every image. Equal requests give one image."""
    return {request: request.shown or f"{i:06d}.png" for i, request in enumerate(evaluation.requests)}


def kept_names(evaluation: Evaluation) -> dict[ImageRequest, str]:
    """The file names of the images that `evaluate.keep_images` keeps."""
    keep = evaluation.settings.keep_images or ("all" if len(evaluation.requests) < ALL_BELOW else "some")
    names = file_names(evaluation)
    return {request: name for request, name in names.items() if keep == "all" or (request.shown and keep == "some")}


def save_image(file: Path, image: Tensor, about: Mapping[str, str]) -> str:
    """Save an image, uint8 [3, h, w], as PNG with this text; returns the file's sha256.

    A file that is there is replaced, not changed: it may be a link to an image that runs share.
    """
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in about.items():
        text.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", pnginfo=text)
    with written_aside(file, synced=False) as aside:
        aside.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def images_csv(evaluation: Evaluation, names: Mapping[ImageRequest, str], checksums: Mapping[str, str]) -> str:
    """A line for every image that was drawn; `file` and `sha256` are empty where it was not kept."""
    text = io.StringIO()
    rows = [
        {"file": name} | columns(request, evaluation) | {"sha256": checksums.get(name, "")}
        for request in evaluation.requests
        for name in [names.get(request, "")]
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def columns(request: ImageRequest, evaluation: Evaluation) -> dict[str, str]:
    """What images.csv and the text in an image say about it."""
    world = evaluation.world
    return {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "guidance": str(request.guidance),
        "object": world.objects[request.object] if request.object >= 0 else "",
        "style": world.styles[request.style] if request.style >= 0 else "",
        "judged": "yes" if request.judged else "no",
    }

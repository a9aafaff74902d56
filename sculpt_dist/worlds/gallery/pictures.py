"""The gallery's images: rendered icons, slightly moved and scaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sculpt_dist.core.files import make_folder, written_aside
from sculpt_dist.worlds import find
from sculpt_dist.worlds.gallery.sets import checksum, render_pictures
from sculpt_dist.worlds.gallery.world import WORLD

SCALE = (0.92, 1.0)  # of the rendered picture
SHIFT = 0.02  # of the picture's width, to each side
TURN = 0.03  # radians, to each side


def draw_dataset(per_pair: int, seed: int, source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`per_pair` images of every object in every style: (pixels, objects, styles).

    pixels: uint8 [N, 64, 64, 3]; objects, styles: int64 [N], indices into the world's. `source`: the folder of the
    unpacked icon sets, or a file `pictures.npy` that was rendered from them. Raises ConfigError as `render_pictures`.
    """
    sheets = np.load(source) if source.is_file() else render_pictures(source)  # [objects, styles, 128, 128, 3]
    num_styles = sheets.shape[1]
    pairs = torch.from_numpy(sheets).flatten(0, 1).permute(0, 3, 1, 2)  # [P, 3, 128, 128]
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.stack([_moved(pairs, rng) for _ in range(per_pair)], 1).flatten(0, 1)  # [N, 64, 64, 3]
    pair = np.arange(len(pairs)).repeat(per_pair)
    return pixels.numpy(), pair // num_styles, pair % num_styles


def reference_images() -> np.ndarray:
    """Every picture once, uint8 [N, 64, 64, 3], from the shipped contact sheet."""
    size = WORLD.image_size
    with Image.open(find.shipped("gallery", "pictures.png")) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))  # a row of pictures for each style
    rows = pixels.reshape(len(WORLD.styles), size, len(WORLD.objects), size, 3)
    return rows.transpose(2, 0, 1, 3, 4).reshape(-1, size, size, 3)


def write_sheet(pictures: Path, file: Path) -> None:
    """The contact sheet of the file that `keep_pictures` wrote: a row of pictures for each style, 64 pixels each."""
    size = WORLD.image_size
    sheets = np.load(pictures)  # uint8 [objects, styles, 128, 128, 3]
    zoom = sheets.shape[2] // size
    small = sheets.reshape(*sheets.shape[:2], size, zoom, size, zoom, 3).mean((3, 5)).round().astype(np.uint8)
    pixels = small.transpose(1, 2, 0, 3, 4).reshape(len(WORLD.styles) * size, len(WORLD.objects) * size, 3)
    with written_aside(file) as aside:
        Image.fromarray(pixels).save(aside, "PNG", optimize=True)


def keep_pictures(sets: Path, folder: Path) -> Path:
    """Render the pictures of these sets once into `folder`, and return the file that holds them."""
    file = folder / f"pictures-{checksum(sets)[:12]}.npy"
    if not file.is_file():
        pictures = render_pictures(sets)
        make_folder(file.parent)
        with written_aside(file) as aside, open(aside, "wb") as out:
            np.save(out, pictures)
    return file


def _moved(pairs: Tensor, rng: torch.Generator) -> Tensor:
    """uint8 [P, 3, 128, 128] -> uint8 [P, 64, 64, 3], each turned, scaled and shifted at random on white."""
    number = len(pairs)
    turn = (2 * torch.rand(number, generator=rng) - 1) * TURN
    zoom = 1 / (SCALE[0] + (SCALE[1] - SCALE[0]) * torch.rand(number, generator=rng))
    shift = (2 * torch.rand(number, 2, generator=rng) - 1) * 2 * SHIFT
    rows = torch.stack(
        [zoom * turn.cos(), -zoom * turn.sin(), shift[:, 0], zoom * turn.sin(), zoom * turn.cos(), shift[:, 1]], 1
    )
    parts = []
    for some, matrix in zip(pairs.split(256), rows.view(-1, 2, 3).split(256)):
        grid = F.affine_grid(matrix, list(some.shape), align_corners=False)
        ink = F.grid_sample(some.float() - 255, grid, align_corners=False)  # white is 0, also outside
        small = F.avg_pool2d(ink, pairs.shape[-1] // WORLD.image_size) + 255
        parts.append(small.round().clamp(0, 255).byte().permute(0, 2, 3, 1))
    return torch.cat(parts)

"""The sample grid of a report: objects by styles, before and after with the same seeds, targets framed."""

from __future__ import annotations

import io
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.core.files import file_part, file_sha256
from sculpt_dist.report.figures import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

INK, MUTED, ACCENT = "#1d1f23", "#70747c", "#c4512d"  # as in page.css
THUMB = 192  # side of a thumbnail in pixels; the page shows it at half that size or less
TINY = 64  # images up to this side are enlarged without smoothing
MAX_PIXELS = 25_000_000
MAX_ROWS, MAX_STYLES = 12, 6
PAGE_ROWS = 24  # of a page with nothing but images
NUM_BANDS = {1: 3, 2: 2}  # by number of styles: with few styles, rows are split into bands side by side


@dataclass(frozen=True)
class GridRow:
    """One object: its thumbnails in every style, before and after; None for a missing image."""

    name: str
    is_target: bool
    sides: tuple[list[Image | None], ...]


@dataclass(frozen=True)
class Grid:
    """Rows of objects and columns of styles."""

    styles: list[str]
    style_is_target: list[bool]
    bands: list[list[GridRow]]
    num_objects: int
    """All objects, shown or not."""
    num_styles: int
    """All styles, shown or not."""
    is_tiny: bool
    """Whether every image is tiny (see TINY)."""

    @property
    def num_shown(self) -> int:
        return sum(len(band) for band in self.bands)

    def is_target(self, row: GridRow, column: int) -> bool:
        return row.is_target or self.style_is_target[column]


def read_grid(
    before: Path,
    after: Path | None,
    names: Sequence[str],
    targets: Sequence[str],
    checksums: Mapping[Path, str] | None = None,
    page: int | None = None,
) -> Grid | None:
    """Read `<object>--<style>.png` from two folders, targets first, then in the order of `names`.

    `page`: these PAGE_ROWS objects of all, counted from 0; None chooses MAX_ROWS of them, targets and others. Returns
    None if there is no image. Raises RunFolderError if an image is damaged, or differs from its checksum.
    """
    sides = [_find_images(before), _find_images(after) if after else {}]
    found = [*sides[0], *sides[1]]
    if not found:
        return None
    order = {slug: at for at, slug in reversed(list(enumerate(map(_name_slug, [*targets, *names]))))}
    is_target = set(map(_name_slug, targets))
    labels = {_name_slug(name): name for name in [*names, *targets]}
    all_objects, all_styles = (
        sorted({pair[at] for pair in found}, key=lambda slug: (order.get(slug, len(order)), slug)) for at in (0, 1)
    )
    styles = _selection(all_styles, is_target, MAX_STYLES)
    if page is None:
        objects = _selection(all_objects, is_target, MAX_ROWS)
    else:
        in_order = _selection(all_objects, is_target, len(all_objects))
        objects = in_order[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    images = [
        [[_open(side.get((name, style)), checksums or {}) for style in styles] for side in sides] for name in objects
    ]
    is_tiny = all(max(image.size) <= TINY for row in images for side in row for image in side if image)
    size = TINY if is_tiny and page is not None else THUMB
    rows = [
        GridRow(
            labels.get(name, name),
            name in is_target,
            tuple([_thumbnail(image, is_tiny, size) for image in side] for side in row),
        )
        for name, row in zip(objects, images)
    ]
    height = -(-len(rows) // NUM_BANDS.get(len(styles), 1))
    return Grid(
        styles=[labels.get(style, style) for style in styles],
        style_is_target=[style in is_target for style in styles],
        bands=[rows[start : start + height] for start in range(0, len(rows), height)],
        num_objects=len(all_objects),
        num_styles=len(all_styles),
        is_tiny=is_tiny,
    )


def read_thumbnail(path: Path) -> Image | None:
    """One image as a grid shows it; None where it is missing. Raises RunFolderError if it is damaged."""
    image = _open(path if path.is_file() else None, {})
    return _thumbnail(image, image is not None and max(image.size) <= TINY, THUMB)


def draw_grid(grid: Grid) -> Image:
    """The whole grid as one picture with framed targets."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(str(fonts / name), 24) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    step, frame, head, gap = THUMB + 12, 6, 110, 36
    every = [row for band in grid.bands for row in band]
    margin = int(max(bold.getlength(shorten(row.name, 18)) for row in every)) + 40
    side_width = step * len(grid.styles)
    band_width = margin + 2 * side_width + gap
    picture = Image.new("RGB", (band_width * len(grid.bands) + gap, head + step * len(grid.bands[0]) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for at, band in enumerate(grid.bands):
        for side, title in enumerate(("before", "after")):
            left = at * band_width + margin + side * (side_width + gap)
            draw.text((left + frame, 18), title, fill=INK, font=bold)
            for column, style in enumerate(grid.styles):
                if grid.num_styles > 1:
                    draw.text((left + column * step + frame, 64), shorten(style, 13), fill=MUTED, font=plain)
                for line, row in enumerate(band):
                    x, y = left + column * step, head + line * step
                    if grid.is_target(row, column):
                        draw.rectangle((x, y, x + step - 1, y + step - 1), fill=ACCENT)
                    thumb = row.sides[side][column] or Image.new("RGB", (THUMB, THUMB), "#eceae5")
                    picture.paste(thumb, (x + frame, y + frame))
        for line, row in enumerate(band):
            color, font = (ACCENT, bold) if row.is_target else (INK, plain)
            right = (at * band_width + margin - 16, head + (line + 0.5) * step)
            draw.text(right, shorten(row.name, 18), fill=color, font=font, anchor="rm")
    return picture


def encode(image: Image, kind: str) -> bytes:
    """The image as a file of this kind, "png" or "jpeg"."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _find_images(folder: Path) -> Mapping[tuple[str, str], Path]:
    """The images of a folder by (object, style), both as slugs."""
    parts = {path: path.stem.rpartition("--") for path in sorted(folder.glob("*--*.png")) if path.is_file()}
    return {(_slug(name), _slug(style)): path for path, (name, _, style) in parts.items()}


def _selection(slugs: Sequence[str], is_target: Container[str], most: int) -> list[str]:
    """At most `most` names, targets first; up to a third of the places is reserved for other names."""
    targets, others = [slug for slug in slugs if slug in is_target], [slug for slug in slugs if slug not in is_target]
    num_targets = max(most * 2 // 3, most - len(others))
    return (targets[:num_targets] + others)[:most]


def _open(path: Path | None, checksums: Mapping[Path, str]) -> Image | None:
    from PIL import Image

    if path is None:
        return None
    remedy = f"remove {path.parents[1]}, and repeat the command that scores it"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
            pixels = image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them raise
        raise RunFolderError(f"{path} is damaged ({error}): {remedy}") from error
    if path in checksums and file_sha256(path) != checksums[path]:
        raise RunFolderError(f"{path} is damaged (it differs from its checksum): {remedy}")
    return pixels


def _thumbnail(image: Image | None, is_tiny: bool, size: int) -> Image | None:
    from PIL import Image, ImageOps

    if image is None:
        return None
    resampling = Image.Resampling.NEAREST if is_tiny else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (size, size), method=resampling, color="white")


def _name_slug(name: str) -> str:
    return _slug(file_part(name))


def _slug(name: str) -> str:
    """The common spelling of a name and of its file name: "chain-saw" for "Chain saw" and "chain_saw"."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")

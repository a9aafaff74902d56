"""Draws the canvas world.

An object is a few polygons, a style is a way to paint them, and the seed adds a little jitter.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import track

from sculpt_dist.worlds.canvas.world import WORLD

SHEET = 128  # pixels; drawings are scaled down from this size, which smooths their edges
TILE = 4  # side of a mosaic stone, in pixels of the final image

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """A filled polygon."""

    points: tuple[Point, ...]  # the sheet spans -1 to 1, y points down
    role: int  # chooses the colour: 0 body, 1 second part, 2 detail


def draw(name: str, style: str, seed: int) -> np.ndarray:
    """One drawing, uint8 [32, 32, 3]; the same arguments give the same pixels in every process."""
    rng = np.random.default_rng(seed)
    shapes = _place(_object_shapes(name), rng)
    # Few hues and little jitter: with free hues and wide jitter, a tiny model fails to learn the objects
    # (accuracy 0.10 to 0.32).
    hue = float(rng.choice([0.02, 0.12, 0.6, 0.8]) + rng.uniform(-0.02, 0.02))
    return _PAINTERS[style](shapes, hue, rng)


def draw_dataset(per_pair: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`per_pair` drawings of every object in every style: (pixels, objects, styles).

    pixels: uint8 [N, 32, 32, 3]; objects, styles: int64 [N], indices into the world's.
    """
    pixels, objects, styles = [], [], []
    for i, name in enumerate(track(WORLD.objects, description="drawing", disable=per_pair < 50)):
        for j, style in enumerate(WORLD.styles):
            for k in range(per_pair):
                drawing_seed = int(np.random.SeedSequence([seed, i, j, k]).generate_state(1, np.uint64)[0])
                pixels.append(draw(name, style, drawing_seed))
                objects.append(i)
                styles.append(j)
    return np.stack(pixels), np.array(objects), np.array(styles)


def reference_images() -> np.ndarray:
    """20 drawings of every object in every style, uint8 [N, 32, 32, 3]."""
    return draw_dataset(20, seed=0)[0]


# Objects


def _object_shapes(name: str) -> list[Shape]:
    """The polygons of an object, painted in this order."""
    if name == "flower":
        angles = [0.5 + 2 * math.pi * k / 6 for k in range(6)]
        petals = [_ellipse(0.36 * math.cos(angle), -0.3 + 0.36 * math.sin(angle), 0.24, 0.24, 0) for angle in angles]
        return [*_OBJECT_SHAPES[name], *petals, _ellipse(0, -0.3, 0.2, 0.2, 2)]
    return _OBJECT_SHAPES[name]


def _polygon(role: int, *points: Point) -> Shape:
    return Shape(points, role)


def _box(left: float, top: float, right: float, bottom: float, role: int) -> Shape:
    return Shape(((left, top), (right, top), (right, bottom), (left, bottom)), role)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, role: int, num_points: int = 20) -> Shape:
    angles = [2 * math.pi * k / num_points for k in range(num_points)]
    return Shape(tuple((x + radius_x * math.cos(angle), y + radius_y * math.sin(angle)) for angle in angles), role)


_OBJECT_SHAPES: dict[str, list[Shape]] = {
    "cat": [
        _polygon(0, (-0.62, -0.25), (-0.5, -0.95), (-0.1, -0.5)),
        _polygon(0, (0.62, -0.25), (0.5, -0.95), (0.1, -0.5)),
        _ellipse(0, 0.1, 0.68, 0.62, 0),
        _ellipse(-0.27, 0, 0.12, 0.14, 2),
        _ellipse(0.27, 0, 0.12, 0.14, 2),
        _polygon(1, (-0.12, 0.25), (0.12, 0.25), (0, 0.42)),
    ],
    "fish": [
        _polygon(1, (0.35, 0), (0.95, -0.5), (0.95, 0.5)),
        _ellipse(-0.15, 0, 0.7, 0.42, 0),
        _polygon(1, (-0.2, -0.38), (0.2, -0.75), (0.25, -0.3)),
        _ellipse(-0.5, -0.08, 0.1, 0.1, 2),
    ],
    "bird": [
        _polygon(1, (0.3, 0.1), (0.95, 0.05), (0.9, 0.4)),
        _ellipse(0, 0.2, 0.55, 0.42, 0),
        _ellipse(-0.42, -0.32, 0.3, 0.3, 0),
        _polygon(2, (-0.7, -0.4), (-1.0, -0.25), (-0.68, -0.18)),
        _polygon(1, (-0.15, 0.1), (0.4, -0.1), (0.3, 0.42)),
        _ellipse(-0.45, -0.38, 0.07, 0.07, 2),
        _box(-0.1, 0.6, -0.02, 0.95, 2),
        _box(0.14, 0.6, 0.22, 0.95, 2),
    ],
    "flower": [_box(-0.06, 0.1, 0.06, 1.0, 1), _polygon(1, (0, 0.8), (0.45, 0.5), (0.3, 0.8))],  # plus petals
    "tree": [
        _box(-0.14, 0.4, 0.14, 1.0, 2),
        _polygon(0, (-0.75, 0.5), (0.75, 0.5), (0, -0.2)),
        _polygon(0, (-0.6, 0.08), (0.6, 0.08), (0, -0.6)),
        _polygon(0, (-0.42, -0.35), (0.42, -0.35), (0, -1.0)),
    ],
    "cactus": [
        Shape(
            (
                *((-0.17, 0.8), (-0.17, 0.42), (-0.7, 0.42), (-0.7, -0.35), (-0.42, -0.35), (-0.42, 0.12)),
                *((-0.17, 0.12), (-0.17, -0.85), (0, -0.98), (0.17, -0.85), (0.17, -0.12), (0.42, -0.12)),
                *((0.42, -0.65), (0.7, -0.65), (0.7, 0.18), (0.17, 0.18), (0.17, 0.8)),
            ),
            0,
        ),
        _polygon(1, (-0.5, 0.65), (0.5, 0.65), (0.35, 0.98), (-0.35, 0.98)),
    ],
    "house": [
        _box(-0.65, -0.1, 0.65, 0.85, 0),
        _polygon(1, (-0.85, -0.1), (0.85, -0.1), (0, -0.85)),
        _box(-0.15, 0.35, 0.15, 0.85, 2),
        _box(0.28, 0.1, 0.52, 0.35, 2),
    ],
    "tower": [
        _box(-0.32, -0.55, 0.32, 0.95, 0),
        _box(-0.45, -0.75, 0.45, -0.45, 1),
        _box(-0.45, -0.98, -0.22, -0.7, 1),
        _box(-0.11, -0.98, 0.11, -0.7, 1),
        _box(0.22, -0.98, 0.45, -0.7, 1),
        _box(-0.1, -0.2, 0.1, 0.1, 2),
        _box(-0.1, 0.35, 0.1, 0.65, 2),
    ],
    "bridge": [
        _polygon(1, (-0.98, 0.3), (-0.5, -0.7), (-0.5, -0.45), (-0.85, 0.3)),
        _polygon(1, (0.98, 0.3), (0.5, -0.7), (0.5, -0.45), (0.85, 0.3)),
        _polygon(1, (-0.5, -0.7), (0, 0.1), (0.5, -0.7), (0.5, -0.45), (0, 0.3), (-0.5, -0.45)),
        _box(-0.6, -0.8, -0.4, 0.9, 2),
        _box(0.4, -0.8, 0.6, 0.9, 2),
        _box(-1.0, 0.25, 1.0, 0.5, 0),
    ],
    "car": [
        _polygon(1, (-0.5, -0.05), (-0.3, -0.5), (0.3, -0.5), (0.55, -0.05)),
        _box(-0.95, -0.08, 0.95, 0.4, 0),
        _ellipse(-0.5, 0.4, 0.24, 0.24, 2),
        _ellipse(0.5, 0.4, 0.24, 0.24, 2),
    ],
    "boat": [
        _polygon(0, (-0.9, 0.3), (0.9, 0.3), (0.55, 0.8), (-0.6, 0.8)),
        _box(-0.05, -0.9, 0.05, 0.3, 2),
        _polygon(1, (0.1, -0.85), (0.1, 0.15), (0.8, 0.15)),
        _polygon(1, (-0.12, -0.6), (-0.12, 0.15), (-0.6, 0.15)),
    ],
    "rocket": [
        _polygon(1, (-0.28, 0.3), (-0.65, 0.85), (-0.2, 0.7)),
        _polygon(1, (0.28, 0.3), (0.65, 0.85), (0.2, 0.7)),
        _polygon(2, (-0.15, 0.7), (0.15, 0.7), (0, 1.05)),
        _polygon(0, (-0.3, 0.7), (-0.32, -0.3), (0, -1.0), (0.32, -0.3), (0.3, 0.7)),
        _ellipse(0, -0.15, 0.15, 0.15, 2),
    ],
}


def _place(shapes: list[Shape], rng: np.random.Generator) -> list[Shape]:
    """The shapes in sheet pixels, slightly moved, rotated and stretched."""
    size = rng.uniform(0.84, 0.95) * SHEET / 2
    angle = rng.uniform(-0.06, 0.06)
    x, y = SHEET / 2 + rng.uniform(-4, 4, size=2)
    stretch = rng.uniform(0.96, 1.04)
    cos, sin = math.cos(angle), math.sin(angle)

    def place(point: Point) -> Point:
        across, down = point[0] * stretch * size, point[1] / stretch * size
        return float(x + cos * across - sin * down), float(y + sin * across + cos * down)

    return [Shape(tuple(place(point) for point in shape.points), shape.role) for shape in shapes]


# Styles: a painter takes shapes in sheet pixels and a hue in [0, 1], and returns uint8 [32, 32, 3].


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def _scale_down(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet.resize((WORLD.image_size, WORLD.image_size), Image.Resampling.BOX))


def _fill(
    sheet: Image.Image, shapes: list[Shape], fills: tuple[Colour, ...], lines: tuple[Colour, ...] = (), width: int = 0
) -> None:
    """Paint the shapes by role, each with its outline when `width` is not 0."""
    pen = ImageDraw.Draw(sheet)
    for shape in shapes:
        pen.polygon(shape.points, fill=fills[shape.role])
        if width:
            pen.line([*shape.points, *shape.points[:2]], fill=lines[shape.role], width=width)


def _natural(shapes: list[Shape], hue: float, rng: np.random.Generator) -> np.ndarray:
    sky = np.array(_colour(rng.uniform(0.52, 0.62), rng.uniform(0.2, 0.4), 0.95))
    ground = np.array(_colour(rng.uniform(0.2, 0.35), rng.uniform(0.25, 0.45), rng.uniform(0.6, 0.75)))
    down = np.linspace(0, 1, SHEET)[:, None, None]
    gradient = (sky * (1 - down) + ground * down) * np.ones((SHEET, SHEET, 1))  # [128, 128, 3]
    sheet = Image.fromarray(gradient.astype(np.uint8))
    _fill(sheet, shapes, (_colour(hue, 0.55, 0.75), _colour(hue + 0.33, 0.5, 0.6), _colour(hue + 0.6, 0.5, 0.25)))
    return _scale_down(sheet)


def _sketch(shapes: list[Shape], hue: float, rng: np.random.Generator) -> np.ndarray:
    paper, ink = int(rng.integers(228, 251)), int(rng.integers(20, 71))
    wash = paper - int(rng.integers(10, 41))
    sheet = Image.new("RGB", (SHEET, SHEET), (paper, paper, paper - 12))
    _fill(sheet, shapes, ((wash, wash, wash - 8),) * 3, ((ink, ink, ink),) * 3, width=5)
    return _scale_down(sheet)


def _neon(shapes: list[Shape], hue: float, rng: np.random.Generator) -> np.ndarray:
    dark = int(rng.integers(0, 25))
    night = (dark, dark // 2, dark + 12)
    sheet = Image.new("RGB", (SHEET, SHEET), night)
    _fill(sheet, shapes, (night,) * 3, tuple(_colour(hue + shift, 0.8, 1) for shift in (0, 0.33, 0.6)), width=6)
    glow = np.asarray(sheet.filter(ImageFilter.GaussianBlur(6)), np.float32)
    lit = np.clip(np.asarray(sheet, np.float32) + glow, 0, 255).astype(np.uint8)
    return _scale_down(Image.fromarray(lit))


def _popart(shapes: list[Shape], hue: float, rng: np.random.Generator) -> np.ndarray:
    sheet = Image.new("RGB", (SHEET, SHEET), _colour(hue + 0.43, 0.55, 1))
    fills = (_colour(hue, 0.95, 1), _colour(hue + 0.23, 0.9, 0.9), (255, 255, 255))
    _fill(sheet, shapes, fills, ((0, 0, 0),) * 3, width=7)
    return _scale_down(sheet)


def _mosaic(shapes: list[Shape], hue: float, rng: np.random.Generator) -> np.ndarray:
    sheet = Image.new("RGB", (SHEET, SHEET), _colour(hue + 0.6, 0.35, 0.85))
    _fill(sheet, shapes, (_colour(hue, 0.7, 0.7), _colour(hue + 0.33, 0.65, 0.6), _colour(hue + 0.6, 0.8, 0.35)))
    num_tiles = WORLD.image_size // TILE
    shades = np.kron(rng.uniform(0.95, 1.05, (num_tiles, num_tiles, 1)), np.ones((TILE, TILE, 1)))  # [32, 32, 1]
    pixels = _scale_down(sheet) * shades
    pixels[::TILE] = pixels[::TILE] * 0.25 + 40
    pixels[:, ::TILE] = pixels[:, ::TILE] * 0.25 + 40
    return np.clip(pixels, 0, 255).astype(np.uint8)


_PAINTERS = {"natural": _natural, "sketch": _sketch, "neon": _neon, "popart": _popart, "mosaic": _mosaic}
assert tuple(_PAINTERS) == WORLD.styles and tuple(_OBJECT_SHAPES) == WORLD.objects

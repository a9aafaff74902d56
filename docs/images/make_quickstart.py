"""Draws quickstart.png from a run folder of the quickstart: `python docs/images/make_quickstart.py RUN_FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TARGETS, KEPT = ("cat", "house", "car"), ("bird", "tower", "boat")
STYLES = ("natural", "sketch", "neon", "popart")
SIDE, GAP, MARGIN, TOP = 64, 4, 96, 40  # pixels


def draw(run: Path) -> Image.Image:
    """Two rows, the base model's images above the last stage's, with equal seeds: first the targets, then kept
    objects.
    """
    stages = {"before": run / "evaluation" / "before", "after": sorted((run / "evaluation").glob("after-*"))[-1]}
    font = ImageFont.load_default(15)
    columns = [(name, style) for names in (TARGETS, KEPT) for name in names for style in STYLES[:2]]
    width = MARGIN + len(columns) * (SIDE + GAP) + 2 * GAP
    sheet = Image.new("RGB", (width, TOP + 2 * (SIDE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, folder) in enumerate(stages.items()):
        y = TOP + row * (SIDE + GAP)
        pen.text((8, y + SIDE // 2 - 8), label, fill="#1d1f23", font=font)
        for column, (name, style) in enumerate(columns):
            x = MARGIN + column * (SIDE + GAP) + (2 * GAP if column >= len(columns) // 2 else 0)
            image = Image.open(folder / "images" / f"{name}--{style}.png").resize(
                (SIDE, SIDE), Image.Resampling.NEAREST
            )
            sheet.paste(image, (x, y))
            if row == 0 and column % 2 == 0:
                word = f"forget: {name}" if name in TARGETS else f"keep: {name}"
                pen.text((x, 12), word, fill="#c4512d" if name in TARGETS else "#1d1f23", font=font)
    return sheet


if __name__ == "__main__":
    draw(Path(sys.argv[1])).save(Path(__file__).with_name("quickstart.png"), optimize=True)

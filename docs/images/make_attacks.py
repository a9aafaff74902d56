"""Draws attacks.png from an attacked run folder: `python docs/images/make_attacks.py RUN_FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROWS = ("plain", "completion", "inpaint", "inversion", "unlearn_diff_atk")
SIDE, GAP, MARGIN, TOP = 64, 8, 120, 28  # pixels
SEEN = "#c4512d"


def draw(run: Path) -> Image.Image:
    """A row for every attack, a column for every prompt; framed where the classifier sees the concept."""
    found = {name: cases(run / "attacks", name) for name in ROWS}
    columns = list(found["plain"])
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (MARGIN + len(columns) * (SIDE + GAP), TOP + len(ROWS) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (concept, *_) in enumerate(columns):
        pen.text((MARGIN + column * (SIDE + GAP), 8), concept, fill="#1d1f23", font=font)
    for row, name in enumerate(ROWS):
        y = TOP + row * (SIDE + GAP)
        pen.text((8, y + SIDE // 2 - 8), "no attack" if name == "plain" else name, fill="#1d1f23", font=font)
        for column, key in enumerate(columns):
            x = MARGIN + column * (SIDE + GAP)
            case = found[name][key] if found[name][key]["image"] else found["plain"][key]  # it succeeds plainly
            if any(attempt["seen"] for attempt in case["attempts"]):
                pen.rectangle((x - 3, y - 3, x + SIDE + 2, y + SIDE + 2), fill=SEEN)
            image = Image.open(run / "attacks" / case["image"]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
    return sheet


def cases(folder: Path, name: str) -> dict[tuple[str, str, int], dict]:
    """The cases of an attack, in the order of the configuration."""
    pieces = [json.loads(file.read_bytes()) for file in sorted((folder / name).glob("*.json"))]
    return {(case["concept"], case["prompt"], case["seed"]): case for piece in pieces for case in piece["cases"]}


if __name__ == "__main__":
    draw(Path(sys.argv[1])).save(Path(__file__).with_name("attacks.png"), optimize=True)

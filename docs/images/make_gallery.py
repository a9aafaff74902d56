"""Draws gallery-forgotten.png from a run folder of the gallery: `python docs/images/make_gallery.py RUN_FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sculpt_dist.config.load import read_run_config
from sculpt_dist.data.prompt_files import read_prompts
from sculpt_dist.data.prompts import naming
from sculpt_dist.worlds.gallery.world import WORLD

SIDE, GAP, MARGIN, TOP = 64, 4, 64, 44  # pixels


def columns(run: Path) -> tuple[list[str], list[str]]:
    """(the targets, an object beside each of them: the first of its superclass that is no target and is not held)."""
    config = read_run_config(run / "config.yaml")
    targets = [concept["target"] for concept in config["concepts"]]
    text = (
        "\n".join(line.prompt for line in read_prompts(config["hold"]["prompts"])) if config["hold"]["prompts"] else ""
    )
    kept: list[str] = []
    for target in targets:
        members = WORLD.superclasses[WORLD.superclass_of[target]]
        kept.append(next(m for m in members if m not in (*targets, *kept) and not naming(m).search(text)))
    return targets, kept


def draw(run: Path) -> Image.Image:
    """The base model's images above those after the last concept, with equal seeds and styles in turn."""
    stages = {"before": run / "evaluation" / "before", "after": sorted((run / "evaluation").glob("after-*"))[-1]}
    targets, kept = columns(run)
    font = ImageFont.load_default(12)
    half = len(targets) * (SIDE + GAP) + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + 2 * half, TOP + 2 * (SIDE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, label in enumerate(stages):
        pen.text((8, TOP + row * (SIDE + GAP) + SIDE // 2 - 8), label, fill="#1d1f23", font=font)
    for block, (word, names, color) in enumerate((("forget", targets, "#c4512d"), ("keep", kept, "#1d1f23"))):
        pen.text((MARGIN + block * half, 4), word, fill=color, font=ImageFont.load_default(15))
        for column, name in enumerate(names):
            x = MARGIN + block * half + column * (SIDE + GAP)
            pen.text((x, 26), name, fill=color, font=font)
            for row, folder in enumerate(stages.values()):
                found = [folder / "images" / f"{name}--{style}.png" for style in WORLD.styles]
                found = found[column % len(found) :] + found[: column % len(found)]
                sheet.paste(Image.open(next(file for file in found if file.exists())), (x, TOP + row * (SIDE + GAP)))
    return sheet


if __name__ == "__main__":
    draw(Path(sys.argv[1])).save(Path(__file__).with_name("gallery-forgotten.png"), optimize=True)

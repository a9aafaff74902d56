"""The sample grid of a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from handmade_run import draw
from PIL import Image

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.report.grid import read_grid


def test_the_grid_shows_targets_first_then_the_order_of_the_evaluation(tmp_path: Path) -> None:
    draw(tmp_path / "before", 0, 32, ("natural", "neon"), objects=("cat", "chain_saw", "boat"))
    draw(tmp_path / "after", 2, 32, ("natural",), objects=("cat", "chain_saw"))
    grid = read_grid(
        tmp_path / "before", tmp_path / "after", names=("boat", "cat", "Chain saw"), targets=("Chain saw", "neon")
    )
    rows = [row for band in grid.bands for row in band]
    assert [(row.name, row.is_target) for row in rows] == [("Chain saw", True), ("boat", False), ("cat", False)]
    assert grid.styles == ["neon", "natural"] and grid.style_is_target == [True, False]
    assert [picture is None for picture in rows[1].sides[1]] == [True, True], "boat has no image after"
    assert [picture is None for picture in rows[2].sides[1]] == [True, False]


def test_tiny_images_are_enlarged_without_smoothing_and_large_ones_are_smoothed(tmp_path: Path) -> None:
    for side in (32, 512):
        draw(tmp_path / f"{side}", 0, side, ("none",), objects=("cat",))
        grid = read_grid(tmp_path / f"{side}", None, names=(), targets=("cat",))
        thumb = grid.bands[0][0].sides[0][0]
        assert thumb.size == (192, 192) and grid.is_tiny is (side == 32)
    draw(tmp_path / "sharp", 0, 32, ("none",), objects=("cat",))
    thumb = read_grid(tmp_path / "sharp", None, names=(), targets=()).bands[0][0].sides[0][0]
    with Image.open(tmp_path / "sharp" / "cat--none.png") as image:
        assert np.array_equal(np.asarray(thumb), np.asarray(image.convert("RGB")).repeat(6, 0).repeat(6, 1))


def test_an_image_that_is_too_large_or_of_another_type_is_refused_and_a_link_to_a_device_is_no_image(
    tmp_path: Path,
) -> None:
    (tmp_path / "boat--none.png").symlink_to("/dev/zero")
    assert read_grid(tmp_path, None, names=(), targets=()) is None
    Image.new("1", (6000, 5000)).save(tmp_path / "cat--none.png")
    with pytest.raises(RunFolderError, match=r"cat--none\.png is damaged \(6000 x 5000 pixels, over the limit"):
        read_grid(tmp_path, None, names=(), targets=())
    Image.new("RGB", (8, 8)).save(tmp_path / "cat--none.png", "TIFF")
    with pytest.raises(RunFolderError, match=r"cat--none\.png is damaged \(cannot identify image"):
        read_grid(tmp_path, None, names=(), targets=())


def test_the_grid_limits_objects_and_styles_and_reserves_places_for_other_than_targets(tmp_path: Path) -> None:
    names = [f"thing {at:02d}" for at in range(20)]
    draw(tmp_path / "before", 0, 8, [f"style {at}" for at in range(9)], objects=names)
    grid = read_grid(tmp_path / "before", None, names=names, targets=names[:15])
    rows = [row for band in grid.bands for row in band]
    assert (len(rows), grid.num_shown, grid.num_objects, len(grid.styles), grid.num_styles) == (12, 12, 20, 6, 9)
    assert [row.name for row in rows if not row.is_target] == names[15:19]


def test_pages_of_images_hold_every_object_once_targets_first(tmp_path: Path) -> None:
    names = [f"thing {at:02d}" for at in range(30)]
    draw(tmp_path / "before", 0, 8, ["neon"], objects=names)
    pages = [read_grid(tmp_path / "before", None, names=names, targets=names[-2:], page=page) for page in (0, 1)]
    rows = [[row.name for band in page.bands for row in band] for page in pages if page is not None]
    assert [len(of_page) for of_page in rows] == [24, 6] and rows[0][:3] == [*names[-2:], names[0]]
    assert sorted(rows[0] + rows[1]) == names

"""The pages in a real browser, on a phone (390 px) and a desktop (1280 px), if Chromium is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comparison_page import write_comparison

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
GIVEN = "--headless=new --no-sandbox --disable-gpu --allow-file-access-from-files --virtual-time-budget=9000".split()
MEASURE = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, regions = [];
    for (const region of page.querySelectorAll(".scroll:has(tbody th)")) {
      const head = region.querySelector("tbody th"), at = () => head.getBoundingClientRect();
      const room = region.scrollWidth - region.clientWidth;
      region.scrollLeft = room;
      regions.push({
        name: region.getAttribute("aria-label"), focus: region.tabIndex, room: room,
        frozen: Math.abs(at().left - region.getBoundingClientRect().left) < 1, share: at().width / region.clientWidth,
        shown: [...region.querySelectorAll("tbody tr:first-child td")].length,
      });
      region.scrollLeft = 0;
    }
    const hint = page.querySelector(".hint");
    found[frame.id] = {
      width: page.documentElement.scrollWidth, regions: regions,
      hint: hint && page.defaultView.getComputedStyle(hint).display, ran: frame.contentWindow.ran === 1,
    };
  }
  document.title = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def measured(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Chromium makes of the report and of a comparison, by page and width."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("pages")
    pages = {"report": finished / "report" / "report.html", "comparison": write_comparison(folder / "comparison")}
    bare = "<script>var ran = 1</script>"
    for name, text in (("bare", bare), ("guarded", pages["report"].read_text().replace("</body>", f"{bare}</body>"))):
        pages[name] = folder / f"{name}.html"
        pages[name].write_text(text)
    frames = "".join(
        f'<iframe id="{name} {width}" src="{page.as_uri()}" width="{width}" height="900"></iframe>'
        for name, page in pages.items()
        for width in (390, 1280)
    )
    (folder / "outer.html").write_text(f"<script>{MEASURE}</script>{frames}")
    profile, outer = f"--user-data-dir={folder / 'profile'}", (folder / "outer.html").as_uri()
    command = [CHROMIUM, *GIVEN, profile, "--dump-dom", outer]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search("<title>(.*?)</title>", printed)
    assert title, printed[-500:]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.mark.parametrize("page", ["report", "comparison"])
def test_only_the_tables_scroll_sideways_and_their_first_column_stays(measured: dict[str, Any], page: str) -> None:
    for width in (390, 1280):
        found = measured[f"{page} {width}"]
        assert found["width"] <= width, "the page itself scrolls sideways"
        assert found["regions"] and all(region["focus"] == 0 for region in found["regions"])
        for region in found["regions"]:
            assert region["frozen"], (width, region)
            assert region["share"] < 0.4, (width, region)
    phone = measured[f"{page} 390"]
    assert any(region["room"] > 0 for region in phone["regions"]) and phone["hint"] == "block"


def test_the_policy_of_a_page_keeps_a_script_from_running(measured: dict[str, Any]) -> None:
    assert measured["bare 390"]["ran"] and not measured["guarded 390"]["ran"]

"""The report of a handmade run folder: its files, also for unfinished runs."""

from __future__ import annotations

from pathlib import Path

from handmade_run import Page, edit_json, read_report, write_run
from PIL import Image

from sculpt_dist.report.report import write_report


def test_every_figure_is_a_picture_that_is_not_blank(finished: Path) -> None:
    for name in ("grid", "loss", "mask", "relapse", "scores"):
        with Image.open(finished / "report" / f"{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 300, name
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10, name
    assert not list((finished / "report").glob(".*")), "a partial file was left behind"


def test_a_run_without_evaluation_reports_curves_and_cost(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for path in sorted((folder / "evaluation").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "evaluation").rmdir()
    page = Page(write_report(folder))
    assert page.count("img") == 2
    assert "Not evaluated." in page.words and "CRA" not in page.words
    report = read_report(folder)
    assert report["relapse"] == [[None, None], [None, None]]
    assert (
        report["after"]["UA"] is None and report["before"]["CRA_ci95"] is None and report["seconds"]["total"] == 104.5
    )
    assert sorted(path.name for path in (folder / "report").iterdir()) == [
        "loss.png",
        "mask.png",
        "report.html",
        "report.json",
    ]


def test_the_report_of_an_unfinished_run_shows_what_exists(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "costs.json", "manifest.json"):
        (folder / name).unlink()
    for stage in ("after-00", "after-01"):
        (folder / "evaluation" / stage / "scores.json").unlink()
    page = Page(write_report(folder))
    assert "only the base model has scores" in page.words
    report = read_report(folder)
    assert report["before"]["UA"] == 0.019 and report["after"]["UA"] is None
    assert report["peak_memory_bytes"] is None and report["weights"] == {"total": None, "trained": None, "open": None}
    assert report["cpu_seconds"] == {"prepare": None, "train": None} and report["config"] is None


def test_a_new_report_replaces_the_earlier_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_report(folder)
    edit_json(folder / "costs.json", ranks=4)
    write_report(folder)
    assert read_report(folder)["ranks"] == 4

"""The numbers of report.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from handmade_run import Page, edit_config, edit_json, read_report, score_set, write_run

from sculpt_dist.report.report import write_report


def expected_scores(stage: int) -> dict[str, Any]:
    def kept(members: dict[str, Any]) -> dict[str, Any]:
        missing = {f"{name}{of}": None for name in ("IRA_near", "IRA_far", "IRA_held", "CTA") for of in ("", "_ci95")}
        return missing | {name: value for name, value in members.items() if name not in ("objects", "styles")}

    witness = dict.fromkeys(kept(score_set(stage)))
    return {**kept(score_set(stage)), "paraphrased": kept(score_set(stage, worse=0.01)), "witness": witness}


def test_report_json_holds_the_scores_and_costs_of_the_run(finished: Path) -> None:
    assert read_report(finished) == {
        "model": "models/canvas-sd15",
        "method": "dm_cal",
        "config": "c" * 64,
        "finished": True,
        "notes": [],
        "ranks": 2,
        "before": expected_scores(0),
        "after": expected_scores(2),
        "concepts": [
            {"target": "cat", "superclass": "animal", "kind": "object", **expected_scores(1)},
            {"target": "car", "superclass": "vehicle", "kind": "object", **expected_scores(2)},
        ],
        "relapse": [[0.0, 0.965], [0.031, 0.027]],
        "seconds": {"prepare": 21.5, "train": 48.25, "evaluate": 30.0, "total": 104.5},
        "cpu_seconds": {"prepare": 40.0, "train": 95.5},
        "passes": {"prepare": 4608, "train": 25200},
        "peak_memory_bytes": [1288490188, 1181116006],
        "weights": {"total": 1780000, "trained": 122880, "open": 61440},
        "bytes_communicated": 123456789,
        "attacks": {},
        "guard": None,
    }
    assert read_report(finished)["after"]["UA"] == 0.971 and read_report(finished)["after"]["UA_ci95"] == [0.951, 0.991]


def test_relapse_has_one_row_per_step_and_null_where_a_step_was_not_evaluated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", targets=("cat", "car"))
    concepts = [{"target": name, "superclass": "thing", "kind": "object"} for name in ("Cat", "car", "boat")]
    edit_config(folder, concepts=concepts)
    write_report(folder)
    report = read_report(folder)
    assert report["relapse"] == [[0.0, 0.965, None], [0.031, 0.027, None], [None, None, None]]
    assert report["after"]["UA"] == 0.971, "the last stage that was evaluated"
    assert report["concepts"][2]["UA"] is None and report["concepts"][2]["paraphrased"]["IRA_ci95"] is None
    words = Page(folder / "report" / "report.html").words
    assert "Evaluated so far: 2 of 3 concepts." in words and "after car" in words and "after boat" not in words


def test_a_score_that_is_null_or_nan_is_null_and_shown_as_not_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for stage in ("before", "after-00", "after-01"):
        path = folder / "evaluation" / stage / "scores.json"
        plain = json.loads(path.read_text())["plain"] | {"CRA": None, "CRA_ci95": None, "SA": math.nan, "SA_ci95": None}
        edit_json(path, plain=plain, paraphrased=None)
    page = Page(write_report(folder))
    report = read_report(folder)
    assert report["after"]["CRA"] is None and report["after"]["SA"] is None and report["after"]["IRA"] == 0.963
    assert report["after"]["paraphrased"]["UA"] is None
    assert page.words.count("not measured") == 2 and "paraphrased prompts" not in page.words

"""What commands say at their end, as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_run(folder: Path, report: dict[str, Any]) -> None:
    """The scores of a finished run, and where its results lie."""
    from sculpt_dist.report import seen_counts

    table = Table(title=f"forgotten: {', '.join(concept['target'] for concept in report['concepts'])}")
    for heading in ("", "UA", "IRA", "CRA", "SA"):
        table.add_column(heading)

    def row(label: str, scores: dict | None) -> None:
        cells = ["-" if scores is None or scores.get(n) is None else f"{scores[n]:.3f}" for n in ("UA", "IRA", "CRA", "SA")]
        table.add_row(label, *cells)

    if report["after"]["UA"] is not None:
        row("before", report["before"])
        for concept in report["concepts"]:
            row(f"after {concept['target']}", concept)
        if report["after"].get("paraphrased"):
            row("after, paraphrased", report["after"]["paraphrased"])
        Console().print(table)
        for name, now, images, then in seen_counts(report):
            print(f"{name} is seen in {now} of {images} images" + ("" if then is None else f", {then} before"))
    print(f"model:  {folder / 'model'}\nreport: {folder / 'report' / 'report.html'}")


def print_check(found: dict[str, Any]) -> None:
    """What `check.check_run` found."""
    table = Table(show_header=False)
    rows = {
        "net": f"{found['net']}, {found['parameters']:,} parameters",
        "stored weights": "fit" if found["compared_weights"] else "not there, so not compared",
        "a rank's latents": found["latents"],
        "a rank's tokens": found["tokens"],
        "image": found["image"],
    }
    if "trainable" in found:  # not of a closed form
        rows |= {
            "trainable": f"{found['trainable']:,} in {found['matrices']} matrices",
            "a rank's optimizer shard": f"{found['shard']:,} elements",
            "micro-batch of a rank": found["micro_batch"],
            "steps per concept": found["steps"],
        }
    for label, value in rows.items():
        table.add_row(label, str(value))
    Console().print(table)


def print_figures(found: dict[str, Any], as_json: bool) -> None:
    """Figures of a benchmark, as a table or as one line of JSON."""
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)

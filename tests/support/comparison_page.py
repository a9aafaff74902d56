"""The page of a comparison of methods with long names, in all columns."""

from __future__ import annotations

from pathlib import Path

from sculpt_dist.config.experiments import Comparison
from sculpt_dist.experiments.table_files import Block, as_page
from sculpt_dist.experiments.tables import SCORES, Line, Score


def write_comparison(folder: Path, name: str = "concept_ablation_qkvo", images: tuple[Path, ...] = ()) -> Path:
    """Write compare.html and return its path; `name` is that of one of its methods and targets."""
    score = Score(0.938, (0.839, 1.0), -0.204, (-0.312, -0.107))
    lines = [
        Line(
            name=method,
            note="all of the cross-attention, not the paper's",
            seeds=(0, 1),
            scores=dict.fromkeys(SCORES, score),
            targets={"cat": 0.9, name: 0.8, "car": None},
            relapse=0.007,
            fid=37.62,
            kid=13.4759,
            extra={"clip_score": 27.1},
            passes=9936.0,
            cpu_seconds=12.5,
            peak_memory=1234.0,
            trained=200_704,
            stored=0.8,
            images=images,
        )
        for method in ("dm_cal", name)
    ]
    page = as_page(Comparison(against="dm_cal", notes=[f"a note on {name}"]), [Block("Three objects", "sd15", lines)])
    folder.mkdir(parents=True)
    (folder / "compare.html").write_text(page)
    return folder / "compare.html"

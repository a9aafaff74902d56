"""Detectors written against the old module keep working for one release."""

import sys
from pathlib import Path

import pytest
import torch

import sculpt_dist.metrics.base as old
from sculpt_dist.evaluation.classifiers import base as new
from sculpt_dist.evaluation.classifiers.base import load_classifier

DETECTOR = """
from sculpt_dist.metrics.base import Classifier, Verdict

class Dark(Classifier):
    def classify(self, images):
        return Verdict((images.float().mean((1, 2, 3)) > 127).long() - 1, None)
"""


@pytest.mark.parametrize("name", ["Classifier", "Verdict"])
def test_the_old_name_is_the_moved_class_and_warns(name: str) -> None:
    with pytest.warns(
        DeprecationWarning, match=f"sculpt_dist.metrics.base.{name} moved: import {name} from sculpt_dist"
    ):
        assert getattr(old, name) is getattr(new, name)


def test_names_that_never_moved_are_missing() -> None:
    assert dir(old) == ["Classifier", "Verdict"]
    with pytest.raises(AttributeError, match="module 'sculpt_dist.metrics.base' has no attribute 'Metric'"):
        _ = old.Metric


def test_a_detector_written_against_the_old_module_still_classifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old_style_detector.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(DeprecationWarning, match="moved"):
        detector = load_classifier("own:old_style_detector:Dark", ["light"], [])
    sys.modules.pop("old_style_detector")
    images = torch.stack([torch.full((3, 2, 2), level, dtype=torch.uint8) for level in (250, 5)])
    assert detector.classify(images).objects.tolist() == [0, -1]

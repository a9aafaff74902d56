"""What a checkpoint records of the concepts before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.run.folder import check_checkpoint, finished_concepts

TARGETS = [f"thing {number}" for number in range(1000)]


def check(state: dict, targets: list[str]) -> bool:
    return check_checkpoint(Path("step-990"), {"config": "a", **state}, {"config": "a"}, False, targets)


def test_its_size_does_not_grow_with_their_number():
    sizes = [len(json.dumps(finished_concepts(TARGETS[:number]))) for number in (20, 990)]
    assert sizes[1] - sizes[0] < 50


def test_another_order_of_any_of_them_is_refused():
    state = {"concept": 990, **finished_concepts(TARGETS[:990])}
    assert check(state, TARGETS) is False and check(state, [*TARGETS, "another"]) is False
    swapped = ["thing 1", "thing 0", *TARGETS[2:]]
    with pytest.raises(RunFolderError, match=r"has finished 990 concepts, the last of them thing 989, and .* 994 more"):
        check(state, swapped)
    with pytest.raises(RunFolderError, match="has finished 990 concepts"):
        check(state, TARGETS[:500])


def test_a_checkpoint_of_an_earlier_version_names_them_all():
    assert check({"concept": 30, "finished": TARGETS[:30]}, TARGETS) is False
    with pytest.raises(RunFolderError, match=r"has finished thing 0, thing 1, and .* begins with thing 1"):
        check({"concept": 2, "finished": TARGETS[:2]}, TARGETS[1:3])

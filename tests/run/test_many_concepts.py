"""A run of more concepts than its records could name or its configuration's reader would take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sculpt_dist.config.schema import Concept, RunConfig, RunFolderConfig, TrainConfig
from sculpt_dist.core.errors import RunFolderError
from sculpt_dist.run.export import write_card
from sculpt_dist.run.folder import check_checkpoint, claim_folder, finished_concepts, release_folder

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


def test_the_folder_of_a_thousand_concepts_is_known_again_and_gets_a_card(tmp_path):
    """OmegaConf reads at most 10,000 nodes of a yaml file."""
    group = SimpleNamespace(on_first=lambda work: work())
    concepts = [Concept(target, "animal") for target in TARGETS]
    config = RunConfig(concepts=concepts, run=RunFolderConfig(str(tmp_path / "run")))
    folder = claim_folder(config, group)
    release_folder(folder)
    (folder / "checkpoints").mkdir()
    claim_folder(config, group)
    release_folder(folder)
    with pytest.raises(RunFolderError, match=r"another configuration \(train.lr: 3e-06 there, 0.5 here\)"):
        claim_folder(replace(config, train=TrainConfig(lr=0.5)), group)
    write_card(folder, SimpleNamespace(pipeline_options=dict, folder=tmp_path), tmp_path)
    assert "| thing 999 | object | animal |" in (tmp_path / "README.md").read_text()

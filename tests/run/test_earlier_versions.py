"""What an earlier version wrote stays valid: a run folder written at commit 7538fe4 resumes, and fingerprints hold."""

from __future__ import annotations

import json
import tarfile

import pytest
from harness import PROJECT, sculpt

from sculpt_dist.config.load import load_config
from sculpt_dist.run.fingerprint import config_fingerprint

FIXTURE = PROJECT / "tests" / "fixtures" / "run-7538fe4"
EARLIER = json.loads(FIXTURE.with_suffix(".json").read_text())
FULL_SIZE = ("presets", "sd15", "sdxl", "sana")  # folders of configurations whose model.path the user gives
CONSTANT_RATE = {  # presets that follow their paper's constant learning rate since then: train.schedule is another
    f"configs/presets/{name}.yaml"
    for name in (
        "base concept_ablation-object esd-nudity esd-object esd-style kscu-instance kscu-nudity kscu-object kscu-style "
        "kscu-sana-instance kscu-sana-nudity kscu-sana-object kscu-sana-style rgd-object salun-object uce-object"
    ).split()
}


def test_a_run_that_an_earlier_version_stopped_resumes_within_its_concept(tmp_path):
    with tarfile.open(FIXTURE.with_suffix(".tar.gz")) as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / "run"
    shards = {path: path.read_bytes() for path in folder.rglob("*.tar")}
    config = folder / "config.yaml"
    sculpt("unlearn", str(config), f"run.folder={folder}")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["concept"], line["step"]) for line in found] == [
        (line["concept"], line["step"]) for line in EARLIER["metrics"]
    ]
    for now, then in zip(found, EARLIER["metrics"]):
        assert now["terms"] == pytest.approx(then["terms"], rel=1e-4)
        assert (now.get("open"), now.get("swapped")) == (then.get("open"), then.get("swapped"))
    assert {path: path.read_bytes() for path in folder.rglob("*.tar")} == shards, "samples were drawn again"
    assert "resumes from step-001-000005" in (folder / "log.txt").read_text()
    assert (folder / "model" / "model_index.json").is_file()


@pytest.mark.parametrize("file", sorted(set(EARLIER["fingerprints"]) - CONSTANT_RATE))
def test_the_fingerprint_of_a_shipped_configuration_is_unchanged(file):
    given = ["model.path=/models/m"] if file.split("/")[1] in FULL_SIZE else []
    assert config_fingerprint(load_config(PROJECT / file, given)) == EARLIER["fingerprints"][file]

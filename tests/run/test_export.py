"""The export writes each byte once, and reads none again."""

from __future__ import annotations

import pytest
import torch
from harness import PROJECT
from runs import bytes_read

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.core.files import file_sha256
from sculpt_dist.engine.group import Group
from sculpt_dist.run.export import export_model

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"


@pytest.fixture(scope="module")
def group() -> Group:
    return Group(60)


def test_an_exported_model_is_not_read_again_for_its_checksums(group, tmp_path):
    backbone = Backbone(ASSETS, torch.float32, group.device)
    changed = {name: value + 1 for name, value in backbone.stored_weights() if name.endswith("to_k.weight")}
    assert backbone.in_stored_order(reversed(changed)) == list(changed)
    export_model("float32", backbone, [], tmp_path / "first" / "model", group)  # reads the modules that it imports
    before = bytes_read()
    export_model("float32", backbone, changed.items(), tmp_path / "model", group)
    read = bytes_read() - before
    lines = (tmp_path / "model" / "CHECKSUMS").read_text().splitlines()
    files = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    large = [tmp_path / "model" / name for name in files if name.endswith(".safetensors")]
    assert all(file_sha256(tmp_path / "model" / name) == sha256 for name, sha256 in files.items())
    assert len(large) == 3 and read < sum(file.stat().st_size for file in large) / 10, read


def test_changed_weights_in_another_order_are_refused(group, tmp_path):
    backbone = Backbone(ASSETS, torch.float32, group.device)
    changed = [(name, value) for name, value in backbone.stored_weights() if name.endswith("to_k.weight")]
    with pytest.raises(ValueError, match="not come in the order of the stored weights"):
        export_model("float32", backbone, reversed(changed), tmp_path / "model", group)
    assert not (tmp_path / "model").exists()

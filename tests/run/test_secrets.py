"""Passwords and values of the environment stay out of messages and files, also where a run fails."""

from __future__ import annotations

import shutil

import pytest
from harness import PROJECT, SMALL, sculpt

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.files import append_line
from sculpt_dist.run.sequence import run_sequence

ASSETS = PROJECT / "sculpt_dist/assets/canvas/sd15"
TOKEN, CANARY = "hf-T0KEN-of-a-user", "canary-in-a-cage"


@pytest.mark.parametrize("key", ["model.path", "evaluate.clip", "track.name", "concepts[0].target", "method.note"])
def test_an_address_with_a_password_is_refused_without_repeating_it(key):
    one = "concepts=[{target: cat, superclass: animal}]"
    for user in (TOKEN, f"me:{TOKEN}"):
        with pytest.raises(ConfigError, match=r"=https://\*\*\*@host/x: holds a password or token") as told:
            load_config(None, [one, f"{key}=https://{user}@host/x"])
        assert TOKEN not in str(told.value)
    with pytest.raises(ConfigError) as told:
        load_config(None, [f"train.lr=https://me:{TOKEN}@host/x"])
    assert TOKEN not in str(told.value)


def test_a_run_refused_for_a_password_leaves_no_folder_and_does_not_print_it(canvas_config, tmp_path):
    given = [f"model.path=https://me:{TOKEN}@host/x", f"run.folder={tmp_path / 'run'}"]
    assert TOKEN not in sculpt("unlearn", canvas_config, *given, code=2) and not (tmp_path / "run").exists()


def test_the_value_of_a_variable_is_in_no_message_and_no_file_of_a_run_that_fails(canvas_config, tmp_path, monkeypatch):
    models, run = tmp_path / CANARY, tmp_path / "run"
    shutil.copytree(ASSETS, models / "sd15")
    weights = models / "sd15" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setenv("MODELS", str(models))
    config = load_config(PROJECT / canvas_config, [*SMALL, "model.path=${oc.env:MODELS}/sd15", f"run.folder={run}"])
    with pytest.raises(
        ModelError, match=r"^\$\{oc.env:MODELS\}/sd15/unet/diffusion_pytorch_model.safetensors: "
    ) as told:
        run_sequence(config)
    written = {file.name: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert {"config.yaml", "log.txt"} <= set(written) and b"failed: ModelError: ${oc.env:MODELS}/" in written["log.txt"]
    assert CANARY not in str(told.value) and not [name for name, held in written.items() if CANARY.encode() in held]
    append_line(tmp_path / "log.txt", f"W&B at https://me:{TOKEN}@host, {models}/other")
    assert "at https://***@host, ${oc.env:MODELS}/other" in (tmp_path / "log.txt").read_text()

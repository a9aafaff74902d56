"""Laws of whole runs: one rank equals two, gradient accumulation, NaN on one rank, golden losses, the seam's other kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, SMALL, launch, sculpt
from safetensors.torch import load_file

WORKERS = PROJECT / "tests" / "workers"
QUICK = [*SMALL, "evaluate.enabled=false"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, canvas_config):
    folder = tmp_path_factory.mktemp("alone") / "run"
    sculpt("unlearn", canvas_config, *QUICK, f"run.folder={folder}")
    return folder


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(2, []), (1, ["train.accumulate=2"]), (2, ["train.accumulate=2", "engine.stage=3", "train.workers=1"]), (2, ["engine.stage=0"])],
    ids=str,
)
def test_ranks_accumulation_stage_and_workers_do_not_change_the_run(alone, canvas_config, tmp_path, ranks, overrides):
    sculpt("unlearn", canvas_config, *QUICK, *overrides, f"run.folder={tmp_path / 'run'}", ranks=ranks)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-3)
    a, b = weights(alone), weights(tmp_path / "run")
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    assert all(".attn2." in name for name in moved)
    difference = torch.cat([(a[name] - b[name]).abs().flatten() for name in a if ".attn2.to_" in name])
    assert float((difference > 1e-4).float().mean()) <= 1e-3  # a weight whose mask flips differs by up to lr a step


def test_bf16_runs_to_the_end(canvas_config, tmp_path):
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        sculpt("unlearn", canvas_config, *QUICK, f"engine.stage={stage}", "engine.precision=bf16", f"run.folder={folder}", ranks=2)
        assert torch.isfinite(torch.tensor(losses(folder))).all()


GOLDEN = PROJECT / "tests" / "golden" / "losses.json"


def test_golden_losses_of_the_first_updates(alone, request):
    told = losses(alone)[:7]  # 2 of collecting, 5 updates
    known = json.loads(GOLDEN.read_text())
    if request.config.getoption("--refresh-golden"):
        known["dm_cal sd15"] = told
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
    assert told == pytest.approx(known["dm_cal sd15"], rel=1e-4)


def test_nan_on_one_rank_stops_all_at_the_same_step_and_the_checkpoint_stays(canvas_config, tmp_path):
    arguments = [canvas_config, *QUICK, "train.checkpoint_every=0.001", f"run.folder={tmp_path / 'run'}"]
    printed = launch(2, str(WORKERS / "nan_on_one_rank.py"), *arguments, code=2)
    assert printed.count("NonFiniteError: the loss is not finite") == 2 and "rank 1: forget nan" in printed
    assert printed.count("at update 3") == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2 and not (tmp_path / "run" / "model").exists()
    sculpt("unlearn", *arguments, ranks=2)
    assert len(losses(tmp_path / "run")) == 16


def test_published_behaviour_does_not_train_on_distillation(canvas_config, tmp_path):
    sculpt("unlearn", canvas_config, *QUICK, "method.reference_compat=true", f"run.folder={tmp_path / 'run'}")
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["terms"]["distill"] == 0.0 for entry in entries if entry["phase"] == "train")


@pytest.mark.parametrize("kind", ["adapter", "groups", "editor"])
def test_the_seam_carries_adapters_loss_groups_and_editors(alone, canvas_config, tmp_path, kind):
    printed = launch(2, str(WORKERS / "other_methods.py"), kind, canvas_config, *QUICK, f"run.folder={tmp_path / 'run'}")
    told = json.loads(printed.strip().splitlines()[-1])
    base = load_file(PROJECT / "sculpt_dist/assets/canvas/sd15/unet/diffusion_pytorch_model.safetensors")
    result = weights(tmp_path / "run")
    assert result.keys() == base.keys()  # an adapter is merged: a plain folder in every case
    changed = {name for name in base if not torch.equal(base[name].float(), result[name])}
    if kind == "adapter":
        assert len(changed) == 8 and all(name.endswith(("to_k.weight", "to_v.weight")) for name in changed)
        name = sorted(changed)[0]
        assert torch.linalg.matrix_rank(result[name] - base[name].float(), atol=1e-5) <= 2
    elif kind == "groups":  # two groups joined by a plain sum are one loss
        assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-3)
        assert told["combined"] == 12
    else:
        assert changed == {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"}


def test_an_adapter_merges_as_peft_merges_it():
    from sculpt_dist.backbones.sd15 import Backbone

    backbone = Backbone.load(PROJECT / "sculpt_dist/assets/canvas/sd15", torch.float32, torch.device("cpu"))
    names = backbone.add_adapter({"r": 2, "lora_alpha": 6, "target_modules": r".*attn2\.to_[kv]", "init_lora_weights": False}, seed=3)
    ours = dict(backbone.merged((name, backbone.net.get_parameter(name).detach()) for name in names))
    backbone.net.fuse_lora()
    assert len(ours) == 8
    for name, tensor in ours.items():
        theirs = backbone.net.get_parameter(name.replace(".weight", ".base_layer.weight"))
        torch.testing.assert_close(tensor, theirs.detach(), rtol=1e-5, atol=1e-6)

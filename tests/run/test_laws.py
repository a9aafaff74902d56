"""Laws of whole runs: one rank equals two, gradient accumulation, NaN on one rank, golden losses, the seam's other
kinds.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import PROJECT, SMALL, TINY_RUN, launch, sculpt, weights
from safetensors.torch import load_file

from sculpt_dist.core.plugins import plugin, plugins

WORKERS = PROJECT / "tests" / "workers"
QUICK = [*SMALL, "evaluate.enabled=false"]
ONE_CONCEPT = "concepts=[{target: bird, superclass: animal}]"


ARCHS = plugins("sculpt_dist.backbones")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone_of(tmp_path_factory, canvas_config):
    """The run folder of a kind on one rank."""

    @cache
    def run(arch: str) -> Path:
        folder = tmp_path_factory.mktemp("alone") / arch
        sculpt("unlearn", canvas_config, *QUICK, f"model.arch={arch}", f"run.folder={folder}")
        return folder

    return run


@pytest.fixture(scope="module")
def alone(alone_of):
    return alone_of("sd15")


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, []),
        (1, ["train.accumulate=2"]),
        (2, ["train.accumulate=2", "engine.stage=3", "train.workers=1"]),
        (2, ["engine.stage=0"]),
    ],
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("sd15", ["engine.checkpointing=true"]),
        ("sana", ["engine.checkpointing=true", "engine.stage=3", "engine.moments=open"]),
    ],
    ids=str,
)
def test_computing_activations_again_does_not_change_the_run(alone_of, canvas_config, tmp_path, arch, overrides):
    sculpt("unlearn", canvas_config, *QUICK, *overrides, f"model.arch={arch}", f"run.folder={tmp_path / 'run'}")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone_of(arch)), rel=1e-4)


@pytest.mark.exhaustive  # minutes of compiling
@pytest.mark.parametrize("arch", ARCHS)
def test_a_compiled_net_gives_the_same_losses(alone_of, canvas_config, tmp_path, arch):
    sculpt(
        "unlearn",
        canvas_config,
        *QUICK,
        "engine.compile=true",
        f"model.arch={arch}",
        f"run.folder={tmp_path / 'run'}",
        timeout=1200,
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(alone_of(arch)), rel=1e-3)


@pytest.mark.two_ranks
@pytest.mark.slow
def test_on_stage_3_no_rank_ever_loads_the_whole_net(canvas_config, tmp_path):
    arguments = [*SMALL, "model.arch=sana", "engine.stage=3", f"run.folder={tmp_path / 'run'}"]
    launch(2, str(WORKERS / "never_whole.py"), canvas_config, *arguments)
    assert len(losses(tmp_path / "run")) == 16 and (tmp_path / "run" / "model").is_dir()
    launch(
        2,
        str(WORKERS / "never_whole.py"),
        canvas_config,
        *arguments,
        "engine.stage=2",
        f"run.folder={tmp_path / 'other'}",
        code=1,
    )


@pytest.mark.slow
def test_the_stages_agree_where_the_frozen_parts_are_rounded(canvas_config, tmp_path):
    for name, overrides in (("a", ["engine.stage=0"]), ("b", ["engine.stage=2"])):
        sculpt("unlearn", canvas_config, *QUICK, "model.dtype=bfloat16", *overrides, f"run.folder={tmp_path / name}")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


@pytest.mark.two_ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "ranks", "overrides"),
    [
        ("sana", 2, ["engine.stage=3", "train.workers=1"]),
        ("sdxl", 2, ["engine.stage=0", "train.accumulate=2"]),
        pytest.param("sdxl", 2, ["engine.stage=3", "train.workers=1"], marks=pytest.mark.exhaustive),
        pytest.param("sana", 2, ["engine.stage=0", "train.accumulate=2"], marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_ranks_and_stage_do_not_change_the_run_of_other_kinds(
    alone_of, canvas_config, tmp_path, arch, ranks, overrides
):
    sculpt(
        "unlearn",
        canvas_config,
        *QUICK,
        *overrides,
        f"model.arch={arch}",
        f"run.folder={tmp_path / 'run'}",
        ranks=ranks,
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(alone_of(arch)), rel=1e-3)
    a, b = weights(alone_of(arch)), weights(tmp_path / "run")
    difference = torch.cat([(a[name] - b[name]).abs().flatten() for name in a if ".attn2.to_" in name])
    assert float((difference > 1e-4).float().mean()) <= 1e-3


@pytest.mark.two_ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["sana", *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in ("sd15", "sdxl"))]
)
def test_bf16_runs_to_the_end(canvas_config, tmp_path, arch):
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        sculpt(
            "unlearn",
            canvas_config,
            *QUICK,
            f"model.arch={arch}",
            f"engine.stage={stage}",
            "engine.precision=bf16",
            f"run.folder={folder}",
            ranks=2,
        )
        assert torch.isfinite(torch.tensor(losses(folder))).all()


GOLDEN = PROJECT / "tests" / "golden" / "losses.json"


TRAINED = [
    name
    for name in plugins("sculpt_dist.methods")
    if plugin("sculpt_dist.methods", name, "method.name").Method.kind == "trains"
]


@pytest.mark.parametrize("arch", ARCHS)
def test_golden_losses_of_dm_cal(alone_of, arch, request):
    compare_with_golden({f"dm_cal {arch}": alone_of(arch)}, 1e-4, request.config.getoption("--refresh-golden"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_golden_losses_of_every_other_method(tmp_path, arch, request):
    folders = every_method(tmp_path, arch, 1, ["evaluate.attacks=[plain]", "attack.cases=1"])
    assert all((folder / "attacks" / "attacks.json").is_file() for folder in folders.values())
    compare_with_golden(folders, 1e-4, request.config.getoption("--refresh-golden"))


@pytest.mark.two_ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "stage"),
    [("sd15", 1), ("sdxl", 2), ("sana", 2), *(pytest.param(a, 3, marks=pytest.mark.exhaustive) for a in ARCHS)],
)
def test_two_ranks_have_the_losses_of_one_with_every_method(tmp_path, arch, stage):
    compare_with_golden(every_method(tmp_path, arch, 2, [f"engine.stage={stage}"]), 2e-3, refresh=False)


def every_method(folder: Path, arch: str, ranks: int, overrides: list[str]) -> dict[str, Path]:
    """Run all methods but dm_cal; run folders by "method arch"."""
    others = [name for name in TRAINED if name != "dm_cal"]
    script = str(WORKERS / "every_method.py")
    launch(ranks, script, str(folder), arch, ",".join(others), *overrides, timeout=600)
    return {f"{name} {arch}": folder / name for name in others}


def compare_with_golden(folders: dict[str, Path], tolerance: float, refresh: bool) -> None:
    """Compare the losses of the first updates of these runs with those on record, which `refresh` replaces first."""
    found = {name: losses(folder)[:7] for name, folder in folders.items()}
    if refresh:
        GOLDEN.write_text(json.dumps(json.loads(GOLDEN.read_text()) | found, indent=1, sort_keys=True) + "\n")
    known = json.loads(GOLDEN.read_text())
    assert {name: known[name] for name in found} == {
        name: pytest.approx(values, rel=tolerance) for name, values in found.items()
    }


@pytest.mark.two_ranks
@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 3))])
def test_nan_on_one_rank_stops_all_ranks_at_the_same_step_and_keeps_the_checkpoint(canvas_config, tmp_path, stage):
    arguments = [canvas_config, *QUICK, f"engine.stage={stage}"]
    arguments += ["train.checkpoint_every=0.001", "train.checkpoint_share=1"]
    arguments += ["train.background_save=false", f"run.folder={tmp_path / 'run'}"]
    printed = launch(2, str(WORKERS / "nan_on_one_rank.py"), *arguments, code=2)
    assert printed.count("NonFiniteError: the loss is not finite") == 2 and "rank 1: forget nan" in printed
    assert printed.count("at update 3") == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    assert (
        len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 2 and not (tmp_path / "run" / "model").exists()
    )
    sculpt("unlearn", *arguments, ranks=2)
    assert len(losses(tmp_path / "run")) == 16


def test_published_behaviour_does_not_train_on_distillation(canvas_config, tmp_path):
    sculpt("unlearn", canvas_config, *QUICK, "method.reference_compat=true", f"run.folder={tmp_path / 'run'}")
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["terms"]["distill"] == 0.0 for entry in entries if entry["phase"] == "train")


@pytest.mark.parametrize("kind", ["adapter", pytest.param("groups", marks=pytest.mark.slow), "editor"])
def test_the_method_interface_supports_adapters_loss_groups_and_editors(alone, canvas_config, tmp_path, kind):
    printed = launch(
        2, str(WORKERS / "other_methods.py"), kind, canvas_config, *QUICK, f"run.folder={tmp_path / 'run'}"
    )
    state = json.loads(printed.strip().splitlines()[-1])
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
        assert state["combined"] == 12
    else:
        assert changed == {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"}


def test_an_adapter_merges_as_peft_merges_it():
    from sculpt_dist.backbones.sd15 import Backbone

    backbone = Backbone(PROJECT / "sculpt_dist/assets/canvas/sd15", torch.float32, torch.device("cpu"))
    names = backbone.add_adapter(
        {"r": 2, "lora_alpha": 6, "target_modules": r".*attn2\.to_[kv]", "init_lora_weights": False}, seed=3
    )
    ours = dict(backbone.merged((name, backbone.net.get_parameter(name).detach()) for name in names))
    backbone.net.fuse_lora()
    assert len(ours) == 8
    for name, tensor in ours.items():
        theirs = backbone.net.get_parameter(name.replace(".weight", ".base_layer.weight"))
        torch.testing.assert_close(tensor, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "method", [pytest.param("dm_cal", marks=pytest.mark.slow), pytest.param("surgun", marks=pytest.mark.exhaustive)]
)
def test_stage_3_draws_the_same_with_whole_weights_and_sends_less(tmp_path, method):
    one = [ONE_CONCEPT, "prepare.samples=2", "train.steps=2", "train.batch=2", "evaluate.steps=6", "engine.stage=3"]
    one += ["evaluate.objects=[bird,boat]", "evaluate.styles=[neon]"]
    adapter = ["method.rank=4"] if method == "surgun" else []
    for draw in ("sharded", "whole"):
        settings = [*TINY_RUN, *one, *adapter, f"engine.draw={draw}", f"run.folder={tmp_path / draw}"]
        sculpt("unlearn", str(PROJECT / "configs" / "canvas" / f"{method}.yaml"), *settings, ranks=2)
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    kept = [path.relative_to(whole) for kind in ("*.png", "*.tar", "scores.json") for path in whole.rglob(kind)]
    assert len(kept) > 5
    for path in kept:
        assert (sharded / path).read_bytes() == (whole / path).read_bytes(), path
    found, expected = weights(whole), weights(sharded)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    costs = [json.loads((run / "costs.json").read_text()) for run in (sharded, whole)]
    assert costs[0]["passes"] == costs[1]["passes"]
    if method == "dm_cal":  # with few images a gather of all weights, once per stage, sends more than the sampler
        assert costs[1]["bytes_communicated"] < costs[0]["bytes_communicated"]

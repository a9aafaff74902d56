"""The main job for real: the command on one and two ranks, killed and called again, stopped, repeated, and with bad
input.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import PROJECT, SMALL, TINY_RUN, Ranks, python, rank_environment, sculpt, weights
from runs import LONGER, lines, passes, start, wait_for_step
from safetensors.torch import load_file

from sculpt_dist.config.checks import is_scored
from sculpt_dist.core.errors import StopRequested
from sculpt_dist.core.plugins import plugins

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas" / "sd15"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, canvas_config):
    """One finished run on two ranks, stage 2."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    printed = sculpt("unlearn", canvas_config, *SMALL, f"run.folder={folder}", ranks=2)
    return folder, printed


@pytest.mark.two_ranks
def test_a_run_writes_all_files_that_other_commands_read(finished):
    folder, printed = finished
    assert "after boat" in printed and str(folder / "report" / "report.html") in printed
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "manifest.json",
        "report/report.html",
        "report/report.json",
        "report/grid.png",
        "model/model_index.json",
        "model/README.md",
    ):
        assert (folder / name).is_file(), name
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    report = json.loads((folder / "report" / "report.json").read_text())
    for scores in (report["before"], report["after"], *report["concepts"]):
        for name in ("UA", "IRA", "CRA", "SA"):
            low, high = scores[f"{name}_ci95"]
            assert 0 <= low <= scores[name] <= high <= 1, name
    assert [concept["target"] for concept in report["concepts"]] == ["bird", "boat"]
    assert len(report["relapse"]) == 2 and all(len(row) == 2 for row in report["relapse"])
    assert set(report["seconds"]) == {"prepare", "train", "evaluate", "total"}
    assert len(report["peak_memory_bytes"]) == 2 and max(report["peak_memory_bytes"]) < 4e9
    assert report["weights"]["trained"] == 92160 and report["weights"]["open"] == 46080
    assert report["bytes_communicated"] > 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        set(manifest) == {"base", "config", "shards", "prompts", "code", "finished", "sha256"}
        and len(manifest["shards"]) == 4
    )


@pytest.mark.two_ranks
def test_the_export_loads_in_plain_diffusers_and_only_cross_attention_matrices_changed(finished):
    from diffusers import StableDiffusionPipeline

    folder, _ = finished
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    base = StableDiffusionPipeline.from_pretrained(ASSETS, torch_dtype=torch.float32)
    changed = {
        name
        for name, tensor in pipeline.unet.state_dict().items()
        if not torch.equal(tensor, base.unet.state_dict()[name])
    }
    assert changed and all(".attn2.to_" in name and name.endswith(".weight") for name in changed)
    image = pipeline("a photo of a fish", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert image.shape == (32, 32, 3)


@pytest.mark.two_ranks
def test_metrics_have_one_line_per_step(finished):
    folder, _ = finished
    entries = lines(folder)
    assert [(entry["concept"], entry["step"]) for entry in entries] == [(c, s) for c in range(2) for s in range(8)]
    assert [entry["phase"] for entry in entries[:8]] == ["collect"] * 2 + ["train"] * 6
    assert [entry["swapped"] > 0 if "swapped" in entry else False for entry in entries[:8]] == [False] * 3 + [
        True,
        False,
        True,
        False,
        False,
    ]
    assert all(entry["open"] == 46080 for entry in entries if entry["phase"] == "train")
    assert set(entries[-1]["terms"]) == {"forget", "retain", "distill"}


@pytest.mark.two_ranks
def test_a_second_call_of_a_finished_run_changes_nothing(finished, canvas_config):
    folder, _ = finished
    before, trained = weights(folder), len(lines(folder))
    sculpt("unlearn", canvas_config, *SMALL, f"run.folder={folder}", ranks=2)
    assert same(before, weights(folder)) and len(lines(folder)) == trained


@pytest.mark.two_ranks
def test_samples_do_not_depend_on_the_number_of_ranks(finished, canvas_config, tmp_path):
    folder, _ = finished
    sculpt("prepare", canvas_config, *SMALL, f"run.folder={tmp_path / 'one'}")
    shards = sorted(path.relative_to(folder) for path in (folder / "data").rglob("*.tar"))
    assert len(shards) == 8
    for shard in shards:
        assert (folder / shard).read_bytes() == (tmp_path / "one" / shard).read_bytes(), shard


@pytest.mark.two_ranks
def test_prepare_redraws_damaged_shards_and_reuses_the_rest(finished, canvas_config, tmp_path):
    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder / "data", copy / "data")
    shutil.copy(folder / "config.yaml", copy)
    shards = sorted(copy.rglob("*.tar"))
    whole = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}
    (shards[5].parent / "index.json").write_text("{")
    shards[0].write_bytes(shards[0].read_bytes()[:700])
    shards[3].unlink()
    sculpt("prepare", canvas_config, *SMALL, f"run.folder={copy}")
    for shard, (content, time_) in whole.items():
        assert shard.read_bytes() == content
        assert (shard.stat().st_mtime_ns == time_) == (shard not in (shards[0], shards[3]))
    for index in copy.rglob("index.json"):
        assert index.read_bytes() == (folder / index.relative_to(copy)).read_bytes()


def wait_until_still(folder: Path) -> int:
    """The number of logged steps, when no more are added."""
    before = -1
    while len(lines(folder)) != before:
        before = len(lines(folder))
        time.sleep(1.5)
    return before


@pytest.mark.two_ranks
@pytest.mark.exhaustive  # CI kills shorter runs, in tests/engine/checkpoints/test_kills.py
@pytest.mark.parametrize(
    ("arch", "stage"),
    [("sd15", 2), ("sd15", 3), ("sdxl", 2), ("sana", 2), ("sana", 3)],
)
def test_a_killed_run_resumes_to_the_same_weights(canvas_config, tmp_path, arch, stage):
    arguments = ["unlearn", canvas_config, *SMALL, *LONGER, f"model.arch={arch}", f"engine.stage={stage}"]
    process = start([*arguments, f"run.folder={tmp_path / 'killed'}"])
    wait_for_step(tmp_path / "killed", process, 1, 9)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stopped = wait_until_still(tmp_path / "killed")  # the ranks die with their launcher
    assert 41 <= stopped < 64 and not (tmp_path / "killed" / "model").exists()
    shutil.copytree(tmp_path / "killed" / "data", tmp_path / "straight" / "data")
    sculpt(*arguments, f"run.folder={tmp_path / 'killed'}", ranks=2)
    entries = [(entry["concept"], entry["step"]) for entry in lines(tmp_path / "killed")]
    assert len(set(entries)) == 64 and entries.count((0, 5)) == 1  # nothing of the finished concept was trained again
    (tmp_path / "straight" / "config.yaml").write_text((tmp_path / "killed" / "config.yaml").read_text())
    sculpt(*arguments, f"run.folder={tmp_path / 'straight'}", ranks=2)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "straight"))
    assert passes(tmp_path / "killed") == passes(tmp_path / "straight"), "a repeated step was counted twice"


@pytest.mark.slow
def test_a_checkpoint_restores_trajectories(tmp_path):
    """KSCU walks its latents on from update to update: stopped within a walk, the run goes on with them."""
    config, folder = str(PROJECT / "configs" / "canvas" / "kscu.yaml"), tmp_path / "run"
    one_walk = [
        "train.steps=40",
        "method.sampler_steps=40",
        "method.start=0",
        "concepts=[{target: bird, superclass: animal}]",
    ]
    arguments = [
        "-m",
        "sculpt_dist",
        "unlearn",
        config,
        "model.arch=sana",
        *TINY_RUN,
        *one_walk,
        "train.checkpoint_every=0",
        "evaluate.enabled=false",
    ]
    first = [python(), *arguments, f"run.folder={folder}"]
    process = subprocess.Popen(
        first, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(folder, process, 0, 4)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 75, printed
    assert 4 < len(lines(folder)) < 40
    sculpt(*arguments[2:], f"run.folder={folder}", ranks=1)
    sculpt(*arguments[2:], f"run.folder={tmp_path / 'straight'}", ranks=1)
    assert same(weights(folder), weights(tmp_path / "straight"))


def test_an_interrupted_run_saves_reports_it_and_resumes(canvas_config, tmp_path):
    arguments = [
        "-m",
        "sculpt_dist",
        "unlearn",
        canvas_config,
        *SMALL,
        *LONGER,
        "model.arch=sana",
        "train.checkpoint_every=0",
        f"run.folder={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(
        [python(), *arguments],
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(tmp_path / "run", process, 0, 5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 75, printed
    assert "stopped at 'bird', step" in printed and "Traceback" not in printed
    stopped = len(lines(tmp_path / "run"))
    sculpt(*arguments[2:], ranks=1)
    entries = [(entry["concept"], entry["step"]) for entry in lines(tmp_path / "run")]
    assert len(entries) == len(set(entries)) == 64 and 6 <= stopped < 64
    shutil.copytree(tmp_path / "run" / "data", tmp_path / "straight" / "data")
    sculpt(*arguments[2:-1], f"run.folder={tmp_path / 'straight'}")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    assert passes(tmp_path / "run") == passes(tmp_path / "straight")
    assert passes(tmp_path / "run")["train"] > 0 < passes(tmp_path / "run")["prepare"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_interrupted_while_drawing_stops_at_once_and_resumes(canvas_config, tmp_path, number):
    arguments = [
        "-m",
        "sculpt_dist",
        "prepare",
        canvas_config,
        *SMALL,
        "prepare.samples=400",
        f"run.folder={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(
        [python(), *arguments],
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list((tmp_path / "run").rglob("*.tar")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 75
        and "stopped at the samples of object bird target" in printed
        and "Traceback" not in printed
    )


def test_a_folder_in_use_is_refused_and_its_holder_named(canvas_config, tmp_path):
    folder = f"run.folder={tmp_path / 'run'}"
    call = ["unlearn", canvas_config, *SMALL, *LONGER, "model.arch=sana", folder]
    first = Ranks(1, "-m", "sculpt_dist", *call, output=tmp_path / "first.txt")
    wait_for_step(tmp_path / "run", first, 0, 1)
    assert f"in use by process {first.pids[0]}" in sculpt(*call, code=2)
    assert first.wait(200) == [0]


def test_from_python_in_six_lines_also_in_a_thread_and_with_numbers_of_numpy(tmp_path):
    import sculpt_dist

    def unlearn(folder: str = "run", steps: int = 3) -> sculpt_dist.Run:
        return sculpt_dist.unlearn(
            None,
            method="dm_cal",
            concepts=[{"target": "cat", "superclass": "animal"}],
            prepare={"samples": np.int64(4), "steps": 2, "guidance": np.float32(3.0)},
            train={"steps": steps, "batch": 2, "lr": np.float64(1e-3), "betas": np.array([0.9, 0.999])},
            mask={"collect": 1, "refresh": 0.5},
            evaluate={"enabled": False},
            run={"folder": tmp_path / folder},
        )

    with ThreadPoolExecutor(1) as pool:  # as servers and notebooks do
        run = pool.submit(unlearn, steps=3).result()
        (tmp_path / "stopped").mkdir()
        (tmp_path / "stopped" / "STOP").touch()
        with pytest.raises(StopRequested):
            pool.submit(unlearn, "stopped", steps=5000).result()
    assert (run.model / "model_index.json").is_file() and run.report["concepts"][0]["target"] == "cat"


def test_scores_are_made_after_the_chosen_concepts_and_always_of_the_base_and_at_the_end(tmp_path):
    import sculpt_dist

    run = sculpt_dist.unlearn(
        concepts=[{"target": name, "superclass": "animal"} for name in ("cat", "bird", "fish")],
        prepare={"samples": 2, "steps": 2},
        train={"steps": 2, "batch": 2},
        mask={"collect": 1, "refresh": 0},
        evaluate={
            "at": [2],
            "objects": ["car"],
            "styles": ["neon"],
            "images": 2,
            "steps": 1,
            "bootstrap": 5,
            "subset": 5,
        },
        run={"folder": tmp_path / "run"},
    )
    stages = sorted(path.name for path in (tmp_path / "run" / "evaluation").iterdir())
    assert stages == ["after-01", "after-02", "before"]
    drawn = [sum(run.report[stage]["images"].values()) for stage in ("before", "after")]
    assert drawn == [8, 8] and sum(run.report["concepts"][1]["images"].values()) == 5
    assert "<small>5 of 8 images</small>" in (tmp_path / "run" / "report" / "report.html").read_text()
    relapse = run.report["relapse"]
    assert relapse[0] == [None] * 3 and None not in [*relapse[1], *relapse[2]]
    assert run.report["after"]["UA"] is not None and run.report["concepts"][0]["UA"] is None


@pytest.mark.parametrize(
    ("at", "scored"), [("all", [0, 1, 2, 3, 4, 5]), ("last", [0, 5]), ("every:2", [0, 2, 4, 5]), ([1, 4], [0, 1, 4, 5])]
)
def test_the_stages_that_are_scored(at, scored):
    assert [done for done in range(6) if is_scored(at, done, 5)] == scored


def broken(tmp_path: Path, kind: str) -> str:
    model = tmp_path / "model"
    shutil.copytree(ASSETS, model)
    if kind == "a missing weight":
        from safetensors.torch import save_file

        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        content = load_file(file)
        del content["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
        save_file(content, file, {"format": "pt"})
    elif kind == "a cut weight file":
        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:100000])
    elif kind == "no pipeline":
        (model / "model_index.json").unlink()
    elif kind == "only pickles":
        (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")
    elif kind == "no component":
        shutil.rmtree(model / "text_encoder")
    elif kind == "no folder":
        return str(tmp_path / "nowhere")
    return str(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a missing weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight: stored none"),
        ("a cut weight file", "unet"),
        ("no pipeline", "no model_index.json"),
        ("only pickles", "holds pickled weights"),
        ("no component", "text_encoder"),
        ("no folder", "no such folder"),
    ],
)
def test_a_bad_model_is_refused_before_anything_is_drawn(canvas_config, tmp_path, kind, message):
    printed = sculpt(
        "unlearn",
        canvas_config,
        *SMALL,
        f"model.path={broken(tmp_path, kind)}",
        f"run.folder={tmp_path / 'run'}",
        code=2,
    )
    assert "ModelError" in printed and message in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.two_ranks
def test_another_runs_folder_is_refused_with_the_difference(finished, canvas_config):
    folder, _ = finished
    before = (folder / "config.yaml").read_text()
    printed = sculpt("unlearn", canvas_config, *SMALL, "train.lr=0.5", f"run.folder={folder}", code=2)
    assert (
        "train.lr: 0.001 there, 0.5 here" in printed
        and "--override" in printed
        and "--fresh" in printed
        and "Traceback" not in printed
    )
    assert (folder / "config.yaml").read_text() == before


def test_a_folder_with_other_files_is_refused(canvas_config, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    printed = sculpt("unlearn", canvas_config, *SMALL, f"run.folder={tmp_path}", "run.fresh=true", code=2)
    assert "thesis.txt" in printed and (tmp_path / "thesis.txt").exists()


def test_a_foreign_config_yaml_is_refused(canvas_config, tmp_path):
    (tmp_path / "config.yaml").write_text("name: my thesis")
    printed = sculpt("unlearn", canvas_config, *SMALL, f"run.folder={tmp_path}", "run.fresh=true", code=2)
    assert "not the configuration of a run" in printed and (tmp_path / "config.yaml").read_text() == "name: my thesis"


@pytest.mark.two_ranks
def test_a_checkpoint_that_was_changed_is_passed_over_or_refused(finished, canvas_config, tmp_path):
    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1] / "rank-1.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 4
    newest.write_bytes(content)
    printed = sculpt("export", canvas_config, *SMALL, f"run.folder={copy}")
    assert "rank-1.safetensors was changed or truncated" in printed and f"model: {copy / 'model'}" in printed
    for manifest in (copy / "checkpoints").rglob("manifest.json"):
        manifest.write_text("{}")
    printed = sculpt("export", canvas_config, *SMALL, f"run.folder={copy}", code=2)
    assert "no checkpoint can be trusted" in printed


def test_wrong_keys_end_with_code_2_and_one_line(canvas_config):
    printed = sculpt("unlearn", canvas_config, "trian.lr=1", code=2)
    assert printed.startswith("ConfigError: override 'trian.lr=1'") and len(printed.splitlines()) == 1


@pytest.mark.two_ranks
def test_batch_that_does_not_divide_is_refused(canvas_config, tmp_path):
    printed = sculpt(
        "unlearn", canvas_config, *SMALL, "train.batch=3", f"run.folder={tmp_path / 'run'}", ranks=2, code=2
    )
    assert "train.batch=3" in printed and "use a multiple of 2" in printed and not (tmp_path / "run").exists()


def test_a_mask_that_opens_nothing_is_refused(canvas_config, tmp_path):
    printed = sculpt("unlearn", canvas_config, *SMALL, "mask.keep=1e-9", f"run.folder={tmp_path / 'run'}", code=2)
    assert "mask.keep=1e-09: opens none of 92,160 weights" in printed


def test_overrides_may_be_left_out():
    assert "nowhere.yaml: there is no such configuration file" in sculpt("unlearn", "nowhere.yaml", code=2)


def style_cells() -> list:
    """Every method but dm_cal, which other tests run; those that train like ESD are run by hand."""
    like_esd = ("concept_ablation", "rgd", "salun")
    names = [name for name in plugins("sculpt_dist.methods") if name != "dm_cal"]
    return [
        pytest.param(name, marks=pytest.mark.exhaustive if name in like_esd else pytest.mark.slow) for name in names
    ]


@pytest.mark.parametrize("name", style_cells())
def test_every_method_forgets_a_style_after_an_object(tmp_path, name):
    concepts = "concepts=[{target: bird, superclass: animal},{target: neon, kind: style}]"
    sculpt(
        "unlearn",
        str(PROJECT / "configs" / "canvas" / f"{name}.yaml"),
        *TINY_RUN,
        concepts,
        "train.steps=2",
        f"run.folder={tmp_path / 'run'}",
    )
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert [concept["kind"] for concept in report["concepts"]] == ["object", "style"]
    assert report["after"]["UA"] is not None and report["weights"]["trained"] > 0


@pytest.mark.slow
def test_forty_concepts_are_forgotten_with_few_open_files(tmp_path):
    folder = tmp_path / "run"
    concepts = json.dumps([{"target": f"n{i}", "superclass": "animal"} for i in range(40)])
    given = [f"concepts={concepts}", 'prepare.prompts.object=["{concept}"]', "model.cut_prompts=true"]
    given += ["prepare.samples=2", "prepare.steps=1", "prepare.batch=1", "train.steps=2", "train.batch=2"]
    given += ["mask.collect=0", "mask.refresh=0", "mask.saliency=random", "train.checkpoint_every=0"]
    given += ["evaluate.enabled=false", f"run.folder={folder}"]
    limited = ["bash", "-c", 'ulimit -n 128; exec "$@"', "-", sys.executable, "-m", "sculpt_dist", "unlearn"]
    config = str(PROJECT / "configs" / "canvas" / "dm_cal.yaml")
    done = subprocess.run([*limited, config, *given], env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {"step-039-000000", "step-040-000000"}
    assert [(entry["concept"], entry["step"]) for entry in lines(folder)] == [(c, s) for c in range(40) for s in (0, 1)]
    assert len(json.loads((folder / "report" / "report.json").read_text())["concepts"]) == 40

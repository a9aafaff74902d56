"""Runs of guards: any number of ranks fits the same one, the export is the base with it, and commands heed it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from guarding import ASSETS, CONCEPTS, OPTIONS, QUICK
from harness import PROJECT, TINY_RUN, sculpt
from runs import passes

from sculpt_dist.core.files import file_sha256
from sculpt_dist.core.plugins import plugins
from sculpt_dist.guards import remove

CANVAS = PROJECT / "configs" / "canvas"
SMALL = [*TINY_RUN, *QUICK, CONCEPTS, "evaluate.objects=[cat,bird,boat]", "evaluate.styles=[neon]"]


def unlearn(name: str, folder: Path, *overrides: str, ranks: int = 1, code: int = 0) -> str:
    options = [*SMALL, *OPTIONS.get(name, []), *overrides, f"run.folder={folder}"]
    return sculpt("unlearn", str(CANVAS / f"{name}.yaml"), *options, ranks=ranks, code=code)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished run of AdaVD, and the arguments that name it in other commands."""
    folder = tmp_path_factory.mktemp("adavd") / "run"
    unlearn("adavd", folder)
    return folder, [str(CANVAS / "adavd.yaml"), *SMALL, f"run.folder={folder}"]


def files(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


@pytest.mark.two_ranks
@pytest.mark.parametrize(("name", "arch"), [("saeuron", "sd15"), ("sld", "sdxl"), ("adavd", "sana")])
def test_two_ranks_fit_and_score_the_same_guard_as_one(tmp_path, name, arch):
    for ranks in (1, 2):
        unlearn(name, tmp_path / str(ranks), f"model.arch={arch}", ranks=ranks)
    one, two = tmp_path / "1", tmp_path / "2"
    assert files(one / "guard") == files(two / "guard") == files(two / "model" / "guard")
    assert passes(one) == passes(two)
    assert scores(one / "evaluation" / "after-01")["plain"] == scores(two / "evaluation" / "after-01")["plain"]


def test_the_export_is_the_base_with_the_guard_and_all_of_it_has_checksums(finished):
    folder, _ = finished
    base = (path for path in (ASSETS / "sd15").rglob("*.safetensors"))
    assert all(file_sha256(p) == file_sha256(folder / "model" / p.relative_to(ASSETS / "sd15")) for p in base)
    listed = (folder / "model" / "CHECKSUMS").read_text()
    assert "guard/guard.safetensors" in listed and "guard/guard.json" in listed
    assert "as they were" in sculpt("verify", str(folder)) and "audit bundle" in sculpt("audit", str(folder))
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(folder / "model").unet is not None


def test_report_and_card_say_that_no_weight_is_changed(finished):
    folder, _ = finished
    report = json.loads((folder / "report" / "report.json").read_text())
    bytes_ = sum(path.stat().st_size for path in (folder / "guard").iterdir())
    assert report["guard"]["bytes"] == bytes_ < report["guard"]["model_bytes"]
    assert (report["weights"]["trained"], report["passes"]["train"]) == (0, 0)
    card = (folder / "model" / "README.md").read_text()
    assert "No weight was changed" in card and 'apply(pipeline, "path/to/this/folder")' in card
    assert "no weight is changed" in (folder / "report" / "report.html").read_text()


def test_the_snippet_of_the_card_draws_with_the_guard(finished):
    folder, _ = finished
    card = (folder / "model" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict = {}
    snippet = snippet.replace("path/to/this/folder", str(folder / "model"))
    exec(re.sub(r"(pipeline\(\".*?\")", r"\1, num_inference_steps=1", snippet), names)  # noqa: S102 (our own text)
    assert names["image"].size == (32, 32)
    remove(names["pipeline"])


def test_evaluate_scores_the_guarded_model_as_the_run_did(finished, tmp_path):
    folder, arguments = finished
    sculpt("evaluate", *arguments, "--output", str(tmp_path / "again"))
    of_run, again = scores(folder / "evaluation" / "after-01")["plain"], scores(tmp_path / "again")["plain"]
    assert again == of_run != scores(folder / "evaluation" / "before")["plain"]
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("guard", "CHECKSUMS"))
    sculpt("evaluate", *arguments, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "without"))
    assert scores(tmp_path / "without")["plain"]["UA"] == scores(folder / "evaluation" / "before")["plain"]["UA"]


def test_an_attack_meets_the_guard_and_so_does_a_copy_of_the_net(finished, tmp_path):
    _, arguments = finished
    attack = ["attack.names=[seeds,quantize]", "attack.cases=1", "attack.options.seeds.count=2", "evaluate.steps=6"]
    output = ["--output", str(tmp_path / "attacks")]
    sculpt("attack", *arguments, *attack, *output)
    found = json.loads((tmp_path / "attacks" / "attacks.json").read_text())["attacks"]
    assert found["plain"]["pre"] == 0.0 and found["quantize"]["post"] == 0.0, "the base model draws bird and boat"


def test_a_second_call_takes_the_guard_that_is_there_and_other_forms_are_refused(finished):
    folder, arguments = finished
    times = {path: path.stat().st_mtime_ns for path in (folder / "guard").iterdir()}
    sculpt("unlearn", *arguments)
    assert {path: path.stat().st_mtime_ns for path in (folder / "guard").iterdir()} == times
    assert "is a guard and changes no weight" in sculpt("export", *arguments, "--as", "lora", code=2)
    assert f"model: {folder / 'model'}" in sculpt("export", *arguments)


def test_no_run_starts_from_a_guarded_model(finished, tmp_path):
    folder, _ = finished
    printed = unlearn("adavd", tmp_path / "run", f"model.path={folder / 'model'}", code=2)
    assert "has a guard: start from the model that it was fitted to" in printed


def test_a_damaged_guard_is_refused_before_anything_is_drawn(finished, tmp_path):
    folder, arguments = finished
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "guard" / "guard.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    printed = sculpt("evaluate", *arguments, "--model", str(tmp_path / "model"), code=2)
    assert "guard.safetensors is damaged" in printed


def test_every_guard_has_a_configuration_for_the_canvas():
    assert all((CANVAS / f"{name}.yaml").is_file() for name in plugins("sculpt_dist.guards"))

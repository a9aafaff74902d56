"""Every attack on every kind of model: it brings back what is there, nothing that never was, and resumes bit for bit.

The positive control is the base model, the negative one a model that was trained without a single cat
(tests/fixtures/never_cat, from `sculpt-dist canvas build --without cat`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import PROJECT, TINIEST, sculpt
from safetensors.torch import load_file, save_file

from sculpt_dist.attacks.base import attack_names
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.run.attacking import attack_only
from sculpt_dist.worlds.find import shipped

NEVER_CAT = PROJECT / "tests" / "fixtures" / "never_cat"
CAT = [
    "concepts=[{target: cat, superclass: animal}]",
    "evaluate.images=1",
    "evaluate.paraphrase_images=0",
    "attack.cases=2",
    "attack.repeat=true",
]
FEWER = [  # images of the attacks that only draw: the light budgets but for these
    "attack.cases=1",
    "attack.options.seeds.count=15",
    "attack.options.noise.etas=[1.0, 1.34, 1.85]",
    "attack.options.resurgence.steps=[50]",
]
SHORT = [  # enough to run every line
    "evaluate.steps=4",
    "attack.options.seeds.count=2",
    "attack.options.noise={etas: [1.0, 1.85], scales: [1.04]}",
    "attack.options.completion.steps=[1]",
    "attack.options.paraphrase.misspellings=1",
    "attack.options.inversion={steps: 2, images: 2, batch: 2}",
    "attack.options.unlearn_diff_atk={times: 2, steps: 2, tokens: 2}",
    "attack.options.p4d={steps: 4, every: 2, tokens: 2}",
    "attack.options.ring_a_bell={generations: 2, population: 8, tokens: 3}",
    "attack.options.recall={times: 2, steps: 2}",
    "attack.options.resurgence={steps: [1, 2], images: 2, batch: 2}",
    "attack.options.leak.times=2",
]
MEASURES = {"leak", "relapse"}  # which judge no image
CANVAS = PROJECT / "configs" / "canvas" / "dm_cal.yaml"


def attacked(model: Path, folder: Path, *overrides: str) -> dict:
    found, where = attack_only(load_config(CANVAS, [*CAT, *overrides, f"run.folder={folder}"]), model, None, None)
    written = json.loads((where / "attacks.json").read_text())["attacks"]
    assert {name: written[name] for name in found["attacks"]} == found["attacks"]
    return found["attacks"]


def test_every_attack_brings_back_what_the_base_model_knows(tmp_path):
    rates = attacked(shipped("canvas", "sd15"), tmp_path, *FEWER)
    assert set(rates) == set(attack_names()) - {"relapse"}  # there is no run
    alone = {name: rate["classifier"]["alone"] for name, rate in rates.items() if name not in MEASURES}
    assert alone == dict.fromkeys(alone, 1.0)
    assert rates["seeds"]["post"] > 0.9 and rates["noise"]["post"] > 0.4
    assert rates["leak"]["scores"]["leak"] == rates["leak"]["scores"]["leak_original"] > 0.005
    assert all(rate["shown"][0]["seen"] for name, rate in rates.items() if name not in MEASURES)


def test_no_attack_finds_what_a_model_never_knew(tmp_path):
    rates = attacked(NEVER_CAT, tmp_path, *FEWER)
    posts = {name: rate["post"] for name, rate in rates.items() if name not in MEASURES}
    by_mistake = {name: post for name, post in posts.items() if post > 0}
    assert set(by_mistake) <= {"seeds", "noise", "completion"}, by_mistake  # some of their images are taken for a cat
    assert all(posts[name] < 0.1 for name in ("seeds", "noise"))
    more = attacked(NEVER_CAT, tmp_path, "attack.names=[completion]", "attack.cases=5")
    assert more["completion"]["post"] < 0.1  # of 15 images
    assert rates["leak"]["scores"]["leak"] < 0 < rates["leak"]["scores"]["leak_original"]


@pytest.mark.parametrize("arch", ["sdxl", "sana"])
def test_every_attack_runs_on_every_kind(tmp_path, arch):
    rates = attacked(shipped("canvas", arch), tmp_path, f"model.arch={arch}", *SHORT, "attack.cases=1")
    assert set(rates) == set(attack_names()) - {"relapse"}
    assert rates["plain"]["post"] is not None and rates["inversion"]["classifier"]["cases"] == 1
    assert rates["inversion"]["passes"] > 2 * 2 * 3 and rates["inversion"]["classifier"]["passes_to_success"] is None
    assert rates["resurgence"]["classifier"]["variants"].keys() == {"1 steps", "2 steps"}
    with_vectors = tmp_path / "attacks-model" / "inversion" / "0000.safetensors"
    assert len(load_file(with_vectors)) == (2 if arch == "sdxl" else 1)  # one for each text encoder


@pytest.mark.two_ranks
def test_a_killed_attack_goes_on_and_two_ranks_find_what_one_finds(tmp_path):
    options = [str(CANVAS), *CAT, *SHORT, "--model", str(NEVER_CAT)]
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    sculpt("attack", *options, f"run.folder={one}")
    sculpt("attack", *options, f"run.folder={two}", ranks=2)
    assert _results(two) == _results(one)
    shutil.copytree(one, again)  # as a kill leaves it: some pieces are written, one is half written, no rates
    pieces = sorted((again / "attacks-model").glob("*/*.json"))
    kept = pieces[: len(pieces) // 2]
    for piece in pieces[len(kept) :]:
        piece.unlink()
    kept[0].write_text(kept[0].read_text()[:40])
    (again / "attacks-model" / "attacks.json").unlink()
    before = kept[1].stat().st_mtime_ns
    sculpt("attack", *options, f"run.folder={again}")
    assert _results(again) == _results(one) and kept[1].stat().st_mtime_ns == before


def _results(folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / "attacks-model").rglob("*") if file.suffix in (".json", ".png", ".safetensors")]
    assert len(files) > 40
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_run_ends_with_attacks_and_its_report_shows_them(tmp_path, canvas_config):
    chosen = ["evaluate.attacks=[leak, relapse, noise]", *SHORT, "attack.cases=1"]
    sculpt("unlearn", canvas_config, *TINIEST, *chosen, f"run.folder={tmp_path}")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["attacks"]["attacks"]) == {"plain", "leak", "relapse", "noise"}
    scores = json.loads((tmp_path / "evaluation" / "after-00" / "scores.json").read_text())
    assert (
        report["attacks"]["attacks"]["relapse"]["scores"]["relapse_last"]
        == 1 - scores["plain"]["targets"]["bird"]["UA"]
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert "does the concept come back?" in page and page.count('alt="bird, noise') == 1
    again = sculpt("unlearn", canvas_config, *TINIEST, *SHORT, f"run.folder={tmp_path}")  # without them the same run
    assert "left alone" not in again
    sculpt(
        "attack", canvas_config, *TINIEST, *SHORT, "attack.names=[seeds]", "attack.cases=1", f"run.folder={tmp_path}"
    )
    assert "| seeds |" in (tmp_path / "model" / "README.md").read_text()
    verified = sculpt("verify", str(tmp_path))
    assert "as they were written" in verified
    image = next((tmp_path / "attacks" / "noise").glob("*.png"))
    image.write_bytes(image.read_bytes()[:-1])
    assert str(image) in sculpt("verify", str(tmp_path), code=2)


@pytest.mark.parametrize(
    ("overrides", "model", "kind", "words"),
    [
        (["attack.names=[relapse]"], NEVER_CAT, ConfigError, "leave out --model"),
        (["attack.options.sedes.count=1"], NEVER_CAT, ConfigError, "no such attack"),
        (["attack.prompt=a photo"], NEVER_CAT, ConfigError, "has no {concept}"),
        (["attack.prompt=a photo of a {concept} in neon style"], NEVER_CAT, ConfigError, "leaves room for 0 of 1"),
        (["attack.options.p4d.every=0"], NEVER_CAT, ConfigError, "p4d.every=0: must be greater than 0"),
        (["attack.options.resurgence.steps=[]"], NEVER_CAT, ConfigError, "resurgence.steps"),
        (["attack.budget=published", "attack.names=[ring_a_bell]"], NEVER_CAT, ConfigError, "leaves room for 8 of 16"),
        ([], Path("nowhere"), ModelError, "--model"),
        (["model.arch=sdxl"], NEVER_CAT, ModelError, "StableDiffusion"),
        (
            [
                "evaluate.classifier=gallery",
                "evaluate.objects=[cat]",
                "evaluate.styles=[noto]",
                "model.path=none",
                "attack.names=[leak]",
            ],
            NEVER_CAT,
            ModelError,
            "none",
        ),
        (
            ["evaluate.styles=[neon]", "evaluate.classifier=canvas", "concepts=[{target: piano, superclass: tool}]"],
            NEVER_CAT,
            ConfigError,
            "does not know 'piano'",
        ),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_anything_is_drawn(tmp_path, overrides, model, kind, words):
    with pytest.raises(kind, match=words):
        attacked(model, tmp_path, *overrides)
    assert not list(tmp_path.rglob("*.png"))


def test_an_original_of_another_model_is_refused(tmp_path):
    config = load_config(CANVAS, [*CAT, f"run.folder={tmp_path}"])
    with pytest.raises(ModelError, match="SanaPipeline"):
        attack_only(config, NEVER_CAT, shipped("canvas", "sana"), None)
    other = tmp_path / "other"
    shutil.copytree(NEVER_CAT, other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="its autoencoder is not that of"):
        attack_only(config, NEVER_CAT, other, None)


def test_attacks_with_gradients_are_refused_in_float16_and_work_in_bfloat16(tmp_path):
    with pytest.raises(ConfigError, match="underflow in model.dtype=float16"):
        attacked(NEVER_CAT, tmp_path, "model.dtype=float16", "attack.names=[inversion]")
    chosen = "attack.names=[inversion, p4d, unlearn_diff_atk, recall]"
    rates = attacked(NEVER_CAT, tmp_path, "model.dtype=bfloat16", chosen, *SHORT, "attack.cases=1")
    assert rates["inversion"]["post"] is not None
    vectors = load_file(tmp_path / "attacks-model" / "inversion" / "0000.safetensors")
    assert all(vector.isfinite().all() for vector in vectors.values())


def test_a_pipeline_with_another_sampler_is_attacked_too(tmp_path):
    euler = tmp_path / "euler"
    shutil.copytree(NEVER_CAT, euler)
    file = euler / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text()) | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    file.write_text(json.dumps(settings))
    chosen = "attack.names=[inpaint, completion, noise]"
    rates = attacked(euler, tmp_path, chosen, *SHORT, "attack.cases=1")
    assert all(rates[name]["post"] is not None for name in ("inpaint", "completion", "noise"))


def test_results_count_only_for_the_prompts_and_settings_that_made_them(tmp_path):
    chosen = ["attack.names=[seeds]", "attack.options.seeds.count=1", "evaluate.steps=2"]
    attacked(NEVER_CAT, tmp_path, *chosen)
    pieces = {file: file.stat().st_mtime_ns for file in (tmp_path / "attacks-model").glob("*/*.json")}
    assert len(pieces) == 4  # two of plain, two of seeds

    def redone() -> int:
        return sum(file.stat().st_mtime_ns != then for file, then in pieces.items())

    attacked(NEVER_CAT, tmp_path, *chosen, "attack.cases=3")  # a third prompt, and the two as before
    assert redone() == 0
    attacked(NEVER_CAT, tmp_path, *chosen, "attack.prompt=a picture of a {concept}")
    assert redone() == 4
    found = json.loads((tmp_path / "attacks-model" / "attacks.json").read_text())
    assert set(found["attacks"]) == {"plain", "seeds"}
    kept = attacked(
        NEVER_CAT, tmp_path, "attack.names=[paraphrase]", "evaluate.steps=2", "attack.prompt=a picture of a {concept}"
    )
    assert set(kept) == {"plain", "paraphrase"}
    found = json.loads((tmp_path / "attacks-model" / "attacks.json").read_text())
    assert set(found["attacks"]) == {"plain", "paraphrase", "seeds"}, "other attacks on the same model stay"


def test_the_witness_judges_what_the_classifier_steers(tmp_path):
    piano = ["concepts=[{target: piano, superclass: instrument}]", "attack.cases=1", "attack.repeat=true"]
    objects = ["evaluate.objects=[piano, guitar]", "evaluate.without=[]", "attack.names=[unlearn_diff_atk, seeds]"]
    config = load_config(
        PROJECT / "configs" / "gallery" / "dm_cal.yaml", [*piano, *objects, *SHORT, f"run.folder={tmp_path}"]
    )
    found, _ = attack_only(config, shipped("gallery", "sd15"), None, None)
    assert found["judges"] == {"classifier": "gallery", "witness": "gallery:witness"}
    rates = found["attacks"]
    assert {name: rate["judged_by"] for name, rate in rates.items()} == {
        "plain": "classifier",
        "seeds": "classifier",
        "unlearn_diff_atk": "witness",
    }
    assert all(rate["witness"]["cases"] == 1 for rate in rates.values())

"""The configuration: what merges, and what each mistake is told."""

from __future__ import annotations

import pytest
from harness import PROJECT
from omegaconf import OmegaConf
from setups import method_of

from sculpt_dist.config.checks import check, check_batch, normal
from sculpt_dist.config.load import load_config, to_yaml
from sculpt_dist.config.schema import Concept, PrepareConfig, RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.evaluation.requests import resolve_evaluation
from sculpt_dist.guards.base import Guard
from sculpt_dist.methods.base import Editor, Method

CONFIGS = sorted(
    file for file in (PROJECT / "configs").rglob("*.yaml") if file.parent.name not in ("compare", "sweeps")
)  # those are of other kinds


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: str(p.relative_to(PROJECT)))
def test_every_config_loads_with_its_method(file):
    path = [] if file.parent.name in ("canvas", "gallery") else ["model.path=/models/mine"]
    assert isinstance(method_of(load_config(file, path)), (Method, Editor, Guard))


def test_a_full_size_configuration_requires_model_path():
    with pytest.raises(ConfigError, match="model.path is empty"):
        load_config(PROJECT / "configs" / "sdxl" / "dm_cal.yaml")


def test_the_resolved_config_loads_to_the_same(tmp_path):
    config = load_config(
        PROJECT / "configs" / "canvas" / "dm_cal.yaml",
        ["train.lr=0.5", 'concepts=[{target: "a: b", superclass: c, prompts: ["x {concept}"]}]'],
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_later_values_override_earlier_ones(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {lr: 0.5, steps: 7}")
    config = load_config(tmp_path / "c.yaml", ["train.lr=0.25"])
    assert (config.train.lr, config.train.steps, config.train.batch) == (0.25, 7, 2)


CAT = "concepts=[{target: cat, superclass: animal}]"
MISTAKES = {
    "train.lrr=1": ("train.lrr", "Did you mean: 'lr'"),
    "trian.lr=1": ("trian", "'train'"),
    "train.steps=many": ("train.steps", "many"),
    "train.lr=-1": ("train.lr", "not negative"),
    "train.lr=nan": ("train.lr", "finite"),
    "train.steps=0": ("train.steps", "greater than 0"),
    "mask.keep=1.5": ("mask.keep", "at most 1"),
    "evaluate.objects=[cat, fish, Cat]": ("evaluate.objects", "'Cat' twice"),
    "mask.scope=rows": ("mask.scope", "matrix, global"),
    "engine.stage=4": ("engine.stage", "0, 1, 2, 3"),
    "lr": ("lr", "key=value"),
    "train.betas=[1.0,1.0]": ("train.betas", "below 1"),
    "run.folder=": ("run.folder", "str"),
    "concepts=[{target: cat, superclass: a, keep: ['']}]": ("concepts[0].keep", "empty"),
    "evaluate.objects=['']": ("evaluate.objects", "empty"),
    "concepts=[{target: cat, superclass: ' CAT '}]": ("concepts[0]", "broader"),
    "concepts=[{target: cat}]": ("concepts[0].superclass", "broader class"),
    "concepts=[{target: '', superclass: a}]": ("concepts[0].target", "empty"),
    "concepts=[{target: cat, superclss: a}]": ("superclss", "superclass"),
    "concepts=[{superclass: a}]": ("target", "missing"),
    "concepts=[{target: cat, superclass: a}, {target: Cat, superclass: b}]": ("concepts[1]", "twice"),
    "concepts=[{target: cat, superclass: a, prompts: ['a photo']}]": ("concepts[0].prompts", "{concept}"),
    "concepts=[{target: cat, superclass: a, prompts: []}]": ("concepts[0].prompts", "empty"),
    "concepts=[{target: cat, superclass: a, kind: thing}]": ("concepts[0].kind", "object or style"),
    "concepts=[{target: cat, superclass: a, keep: [cat]}]": ("concepts[0].keep", "target"),
    "prepare.prompts.object=['']": ("prepare.prompts.object", "{concept}"),
}


@pytest.mark.parametrize("override", MISTAKES, ids=str)
def test_a_mistake_is_named_with_what_to_do(override):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    for part in MISTAKES[override]:
        assert part in str(caught.value)


def test_bf16_below_stage_2_says_which_stage_to_use():
    with pytest.raises(ConfigError, match="engine.stage=2"):
        load_config(None, ["engine.precision=bf16", "engine.stage=1"])


def test_batch_that_does_not_divide_names_both_numbers_and_the_cure():
    with pytest.raises(ConfigError, match=r"train.batch=10 .* ranks 2 x train.accumulate 2: use a multiple of 4"):
        check_batch(load_config(None, ["train.batch=10", "train.accumulate=2"]), 2)


def test_unknown_method_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"Did you mean 'dm_cal'\? There are: .*dm_cal, doco"):
        method_of(load_config(None, ["method.name=dm_call"]))


def test_unknown_method_option_is_named():
    with pytest.raises(ConfigError, match="method.label_guidence.*label_guidance"):
        method_of(load_config(None, ["method.label_guidence=1"]))


@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_numbers_of_a_method_are_checked_too(value):
    with pytest.raises(ConfigError, match="method.retain_weight"):
        method_of(load_config(None, [f"method.retain_weight={value}"]))


@pytest.mark.parametrize("template", ["{concept}", "a painting in the style of {concept}"])
def test_a_style_free_prompt_that_would_be_empty_or_broken_off_is_refused(template):
    with pytest.raises(ConfigError, match="brackets"):
        concept_prompts(Concept("van gogh", kind="style", prompts=[template]), PrepareConfig())


def test_wrong_type_of_a_method_option_is_named():
    with pytest.raises(ConfigError, match="method.label_guidance.*strong"):
        method_of(load_config(None, ["method.label_guidance=strong"]))


@pytest.mark.parametrize("content", ["a: [", "- x", "train:\n\tlr: 1", "train: {lr: 1}\ntrain: {lr: 2}"])
def test_unreadable_yaml_names_the_file(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_home_folder_is_expanded_in_every_place_and_written_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = "run.folder model.path model.config prepare.images evaluate.reference evaluate.clip".split()
    config = load_config(None, [f"{key}=~/x" for key in keys])
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == f"{tmp_path}/x"
    assert str(tmp_path) not in to_yaml(config) and to_yaml(config).count("~/x") == len(keys)
    with pytest.raises(ConfigError, match="run.folder=~nosuchuser/r: there is no such user"):
        load_config(None, ["run.folder=~nosuchuser/r"])


@pytest.mark.parametrize("mark", ["\n", "\t", "\u200b", "\u202e", "\ufeff", "\x7f", "\u2028"])
def test_names_with_invisible_characters_are_refused(mark):
    name = f"ca{mark}t"
    for concept in ({"target": name, "superclass": "animal"}, {"target": "cat", "superclass": name}):
        with pytest.raises(ConfigError, match=r"concepts\[0\].*contains the invisible character U\+"):
            load_config(None, OmegaConf.create({"concepts": [concept]}))
    with pytest.raises(ConfigError, match="evaluate.objects.*invisible character"):
        load_config(None, OmegaConf.create({"evaluate": {"objects": [name]}}))


def test_a_target_that_is_the_superclass_of_another_is_refused():
    concepts = [{"target": "Animal", "superclass": "thing"}, {"target": "cat", "superclass": "animal"}]
    for order in (concepts, concepts[::-1]):
        with pytest.raises(ConfigError, match=r"superclass=animal is itself a target: 'cat' would turn into what is"):
            load_config(None, OmegaConf.create({"concepts": order}))


def test_one_word_in_two_forms_of_unicode_is_one_concept():
    concepts = [{"target": name, "superclass": "dish"} for name in ("caf\u00e9", "cafe\u0301")]
    with pytest.raises(ConfigError, match="is named twice"):
        load_config(None, OmegaConf.create({"concepts": concepts}))
    load_config(None, OmegaConf.create({"concepts": [{"target": "\u0645\u06cc\u200c\u062e", "superclass": "a"}]}))


def test_checks_compare_each_name_a_few_times_whatever_their_number():
    concepts = [Concept(f"thing {number}", "animal", keep=[f"other {number}"]) for number in range(500)]
    config = RunConfig(concepts=concepts)
    before = normal.cache_info()
    check(config)
    assert len(resolve_evaluation(config.evaluate, concepts).world.objects) == 12 + 1000
    after = normal.cache_info()
    assert after.hits + after.misses - before.hits - before.misses < 20 * len(concepts)

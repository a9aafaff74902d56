"""Text keeps its characters, in files and on the command line; other values are read by YAML 1.2's core schema."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sculpt_dist.config.load import load_config, to_yaml
from sculpt_dist.config.scalars import read_text
from sculpt_dist.core.errors import ConfigError

ODD_TEXTS = (
    "007 no on yes off y 1e3 24:00 2024_11_28 2024-11-28 1e10293 0x1F 0o17 .5 1. +3 -0 true TRUE .inf .nan 1_000 = << "
    "12e03 190:20:30 0b101"
).split()


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_key_of_text_keeps_its_characters(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    plain = f"'{text}'" if text in ("=", "<<") else text
    file.write_text(
        f"concepts: [{{target: {plain}, superclass: animal}}]\n"
        f"run: {{folder: {plain}}}\nmodel:\n  revision: {plain}\n"
        f"prepare:\n  prompts:\n    files: {{{plain}: {plain}}}\nevaluate:\n  objects: [{plain}]\n"
    )
    overrides = [f"concepts=[{{target: '{text}', superclass: a}}]", f"run.folder={text}", f"model.revision={text}"]
    from_file, given = load_config(file), load_config(None, overrides)
    assert from_file.evaluate.objects == [text]
    assert from_file.prepare.prompts.files == {text: text}
    for config in (from_file, given):
        assert (config.concepts[0].target, config.run.folder, config.model.revision) == (text, text, text)
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config))
        assert load_config(again) == config


def test_an_override_of_text_is_what_stands_behind_the_equals_sign() -> None:
    for text in ("runs/a #2", "a: b", "[x", "{x}", "- y", "'half", "*star", "&and", "%", "@", "a=b", " two  spaces "):
        assert load_config(None, [f"run.folder={text}"]).run.folder == text
    assert load_config(None, ['run.folder="a \\u00e9"']).run.folder == "a é"
    assert load_config(None, ["run.folder='null'"]).run.folder == "null"
    assert load_config(None, ["model.path=null"]).model.path is None


def test_what_is_not_text_is_read_by_the_core_schema() -> None:
    found = read_text("[1, -2, +3, 0x1F, 0o17, 1e3, .5, 1., .inf, -.INF, true, False, null, ~, '', no, 007, 1:30]", Any)
    numbers = (1, -2, 3, 31, 15, 1000.0, 0.5, 1.0, math.inf, -math.inf)
    assert found == [*numbers, True, False, None, None, "", "no", "007", "1:30"]
    assert math.isnan(read_text(".nan", Any))
    config = load_config(None, ["train.steps=007", "train.lr=1e-5", "train.background_save=false"])
    assert (config.train.steps, config.train.lr, config.train.background_save) == (7, 1e-5, False)


def test_anchors_and_merged_mappings_are_read() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 4}]}"
    assert read_text(text, Any) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2, "z": 4}}
    assert read_text(text, Any) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text", ["!!float abc", "!!timestamp 2020", "!!python/object:os.system {}", "a: 1\na: 2", "? [1]\n: 2"]
)
def test_tags_doubled_keys_and_keys_that_are_no_names_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: is not readable as yaml"):
        load_config(tmp_path / "run.yaml")


def test_characters_in_jsons_way_are_joined_and_halves_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"evaluate": {"paraphrases": ["{object} \\ud83d\\ude00"]}}')
    assert load_config(tmp_path / "a.json").evaluate.paraphrases == ["{object} \U0001f600"]
    for text in ('"\\ud800"', "'???'", "???"):
        (tmp_path / "b.yaml").write_text(f"run: {{folder: {text}}}")
        with pytest.raises(ConfigError, match="is not readable as yaml"):
            load_config(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").symlink_to(tmp_path / "c.yaml")
    for include in ("c.yaml", "a\\0b", "x" * 5000):
        (tmp_path / "d.yaml").write_text(f'include: "{include}"')
        with pytest.raises(ConfigError):
            load_config(tmp_path / "d.yaml")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    for depth in (60, 5000):
        (tmp_path / "run.yaml").write_text("[" * depth + "]" * depth)
        with pytest.raises(ConfigError, match="is not readable as yaml"):
            load_config(tmp_path / "run.yaml")


def test_a_few_lines_that_stand_for_billions_are_refused_and_thousands_of_concepts_are_read(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="stands for over 100,000 values"):
        load_config(tmp_path / "bomb.yaml")
    concepts = "".join(f"  - {{target: n{i}, superclass: animal}}\n" for i in range(3000))
    (tmp_path / "many.yaml").write_text(f"concepts:\n{concepts}")
    assert len(load_config(tmp_path / "many.yaml").concepts) == 3000


def test_keys_with_names_of_the_user_and_members_of_lists_can_be_overridden() -> None:
    for name in ("van gogh", '"van gogh"', "'van gogh'"):
        given = ["concepts=[{target: van gogh, kind: style}]", f"prepare.prompts.files.{name}=F"]
        assert load_config(None, given).prepare.prompts.files == {"van gogh": "F"}
    given = ["concepts=[{target: a.b, kind: style}]", 'prepare.prompts.files."a.b"=F']
    assert load_config(None, given).prepare.prompts.files == {"a.b": "F"}
    concepts = "concepts=[{target: cat, superclass: animal}, {target: car, superclass: vehicle}]"
    config = load_config(None, [concepts, "concepts[1].target=dog", "concepts[1].keep=[a, no]", "train.lr=0.5"])
    assert [concept.target for concept in config.concepts] == ["cat", "dog"] and config.concepts[1].keep == ["a", "no"]
    assert config.train.lr == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("concepts=van gogh", r"write 'concepts=\[\{target: cat, superclass: animal\}\]'"),
        (
            "prepare.prompts.object=[a {concept}]",
            r"quote what holds special characters: 'prepare.prompts.object=\[\"first",
        ),
        ("concepts[2].target=dog", "concepts has 0 members, numbered from 0"),
        ("prepare.prompts.files=F", r"write 'prepare.prompts.files=\{name: value\}'"),
        ("train lr=1", "write key=value"),
        ("[0]=1", "write key=value"),
        ("=1", "write key=value"),
        ("train.lr", "write key=value"),
        ("train.betas=[[1],[2]]", "train.betas"),
        ("train.steps=" + "9" * 6000, "train.steps"),
        ("train.lr=!!float abc", "the tag"),
        ("run.folder=???", "cannot be a value"),
        ("track.name=\udcff", "surrogates not allowed"),
        ("engine.timeout=1e30", "at most 10,000,000 seconds"),
        ("mask.collect=1e30", "at most 1,000,000,000"),
        ("prepare.samples=1000000000000", "prepare.samples"),
        ("prepare.steps=1001", "at most 1,000 steps"),
    ],
)
def test_an_override_that_cannot_be_read_shows_the_working_form(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(None, [override])
    assert len(str(error.value)) < 1500 and len(str(error.value).splitlines()) == 1

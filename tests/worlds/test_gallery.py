"""The gallery: its names, its sequences, and how its pictures are made from sets of icons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import PROJECT, sculpt

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.run.setup import resolve
from sculpt_dist.worlds.base import NUM_FORMS
from sculpt_dist.worlds.gallery.pictures import draw_dataset, keep_pictures, write_sheet
from sculpt_dist.worlds.gallery.sets import SOURCES, emoji_name, find_icon, other_versions, read_sets
from sculpt_dist.worlds.gallery.world import EMOJI, WORLD

CONFIGS = PROJECT / "configs" / "gallery"


def targets(name: str) -> list[str]:
    return [concept.target for concept in load_config(CONFIGS / f"{name}.yaml").concepts]


# Names


def test_the_world_is_large_and_every_name_is_one_word_of_its_own():
    assert len(WORLD.objects) >= 200 and len(WORLD.superclasses) == 18 and len(WORLD.styles) == 6
    assert min(map(len, WORLD.superclasses.values())) >= 6, "a class prompt must draw many members"
    assert all(word.isalpha() and word.islower() for word in WORLD.words)
    assert len(set(WORLD.words)) == len(WORLD.words)
    assert set(EMOJI) <= set(WORLD.objects)


def test_each_word_is_one_token_and_every_caption_fits():
    from sculpt_dist.backbones.parts.tiny import word_tokenizer

    tokenizer = word_tokenizer(WORLD.words)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORLD.words)
    names = (*WORLD.objects, *WORLD.superclasses, None)
    captions = {WORLD.prompt(name, "emojione", form) for name in names for form in range(NUM_FORMS)}
    assert all(tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()] for caption in captions)
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= tokenizer.model_max_length


# Sequences


def test_the_sequences_grow_are_stratified_and_leave_out_what_is_tuned_on():
    ten, thirty, hundred, tuning = map(targets, ("sequence_10", "sequence_30", "sequence_100", "tuning"))
    assert [len(names) for names in (ten, thirty, hundred, tuning)] == [10, 30, 100, 10]
    assert hundred[:10] == ten and hundred[:30] == thirty and len(set(hundred)) == 100
    assert not set(tuning) & set(hundred)
    assert len({WORLD.superclass_of[name] for name in ten}) == 10
    for superclass, members in WORLD.superclasses.items():
        share = len(set(members) & set(hundred)) / len(members)
        assert 0.33 <= share <= 0.67, f"{superclass}: {share:.2f} of its members are targets"


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem != "world"))
def test_every_configuration_resolves_to_the_gallery(name):
    setup = resolve(load_config(CONFIGS / f"{name}.yaml"))
    world = setup.evaluation.world
    assert world.objects == WORLD.objects and world.styles == WORLD.styles
    assert all(concept.superclass == WORLD.superclass_of[concept.target] for concept in setup.concepts)


def test_the_world_chooses_the_classifier_unless_another_is_named():
    assert load_config(None, ["model.world=gallery"]).evaluate.classifier == "gallery"
    assert load_config(None).evaluate.classifier == "canvas"
    other = load_config(None, ["model.world=gallery", "evaluate.classifier=gallery:witness"])
    assert other.evaluate.classifier == "gallery:witness"
    with pytest.raises(ConfigError, match="model.world=galery: there is no such world. Did you mean 'gallery'"):
        resolve(load_config(None, ["model.world=galery", "concepts=[{target: cat, superclass: mammal}]"]))


def test_the_command_lists_what_there_is():
    listed = sculpt("gallery", "list", "reptile")
    assert "crocodile, turtle, snake" in listed and "emojione" in listed and "mammal" not in listed
    assert "There are: mammal, bird" in sculpt("gallery", "list", "mamal", code=2)


# Pictures


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Six sets in which an icon is a square; its red tells the object, its green the style, and blue is 128."""
    folder = tmp_path_factory.mktemp("sets")
    for j, source in enumerate(SOURCES.values()):
        icons = {
            emoji_name(name): {"body": f'<rect x="3" y="3" width="10" height="10" fill="rgb({i},{40 * j},128)"/>'}
            for i, name in enumerate(WORLD.objects)
        }
        (folder / source.package).mkdir()
        (folder / source.package / "icons.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
        (folder / source.package / "package.json").write_text(json.dumps({"version": source.version}))
    return folder


@pytest.fixture(scope="module")
def pictures(sets, tmp_path_factory) -> Path:
    pytest.importorskip("resvg_py")
    return keep_pictures(sets, tmp_path_factory.mktemp("pictures") / "pictures.npy")


def test_an_image_shows_its_icon_in_the_middle_of_white(pictures):
    pixels, objects, styles = draw_dataset(2, 0, pictures)
    assert pixels.shape == (2 * 6 * len(WORLD.objects), 64, 64, 3) and pixels.dtype == np.uint8
    assert (pixels[:, 0, 0] == 255).all()
    middle = pixels[:, 32, 32].astype(int)
    assert np.abs(middle - np.stack([objects, 40 * styles, np.full_like(objects, 128)], 1)).max() <= 1
    assert (pixels[0] != pixels[1]).any(), "two images of a pair are moved differently"
    again, *_ = draw_dataset(2, 0, pictures)
    other, *_ = draw_dataset(2, 1, pictures)
    assert np.array_equal(pixels, again) and not np.array_equal(pixels, other)


def test_the_contact_sheet_holds_every_picture_once(pictures, tmp_path, monkeypatch):
    from sculpt_dist.worlds import find
    from sculpt_dist.worlds.gallery.pictures import reference_images

    (tmp_path / "gallery").mkdir()
    write_sheet(pictures, tmp_path / "gallery" / "pictures.png")
    monkeypatch.setattr(find, "ASSETS", tmp_path)
    images = reference_images()
    assert images.shape == (6 * len(WORLD.objects), 64, 64, 3)
    assert images[6 * 5 + 2, 32, 32].tolist() == [5, 80, 128]


def test_an_icon_is_found_by_its_name_with_face_or_by_an_alias():
    icons = {"icons": {"dog-face": {"body": "a"}, "bug": {"body": "b"}}, "aliases": {"grub": {"parent": "bug"}}}
    assert find_icon(icons, "dog") == {"body": "a"} and find_icon(icons, "grub") == {"body": "b"}
    assert find_icon(icons, "cat") is None


def test_what_is_missing_or_of_another_version_is_named(sets, tmp_path):
    copied = tmp_path / "sets"
    shutil.copytree(sets, copied)
    assert other_versions(copied) == []
    (copied / "noto" / "package.json").write_text('{"version": "9.0.0"}')
    assert other_versions(copied) == ["noto 9.0.0, not 1.2.9"]
    file = copied / "twemoji" / "icons.json"
    content = json.loads(file.read_text())
    del content["icons"]["dog"], content["icons"]["red-apple"]
    file.write_text(json.dumps(content))
    missing = "2 icons are missing: twemoji: dog, twemoji: red-apple. Unpack .*twemoji 1.2.5"
    with pytest.raises(ConfigError, match=missing):
        keep_pictures(copied, tmp_path / "pictures.npy")
    assert not (tmp_path / "pictures.npy").exists()
    (copied / "noto" / "icons.json").write_text("[]")
    shutil.rmtree(copied / "emojione")
    missing = r"no readable icons.json of noto \(.*\), emojione \(.*npm pack @iconify-json/noto"
    with pytest.raises(ConfigError, match=missing):
        read_sets(copied)

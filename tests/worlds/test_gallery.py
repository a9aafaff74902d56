"""The gallery: its names, its sequences, and how its pictures are made from sets of icons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import PROJECT, sculpt

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.classifiers.base import load_classifier as load_judge
from sculpt_dist.run.setup import resolve
from sculpt_dist.worlds.base import NUM_FORMS
from sculpt_dist.worlds.classifier import WorldClassifier, load_classifier, to_float
from sculpt_dist.worlds.find import shipped
from sculpt_dist.worlds.gallery.pictures import draw_dataset, keep_pictures, reference_images, write_sheet
from sculpt_dist.worlds.gallery.sets import SOURCES, emoji_name, find_icon, other_versions, read_sets
from sculpt_dist.worlds.gallery.world import EMOJI, WORLD
from sculpt_dist.worlds.measure import measure_images, recognised

CONFIGS = PROJECT / "configs" / "gallery"
ASSETS = PROJECT / "sculpt_dist" / "assets" / "gallery"
LEAST_OBJECT, LEAST_STYLE = 0.95, 0.8  # shares of samples that show what was asked; measured: see docs/gallery.md


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
    shares = {name: len(set(of) & set(hundred)) / len(of) for name, of in WORLD.superclasses.items()}
    assert sorted(shares.values())[:4] == [0, 0, 0, 0], "four superclasses show what is kept far from every target"
    assert all(0.5 <= share <= 0.75 for share in shares.values() if share), shares


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem != "world"))
def test_every_configuration_resolves_to_the_gallery(name):
    setup = resolve(load_config(CONFIGS / f"{name}.yaml"))
    world = setup.evaluation.world
    assert world.styles == WORLD.styles
    if name == "tuning":  # scores its targets and sixty others, of which none is held
        assert set(targets(name)) < set(world.objects) < set(WORLD.objects)
        assert len(world.objects) == 70 and setup.held and not world.held
    else:
        assert world.objects == WORLD.objects
    assert all(concept.superclass == WORLD.superclass_of[concept.target] for concept in setup.concepts)


def test_the_world_chooses_the_classifier_unless_another_is_named():
    assert load_config(None, ["model.world=gallery"]).evaluate.classifier == "gallery"
    assert load_config(None).evaluate.classifier == "canvas"
    other = load_config(None, ["model.world=gallery", "evaluate.classifier=gallery:witness"])
    assert other.evaluate.classifier == "gallery:witness"
    with pytest.raises(ConfigError, match="model.world=galery: there is no such world. Did you mean 'gallery'"):
        resolve(load_config(None, ["model.world=galery", "concepts=[{target: cat, superclass: mammal}]"]))


def test_an_unknown_object_is_answered_with_the_closest_and_the_command_that_lists_them():
    with pytest.raises(ConfigError, match=r"does not know 'bicyle'. Closest to 'bicyle': bicycle"):
        load_judge("gallery", ["fox", "bicyle"], [])
    with pytest.raises(ConfigError, match=r"190 more \(`sculpt-dist gallery list`\)\. Remove"):
        load_judge("gallery:witness", ["zebra"], [])
    with pytest.raises(ConfigError, match="gallery:judge: the classifiers of this world are classifier, witness"):
        load_judge("gallery:judge", ["fox"], [])


def test_the_command_lists_what_there_is():
    listed = sculpt("gallery", "list", "reptile")
    assert "crocodile, turtle, snake" in listed and "emojione" in listed and "mammal" not in listed
    assert "There are: mammal, bird" in sculpt("gallery", "list", "beast", code=2)


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
    return keep_pictures(sets, tmp_path_factory.mktemp("pictures"))


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

    (tmp_path / "gallery").mkdir()
    write_sheet(pictures, tmp_path / "gallery" / "pictures.png")
    monkeypatch.setattr(find, "ASSETS", tmp_path)
    images = reference_images()
    assert images.shape == (6 * len(WORLD.objects), 64, 64, 3)
    assert images[6 * 5 + 2, 32, 32].tolist() == [5, 80, 128]


def test_an_icon_is_found_by_its_name_with_face_or_by_an_alias():
    aliases = {"worm": {"parent": "grub"}, "grub": {"parent": "bug"}}
    icons = {"icons": {"dog-face": {"body": "a"}, "bug": {"body": "b"}}, "aliases": aliases}
    assert find_icon(icons, "dog") == {"body": "a"} and find_icon(icons, "worm") == {"body": "b"}
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
        keep_pictures(copied, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    (copied / "noto" / "icons.json").write_text("[]")
    shutil.rmtree(copied / "emojione")
    missing = r"no readable icons.json of noto \(.*\), emojione \(.*npm pack @iconify-json/noto"
    with pytest.raises(ConfigError, match=missing):
        read_sets(copied)


# What is shipped


def shipped_classifier(name: str) -> WorldClassifier:
    return load_classifier(WORLD, name, shipped("gallery", f"{name}.safetensors"))


@pytest.mark.parametrize("name", WORLD.classifiers)
def test_each_classifier_recognises_every_picture_of_the_sheet(name):
    pair = np.arange(len(WORLD.objects) * len(WORLD.styles))
    found = measure_images(shipped_classifier(name), reference_images(), pair // 6, pair % 6)
    assert found["object"] >= 0.99 and found["style"] >= 0.98


def test_the_shipped_model_draws_what_the_prompt_says():
    """Plain diffusers without this package, as in a user's own script; every third object, in styles by turns."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "sd15", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    objects = torch.arange(0, len(WORLD.objects), 3)
    styles = torch.arange(len(objects)) % len(WORLD.styles)
    images = pipeline(
        [WORLD.prompt(WORLD.objects[i], WORLD.styles[j]) for i, j in zip(objects, styles)],
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        height=64,
        width=64,
    ).images  # [N, 64, 64, 3] in [0, 1]
    for name in WORLD.classifiers:
        seen = recognised(shipped_classifier(name), to_float((images * 255).round().astype(np.uint8)))
        assert (seen[0] == objects).float().mean() >= LEAST_OBJECT, name
        assert (seen[1] == styles).float().mean() >= LEAST_STYLE, name


def test_the_shipped_files_are_small_and_their_origin_is_told():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in (ASSETS / "sd15").rglob("*") if path.is_file()) <= 20e6
    assert sum(path.stat().st_size for path in files) <= 80e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".png", ".md"}
    notices = (ASSETS / "NOTICES.md").read_text()
    for style, source in SOURCES.items():
        (row,) = (line for line in notices.splitlines() if line.startswith(f"| {style} |"))
        assert source.licence in row and source.url in row
        assert f"`@iconify-json/{source.package}` {source.version}" in row

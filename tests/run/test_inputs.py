"""What users bring: styles, their own images, their own detector, trackers."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from harness import PROJECT, SMALL, python, rank_environment, sculpt
from PIL import Image

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.images import image_files, open_image, own_images
from sculpt_dist.data.shards import ShardReader


@pytest.mark.two_ranks
def test_a_style_and_an_object_are_forgotten_in_one_sequence(canvas_config, tmp_path):
    concepts = "concepts=[{target: neon, kind: style},{target: bird, superclass: animal, keep: [rocket]}]"
    sculpt("unlearn", canvas_config, *SMALL, concepts, f"run.folder={tmp_path / 'run'}", ranks=2)
    data = tmp_path / "run" / "data"
    target, superclass = ShardReader(data / "style-neon" / "target"), ShardReader(data / "style-neon" / "superclass")
    assert target[1].prompt == "a photo of a cat in neon style" and superclass[1].prompt == "a photo of a cat"
    assert len(ShardReader(data / "object-bird" / "keep")) == 6
    scores = json.loads((tmp_path / "run" / "evaluation" / "after-01" / "scores.json").read_text())["plain"]
    assert scores["images"] == {"target": 12 + 4, "other": 44} and set(scores["targets"]) == {"neon", "bird"}
    first = json.loads((tmp_path / "run" / "evaluation" / "after-00" / "scores.json").read_text())["plain"]
    assert first["SA"] is None and first["images"] == {"target": 12, "other": 48}


def test_own_images_are_encoded_instead_of_drawing(canvas_config, tmp_path):
    for name, number in (("Bird", 5), ("ANIMAL", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (50, 40), (40 * i, 255 - 40 * i, 90)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "Bird" / "._0.png").write_bytes(b"what macOS leaves")
    (tmp_path / "images" / "Bird" / "a.heic").write_bytes(b"not read")
    (tmp_path / "images" / "Bird" / "folder.png").mkdir()
    only = [
        "concepts=[{target: bird, superclass: animal},{target: boat, superclass: vehicle}]",
        f"prepare.images={tmp_path / 'images'}",
    ]
    printed = sculpt("prepare", canvas_config, *SMALL, *only, f"run.folder={tmp_path / 'run'}", code=2)
    assert "has no folder 'boat'; add it, or let the model draw" in printed and not (tmp_path / "run").exists()
    only.append("prepare.images_missing=draw")
    printed = sculpt("prepare", canvas_config, *SMALL, *only, f"run.folder={tmp_path / 'run'}")
    assert (
        "bird: 5 of 6 files are images; not read: a.heic" in printed
        and "boat: no folder, so the model draws" in printed
    )
    data = tmp_path / "run" / "data"
    assert [
        len(ShardReader(data / f"object-{name}" / role))
        for name in ("bird", "boat")
        for role in ("target", "superclass")
    ] == [5, 2, 6, 6]
    from sculpt_dist.backbones.sd15 import Backbone

    backbone = Backbone(PROJECT / "sculpt_dist/assets/canvas/sd15", torch.float32, torch.device("cpu"))
    pixels = torch.tensor([40.0, 215.0, 90.0]).div(127.5).sub(1).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(
        ShardReader(data / "object-bird" / "target")[1].latent, backbone.encode(pixels)[0], rtol=1e-4, atol=1e-5
    )


def test_images_of_all_common_types_are_found_under_a_concepts_name(tmp_path):
    folder = tmp_path / "Van_Gogh"
    folder.mkdir()
    types = "png jpg jpeg jfif webp gif bmp tif tiff".split()
    for i, kind in enumerate(types):
        saved = {"jfif": "JPEG", "jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper())
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i}.{kind}", format=saved)
    images, others = own_images(str(tmp_path), "van  gogh")
    assert [path.name for path in images] == [f"{i}.{kind}" for i, kind in enumerate(types)] and not others
    assert all(open_image(path).size == (8, 8) for path in images)
    assert own_images(str(tmp_path), "gogh") == ([], [])
    (tmp_path / "van gogh").mkdir()
    with pytest.raises(ConfigError, match="are one name"):
        own_images(str(tmp_path), "van gogh")
    os.mkfifo(tmp_path / "van gogh" / "b.png")  # would wait for ever
    (tmp_path / "van gogh" / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    (found,), _ = image_files(tmp_path / "van gogh")
    with pytest.raises(ConfigError, match=r"eps\.png: cannot be read as an image"):  # it would start Ghostscript
        open_image(found)


def test_a_bad_image_is_named(canvas_config, tmp_path):
    (tmp_path / "images" / "bird").mkdir(parents=True)
    (tmp_path / "images" / "bird" / "broken.png").write_bytes(b"no image")
    printed = sculpt(
        "prepare",
        canvas_config,
        *SMALL,
        f"prepare.images={tmp_path / 'images'}",
        "prepare.images_missing=draw",
        f"run.folder={tmp_path / 'run'}",
        code=2,
    )
    assert "broken.png" in printed and "Traceback" not in printed


DETECTOR = """
import torch
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict

class Dark(Classifier):
    objects = ("dark thing",)
    def __init__(self, where, objects, styles):
        pass
    def classify(self, images):
        dark = images.float().mean((1, 2, 3)) < 128
        return Verdict(torch.where(dark, 0, -1), None)
"""


def test_a_users_own_detector_judges_through_the_command(canvas_config, tmp_path, monkeypatch):
    (tmp_path / "my_detector.py").write_text(DETECTOR)
    own = [
        "evaluate.classifier=own:my_detector:Dark",
        "model.cut_prompts=true",
        "concepts=[{target: dark thing, superclass: vehicle}]",
        "evaluate.images=6",
    ]
    command = [
        python(),
        "-m",
        "sculpt_dist",
        "evaluate",
        canvas_config,
        *SMALL,
        *own,
        f"run.folder={tmp_path / 'run'}",
    ]
    command += ["--model", str(PROJECT / "sculpt_dist/assets/canvas/sd15"), "--output", str(tmp_path / "out")]
    environment = rank_environment() | {"PYTHONPATH": f"{PROJECT}:{tmp_path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["plain"]
    assert (
        scores["CRA"] is None
        and scores["IRA"] is None
        and 0 <= scores["UA"] <= 1
        and scores["images"] == {"target": 6, "other": 0}
    )


def test_a_classifier_that_does_not_know_the_objects_is_refused_before_training(canvas_config, tmp_path):
    unknown = "concepts=[{target: tench, superclass: fish}]"
    printed = sculpt("unlearn", canvas_config, *SMALL, unknown, f"run.folder={tmp_path / 'run'}", code=2)
    assert "tench" in printed and "evaluate.classifier" in printed and not (tmp_path / "run").exists()

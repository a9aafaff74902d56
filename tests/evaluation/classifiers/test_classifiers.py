"""Classifiers: how their spec finds them, and that verdicts are positions in the evaluated names."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from sculpt_dist.backbones.parts.tiny import word_tokenizer
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.evaluation.classifiers import clip as clip_kind
from sculpt_dist.evaluation.classifiers.base import Classifier, Verdict, load_classifier, renumber
from sculpt_dist.evaluation.classifiers.image import find_classes
from sculpt_dist.evaluation.evaluator import check_evaluation
from sculpt_dist.evaluation.metrics import clip_score
from sculpt_dist.evaluation.requests import resolve_evaluation
from sculpt_dist.evaluation.worlds import WorldEncoder, to_pixels
from sculpt_dist.worlds import find
from sculpt_dist.worlds.canvas.pictures import draw, draw_dataset
from sculpt_dist.worlds.canvas.world import WORLD
from sculpt_dist.worlds.classifier import WorldClassifier, save_classifier

OBJECTS, STYLES = WORLD.objects, WORLD.styles

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
CLIP_STYLES = ("plain", "striped")


# Finding a classifier.


def test_an_unknown_kind_lists_all_kinds():
    with pytest.raises(
        ConfigError,
        match=r"evaluate.classifier=nudenet:x: no classifier 'nudenet'. There are: canvas, clip, gallery, image, own\.",
    ):
        load_classifier("nudenet:x", ["cat"], [])


@pytest.mark.parametrize("spec", ["", "canvas.py", "..canvas", "__init__"])
def test_a_kind_is_never_a_path(spec):
    with pytest.raises(ConfigError, match="no classifier"):
        load_classifier(spec, ["cat"], [])


def test_wanted_classes_are_renumbered_and_all_others_become_minus_one():
    assert renumber(torch.tensor([3, 0, 2, -1, 1]), wanted=[2, 3], num_classes=4).tolist() == [1, -1, 0, -1, -1]


# canvas


@pytest.fixture
def drawings(tmp_path, monkeypatch) -> torch.Tensor:
    """One drawing of each object, cycling through the styles.

    A classifier that names the nearest of these 12 drawings replaces the shipped one.
    """
    pixels = torch.stack(
        [torch.tensor(draw(name, STYLES[i % 5], seed=i)) for i, name in enumerate(OBJECTS)]
    )  # [12, 32, 32, 3]
    torch.manual_seed(0)
    model = WorldClassifier(WORLD.classifiers["classifier"], len(OBJECTS), len(STYLES)).eval()
    save_classifier(model, tmp_path / "canvas" / "classifier.safetensors")
    monkeypatch.setattr(find, "ASSETS", tmp_path)
    images = pixels.permute(0, 3, 1, 2)
    features = WorldEncoder("canvas").image_features(images)  # [12, 128]
    with torch.no_grad():  # x.f - |f|^2 / 2 is largest for the nearest f
        for head, rows in ((model.object_head, features), (model.style_head, features[:5])):
            head.weight.copy_(rows)
            head.bias.copy_(-rows.square().sum(1) / 2)
    save_classifier(model, tmp_path / "canvas" / "classifier.safetensors")
    return images


def test_canvas_names_every_object_and_the_styles_of_the_first_five(drawings):
    verdict = load_classifier("canvas", OBJECTS, STYLES).classify(drawings)
    assert verdict.objects.tolist() == list(range(12))
    assert verdict.styles[:5].tolist() == [0, 1, 2, 3, 4]
    assert verdict.objects.dtype == verdict.styles.dtype == torch.int64


def test_canvas_verdicts_follow_the_evaluated_order_and_are_minus_one_outside(drawings):
    judge = load_classifier("canvas", ["Rocket", "cat"], ["neon"])
    verdict = judge.classify(drawings)
    assert judge.objects == ("Rocket", "cat")
    assert verdict.objects.tolist() == [1] + [-1] * 10 + [0]
    assert verdict.styles[:5].tolist() == [-1, -1, 0, -1, -1]


def test_canvas_without_evaluated_styles_gives_none(drawings):
    assert load_classifier("canvas", OBJECTS, []).classify(drawings).styles is None


def test_canvas_recognises_enlarged_images(drawings):
    enlarged = drawings.repeat_interleave(4, 2).repeat_interleave(4, 3)  # [12, 3, 128, 128]
    assert load_classifier("canvas", OBJECTS, STYLES).classify(enlarged).objects.tolist() == list(range(12))


def test_canvas_pixels_are_area_means_in_minus_one_to_one():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[:, :, ::2] = 255
    assert to_pixels(images, 32).shape == (1, 3, 32, 32)
    assert torch.allclose(to_pixels(images, 32), torch.zeros(1, 3, 32, 32), atol=1e-6)
    assert to_pixels(images[:, :, :32, :32], 32).unique().tolist() == [-1, 1]


def test_canvas_features_are_the_input_of_both_heads(drawings):
    encoder = WorldEncoder("canvas")
    expected = encoder.model(to_pixels(drawings, 32))
    features = encoder.image_features(drawings)
    assert torch.allclose(encoder.model.object_head(features), expected[0], atol=1e-4)
    assert torch.allclose(encoder.model.style_head(features), expected[1], atol=1e-4)


def test_canvas_lists_unknown_objects_and_styles(drawings):
    with pytest.raises(
        ConfigError, match="evaluate.objects: .* 'rockte', 'tench'. Closest to 'rockte': rocket. It knows: cat, fish"
    ):
        load_classifier("canvas", ["cat", "rockte", "tench"], [])
    with pytest.raises(ConfigError, match="'neno'.*Closest to 'neno': neon.*evaluate.classifier"):
        load_classifier("canvas", ["cat"], ["neno"])
    with pytest.raises(ConfigError, match="canvas:folder"):
        load_classifier("canvas:folder", ["cat"], [])


def test_the_shipped_classifier_names_fresh_drawings():
    pixels, objects, styles = draw_dataset(per_pair=2, seed=31337)
    verdict = load_classifier("canvas", OBJECTS, STYLES).classify(torch.tensor(pixels).permute(0, 3, 1, 2))
    assert (verdict.objects.numpy() == objects).mean() > 0.97 and (verdict.styles.numpy() == styles).mean() > 0.97


# clip


def colour_image(colour: tuple[int, int, int], striped: bool) -> torch.Tensor:
    """uint8 [3, 20, 24]."""
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, 20, 24)
    if striped:
        image[:, :, ::6] = image[:, :, 1::6] = 0
    return image


COLOUR_IMAGES = torch.stack(
    [colour_image(colour, striped) for colour in COLOURS.values() for striped in (False, True)]
)  # [6, 3, 20, 24]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP, trained to match the six colour images with the prompts of their colour and of their style."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = word_tokenizer(["a", "photo", "of", "an", "image", "in", "style", *COLOURS, *CLIP_STYLES], max_length=8)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=16)
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    prompts = [f"a photo of a {colour}" for colour in COLOURS] + [f"an image in {style} style" for style in CLIP_STYLES]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = processor(images=list(COLOUR_IMAGES), return_tensors="pt")["pixel_values"]
    colours, styles = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        images = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output)
        texts = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output)
        logits = 20 * images @ texts.T  # [6, 5]
        loss = torch.nn.functional.cross_entropy(logits[:, :3], colours) + torch.nn.functional.cross_entropy(
            logits[:, 3:], styles
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.save_pretrained(folder)
    return folder


def test_clip_names_colours_and_styles(clip_folder):
    verdict = load_classifier(f"clip:{clip_folder}", list(COLOURS), CLIP_STYLES).classify(COLOUR_IMAGES)
    assert verdict.objects.tolist() == [0, 0, 1, 1, 2, 2]
    assert verdict.styles.tolist() == [0, 1, 0, 1, 0, 1]


def test_clip_verdicts_follow_the_evaluated_order(clip_folder):
    judge = load_classifier(f"clip:{clip_folder}", ["blue", "red"], [])
    verdict = judge.classify(COLOUR_IMAGES[[0, 1, 4, 5]])
    assert judge.objects == ("blue", "red")
    assert verdict.objects.tolist() == [1, 1, 0, 0] and verdict.styles is None


def test_clip_embeds_names_in_the_object_and_style_prompts(clip_folder, monkeypatch):
    embedded = []
    text_features = clip_kind.Encoder.text_features
    monkeypatch.setattr(
        clip_kind.Encoder,
        "text_features",
        lambda self, prompts: embedded.append(prompts) or text_features(self, prompts),
    )
    load_classifier(f"clip:{clip_folder}", ["red", "blue"], ["plain", "striped"])
    objects, styles = (
        ["a photo of a red", "a photo of a blue"],
        ["an image in plain style", "an image in striped style"],
    )
    assert embedded == [objects, styles]


def test_clip_reads_images_with_the_folders_own_processor(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "swapped")
    CLIPImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.9, 0.9, 0.9],
        image_std=[0.1, 0.1, 0.1],
    ).save_pretrained(tmp_path / "swapped")
    own, swapped = (
        clip_kind.Encoder(folder).image_features(COLOUR_IMAGES) for folder in (clip_folder, tmp_path / "swapped")
    )
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    pixels = processor(images=list(COLOUR_IMAGES), return_tensors="pt")["pixel_values"]
    assert torch.allclose(own, model.get_image_features(pixel_values=pixels).pooler_output, atol=1e-6)
    assert not torch.allclose(own, swapped, atol=1e-2)


def test_clip_truncates_long_prompts_and_keeps_the_end_token(clip_folder):
    encoder = clip_kind.Encoder(clip_folder)
    long = encoder.text_features(["a photo of a red in striped style a a a a"])
    kept = encoder.text_features(["a photo of a red in"])  # 6 words and 2 special tokens fill the 8 positions
    assert torch.allclose(long, kept, atol=1e-6)


def test_clip_score_of_a_folder_is_the_models_own_cosine(clip_folder):
    score = clip_score.Score(clip_kind.Encoder(clip_folder))
    prompts = ["a photo of a red", "an image in striped style", "a photo of a red"]
    score.update(COLOUR_IMAGES[:3], prompts)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    pixels = processor(images=list(COLOUR_IMAGES[:3]), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()  # [3, 3]
    assert score.result(score.state())["clip_score"] == pytest.approx(100 * logits.diagonal().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("objects", "styles", "key"),
    [(["red"], [], "objects has 1"), ([], [], "objects has 0"), (["red", "blue"], ["plain"], "styles has 1")],
)
def test_clip_needs_at_least_two_names_to_choose_from(clip_folder, objects, styles, key):
    with pytest.raises(ConfigError, match=f"evaluate.{key} names.*at least 2"):
        load_classifier(f"clip:{clip_folder}", objects, styles)


# image


LABELS = {0: "tench, Tinca tinca", 1: "golf_ball", 2: "church, church building"}


def save_vit(folder: Path, labels: dict[int, str]) -> ViTForImageClassification:
    """A tiny random ViT with these labels, and its processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        id2label=labels,
    )
    model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> Path:
    """A tiny ViT, trained to call the colours red, green and blue by the three labels, in this order."""
    folder = tmp_path_factory.mktemp("vit")
    model = save_vit(folder, LABELS)
    pixels = ViTImageProcessorPil.from_pretrained(folder)(images=list(COLOUR_IMAGES), return_tensors="pt")[
        "pixel_values"
    ]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.tensor([0, 0, 1, 1, 2, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.save_pretrained(folder)
    return folder


def test_image_finds_objects_by_any_synonym_and_all_others_become_minus_one(vit_folder):
    judge = load_classifier(f"image:{vit_folder}", ["Church building", "TINCA TINCA"], ["plain"])
    verdict = judge.classify(COLOUR_IMAGES)
    assert verdict.objects.tolist() == [1, 1, -1, -1, 0, 0]
    assert verdict.styles is None and judge.styles == ()


def test_image_suggests_the_closest_labels_for_an_object_without_one(vit_folder):
    with pytest.raises(
        ConfigError, match="evaluate.objects: no label .* 'tenhc'. The closest labels: tench, Tinca tinca;"
    ):
        load_classifier(f"image:{vit_folder}", ["tenhc"], [])


def test_image_finds_imagenette_classes_by_index(tmp_path):
    labels = {i: f"thing {i}" for i in range(1000)} | {0: "tench", 491: "chainsaw", 482: "tape player", 3: "chain saw"}
    model = save_vit(tmp_path, labels)
    with torch.no_grad():
        model.classifier.bias[491] += 1000
    model.save_pretrained(tmp_path)
    judge = load_classifier(f"image:{tmp_path}", ["tench", "cassette player", "chain saw"], [])
    assert judge.classify(COLOUR_IMAGES).objects.tolist() == [2] * 6


def test_the_ten_imagenette_indices():
    labels = {i: f"thing {i}" for i in range(1000)} | {0: "tench, Tinca tinca"}
    names = (
        "tench|English springer|cassette player|chain saw|church|French horn|garbage truck|gas pump|golf ball|parachute"
    ).split("|")
    assert find_classes(names, labels) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def test_class_indices_apply_to_imagenet_models_only():
    other = {i: f"thing {i}" for i in range(1000)}
    with pytest.raises(ConfigError, match="no label"):
        find_classes(["tench"], other)
    assert find_classes(["tench"], other | {7: "tench"}) == [7]
    assert find_classes(["parachute", "tench"], {0: "tench", 1: "parachute"}) == [1, 0]


def test_a_label_may_be_written_with_underscores():
    assert find_classes(["Golf ball", "garbage_truck"], {0: "garbage truck, dustcart", 1: "golf_ball"}) == [1, 0]


def test_a_name_in_two_labels_is_refused_unless_it_equals_one_label():
    labels = {0: "Cardigan, Cardigan Welsh corgi", 1: "cardigan", 2: "crane, bird", 3: "crane, machine"}
    assert find_classes(["cardigan"], labels) == [1]
    with pytest.raises(ConfigError, match="'crane' is part of 2 labels .crane, bird; crane, machine."):
        find_classes(["crane"], labels)
    with pytest.raises(ConfigError, match="'bird' and 'crane, bird' both name the label"):
        find_classes(["bird", "crane, bird"], labels)


# Folders that cannot be used.


@pytest.mark.parametrize("kind", ["clip", "image"])
@pytest.mark.parametrize("where", ["", "openai/clip-vit-base-patch32", "/no/such/folder"])
def test_a_missing_folder_is_named(kind, where):
    with pytest.raises(ModelError, match=f"'{where}': no such model folder: give a local folder"):
        load_classifier(f"{kind}:{where}", ["red", "blue"], [])


class Canary:
    """A pickle of this leaves a file behind when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("named_by", ["name", "index", "config"])
def test_a_pickle_is_never_read(clip_folder, tmp_path, named_by, monkeypatch):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    names = list(load_file(folder / "model.safetensors"))
    for file in ("pytorch_model.bin", "adapter_model.bin"):  # the second is the one pickle that a config may name
        torch.save({"canary": Canary(tmp_path / "read")}, folder / file)
    if named_by == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    else:
        (folder / "model.safetensors").unlink()
    if named_by == "index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: opened.append(arguments))
    with pytest.raises(ModelError, match="safetensors|transformers_weights"):
        load_classifier(f"clip:{folder}", ["red", "blue"], [])
    assert not opened and not (tmp_path / "read").exists()


def test_an_adapter_in_the_folder_is_not_silently_applied(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    model = CLIPModel.from_pretrained(clip_folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    with pytest.raises(ModelError, match="holds an adapter"):
        load_classifier(f"clip:{folder}", ["red", "blue"], [])


def test_sharded_safetensors_are_read(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(clip_folder).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    verdict = load_classifier(f"clip:{folder}", list(COLOURS), []).classify(COLOUR_IMAGES)
    assert verdict.objects.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_clip_folder_is_named(clip_folder, tmp_path, file, damage):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    content = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(ModelError, match=str(folder)):
        load_classifier(f"clip:{folder}", ["red", "blue"], [])


def test_missing_weights_are_never_filled_with_random_numbers(clip_folder, vit_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights of a CLIPModel, such as visual_projection.weight"):
        load_classifier(f"clip:{folder}", ["red", "blue"], [])
    with pytest.raises(ModelError, match="lacks 2 weights of a CLIPForImageClassification, such as classifier.bias"):
        load_classifier(f"image:{clip_folder}", ["red", "blue"], [])


def test_code_in_a_model_folder_never_runs(vit_folder, tmp_path):
    folder = shutil.copytree(vit_folder, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "their_own", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load_classifier(f"image:{folder}", ["tench"], [])
    assert not (tmp_path / "run").exists()


# own


class NudityStub(Classifier):
    """Says "nudity" of bright images. It declares its one object, whatever is evaluated."""

    objects = ("nudity",)

    def __init__(self, where, objects, styles):
        pass

    def classify(self, images):
        return Verdict((images.float().mean((1, 2, 3)) > 127).long() - 1, None)


class EvaluatedOrderStub(Classifier):
    """Answers with the top left pixel, in the numbers of what is evaluated."""

    def classify(self, images):
        return Verdict(images[:, 0, 0, 0].long(), images[:, 1, 0, 0].long())


class ColourStub(Classifier):
    """Declares three objects and two styles of its own; answers with the top left pixel, 255 for -1."""

    objects, styles = ("red", "green", "blue"), ("plain", "striped")

    def __init__(self, where, objects, styles):
        self.where = where

    def classify(self, images):
        return Verdict(images[:, 0, 0, 0].to(torch.int8).long(), images[:, 1, 0, 0].to(torch.int8).long())


class WrongStub(Classifier):
    """Answers with what the test put here."""

    answer = None

    def classify(self, images):
        return WrongStub.answer


no_classifier = 3


def single_pixels(*rows: tuple[int, int, int]) -> torch.Tensor:
    """uint8 [B, 3, 1, 1]."""
    return torch.tensor(rows, dtype=torch.uint8)[:, :, None, None]


def own(name: str) -> str:
    return f"own:{__name__}:{name}"


def test_own_detector_recognises_its_one_object_or_none():
    judge = load_classifier(own("NudityStub"), ["nudity"], ["sketch"])  # it knows no styles
    assert judge.objects == ("nudity",) and judge.styles == ()
    verdict = judge.classify(single_pixels((255, 255, 255), (0, 0, 0), (200, 200, 200)))
    assert verdict.objects.tolist() == [0, -1, 0] and verdict.styles is None


def check(*overrides: str) -> None:
    config = load_config(None, list(overrides))
    check_evaluation(resolve_evaluation(config.evaluate, config.concepts))


def test_a_style_target_needs_a_classifier_that_knows_styles():
    concepts = [
        "concepts=[{target: sketch, kind: style}]",
        "evaluate.objects=[nudity]",
        "evaluate.styles=[sketch, neon]",
    ]
    with pytest.raises(
        ConfigError, match="NudityStub: knows no styles, so it cannot tell whether 'sketch' is forgotten"
    ):
        check(*concepts, f"evaluate.classifier={own('NudityStub')}")


@pytest.mark.parametrize("concept", ["{target: popart, superclass: painting}", "{target: cat, kind: style}"])
def test_a_target_of_the_other_kind_is_refused(concept):
    with pytest.raises(ConfigError, match="does not know '(popart|cat)'"):
        check(f"concepts=[{concept}]")


def test_own_detector_answers_in_the_evaluated_names_by_default():
    verdict = load_classifier(own("EvaluatedOrderStub"), ["a", "b"], ["s", "t"]).classify(
        single_pixels((1, 0, 0), (0, 1, 0))
    )
    assert verdict.objects.tolist() == [1, 0] and verdict.styles.tolist() == [0, 1]


def test_own_names_are_renumbered_to_the_evaluated_ones():
    judge = load_classifier(own("ColourStub"), ["blue", "red"], ["striped"])
    verdict = judge.classify(single_pixels((0, 1, 0), (1, 0, 0), (2, 255, 0), (255, 1, 0)))
    assert judge.objects == ("blue", "red") and judge.styles == ("striped",)
    assert verdict.objects.tolist() == [1, -1, 0, -1]
    assert verdict.styles.tolist() == [0, -1, -1, 0]


def test_own_detector_must_know_what_is_evaluated():
    with pytest.raises(ConfigError, match="evaluate.objects: the classifier does not know 'person'"):
        load_classifier(own("NudityStub"), ["nudity", "person"], [])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "write own:package.module:Class"),
        ("module_alone", "write own:package.module:Class"),
        ("a:b:c", "write own:package.module:Class"),
        ("no_such_package.module:Class", "cannot import no_such_package.module .*PYTHONPATH"),
        (".relative:Class", "write own:package.module:Class"),
        (f"{__name__}:NoSuchClass", "has no NoSuchClass"),
        (
            f"{__name__}:no_classifier",
            "no_classifier is not a subclass of sculpt_dist.evaluation.classifiers.base.Classifier",
        ),
        (f"{__name__}:Path", "Path is not a subclass of sculpt_dist.evaluation.classifiers.base.Classifier"),
    ],
)
def test_own_class_that_cannot_be_used_is_named(where, message):
    with pytest.raises(ConfigError, match=f"evaluate.classifier=own:{where}.*{message}"):
        load_classifier(f"own:{where}", ["cat"], [])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([0, 0]), "returned a Tensor, expected a Verdict"),
        (Verdict(torch.tensor([0]), None), r"objects are torch.int64 \[1\], expected torch.int64 \[2\]"),
        (Verdict(torch.tensor([0.0, 1.0]), None), "objects are torch.float32"),
        (Verdict(torch.tensor([0, 2]), None), r"objects range from 0 to 2, expected -1 .none. to 1"),
        (Verdict(torch.tensor([-2, 0]), None), "objects range from -2 to 0"),
        (Verdict(torch.tensor([0, 0]), torch.tensor([0, 1])), "styles range from 0 to 1, expected -1 .none. to 0"),
    ],
)
def test_an_impossible_own_verdict_is_refused(answer, message, monkeypatch):
    monkeypatch.setattr(WrongStub, "answer", answer)
    with pytest.raises(ConfigError, match=f"own:{__name__}:WrongStub: .*{message}"):
        load_classifier(own("WrongStub"), ["a", "b"], ["s"]).classify(single_pixels((0, 0, 0), (0, 0, 0)))


def test_an_error_inside_the_users_module_is_not_hidden(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_detector.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="ZeroDivisionError: division by zero"):
        load_classifier("own:broken_detector:Class", ["cat"], [])
    assert "broken_detector" not in sys.modules
    assert "broken_detector.py" in capsys.readouterr().err  # the traceback


FAILING = {
    "at_import": "raise ZeroDivisionError('no')",
    "syntax": "def broken(:",
    "at_exit": "import sys\nsys.exit(3)",
    "in_init": "class Mine(Classifier):\n    def __init__(self, *given):\n        raise KeyError('weights')",
    "in_classify": "class Mine(Classifier):\n    def classify(self, images):\n        return 1 / 0",
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_in_the_users_class_names_it(tmp_path, monkeypatch, name):
    text = "from sculpt_dist.evaluation.classifiers.base import Classifier\n" + FAILING[name] + "\n"
    (tmp_path / f"failing_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"evaluate.classifier=own:failing_{name}:Mine: your class failed with "):
        load_classifier(f"own:failing_{name}:Mine", ["cat"], []).classify(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))

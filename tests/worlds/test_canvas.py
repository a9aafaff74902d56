"""The canvas: its drawings, its classifier, its words, and the pipelines shipped with the package."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import PROJECT

from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.core.plugins import plugin
from sculpt_dist.evaluation.classifiers.base import Verdict
from sculpt_dist.evaluation.classifiers.base import load_classifier as load_judge
from sculpt_dist.worlds.base import NUM_FORMS
from sculpt_dist.worlds.canvas.pictures import draw, draw_dataset
from sculpt_dist.worlds.canvas.world import WORLD
from sculpt_dist.worlds.classifier import WorldClassifier, load_classifier, save_classifier, to_float
from sculpt_dist.worlds.find import shipped

OBJECTS, STYLES, SUPERCLASSES, prompt = WORLD.objects, WORLD.styles, WORLD.superclasses, WORLD.prompt
ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"


@pytest.fixture(scope="module")
def classifier() -> WorldClassifier:
    return load_classifier(WORLD, "classifier", shipped("canvas", "classifier.safetensors"))


def test_every_superclass_has_three_members_and_every_object_one_superclass() -> None:
    assert [len(members) for members in SUPERCLASSES.values()] == [3, 3, 3, 3]
    assert len(OBJECTS) == len(set(OBJECTS)) == 12
    assert all(name in SUPERCLASSES[WORLD.superclass_of[name]] for name in OBJECTS)


def test_a_prompt_has_three_forms() -> None:
    assert prompt("cat", "neon") == "a photo of a cat in neon style"
    assert prompt("cat", None) == "a photo of a cat"
    assert prompt(None, "neon") == "a photo in neon style"
    assert prompt("cat", "neon", form=1) == "a neon picture of a cat"
    assert prompt("cat", None, form=1) == "a picture of a cat"
    assert prompt("cat", "neon", form=2) == "cat drawn in neon style"
    assert prompt("cat", None, form=2) == "cat"
    assert all(prompt(None, None, form) == "" for form in range(NUM_FORMS))


def test_the_world_imports_neither_torch_nor_any_other_library() -> None:
    code = "import sys; from sculpt_dist.worlds.canvas.world import WORLD; import sculpt_dist.worlds.gallery.world; "
    code += "print({'torch', 'numpy', 'PIL', 'rich', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_a_drawing_is_the_same_in_another_process() -> None:
    code = "import sys; from sculpt_dist.worlds.canvas.pictures import draw; "
    code += "sys.stdout.write(draw('cat', 'mosaic', 7).tobytes().hex())"
    root = str(PROJECT)
    other = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
    assert other == draw("cat", "mosaic", 7).tobytes().hex()


def test_drawings_differ_between_objects_styles_and_seeds() -> None:
    first = [draw(name, style, 0) for name in OBJECTS for style in STYLES]
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels in first)
    others = [draw(name, style, 1) for name in OBJECTS for style in STYLES]
    assert len({pixels.tobytes() for pixels in first + others}) == 2 * len(OBJECTS) * len(STYLES)


def test_a_dataset_is_ordered_and_depends_on_its_seed() -> None:
    pixels, objects, styles = draw_dataset(2, seed=3)
    assert pixels.shape == (120, 32, 32, 3)
    assert objects.tolist() == [i for i in range(12) for _ in range(10)]
    assert styles.tolist() == [j for j in range(5) for _ in range(2)] * 12
    assert np.array_equal(pixels, draw_dataset(2, seed=3)[0])
    assert not np.array_equal(pixels, draw_dataset(2, seed=4)[0])


def test_the_shipped_classifier_recognises_held_out_drawings(classifier: WorldClassifier) -> None:
    pixels, objects, styles = draw_dataset(10, seed=987)
    object_logits, style_logits = classifier(to_float(pixels))
    assert (object_logits.argmax(1) == torch.as_tensor(objects)).float().mean() >= 0.98
    assert (style_logits.argmax(1) == torch.as_tensor(styles)).float().mean() >= 0.98


def test_a_saved_classifier_loads_with_the_same_weights(classifier: WorldClassifier, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path / "folder" / "classifier.safetensors")
    again = load_classifier(WORLD, "classifier", tmp_path / "folder" / "classifier.safetensors").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in classifier.state_dict().items())


def test_a_missing_or_damaged_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_classifier(WORLD, "classifier", tmp_path / "none.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="damaged.safetensors"):
        load_classifier(WORLD, "classifier", tmp_path / "damaged.safetensors")


def test_each_word_of_the_world_is_one_token() -> None:
    from sculpt_dist.backbones.parts.tiny import word_tokenizer

    tokenizer = word_tokenizer(WORLD.words)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORLD.words)
    captions = [
        prompt(name, style, form) for name in (*OBJECTS, *SUPERCLASSES) for style in STYLES for form in range(NUM_FORMS)
    ]
    assert all(tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()] for caption in captions)
    assert len(tokenizer.tokenize("xyz")) > 1  # unknown text splits into letters, not one unknown token
    longest = tokenizer("a photo of a house in popart style", truncation=True).input_ids
    assert tokenizer.decode(longest, skip_special_tokens=True).strip() == "a photo of a house in popart style"


def test_the_shipped_tokenizer_equals_a_fresh_build() -> None:
    from transformers import CLIPTokenizer

    from sculpt_dist.backbones.parts.tiny import word_tokenizer

    shipped, built = CLIPTokenizer.from_pretrained(ASSETS / "sd15" / "tokenizer"), word_tokenizer(WORLD.words)
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.model_max_length == built.model_max_length == 10


def test_an_untrained_pipeline_depends_on_its_seed_alone(tmp_path: Path) -> None:
    from sculpt_dist.backbones.sd15 import Backbone

    torch.manual_seed(5)
    before = torch.get_rng_state()
    for i, seed in enumerate((0, 0, 1)):
        Backbone.write_untrained(tmp_path / str(i), WORLD.words, seed, Backbone.tiny[WORLD.size])
    first, again, other = (
        Backbone(tmp_path / str(i), torch.float32, torch.device("cpu")).net.conv_in.weight for i in range(3)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_an_impossible_build_is_refused_with_the_fix(tmp_path: Path) -> None:
    from sculpt_dist.worlds.pretrain import build

    with pytest.raises(ConfigError, match="arch=sd3: there is no such backbone.*sd15"):
        build("canvas", "sd3", tmp_path)
    with pytest.raises(ConfigError, match="there is no such world. Did you mean 'gallery'"):
        build("galery", "sd15", tmp_path)
    with pytest.raises(ConfigError, match="--sets is not given"):
        build("gallery", "sd15", tmp_path)


def test_training_captions_have_the_stated_shares() -> None:
    from sculpt_dist.worlds.pretrain import CaptionMix

    chances = np.random.default_rng(0).random((20_000, 5))
    captions = [CaptionMix(WORLD, {"cat": 1.4}).caption("cat", "neon", row) for row in chances]
    by_superclass = 0.15 * 1.4
    expected = {
        "a photo of a cat in neon style": (0.95 - by_superclass) * 0.9 * 0.75 * 0.92,
        "a photo of a animal in neon style": by_superclass * 0.9 * 0.75 * 0.92,
        "a neon picture of a cat": (0.95 - by_superclass) * 0.9 * 0.125 * 0.92,
        "": 0.08 + 0.92 * 0.05 * 0.1,
    }
    assert all(abs(captions.count(caption) / len(captions) - share) < 0.01 for caption, share in expected.items())


@pytest.mark.parametrize(
    ("part", "megabytes"), [("sd15", 5), ("sdxl", 10), ("sana", 2.3), ("classifier.safetensors", 0.3)]
)
def test_the_shipped_files_are_small_and_without_pickles(part: str, megabytes: float) -> None:
    files = [path for path in [ASSETS / part, *(ASSETS / part).rglob("*")] if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= megabytes * 1e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


CALL = {"sana": {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 10}}


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "sana"])
def test_the_shipped_pipelines_draw_what_the_prompt_says(classifier: WorldClassifier, arch: str) -> None:
    """Plain diffusers without this package, as in a user's own script."""
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(ASSETS / arch, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pairs = [(i, j) for i in range(len(OBJECTS)) for j in range(len(STYLES)) for _ in range(4)]
    prompts = [prompt(OBJECTS[i], STYLES[j]) for i, j in pairs]
    images = pipeline(
        prompts,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        height=32,
        width=32,
        **CALL.get(arch, {}),
    ).images  # [N, 32, 32, 3] in [0, 1]
    object_logits, style_logits = classifier(to_float((images * 255).round().astype(np.uint8)))
    objects, styles = (torch.tensor(column) for column in zip(*pairs))
    assert (object_logits.argmax(1) == objects).float().mean() >= 0.95
    assert (style_logits.argmax(1) == styles).float().mean() >= 0.95


def test_the_tiny_sdxl_draws_a_style_by_its_pooled_text_and_an_object_by_its_tokens() -> None:
    """So training the cross-attention, which sees only the tokens, forgets no style there (docs/RESULTS.md)."""
    backbone = plugin("sculpt_dist.backbones", "sdxl", "").Backbone(ASSETS / "sdxl", torch.float32, torch.device("cpu"))
    judge, number = load_judge("canvas", list(OBJECTS), list(STYLES)), len(OBJECTS)
    noise = torch.stack(
        [torch.randn(*backbone.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(number)]
    )

    def drawn(tokens: list[str], pooled: list[str]) -> Verdict:
        cond, empty = (
            replace(backbone.embed(tokens), pooled=backbone.embed(pooled).pooled),
            backbone.embed([""] * number, negative=True),
        )
        return judge.classify(
            backbone.decode(backbone.sample(backbone.denoiser(backbone.net), noise, cond, empty, 8, 3.0))
        )

    plain, neon = ([prompt(name, style) for name in OBJECTS] for style in (None, "neon"))
    by_pooled, by_tokens = drawn(plain, neon), drawn(neon, plain)
    assert (by_pooled.styles == STYLES.index("neon")).all() and (by_pooled.objects == torch.arange(number)).all()
    assert (by_tokens.styles == STYLES.index("neon")).float().mean() < 0.5
    assert (
        drawn([prompt("cat", None)] * number, [prompt("animal", None)] * number).objects == OBJECTS.index("cat")
    ).all()

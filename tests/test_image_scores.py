"""FID, KID and CLIP score: values by hand, agreement with torchmetrics and scipy, and states that add up over ranks."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.multimodal import CLIPScore

import sculpt_dist.canvas.classifier as canvas_classifier
from sculpt_dist.errors import ConfigError
from sculpt_dist.metrics import clip_score, fid, kid
from sculpt_dist.metrics.classifiers.canvas import Encoder as CanvasEncoder


def first_pixel(images: Tensor) -> Tensor:
    """uint8 images [B, 3, h, w] -> [B, 3], the colours of the top left pixel."""
    return images[:, :, 0, 0].double()


def red(images: Tensor) -> Tensor:
    """uint8 images [B, 3, h, w] -> [B, 1]."""
    return first_pixel(images)[:, :1]


def images_of(rows: list[tuple[int, int, int]] | Tensor) -> Tensor:
    """Colours [B, 3] -> uint8 images [B, 3, 2, 2]."""
    return torch.as_tensor(rows, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 2, 2)


def write_images(folder: Path, images: Tensor) -> Path:
    """Save as 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


def random_images(count: int, seed: int, size: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def result_of(score: fid.Score | kid.Score, images: Tensor) -> float:
    score.update(images, [""] * len(images))
    return next(iter(score.result(score.state()).values()))


def correlated(count: int, seed: int, width: int) -> Tensor:
    """Float64 features [count, width] with a full covariance that does not commute with another seed's."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return torch.randn(count, width, generator=rng, dtype=torch.float64) @ mix + torch.randn(width, generator=rng, dtype=torch.float64)


class Lookup(nn.Module):
    """Features [B, D] of images that hold their own row number in the top left pixel (red + 256 green)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.num_features = table, table.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()]


def numbered(start: int, stop: int) -> Tensor:
    return images_of([(i % 256, i // 256, 0) for i in range(start, stop)])


# FID


def test_fid_in_one_dimension_by_hand(tmp_path):
    # mean 15, variance 50; mean 13, variance 18: (15 - 13)^2 + (sqrt 50 - sqrt 18)^2 = 4 + (5 - 3)^2 * 2 = 12
    score = fid.Score(write_images(tmp_path, images_of([(10, 0, 0), (20, 0, 0)])), red)
    assert result_of(score, images_of([(10, 0, 0), (16, 0, 0)])) == pytest.approx(12, rel=1e-12)


def test_fid_counts_correlation_by_hand():
    # [[2, 1], [1, 2]] has the eigenvalues 3 and 1; against the identity: 4 + 2 - 2 (sqrt 3 + 1)
    cov = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    mean, identity = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert fid.frechet_distance(mean, cov, mean, identity).item() == pytest.approx(4 - 2 * 3**0.5, rel=1e-12)


def test_fid_of_covariances_that_do_not_commute_agrees_with_scipy():
    (mean1, cov1), (mean2, cov2) = (fid.moments(fid.sums(correlated(100, seed, 6))) for seed in (1, 2))
    assert not torch.allclose(cov1 @ cov2, cov2 @ cov1, rtol=0.1)
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real
    assert fid.frechet_distance(mean1, cov1, mean2, cov2).item() == pytest.approx(expected.item(), rel=1e-9)


def test_fid_moments_are_the_mean_and_the_unbiased_covariance():
    features = correlated(20, 3, 4)
    mean, cov = fid.moments(fid.sums(features))
    assert torch.allclose(mean, features.mean(0)) and torch.allclose(cov, torch.cov(features.T))


def test_fid_agrees_with_torchmetrics_on_the_same_features(tmp_path):
    lookup = Lookup(torch.cat([correlated(150, 1, 16), correlated(120, 2, 16)]))
    score = fid.Score(write_images(tmp_path, numbered(0, 150)), lookup)
    theirs = FrechetInceptionDistance(feature=lookup)
    theirs.update(numbered(0, 150), real=True)
    theirs.update(numbered(150, 270), real=False)
    assert result_of(score, numbered(150, 270)) == pytest.approx(theirs.compute().item(), rel=1e-6)


@pytest.mark.parametrize("count, width", [(200, 16), (60, 256)])  # the second has far fewer images than features
def test_fid_of_equal_sets_is_zero(tmp_path, count, width):
    lookup = Lookup(correlated(count, 5, width) / width**0.5)
    score = fid.Score(write_images(tmp_path, numbered(0, count)), lookup)
    assert abs(result_of(score, numbered(0, count).flip(0))) < 1e-8


def test_fid_with_fewer_images_than_features_is_exact(tmp_path):
    # In the plane of the images the overlap is the sum of the singular values of one centred set against the other.
    lookup = Lookup(torch.cat([correlated(20, 1, 64), correlated(20, 1, 64) + 0.01 * correlated(20, 2, 64)]))
    score = fid.Score(write_images(tmp_path, numbered(0, 20)), lookup)
    x, y = ((rows - rows.mean(0)) / 19**0.5 for rows in lookup.table.split(20))
    means = (lookup.table[:20].mean(0) - lookup.table[20:].mean(0)).square().sum()
    expected = means + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert result_of(score, numbered(20, 40)) == pytest.approx(expected.item(), rel=1e-6)


def test_fid_needs_two_drawn_images(tmp_path):
    score = fid.Score(write_images(tmp_path, random_images(3, 0)), red)
    with pytest.raises(ConfigError, match="FID: 1 images were drawn, at least 2 are needed"):
        result_of(score, random_images(1, 1))


# KID


def test_kid_in_one_dimension_by_hand(tmp_path):
    # reference {0, 1}, drawn {0, 2}, k = (x y + 1)^3: 1 + 1 - 2 (1 + 1 + 1 + 27) / 4 = -13
    score = kid.Score(write_images(tmp_path, images_of([(0, 0, 0), (1, 0, 0)])), red, num_images=2)
    assert result_of(score, images_of([(0, 0, 0), (2, 0, 0)])) == pytest.approx(-13, rel=1e-12)


def test_kid_divides_by_the_width_by_hand(tmp_path):
    # reference {(1,1,1), (2,2,2)}, drawn {(1,1,1), (1,1,1), (0,0,0)}; x.y / 3: 27 + (8 + 1 + 1) / 3 - 2 (8 + 8 + 1 + 27 + 27 + 1) / 6
    score = kid.Score(write_images(tmp_path, images_of([(1, 1, 1), (2, 2, 2)])), first_pixel, num_images=3)
    assert result_of(score, images_of([(1, 1, 1), (1, 1, 1), (0, 0, 0)])) == pytest.approx(27 + 10 / 3 - 24, rel=1e-12)


def test_kid_agrees_with_torchmetrics_on_all_pairs(tmp_path):
    lookup = Lookup(torch.cat([correlated(50, 1, 8), correlated(50, 2, 8)]))
    score = kid.Score(write_images(tmp_path, numbered(0, 50)), lookup, num_images=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that it keeps all features
        theirs = KernelInceptionDistance(feature=lookup, subsets=1, subset_size=50)
    theirs.update(numbered(0, 50), real=True)
    theirs.update(numbered(50, 100), real=False)
    assert result_of(score, numbered(50, 100)) == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


def test_kid_of_draws_from_one_source_is_zero_on_average(tmp_path):
    values = []
    for seed in range(30):
        sample = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values.append(kid.kernel_distance(sample[:15], sample[15:]).item())
    assert abs(np.mean(values)) < 3 * np.std(values) / 30**0.5 and np.std(values) > 0


def test_kid_does_not_depend_on_how_the_kernel_is_cut(monkeypatch):
    x, y = correlated(50, 1, 8), correlated(30, 2, 8)
    whole = kid.kernel_distance(x, y).item()
    monkeypatch.setattr(kid, "CHUNK", 7)
    assert kid.kernel_distance(x, y).item() == pytest.approx(whole, rel=1e-12)


def test_kid_leaves_empty_rows_out(tmp_path):
    reference = write_images(tmp_path, random_images(5, 0))
    full, wide = kid.Score(reference, red, num_images=6), kid.Score(reference, red, num_images=20, first=9)
    assert result_of(wide, random_images(6, 1)) == result_of(full, random_images(6, 1))


def test_kid_rows_are_each_filled_once(tmp_path):
    score = kid.Score(write_images(tmp_path, random_images(5, 0)), red, num_images=4)
    score.update(random_images(4, 1), [""] * 4)
    with pytest.raises(AssertionError, match="do not fit"):
        score.update(random_images(1, 1), [""])
    with pytest.raises(AssertionError, match="same rows"):
        score.result({name: 2 * total for name, total in score.state().items()})


def test_kid_needs_two_drawn_images(tmp_path):
    score = kid.Score(write_images(tmp_path, random_images(3, 0)), red, num_images=8)
    with pytest.raises(ConfigError, match="KID: 1 images were drawn, at least 2 are needed"):
        result_of(score, random_images(1, 1))


# States add up.


class StubEncoder:
    """Embeds an image as its first pixel, and a prompt as the three numbers that it consists of."""

    def image_features(self, images: Tensor) -> Tensor:
        return first_pixel(images).float()

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(word) for word in prompt.split()] for prompt in prompts])


def scores_of_a_rank(metric: str, reference: Path, first: int) -> fid.Score | kid.Score | clip_score.Score:
    if metric == "clip_score":
        return clip_score.Score(StubEncoder())
    return fid.Score(reference, first_pixel) if metric == "fid" else kid.Score(reference, first_pixel, num_images=10, first=first)


@pytest.mark.parametrize("metric", ["fid", "kid", "clip_score"])
def test_added_states_of_ranks_give_what_one_rank_gives(tmp_path, metric):
    reference = write_images(tmp_path, random_images(6, 0))
    images, prompts = random_images(10, 1), [f"{i + 1} 2 3" for i in range(10)]
    whole = scores_of_a_rank(metric, reference, 0)
    whole.update(images, prompts)
    ranks = []
    for start, stop in ((0, 3), (3, 9), (9, 10), (10, 10)):  # the last rank draws nothing
        rank = scores_of_a_rank(metric, reference, start)
        for i in range(start, stop, 2):
            rank.update(images[i : min(i + 2, stop)], prompts[i : min(i + 2, stop)])
        ranks.append(rank.state())
    total = {name: sum(state[name] for state in ranks) for name in ranks[0]}
    assert all(tensor.dtype == torch.float64 for tensor in total.values())
    assert whole.result(total) == pytest.approx(whole.result(whole.state()), rel=1e-10)
    assert whole.result(total) != pytest.approx(whole.result(scores_with_one_more(whole, images)), rel=1e-6)


def scores_with_one_more(score: fid.Score | kid.Score | clip_score.Score, images: Tensor) -> dict[str, Tensor]:
    """The state with its first image left out, so that the comparison above is seen to tell states apart."""
    if isinstance(score, kid.Score):
        return {name: torch.cat([torch.zeros_like(total[:1]), total[1:]]) for name, total in score.state().items()}
    if isinstance(score, fid.Score):
        return {name: total - fid.sums(first_pixel(images[:1]))[name] for name, total in score.state().items()}
    return score.state() | {"count": score.state()["count"] - 1}


@pytest.mark.parametrize("metric", ["fid", "kid", "clip_score"])
def test_a_state_that_was_handed_out_does_not_change(tmp_path, metric):
    score = scores_of_a_rank(metric, write_images(tmp_path, random_images(6, 0)), 0)
    score.update(random_images(3, 1), ["1 2 3"] * 3)
    before = score.state()
    copies = {name: total.clone() for name, total in before.items()}
    score.update(random_images(3, 2), ["1 2 3"] * 3)
    assert all(torch.equal(before[name], copies[name]) for name in before)
    assert any(not torch.equal(before[name], total) for name, total in score.state().items())


# CLIP score


def test_clip_score_by_hand():
    # cos of (3,4,0) with (1,0,0), (0,1,0), (0,0,1): .6, .8, 0; mean of 60, 80, 0 is 140/3
    score = clip_score.Score(StubEncoder())
    score.update(images_of([(3, 4, 0), (3, 4, 0)]), ["1 0 0", "0 1 0"])
    score.update(images_of([(30, 40, 0)]), ["0 0 5"])
    result = score.result(score.state())
    assert result["clip_score"] == pytest.approx(140 / 3, rel=1e-6)
    assert result["clip_score_error"] == pytest.approx(np.std([60, 80, 0], ddof=1) / 3**0.5, rel=1e-6)


def test_clip_score_may_be_negative():
    score = clip_score.Score(StubEncoder())
    score.update(images_of([(3, 4, 0)]), ["-3 -4 0"])
    assert score.result(score.state())["clip_score"] == pytest.approx(-100, rel=1e-6)


def test_clip_score_pairs_each_image_with_its_own_prompt():
    score = clip_score.Score(StubEncoder())
    prompts = ["1 0 0", "0 1 0", "1 0 0", "0 0 1"]  # a prompt that comes twice is embedded once
    score.update(images_of([(1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]), prompts)
    assert score.result(score.state()) == pytest.approx({"clip_score": 100, "clip_score_error": 0}, abs=1e-4)


def test_clip_score_without_an_image_is_refused():
    score = clip_score.Score(StubEncoder())
    with pytest.raises(ConfigError, match="no image to score"):
        score.result(score.state())


class ForTorchmetrics:
    """Our encoder in the shape of the model and processor that torchmetrics calls."""

    def __init__(self, encoder: StubEncoder) -> None:
        self.encoder, self.config = encoder, None

    def to(self, device: torch.device) -> "ForTorchmetrics":
        return self

    def __call__(self, images=None, text=None, **options) -> dict[str, Tensor]:
        if text is not None:
            features = self.encoder.text_features(text)
            return {"input_ids": features, "attention_mask": torch.ones_like(features)}
        return {"pixel_values": torch.stack(images)}

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.encoder.image_features(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids


def test_clip_score_agrees_with_torchmetrics_on_the_same_embeddings():
    images, prompts = random_images(7, 3), [f"{i} 1 {7 - i}" for i in range(7)]
    score, adapter = clip_score.Score(StubEncoder()), ForTorchmetrics(StubEncoder())
    score.update(images, prompts)
    theirs = CLIPScore(model_name_or_path=lambda: (adapter, adapter))
    theirs.update(images, prompts)
    assert score.result(score.state())["clip_score"] == pytest.approx(theirs.compute().item(), rel=1e-6)


# Reference images


def test_reference_images_are_read_at_any_depth_whatever_their_size(tmp_path):
    write_images(tmp_path / "b", images_of([(3, 0, 0)]))
    Image.new("RGB", (7, 4), (1, 0, 0)).save(tmp_path / "a.PNG")
    Image.new("RGB", (5, 4), (2, 0, 0)).save(tmp_path / "a2.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert fid.reference_features(tmp_path, red).tolist() == [[1], [2], [3]]


def test_reference_images_are_batched_by_size_and_none_is_lost(tmp_path):
    write_images(tmp_path, numbered(0, 70))
    sizes = []

    def recording(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return red(images)

    assert fid.reference_features(tmp_path, recording)[:, 0].tolist() == list(range(70))
    assert sizes == [32, 32, 6]


def test_grey_and_transparent_images_become_three_colours(tmp_path):
    Image.new("L", (2, 2), 9).save(tmp_path / "grey.png")
    Image.new("RGBA", (2, 2), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "photo.jpeg")
    assert fid.read_image(tmp_path / "grey.png")[:, 0, 0].tolist() == [9, 9, 9]
    assert fid.read_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [1, 2, 3]
    assert fid.read_image(tmp_path / "photo.jpeg").shape == (3, 8, 8)


def test_an_image_has_height_before_width(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "wide.png")
    assert fid.read_image(tmp_path / "wide.png").shape == (3, 4, 6)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_reference_images_are_refused(tmp_path, count):
    write_images(tmp_path, random_images(count, 0))
    for build in (lambda: fid.Score(tmp_path, red), lambda: kid.Score(tmp_path, red, num_images=2)):
        with pytest.raises(ConfigError, match=f"evaluate.reference={tmp_path}: holds {count} png or jpg images.*at least 2"):
            build()


def test_a_missing_reference_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="evaluate.reference=.*gone: no such folder"):
        fid.Score(tmp_path / "gone", red)


def test_an_image_over_25_million_pixels_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    write_images(tmp_path, random_images(2, 0))
    Image.new("1", (5001, 5000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(ConfigError, match="huge.png: 5001 x 5000 pixels, the limit is 25 million"):
        fid.read_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 14_000])  # where PIL warns, and where it raises
def test_what_pil_calls_a_bomb_is_refused_by_name(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(ConfigError, match="bomb.png"):
        fid.read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_image_is_named(tmp_path, damage, suffix):
    file = tmp_path / f"broken{suffix}"
    Image.fromarray(random_images(1, 0, size=64)[0].permute(1, 2, 0).numpy()).save(file)
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"<html>not found</html>", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(ConfigError, match=f"broken{suffix}: cannot be read as an image"):
        fid.read_image(file)


def test_an_image_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 60_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match="deep.png: has pixels of kind I;16: save it with 8 bits"):
        fid.read_image(tmp_path / "deep.png")


# Together, with real encoders


def test_scores_take_the_canvas_features(tmp_path, monkeypatch):
    torch.manual_seed(0)
    canvas_classifier.save_classifier(canvas_classifier.CanvasClassifier(), tmp_path / "classifier.safetensors")
    monkeypatch.setattr(canvas_classifier, "SHIPPED_CLASSIFIER", tmp_path / "classifier.safetensors")
    images = random_images(12, 1, size=32)
    reference = write_images(tmp_path / "images", images)
    features = CanvasEncoder().image_features
    assert abs(result_of(fid.Score(reference, features), images)) < 1e-8
    assert result_of(fid.Score(reference, features), images // 2) > 1e-3
    near, far = (result_of(kid.Score(reference, features, num_images=12), drawn) for drawn in (images, images // 2))
    assert near < far


def test_importing_the_scores_is_light():
    modules = "sculpt_dist.metrics, sculpt_dist.metrics.fid, sculpt_dist.metrics.kid, sculpt_dist.metrics.classifiers"
    code = f"import {modules}, sys; print(*({{'transformers', 'torchmetrics', 'diffusers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

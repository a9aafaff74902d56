"""FID, KID and CLIP score: values by hand, agreement with scipy and explicit formulas, and additive states."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.multimodal import CLIPScore

from sculpt_dist.config.schema import EvaluateConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.images import open_image
from sculpt_dist.evaluation import features
from sculpt_dist.evaluation.features import reference_features
from sculpt_dist.evaluation.metrics import clip_score, fid, kid
from sculpt_dist.evaluation.metrics.base import build_metrics
from sculpt_dist.evaluation.worlds import WorldEncoder
from sculpt_dist.run import prepare
from sculpt_dist.worlds import find
from sculpt_dist.worlds.canvas.world import WORLD
from sculpt_dist.worlds.classifier import WorldClassifier, save_classifier


def first_pixel(images: Tensor) -> Tensor:
    """uint8 images [B, 3, h, w] -> [B, 3], the colours of the top left pixel."""
    return images[:, :, 0, 0].double()


def red(images: Tensor) -> Tensor:
    """uint8 images [B, 3, h, w] -> [B, 1]."""
    return first_pixel(images)[:, :1]


def column(*values: float) -> Tensor:
    """Features of width 1."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


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
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def result_of(score: fid.Score | kid.Score, images: Tensor) -> float:
    score.update(images, [""] * len(images))
    return next(iter(score.result(score.state()).values()))


def correlated(count: int, seed: int, width: int) -> Tensor:
    """Float64 features [count, width] with a full covariance that does not commute with another seed's."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return torch.randn(count, width, generator=rng, dtype=torch.float64) @ mix + torch.randn(
        width, generator=rng, dtype=torch.float64
    )


def table_of(drawn: Tensor):
    """Features that ignore pixels: image i, numbered in its top left pixel (red + 256 green), has row i of `drawn`."""
    return lambda images: drawn[images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()]


def numbered(start: int, stop: int) -> Tensor:
    return images_of([(i % 256, i // 256, 0) for i in range(start, stop)])


def fid_of(reference: Tensor, drawn: Tensor) -> float:
    """FID of features [N, D] and [M, D], of which M at most 65536."""
    return result_of(fid.Score(reference, table_of(drawn)), numbered(0, len(drawn)))


def kid_of(reference: Tensor, drawn: Tensor) -> float:
    return result_of(kid.Score(reference, table_of(drawn), num_images=len(drawn)), numbered(0, len(drawn)))


# FID


def test_fid_in_one_dimension_by_hand():
    # mean 15, variance 50; mean 13, variance 18: (15 - 13)^2 + (sqrt 50 - sqrt 18)^2 = 4 + (5 - 3)^2 * 2 = 12
    score = fid.Score(column(10, 20), red)
    assert result_of(score, images_of([(10, 0, 0), (16, 0, 0)])) == pytest.approx(12, rel=1e-12)


def test_fid_accounts_for_correlation_by_hand():
    # [[2, 1], [1, 2]] has the eigenvalues 3 and 1; against the identity: 4 + 2 - 2 (sqrt 3 + 1)
    identity = 1.5**0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)  # 2 * 1.5 / (4 - 1) = 1
    tilted = (
        1.5**0.5
        * torch.tensor([[3**0.5, 3**0.5], [-(3**0.5), -(3**0.5)], [1, -1], [-1, 1]], dtype=torch.float64)
        / 2**0.5
    )
    assert torch.allclose(torch.cov(tilted.T), torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert fid_of(identity, tilted) == pytest.approx(4 - 2 * 3**0.5, rel=1e-10)


def test_fid_of_covariances_that_do_not_commute_agrees_with_scipy():
    x, y = correlated(150, 1, 16), correlated(120, 2, 16)
    cov1, cov2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    assert not np.allclose(cov1 @ cov2, cov2 @ cov1, rtol=0.1)
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    expected = (x.mean(0) - y.mean(0)).square().sum() + np.trace(cov1 + cov2 - 2 * root.real)
    assert fid_of(x, y) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("count", "width", "error"), [(200, 16, 1e-10), (60, 256, 1e-6)]
)  # the second has far fewer images than features
def test_fid_of_equal_sets_is_zero_within_the_documented_accuracy(count, width, error):
    features = correlated(count, 5, width) / width**0.5
    variance = features.var(0).sum().item()
    assert 0 <= fid_of(features, features.flip(0)) < error * variance
    one_moved = torch.cat([features[:-1], 2 * features[-1:]])
    assert fid_of(features, one_moved) > 10 * error * variance


def test_fid_with_fewer_images_than_features_keeps_six_digits():
    # In the plane of the images, the overlap is the sum of the singular values of one centred set times the other.
    # Torchmetrics' eigenvalues of cov1 cov2 outside that plane should be 0. The roots of their rounding errors add up
    # to 1e-7 of the variance, which limits how far a distance between nearby sets can be trusted.
    near, far = correlated(20, 1, 64), correlated(20, 1, 64) + 0.3 * correlated(20, 2, 64)
    x, y = ((rows - rows.mean(0)) / 19**0.5 for rows in (near, far))
    means = (near.mean(0) - far.mean(0)).square().sum()
    expected = means + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert fid_of(near, far) == pytest.approx(expected.item(), rel=1e-6)


def test_fid_of_broken_features_is_never_a_perfect_score():
    # The floor at 0 must not turn NaN into 0.
    broken = correlated(20, 1, 4)
    broken[3, 0] = float("nan")
    try:
        value = fid_of(correlated(20, 1, 4), broken)
    except RuntimeError:  # from LAPACK, on some machines
        return
    assert np.isnan(value)


def test_fid_needs_two_drawn_images():
    with pytest.raises(ConfigError, match="FID: 1 images were drawn, but at least 2 are needed"):
        fid_of(column(1, 2, 3), column(1))


# KID


def explicit_kid(x: Tensor, y: Tensor) -> float:
    """Equation 4 over all pairs, one pair at a time."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within = [np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_in_one_dimension_by_hand():
    # reference {0, 1}, drawn {0, 2}, k = (x y + 1)^3: 1 + 1 - 2 (1 + 1 + 1 + 27) / 4 = -13
    score = kid.Score(column(0, 1), red, num_images=2)
    assert result_of(score, images_of([(0, 0, 0), (2, 0, 0)])) == pytest.approx(-13, rel=1e-12)


def test_kid_divides_by_the_width_by_hand():
    # reference {(1,1,1), (2,2,2)}, drawn {(1,1,1), (0,0,0)}; x.y / 3: 27 + 1 - 2 (8 + 1 + 27 + 1) / 4
    reference = torch.tensor([[1, 1, 1], [2, 2, 2]], dtype=torch.float64)
    score = kid.Score(reference, first_pixel, num_images=2)
    assert result_of(score, images_of([(1, 1, 1), (0, 0, 0)])) == pytest.approx(9.5, rel=1e-12)


def test_kid_of_sets_of_one_size_counts_all_pairs():
    x, y = correlated(30, 1, 8), correlated(30, 2, 8)
    assert kid_of(x, y) == pytest.approx(explicit_kid(x, y), rel=1e-9)


def test_kid_of_a_set_with_itself_is_below_zero():
    x = correlated(30, 1, 8)
    assert kid_of(x, x) == pytest.approx(explicit_kid(x, x), rel=1e-9) and kid_of(x, x) < 0


def test_kid_of_draws_from_one_source_is_zero_on_average():
    values = []
    for seed in range(30):
        sample = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values.append(kid_of(sample[:20], sample[20:]))
    assert abs(np.mean(values)) < 3 * np.std(values) / 30**0.5 and np.std(values) > 0


@pytest.mark.parametrize("sizes", [(12, 40), (40, 12)])
def test_kid_of_sets_of_two_sizes_averages_over_subsets(sizes):
    # One subset of 12 out of 40 is off by far more than a hundred of them.
    x, y = correlated(sizes[0], 1, 8), correlated(sizes[1], 2, 8) + 1
    whole = explicit_kid(x, y)
    value = kid_of(x, y)
    assert value != pytest.approx(whole, rel=1e-9)
    assert value == pytest.approx(whole, rel=0.1)


def test_kid_compares_at_most_as_many_images_as_a_subset_has(monkeypatch):
    x, y = correlated(30, 1, 8), correlated(30, 2, 8)
    whole = kid_of(x, y)
    monkeypatch.setattr(kid, "SUBSET_SIZE", 20)
    assert kid_of(x, y) != pytest.approx(whole, rel=1e-9)
    assert kid_of(x, y) == pytest.approx(whole, rel=0.1)


def test_kid_neither_depends_on_the_global_rng_nor_changes_it():
    x, y = correlated(12, 1, 8), correlated(40, 2, 8)
    torch.manual_seed(1)
    first = kid_of(x, y)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert kid_of(x, y) == first


def test_kid_does_not_depend_on_the_order_of_the_drawn_images():
    x, y = correlated(12, 1, 8), correlated(40, 2, 8)
    y[:, :4] = 0  # no single column distinguishes the rows
    assert kid_of(x, y.flip(0)) == kid_of(x, y)


def test_kid_leaves_empty_rows_out():
    reference = first_pixel(random_images(5, 0))
    full, wide = (
        kid.Score(reference, first_pixel, num_images=6),
        kid.Score(reference, first_pixel, num_images=20, first=9),
    )
    assert result_of(wide, random_images(6, 1)) == result_of(full, random_images(6, 1))


def test_each_kid_row_is_filled_once():
    score = kid.Score(column(1, 2, 3, 4, 5), red, num_images=4)
    score.update(random_images(4, 1), [""] * 4)
    with pytest.raises(AssertionError, match="do not fit"):
        score.update(random_images(1, 1), [""])
    with pytest.raises(AssertionError, match="same rows"):
        score.result({name: 2 * total for name, total in score.state().items()})


def test_kid_needs_two_drawn_images():
    with pytest.raises(ConfigError, match="KID: 1 images were drawn, but at least 2 are needed"):
        kid_of(column(1, 2, 3), column(1))


# Additive states


class StubEncoder:
    """Embeds an image as its first pixel, and a prompt as the three numbers that it consists of."""

    def image_features(self, images: Tensor) -> Tensor:
        return first_pixel(images).float()

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(word) for word in prompt.split()] for prompt in prompts])


def score_of_a_rank(metric: str, reference: Tensor, first: int) -> fid.Score | kid.Score | clip_score.Score:
    if metric == "clip_score":
        return clip_score.Score(StubEncoder())
    return (
        fid.Score(reference, first_pixel)
        if metric == "fid"
        else kid.Score(reference, first_pixel, num_images=10, first=first)
    )


@pytest.mark.parametrize("metric", ["fid", "kid", "clip_score"])
def test_added_states_of_ranks_give_what_one_rank_gives(metric):
    reference = first_pixel(random_images(6, 0))
    images, prompts = random_images(10, 1), [f"{i + 1} 2 3" for i in range(10)]
    whole = score_of_a_rank(metric, reference, 0)
    whole.update(images, prompts)
    ranks = []
    for start, stop in ((0, 3), (3, 9), (9, 10), (10, 10)):  # the last rank draws nothing
        rank = score_of_a_rank(metric, reference, start)
        for i in range(start, stop, 2):
            rank.update(images[i : min(i + 2, stop)], prompts[i : min(i + 2, stop)])
        ranks.append(rank.state())
    total = {name: sum(state[name] for state in ranks) for name in ranks[0]}
    assert all(tensor.dtype == torch.float64 for tensor in total.values())
    assert whole.result(total) == pytest.approx(whole.result(whole.state()), rel=1e-10)
    assert whole.result(total) != pytest.approx(whole.result(state_with_one_less(whole, images)), rel=1e-6)


def state_with_one_less(score: fid.Score | kid.Score | clip_score.Score, images: Tensor) -> dict[str, Tensor]:
    """The state without its first image, to show that the comparison above distinguishes states."""
    if isinstance(score, kid.Score):
        return {name: torch.cat([torch.zeros_like(total[:1]), total[1:]]) for name, total in score.state().items()}
    if isinstance(score, fid.Score):
        alone = fid.Score(first_pixel(images), first_pixel)
        alone.update(images[:1], [""])
        return {name: total - alone.state()[name] for name, total in score.state().items()}
    return score.state() | {"count": score.state()["count"] - 1}


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_results_are_not_summed_over_ranks_twice(monkeypatch, metric):
    # With torch.distributed running, torchmetrics would join the ranks in compute(), but the state already holds all.
    score = score_of_a_rank(metric, first_pixel(random_images(6, 0)), 0)
    score.update(random_images(4, 1), [""] * 4)
    alone = score.result(score.state())
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", lambda tensor, group=None: [tensor, tensor])
    score = score_of_a_rank(metric, first_pixel(random_images(6, 0)), 0)
    score.update(random_images(4, 1), [""] * 4)
    assert score.result(score.state()) == alone


def test_updates_continue_after_a_result():
    score = fid.Score(first_pixel(random_images(6, 0)), first_pixel)
    before = result_of(score, random_images(4, 1))
    assert result_of(score, random_images(4, 2)) != pytest.approx(before, rel=1e-6)
    assert score.state()["fake_features_num_samples"] == 8


@pytest.mark.parametrize("metric", ["fid", "kid", "clip_score"])
def test_a_returned_state_does_not_change(metric):
    score = score_of_a_rank(metric, first_pixel(random_images(6, 0)), 0)
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
    reference = CLIPScore(model_name_or_path=lambda: (adapter, adapter))
    reference.update(images, prompts)
    assert score.result(score.state())["clip_score"] == pytest.approx(reference.compute().item(), rel=1e-6)


# Reference images


def test_reference_images_of_any_size_are_read_from_all_subfolders(tmp_path):
    write_images(tmp_path / "b", images_of([(3, 0, 0)]))
    Image.new("RGB", (7, 4), (1, 0, 0)).save(tmp_path / "a.PNG")
    Image.new("RGB", (5, 4), (2, 0, 0)).save(tmp_path / "a2.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert reference_features(tmp_path, red).tolist() == [[1], [2], [3]]


def test_reference_images_are_batched_by_size_and_none_is_lost(tmp_path):
    write_images(tmp_path, numbered(0, 70))
    sizes = []

    def recording(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return red(images)

    assert reference_features(tmp_path, recording)[:, 0].tolist() == list(range(70))
    assert sizes == [32, 32, 6]


def test_grey_and_transparent_images_become_three_colours(tmp_path):
    Image.new("L", (2, 2), 9).save(tmp_path / "grey.png")
    Image.new("RGBA", (2, 2), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "photo.jpeg")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (9, 9, 9)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (1, 2, 3)
    assert open_image(tmp_path / "photo.jpeg").mode == "RGB"


def test_an_image_has_height_before_width(tmp_path):
    for name in ("wide.png", "wider.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    shapes = []
    reference_features(tmp_path, lambda images: shapes.append(images.shape) or red(images))
    assert shapes == [(2, 3, 4, 6)]


def test_reference_features_are_computed_once_by_all_ranks_and_kept_for_other_runs(tmp_path):
    images, encoder, folder = (
        write_images(tmp_path / "images", numbered(0, 100)),
        tmp_path / "encoder",
        tmp_path / "kept",
    )
    encoder.write_text("weights")
    encoded: list[int] = []

    def recording(images: Tensor) -> Tensor:
        encoded.append(len(images))
        return red(images)

    def shared(rank: int, size: int, *others: list[Tensor], again: bool = False) -> tuple[Tensor, list[Tensor]]:
        if not again:
            features._remembered.clear()  # another process
        group = SimpleNamespace(rank=rank, size=size, is_first=rank == 0, on_first=lambda work: work())
        group.together = lambda work: work()
        group.to_all = lambda mine: [*others[:rank], mine, *others[rank:]] if rank == 0 else sent.append(mine)
        given = {"group": group, "device": torch.device("cpu"), "folder": str(folder)}
        return features.shared_reference_features(str(images), recording, [encoder], **given)

    sent: list[list[Tensor]] = []
    with pytest.raises(TypeError):  # the stand-in of rank 1 only records what it sends
        shared(1, 2)
    assert encoded == [32, 4]
    found = shared(0, 2, *sent)
    assert torch.equal(found, reference_features(images, red)) and encoded == [32, 4, 32, 32]
    (file,) = folder.iterdir()
    assert torch.equal(shared(0, 1, again=True), found) and len(encoded) == 4  # this process remembers them
    assert torch.equal(shared(0, 1), found) and len(encoded) == 4  # another process reads the file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert torch.equal(shared(0, 1), found) and len(encoded) == 8  # a damaged file is made anew
    encoder.write_text("others")
    shared(0, 1)
    Image.new("RGB", (2, 2)).save(images / "further.png")
    assert len(shared(0, 1)) == 101 and len(encoded) == 16 and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_reference_images_are_refused(tmp_path, count):
    write_images(tmp_path, random_images(count, 0))
    with pytest.raises(ConfigError, match=f"evaluate.reference={tmp_path}: holds {count} images .*need at least 2"):
        reference_features(tmp_path, red)


def test_a_missing_reference_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="evaluate.reference=.*gone: no such folder"):
        reference_features(tmp_path / "gone", red)


def test_an_image_over_25_million_pixels_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    write_images(tmp_path, random_images(2, 0))
    Image.new("1", (5001, 5000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(ConfigError, match="huge.png: has 5001 x 5000 pixels, over the limit of 25000000"):
        open_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 14_000])  # where PIL warns, and where it raises
def test_a_decompression_bomb_is_refused_by_name(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(ConfigError, match="bomb.png"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_image_is_named(tmp_path, damage, suffix):
    file = tmp_path / f"broken{suffix}"
    Image.fromarray(random_images(1, 0, size=64)[0].permute(1, 2, 0).numpy()).save(file)
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"<html>not found</html>", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(ConfigError, match=f"broken{suffix}: cannot be read as an image"):
        open_image(file)


def test_an_image_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 60_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match="deep.png: has the pixel format I;16: save it with 8 bits"):
        open_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("content", "message"), [(b"no image", "cannot be read as an image"), (None, "has the pixel format I;16")]
)
def test_unreadable_training_images_are_refused_too(tmp_path, content, message):
    file = tmp_path / "mine.png"
    Image.fromarray(np.full((2, 2), 60_000, dtype=np.uint16)).save(file)
    file.write_bytes(content or file.read_bytes())
    with pytest.raises(ConfigError, match=f"mine.png: {message}"):
        prepare.read_image(file, 8)


def test_training_images_are_cut_to_a_square_between_minus_one_and_one(tmp_path):
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6, 0] = 255  # the square in the middle is red
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    square, size = prepare.read_image(tmp_path / "mine.png", 4)
    assert torch.equal(square, torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 4, 4)) and size == (4, 8)


# Together, with a real encoder


def test_fid_and_kid_share_one_pass_over_the_reference(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_classifier(
        WorldClassifier(WORLD.classifiers["classifier"], 12, 5), tmp_path / "canvas" / "classifier.safetensors"
    )
    monkeypatch.setattr(find, "ASSETS", tmp_path)
    images = random_images(12, 1, size=32)
    settings = EvaluateConfig(reference=str(write_images(tmp_path / "images", images)))
    encoded, original = [], WorldEncoder.image_features
    monkeypatch.setattr(
        WorldEncoder, "image_features", lambda self, batch: encoded.append(len(batch)) or original(self, batch)
    )
    metrics = build_metrics(settings, 12, 0)
    assert [type(metric) for metric in metrics] == [fid.Score, kid.Score] and encoded == [12]
    fid_near, kid_near = (result_of(metric, images) for metric in metrics)
    fid_far, kid_far = (result_of(metric, images // 2) for metric in build_metrics(settings, 12, 0))
    # 12 images, 128 features: 0 within 1e-6 of the variance (see fid.Score)
    assert (
        fid_near < 1e-6 * WorldEncoder("canvas").image_features(images).var(0).sum()
        and fid_far > 100 * fid_near
        and fid_far > 1e-3
    )
    assert kid_near < kid_far


def test_importing_evaluator_and_metrics_loads_no_heavy_library():
    metrics = "from sculpt_dist.evaluation.metrics import base, clip_score, fid, kid"
    heavy = {"transformers", "torchmetrics", "diffusers"}
    code = f"import sculpt_dist.evaluation.evaluator, sys; {metrics}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""The evaluator: ranks share the images, and the scores do not depend on how."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import PROJECT
from PIL import Image

from sculpt_dist.backbones.sd15 import Backbone
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, StopRequested
from sculpt_dist.core.files import file_sha256, read_object
from sculpt_dist.evaluation import evaluator
from sculpt_dist.evaluation.drawn_images import save_image
from sculpt_dist.evaluation.evaluator import check_evaluation, evaluate
from sculpt_dist.evaluation.requests import Evaluation, resolve_evaluation
from sculpt_dist.report.listed import listed_images


class StubRank(SimpleNamespace):
    """One rank of a group whose other ranks have already run: `others` holds what they sent."""

    device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def to_all(self, value: Any) -> list[Any]:
        self.sent = value
        return [value, *self.others]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def on_first(self, work: Callable[[], Any]) -> Any:
        return work() if self.is_first else None

    def together(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.fixture
def evaluation() -> Evaluation:
    world = [
        "evaluate.objects=[cat, fish, car]",
        "evaluate.styles=[neon]",
        "concepts=[{target: cat, superclass: animal}]",
    ]
    config = load_config(None, [*world, "evaluate.images=1", "evaluate.steps=4", "evaluate.batch=1"])
    return resolve_evaluation(config.evaluate, config.concepts)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(PROJECT / "sculpt_dist/assets/canvas/sd15", torch.float32, torch.device("cpu"))


def test_two_ranks_share_the_images_and_give_the_scores_of_one(
    evaluation: Evaluation, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    draw = evaluator.draw
    monkeypatch.setattr(evaluator, "draw", lambda *given: drawn.extend(r.prompt for r in given[3]) or draw(*given))

    def run(rank: int, size: int, others: list[Any]) -> tuple[dict[str, Any], Any]:
        group = StubRank(rank=rank, size=size, others=others)
        folder = tmp_path / f"{size}"
        return evaluate(
            evaluation, backbone, backbone.net, group, folder, evaluation.concepts, "test", None
        ), group.sent

    (tmp_path / "2" / "images").mkdir(parents=True)
    nothing, second = run(1, 2, [])
    assert nothing is None and drawn == ["a photo of a fish in neon style", "a photo of a car in neon style"]
    (verdicts,), checksums, passes = second  # of one classifier
    assert [number for number, *_ in verdicts] == [1]  # the third batch was only drawn along with the first rank
    assert list(checksums) == ["fish--neon.png"] and passes == 2 * 4  # guidance, steps; none for the third batch
    scores, _ = run(0, 2, [second])
    assert scores == run(0, 1, [])[0] and scores["plain"]["images"] == {"target": 1, "other": 2}
    files = [{file.name: file.read_bytes() for file in (tmp_path / size).rglob("*.*")} for size in "12"]
    assert files[0] == files[1] and len(files[0]) == 6
    assert read_object(tmp_path / "2" / "scores.json", "") == scores and scores["passes"] == 3 * passes


def test_every_kept_image_tells_how_to_draw_and_judge_it_again(
    evaluation: Evaluation, backbone: Backbone, tmp_path: Path
) -> None:
    settings = replace(evaluation.settings, images=2, styles=["neon"], paraphrases=["a {object}"])
    listed = replace(evaluation, settings=replace(settings, paraphrase_images=1))
    group = StubRank(rank=0, size=1, others=[])
    for keep, count in ((None, 9), ("some", 3), ("none", 0)):
        chosen, folder = replace(listed, settings=replace(listed.settings, keep_images=keep)), tmp_path / str(keep)
        evaluate(chosen, backbone, backbone.net, group, folder, chosen.concepts, "test", None)
        with (folder / "images.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        kept = {row["file"]: row for row in rows if row["file"]}
        assert len(rows) == 9 and set(kept) == {path.name for path in (folder / "images").iterdir()}
        found = {path.name: file_sha256(path) for path in (folder / "images").iterdir()}
        assert len(kept) == count and found == listed_images(folder, read_object(folder / "scores.json", ""))
    assert list(rows[0]) == ["file", "prompt", "seed", "guidance", "object", "style", "judged", "sha256"]
    assert [(row["prompt"], row["object"], row["style"], row["judged"]) for row in rows[::3]] == [
        ("a photo of a cat in neon style", "cat", "neon", "yes"),
        ("a photo of a fish in neon style", "fish", "neon", "yes"),
        ("a cat", "cat", "neon", "yes"),
    ]
    rows = list(csv.DictReader((tmp_path / "None" / "images.csv").read_text().splitlines()))
    for row, request in zip(rows, listed.requests):
        with Image.open(tmp_path / "None" / "images" / row["file"]) as image:
            about = {key: value for key, value in row.items() if key not in ("file", "sha256")}
            assert image.text == about | {"passes": str(2 * settings.steps)}
            again = replace(request, seed=int(row["seed"]), prompt=row["prompt"], guidance=float(row["guidance"]))
            drawn = evaluator.draw(settings, backbone, backbone.net, [again])[0]
            assert np.array_equal(np.asarray(image), drawn.permute(1, 2, 0).numpy())


def test_two_metrics_never_report_the_same_name() -> None:
    metric: Any = SimpleNamespace(state=dict, result=lambda state: {"fid": 1.0})
    group: Any = StubRank(rank=0, size=1, others=[])
    assert evaluator._metric_results([metric], group) == {"fid": 1.0}
    with pytest.raises(AssertionError, match="two metrics report .'fid'."):
        evaluator._metric_results([metric, metric], group)


def test_retained_images_alone_count_for_metrics_where_there_are_some(evaluation: Evaluation) -> None:
    judged = evaluation.requests[0]
    retained, paraphrased = replace(judged, object=-1, style=-1), replace(judged, paraphrased=True)
    assert [evaluation.counts_for_metrics(r) for r in (judged, paraphrased)] == [True, False]
    with_file = replace(evaluation, settings=replace(evaluation.settings, retain_prompts="coco.txt"))
    assert [with_file.counts_for_metrics(r) for r in (judged, retained)] == [False, True]


def test_an_image_that_is_drawn_again_leaves_the_one_that_other_runs_share(tmp_path: Path) -> None:
    shared, mine = tmp_path / "shared.png", tmp_path / "mine.png"
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    save_image(shared, image, {})
    before = shared.read_bytes()
    mine.hardlink_to(shared)
    save_image(mine, image + 9, {})
    assert shared.read_bytes() == before != mine.read_bytes()


class StopAfter:
    """Asks to stop once so many batches have begun."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def check(self, where: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopRequested(where)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_stopped_evaluation_goes_on_from_its_images_and_ends_as_an_undisturbed_one(
    evaluation: Evaluation, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    settings = replace(evaluation.settings, keep_images=keep, images=2, reference="canvas")
    evaluation = replace(evaluation, settings=settings)
    drawn: list[str] = []
    draw = evaluator.draw
    monkeypatch.setattr(evaluator, "draw", lambda *given: drawn.extend(r.prompt for r in given[3]) or draw(*given))

    def run(folder: str, stop_after: int = 100, model: str = "weights") -> dict[str, Any]:
        group, stop = StubRank(rank=0, size=1, others=[]), StopAfter(stop_after)
        forgotten = evaluation.concepts
        return evaluate(evaluation, backbone, backbone.net, group, tmp_path / folder, forgotten, "test", stop, model)

    def content(folder: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / folder).rglob("*.*")}

    def stopped(*arguments: Any) -> None:
        with pytest.raises(StopRequested):
            run(*arguments)

    whole = run("whole")
    assert len(drawn) == 6 and "fid" in whole["plain"]["extra"]
    stopped("stopped", 4)
    files = sorted((tmp_path / "stopped" / "images").iterdir())
    assert len(files) == 4
    files[2].write_bytes(files[2].read_bytes()[:-30])
    drawn.clear()
    assert run("stopped") == whole and content("stopped") == content("whole")
    assert len(drawn) == 4  # the first one again, to compare; the damaged one; the two that were missing
    assert len(list((tmp_path / "stopped" / "images").iterdir())) == (6 if keep == "all" else 0)
    stopped("other weights", 4)
    drawn.clear()
    run("other weights", model="others")
    assert len(drawn) == 6
    stopped("stopped twice", 4)
    of_whole = evaluation
    evaluation = replace(evaluation, settings=replace(evaluation.settings, steps=2))
    stopped("stopped twice", 2)
    evaluation = of_whole
    drawn.clear()
    assert run("stopped twice") == whole and len(drawn) == 5  # one of the two that are left, and the four others
    assert content("stopped twice") == content("whole")
    stopped("drawn otherwise", 4)
    for file in (tmp_path / "drawn otherwise" / "images").iterdir():
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            save_image(file, 255 - pixels, image.text)
    drawn.clear()
    assert run("drawn otherwise") == whole and len(drawn) == 7


def test_the_witness_judges_the_same_images_as_if_it_were_the_classifier(tmp_path: Path) -> None:
    gallery = Backbone(PROJECT / "sculpt_dist/assets/gallery/sd15", torch.float32, torch.device("cpu"))
    given = ["model.world=gallery", "evaluate.objects=[fox, cow, piano]", "evaluate.styles=[noto, flat]"]
    given += ["concepts=[{target: fox, superclass: mammal}]", "evaluate.images=1", "evaluate.steps=3"]
    given += ["evaluate.prompt=a picture of a {object}[ in {style} style]", "evaluate.paraphrase_images=0"]
    group = StubRank(rank=0, size=1, others=[])

    def scores(folder: str, *more: str) -> dict[str, Any]:
        config = load_config(None, [*given, *more])
        found = resolve_evaluation(config.evaluate, config.concepts)
        return evaluate(found, gallery, gallery.net, group, tmp_path / folder, found.concepts, "", None)  # type: ignore[arg-type]

    both = scores("both", "evaluate.witness=gallery:witness")
    alone = scores("alone", "evaluate.classifier=gallery:witness")
    assert "witness" not in alone and both["plain"]["images"] == both["witness"]["images"]
    same = [name for name in both["witness"] if name not in ("extra", "made_by", "subset")]
    assert {name: both["witness"][name] for name in same} == {name: alone["plain"][name] for name in same}
    answers, theirs = (read_object(tmp_path / name / "answers.json", "") for name in ("both", "alone"))
    assert answers["witness"]["object_seen"] == theirs["object_seen"] and answers["witness"]["style_seen"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model.world=gallery", "evaluate.witness=gallery:classifier"], "is the classifier itself"),
        (["evaluate.witness=clpi:x"], "evaluate.witness=clpi:x: no classifier 'clpi'"),
    ],
)
def test_a_witness_that_cannot_be_one_is_refused(given: list[str], message: str) -> None:
    def checked() -> None:
        config = load_config(None, [*given, "concepts=[{target: cat, superclass: animal}]"])
        check_evaluation(resolve_evaluation(config.evaluate, config.concepts))

    with pytest.raises(ConfigError, match=message):
        checked()

"""What an evaluation draws: the world it resolves, the order and seeds of its images, and its batches."""

from collections import Counter

import pytest

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.evaluation.requests import Evaluation, as_batches, resolve_evaluation

CAT = "concepts=[{target: cat, superclass: animal}]"
IMAGE_CLASSIFIER = "evaluate.classifier=image:/models/vit"


def resolved(*overrides: str) -> Evaluation:
    config = load_config(None, list(overrides))
    return resolve_evaluation(config.evaluate, config.concepts)


def test_the_canvas_classifier_brings_its_own_world() -> None:
    world = resolved(CAT).world
    assert len(world.objects) == 12 and len(world.styles) == 5 and world.members["animal"] == ("cat", "fish", "bird")


def test_targets_and_concepts_to_keep_join_the_named_objects_once() -> None:
    concepts = "concepts=[{target: Tench, superclass: fish, keep: [perch, CAT]}]"
    assert resolved(concepts, "evaluate.objects=[cat]", IMAGE_CLASSIFIER).world.objects == ("cat", "Tench", "perch")


def test_another_classifier_has_no_objects_or_styles_of_its_own() -> None:
    with pytest.raises(ConfigError, match="evaluate.objects is empty and no concept is an object: name the objects"):
        resolved("concepts=[{target: neon, kind: style}]", "evaluate.styles=[neon, oil]", IMAGE_CLASSIFIER)
    with pytest.raises(ConfigError, match="evaluate.styles is empty: name the styles to compare"):
        resolved("concepts=[{target: neon, kind: style}]", "evaluate.objects=[cat]", IMAGE_CLASSIFIER)


def test_plain_prompts_come_first_and_only_their_first_image_is_saved() -> None:
    world = ("evaluate.objects=[cat]", "evaluate.styles=[oil, ink]", "evaluate.images=2", IMAGE_CLASSIFIER)
    requests = resolved(
        CAT, *world, "evaluate.paraphrases=['{object}[ by {style}]']", "evaluate.paraphrase_images=1"
    ).requests
    assert [(r.prompt, r.prompt_id, r.style, r.shown) for r in requests] == [
        ("a photo of a cat in oil style", 0, 0, "cat--oil.png"),
        ("a photo of a cat in oil style", 0, 0, None),
        ("a photo of a cat in ink style", 1, 1, "cat--ink.png"),
        ("a photo of a cat in ink style", 1, 1, None),
        ("cat by oil", 2, 0, None),
        ("cat by ink", 3, 1, None),
    ]
    assert [r.paraphrased for r in requests] == [False] * 4 + [True] * 2
    assert len({r.seed for r in requests}) == 6


def test_pairs_may_be_left_out_and_the_others_keep_their_seeds() -> None:
    whole, part = resolved(CAT).requests, resolved(CAT, "evaluate.without=[cat/neon, House/Sketch]").requests
    seeds = {(request.prompt, request.seed) for request in part}
    gone = {request.prompt for request in whole if (request.prompt, request.seed) not in seeds}
    assert gone == {"a photo of a cat in neon style", "a photo of a house in sketch style"}
    assert seeds < {(request.prompt, request.seed) for request in whole}
    for wrong in ("cat", "cat/neno", "kat/neon"):
        with pytest.raises(ConfigError, match=f"evaluate.without={wrong}: is not OBJECT/STYLE"):
            _ = resolved(CAT, f"evaluate.without=[{wrong}]").requests


def test_an_image_keeps_its_seed_when_the_evaluation_grows() -> None:
    few, many = (resolved(CAT, f"evaluate.images={number}").requests for number in (1, 3))
    seeds = {(request.prompt, request.seed) for request in many}
    assert {(request.prompt, request.seed) for request in few} < seeds


def test_a_world_without_styles_asks_for_none() -> None:
    evaluation = resolved(CAT, "evaluate.images=1", "evaluate.objects=[dog/fox]", IMAGE_CLASSIFIER)
    assert [(r.prompt, r.style, r.shown) for r in evaluation.requests] == [
        ("a photo of a dog/fox", -1, "dog_fox-44b1bfbf--none.png"),
        ("a photo of a cat", -1, "cat--none.png"),
    ]


def test_batches_hold_every_request_in_order() -> None:
    requests = resolved(CAT, "evaluate.images=1").requests
    batches = as_batches(requests, 7)
    assert [request for batch in batches for request in batch] == list(requests)
    assert [len(batch) for batch in batches] == [7] * 8 + [4]


def test_a_subset_has_evenly_of_everything_and_grows_with_its_size(tmp_path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(f"a street, number {i}" for i in range(200)))
    captions = [f"evaluate.retain_prompts={tmp_path / 'captions.txt'}", "evaluate.reference=canvas"]
    templates = ["evaluate.images=6", "evaluate.paraphrases=['a {object}']", "evaluate.paraphrase_images=3"]
    whole = resolved(CAT, *templates, *captions)
    assert len(whole.whole) == 60 * 9 + 200
    few, more = whole.part(150), whole.part(400)
    for subset, share in ((few, (150 - 62) / 678), (more, (400 - 62) / 678)):
        drawn = Counter((r.object, r.style, r.paraphrased) for r in subset.requests)
        plain = [drawn[i, j, False] for i in range(12) for j in range(5)]
        assert min(plain) >= 1 and max(plain) - min(plain) <= 1
        assert drawn[-1, -1, False] == pytest.approx(2 + 198 * share, abs=12)
        assert sum(drawn[i, j, True] for i in range(12) for j in range(5)) == pytest.approx(180 * share, abs=25)
        assert [r for r in whole.requests if r in set(subset.requests)] == list(subset.requests)  # in their order
    assert (len(few.requests), len(more.requests)) == (150, 400) and set(few.requests) < set(more.requests)
    assert {r.shown for r in few.requests} == {r.shown for r in whole.requests}  # the report's pictures
    assert whole.part(1000).requests == whole.requests and few.fingerprint == whole.fingerprint
    with pytest.raises(ConfigError, match="evaluate.subset=61: one image of every object and style, .* are 62: give"):
        assert whole.part(61).requests
    (tmp_path / "captions.txt").unlink()
    assert whole.part(150).requests == few.requests  # no file is read again

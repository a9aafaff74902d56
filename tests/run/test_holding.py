"""General prompts that a run holds: the term by hand, the same on any ranks, what it keeps, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from harness import PROJECT, SMALL, TINY_RUN, sculpt
from linear import linear_step, net, noise, stream
from runs import lines

from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import HoldConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch
from sculpt_dist.methods.base import load_method
from sculpt_dist.planning.plan import plan_run
from sculpt_dist.run.holding import Holding
from sculpt_dist.run.setup import resolve

CONFIGS = PROJECT / "configs" / "canvas"
QUICK = [*SMALL, "evaluate.enabled=false"]


@pytest.fixture
def listed(tmp_path) -> str:
    """The override that holds two prompts."""
    (tmp_path / "hold.txt").write_text("a picture of a tree\na neon picture\n\na neon picture\n")
    return f"hold.prompts={tmp_path / 'hold.txt'}"


@pytest.mark.parametrize("name", ["dm_cal", "rgd"])
def test_the_term_is_the_weighted_distance_to_the_original_net(name):
    student, original = net(3.0), net(1.0)
    step = linear_step(student, original)
    step = replace(step, original=step.teacher, batch=ConceptBatch(step.batch.streams | {"hold": stream(2.0, 3.0)}))
    plain = load_method({"name": name})
    held = Holding(plain, HoldConfig("hold.txt", weight=0.5))
    *_, last = held.loss_groups()
    *before, theirs = plain.loss_groups()
    assert len(held.loss_groups()) == len(before) + 1 and held.needs_original and not plain.needs_original
    terms = {name: float(term.detach()) for name, term in last(step).terms.items()}
    by_hand = 0.5 * ((3 - 1) * (2 + noise(step, "hold"))).pow(2).mean()  # (weight - weight0) x noisy
    assert terms["hold"] == pytest.approx(float(by_hand), rel=1e-6)
    assert {"hold": terms["hold"], **theirs(step).terms} == terms


def test_a_method_without_a_stream_of_targets_latents_is_held_too_and_prepares_as_ever():
    held = Holding(load_method({"name": "kscu"}), HoldConfig("hold.txt", share=0.5, source="teacher"))
    assert [spec.role for spec in held.streams()] == ["target", "hold"] and held.streams()[1].share == 0.5
    assert held.needs_teacher and not held.needs_original


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("dm_cal", ["engine.stage=3", "train.l1sp=1e-3", "hold.share=0.5"]),
        pytest.param("rgd", ["train.accumulate=2", "train.l1sp=1e-3"], marks=pytest.mark.exhaustive),
    ],
)
def test_two_ranks_hold_as_one_does(listed, tmp_path, method, overrides):
    given = [str(CONFIGS / f"{method}.yaml"), *TINY_RUN, "evaluate.enabled=false", listed, *overrides[1:]]
    sculpt("unlearn", *given, f"run.folder={tmp_path / 'one'}")
    sculpt("unlearn", *given, *overrides, f"run.folder={tmp_path / 'two'}", ranks=2)
    one, two = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-3)
    trained = [line["terms"] for line in lines(tmp_path / "one") if line["phase"] == "train"]
    assert len(trained) == 12 and trained[0]["hold"] == 0.0 and all(terms["hold"] > 0 for terms in trained[1:])
    assert (tmp_path / "one/data/hold/prompts/index.json").is_file()
    sculpt("verify", str(tmp_path / "one"))


@pytest.mark.slow
def test_held_prompts_move_less(canvas_config, listed, tmp_path):
    given = [*QUICK, listed, "hold.share=1", "train.steps=20", "train.lr=3e-3"]
    for weight in (1e-9, 30.0):
        sculpt("unlearn", canvas_config, *given, f"hold.weight={weight}", f"run.folder={tmp_path / str(weight)}")
    free, held = (
        [line["terms"]["hold"] / w for line in lines(tmp_path / str(w)) if line["concept"] and line["phase"] == "train"]
        for w in (1e-9, 30.0)
    )
    assert sum(held) < 0.5 * sum(free)


def test_a_closed_form_preserves_the_prompts(listed):
    config = load_config(CONFIGS / "uce.yaml", [*TINY_RUN, listed])
    first, last = resolve(config).prompts
    assert first.keep == () and last.keep == ("a picture of a tree", "a neon picture")


def test_only_the_first_prompts_of_a_long_list_are_held(canvas_config, listed):
    with pytest.warns(UserWarning, match="contains 2 prompts; only the first 1 are held"):
        setup = resolve(load_config(Path(canvas_config), [*QUICK, listed, "hold.samples=1"]))
    assert setup.held == ("a picture of a tree",)


def test_a_plan_counts_the_held_samples(canvas_config, listed):
    with_held, without = (
        plan_run(load_config(Path(canvas_config), [*QUICK, *more]), 1, 1e12, device="cpu") for more in ([listed], [])
    )
    assert with_held["peak"] > without["peak"] and with_held["trainable"] == without["trainable"]


def test_the_packaged_list_names_no_target_and_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for sequence in ("sequence_100", "tuning"):
        setup = resolve(load_config(Path(f"gallery/{sequence}"), ["hold.prompts=gallery/hold.txt"]))
        assert len(setup.held) == 408 and isinstance(setup.method, Holding)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hold.prompts=nowhere.txt"], "nowhere.txt: this list of prompts does not exist"),
        (["hold.share=0.3"], "train.batch=4: the stream 'hold' takes 0.3 of it"),
        (["hold.weight=0"], "hold.weight=0.0: must be greater than 0"),
        (["hold.source=student"], "hold.source=student: choose one of original, teacher"),
        (
            ["concepts=[{target: Tree, superclass: plant}]"],
            "hold.txt: the prompt 'a picture of a tree' names the target 'Tree', which would be held and forgotten",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(canvas_config, listed, overrides, message):
    with pytest.raises(ConfigError) as raised:
        resolve(load_config(Path(canvas_config), [*QUICK, listed, *overrides])).micro_batch(1)
    assert message in str(raised.value)

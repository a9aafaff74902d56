"""Forgetting under an inner attack: the disturbance by hand, its bounds, the same on any ranks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import PROJECT, SMALL, TINY_RUN, sculpt
from linear import linear_step, net
from runs import lines

from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import AdversarialConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch, TextCond
from sculpt_dist.methods.base import load_method
from sculpt_dist.run.hardening import Hardened
from sculpt_dist.run.holding import Holding
from sculpt_dist.run.setup import resolve

CONFIGS = PROJECT / "configs" / "canvas"


@pytest.mark.parametrize(("steps", "moved"), [(1, 0.4), (2, 0.8), (3, 1.0), (9, 1.0)])
def test_the_prompt_moves_towards_what_the_net_recognises_and_stays_within_the_radius(steps, moved):
    # The net predicts 3 (1 + n) + 5 for the noise n: too much, so the prompt's number 5 sinks by .5 x (.2 x 5) a step,
    # as far as .2 x 5.
    step = linear_step(net(3.0), net(1.0))
    settings = AdversarialConfig(steps=steps, radius=0.2, lr=0.4, share=1.0)
    hardened = Hardened(load_method({"name": "dm_cal"}), settings)
    target = hardened.attacked(step).batch.target
    assert target.cond.tokens.flatten().tolist() == pytest.approx([5 - moved, 5 - moved])
    assert torch.equal(target.latents, step.batch.target.latents) and step.student.net.weight.grad is None


def test_some_samples_are_attacked_and_the_methods_own_losses_see_them():
    step, method = linear_step(net(3.0), net(1.0)), load_method({"name": "dm_cal"})
    settings = AdversarialConfig(steps=3, radius=0.2, lr=0.4)
    uniform = step.rng.uniform("adversarial")
    settings = replace(settings, share=float(uniform.mean()))  # one of the two
    hardened = Hardened(method, settings)
    attacked = hardened.attacked(step)
    assert sorted(attacked.batch.target.cond.tokens.flatten().tolist()) == pytest.approx([4.0, 5.0])
    (group,) = hardened.loss_groups()
    found, expected = hardened.losses(step).terms, method.losses(attacked).terms
    assert {name: float(term) for name, term in found.items()} == {name: float(term) for name, term in expected.items()}
    assert float(group(step).total) == float(hardened.losses(step).total) != float(method.losses(step).total)


def test_pooled_text_is_disturbed_too():
    step = linear_step(net(3.0), net(1.0))
    cond = TextCond(step.batch.target.cond.tokens, pooled=torch.full((2, 3), 2.0))
    target = replace(step.batch.target, cond=cond)
    denoise = step.backbone.denoise
    step.backbone.denoise = lambda net, noisy, time, cond: (
        denoise(net, noisy, time, cond) + cond.pooled.sum(1).view(-1, 1, 1, 1)
    )
    step = replace(step, batch=ConceptBatch({**step.batch.streams, "target": target}))
    settings = AdversarialConfig(steps=9, radius=0.5, lr=0.4, share=1.0)
    found = Hardened(load_method({"name": "dm_cal"}), settings).attacked(step).batch.target.cond
    assert (cond.pooled - found.pooled).norm(dim=1).tolist() == pytest.approx([0.5 * 12**0.5] * 2)


@pytest.mark.two_ranks
def test_two_ranks_on_stage_3_harden_as_one_does(tmp_path):
    given = [str(CONFIGS / "dm_cal.yaml"), *TINY_RUN, "evaluate.enabled=false", "adversarial.steps=2"]
    sculpt("unlearn", *given, f"run.folder={tmp_path / 'one'}")
    sculpt("unlearn", *given, "engine.stage=3", f"run.folder={tmp_path / 'two'}", ranks=2)
    one, two = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-3)


def test_held_prompts_and_the_attack_go_together(tmp_path):
    (tmp_path / "hold.txt").write_text("a picture of a tree\n")
    overrides = [*SMALL, f"hold.prompts={tmp_path / 'hold.txt'}", "adversarial.steps=1"]
    method = resolve(load_config(CONFIGS / "dm_cal.yaml", overrides)).method
    assert isinstance(method, Holding) and isinstance(method.method, Hardened)
    assert [spec.role for spec in method.streams()][-1] == "hold"


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("esd", ["adversarial.steps=1"], "trains on no sample of the target"),
        ("kscu", ["adversarial.steps=1"], "trains on no sample of the target"),
        ("dm_cal", ["adversarial.share=1.5"], "adversarial.share=1.5: is a share"),
        ("dm_cal", ["adversarial.radius=0"], "adversarial.radius=0.0: must be greater than 0"),
        ("dm_cal", ["adversarial.steps=-1"], "adversarial.steps"),
    ],
)
def test_what_cannot_be_attacked_is_refused(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(Path(CONFIGS / f"{config}.yaml"), [*TINY_RUN, *overrides]))

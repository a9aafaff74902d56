"""The baselines and KSCU by hand: each term, each table, each rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import PROJECT
from linear import EMPTY, LinearBackbone, cond, linear_step, net, noise, stream

from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.bench.edit import bench_edit
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugin
from sculpt_dist.core.types import ConceptBatch, TextCond
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.optimizer import ShardedVector
from sculpt_dist.maths.closed_form import EditSystem
from sculpt_dist.methods import concept_ablation, esd, kscu, rgd, salun, uce
from sculpt_dist.methods.base import Setup
from sculpt_dist.run.prepare import drawn_sources

ASSETS = PROJECT / "sculpt_dist" / "assets" / "canvas"


def drawn(step, index: int, steps: int, guidance: float) -> torch.Tensor:
    """The latents that a student of weight 0.5 draws of the target's prompts, by an own loop of DDIM."""
    sampler = LinearBackbone.schedule.first_order(steps)
    latents = noise(step, "trajectory")
    for moment in sampler.timesteps[:index]:
        without, with_prompt = 0.5 * latents + EMPTY, 0.5 * latents + 5
        latents = sampler.step(without + guidance * (with_prompt - without), moment, latents, return_dict=False)[0]
    return latents


def test_concept_ablation_relabels_the_superclass_samples_without_gradient_of_the_label():
    step = linear_step(net(0.5), net(0.25))
    (term,) = concept_ablation.Method(concept_ablation.Config()).losses(step).terms.values()
    assert float(term.detach()) == pytest.approx(
        (5 - 7) ** 2
    )  # the same noisy latents, the target's prompt against the superclass's
    term.backward()
    n = noise(step, "superclass")
    assert float(step.student.net.weight.grad) == pytest.approx(float((2 * (5 - 7) * (2 + n)).mean()), rel=1e-5)


@pytest.mark.parametrize("reference", ["teacher", "original"])
@pytest.mark.parametrize("eta", [1.0, 2.5])
def test_esd_trains_negative_guidance_on_the_students_latents(reference, eta):
    step = linear_step(net(0.5), net(0.25))
    object.__setattr__(step, "original", step.teacher)
    method = esd.Method(esd.Config(eta=eta, sampler_steps=10, reference=reference))
    index = int(step.rng.shared("index") * 10)
    assert 0 < index < 10
    x = drawn(step, index, 10, 3.0)
    goal = (0.25 * x + EMPTY) - eta * (5 - EMPTY)
    torch.testing.assert_close(method.losses(step).terms["forget"], (0.5 * x + 5 - goal).pow(2).mean())
    assert method.needs_original == (reference == "original") and not drawn_sources(method)


def test_esd_variants_train_the_groups_of_their_names():
    groups = {
        "cross_attention": ("a", "a.bias"),
        "not_cross_attention": ("b",),
        "all": ("a", "a.bias", "b"),
        "matrices": ("a", "b"),
    }
    chosen = {variant: esd.Method(esd.Config(variant=variant)).trainable(groups) for variant in ("x", "u", "full")}
    assert chosen == {"x": ["a"], "u": ["b"], "full": ["a", "b"]}
    with pytest.raises(ConfigError, match="method.variant=v: choose one of x, u, full"):
        esd.Method(esd.Config(variant="v"))


def test_salun_scores_the_guided_prediction_and_relabels_with_the_students_label():
    step = linear_step(net(0.5), net(0.25))
    method = salun.Method(salun.Config(retain_weight=0.1, saliency_guidance=7.5))
    n_f, n_s = noise(step, "target"), noise(step, "superclass")
    guided = 0.5 * (1 + n_f) + EMPTY + 7.5 * (5 - EMPTY)
    torch.testing.assert_close(method.saliency(step).terms["saliency"], -(guided - n_f).pow(2).mean())
    terms = method.losses(step).terms
    assert float(terms["forget"].detach()) == pytest.approx((5 - 7) ** 2)
    torch.testing.assert_close(terms["retain"], 0.1 * (0.5 * (2 + n_s) + 7 - n_s).pow(2).mean())


def test_the_closed_form_is_the_minimiser_and_equals_the_naive_inverse_per_layer():
    rng = torch.Generator().manual_seed(0)
    old, new, kept = (torch.randn(n, 6, dtype=torch.float64, generator=rng) for n in (5, 5, 9))
    ridge, erase, preserve = 0.3, 1.5, 0.7
    system = EditSystem(6, ridge, erase, preserve, torch.device("cpu"))
    for some in (slice(0, 2), slice(2, 5)):  # in parts
        system.add_erased(old[some], new[some])
    system.add_preserved(kept)
    transform = system.transform()
    for rows in (4, 7):  # layers of several heights share the transform
        weight = torch.randn(rows, 6, dtype=torch.float64, generator=rng)
        left, right = ridge * weight, ridge * torch.eye(6, dtype=torch.float64)
        for c, target in zip(old, new):
            left, right = left + erase * torch.outer(weight @ target, c), right + erase * torch.outer(c, c)
        for c in kept:
            left, right = left + preserve * torch.outer(weight @ c, c), right + preserve * torch.outer(c, c)
        torch.testing.assert_close(weight @ transform, left @ torch.linalg.inv(right))
        edited = (weight @ transform).requires_grad_(True)
        terms = (
            erase * (edited @ old.T - weight @ new.T).square().sum()
            + preserve * (edited @ kept.T - weight @ kept.T).square().sum()
        )
        (terms + ridge * (edited - weight).square().sum()).backward()
        assert edited.grad.abs().max() < 1e-9  # the derivative vanishes


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "sana"])
def test_tokens_are_compared_from_the_concepts_last_one_on(arch):
    backbone = plugin("sculpt_dist.backbones", arch, "").Backbone(ASSETS / arch, torch.float32, torch.device("cpu"))
    longer, shorter = "a fish cat in neon style", "a animal in neon style"
    rows = [uce.received(backbone, [prompt], negative=False) for prompt in (longer, shorter)]
    last = len(backbone.token_ids("a fish cat")) - (
        1 if arch == "sana" else 2
    )  # CLIP closes a prompt with a token of its own
    old, new = uce.aligned_rows(backbone, (longer, shorter), ("fish cat", "animal"))
    count = min(len(rows[0]) - last, len(rows[1]) - (last - 1))
    assert (
        count > 2
        and torch.equal(old, rows[0][last : last + count])
        and torch.equal(new, rows[1][last - 1 : last - 1 + count])
    )


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "sana"])
def test_a_styles_own_token_meets_the_last_one_of_the_style_free_prompt(arch):
    backbone = plugin("sculpt_dist.backbones", arch, "").Backbone(ASSETS / arch, torch.float32, torch.device("cpu"))
    prompts = concept_prompts(Concept("popart", kind="style"), PrepareConfig())
    popart, photo = (
        len(backbone.token_ids(text)) - (1 if arch == "sana" else 2) for text in ("a photo in popart", "a photo")
    )
    old, new = uce.aligned_rows(backbone, (prompts.target[0], prompts.superclass[0]), prompts.names)
    rows = [uce.received(backbone, [prompt], negative=False) for prompt in (prompts.target[0], prompts.superclass[0])]
    assert torch.equal(old[0], rows[0][popart]) and torch.equal(new[0], rows[1][photo]) and popart == photo + 2


def test_the_closed_form_maps_target_tokens_to_the_superclass():
    """After the edit the target's token is keyed and valued nearly as the superclass's, and preserved prompts as
    before.
    """
    backbone = plugin("sculpt_dist.backbones", "sd15", "").Backbone(ASSETS / "sd15", torch.float32, torch.device("cpu"))
    concept = ConceptPrompts(
        ("a photo of a cat",), ("a photo of a animal",), "a photo of a cat", (), names=("cat", "animal")
    )
    changed = uce.Method(uce.Config(ridge=1e-3, preserve_scale=1.0)).edit(backbone, [concept])
    assert len(changed) == 8 and all(name.endswith(("to_k.weight", "to_v.weight")) for name in changed)
    old, new = uce.aligned_rows(backbone, ("a photo of a cat", "a photo of a animal"), concept.names)
    kept = uce.received(backbone, ["a photo of a animal"], negative=False)
    for name, weight in changed.items():
        before = backbone.net.get_parameter(name)
        assert (weight @ old[0] - before @ new[0]).norm() < 0.1 * (before @ old[0] - before @ new[0]).norm()
        assert (weight @ kept.T - before @ kept.T).norm() < 0.05 * (before @ kept.T).norm()


def test_the_closed_form_of_many_concepts_takes_less_memory_than_their_rows():
    found = bench_edit("sd15", 160, Group())
    assert (found["prompts"], found["matrices"], found["weights"]) == (160, 32, 19_169_280)
    rows = 2 * 160 * 70 * 768 * 8  # c and c*, from the name on, in fp64
    assert 0 < found["extra_memory_bytes"] < rows


def vector(*values: float) -> ShardedVector:
    return ShardedVector([torch.tensor(values)], None)


def test_rgd_projects_both_gradients_where_they_oppose_and_adds_them_where_they_do_not():
    method = rgd.Method(rgd.Config(retain_scale=1.5))
    agreeing = method.combine([vector(1.0, 0.0), vector(2.0, 2.0)])
    assert agreeing.pieces[0].tolist() == [4.0, 3.0]
    forget, retain = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([-1.0, 1.0, 0.0])
    projected_forget = forget - (forget @ retain) / (retain @ retain) * retain
    projected_retain = retain - (forget @ retain) / (forget @ forget) * forget
    together = method.combine([vector(*forget.tolist()), vector(*retain.tolist())]).pieces[0]
    torch.testing.assert_close(together, projected_forget + 1.5 * projected_retain)
    assert abs(float(projected_forget @ retain)) < 1e-6 and abs(float(projected_retain @ forget)) < 1e-6


def test_rgd_has_one_loss_group_for_each_of_the_two():
    method, step = rgd.Method(rgd.Config()), linear_step(net(0.5), net(0.25))
    assert [list(group(step).terms) for group in method.loss_groups()] == [["forget"], ["retain"]]


def test_the_key_steps_run_to_the_end_eight_times_from_each_start():
    table = [kscu.key_step(update, 14, 50) for update in range(750)]
    assert table[:36] == list(range(14, 50)) and table[: 8 * 36] == list(range(14, 50)) * 8
    assert table[8 * 36 : 8 * 36 + 35] == list(range(15, 50))
    late = [kscu.key_step(update, 43, 50) for update in range(8 * 7 + 60)]
    assert late[56:] == [44, 45, 46, 47, 48, 49] * 10  # the start stays below 45 of 50
    flow = [kscu.key_step(update, 24, 28) for update in range(62)]
    assert flow[:4] == [24, 25, 26, 27] and flow[32:] == [25, 26, 27] * 10
    assert [kscu.key_step(update, 47, 50) for update in range(60)] == [47, 48, 49] * 20  # unless it was given so


@pytest.mark.parametrize("progress", [0.5, 0.96])
def test_kscu_terms_on_the_students_own_latents(progress):
    step = linear_step(net(0.5), net(0.25), progress=progress)
    config = kscu.Config(sampler_steps=10, start=4, disturbance=0.5)
    method = kscu.Method(config, {"ppppp": ["a", "bb", "ccc", "dddd"]})
    x = drawn(step, 4, 10, 3.0)
    time = LinearBackbone.schedule.first_order(10).timesteps[4]
    away, leak = 5 - EMPTY, 0.02 * (1 - float(time) / 1000)
    forms = 1 + (step.rng.uniform("disturbed form") * 4).long()  # a form's number is its length
    shown = forms.view(-1, 1, 1) + 0.5 * step.rng.normal("disturbance", (1, 1)) if progress > 0.95 else cond(5.0).tokens
    erase, kept = (0.25 * x + EMPTY) - away, (0.25 * x + EMPTY) - leak * away
    terms = method.losses(step).terms
    torch.testing.assert_close(terms["forget"], (0.5 * x + shown.view(-1, 1, 1, 1) - erase).pow(2).mean())
    torch.testing.assert_close(terms["leakage"], 1e-4 * (0.5 * x + EMPTY - kept).pow(2).mean())


def test_uce_without_a_ridge_is_refused():
    with pytest.raises(ConfigError, match="method.ridge=0.0: must be greater than 0"):
        uce.Method(uce.Config(ridge=0.0))


def test_disturbed_prompts_keep_the_target():
    forms = kscu.disturbed_prompts("a photo of a cat", "a photo of a animal")
    assert (
        forms[0] == "a photo of a cat"
        and all("cat" in form.split() for form in forms)
        and len(set(forms)) == len(forms)
    )
    assert {"photo of a cat", "a of a cat", "a photo a cat"} <= set(forms) and "a photo of a" not in forms
    assert sum(sorted(form.split()) == sorted("a photo of a cat".split()) for form in forms) >= 2  # shuffled ones
    prompts = ConceptPrompts(("a photo of a cat",), ("a photo of a animal",), "", ())
    ready = kscu.Method(kscu.Config()).prepare(Setup(0, LinearBackbone(), 10, prompts))
    assert (
        ready.variants
        == {"a photo of a cat": [form for form in forms if len(form) < 30]}
        != {"a photo of a cat": forms}
    )


def test_a_trajectory_advances_by_one_step_or_restarts():
    calls: list[int] = []

    def denoiser(noisy: torch.Tensor, time: torch.Tensor, both: TextCond) -> torch.Tensor:
        calls.append(int(time[0]))
        return 0.5 * noisy + both.tokens.view(-1, 1, 1, 1)

    trajectory, start = Trajectory(LinearBackbone()), torch.randn(2, 1, 2, 2)
    arguments = (10, denoiser, cond(5.0), cond(EMPTY), 3.0)
    times = LinearBackbone.schedule.first_order(10).timesteps.tolist()
    assert not trajectory.continues_at(0) and not trajectory.continues_at(1)
    trajectory.begin(start, ["p", "q"], 10)
    third, time = trajectory.advance_to(3, *arguments)
    assert calls == times[:3] and time.tolist() == [times[3]] * 2
    assert [index for index in range(10) if trajectory.continues_at(index)] == [4]
    fourth, _ = trajectory.advance_to(4, *arguments)
    assert calls == times[:4]
    again = Trajectory(LinearBackbone())
    again.begin(start, ["p", "q"], 10)
    assert torch.equal(fourth, again.advance_to(4, *arguments)[0]) and not torch.equal(third, fourth)


def test_a_trajectory_keeps_its_first_prompts(monkeypatch):
    first, method = linear_step(net(0.5), net(0.25), update=0), kscu.Method(kscu.Config(sampler_steps=10, start=4))
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(kscu, "key_step", lambda update, start, steps: [4, 5, 4][update])
    monkeypatch.setattr(
        LinearBackbone,
        "embed",
        lambda self, prompts, negative=False, embed=LinearBackbone.embed: (
            asked.extend([] if negative else [prompts]) or embed(self, prompts, negative)
        ),
    )
    for update, number in enumerate([5.0, 9.0, 7.0]):
        batch = ConceptBatch({**first.batch.streams, "target": stream(1.0, number)})
        method.losses(replace(first, batch=batch, update=update))
    assert {prompts[0] for prompts in asked} == {"p" * 5, "p" * 7} and [len(prompts[0]) for prompts in asked] == [
        5,
        5,
        5,
        5,
        7,
        7,
    ]

"""MACE, FMN, SPM, DoCo, AdvUnlearn, ANT, EraseDiff, NPO and ascent by hand: each term, each closed form, each rule."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear import EMPTY, LinearBackbone, cond, linear_step, net, noise
from PIL import Image
from torch import tensor
from torch.nn.functional import softplus

from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError, NonFiniteError
from sculpt_dist.core.types import TextCond
from sculpt_dist.engine.companion import Companion
from sculpt_dist.engine.optimizer import ShardedVector
from sculpt_dist.engine.sharding import Fragment, Shard
from sculpt_dist.maths.closed_form import EditSystem, fusion_factors
from sculpt_dist.maths.diffusion import focal_shares
from sculpt_dist.methods import adv_unlearn, ant, ascent, doco, erase_diff, esd, fmn, mace, npo, spm
from sculpt_dist.methods.parts.regions import attended, read_masks, within
from sculpt_dist.run.setup import resolve


def drawn(step, index: int, steps: int, guidance: float, what: str = "trajectory") -> torch.Tensor:
    """The latents that a student of weight 0.5 draws of a prompt of number 5, by an own loop of DDIM."""
    sampler = LinearBackbone.schedule.first_order(steps)
    latents = noise(step, what)
    for moment in sampler.timesteps[:index]:
        without, with_prompt = 0.5 * latents + EMPTY, 0.5 * latents + 5
        latents = sampler.step(without + guidance * (with_prompt - without), moment, latents, return_dict=False)[0]
    return latents


# esd with erase_from


def test_esd_erases_the_target_from_the_superclass():
    step = linear_step(net(0.5), net(0.25))
    method = esd.Method(esd.Config(eta=2.0, sampler_steps=1, erase_from="superclass"))
    x = noise(step, "trajectory")  # before the first step: pure noise
    label = (0.25 * x + 7) - 2 * (5 - EMPTY)  # the superclass's prompt is 7, the target's 5
    torch.testing.assert_close(method.losses(step).terms["forget"], (0.5 * x + 7 - label).pow(2).mean())


def test_esd_with_the_student_as_its_teacher_loses_the_targets_guidance_alone():
    same = net(0.5)
    (term,) = (
        esd.Method(esd.Config(sampler_steps=1, erase_from="superclass")).losses(linear_step(same, same)).terms.values()
    )
    assert float(term.detach()) == pytest.approx((5 - EMPTY) ** 2)
    with pytest.raises(ConfigError, match="method.erase_from=nothing: choose target or superclass"):
        esd.Method(esd.Config(erase_from="nothing"))


# fmn


def test_the_norm_of_a_2_by_3_map():
    first = tensor([[1.0, 2.0, 2.0], [0.0, 4.0, 0.0]])  # 1 + 4 + 4 + 16 = 25
    assert fmn.attention_norm([first[None, None]]).tolist() == [5.0]
    second = tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 4.0]])  # 4 + 4 + 16 = 24; both layers: 49
    assert fmn.attention_norm([first[None, None], second[None, None]]).tolist() == [7.0]
    both = torch.stack([first, second])[:, None]
    torch.testing.assert_close(fmn.attention_norm([both]), tensor([5.0, math.sqrt(24)]))  # each sample has its own


# mace


def test_the_refinement_of_a_2_by_2_matrix_with_one_shared_token():
    # W = [[1, 2], [3, 4]], e = (1, 0), e' = (0, 1), l = 1:  W' = (W + W e' e^T) (I + e e^T)^-1
    #    = [[1 + 2, 2], [3 + 4, 4]] diag(1/2, 1) = [[1.5, 2], [3.5, 4]]
    system = EditSystem(2, 1.0, 1.0, 0.1, torch.device("cpu"))
    system.add_erased(tensor([[1.0, 0.0]]), tensor([[0.0, 1.0]]))
    weight = tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(weight @ system.transform(), tensor([[1.5, 2.0], [3.5, 4.0]], dtype=torch.float64))


def test_the_fusion_of_two_adapters():
    # rows (1, 0) of the first concept and (1, 1) of the second, l = 1:
    #    W = I + [[1, 0], [0, 0]] + [[1, 1], [1, 1]] = [[3, 1], [1, 2]],  W^-1 = [[2, -1], [-1, 3]] / 5
    #    G_1 W^-1 = [[2, -1], [0, 0]] / 5,  G_2 W^-1 = [[1, 2], [1, 2]] / 5
    rows = tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    first, second = (row[:, None] @ row[None] for row in rows)
    whole = torch.eye(2, dtype=torch.float64) + first + second
    factors = [fusion_factors(own, whole) for own in (first, second)]
    torch.testing.assert_close(factors[0] * 5, tensor([[2.0, -1.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(factors[1] * 5, tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64))
    # changes dW_1 = (1, 0)^T (1, 2) and dW_2 = (0, 1)^T (3, 1): rank 1 each, the fused ones too
    changes = [tensor([[1.0, 2.0], [0.0, 0.0]]).double(), tensor([[0.0, 0.0], [3.0, 1.0]]).double()]
    fused = changes[0] @ factors[0] + changes[1] @ factors[1]
    torch.testing.assert_close(fused, tensor([[0.4, -0.2], [0.8, 1.6]], dtype=torch.float64))
    # it minimises |V e_1 - dW_1 e_1|^2 + |V e_2 - dW_2 e_2|^2 + |V|^2
    free = fused.clone().requires_grad_()
    terms = [(free @ row - change @ row).square().sum() for row, change in zip(rows, changes)]
    (sum(terms) + free.square().sum()).backward()
    assert free.grad.abs().max() < 1e-12


def test_mace_fuses_the_ranks_of_its_own_concept_alone():
    method = mace.Method(mace.Config(), fusing=tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64), concept=1)
    fused = method.fusion()("a.to_k.lora_A.default.weight", tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert fused.tolist() == [[1.0, 2.0], [4.0, 3.0]]
    assert method.fusion()("a.to_k.lora_B.default.weight", tensor([[5.0]])).tolist() == [[5.0]]


def test_mace_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match="method.ridge=0.0: must be greater than 0"):
        mace.Method(mace.Config(ridge=0.0))
    together = [
        "method.name=mace",
        "train.together=true",
        "mask.keep=1",
        "concepts=[{target: cat, superclass: animal}]",
    ]
    with pytest.raises(ConfigError, match="train.together=true: method.name=mace trains one concept after another"):
        resolve(load_config(None, together))
    with pytest.raises(NonFiniteError, match="the closed form has no single solution .*: raise method.ridge"):
        fusion_factors(torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))


def test_the_times_of_mace_gather_where_its_density_is():
    shares = focal_shares((torch.arange(10000) + 0.5) / 10000, mace.FOCUS, mace.RAMP)
    # the integral of s(50 (t - .2)) - s(50 (t - .4)) is (log(1 + e^(50 (t - .2))) - log(1 + e^(50 (t - .4)))) / 50
    below = [(math.log1p(math.exp(50 * (t - 0.2))) - math.log1p(math.exp(50 * (t - 0.4)))) / 50 for t in (0.15, 0.45)]
    inside = float(((shares > 0.15) & (shares < 0.45)).double().mean())
    assert inside == pytest.approx((below[1] - below[0]) / 0.2, abs=2e-3)
    assert float(shares.mean()) == pytest.approx(0.3, abs=2e-3)  # symmetric around the middle of 0.2 and 0.4


# spm


def test_spm_erases_as_esd_does_and_keeps_random_conditions():
    step = linear_step(net(0.5), net(0.25))
    terms = spm.Method(spm.Config(sampler_steps=1, anchor_weight=10.0, anchors=2)).losses(step).terms
    x = noise(step, "trajectory")
    label = (0.25 * x + EMPTY) - (5 - EMPTY)
    torch.testing.assert_close(terms["forget"], (0.5 * x + 5 - label).pow(2).mean())
    torch.testing.assert_close(terms["anchor"], 10 * (0.25 * x).pow(2).mean())  # the same condition for both nets
    same = net(0.5)
    assert (
        float(spm.Method(spm.Config(sampler_steps=1)).losses(linear_step(same, same)).terms["anchor"].detach()) == 0.0
    )


def test_the_anchors_of_spm_have_about_the_length_of_the_prompt():
    found = spm.scaled_noise(tensor([[3.0, 4.0], [0.0, 2.0]]), tensor([[6.0, 8.0], [1.0, 0.0]]), tensor([1.0, 0.5]))
    torch.testing.assert_close(found, tensor([[6.0, 8.0], [0.0, 0.5]]))


# doco


def test_the_surgery_of_doco_on_two_gradients():
    # g_a = (1, 0), g_b = (-1, 1), clipped to (-1, 1) / sqrt 2: cos = -1 / sqrt 2, and (1, 0) + cos' (-1, 1) / sqrt 2 =
    # (1, 0) + (-1, 1) / 2 = (1/2, 1/2), at right angles to g_b. In the other matrix they agree: g_a stays.
    weights = torch.nn.Parameter(torch.zeros(4))
    shard = Shard(weights, [Fragment("a", 0, 0, 0, 2), Fragment("b", 1, 0, 2, 2)])
    method = doco.Method(doco.Config(), SimpleNamespace(step=lambda: None))

    def vector(*values: float) -> ShardedVector:
        return ShardedVector([tensor(values)], None, [shard], 2)

    (alone,) = method.combine([vector(-1.0, 1.0, 0.0, 0.0), vector(1.0, 0.0, 0.0, 0.0)]).pieces
    torch.testing.assert_close(alone, tensor([0.5, 0.5, 0.0, 0.0]))
    (both,) = method.combine([vector(-0.6, 0.0, 0.8, 0.0), vector(0.6, 0.0, 0.8, 0.0)]).pieces
    torch.testing.assert_close(both, tensor([-0.4, 0.0, 0.8, 0.0]))  # 0.6 - 1: the cosine is not the projection
    plain = doco.Method(replace(doco.Config(), surgery=0.0), SimpleNamespace(step=lambda: None))
    (kept,) = plain.combine([vector(-1.0, 0.0, 1.0, 0.0), vector(3.0, 0.0, 4.0, 0.0)]).pieces
    torch.testing.assert_close(kept, tensor([0.6, 0.0, 0.8, 0.0]))  # only clipped


def test_the_discriminator_of_doco_learns_alone_at_first_without_gradient_to_the_net():
    step = linear_step(net(0.5), net(0.25))
    step.backbone.predicted_clean = lambda noisy, predicted, time: predicted
    judge = torch.nn.Conv2d(1, 1, 2)
    method = doco.Method(doco.Config(warmup=0.5), Companion(judge, 0.1, (0.5, 0.999), None))
    assert method.alone(0.5) is None
    terms = method.alone(0.49)(step).terms
    n = noise(step, "superclass")
    wanted, drawn = 0.25 * (2 + n) + 7, 0.5 * (2 + n) + 5  # both prompts on the same noisy samples
    expected = softplus(judge(wanted)).mean() + softplus(-judge(drawn)).mean()
    torch.testing.assert_close(terms["discriminator"], expected)
    assert set(terms) == {"discriminator"} and not terms["discriminator"].requires_grad
    both = method.forget(step).terms
    torch.testing.assert_close(both["forget"], softplus(judge(drawn)).mean())
    assert both["forget"].requires_grad and torch.equal(both["discriminator"], terms["discriminator"])


def test_the_discriminator_of_doco_halves_latents_down_to_a_patch():
    for size, expected in ((8, 1), (16, 1), (64, 3), (128, 7)):
        assert doco.discriminator(4, size, 16)(torch.zeros(2, 4, size, size)).shape == (2, 1, expected, expected)


def test_a_companion_takes_the_mean_gradient_of_its_calls_and_no_other():
    pair = []
    for losses in ([3.0], [1.0, 5.0]):  # their mean is the same
        module = torch.nn.Linear(1, 1, bias=False)
        module.weight.data.fill_(1.0)
        companion = Companion(module, 0.1, (0.5, 0.999), None)
        for factor in losses:
            companion.learn((factor * module.weight).sum())
            (100 * module.weight).sum().backward()  # as the student's backward does
        companion.step()
        pair.append(companion)
    assert torch.equal(pair[0].net.weight, pair[1].net.weight) and float(pair[0].net.weight.detach()) != 1.0
    torch.testing.assert_close(pair[0].state()["exp_avg 0"], tensor([0.5 * 3.0]))  # (1 - 0.5) times the gradient
    other = Companion(torch.nn.Linear(1, 1, bias=False), 0.1, (0.5, 0.999), None)
    other.restore(pair[0].state())
    for companion in (pair[0], other):
        companion.learn(companion.net.weight.sum())
        companion.step()
    assert torch.equal(other.net.weight, pair[0].net.weight)


# ant


@pytest.mark.parametrize("compat", [False, True])
def test_the_labels_of_ant_at_an_early_and_a_late_step(compat):
    step = linear_step(net(0.5), net(0.25))
    config = ant.Config(early=2, sampler_steps=10, strength=1.5, keep_weight=2.0, empty_weight=0.5)
    terms = ant.Method(replace(config, reference_compat=compat)).losses(step).terms
    cut = 8 if compat else 2
    first, second = int(step.rng.shared("first") * cut), cut + int(step.rng.shared("second") * (10 - cut))
    keeps, turns = (drawn(step, index, 10, 3.0) for index in ((second, first) if compat else (first, second)))
    torch.testing.assert_close(
        terms["reverse"], (0.5 * turns + 5 - (0.25 * turns + EMPTY - 1.5 * (5 - EMPTY))).pow(2).mean()
    )
    torch.testing.assert_close(
        terms["keep"], 2 * (0.5 * keeps + 5 - (0.25 * keeps + EMPTY + 1.5 * (5 - EMPTY))).pow(2).mean()
    )
    if compat:
        assert set(terms) == {"reverse", "keep"}
    else:
        torch.testing.assert_close(terms["reverse empty"], 0.5 * (0.25 * turns).pow(2).mean())
        torch.testing.assert_close(terms["keep empty"], (0.25 * keeps).pow(2).mean())


def test_ant_keeps_what_the_student_that_is_its_teacher_does():
    same = net(0.5)
    terms = ant.Method(ant.Config(early=2, sampler_steps=10)).losses(linear_step(same, same)).terms
    assert [float(terms[name].detach()) for name in ("keep", "reverse empty", "keep empty")] == [0.0, 0.0, 0.0]
    assert float(terms["reverse"].detach()) == pytest.approx((2 * (5 - EMPTY)) ** 2)
    with pytest.raises(ConfigError, match="method.early=10: must be above 0 and below"):
        ant.Method(ant.Config(early=10, sampler_steps=10))


# adv_unlearn


class Worded(LinearBackbone):
    """A backbone whose prompt is the sum of its number and of the soft words before it."""

    @property
    def words(self):
        return SimpleNamespace(
            open=lambda prompt, count: float(len(prompt)),
            ids=lambda: tensor([1]),
            vectors=lambda ids: [0.25 * ids[..., None].float()],
            embed=lambda number, vectors: TextCond(number + vectors[0].sum((1, 2)).view(-1, 1, 1)),
        )


def test_the_inner_step_of_adv_unlearn_on_a_linear_net():
    # The word adds d to the prompt's number 5: e = 0.5 x + 5 + d, wanted e0 = 0.25 x + 5. The gradient in d is positive
    # where d > -0.25 x on average, and Adam's first step is lr against its sign.
    step = linear_step(net(0.5), net(0.25))
    backbone = Worded()
    step = replace(step, backbone=backbone)
    for predictor in (step.student, step.teacher):
        predictor.backbone = backbone
    config = adv_unlearn.Config(attack_steps=1, attack_lr=0.125, sampler_steps=1, unattacked=0.0, retain_weight=0.5)
    method = adv_unlearn.Method(config, {"p" * 5: 5.0}, ["p" * 9], tensor([1]))
    n = noise(step, "attack 0")
    word = 0.25 - 0.125 * torch.sign((0.25 * (1 + n) + 0.25).flatten(1).mean(1))  # [B], from the vocabulary's 0.25
    x, y = noise(step, "trajectory"), noise(step, "retained")
    label = (0.25 * x + EMPTY) - (5 - EMPTY)
    terms = method.losses(step).terms
    torch.testing.assert_close(terms["forget"], (0.5 * x + 5 + word.view(-1, 1, 1, 1) - label).pow(2).mean())
    torch.testing.assert_close(terms["retain"], 0.5 * (0.25 * y).pow(2).mean())


def test_adv_unlearn_without_attack_is_esd_with_a_term_to_retain():
    same = net(0.5)
    method = adv_unlearn.Method(adv_unlearn.Config(sampler_steps=1, unattacked=1.0), {"p" * 5: 5.0}, ["p" * 9])
    terms = method.losses(linear_step(same, same)).terms
    assert float(terms["retain"].detach()) == 0.0
    assert float(terms["forget"].detach()) == pytest.approx((2 * (5 - EMPTY)) ** 2)


# erase_diff, npo, ascent


def test_erase_diff_weighs_forgetting_by_how_little_retaining_serves_it():
    def vector(*values: float) -> ShardedVector:
        return ShardedVector([tensor(values)], None)

    method = erase_diff.Method(erase_diff.Config(eta=1.0))
    (joined,) = method.combine([vector(1.0, 1.0), vector(1.0, 0.0)]).pieces  # w = 1 - 1/2
    assert joined.tolist() == [1.5, 0.5]
    (enough,) = method.combine([vector(1.0, 0.0), vector(2.0, 1.0)]).pieces  # w = max(0, 1 - 2)
    assert enough.tolist() == [2.0, 1.0]
    (fixed,) = erase_diff.Method(erase_diff.Config(weight=0.5)).combine([vector(2.0, 0.0), vector(0.0, 1.0)]).pieces
    assert fixed.tolist() == [1.0, 1.0]
    (nothing,) = method.combine([vector(0.0, 0.0), vector(0.0, 1.0)]).pieces
    assert nothing.tolist() == [0.0, 1.0]


def test_erase_diff_relabels_the_targets_samples_and_denoises_the_superclass():
    step = linear_step(net(0.5), net(0.25))
    terms = erase_diff.Method(erase_diff.Config()).losses(step).terms
    n = noise(step, "superclass")
    assert float(terms["forget"].detach()) == pytest.approx((5 - 7) ** 2)
    torch.testing.assert_close(terms["retain"], (0.5 * (2 + n) + 7 - n).pow(2).mean())
    target = step.batch.target
    step.batch.streams["target"] = replace(target, counterpart=target.cond)  # the other prompt is its own
    assert float(erase_diff.Method(erase_diff.Config()).forget(step).terms["forget"].detach()) == 0.0


def test_negative_preference_by_hand_and_its_limits():
    loss, before = tensor([1.0, 3.0], requires_grad=True), tensor([1.0, 1.0])
    found = npo.negative_preference(loss, before, 0.5)  # -4 mean(log 1/2, log 1 / (1 + e^-1))
    assert float(found.detach()) == pytest.approx(2 * (math.log(2) + math.log1p(math.exp(-1))))
    found.backward()
    torch.testing.assert_close(loss.grad, tensor([-1.0, -2 / (1 + math.e)]) / 2)  # full at first, fading when worse
    (small,) = torch.autograd.grad(npo.negative_preference(loss, before, 1e-6), loss)
    torch.testing.assert_close(small, tensor([-0.5, -0.5]), rtol=1e-5, atol=0)  # the gradient of ascent


def test_npo_of_a_student_that_is_its_teacher_is_log_2():
    same = net(0.5)
    step = linear_step(same, same)
    terms = npo.Method(npo.Config(beta=4.0, retain_weight=0.5)).losses(step).terms
    assert float(terms["forget"].detach()) == pytest.approx(math.log(2) / 2)
    n = noise(step, "superclass")
    torch.testing.assert_close(terms["retain"], 0.5 * (0.5 * (2 + n) + 7 - n).pow(2).mean())


def test_ascent_raises_the_targets_loss_and_may_retain():
    step = linear_step(net(0.5), net(0.25))
    n, m = noise(step, "target"), noise(step, "superclass")
    terms = ascent.Method(ascent.Config(retain_weight=0.1)).losses(step).terms
    torch.testing.assert_close(terms["forget"], -(0.5 * (1 + n) + 5 - n).pow(2).mean())
    torch.testing.assert_close(terms["retain"], 0.1 * (0.5 * (2 + m) + 7 - m).pow(2).mean())
    plain = ascent.Method(ascent.Config())
    assert set(plain.losses(step).terms) == {"forget"} and [spec.role for spec in plain.streams()] == ["target"]


@contextmanager
def maps_of(*layers: torch.Tensor):
    yield dict(enumerate(layers))


def test_mace_takes_the_norm_of_every_layer_within_the_region():
    # the frozen net attends to the name at the first of two places, which alone counts: sqrt(9 + 16) + sqrt(0 + 25)
    step = linear_step(net(0.5), net(0.25))
    one = [tensor([[3.0, 4.0], [7.0, 7.0]]), tensor([[0.0, 5.0], [1.0, 1.0]])]
    frozen = [tensor([[0.9, 0.9], [0.1, 0.1]])] * 2
    asked = iter([one, frozen])
    backbone = step.backbone
    backbone.attention_maps = lambda net, places, cond: maps_of(*(layer.expand(2, 1, 2, 2) for layer in next(asked)))
    method = mace.Method(mace.Config(), {"p" * 5: (1, 2)}, {})
    assert float(method.losses(step).terms["forget"]) == pytest.approx(10.0)
    asked = iter([one])
    whole = mace.Method(mace.Config(), {"p" * 5: (1, 2)}, None)  # a style: the whole image
    assert float(whole.losses(step).terms["forget"]) == pytest.approx(math.sqrt(123) + math.sqrt(27))


def test_conditions_are_chosen_by_sample():
    chosen = cond(5.0).where(tensor([True, False]), cond(7.0))
    assert chosen.tokens.flatten().tolist() == [5.0, 7.0] and chosen.pooled is None


def test_the_users_masks_choose_the_places_of_an_image(tmp_path):
    (tmp_path / "cat").mkdir()
    left = np.zeros((8, 8), np.uint8)
    left[:, :4] = 255
    Image.fromarray(left).save(tmp_path / "cat" / "3.png")
    masks = read_masks(str(tmp_path), "cat")
    assert set(masks) == {3} and float(masks[3].mean()) == pytest.approx(0.5, abs=0.02)
    kept = within(torch.ones(1, 1, 4, 1), masks, [3])  # 2 x 2 places, row by row
    assert kept.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match="method.masks: has no region 4.png"):
        within(torch.ones(1, 1, 4, 1), masks, [4])
    with pytest.raises(ConfigError, match="has no files dog/NUMBER.png"):
        read_masks(str(tmp_path), "dog")


def test_a_place_is_attended_to_above_half_of_the_maximum():
    maps = tensor([[[[0.9, 0.1], [0.2, 0.2], [0.4, 0.2]]]])  # means .5, .2, .3
    assert attended(maps).flatten().tolist() == [1.0, 0.0, 1.0]

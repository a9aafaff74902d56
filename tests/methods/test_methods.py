"""Contracts that every method keeps, and dm_cal's terms by hand."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from linear import linear_step, net, noise
from setups import method_of

from sculpt_dist.backbones.parts.groups import parameter_groups
from sculpt_dist.config.load import load_config
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugin, plugins
from sculpt_dist.methods.base import Editor, Method
from sculpt_dist.methods.dm_cal import Config
from sculpt_dist.methods.dm_cal import Method as DmCal

METHODS = plugins("sculpt_dist.methods")
TRAINED = [name for name in METHODS if plugin("sculpt_dist.methods", name, "").Method.kind == "trains"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_has_a_frozen_config_named_like_the_file_and_a_method(name):
    module = plugin("sculpt_dist.methods", name, "method.name")
    assert is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    assert {f.name: f.default for f in fields(module.Config)}["name"] == name
    assert issubclass(module.Method, (Method, Editor))
    assert isinstance(method_of(load_config(None, [f"method.name={name}"])), (Method, Editor))


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_trains_matrices_of_the_net_only(name):
    names = [
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn2.to_q.weight",
        "transformer_blocks.0.attn2.to_out.0.weight",
        "transformer_blocks.0.attn2.to_out.0.bias",
        "conv.weight",
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.0.attn2.to_v.weight",
    ]
    chosen = method_of(load_config(None, [f"method.name={name}"])).trainable(
        parameter_groups({n: (2,) if n.endswith("bias") else (2, 2) for n in names})
    )
    assert chosen and not any(entry.endswith("bias") for entry in chosen)


def test_dm_cal_trains_the_cross_attention():
    names = [f"b.{kind}.{part}.weight" for kind in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert list(DmCal(Config()).trainable(parameter_groups(dict.fromkeys(names, (2, 2))))) == [
        n for n in names if "attn2" in n
    ]


def test_saliency_is_plain_denoising_of_the_target():
    step = linear_step(net(0.5), net(0.5))
    n = noise(step, "target")
    expected = (0.5 * (1 + n) + 5 - n).pow(2).mean()
    torch.testing.assert_close(DmCal(Config()).saliency(step).terms["saliency"], expected)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_terms_with_a_teacher_label_by_hand(guidance):
    step = linear_step(net(0.5), net(0.25))
    terms = DmCal(Config(label_guidance=guidance, retain_weight=0.3, distill_weight=0.7)).losses(step).terms
    n_f, n_s, n_a = noise(step, "target"), noise(step, "superclass"), noise(step, "anchor")
    label = 0.25 * (1 + n_f) + 7 + guidance * (7 - 5)
    torch.testing.assert_close(terms["forget"], (0.5 * (1 + n_f) + 5 - label).pow(2).mean())
    torch.testing.assert_close(terms["retain"], 0.3 * (0.5 * (2 + n_s) + 7 - n_s).pow(2).mean())
    torch.testing.assert_close(terms["distill"], 0.7 * (0.25 * (3 + n_a)).pow(2).mean())


def test_student_label_is_the_published_one_and_passes_no_gradient():
    step = linear_step(net(0.5), net(0.25))
    term = DmCal(Config(label_source="student", label_guidance=0.0)).losses(step).terms["forget"]
    assert float(term.detach()) == pytest.approx((5 - 7) ** 2)
    term.backward()
    n = noise(step, "target")
    assert float(step.student.net.weight.grad) == pytest.approx(float((2 * (5 - 7) * (1 + n)).mean()), rel=1e-5)


def test_student_that_is_the_teacher_has_no_distillation():
    same = net(0.5)
    assert float(DmCal(Config()).losses(linear_step(same, same)).terms["distill"].detach()) == 0.0


def test_without_anchors_there_is_no_distillation_term():
    assert set(DmCal(Config()).losses(linear_step(net(0.5), net(0.5), anchored=False)).terms) == {"forget", "retain"}


def test_student_forwards_run_as_one_batch_and_the_teachers_as_another():
    step = linear_step(net(0.5), net(0.25))
    DmCal(Config()).losses(step)
    assert step.student.net.calls == [6] and step.teacher.net.calls == [6]


def test_reference_compat_computes_distillation_but_does_not_train_on_it():
    step = linear_step(net(0.5), net(0.25))
    method = DmCal(Config(reference_compat=True))
    terms = method.losses(step).terms
    assert float(terms["distill"]) == 0.0 and float(terms["forget"]) == pytest.approx(4.0)
    assert method.reference_mask and method.candidate_every(450) == 50 and method.judge({"forget": 2.0}) == 2.0


def test_unknown_choices_are_named():
    with pytest.raises(ConfigError, match="label_source=nobody"):
        DmCal(replace(Config(), label_source="nobody"))
    with pytest.raises(ConfigError, match="method.anchors"):
        DmCal(replace(Config(), anchors=["everything"]))
    with pytest.raises(ConfigError, match="method.anchor_share=1"):
        DmCal(replace(Config(), anchor_share=1.0))
    with pytest.raises(ConfigError, match="lacks the superclass"):
        DmCal(replace(Config(), anchor_share=0.5, anchors=["targets"]))

"""The options of Sculpting Memory, one by one and by hand, and the configurations that change one of them on the
canvas.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import PROJECT
from linear import linear_step, net, noise
from omegaconf import OmegaConf
from setups import backbone_of, method_of, plan_of, setup_of
from stream_folders import make_stream

from sculpt_dist.backbones.parts.groups import parameter_groups
from sculpt_dist.config.load import load_config, to_yaml
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.plugins import plugins
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer import MaskedAdamW
from sculpt_dist.engine.sharding import Fragment, Shard
from sculpt_dist.methods.base import Predictor
from sculpt_dist.methods.dm_cal import Config, Method
from sculpt_dist.run.build import build_engine
from sculpt_dist.run.plan import Plan
from sculpt_dist.run.prepare import data_folder
from sculpt_dist.run.trainer import concept_streams
from sculpt_dist.run.training_loop import LossWindow, _consider_candidate

CANVAS = PROJECT / "configs" / "canvas"
ABLATIONS = {  # file -> what it changes
    "distill_nothing": {"method.anchors": []},
    "distill_superclass": {"method.anchors": ["superclass"]},
    "distill_targets": {"method.anchors": ["targets"]},
    "guidance_0": {"method.label_guidance": 0.0},
    "guidance_1": {"method.label_guidance": 1.0},
    "guidance_2": {"method.label_guidance": 2.0},
    "no_mask": {"mask.keep": 1.0},
    "no_mask_lr_matched": {"mask.keep": 1.0, "train.lr": 4e-4},
    "per_matrix": {"mask.scope": "matrix"},
    "published_label": {"method.label_source": "student", "method.label_guidance": 0.0},
    "random_mask": {"mask.saliency": "random"},
    "reference_compat": {"method.reference_compat": True},
    "static_mask": {"mask.refresh": 0.0},
    "statistic_sum_abs": {"mask.saliency": "sum_abs"},
    "statistic_sum_sq": {"mask.saliency": "sum_sq"},
    "student_label": {"method.label_source": "student"},
}

PLAIN = {"keep": 0.5, "scope": "matrix", "saliency": "abs_sum", "seed": 0}


def flat(file: str) -> dict[str, Any]:
    """Every key of a configuration, with the method's defaults, dotted."""
    config = load_config(CANVAS / file)
    sections = OmegaConf.to_container(OmegaConf.create(to_yaml(config))) | {"method": vars(method_of(config).config)}
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    } | {"concepts": sections["concepts"]}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_is_named_for_and_nothing_else(name):
    ours, theirs = flat("dm_cal.yaml"), flat(f"ablations/{name}.yaml")
    assert ours.keys() == theirs.keys()
    assert {key: theirs[key] for key in ours if ours[key] != theirs[key]} == ABLATIONS[name] | {
        "run.folder": f"runs/canvas-dm_cal-{name}"
    }


def test_every_ablation_is_in_the_table():
    assert sorted(file.stem for file in (CANVAS / "ablations").glob("*")) == sorted(ABLATIONS)


def collected(gradients: list[list[float]], **settings: Any) -> tuple[MaskedAdamW, Shard, DynamicMask]:
    """One matrix of as many weights as a gradient has, after these collect steps and the building of the mask."""
    n = len(gradients[0])
    weights = torch.nn.Parameter(torch.zeros(n))
    optimizer, shard = MaskedAdamW([weights], (0.9, 0.999), 0.0, 0.0), Shard(weights, [Fragment("w", 0, 0, 0, n)])
    mask = DynamicMask([shard], {"w": n}, None, MaskSettings(**(PLAIN | {"keep": 0.25} | settings)))
    optimizer.statistic = mask.settings.saliency
    optimizer.attach([shard], mask, None)
    for gradient in gradients:
        step(optimizer, shard, gradient, "collect")
    mask.build()
    return optimizer, shard, mask


def step(optimizer: MaskedAdamW, shard: Shard, gradient: list[float], phase: str, lr: float = 0.1) -> None:
    optimizer.phase, optimizer.param_groups[0]["lr"] = phase, lr
    shard.master.grad = torch.tensor(gradient)
    optimizer.step()


@pytest.mark.parametrize(
    ("statistic", "opened"),
    [
        ("abs_sum", [0, 1, 0, 0]),
        ("sum_abs", [1, 0, 0, 0]),
        ("sum_sq", [0, 0, 1, 0]),
    ],  # sums 0 5 4.5 1; 6 5 5.5 1; 18 12.5 25.25 1
)
def test_each_statistic_opens_another_weight(statistic, opened):
    _, shard, _ = collected([[3.0, 2.5, 5.0, 1.0], [-3.0, 2.5, -0.5, 0.0]], saliency=statistic)
    assert shard.opened.tolist() == opened and not shard.saliency.any()


def test_the_random_statistic_looks_at_no_gradient():
    masks = [collected([gradient], saliency="random")[1].opened for gradient in ([9.0, 0, 0, 0], [0, 0, 0, 9.0])]
    assert torch.equal(*masks) and int(masks[0].sum()) == 1
    by_seed = {tuple(collected([[0.0] * 4], saliency="random", seed=seed)[1].opened.tolist()) for seed in range(40)}
    assert len(by_seed) == 4  # every weight is the open one for some seed


def two_matrices(**settings: Any) -> tuple[DynamicMask, Shard]:
    shard = Shard(torch.zeros(10, requires_grad=True), [Fragment("a", 0, 0, 0, 7), Fragment("b", 1, 0, 7, 3)])
    mask = DynamicMask([shard], {"a": 7, "b": 3}, None, MaskSettings(**(PLAIN | settings)))
    shard.saliency.copy_(torch.tensor([1.0, -2, 3, -4, 5, -6, 7, 80, -90, 100]))
    return mask, shard


@pytest.mark.parametrize(
    ("scope", "keep", "opened"),
    [
        ("matrix", 0.5, [4, 5, 6, 9]),  # int(3.5) of 7 and int(1.5) of 3
        ("global", 0.5, [5, 6, 7, 8, 9]),
        ("matrix", 0.3, [5, 6]),  # int(2.1) and int(0.9)
        ("global", 0.3, [7, 8, 9]),
    ],
)
def test_keep_is_a_share_of_the_scope_rounded_down(scope, keep, opened):
    mask, shard = two_matrices(scope=scope, keep=keep)
    mask.build()
    assert shard.opened.nonzero().flatten().tolist() == opened and mask.planned_open == mask.open_count == len(opened)


@pytest.mark.parametrize(
    ("scope", "share", "opened"),
    [
        ("matrix", 0.34, [0, 5, 6, 8]),  # int(1.02) of 3, and 1 of 1: 4 gives way to 0, 9 to 8
        ("matrix", 0.0, [0, 5, 6, 8]),  # at least one
        ("global", 0.4, [0, 1, 5, 6, 8]),  # 2 of 5: 7 and 9 give way to 0 and 1
    ],
)
def test_a_turnover_swaps_within_the_scope(scope, share, opened):
    mask, shard = two_matrices(scope=scope)
    mask.build()
    shard.saliency.copy_(torch.tensor([9.0, 8, 0, 0, 1, 2, 3, 0.5, 7, 0.25]))
    mask.turn_over(share, updates_done=1)
    assert shard.opened.nonzero().flatten().tolist() == opened
    assert mask.swapped == 2 and mask.overlap == pytest.approx(1 - 2 / len(opened))


def plan(*overrides: str) -> Plan:
    published = ["train.steps=450", "mask.collect=50", "mask.refresh=100", "mask.turnover=0.2", "mask.until=0.8"]
    config = load_config(None, [*published, *overrides])
    return plan_of(config, method_of(config))


def refreshes(made: Plan) -> list[int]:
    """After how many updates the mask turns over."""
    return [at - made.collect + 1 for at in range(made.collect, made.steps) if made.refreshes_after(at)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [100, 200, 300]),  # 400 is past 0.8 of 450
        (["mask.until=1.0"], [100, 200, 300, 400]),
        (["mask.until=0.4"], [100]),
        (["mask.refresh=0.2"], [90, 180, 270]),  # a share of the updates; 360 is 0.8 of them
        (["mask.refresh=0"], []),
        (["mask.turnover=0"], []),
        (["mask.keep=1"], []),
        (["mask.saliency=random", "mask.collect=0"], [100, 200, 300]),
        (["method.reference_compat=true"], [50, 150, 250, 350]),  # the 50 collect steps count, and ten epochs
    ],
    ids=str,
)
def test_refresh_and_until_decide_when_the_mask_turns_over(overrides, expected):
    assert refreshes(plan(*overrides)) == expected


def test_no_collect_steps_run_without_a_mask_or_with_random_saliency():
    assert (
        plan("mask.keep=1").collect,
        plan("mask.saliency=random", "mask.collect=0").collect,
        plan("mask.collect=0.1").collect,
    ) == (0, 0, 45)


def test_a_share_above_0_is_at_least_one_step():
    few = plan("mask.collect=0.001", "mask.refresh=0.001", "train.steps=100")
    assert (few.collect, few.refresh) == (1, 1)


def test_open_moments_are_refused_together_with_reference_compat():
    with pytest.raises(
        ConfigError, match="engine.moments=open: with method.reference_compat closed weights keep moving"
    ):
        plan("method.reference_compat=true", "engine.moments=open")


def test_the_published_clock_counts_the_collect_steps_and_its_schedule_never_ends():
    ours, theirs = (
        plan("train.lr=1.0", "train.warmup=0"),
        plan("train.lr=1.0", "train.warmup=0", "method.reference_compat=true"),
    )
    assert (ours.progress(50), theirs.progress(50)) == (0.0, 0.1)
    assert ours.learning_rate(499) == pytest.approx((1 + math.cos(math.pi * 449 / 450)) / 2, abs=1e-5)
    assert (
        theirs.learning_rate(499) == pytest.approx((1 + math.cos(math.pi * 449 / 500)) / 2, abs=1e-5)
        and theirs.learning_rate(499) > 0.02
    )


SHAPES = {
    f"b.{kind}.{part}.{leaf}": (2, 2) if leaf == "weight" else (2,)
    for kind in ("attn1", "attn2")
    for part in ("to_q", "to_k", "to_v", "to_out.0")
    for leaf in ("weight", "bias")
}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], MaskSettings(0.5, "matrix", "abs_sum", 0, resets_moments=True)),
        (["method.reference_compat=true"], MaskSettings(0.5, "matrix", "abs_sum", 0, resets_moments=False)),
        (
            ["mask.scope=global", "mask.keep=0.3", "mask.saliency=sum_sq", "train.seed=7"],
            MaskSettings(0.3, "global", "sum_sq", 7),
        ),
    ],
    ids=str,
)
def test_the_engine_is_given_the_masks_options(monkeypatch, overrides, expected):
    given: list[Any] = []
    monkeypatch.setattr(
        "sculpt_dist.engine.zero.Engine", lambda net, names, group, settings, mask, *stored: given.extend([names, mask])
    )
    backbone = SimpleNamespace(
        net=None, dtype=torch.float32, groups=lambda: parameter_groups(SHAPES), stored_weights=None
    )
    config = load_config(None, ["engine.stage=2", *overrides])
    build_engine(setup_of(config), backbone, SimpleNamespace(size=1))
    assert given == [[name for name in SHAPES if ".attn2." in name and name.endswith("weight")], expected]


def test_parts_choose_matrices_of_the_cross_attention():
    chosen = {
        part: list(Method(Config(parts=[part])).trainable(parameter_groups(SHAPES))) for part in ("q", "k", "v", "out")
    }
    assert chosen == {part: [f"b.attn2.to_{'out.0' if part == 'out' else part}.weight"] for part in chosen}
    names = {"add_embedding.linear_1.weight": (2, 3), "add_embedding.linear_1.bias": (2,), **SHAPES}
    both = Method(Config(parts=["k", "pooled"])).trainable(parameter_groups(names))
    assert list(both) == ["b.attn2.to_k.weight", "add_embedding.linear_1.weight"]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize(("source", "weight"), [("teacher", 0.25), ("student", 0.5), ("original", 0.125)])
def test_the_label_by_hand_for_each_source_and_guidance(source, weight, guidance):
    step = linear_step(net(0.5), net(0.25))
    object.__setattr__(step, "original", Predictor(step.backbone, net(0.125)))
    method = Method(Config(label_source=source, label_guidance=guidance))
    label = weight * (1 + noise(step, "target")) + 7 + guidance * (7 - 5)
    terms = method.losses(step).terms
    torch.testing.assert_close(terms["forget"], (0.5 * (1 + noise(step, "target")) + 5 - label).pow(2).mean())
    torch.testing.assert_close(
        terms["distill"], 0.25 * (0.25 * (3 + noise(step, "anchor"))).pow(2).mean()
    )  # by the teacher, whoever labels
    assert method.needs_original == (source == "original")
    asked = 4 if guidance else 2  # a prompt or two, two samples each
    assert step.original.net.calls == ([asked] if source == "original" else [])
    assert step.student.net.calls == ([asked, 6] if source == "student" else [6])
    assert step.teacher.net.calls == ([asked + 2] if source == "teacher" else [2])


@pytest.mark.parametrize("source", ["teacher", "student", "original"])
def test_no_label_passes_a_gradient(source):
    student, other = net(0.5), net(0.25)
    step = linear_step(student, other)
    object.__setattr__(step, "original", Predictor(step.backbone, other))
    Method(Config(label_source=source, label_guidance=1.0, retain_weight=0.0, distill_weight=0.0)).losses(
        step
    ).total.backward()
    n = noise(step, "target")
    weight = 0.5 if source == "student" else 0.25
    residual = 0.5 * (1 + n) + 5 - (weight * (1 + n) + 7 + 2)
    assert float(student.weight.grad) == pytest.approx(float((2 * residual * (1 + n)).mean()), rel=1e-5)
    assert source != "original" or other.weight.grad is None


def test_distillation_of_weight_0_adds_no_forward():
    step = linear_step(net(0.5), net(0.25))
    terms = Method(Config(distill_weight=0.0, label_guidance=0.0)).losses(step).terms
    assert set(terms) == {"forget", "retain"} and step.student.net.calls == [4] and step.teacher.net.calls == [2]


SOURCES = {"bird target": 100, "boat target": 200, "boat superclass": 300, "boat keep": 400}


@pytest.mark.parametrize(
    ("anchors", "concept", "expected"),
    [
        ([], 1, []),
        (["superclass"], 1, ["boat superclass"]),
        (["targets"], 1, ["bird target"]),
        (["targets", "superclass"], 1, ["bird target", "boat superclass"]),
        (["targets", "superclass", "keep"], 1, ["bird target", "boat superclass", "boat keep"]),
        (["keep"], 1, ["boat keep"]),
        (["targets", "superclass"], 1, ["bird target"] + 2 * ["boat superclass"]),  # share 2/3 by method.anchor_share
        (["targets"], 0, []),  # the first concept has no earlier ones
        (["targets", "keep"], 0, []),  # and this one keeps nothing
    ],
    ids=str,
)
def test_anchors_name_the_sources_of_the_stream(tmp_path, anchors, concept, expected):
    names = "concepts=[{target: bird, superclass: animal},{target: boat, superclass: vehicle, keep: [rocket]}]"
    share = ["method.anchor_share=0.6667"] if len(expected) > len(set(expected)) else []
    options = ["train.batch=6", f"run.folder={tmp_path}", f"method.anchors=[{','.join(anchors)}]", *share]
    config = load_config(None, [names, *options])
    for source, value in (SOURCES | {"bird superclass": 500}).items():
        name, role = source.split()
        of = next(one for one in config.concepts if one.target == name)
        make_stream(data_folder(tmp_path, of, role), 6, offset=value)
    streams = concept_streams(
        setup_of(config), SimpleNamespace(size_ids=None), SimpleNamespace(size=1, rank=0), concept
    )
    anchored = streams[0].get("anchor", [])
    found = [
        next(source for source, value in SOURCES.items() if value <= float(sample.latent.mean()) < value + 6)
        for sample in anchored
    ]
    assert sorted(found) == sorted(expected * (6 // max(1, len(expected))))


def test_saliency_is_reset_when_the_mask_is_built():
    optimizer, shard, mask = collected([[5.0, 4.0, 3.0, 0.0]], keep=0.5)
    assert shard.opened.tolist() == [1, 1, 0, 0]
    later = [0.0, -4.0, 1.0, 3.5]
    step(optimizer, shard, later, "train")
    assert shard.saliency.tolist() == later
    mask.turn_over(0.5, optimizer.updates)
    assert (shard.opened > 0).int().tolist() == [0, 1, 0, 1] and not shard.saliency.any()


def test_the_published_result_is_the_candidate_that_forgets_best():
    method = Method(Config(reference_compat=True))
    run = SimpleNamespace(method=method, plan=SimpleNamespace(updates=450), recent=LossWindow(), candidate=None)
    means = [9.0, 4.0, 2.0, 3.0, 2.5, 2.0, 8.0, 1.0, 7.0]  # of the ninths
    for update in range(450):
        spread = 0.5 if update % 2 else -0.5
        terms = {"forget": means[update // 50] + spread, "retain": -9.0 * update}
        _consider_candidate(run, SimpleNamespace(masters=lambda: update), terms)  # noqa: B023 (called within this turn)
    assert run.candidate == 8 * 50 - 1 and run.recent.best == pytest.approx(1.0)
    assert Method(Config()).candidate_every(450) == 0


@pytest.mark.parametrize("arch", plugins("sculpt_dist.backbones"))
def test_activations_computed_again_are_not_kept(arch):
    kept = []
    for overrides in ([], ["engine.checkpointing=true"]):
        config = load_config(None, [f"model.arch={arch}", "engine.stage=0", *overrides])
        backbone = backbone_of(config, Group())
        engine = build_engine(setup_of(config), backbone, Group())
        noisy, time = torch.randn(2, *backbone.latent_shape), backbone.sample_time(torch.tensor([0.3, 0.6]))
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            backbone.denoise(engine.net, noisy, time, backbone.embed(["a photo of a cat"] * 2))
        kept.append(saved)
    assert kept[1] < 0.5 * kept[0]

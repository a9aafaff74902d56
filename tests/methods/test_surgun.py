"""SurgUn by hand: each contrast, the choice of distractors and of blocks, and what calibration keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import PROJECT, TINY_RUN, sculpt
from linear import LinearBackbone, linear_step, net, noise

from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept, PrepareConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.shards import read_index
from sculpt_dist.maths.distances import farthest_points
from sculpt_dist.methods.base import Setup
from sculpt_dist.methods.surgun import Config, Method, text_points

CONFIG = str(PROJECT / "configs" / "canvas" / "surgun.yaml")
LAYERS = [
    f"{block}.{kind}.{part}"
    for block in ("down_blocks.0", "mid_block")
    for kind in ("attn1", "attn2")
    for part in ("to_q", "to_out.0")
]
GROUPS = {
    "matrices": tuple(f"{layer}.weight" for layer in LAYERS),
    "cross_attention": (
        *tuple(f"{layer}.weight" for layer in LAYERS if "attn2" in layer),
        "mid_block.attn2.to_out.0.bias",
    ),
    "self_attention": tuple(f"{layer}.weight" for layer in LAYERS if "attn1" in layer),
    "block.0": tuple(f"{layer}.weight" for layer in LAYERS if "down" in layer),
    "block.1": tuple(f"{layer}.weight" for layer in LAYERS if "mid" in layer),
}


def each(step) -> tuple[torch.Tensor, torch.Tensor]:
    """(l_T, l_D) [2] of a student of weight 0.5: both under the target's prompt, the number 5."""
    n_t, n_d = noise(step, "target"), noise(step, "distractor")
    lost = (0.5 * (1 + n_t) + 5 - n_t).pow(2).flatten(1).mean(1)
    return lost, (0.5 * (4 + n_d) + 5 - n_d).pow(2).flatten(1).mean(1)


def test_the_contrasts_by_hand():
    step = linear_step(net(0.5), net(0.25))
    lost, learned = each(step)
    terms = Method(Config(contrast_weight=0.3)).losses(step).terms
    torch.testing.assert_close(terms["learn"], learned.mean())
    torch.testing.assert_close(terms["contrast"], -0.3 * torch.log(lost / (lost + learned)).mean())
    ratio = Method(Config(contrast="ratio", contrast_weight=0.3)).losses(step)
    torch.testing.assert_close(ratio.total, 0.3 * (torch.log(learned) - torch.log(lost)).mean())
    margin = float(lost.min()) + 0.01  # between the two samples
    terms = Method(Config(contrast="margin", contrast_weight=0.3, margin=margin)).losses(step).terms
    torch.testing.assert_close(terms["contrast"], -0.3 * (lost.min() + margin) / 2)
    torch.testing.assert_close(terms["learn"], learned.mean())


@pytest.mark.parametrize("contrast", ["log", "ratio", "margin"])
def test_a_step_loses_the_target_and_learns_the_distractors(contrast):
    step = linear_step(net(0.5), net(0.25))
    method = Method(Config(contrast=contrast, contrast_weight=0.5, margin=1e6))
    before = each(step)
    loss = method.losses(step)
    weight = step.student.net.weight
    loss.total.backward()
    n_t, n_d = noise(step, "target"), noise(step, "distractor")
    d_lost = (2 * (0.5 * (1 + n_t) + 5 - n_t) * (1 + n_t)).flatten(1).mean(1)
    d_learned = (2 * (0.5 * (4 + n_d) + 5 - n_d) * (4 + n_d)).flatten(1).mean(1)
    lost, learned = before
    by_hand = {
        "log": d_learned - 0.5 * (d_lost / lost - (d_lost + d_learned) / (lost + learned)),
        "ratio": 0.5 * (d_learned / learned - d_lost / lost),
        "margin": d_learned - 0.5 * d_lost,
    }
    torch.testing.assert_close(weight.grad, by_hand[contrast].mean(), rtol=1e-5, atol=1e-6)


def test_both_streams_are_one_student_batch_without_a_teacher():
    step = linear_step(net(0.5), net(0.25))
    Method(Config()).losses(step)
    assert step.student.net.calls == [4] and step.teacher.net.calls == []


def test_farthest_points_are_taken_one_after_another():
    angles = np.deg2rad([0, 10, 90, 170, 200, 275])
    points = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1))
    assert farthest_points(points, torch.tensor([1.0, 0.0]), 3) == [
        3,
        5,
        2,
    ]  # 170 from 0; then 275 (85 from 0) before 90 (80 from 170)
    assert farthest_points(3 * points, torch.tensor([0.5, 0.0]), 3) == [3, 5, 2]  # lengths do not matter
    assert sorted(farthest_points(points, torch.tensor([1.0, 0.0]), 9)) == [0, 1, 2, 3, 4, 5]


def test_masked_padding_does_not_count_as_text():
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [100.0, 100.0]]])
    assert text_points(TextCond(tokens, token_mask=torch.tensor([[1, 1, 0]]))).tolist() == [[2.0, 1.0]]
    assert text_points(TextCond(tokens[:, :2])).tolist() == [[2.0, 1.0]]


def setup(*concepts: Concept, which: int = 0) -> Setup:
    return Setup(which, LinearBackbone(), 10, concept_prompts(concepts[which], PrepareConfig()), concepts)


def test_distractors_exclude_concepts_of_the_run_and_too_few_are_refused():
    cat, dog = Concept("cat", "animal"), Concept("Dog", "pet")
    method = Method(Config(candidates=["dog", "ANIMAL", "cat", "tree", "sun", "tree"], distractors=2))
    assert sorted(method.extra_concepts(setup(cat, dog))["distractor"]) == ["sun", "tree"]
    with pytest.raises(ConfigError, match="method.distractors=2, but only 1 candidates"):
        Method(Config(candidates=["dog", "sun"], distractors=2)).extra_concepts(setup(cat, dog))
    style = Concept("van gogh", None, "style")
    chosen = Method(Config(candidates=[], style_candidates=["a", "b", "van gogh"], distractors=2)).extra_concepts(
        setup(style)
    )
    assert sorted(chosen["distractor"]) == ["a", "b"]


def test_blocks_and_attention_choose_what_trains():
    def trains(**options):
        return list(Method(Config(**options)).trainable(GROUPS))

    assert len(trains()) == 8 and not any("bias" in name for name in trains())
    assert trains(blocks=[1], attention=["cross_attention"]) == [
        "mid_block.attn2.to_q.weight",
        "mid_block.attn2.to_out.0.weight",
    ]
    adapter = Method(Config(blocks=[0], rank=4)).adapter(GROUPS)
    assert adapter["r"] == adapter["lora_alpha"] == 4
    assert adapter["target_modules"] == [layer for layer in LAYERS if "down" in layer and "attn2" in layer] + [
        layer for layer in LAYERS if "down" in layer and "attn1" in layer
    ]
    assert Method(Config(rank=0)).adapter(GROUPS) is None
    with pytest.raises(ConfigError, match="no group 'block.7'"):
        trains(blocks=[7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "exp"}, "contrast=exp: choose one of log, ratio, margin"),
        ({"distractors": 0}, "distractors=0: must be at least 1"),
        ({"attention": ["mlp"]}, "attention=.*choose from cross_attention, self_attention"),
        ({"calibrations": 3, "calibration_images": 0}, "calibration_images=0: checkpoints are judged by images"),
    ],
)
def test_unknown_choices_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Method(replace(Config(), **options))


def test_calibration_prefers_what_erases_and_retains():
    method = Method(Config(calibrations=4, calibration_images=2))
    without_styles = [{"UA": 0.9, "IRA": 0.8}, {"UA": 1.0, "IRA": 0.65}]  # as `sculpt-dist localize` scores them
    assert min(without_styles, key=method.judge) == without_styles[0]
    assert (
        method.calibration_images == 2 and method.candidate_every(10) == 2 and Method(Config()).calibration_images == 0
    )
    assert method.judge({"UA": 0.9, "IRA": 0.8, "CRA": 1.0}) < method.judge({"UA": 1.0, "IRA": 0.5, "CRA": 1.0})


@pytest.mark.slow
def test_a_calibrated_run_draws_distractors_keeps_a_candidate_and_exports_plain_weights(tmp_path):
    arguments = [
        *TINY_RUN,
        "method.calibrations=2",
        "method.blocks=[2]",
        "evaluate.enabled=false",
        f"run.folder={tmp_path / 'run'}",
    ]
    sculpt("unlearn", CONFIG, *arguments)
    prompts = read_index(tmp_path / "run" / "data" / "object-bird" / "distractor")[0]["prompts"]
    config = load_config(tmp_path / "run" / "config.yaml")
    named = {prompt.split()[4] for prompt in prompts}
    assert len(named) == config.method["distractors"] and not named & {"bird", "boat", "animal", "vehicle"}
    assert not (tmp_path / "run" / "data" / "object-bird" / "superclass").exists()
    passes = json.loads((tmp_path / "run" / "costs.json").read_text())["passes"]
    drawn = 2 * 2 * 6 * 2 * 4  # concepts, roles, samples, guidance, steps
    calibrated = 2 * 2 * 60 * 2 * 2  # concepts, candidates, images, guidance, steps
    assert passes == {"prepare": drawn, "train": 2 * 6 * (4 + 4) * 3 + calibrated, "evaluate": 0}
    names = {path.name for path in (tmp_path / "run" / "model" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}

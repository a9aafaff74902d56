"""What a training step costs on this machine: the loop as it is, beside the bare passes that its losses need, and beside the work that
published code does for the same update on the same net.

The method is Sculpting Memory in its published form without distillation: the student's own label, then one forward with gradient over
target and superclass. Latents are random; nothing is drawn.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.bench.measure import timed
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept, RunConfig
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import concept_prompts
from sculpt_dist.data.shards import Sample
from sculpt_dist.data.streams import ConceptStreams, Layout
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.maths.losses import mse
from sculpt_dist.planning.plan import step_flops
from sculpt_dist.run.build import build_backbone, build_engine, build_method
from sculpt_dist.run.train import ConceptRun, LossWindow, make_plan, run_concept

CONCEPT = Concept(target="cat", superclass="animal")
PUBLISHED = ["method.label_source=student", "method.label_guidance=0", "method.anchors=[]", "method.retain_weight=0.25"]
SETTINGS = [*PUBLISHED, "mask.keep=0.5", "mask.collect=3", "train.checkpoint_every=0"]
STEPS = 20


class RandomReader:
    """Samples of a role, with latents of unit normal numbers."""

    def __init__(self, prompts: Sequence[str], shape: tuple[int, int, int], size_ids: tuple[int, ...] | None) -> None:
        rng = torch.Generator().manual_seed(0)
        self.samples = [
            Sample(torch.randn(shape, generator=rng), prompts[i % len(prompts)], i, size_ids) for i in range(64)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Sample:
        return self.samples[position]


def bench_step(arch: str, overrides: Sequence[str], group: Group, rounds: int = 3) -> dict[str, Any]:
    """Seconds of a step, its parts, and on one rank below stage 3 its floor and the published work; all ranks enter.

    Medians over `rounds` turns of `STEPS` steps each, in which the three take turns. Raises ConfigError for what a run would refuse.
    """
    config = load_config(None, [*SETTINGS, "train.batch=8", *overrides, f"model.arch={arch}", f"train.steps={STEPS}"])
    alone = group.size == 1 and config.engine.stage < 3
    entries: list[dict[str, Any]] = []
    floors: list[float] = []
    published: list[float] = []
    plain = build_backbone(config, group) if alone else None
    with tempfile.TemporaryDirectory() as folder, StopRequest(group, Path(folder)) as stop:
        train = _loop(config, group, entries.append, stop)
        for _ in range(rounds):
            train()
            if plain is not None:
                floors += _timed_passes(config, plain, group, _floor)
                published += _timed_passes(config, plain, group, _published)
    steps = [entry for entry in entries if entry["phase"] == "train" and "saliency" not in entry]
    seconds = median(entry["seconds"] for entry in steps)
    parts = {
        name: median(entry["time_shares"].get(name, 0.0) * entry["seconds"] for entry in steps)
        for name in steps[0]["time_shares"]
    }
    found: dict[str, Any] = {
        "arch": arch,
        "batch": config.train.batch,
        "stage": config.engine.stage,
        "ranks": group.size,
    }
    found |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(group.device),
        "seconds": seconds,
    }
    found |= {f"{name}_seconds": value for name, value in parts.items()}
    computing = seconds - parts["reduce"] - parts["data"]
    found["flops_per_second"] = (
        step_flops(replace(config, concepts=[CONCEPT]), group.size) / computing
    )  # what `plan --rates` reads
    if floors:
        found |= {"floor_seconds": median(floors), "floor_over_step": median(floors) / seconds}
        found |= {"published_seconds": median(published), "speedup_vs_published": median(published) / seconds}
    return found


def _loop(config: RunConfig, group: Group, log: Callable[[Any], None], stop: StopRequest) -> Callable[[], None]:
    """What runs the whole loop of one concept, each time from the first step."""
    backbone, method = build_backbone(config, group), build_method(config)
    prompts = concept_prompts(CONCEPT, config.prepare)
    backbone.embed([*prompts.target, *prompts.superclass])
    plan, engine = make_plan(config, method), build_engine(config, method, backbone, group)
    layout = Layout(config.train.batch, group.size, group.rank, config.train.accumulate)

    def reader(texts: Sequence[str]) -> RandomReader:
        return RandomReader(texts, backbone.latent_shape, backbone.size_ids)

    def train() -> None:
        readers = {"target": [reader(prompts.target)], "superclass": [reader(prompts.superclass)]}
        streams = ConceptStreams(readers, layout, config.train.seed, 0)  # type: ignore[arg-type]
        engine.begin_concept(0)
        trajectories = [Trajectory(backbone.schedule) for _ in range(config.train.accumulate)]
        teacher, start = engine.snapshot(), engine.masters()
        run = ConceptRun(
            0, CONCEPT.target, method, plan, streams, prompts, dict, teacher, None, LossWindow(), start, trajectories
        )
        run_concept(run, engine, backbone, config, log, lambda: None, stop)

    return train


def _timed_passes(
    config: RunConfig, backbone: Backbone, group: Group, passes: Callable[..., Callable[[], None]]
) -> list[float]:
    work = passes(config, backbone)
    work()
    return [timed(group, work) for _ in range(STEPS)]


def _inputs(config: RunConfig, backbone: Backbone) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, time and a goal of a whole batch."""
    rng = torch.Generator(backbone.device).manual_seed(0)
    noisy, goal = (
        torch.randn(config.train.batch, *backbone.latent_shape, generator=rng, device=backbone.device) for _ in range(2)
    )
    return noisy, backbone.sample_time(torch.rand(config.train.batch, generator=rng, device=backbone.device)), goal


def _conditions(config: RunConfig, backbone: Backbone) -> tuple[TextCond, TextCond]:
    prompts = concept_prompts(CONCEPT, config.prepare)
    names = [
        [texts[i % len(texts)] for i in range(config.train.batch)] for texts in (prompts.target, prompts.superclass)
    ]
    return backbone.embed(names[0]), backbone.embed(names[1])


def _floor(config: RunConfig, backbone: Backbone) -> Callable[[], None]:
    """The label without gradient; one forward over both streams; gradients of what trains."""
    net, (noisy, moment, goal), conds = backbone.net, _inputs(config, backbone), _conditions(config, backbone)
    trained = set(build_method(config).trainable(backbone.groups()))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)
    both = torch.cat([noisy, noisy]), torch.cat([moment, moment]), TextCond.cat(conds)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            label = backbone.denoise(net, noisy, moment, conds[1])
        forget, retain = backbone.denoise(net, *both).chunk(2)
        (mse(forget, label) + 0.25 * mse(retain, goal)).backward()

    return step


def _published(config: RunConfig, backbone: Backbone) -> Callable[[], None]:
    """Both prompts and both images encoded anew, three forwards, gradients of all weights, those of the trained ones masked, Adam.

    What METHODS of the reference does (see `dm_cal.REFERENCE`), but for its distillation term and its copy of the net.
    """
    net, (noisy, moment, goal) = backbone.net, _inputs(config, backbone)
    trained = set(build_method(config).trainable(backbone.groups()))
    prompts = concept_prompts(CONCEPT, config.prepare)
    texts = [
        [names[i % len(names)] for i in range(config.train.batch)] for names in (prompts.target, prompts.superclass)
    ]
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    weights = [parameter for name, parameter in net.named_parameters() if name in trained]
    masks = [torch.rand_like(weight) < config.mask.keep for weight in weights]
    sums = [torch.zeros_like(weight) for weight in weights]
    adam = torch.optim.Adam(weights, lr=1e-6)
    pixels = torch.rand(config.train.batch, 3, backbone.image_size, backbone.image_size, device=backbone.device) * 2 - 1

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            conds = [backbone.encode_prompts(prompt, False) for prompt in texts]
            images = [backbone.encode(pixels), backbone.encode(pixels)]
            label = backbone.denoise(net, noisy, moment, conds[1])
        assert len(images) == 2
        loss = mse(backbone.denoise(net, noisy, moment, conds[0]), label)
        (loss + 0.25 * mse(backbone.denoise(net, noisy, moment, conds[1]), goal)).backward()
        for weight, mask, total in zip(weights, masks, sums):
            total.add_(weight.grad)
            weight.grad.mul_(mask)
        adam.step()

    return step

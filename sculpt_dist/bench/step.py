"""Measures what a training step costs on this machine.

Compares the real training loop with the bare passes that its losses need (the floor), and with the work of published
code for the same update on the same net. The method is Sculpting Memory as published, without distillation: the
student's own label, then one forward with gradient over target and superclass. Latents are random; nothing is sampled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.bench.measure import timed
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.types import TextCond
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.shards import Sample
from sculpt_dist.data.streams import ConceptStreams, Layout
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.maths.losses import mse
from sculpt_dist.planning.plan import step_flops
from sculpt_dist.run.build import build_engine
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.setup import RunSetup, resolve
from sculpt_dist.run.training_loop import ConceptRun, LossWindow, run_concept

CONCEPT = Concept(target="cat", superclass="animal")
PUBLISHED = ["method.label_source=student", "method.label_guidance=0", "method.anchors=[]", "method.retain_weight=0.25"]
SETTINGS = [*PUBLISHED, "mask.keep=0.5", "mask.collect=3", "train.checkpoint_every=0"]
STEPS = 20


class RandomReader:
    """Samples of a role with random normal latents."""

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
    """Seconds of a step and of its parts; on one rank below stage 3 also of the floor and of the published work.

    All ranks must call it. Every figure is a median over `rounds` rounds of `STEPS` steps; each round times all three.
    Raises ConfigError for settings that a run refuses.
    """
    fixed = [f"model.arch={arch}", f"train.steps={STEPS}", "hold.prompts=null"]
    given = [*SETTINGS, "train.batch=8", *overrides, *fixed]
    setup = resolve(replace(load_config(None, given), concepts=[CONCEPT]))
    config = setup.config
    compares = group.size == 1 and config.engine.stage < 3
    entries: list[dict[str, Any]] = []
    floors: list[float] = []
    published: list[float] = []
    with tempfile.TemporaryDirectory() as folder, StopRequest(group, Path(folder)) as stop:
        work = Workload.of(setup, open_backbone(config.model, group, Path(folder))) if compares else None
        train = _loop(setup, open_backbone(config.model, group, Path(folder)), group, entries.append, stop)
        for _ in range(rounds):
            train()
            if work is not None:
                floors += _timed_passes(group, _floor(work))
                published += _timed_passes(group, _published(work))
    steps = [entry for entry in entries if entry["phase"] == "train" and "saliency" not in entry]
    seconds = median(entry["seconds"] for entry in steps)
    names = steps[0]["time_shares"]
    parts = {name: median(entry["time_shares"].get(name, 0.0) * entry["seconds"] for entry in steps) for name in names}
    found: dict[str, Any] = {
        "arch": arch,
        "batch": config.train.batch,
        "stage": config.engine.stage,
        "ranks": group.size,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(group.device),
        "seconds": seconds,
    }
    found |= {f"{name}_seconds": value for name, value in parts.items()}
    computing = seconds - parts["reduce"] - parts["data"]
    found["flops_per_second"] = step_flops(config, group.size) / computing  # read by `plan --rates`
    if floors:
        found |= {"floor_seconds": median(floors), "floor_over_step": median(floors) / seconds}
        found |= {"published_seconds": median(published), "speedup_vs_published": median(published) / seconds}
    return found


def _loop(
    setup: RunSetup, backbone: Backbone, group: Group, log: Callable[[Any], None], stop: StopRequest
) -> Callable[[], None]:
    """The training loop of one concept; each call starts at the first step."""
    (method, plan), train, (prompts,) = setup.trained, setup.config.train, setup.prompts
    backbone.embed([*prompts.target, *prompts.superclass])
    engine = build_engine(setup, backbone, group)
    layout = Layout(train.batch, group.size, group.rank, train.accumulate)

    def reader(texts: Sequence[str]) -> RandomReader:
        return RandomReader(texts, backbone.latent_shape, backbone.size_ids)

    def loop() -> None:
        readers = {"target": [reader(prompts.target)], "superclass": [reader(prompts.superclass)]}
        streams = ConceptStreams(readers, layout, train.seed, 0)
        engine.begin_concept(0)
        trajectories = [Trajectory(backbone) for _ in range(train.accumulate)]
        teacher, start = engine.snapshot() if method.needs_teacher else None, engine.masters()
        run = ConceptRun(
            0, CONCEPT.target, method, plan, streams, prompts, dict, teacher, None, LossWindow(), start, trajectories
        )
        run_concept(run, engine, backbone, train, log, lambda: False, lambda: None, stop)

    return loop


def _timed_passes(group: Group, step: Callable[[], None]) -> list[float]:
    step()
    return [timed(group, step) for _ in range(STEPS)]


@dataclass(frozen=True)
class Workload:
    """Input of the bare passes: a batch of random latents and the names of the trained parameters."""

    backbone: Backbone
    batch: int
    keep: float  # share of open weights
    prompts: ConceptPrompts
    trained: frozenset[str]
    noisy: Tensor  # [B, C, H, W]
    time: Tensor  # [B]
    goal: Tensor  # [B, C, H, W]

    @staticmethod
    def of(setup: RunSetup, backbone: Backbone) -> Workload:
        rng, batch = torch.Generator(backbone.device).manual_seed(0), setup.config.train.batch
        shape, device = (batch, *backbone.latent_shape), backbone.device
        noisy, goal = (torch.randn(*shape, generator=rng, device=device) for _ in range(2))
        time = backbone.sample_time(torch.rand(batch, generator=rng, device=device))
        trained = frozenset(setup.trained[0].trainable(backbone.groups()))
        return Workload(backbone, batch, setup.config.mask.keep, setup.prompts[0], trained, noisy, time, goal)

    @property
    def texts(self) -> list[list[str]]:
        """The prompts of a batch: those of the target, and those of the superclass."""
        streams = (self.prompts.target, self.prompts.superclass)
        return [[names[i % len(names)] for i in range(self.batch)] for names in streams]


def _floor(work: Workload) -> Callable[[], None]:
    """The label without gradient, one forward over both streams, and gradients of the trained parameters only."""
    backbone, net, noisy, time = work.backbone, work.backbone.net, work.noisy, work.time
    conds = [backbone.embed(texts) for texts in work.texts]
    both = torch.cat([noisy, noisy]), torch.cat([time, time]), TextCond.cat(conds)

    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in work.trained)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            label = backbone.denoise(net, noisy, time, conds[1])
        forget, retain = backbone.denoise(net, *both).chunk(2)
        (mse(forget, label) + 0.25 * mse(retain, work.goal)).backward()

    return step


def _published(work: Workload) -> Callable[[], None]:
    """The step of the published code (see `dm_cal.REFERENCE`), without its distillation term and its copy of the net.

    It encodes prompts and images in every step, runs three forwards, computes gradients of all weights, masks those of
    the trained weights, and updates with Adam.
    """
    backbone, net, noisy, time = work.backbone, work.backbone.net, work.noisy, work.time
    weights = [parameter for name, parameter in net.named_parameters() if name in work.trained]
    masks = [torch.rand_like(weight) < work.keep for weight in weights]
    sums = [torch.zeros_like(weight) for weight in weights]
    adam = torch.optim.Adam(weights, lr=1e-6)
    pixels = torch.rand(work.batch, 3, backbone.image_size, backbone.image_size, device=backbone.device) * 2 - 1

    net.requires_grad_(True)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            conds = [backbone.encode_prompts(prompts, False) for prompts in work.texts]
            images = [backbone.encode(pixels), backbone.encode(pixels)]
            label = backbone.denoise(net, noisy, time, conds[1])
        assert len(images) == 2
        loss = mse(backbone.denoise(net, noisy, time, conds[0]), label)
        (loss + 0.25 * mse(backbone.denoise(net, noisy, time, conds[1]), work.goal)).backward()
        for weight, mask, total in zip(weights, masks, sums):
            assert weight.grad is not None
            total.add_(weight.grad)
            weight.grad.mul_(mask)
        adam.step()

    return step

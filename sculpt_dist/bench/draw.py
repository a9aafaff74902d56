"""Measures what drawing and scoring images cost on this machine, and how much of it the denoiser's passes take."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sculpt_dist.bench.measure import timed
from sculpt_dist.config.load import load_config
from sculpt_dist.config.schema import Concept
from sculpt_dist.core.types import TextCond
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.evaluation.classifiers.base import load_classifier
from sculpt_dist.evaluation.evaluator import draw, evaluate
from sculpt_dist.evaluation.requests import as_batches
from sculpt_dist.planning.plan import pass_flops
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.setup import resolve

CONCEPT = Concept(target="cat", superclass="animal")
SETTINGS = ["evaluate.images=2", "evaluate.bootstrap=100"]


def bench_draw(arch: str, overrides: Sequence[str], group: Group, rounds: int = 3) -> dict[str, Any]:
    """Seconds per image of a whole evaluation (drawing, decoding, judging, writing, scoring) and of its parts.

    `denoiser_over_evaluation` is the share of the bare passes that the sampler needs. All ranks must call it. Every
    figure is a median over `rounds` rounds, each of which times all parts. Raises ConfigError for settings that a run
    refuses.
    """
    setup = resolve(replace(load_config(None, [*SETTINGS, *overrides, f"model.arch={arch}"]), concepts=[CONCEPT]))
    settings, world = setup.evaluation.settings, setup.evaluation.world
    batches = as_batches(setup.evaluation.requests, settings.batch)
    classifier = load_classifier(settings.classifier, world.objects, world.styles)
    batch, found = batches[0], dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder, StopRequest(group, Path(folder)) as stop:
        backbone = open_backbone(setup.config.model, group, Path(folder))
        backbone.embed([request.prompt for request in setup.evaluation.requests])
        prompts = [request.prompt for request in batch]
        cond, negative = backbone.embed(prompts), backbone.embed([""] * len(batch), negative=True)
        both = TextCond.cat([negative, cond])  # as the sampler asks for them, [2 B, ...]
        noise = torch.randn(len(batch), *backbone.latent_shape, device=backbone.device)  # [B, C, H, W]
        noisy = torch.cat([noise, noise])
        times = backbone.sample_time(torch.full((len(noisy),), 0.5, device=backbone.device))
        images = draw(settings, backbone, backbone.net, batch)  # uint8 [B, 3, h, w]
        denoiser = backbone.denoiser(backbone.net)

        def passes() -> None:
            with torch.inference_mode():
                for _ in range(settings.steps):
                    denoiser(noisy, times, both)

        def whole() -> None:
            with tempfile.TemporaryDirectory() as place:
                where = Path(group.from_first(place))
                evaluated = setup.evaluation, backbone, backbone.net, group, where, [CONCEPT], "bench", stop
                evaluate(*evaluated, "bench")
                group.barrier()

        parts = {
            "denoiser": passes,
            "sampling": lambda: backbone.sample(denoiser, noise, cond, negative, settings.steps, batch[0].guidance),
            "decoding": lambda: backbone.decode(noise),
            "judging": lambda: classifier.classify(images),
            "evaluation": whole,
        }
        images_of = dict.fromkeys(parts, len(batch)) | {"evaluation": len(setup.evaluation.requests) / group.size}
        for _ in range(rounds):
            for name, work in parts.items():
                found.setdefault(name, []).append(timed(group, work) / images_of[name])
    seconds = {name: median(times) for name, times in found.items()}
    return {
        "arch": arch,
        "images": len(setup.evaluation.requests),
        "batch": settings.batch,
        "steps": settings.steps,
        "ranks": group.size,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(group.device),
        **{f"{name}_seconds_per_image": value for name, value in seconds.items()},
        # read by `plan --rates`
        "sampler_flops_per_second": pass_flops(setup.config) * settings.steps / seconds["denoiser"],
        "denoiser_over_sampling": seconds["denoiser"] / seconds["sampling"],
        "denoiser_over_evaluation": seconds["denoiser"] / seconds["evaluation"],
    }

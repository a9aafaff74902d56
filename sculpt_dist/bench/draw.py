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
    with tempfile.TemporaryDirectory() as own, StopRequest(group, Path(own)) as stop:
        folder = group.from_first(own)
        backbone = open_backbone(setup.config.model, group, Path(folder))
        backbone.embed([request.prompt for request in setup.evaluation.requests])
        prompts = [request.prompt for request in batch]
        cond, negative = backbone.embed(prompts), backbone.embed([""] * len(batch), negative=True)
        noise = torch.randn(len(batch), *backbone.latent_shape, device=backbone.device)
        guided = TextCond.cat([negative, cond]) if batch[0].guidance != 1 else cond
        noisy = noise if batch[0].guidance == 1 else torch.cat([noise, noise])
        times = backbone.sample_time(torch.full((len(noisy),), 0.5, device=backbone.device))
        latents = noise
        images = draw(settings, backbone, backbone.net, batch)

        def passes() -> None:
            with torch.inference_mode():
                for _ in range(settings.steps):
                    backbone.denoise(backbone.net, noisy, times, guided)

        def sample() -> None:
            denoiser = backbone.denoiser(backbone.net)
            backbone.sample(denoiser, noise, cond, negative, settings.steps, batch[0].guidance)

        def whole(number: int) -> None:
            place = Path(folder) / f"{number}"
            evaluated = setup.evaluation, backbone, backbone.net, group, place, [CONCEPT], "bench", stop
            evaluate(*evaluated, "bench")

        for number in range(rounds):
            parts = {
                "denoiser": lambda: passes(),
                "sampling": lambda: sample(),
                "decoding": lambda: backbone.decode(latents),
                "judging": lambda: classifier.classify(images),
            }
            for name, work in parts.items():
                found.setdefault(name, []).append(timed(group, work) / len(batch))
            images_of_rank = len(setup.evaluation.requests) / group.size
            found.setdefault("evaluation", []).append(timed(group, lambda: whole(number)) / images_of_rank)  # noqa: B023
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

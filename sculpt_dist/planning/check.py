"""A dry run: a configuration against the settings of a full-size model, on the meta device, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch, Denoiser, Stream, TextCond
from sculpt_dist.data.prompts import ConceptPrompts
from sculpt_dist.data.streams import Draws
from sculpt_dist.engine.zero import DTYPES
from sculpt_dist.methods.base import LossFunction, Method, Predictor, Setup, Step
from sculpt_dist.run import build
from sculpt_dist.run.preflight import META, META_GROUP, as_model_error, check_decoding, check_settings, compare_stored
from sculpt_dist.run.train import Plan


def check_run(config: RunConfig, ranks: int) -> dict[str, Any]:
    """What a run on so many ranks would train, counted, after one step of shapes without values.

    Of a model folder only settings and headers are read; weights may be missing, but where they are there their names and shapes are
    compared. A hub id or a single file is fetched or unpacked as for a run. Evaluation is not looked at, and a closed form's edit is
    not made. Raises ConfigError and ModelError for what a run would stumble over.
    """
    prompts, method, plan, micro_batch = check_settings(config, ranks)
    backbone = open_backbone(config, prompts)
    net = backbone.net
    found = {
        "net": type(net).__name__,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "compared_weights": compare_stored(backbone, net),
        "latents": [micro_batch, *backbone.latent_shape],
        "tokens": [micro_batch, *backbone.embed(prompts[0].target[:1]).tokens.shape[1:]],
        "micro_batch": micro_batch,
        "image": check_decoding(backbone),
    }
    if plan is None:
        return found
    sizes = open_trainable(config, method, backbone)
    _try_losses(method, plan, backbone, prompts, micro_batch)
    return found | {
        "trainable": sum(sizes),
        "matrices": len(sizes),
        "shard": shard_elements(sizes, config.engine.stage, ranks),
        "steps": plan.steps,
    }


def open_backbone(config: RunConfig, prompts: Sequence[ConceptPrompts]) -> Backbone:
    """The run's pipeline on the meta device, its net as wide as the engine's, all prompts embedded. Raises ConfigError and ModelError."""
    backbone = build.build_backbone(config, META_GROUP)
    _check_prompts(backbone, prompts)
    backbone.net.to(DTYPES[config.engine.precision])
    return backbone


def shard_elements(sizes: Sequence[int], stage: int, ranks: int) -> int:
    """Elements that each rank's optimizer steps, padding included, as DeepSpeed 0.19.8 cuts trainable tensors of these sizes.

    Stage 0: all. Stages 1 and 2: one flat buffer, padded to a multiple of 2 x ranks and cut evenly. Stage 3: each tensor is padded to a
    multiple of the ranks and cut.
    """
    if stage == 0:
        return sum(sizes)
    if stage == 3:
        return sum(-(-size // ranks) for size in sizes)
    return 2 * -(-sum(sizes) // (2 * ranks))


def _check_prompts(backbone: Backbone, prompts: Sequence[ConceptPrompts]) -> None:
    """Pass all prompts of a run through the text encoders; raises ConfigError for one that is too long."""
    texts = [text for concept in prompts for text in (*concept.target, *concept.superclass, *concept.keep)]
    with as_model_error(f"{backbone.folder}, the text encoders"):
        backbone.embed(texts)
        backbone.embed(["", *(concept.negative for concept in prompts)], negative=True)


def open_trainable(config: RunConfig, method: Method, backbone: Backbone) -> list[int]:
    """Open the method's part of the net to training; returns the elements of each tensor of it."""
    net, told = backbone.net, f"method.name={config.method.get('name', 'dm_cal')}"
    with META:  # an adapter's own weights need no values either
        names = build.trained_names(config, method, backbone)
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    for name in names:
        if name not in shapes:
            raise ConfigError(f"{told} trains {name}, which {type(net).__name__} has not")
        if len(shapes[name]) < 2:
            raise ConfigError(
                f"{told} trains {name}, {list(shapes[name])}: only matrices can train, so leave biases and norms out"
            )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in set(names))
    return [shapes[name].numel() for name in names]


def _batch(method: Method, backbone: Backbone, prompts: Sequence[ConceptPrompts], size: int) -> ConceptBatch:
    """A micro-batch of the last concept, which has the most anchors; its latents have shapes alone."""
    last = prompts[-1]
    sources = {
        "targets": [text for earlier in prompts[:-1] for text in earlier.target],
        "superclass": last.superclass,
        "keep": last.keep,
    }
    anchors = [text for source, texts in sources.items() if source in method.anchors for text in texts]

    def stream(texts: Sequence[str]) -> Stream:
        chosen = tuple(texts[i % len(texts)] for i in range(size))
        return Stream(
            torch.empty(size, *backbone.latent_shape, device=META), backbone.embed(chosen), chosen, tuple(range(size))
        )

    target, superclass = stream(last.target), stream(last.superclass)
    return ConceptBatch(
        target, superclass, stream(anchors) if anchors else None, superclass.cond, target.cond, superclass, target.cond
    )  # distractors are chosen by values: the superclass's shapes stand for theirs


class MetaTrajectory(Trajectory):
    """A trajectory on the meta device: one step tells what all of them would."""

    def advance_to(
        self, index: int, steps: int, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float
    ) -> tuple[Tensor, Tensor]:
        return super().advance_to(min(index, 1), steps, denoiser, cond, negative, guidance)


def loss_functions(method: Method, plan: Plan) -> dict[str, LossFunction]:
    """What a run asks of a method, by name: the saliency where it is collected, then every loss group."""
    collected = {"the saliency": method.saliency} if plan.collect else {}
    return collected | {f"loss group {i}": function for i, function in enumerate(method.loss_groups())}


def first_step(
    method: Method, plan: Plan, backbone: Backbone, prompts: Sequence[ConceptPrompts], size: int
) -> tuple[Method, Step]:
    """(the method, prepared for the last concept; a micro-batch of it), as shapes."""
    frozen: Any = torch.no_grad  # of a teacher only the missing gradient can be seen without values
    student, teacher = Predictor(backbone, backbone.net), Predictor(backbone, backbone.net, frozen)
    batch = _batch(method, backbone, prompts, size)
    with as_model_error(f"{backbone.folder / backbone.net_name}, the method's preparation"):
        method = method.prepare(Setup(0, backbone, plan.updates, prompts[-1]))
    draws, path = Draws(0, 0, 0, range(size), META), MetaTrajectory(backbone.schedule)
    return method, Step(
        student, teacher, teacher if method.needs_original else None, batch, backbone, draws, path, 0, 0.0
    )


def _try_losses(method: Method, plan: Plan, backbone: Backbone, prompts: Sequence[ConceptPrompts], size: int) -> None:
    """The method's losses of one step, as shapes. Raises ModelError where shapes do not fit, ConfigError where a loss cannot train."""
    method, step = first_step(method, plan, backbone, prompts, size)
    latents, tokens = list(step.batch.target.latents.shape), list(step.batch.target.cond.tokens.shape)
    for what, function in loss_functions(method, plan).items():
        with as_model_error(f"{backbone.folder / backbone.net_name}, {what} on latents {latents} and tokens {tokens}"):
            losses = function(step)
        for name, term in losses.terms.items():
            if term.numel() != 1:
                raise ConfigError(
                    f"the method's term {name!r} of {what} has the shape {list(term.shape)}: a term is one number"
                )
        if not losses.total.requires_grad:
            raise ConfigError(f"{what} of the method depends on none of the weights that it trains")

"""A dry run: try a configuration on a full-size model's settings, on the meta device, without a GPU.

Weights may be missing; where they are there, they are only read for values that are not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.io.checking import check_finite
from sculpt_dist.backbones.parts.trajectory import Trajectory
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.core.types import ConceptBatch, Denoiser, Stream, TextCond
from sculpt_dist.data.streams import EARLIER_TARGETS, HOLD, Draws, Layout, StreamSpec
from sculpt_dist.engine.zero import DTYPES
from sculpt_dist.methods.base import LossFunction, Method, Predictor, Setup, Step
from sculpt_dist.run.build import trained_names
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.plan import Plan
from sculpt_dist.run.preflight import META, META_GROUP, as_model_error, check_decoding, compare_stored
from sculpt_dist.run.setup import RunSetup, resolve


def check_run(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Try one step with shapes alone, and count what a run on `ranks` ranks would train.

    Weights may be missing; if they exist, their names and shapes are compared, and their values must be finite. A hub
    id is fetched and a single file is unpacked, as for a run. The evaluation is not checked, and a
    closed form makes no edit, nor is a guard fitted. Raises ConfigError and ModelError for what would stop a run.
    """
    setup = resolve(config)
    micro_batch = setup.micro_batch(ranks)
    backbone = open_on_meta(setup)
    check_finite(backbone.folder, (backbone.net_name, *backbone.parts))
    net = backbone.net
    found = {
        "net": type(net).__name__,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "compared_weights": compare_stored(backbone, net),
        "latents": [micro_batch, *backbone.latent_shape],
        "tokens": [micro_batch, *backbone.embed(setup.prompts[0].target[:1]).tokens.shape[1:]],
        "micro_batch": micro_batch,
        "image": check_decoding(backbone),
    }
    if setup.plan is None:
        return found
    sizes = open_trainable(setup, backbone)
    _try_losses(setup, backbone, micro_batch)
    return found | {
        "trainable": sum(sizes),
        "matrices": len(sizes),
        "shard": shard_elements(sizes, config.engine.stage, ranks),
        "steps": setup.plan.steps,
    }


def open_on_meta(setup: RunSetup) -> Backbone:
    """The run's pipeline on the meta device, its net in the engine's precision, all prompts embedded.

    Raises ConfigError for a prompt that is too long, and ModelError.
    """
    backbone = open_backbone(setup.config.model, META_GROUP, setup.folder)
    prompts = setup.prompts
    texts = [text for concept in prompts for text in (*concept.target, *concept.superclass, *concept.keep)]
    texts += setup.held
    with as_model_error(f"{backbone.folder}, the text encoders"):
        backbone.embed(texts)
        backbone.embed(["", *(concept.negative for concept in prompts)], negative=True)
    backbone.net.to(DTYPES[setup.config.engine.precision])
    return backbone


def shard_elements(sizes: Sequence[int], stage: int, ranks: int) -> int:
    """Elements that each rank's optimizer steps, padding included, as DeepSpeed 0.19.8 cuts tensors of these sizes.

    Stage 0: all. Stages 1 and 2: one flat buffer, padded to a multiple of 2 x ranks and cut evenly. Stage 3: each
    tensor is padded to a multiple of the ranks and cut.
    """
    if stage == 0:
        return sum(sizes)
    if stage == 3:
        return sum(-(-size // ranks) for size in sizes)
    return 2 * -(-sum(sizes) // (2 * ranks))


def open_trainable(setup: RunSetup, backbone: Backbone) -> list[int]:
    """Open the method's part of the net to training; returns the number of elements of each of its tensors."""
    net, method = backbone.net, f"method.name={setup.method_name}"
    with META:  # an adapter's own weights need no values either
        names = trained_names(setup, backbone)
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    for name in names:
        if name not in shapes:
            raise ConfigError(f"{method} trains {name}, which {type(net).__name__} lacks")
        if len(shapes[name]) < 2:
            raise ConfigError(
                f"{method} trains {name}, {list(shapes[name])}: only matrices can train, so leave biases and norms out"
            )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in set(names))
    return [shapes[name].numel() for name in names]


class MetaTrajectory(Trajectory):
    """A trajectory on the meta device, where one step stands for all."""

    def advance_to(
        self, index: int, steps: int, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float
    ) -> tuple[Tensor, Tensor]:
        return super().advance_to(min(index, 1), steps, denoiser, cond, negative, guidance)


def loss_functions(method: Method, plan: Plan) -> dict[str, LossFunction]:
    """What a run computes with a method, by name: the saliency where it is collected, then every loss group."""
    collected = {"the saliency": method.saliency} if plan.collect else {}
    return collected | {f"loss group {i}": function for i, function in enumerate(method.loss_groups())}


def first_step(setup: RunSetup, backbone: Backbone, size: int) -> tuple[Method, Step]:
    """(the method, prepared for the last concept; a micro-batch of it), as shapes."""
    method, plan = setup.trained
    frozen: Any = torch.no_grad  # without values, a teacher differs only in having no gradient
    student, earlier = Predictor(backbone, backbone.net), Predictor(backbone, backbone.net, frozen)
    batch = _batch(method, backbone, setup, size)
    with as_model_error(f"{backbone.folder / backbone.net_name}, the method's preparation"):
        method = method.prepare(
            Setup(0, backbone, plan.updates, setup.prompts[-1], setup.concepts[-1:], setup.prompts[-1:])
        )
    draws, path = Draws(0, 0, 0, range(size), META), MetaTrajectory(backbone)
    teacher, original = (earlier if needed else None for needed in (method.needs_teacher, method.needs_original))
    return method, Step(student, teacher, original, batch, backbone, draws, path, 0, 0.0)


def _batch(method: Method, backbone: Backbone, setup: RunSetup, size: int) -> ConceptBatch:
    """A micro-batch of the last concept, which has the most anchors; its latents have shapes alone."""
    prompts, last = setup.prompts, setup.prompts[-1]
    known = {
        "target": last.target,
        "superclass": last.superclass,
        "keep": last.keep,
        EARLIER_TARGETS: tuple(text for earlier in prompts[:-1] for text in earlier.target),
        HOLD: setup.held,
    }

    def stream(spec: StreamSpec, texts: Sequence[str]) -> Stream:
        positions = Layout(size, 1, 0, 1).shared(spec).positions(0)
        chosen = tuple(texts[i % len(texts)] for i in positions)
        latents = torch.empty(len(chosen), *backbone.latent_shape, device=META)
        cond = backbone.embed(chosen)
        return Stream(latents, cond, chosen, tuple(positions), tuple(positions), cond)

    streams = {}
    for spec in method.streams():
        # values choose a method's own sources, so the superclass's shapes stand in for them
        texts = [text for source in spec.source_names for text in known.get(source, last.superclass)]
        if texts:
            streams[spec.role] = stream(spec, texts)
    return ConceptBatch(streams)


def _try_losses(setup: RunSetup, backbone: Backbone, size: int) -> None:
    """Compute the method's losses of one step as shapes.

    Raises ModelError where shapes do not fit, ConfigError where a loss cannot train.
    """
    method, step = first_step(setup, backbone, size)
    stream = next(iter(step.batch.streams.values()))
    latents, tokens = list(stream.latents.shape), list(stream.cond.tokens.shape)
    for what, function in loss_functions(method, setup.trained[1]).items():
        where = f"{backbone.folder / backbone.net_name}, {what} on latents {latents} and tokens {tokens}"
        with as_model_error(where):
            losses = function(step)
        for name, term in losses.terms.items():
            if term.numel() != 1:
                raise ConfigError(
                    f"the method's term {name!r} of {what} has the shape {list(term.shape)}: a term is one number"
                )
        if not losses.total.requires_grad:
            raise ConfigError(f"{what} of the method depends on none of the weights that it trains")

"""A dry run: a configuration against the settings of a full-size model, on the meta device, without weights and without a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, nn

from sculpt_dist import build
from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.shared.find import first_line
from sculpt_dist.backbones.shared.folders import has_weights
from sculpt_dist.backbones.shared.trajectory import Trajectory
from sculpt_dist.config import check_batch
from sculpt_dist.data.prompts import ConceptPrompts, concept_prompts
from sculpt_dist.data.streams import Draws
from sculpt_dist.engine.zero import DTYPES, check_fit
from sculpt_dist.errors import ConfigError, ModelError
from sculpt_dist.methods.base import Editor, LossFunction, Method, Predictor, Setup, Step
from sculpt_dist.settings import RunConfig
from sculpt_dist.train import Plan, make_plan
from sculpt_dist.types import ConceptBatch, Denoiser, Stream, TextCond

META = torch.device("meta")
NOWHERE: Any = SimpleNamespace(device=META, on_first=lambda work: work())  # where a run has its group of ranks


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
        "compared_weights": _compare_stored(backbone, net),
        "latents": [micro_batch, *backbone.latent_shape],
        "tokens": [micro_batch, *backbone.embed(prompts[0].target[:1]).tokens.shape[1:]],
        "micro_batch": micro_batch,
        "image": _check_decoding(backbone),
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


def check_settings(config: RunConfig, ranks: int) -> tuple[list[ConceptPrompts], Method | Editor, Plan | None, int]:
    """The part of the check that looks at no model: (prompts of each concept, method, plan of its training, a rank's micro-batch).

    Raises ConfigError.
    """
    if ranks < 1:
        raise ConfigError(f"ranks={ranks}: must be at least 1")
    if not config.concepts:
        raise ConfigError("concepts is empty: name at least one, for example 'concepts=[{target: cat, superclass: animal}]'")
    prompts = [concept_prompts(concept, config.prepare) for concept in config.concepts]
    method = build.build_method(config)
    plan = None if isinstance(method, Editor) else make_plan(config, method)
    return prompts, method, plan, check_batch(config, ranks)


def open_backbone(config: RunConfig, prompts: Sequence[ConceptPrompts]) -> Backbone:
    """The run's pipeline on the meta device, its net as wide as the engine's, all prompts embedded. Raises ConfigError and ModelError."""
    backbone = build.build_backbone(config, NOWHERE)
    _check_prompts(backbone, prompts)
    backbone.net.to(DTYPES[config.engine.precision])
    return backbone


def check_model(config: RunConfig, folder: Path) -> None:
    """One prediction and one decoded image, as shapes, and the names and shapes of the denoiser's weights.

    Raises ModelError where the components of a pipeline folder do not fit together, or the weights are not those of the settings.
    """
    backbone = build.build_backbone(config, NOWHERE, path=str(folder))
    _compare_stored(backbone, backbone.net)
    with _naming(f"{folder}, one prediction of {backbone.net_name} for one prompt"):
        cond = backbone.embed([""])
        noisy = torch.empty(1, *backbone.latent_shape, device=META)
        predicted = backbone.denoise(backbone.net, noisy, backbone.sample_time(torch.zeros(1)), cond)
    if predicted.shape != noisy.shape:
        raise ModelError(f"{folder / backbone.net_name}: predicts {list(predicted.shape)} for latents {list(noisy.shape)}")
    _check_decoding(backbone)


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
    with _naming(f"{backbone.folder}, the text encoders"):
        backbone.embed(texts)
        backbone.embed(["", *(concept.negative for concept in prompts)], negative=True)


def _check_decoding(backbone: Backbone) -> list[int]:
    """[3, h, w] of a decoded latent."""
    with _naming(f"{backbone.folder / 'vae'}, decoding latents {list(backbone.latent_shape)}"):
        image = list(backbone.decode(torch.empty(1, *backbone.latent_shape, device=META)).shape[1:])
    if image != [3, backbone.image_size, backbone.image_size]:
        raise ModelError(
            f"{backbone.folder / 'vae'}: decodes latents {list(backbone.latent_shape)} to {image}, not to images of "
            f"{backbone.image_size} pixels: its config.json and the denoiser's are not of one model"
        )
    return image


def _compare_stored(backbone: Backbone, net: nn.Module) -> bool:
    """Whether there are weights of the net. Raises ModelError when their names or shapes are not those of its settings."""
    part = backbone.folder / backbone.net_name
    if not has_weights(part):
        return False
    stored = {entry.name: entry.shape for entry in backbone.stored_entries()}
    expected = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    check_fit(stored, expected, part)
    return True


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
            raise ConfigError(f"{told} trains {name}, {list(shapes[name])}: only matrices can train, so leave biases and norms out")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in set(names))
    return [shapes[name].numel() for name in names]


def _batch(method: Method, backbone: Backbone, prompts: Sequence[ConceptPrompts], size: int) -> ConceptBatch:
    """A micro-batch of the last concept, which has the most anchors; its latents have shapes alone."""
    last = prompts[-1]
    sources = {"targets": [text for earlier in prompts[:-1] for text in earlier.target], "superclass": last.superclass, "keep": last.keep}
    anchors = [text for source, texts in sources.items() if source in method.anchors for text in texts]

    def stream(texts: Sequence[str]) -> Stream:
        chosen = tuple(texts[i % len(texts)] for i in range(size))
        return Stream(torch.empty(size, *backbone.latent_shape, device=META), backbone.embed(chosen), chosen, tuple(range(size)))

    target, superclass = stream(last.target), stream(last.superclass)
    return ConceptBatch(
        target, superclass, stream(anchors) if anchors else None, superclass.cond, target.cond, superclass, target.cond
    )  # distractors are chosen by values: the superclass's shapes stand for theirs


class Standing(Trajectory):
    """A trajectory on the meta device: one step tells what all of them would."""

    def walk_to(
        self, index: int, steps: int, denoiser: Denoiser, cond: TextCond, negative: TextCond, guidance: float
    ) -> tuple[Tensor, Tensor]:
        return super().walk_to(min(index, 1), steps, denoiser, cond, negative, guidance)


def loss_functions(method: Method, plan: Plan) -> dict[str, LossFunction]:
    """What a run asks of a method, by name: the saliency where it is collected, then every loss group."""
    collected = {"the saliency": method.saliency} if plan.collect else {}
    return collected | {f"loss group {i}": function for i, function in enumerate(method.loss_groups())}


def first_step(method: Method, plan: Plan, backbone: Backbone, prompts: Sequence[ConceptPrompts], size: int) -> tuple[Method, Step]:
    """(the method, prepared for the last concept; a micro-batch of it), as shapes."""
    frozen: Any = torch.no_grad  # of a teacher only the missing gradient can be seen without values
    student, teacher = Predictor(backbone, backbone.net), Predictor(backbone, backbone.net, frozen)
    batch = _batch(method, backbone, prompts, size)
    with _naming(f"{backbone.folder / backbone.net_name}, the method's preparation"):
        method = method.prepare(Setup(0, backbone, plan.updates, prompts[-1]))
    draws, path = Draws(0, 0, 0, range(size), META), Standing(backbone.schedule)
    return method, Step(student, teacher, teacher if method.needs_original else None, batch, backbone, draws, path, 0, 0.0)


def _try_losses(method: Method, plan: Plan, backbone: Backbone, prompts: Sequence[ConceptPrompts], size: int) -> None:
    """The method's losses of one step, as shapes. Raises ModelError where shapes do not fit, ConfigError where a loss cannot train."""
    method, step = first_step(method, plan, backbone, prompts, size)
    latents, tokens = list(step.batch.target.latents.shape), list(step.batch.target.cond.tokens.shape)
    for what, function in loss_functions(method, plan).items():
        with _naming(f"{backbone.folder / backbone.net_name}, {what} on latents {latents} and tokens {tokens}"):
            losses = function(step)
        for name, term in losses.terms.items():
            if term.numel() != 1:
                raise ConfigError(f"the method's term {name!r} of {what} has the shape {list(term.shape)}: a term is one number")
        if not losses.total.requires_grad:
            raise ConfigError(f"{what} of the method depends on none of the weights that it trains")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """What the libraries say of shapes that do not fit becomes a ModelError that says where."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # diffusers' nets raise all of these for inputs that do not fit
        raise ModelError(f"{where}: {first_line(error)}; compare the sizes in the config.json of the parts") from error

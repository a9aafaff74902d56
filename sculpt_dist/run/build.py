"""The engine of a run: the backbone's net under ZeRO, with the method's part of it open to training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.run.setup import RunSetup

if TYPE_CHECKING:
    from torch import nn

    from sculpt_dist.backbones.base import Backbone
    from sculpt_dist.engine.group import Group
    from sculpt_dist.engine.zero import Engine


def build_engine(setup: RunSetup, backbone: Backbone, group: Group) -> Engine:
    """Shard the backbone's net and open what the method trains.

    Raises ConfigError for a group that the net lacks, and when nothing would train.
    """
    import torch

    from sculpt_dist.engine.masking import MaskSettings
    from sculpt_dist.engine.zero import DTYPES, Engine, EngineSettings, sharded_net

    engine, train, mask = setup.config.engine, setup.config.train, setup.config.mask
    method, _ = setup.trained
    settings = EngineSettings(
        stage=engine.stage,
        precision=engine.precision,
        micro_batch=setup.micro_batch(group.size),
        accumulate=train.accumulate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        clip=train.clip,
        packed=engine.moments == "open",
        kernel=engine.kernel,
        gathered=engine.gathered,
        draw=engine.draw,
    )
    masking = MaskSettings(mask.keep, mask.scope, mask.saliency, train.seed, resets_moments=not method.reference_mask)
    if settings.stage == 3:
        backbone.release(backbone.net_name)
        shapes = {entry.name: entry.shape for entry in backbone.stored_entries()}
        backbone.net = sharded_net(backbone.empty_net, backbone.stored_weights(), group, settings, shapes)
    elif backbone.dtype != DTYPES[engine.precision]:
        backbone.load_net(DTYPES[engine.precision])
    groups = backbone.groups()
    names = trained_names(setup, backbone)
    if engine.checkpointing:
        backbone.net.enable_gradient_checkpointing()
    if engine.compile:
        backbone.net.forward = torch.compile(backbone.net.forward)  # below the hooks, which count passes

    def empty() -> nn.Module:
        """A net like the one that trains, with the method's adapter; its passes are counted."""
        net, adapter = backbone.empty_net(), adapter_of(setup, groups)
        if adapter is not None:
            backbone.add_adapter(adapter, train.seed, net)
        backbone.count_passes_of(net)
        return net

    return Engine(backbone.net, names, group, settings, masking, backbone.stored_weights, empty)


def adapter_of(setup: RunSetup, groups: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any] | None:
    """The options of the method's adapter, with room for all concepts where each has its own ranks."""
    method, _ = setup.trained
    adapter = method.adapter(groups)
    if adapter is None or not method.rank_per_concept:
        return adapter
    count = len(setup.concepts)
    return {**adapter, "r": count * adapter["r"], "lora_alpha": count * adapter["lora_alpha"]}


def refine(setup: RunSetup, backbone: Backbone, engine: Engine) -> None:
    """Set what the method changes in closed form before it trains."""
    changed = dict(setup.trained[0].refine(backbone, setup.prompts))
    engine.set_frozen(changed)
    if engine.group.is_first:  # the rank that merges and writes
        backbone.refined = {name: tensor.cpu() for name, tensor in changed.items()}


def open_own_ranks(setup: RunSetup, engine: Engine, number: int) -> None:
    """Train only the concept's own ranks of the adapter."""
    own, count = setup.trained_with(number), len(setup.concepts)
    rank = next(shape[0] for name, shape in engine.shapes.items() if ".lora_A." in name) // count
    engine.open_ranks(range(own.start * rank, own.stop * rank))


def trained_names(setup: RunSetup, backbone: Backbone) -> list[str]:
    """The parameters that the method trains; adds its adapter to the net, if it has one.

    Raises ConfigError for a group that the net lacks, and when nothing would train.
    """
    method, _ = setup.trained
    groups, net = backbone.groups(), type(backbone.net).__name__
    try:
        adapter = adapter_of(setup, groups)
        seed = setup.config.train.seed
        names = list(method.trainable(groups)) if adapter is None else backbone.add_adapter(adapter, seed)
    except KeyError as error:
        raise ConfigError(
            f"method.name={setup.method_name} trains the group {error}, which {net} lacks; there are: "
            f"{', '.join(groups)}"
        ) from error
    if not names:
        raise ConfigError(
            f"method.name={setup.method_name} trains nothing of {net}: name groups that it has: {', '.join(groups)}"
        )
    return names

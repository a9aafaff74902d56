"""Puts guards on denoisers, of a plain diffusers pipeline or of a backbone, and takes them off again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

from sculpt_dist.backbones.base import Backbone
from sculpt_dist.backbones.io.folders import DENOISERS
from sculpt_dist.core.errors import ModelError
from sculpt_dist.guards.parts.folder import GUARD, Fitted, check_net, read_guard

_guarded: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


def apply(pipeline: Any, folder: Path | str) -> None:
    """Put the guard in a folder, or in its subfolder `guard`, on a diffusers pipeline for SD 1.x/2.x, SDXL or SANA.

    The pipeline then draws without the targets, and `remove` undoes it. Raises ModelError for a folder that holds no
    guard, a damaged one, or one that was fitted to another kind of model; and where a guard is there already.
    """
    place = Path(folder)
    fitted = read_guard(place / GUARD if (place / GUARD).is_dir() else place)
    attach(_denoiser(pipeline), fitted, lambda: _is_doubled(pipeline))


def _is_doubled(pipeline: Any) -> bool:
    """Whether the present call of a pipeline guides."""
    try:
        return bool(pipeline.do_classifier_free_guidance)
    except AttributeError as error:  # it was never called
        raise ModelError(
            f"{type(pipeline).__name__}: another pipeline draws with its denoiser; put the guard on that one"
        ) from error


def remove(pipeline: Any) -> None:
    """Take the guard off a pipeline, which then draws as before. Raises ModelError where there is none."""
    handles = _guarded.pop(_denoiser(pipeline), None)
    if handles is None:
        raise ModelError(f"{type(pipeline).__name__}: has no guard that could be removed")
    for handle in handles:
        handle.remove()


def guard_backbone(backbone: Backbone, folder: Path) -> None:
    """Put the guard in a folder on a backbone's denoiser, and on every later one. Raises ModelError as `apply`."""
    fitted = read_guard(folder)
    backbone.guard_with(lambda net: attach(net, fitted, lambda: backbone.doubled))


def attach(net: nn.Module, fitted: Fitted, doubled: Callable[[], bool]) -> None:
    """Put a guard on a denoiser. Raises ModelError where it does not fit, or one is there already."""
    if net in _guarded:
        raise ModelError(f"{type(net).__name__}: has a guard already: remove it first")
    check_net(fitted, net)
    _guarded[net] = list(fitted.guard.act(net, fitted.tensors, doubled))


def _denoiser(pipeline: Any) -> nn.Module:
    for name in DENOISERS:
        net = getattr(pipeline, name, None)
        if isinstance(net, nn.Module):
            return net
    raise ModelError(f"{type(pipeline).__name__}: has no {' or '.join(DENOISERS)}: guards are for diffusers pipelines")

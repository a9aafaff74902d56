"""A run of a method in closed form: all concepts at once, without samples, steps or engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from sculpt_dist.core.errors import NonFiniteError
from sculpt_dist.methods.base import Editor
from sculpt_dist.run.session import Session
from sculpt_dist.track.tracker import stage_after


class EditorRun:
    """Runs an `Editor`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def prepare(self) -> dict[str, str]:
        """A closed form needs no samples."""
        return {}

    def unlearn(self) -> Iterator[tuple[str, Tensor | None]]:
        """Edit the net in place, with scores before and after; returns the changed weights, whole on every rank."""
        session, setup = self.session, self.session.setup
        assert isinstance(setup.method, Editor)
        net = session.backbone.net
        session.tracker.start()
        session.costs.set_passes("train", 0)
        session.score(lambda: nullcontext(net), "before", setup.concepts)
        with session.costs.counting("train"), torch.no_grad():
            changed = setup.method.edit(session.backbone, setup.prompts)
            for name, tensor in changed.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(f"method.name={setup.method_name}: the edit of {name} is not finite")
                net.get_parameter(name).copy_(tensor)
        count = sum(tensor.numel() for tensor in changed.values())
        total = sum(parameter.numel() for parameter in net.parameters())
        session.costs.weights = {"total": total, "trained": count, "open": count}
        session.score(lambda: nullcontext(net), stage_after(len(setup.concepts) - 1), setup.concepts)
        return ((name, changed[name]) for name in session.backbone.in_stored_order(changed))

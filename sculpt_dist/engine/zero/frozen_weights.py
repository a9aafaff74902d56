"""A frozen earlier state of the net: its trainable part only, sharded like the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FrozenWeights:
    """The net as it was when this was created: inside `with frozen():` the engine's net computes with those weights.

    The weights that never train are shared with the student. This keeps a copy of this rank's storage of the trainable
    ones (all of them in stages 0-2, 1 / ranks in stage 3). Entering swaps data pointers and copies nothing, so tensors
    saved by autograd are not touched. In stage 3 gathered copies are released first; otherwise persistent parameters
    would leak from one state into the other. Inside, only run forwards without gradient; all ranks must enter together.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        self._sharded = stage == 3
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._owners: list[nn.Module] = []
        if self._sharded:
            self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
            self._owners = [
                m for m in engine.module.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
            ]
        self._saved = [self._storage(p).data.clone() for p in self._parameters]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    def _storage(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor if self._sharded else parameter

    def _swap(self) -> None:
        for module in self._owners:
            self._coordinator.release_and_reset_all(module)
        for i, parameter in enumerate(self._parameters):
            storage = self._storage(parameter)
            storage.data, self._saved[i] = self._saved[i], storage.data

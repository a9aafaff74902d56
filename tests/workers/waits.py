"""Run by test_waits.py: where the training loop reads from the device, step by step.

Arguments: a method, and ZeRO stages. Prints {stage: [[phase of a step, its places], ...]} as JSON. On a GPU each of
these calls waits until all work that was launched before it is done. Nothing waits on a CPU, so calls are counted.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_dist.bench import step as bench
from sculpt_dist.config.load import load_config
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.stopping.request import StopRequest
from sculpt_dist.run.model import open_backbone
from sculpt_dist.run.setup import resolve

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}  # item, bool, float, int
METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}  # they reach no operator where the tensor is on the CPU already


def place() -> str:
    """Where in the project or a library the innermost call stands."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    file = re.search("(sculpt_dist|deepspeed)/.*", frame.f_code.co_filename)
    return f"{file[0] if file else frame.f_code.co_filename}:{frame.f_code.co_name}"


class Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        by_mask = operator is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        to_cpu = operator is aten._to_copy.default and str((options or {}).get("device")) == "cpu"
        if operator in READS or by_mask or (to_cpu and arguments[0].device.type != "cpu"):
            self.found.append(place())
        return operator(*arguments, **(options or {}))


class Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, method: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if method in METHODS:
            self.found.append(place())
        return method(*arguments, **(options or {}))


def places_of(stage: int, method: str) -> list[tuple[str, list[str]]]:
    """The phase of each step of a training loop, and its places."""
    given = [f"method.name={method}", "mask.collect=3", "train.checkpoint_every=0", f"engine.stage={stage}"]
    given += ["train.batch=2", "train.accumulate=2", "train.steps=2", "train.clip=1"]
    setup = resolve(replace(load_config(None, given), concepts=[bench.CONCEPT]))
    found: list[str] = []
    steps: list[tuple[str, list[str]]] = []
    group = Group(60)

    def log(entry: Mapping[str, Any]) -> None:
        steps.append((entry["phase"] + (" and mask" if "saliency" in entry else ""), found.copy()))
        found.clear()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stop = stack.enter_context(StopRequest(group, folder))
        loop: Callable[[], None] = bench._loop(
            setup, open_backbone(setup.config.model, group, folder), group, log, stop
        )
        stack.enter_context(Operators(found))
        stack.enter_context(Methods(found))
        loop()
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({stage: places_of(int(stage), sys.argv[1]) for stage in sys.argv[2:]}))

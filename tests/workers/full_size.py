"""Run by test_full_size.py on 2 ranks: a stage 3 engine on a net of SDXL's size, loaded and exported as streams; prints the memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from sculpt_dist.build import build_backbone, build_engine, build_method
from sculpt_dist.config import load_config
from sculpt_dist.engine import zero
from sculpt_dist.engine.group import Group
from sculpt_dist.export import export


def memory(kind: str) -> int:
    """Bytes of this process: VmHWM the peak, RssAnon what is its own (mapped files are not)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind + ":"))
    return int(line.split()[1]) * 1024


class OwnPeak:
    """The largest RssAnon seen, sampled as tensors go by and in between."""

    def __init__(self) -> None:
        import threading

        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, memory("RssAnon"))

    def take(self) -> int:
        peak, self.peak = self.peak, 0
        return peak


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    overrides = ["model.arch=sdxl", f"model.path={model}", "model.dtype=bfloat16", "engine.stage=3", "engine.precision=bf16", "train.batch=2"]
    config = load_config(None, overrides)
    group, watch = Group(1200), OwnPeak()
    method, backbone = build_method(config), build_backbone(config, group)
    before, began = memory("RssAnon"), time.monotonic()
    watch.take()
    told: dict[str, float] = {"before": before}
    shard = zero.sharded_net

    def told_shard(*arguments):
        net = shard(*arguments)
        told.update(net_seconds=time.monotonic() - began, net_peak=watch.take(), net=memory("RssAnon"))
        return net

    zero.sharded_net = told_shard
    engine = build_engine(config, method, backbone, group)
    told |= {"engine_peak": watch.take(), "engine": memory("RssAnon"), "mapped_too": memory("VmHWM")}
    for shard in engine.shards:  # something to export that is not the base
        shard.flat.add_(0.5)
    began = time.monotonic()
    export(config, backbone, engine.full_weights(), out, group)
    told |= {"export_seconds": time.monotonic() - began, "export_peak": watch.take(), "trained": engine.num_trained}
    ranks = group.to_all(told)
    if group.is_first:
        print(json.dumps(ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

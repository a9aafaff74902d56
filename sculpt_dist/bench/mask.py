"""What the mask costs at real sizes, on this machine: its refresh and its step on random data, beside how else they are
done.

Sizes are those of the cross-attention of the public models: Stable Diffusion 1.5 44.0 M weights in 64 matrices, SDXL
545.6 M in 280, SANA 1.6B 401.4 M in 80 (counted from their configurations).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sculpt_dist.bench.measure import growth, timed
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.engine.group import Group
from sculpt_dist.engine.masking import DynamicMask, MaskSettings
from sculpt_dist.engine.optimizer import MaskedAdamW
from sculpt_dist.engine.optimizer.kernels import choose_kernel
from sculpt_dist.engine.optimizer.kernels.plain import Plain
from sculpt_dist.engine.sharding import Fragment, Moments, Shard


def _unet(blocks: dict[int, int], text: int) -> list[int]:
    """Sizes of to_q, to_k, to_v and to_out of so many blocks of each width."""
    return [
        size
        for width, count in blocks.items()
        for _ in range(count)
        for size in (width**2, width * text, width * text, width**2)
    ]


PRESETS = {
    "sd15": _unet({320: 5, 640: 5, 1280: 6}, 768),
    "sdxl": _unet({640: 10, 1280: 60}, 2048),
    "sana": [2240**2] * 80,
}
TURNOVER = 0.2
KEEP = 0.5


@dataclass
class Stage:
    """This rank's even share of the weights, with everything that the mask keeps of them."""

    group: Group
    sizes: dict[str, int]
    scope: str
    shard: Shard = field(init=False)
    mask: DynamicMask = field(init=False)

    def __post_init__(self) -> None:
        total, group = sum(self.sizes.values()), self.group
        first, last = total * group.rank // group.size, total * (group.rank + 1) // group.size
        fragments, at = [], 0
        for index, (name, size) in enumerate(self.sizes.items()):
            low, high = max(first, at), min(last, at + size)
            if low < high:
                fragments.append(Fragment(name, index, low - at, low - first, high - low))
            at += size
        master = torch.nn.Parameter(torch.zeros(last - first, device=group.device))
        self.shard = Shard(master, fragments)
        self.mask = DynamicMask([self.shard], self.sizes, group, MaskSettings(KEEP, self.scope, "abs_sum", 0))
        self.mask.open_all()

    def collect(self, seed: int) -> None:
        """Another random saliency."""
        self.shard.saliency.normal_(
            generator=torch.Generator(self.group.device).manual_seed(seed * self.group.size + self.group.rank)
        )


def bench_mask(preset: str, scope: str, group: Group, weights: int | None = None, repeats: int = 3) -> dict[str, Any]:
    """Seconds of a turnover and of a masked step, and how they compare; all ranks enter. Comparisons are made on one
    rank alone.

    `weights` (all of them) takes only the first matrices. Times are the best of `repeats`, each on another saliency.
    """
    if preset not in PRESETS or scope not in ("matrix", "global"):
        raise ConfigError(f"--preset {preset} --scope {scope}: choose one of {', '.join(PRESETS)}; matrix or global")
    sizes: dict[str, int] = {}
    for i, size in enumerate(PRESETS[preset]):
        if weights is None or sum(sizes.values()) + size <= weights:
            sizes[f"matrix {i}"] = size
    if not sizes:
        raise ConfigError(f"--weights {weights}: the smallest matrix of {preset} has {PRESETS[preset][0]}")
    stage, total, alone = Stage(group, sizes, scope), sum(sizes.values()), group.size == 1
    stage.collect(0)
    found: dict[str, Any] = {
        "preset": preset,
        "scope": scope,
        "weights": total,
        "matrices": len(sizes),
        "ranks": group.size,
    }
    found |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(group.device)}
    found["build_seconds"] = timed(group, stage.mask.build)
    ours, theirs, equal = [], [], True
    other = _per_matrix_topk if scope == "matrix" else _argsort
    for repeat in range(1, repeats + 1):
        stage.collect(repeat)
        if alone:
            before, saliency = stage.shard.opened > 0, stage.shard.saliency.clone()
            theirs.append(timed(group, lambda: other(stage, before)))  # noqa: B023 (called within this turn)
        sent = group.bytes_communicated()
        with growth() as grown:
            ours.append(timed(group, lambda: stage.mask.turn_over(TURNOVER, repeat)))  # noqa: B023 (called within this turn)
        if alone:
            equal = equal and _differ_by_ties_alone(before, stage.shard.opened > 0, saliency, stage)
            del saliency
    found |= {"turnover_seconds": min(ours), "turnover_ns_per_weight": min(ours) / total * 1e9 * group.size}
    found |= {
        "extra_bytes_per_weight": grown[0] / (total / group.size),
        "bytes_communicated": group.bytes_communicated() - sent,
    }
    if alone:
        name = "speedup_vs_per_matrix_topk" if scope == "matrix" else "speedup_vs_argsort"
        found |= {name: min(theirs) / min(ours), "masks_equal": equal}
    return found | _bench_step(stage, repeats)


def _per_matrix_topk(stage: Stage, opened: Tensor) -> None:
    """The turnover as published code does it: index lists of open and closed weights of each matrix, and topk of
    each; `opened` changes.
    """
    for f in stage.shard.fragments:
        saliency, here = stage.shard.saliency[f.here].abs(), opened[f.here]
        count = max(1, int(TURNOVER * int(here.sum())))
        inside, outside = here.nonzero(as_tuple=True)[0], (~here).nonzero(as_tuple=True)[0]
        here[inside[torch.topk(saliency[inside], count, largest=False).indices]] = False
        here[outside[torch.topk(saliency[outside], count).indices]] = True


def _argsort(stage: Stage, opened: Tensor) -> None:
    """The turnover by one sort of all weights; `opened` changes."""
    order = torch.argsort(stage.shard.saliency.abs())
    was = opened[order]
    count = max(1, int(TURNOVER * int(opened.sum())))
    inside, outside = order[was], order[~was]
    opened[inside[:count]] = False
    opened[outside[-count:]] = True


def _differ_by_ties_alone(theirs: Tensor, ours: Tensor, saliency: Tensor, stage: Stage) -> bool:
    """Whether both opened as many of each size: where they differ, the sizes of the weights are the same."""
    for f in stage.shard.fragments if stage.scope == "matrix" else [slice(None)]:
        here = f.here if isinstance(f, Fragment) else f
        only = [saliency[here][a[here] & ~b[here]].abs().sort().values for a, b in ((theirs, ours), (ours, theirs))]
        if not torch.equal(*only):
            return False
    return True


def _bench_step(stage: Stage, repeats: int) -> dict[str, float]:
    """The masked step, saliency included, beside torch's fused AdamW on the same number of weights, turn by turn.

    `masked_step` as a run does it by default; `open_moments_step` with moments of open weights alone, `clipped_step`
    with clipping, which needs another pass, `plain_step` in plain torch.
    """
    shard, n, group = stage.shard, stage.shard.flat.numel(), stage.group
    shard.master.grad = torch.full_like(shard.master, 1e-3)
    kernel = choose_kernel("auto", group.device)
    adamw = torch.optim.AdamW([shard.master], lr=1e-5, weight_decay=0.0, fused=True)
    adamw.step()  # takes its memory
    found: dict[str, Any] = {"kernel": type(kernel).__name__.lower()}
    for name, computes, clip in (
        ("masked", kernel, 0.0),
        ("clipped", kernel, 1.0),
        ("plain", Plain(), 0.0),
        ("open_moments", kernel, 0.0),
    ):
        if name == "open_moments":
            shard.moments = Moments(shard.spans, n, group.device, packed=True)
        optimizer = MaskedAdamW([shard.master], (0.9, 0.999), 0.0, clip, computes)
        optimizer.attach([shard], stage.mask, group)
        optimizer.param_groups[0]["lr"], optimizer.phase = 1e-5, "train"
        pairs = [(timed(group, optimizer.step), timed(group, adamw.step)) for _ in range(repeats + 1)]
        masked, fused = (min(times) for times in zip(*pairs[1:]))  # the first takes memory
        found |= {f"{name}_step_ns_per_weight": masked / n * 1e9, f"{name}_step_over_adamw": masked / fused}
    stage.collect(repeats + 1)
    seconds = timed(group, lambda: stage.mask.turn_over(TURNOVER, repeats + 1))
    return found | {"adamw_ns_per_weight": fused / n * 1e9, "open_moments_turnover_ns_per_weight": seconds / n * 1e9}

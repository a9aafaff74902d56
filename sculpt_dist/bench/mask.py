"""Measures what the mask costs at real sizes: its refresh and the masked step on random data, against alternatives.

The sizes are those of the cross-attention in the public models, counted from their configurations: 44.0 M weights in
64 matrices for Stable Diffusion 1.5, 545.6 M in 280 for SDXL, and 401.4 M in 80 for SANA 1.6B.
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
    """Sizes of to_q, to_k, to_v and to_out in every block. `blocks`: number of blocks by width; `text`: text width."""
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
    """This rank's even share of the weights, with its mask and saliency."""

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
        """Replace the saliency by random numbers."""
        self.shard.saliency.normal_(
            generator=torch.Generator(self.group.device).manual_seed(seed * self.group.size + self.group.rank)
        )


def bench_mask(preset: str, scope: str, group: Group, weights: int | None = None, repeats: int = 3) -> dict[str, Any]:
    """Seconds of a turnover and of a masked step, and on one rank their speed against the alternatives.

    All ranks must call it. `weights` limits the total number of weights: only the first matrices are used. Times are
    the best of `repeats`, each with a new saliency. Raises ConfigError for an unknown preset or scope.
    """
    if preset not in PRESETS or scope not in ("matrix", "global"):
        raise ConfigError(f"--preset {preset} --scope {scope}: choose one of {', '.join(PRESETS)}; matrix or global")
    sizes: dict[str, int] = {}
    for i, size in enumerate(PRESETS[preset]):
        if weights is None or sum(sizes.values()) + size <= weights:
            sizes[f"matrix {i}"] = size
    if not sizes:
        raise ConfigError(f"--weights {weights}: the smallest matrix of {preset} has {min(PRESETS[preset])} weights")
    stage, total, compares = Stage(group, sizes, scope), sum(sizes.values()), group.size == 1
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
    seconds, other_seconds, equal = [], [], True
    other = _per_matrix_topk if scope == "matrix" else _argsort
    for repeat in range(1, repeats + 1):
        stage.collect(repeat)
        if compares:
            before, saliency = stage.shard.opened > 0, stage.shard.saliency.clone()
            other_seconds.append(timed(group, lambda: other(stage, before)))  # noqa: B023 (called within this iteration)
        sent = group.bytes_communicated()
        with growth() as grown:
            seconds.append(timed(group, lambda: stage.mask.turn_over(TURNOVER, repeat)))  # noqa: B023 (the same)
        if compares:
            equal = equal and _differ_only_in_ties(before, stage.shard.opened > 0, saliency, stage)
            del saliency
    found |= {"turnover_seconds": min(seconds), "turnover_ns_per_weight": min(seconds) / total * 1e9 * group.size}
    found |= {
        "extra_bytes_per_weight": grown[0] / (total / group.size),
        "bytes_communicated": group.bytes_communicated() - sent,
    }
    if compares:
        name = "speedup_vs_per_matrix_topk" if scope == "matrix" else "speedup_vs_argsort"
        found |= {name: min(other_seconds) / min(seconds), "masks_equal": equal}
    return found | _bench_step(stage, repeats)


def _per_matrix_topk(stage: Stage, opened: Tensor) -> None:
    """The turnover as in published code: topk over index lists of each matrix's open and closed weights.

    `opened` changes in place.
    """
    for f in stage.shard.fragments:
        saliency, here = stage.shard.saliency[f.here].abs(), opened[f.here]
        count = max(1, int(TURNOVER * int(here.sum())))
        inside, outside = here.nonzero(as_tuple=True)[0], (~here).nonzero(as_tuple=True)[0]
        here[inside[torch.topk(saliency[inside], count, largest=False).indices]] = False
        here[outside[torch.topk(saliency[outside], count).indices]] = True


def _argsort(stage: Stage, opened: Tensor) -> None:
    """The turnover by one sort of all weights. `opened` changes in place."""
    order = torch.argsort(stage.shard.saliency.abs())
    was = opened[order]
    count = max(1, int(TURNOVER * int(opened.sum())))
    inside, outside = order[was], order[~was]
    opened[inside[:count]] = False
    opened[outside[-count:]] = True


def _differ_only_in_ties(first: Tensor, second: Tensor, saliency: Tensor, stage: Stage) -> bool:
    """Whether the weights that only one mask opens have the same saliencies as those that only the other opens."""
    for f in stage.shard.fragments if stage.scope == "matrix" else [slice(None)]:
        here = f.here if isinstance(f, Fragment) else f
        only = [saliency[here][a[here] & ~b[here]].abs().sort().values for a, b in ((first, second), (second, first))]
        if not torch.equal(*only):
            return False
    return True


def _bench_step(stage: Stage, repeats: int) -> dict[str, float]:
    """The masked step with its saliency, and torch's fused AdamW on the same number of weights, timed alternately.

    `masked_step` is the default of a run. `clipped_step` clips the gradient, which takes another pass, `plain_step`
    uses plain torch, and `open_moments_step` keeps moments of the open weights only.
    """
    shard, n, group = stage.shard, stage.shard.flat.numel(), stage.group
    shard.master.grad = torch.full_like(shard.master, 1e-3)
    kernel = choose_kernel("auto", group.device)
    adamw = torch.optim.AdamW([shard.master], lr=1e-5, weight_decay=0.0, fused=True)
    adamw.step()  # allocates its memory
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
        masked, fused = (min(times) for times in zip(*pairs[1:]))  # the first pair allocates memory
        found |= {f"{name}_step_ns_per_weight": masked / n * 1e9, f"{name}_step_over_adamw": masked / fused}
    stage.collect(repeats + 1)
    seconds = timed(group, lambda: stage.mask.turn_over(TURNOVER, repeats + 1))
    return found | {"adamw_ns_per_weight": fused / n * 1e9, "open_moments_turnover_ns_per_weight": seconds / n * 1e9}

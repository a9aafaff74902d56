"""Several deltas of one base, merged into one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from sculpt_dist.backbones.formats.delta import BASE_CARD, CARD, changed_bits, check_fits, write_changed
from sculpt_dist.backbones.formats.delta_file import Delta, read_delta
from sculpt_dist.backbones.formats.stored_net import StoredNet
from sculpt_dist.core.errors import ConfigError, ModelError
from sculpt_dist.maths.merging import magnitude_threshold, merged_change

WAYS = ("mean", "task", "ties")


def merge_deltas(
    base: Path, files: Sequence[Path], output: Path, how: str = "ties", density: float = 0.2, scale: float = 1.0
) -> int:
    """Write `output`: the base with `scale` times the merged change of all deltas; returns the changed tensors.

    `how`: mean, task or ties, see `maths.merging`; `density`: for ties the share of a delta's weights that count, the
    largest ones among the tensors that the delta changes. The sums are fp32, rounded once to the base's dtypes. One
    delta's changes are in memory at a time for ties, several times over, else about a tensor of each. Raises
    ConfigError for impossible options, ModelError where `apply_delta` does and when a merged value overflows the base's
    dtype.
    """
    if how not in WAYS:
        raise ConfigError(f"--how {how}: choose {', '.join(WAYS)}")
    if not 0 < density <= 1 or not abs(scale) < float("inf"):
        raise ConfigError(
            f"--density {density} --scale {scale}: the density is above 0 and at most 1, the scale finite"
        )
    if len(files) < 2 or len({file.resolve() for file in files}) < len(files):
        raise ConfigError("merge: name two deltas or more, each once")
    if output.exists():
        raise ModelError(f"{output}: exists already; name a folder that does not")
    with ExitStack() as stack:
        net = StoredNet(base, stack)
        opened = {}
        for file in files:
            delta = read_delta(file)
            opened[file] = delta, stack.enter_context(safe_open(file, "pt"))
            check_fits(net, *opened[file], remove=False)
        thresholds = [
            _threshold(net, delta, change, density) if how == "ties" else 0 for delta, change in opened.values()
        ]
        changed = {name for delta, _ in opened.values() for name in delta.changes}
        result = partial(_merged, net, opened, how, thresholds, scale, changed)
        write_changed(net, output, result, partial(_write_card, files=files, how=how, density=density, scale=scale))
    return len(changed)


def _difference(net: StoredNet, change: Any, name: str) -> Tensor:
    """What a delta adds to a tensor, fp32."""
    return changed_bits(net[name], change.get_tensor(name)).float() - net[name].float()


def _threshold(net: StoredNet, delta: Delta, change: Any, density: float) -> float:
    return magnitude_threshold([_difference(net, change, name) for name in delta.changes], density)


def _merged(
    net: StoredNet,
    opened: Mapping[Path, tuple[Delta, Any]],
    how: str,
    thresholds: Sequence[float],
    scale: float,
    changed: set[str],
    name: str,
) -> Tensor:
    """A tensor of the merged model. A delta that does not change it adds nothing to it, and counts in the mean."""
    if name not in changed:
        return net[name]
    before = net[name].float()
    changes = [
        _difference(net, change, name) if name in delta.changes else before.new_zeros(before.shape)
        for delta, change in opened.values()
    ]
    after = (before + scale * merged_change(changes, how, thresholds)).to(net[name].dtype)
    if not after.float().isfinite().all():
        raise ModelError(f"{name}: the merged values are too large for {after.dtype}; give a smaller --scale")
    return after


def _write_card(folder: Path, files: Sequence[Path], how: str, density: float, scale: float) -> None:
    if (folder / CARD).exists():
        (folder / CARD).rename(folder / BASE_CARD)
    kept = f", density {density}" if how == "ties" else ""
    names = "\n".join(f"- {file.name}" for file in files)
    (folder / CARD).write_text(f"# A merged model\n\n`sculpt-dist merge`, {how}{kept}, scale {scale}, of\n\n{names}\n")

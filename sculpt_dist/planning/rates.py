"""The rates at which a machine computes and sends, as benchmarks measured them or the user gave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.maths.planning import Rates

GIGA = 1e9
KINDS = ("sum", "gather", "scatter")
OPTIONAL = {  # field of Rates -> its key, and the key's unit; what is not given keeps the default of Rates
    "update": ("masked_step_ns_per_weight", 1e-9),
    "sampling": ("sampler_flops_per_second", 1.0),  # of `bench draw`; by default as in training
    "disk": ("disk_gb_per_second", GIGA),
    "copy": ("copy_gb_per_second", GIGA),
    "store": ("store_us", 1e-6),
    "start": ("start_seconds", 1.0),
}
RATE_KEYS = (
    "flops_per_second",
    "latency_us",
    *(f"{kind}_gb_per_second" for kind in KINDS),
    *(key for key, _ in OPTIONAL.values()),
)


def read_rates(
    files: Sequence[Path], flops: float | None, bandwidth: float | None, latency: float | None
) -> Rates | None:
    """The rates of a rank: `flops` (operations per second), `bandwidth` (GB/s) and `latency` (microseconds).

    A rate that is None comes from `files`, the JSON of `bench comm`, `bench step`, `bench draw` and `bench mask`, or
    of your own with the same keys. Returns None if neither gives the operations per second. Raises ConfigError for a
    file that is not such JSON, and for rates that are not positive.
    """
    known: dict[str, float] = {}
    for file in files:
        try:
            content = json.loads(file.read_text().strip().splitlines()[-1])
            known |= {key: float(content[key]) for key in RATE_KEYS if content.get(key) is not None}
        except (OSError, ValueError, IndexError, AttributeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"--rates {file}: is not the JSON of a bench ({reason}): save the output of `bench comm --json` in it"
            ) from error
    given = {"flops_per_second": flops, "latency_us": latency} | {f"{kind}_gb_per_second": bandwidth for kind in KINDS}
    known |= {key: value for key, value in given.items() if value is not None}
    for key, value in known.items():
        if not value > 0:
            raise ConfigError(f"{key}={value:g}: a rate must be more than 0")
    if "flops_per_second" not in known:
        return None
    optional = {field: known[key] * unit for field, (key, unit) in OPTIONAL.items() if key in known}
    return Rates(
        flops=known["flops_per_second"],
        bandwidth={kind: known.get(f"{kind}_gb_per_second", 10.0) * GIGA for kind in KINDS},
        latency=known.get("latency_us", 50.0) * 1e-6,
        **optional,
    )

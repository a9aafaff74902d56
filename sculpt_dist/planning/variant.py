"""A configuration on a number of ranks, and the ways in which it can be changed to take less memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sculpt_dist.config.checks import check, check_batch
from sculpt_dist.config.schema import RunConfig
from sculpt_dist.core.errors import ConfigError
from sculpt_dist.methods.base import Method

RANKS = tuple(2**i for i in range(11))  # 1 to 1,024
FEW = 1e8  # elements that stage 3 may gather when memory is short

Change = Mapping[str, Any]  # key of the configuration (or "ranks") -> value


@dataclass(frozen=True)
class Variant:
    """What is planned: a configuration and its number of ranks."""

    config: RunConfig
    ranks: int

    def changed(self, changes: Sequence[Change]) -> Variant:
        """With these changes applied, one after another."""
        config, ranks = self.config, self.ranks
        for key, value in ((key, value) for change in changes for key, value in change.items()):
            if key == "ranks":
                ranks = value
                continue
            section, _, name = key.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        return Variant(config, ranks)

    @property
    def is_valid(self) -> bool:
        """Whether a run would accept it."""
        try:
            check(self.config)
            check_batch(self.config, self.ranks)
        except ConfigError:
            return False
        return True

    def changes(self, method: Method) -> Iterator[Change]:
        """What can still be changed, cheapest first.

        The cost rises from nothing over waiting, smaller passes, more passes, rounding and traffic to more machines.
        What the method cannot do is left out.
        """
        config, ranks = self.config, self.ranks
        drawn = max(config.prepare.batch, config.evaluate.batch)
        if config.engine.moments == "all" and config.mask.keep < 1 and not method.reference_mask:
            yield {"engine.moments": "open"}
        if drawn > 1:
            yield {f"{part}.batch": min(getattr(config, part).batch, drawn // 2) for part in ("prepare", "evaluate")}
        if config.train.background_save:
            yield {"train.background_save": False}
        if config.train.batch % (config.train.accumulate * 2 * ranks) == 0:
            yield {"train.accumulate": config.train.accumulate * 2}
        if not (config.engine.checkpointing or method.reads_attention):
            yield {"engine.checkpointing": True}
        if config.engine.precision == "fp32":
            yield {"engine.precision": "bf16", "engine.stage": max(2, config.engine.stage)}
        if config.engine.stage < 3 and ranks > 1:
            yield {"engine.stage": max(2, config.engine.stage + 1)}
        if config.engine.stage == 3 and ranks > 1 and config.engine.gathered > FEW:
            yield {"engine.gathered": FEW}
        if ranks * 2 <= RANKS[-1]:
            divides = config.train.batch % (ranks * 2 * config.train.accumulate) == 0
            yield {"ranks": ranks * 2} if divides else {"ranks": ranks * 2, "train.batch": config.train.batch * 2}

"""Everything distributed: the only room that imports deepspeed and torch.distributed.

`launch` starts the ranks, `group` holds the collectives. `zero/` wraps DeepSpeed ZeRO stages 0 to 3; `sharding/`
describes what this rank holds; `masking/` chooses which weights may move; `optimizer/` is the masked AdamW and its
kernels; `companion` is a small net that trains beside the student; `checkpoints/` saves and restores the shards;
`stopping/` handles signals, stop files and dead ranks. Every room from `data` upwards may import this one. No module
here imports deepspeed when it is imported: that waits for the first `Group` or `Engine`.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.checkpoints.save import Saver
    from sculpt_dist.engine.companion import Companion
    from sculpt_dist.engine.group import Group
    from sculpt_dist.engine.masking.mask import DynamicMask, MaskSettings
    from sculpt_dist.engine.optimizer.masked_adamw import MaskedAdamW, ShardedVector
    from sculpt_dist.engine.stopping.request import StopRequest
    from sculpt_dist.engine.stopping.watch import watched
    from sculpt_dist.engine.zero.engine import Engine
    from sculpt_dist.engine.zero.frozen_weights import FrozenWeights
    from sculpt_dist.engine.zero.settings import EngineSettings

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "companion": ["Companion"],
        "group": ["Group"],
        "zero.engine": ["Engine"],
        "zero.settings": ["EngineSettings"],
        "zero.frozen_weights": ["FrozenWeights"],
        "masking.mask": ["DynamicMask", "MaskSettings"],
        "optimizer.masked_adamw": ["MaskedAdamW", "ShardedVector"],
        "checkpoints.save": ["Saver"],
        "stopping.request": ["StopRequest"],
        "stopping.watch": ["watched"],
    },
)

"""What one rank holds: flat fp32 shards, and per weight its saliency, its mask byte and Adam's two moments.

`shards` defines Shard and Fragment (which slice of which parameter lies where); `moments` holds the moments, dense or
for open weights only; `partitions` finds the shards inside DeepSpeed's ZeRO optimizers. Only the engine and its
benchmarks import this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.sharding.moments import Moments, Piece
    from sculpt_dist.engine.sharding.partitions import check_coverage, find_shards, parameter_sizes
    from sculpt_dist.engine.sharding.shards import Fragment, Shard

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "shards": ["Fragment", "Shard"],
        "moments": ["Moments", "Piece"],
        "partitions": ["check_coverage", "find_shards", "parameter_sizes"],
    },
)

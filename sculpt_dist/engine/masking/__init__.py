"""Which weights may move: the dynamic mask of Sculpting Memory, exact over all ranks.

`mask` builds the mask from saliency and swaps weights at a turnover; `select` finds exactly which weights to close and
open with a radix selection over sharded data. The engine, the training loop and the benchmarks import this.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.masking.mask import MAX_GENERATIONS, DynamicMask, MaskSettings
    from sculpt_dist.engine.masking.select import Part, choose, chosen, payload_bytes, quantiles

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "mask": ["MAX_GENERATIONS", "DynamicMask", "MaskSettings"],
        "select": ["Part", "choose", "chosen", "payload_bytes", "quantiles"],
    },
)

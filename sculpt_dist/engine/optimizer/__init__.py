"""The optimizer that DeepSpeed steps: AdamW that leaves closed weights bit-identical.

`masked_adamw` defines MaskedAdamW, and ShardedVector, with which methods combine gradients; `kernels/` holds the
arithmetic of one step, in plain torch, C and Triton. Methods may import ShardedVector and sum_gradients; the rest is
for the engine and benchmarks.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.engine.optimizer.masked_adamw import Combine, MaskedAdamW, Pull, ShardedVector, sum_gradients

__getattr__, __dir__ = lazy_exports(
    __name__, {"masked_adamw": ["Combine", "MaskedAdamW", "Pull", "ShardedVector", "sum_gradients"]}
)

"""Benchmarks of this machine, run by `sculpt-dist bench`.

`mask` measures the mask's refresh and the masked step, `step` a training step, `draw` drawing and scoring, `embed` the
encoding of prompts, `edit` UCE's closed form, `comm` collectives between ranks, `data` the loader, and `concepts` a
long run. `measure` holds the clock and the memory meter. Only `cli` may import this package.
"""

from typing import TYPE_CHECKING

from sculpt_dist.core.exports import lazy_exports

if TYPE_CHECKING:
    from sculpt_dist.bench.comm import bench_comm
    from sculpt_dist.bench.concepts import bench_concepts
    from sculpt_dist.bench.data import bench_data
    from sculpt_dist.bench.draw import bench_draw
    from sculpt_dist.bench.edit import bench_edit
    from sculpt_dist.bench.embed import bench_embed
    from sculpt_dist.bench.mask import bench_mask
    from sculpt_dist.bench.step import bench_step

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "comm": ["bench_comm"],
        "concepts": ["bench_concepts"],
        "data": ["bench_data"],
        "draw": ["bench_draw"],
        "edit": ["bench_edit"],
        "embed": ["bench_embed"],
        "mask": ["bench_mask"],
        "step": ["bench_step"],
    },
)
